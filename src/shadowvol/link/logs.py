"""How every process of ours logs: plain lines on standard error, each with level, host and volume.

    2026-01-31 12:00:00,123 WARNING host1 db: the member is gone; starting it again
    <4>WARNING host1 db: the member is gone; starting it again        where standard error is systemd's journal

What is logged begins with the volume's name; with the word "agent", which no volume is called, where it is about the
agent itself. The agent chooses level and host; what it starts, and what that starts, finds both in the environment.
"""

import logging
import os
import socket
import sys

from shadowvol.link import journal

LEVELS = ("error", "warning", "info", "debug")
LEVEL_DEFAULT = "info"
LEVEL_VARIABLE, HOST_VARIABLE = "SHADOWVOL_LOG_LEVEL", "SHADOWVOL_HOST"


class _Lines(logging.Formatter):
    """For the journal each line of a record, a traceback's as well, has the priority; the time it knows by itself."""

    def __init__(self, host: str) -> None:
        self._for_journal = journal.stderr_is_journal()
        time = "" if self._for_journal else "%(asctime)s "
        super().__init__(f"{time}%(levelname)s {host.replace('%', '%%')} %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._for_journal:
            return text
        prefix = f"<{_priority(record.levelno)}>"
        return "\n".join(f"{prefix}{line}" for line in text.splitlines())


def _priority(level: int) -> int:
    if level >= logging.ERROR:
        return journal.ERROR
    if level >= logging.WARNING:
        return journal.WARNING
    return journal.INFO if level >= logging.INFO else journal.DEBUG


def pass_on(level: str, host: str) -> None:
    """For the agent: the processes that it starts from now on log at this level, as of this host."""
    os.environ[LEVEL_VARIABLE] = level
    os.environ[HOST_VARIABLE] = host


def configure() -> None:
    """Log from now on, as the environment says. What is no level (the agent refuses it) is the default."""
    level = os.environ.get(LEVEL_VARIABLE, "").lower()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(os.environ.get(HOST_VARIABLE) or socket.gethostname()))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel((level if level in LEVELS else LEVEL_DEFAULT).upper())
