"""The control protocol of the transfer process: one JSON object per line, both ways, over a stream socket.

encode() and LineBuffer are pure and serve both ends (the agent reads with trio); Channel is the blocking end of the
transfer process. A line that is too long, is not JSON or is not an object is a bug of the other end: WireError.
"""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

LINE_BYTES_MAX = 4 << 20  # a window of 64 MiB touched in every second block has 512 ranges, about 12 KiB
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_RECEIVE_BYTES = 1 << 16


class WireError(Exception):
    """The other end does not keep to the protocol; the connection is of no more use."""


def encode(message: Message) -> bytes:
    """One message as a line. Raises WireError when it is longer than the other end would take."""
    line = _to_json(message).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise WireError(f"a message of {len(line)} bytes is too long")
    return line


class LineBuffer:
    """Bytes as they arrive in, whole messages out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, in order."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise WireError(f"a line of more than {LINE_BYTES_MAX} bytes")
        return [_decode(line) for line in lines]


def _decode(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise WireError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise WireError("a message is an object")
    return message


class Channel:
    """A blocking end. send() may be called by any thread, receive() by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Whole lines never mix. When the other end is gone nothing is raised: receive() is what notices that."""
        line = encode(message)
        with self._send_lock:
            try:
                self._connection.sendall(line)
            except (BrokenPipeError, ConnectionResetError):
                pass

    def receive(self) -> Iterator[Message]:
        """Messages until the other end closes or dies."""
        buffer = LineBuffer()
        while True:
            try:
                data = self._connection.recv(_RECEIVE_BYTES)
            except ConnectionResetError:
                return
            if not data:
                return
            yield from buffer.feed(data)

    def close(self) -> None:
        self._connection.close()
