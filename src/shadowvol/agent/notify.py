"""Telling the service manager how the agent is (sd_notify(3)); nothing where none asks.

Own code, not a library: it is one datagram.
"""

import logging
import os
import socket

_VARIABLE = "NOTIFY_SOCKET"
_logger = logging.getLogger("shadowvol.agent")


class Notifier:
    """Takes the socket's address out of the environment: what the agent starts does not speak for the service."""

    def __init__(self) -> None:
        self._address = os.environ.pop(_VARIABLE, "")

    def ready(self, status: str) -> None:
        """`status`: one line, which `systemctl status` shows."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.connect(address)
                sender.send(text.encode())
        except OSError as error:  # the agent works as well; the service manager will say that it has heard nothing
            _logger.error("agent: the service manager cannot be told %s: %s", text.splitlines()[0], error)
