"""Whether standard error goes to systemd's journal, and the prefix that gives a line there its priority (sd-daemon(3)).

Apart from logs.py because the command line asks too, and loads no logging for it.
"""

import os
import sys

ERROR, WARNING, INFO, DEBUG = 3, 4, 6, 7  # syslog's priorities


def stderr_is_journal() -> bool:
    """JOURNAL_STREAM names device and inode of what systemd gave the service; a redirected stderr has others."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something that is no file
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


def prefix(priority: int) -> str:
    """For the beginning of a line on standard error; empty where that is not the journal."""
    return f"<{priority}>" if stderr_is_journal() else ""
