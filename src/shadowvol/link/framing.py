"""Frames on the link between a member and its agent: a JSON object, optional bytes, optional file descriptors.

A frame on the wire: length of the JSON (u32, big-endian), length of the blob (u32), the JSON object in UTF-8, the blob.
Descriptors travel as SCM_RIGHTS with the frame's first bytes.

`Decoder` is without I/O. Three ways to move frames share it: blocking functions (the member's threads), `TrioLink` (the
agent; link/triolink.py), and whatever a test feeds it.

Invariants
- The blocking reader never asks the kernel for more than `Decoder.wanted_bytes`, so it never reads beyond the current
  frame. The kernel hands descriptors over with the bytes they were sent with; so what arrives while a frame is being
  read belongs to that frame, however many frames lie in the socket. (A TrioLink reads further, by another rule.)
- After a FramingError, a time-out or an OSError in the middle of a frame, sides no longer agree where a frame begins:
  close the link. The one exception: a cancelled TrioLink.receive() keeps what it has and may be called again.
- Received descriptors whose frame cannot be delivered are closed (by a TrioLink: when it is closed); delivered ones
  belong to the caller. Sent ones stay open here, and are the sender's to close.
"""

import array
import json
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

JSON_BYTES_MAX = 16 << 20  # touched blocks of the largest window take far less
BLOB_BYTES_MAX = 64 << 20  # the map of a volume of the largest size is 2 MiB
FDS_MAX = 16  # the listening socket and some; SCM_RIGHTS itself carries 253
READ_BYTES_MAX = 1 << 20  # of one read, so that a large frame is not allocated before its bytes are there

_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode
_HEADER = struct.Struct(">II")
_FD_BYTES = array.array("i").itemsize
ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * _FD_BYTES)


class FramingError(Exception):
    """What was received, or should be sent, is not a frame; the link cannot go on."""


@dataclass(frozen=True, slots=True)
class Frame:
    message: dict[str, Any]
    blob: bytes = b""


def encode(message: dict[str, Any], blob: bytes = b"") -> bytes:
    """The frame's bytes. FramingError if it is too large or no JSON (also NaN)."""
    try:
        text = _to_json(message).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FramingError(f"message cannot be sent as JSON: {error}") from error
    if not isinstance(message, dict):
        raise FramingError(f"message is a {type(message).__name__}, not an object")
    _check_lengths(len(text), len(blob))
    return b"".join((_HEADER.pack(len(text), len(blob)), text, blob))


class Decoder:
    """Bytes in, frames out. After a FramingError it refuses everything."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._frame_bytes = 0  # length of the frame being received; 0 while its header is not complete
        self._broken: FramingError | None = None

    @property
    def wanted_bytes(self) -> int:
        """How many bytes may be fed without going beyond the current frame; at least 1."""
        return (self._frame_bytes or _HEADER.size) - len(self._buffer)

    @property
    def inside_frame(self) -> bool:
        """True when the end of the stream here would cut a frame."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Frames completed by `data`, in order. FramingError as soon as the bytes cannot be a frame; those before the
        bad one in the same call are lost with the link."""
        if self._broken is not None:
            raise FramingError(*self._broken.args)
        frames: list[Frame] = []
        rest = memoryview(data)
        try:
            while rest:
                taken = min(self.wanted_bytes, len(rest))
                self._buffer += rest[:taken]
                rest = rest[taken:]
                frame = self._advance()
                if frame is not None:
                    frames.append(frame)
        except FramingError as error:
            self._broken = error
            raise
        return frames

    def _advance(self) -> Frame | None:
        if not self._frame_bytes and len(self._buffer) == _HEADER.size:
            self._frame_bytes = _HEADER.size + sum(_check_lengths(*_HEADER.unpack(self._buffer)))
        if len(self._buffer) != self._frame_bytes:
            return None
        json_end = _HEADER.size + _HEADER.unpack_from(self._buffer)[0]
        with memoryview(self._buffer) as view:
            message = _parse(bytes(view[_HEADER.size : json_end]))
            blob = bytes(view[json_end:])
        self._buffer = bytearray()
        self._frame_bytes = 0
        return Frame(message, blob)


def _check_lengths(json_bytes: int, blob_bytes: int) -> tuple[int, int]:
    if json_bytes > JSON_BYTES_MAX:
        raise FramingError(f"message of {json_bytes} bytes; at most {JSON_BYTES_MAX}")
    if blob_bytes > BLOB_BYTES_MAX:
        raise FramingError(f"blob of {blob_bytes} bytes; at most {BLOB_BYTES_MAX}")
    return json_bytes, blob_bytes


def _parse(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FramingError(f"message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise FramingError(f"message is a {type(message).__name__}, not an object")
    return message


# ---- descriptors ----


def rights(fds: Sequence[int]) -> "list[tuple[int, int, array.array[int]]]":
    if len(fds) > FDS_MAX:
        raise FramingError(f"{len(fds)} descriptors; at most {FDS_MAX}")
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def take_rights(ancillary: Iterable[tuple[int, int, bytes]], flags: int, fds: list[int]) -> None:
    """Add received descriptors to `fds`; the caller closes all of them if this raises."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received = array.array("i")
            received.frombytes(content[: len(content) - len(content) % _FD_BYTES])
            fds.extend(received)
    if flags & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
        raise FramingError(f"more than {FDS_MAX} descriptors, or more than this process may open")


def close_all(fds: list[int]) -> None:
    """Close and forget."""
    while fds:
        os.close(fds.pop())


def end_of_stream(decoder: Decoder) -> Exception:
    return FramingError("link closed in the middle of a frame") if decoder.inside_frame else EOFError("link closed")


# ---- blocking ----


def send_frame(sock: socket.socket, message: dict[str, Any], blob: bytes = b"", fds: Sequence[int] = ()) -> None:
    """Send one frame. Not for two threads at once: the caller holds a lock. Raises FramingError, OSError."""
    ancillary = rights(fds)
    data = memoryview(encode(message, blob))
    sent_bytes = sock.sendmsg([data], ancillary)
    if sent_bytes < len(data):
        sock.sendall(data[sent_bytes:])


def receive_frame(sock: socket.socket) -> tuple[Frame, list[int]]:
    """Wait for one frame and its descriptors (close-on-exec; the caller's now).

    Raises EOFError where the peer closed between frames; FramingError, OSError (TimeoutError) else.
    """
    decoder = Decoder()
    fds: list[int] = []
    try:
        while True:
            wanted_bytes = min(decoder.wanted_bytes, READ_BYTES_MAX)
            data, ancillary, flags, _ = sock.recvmsg(wanted_bytes, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            take_rights(ancillary, flags, fds)
            if not data:
                raise end_of_stream(decoder)
            frames = decoder.feed(data)
            if frames:
                return frames[0], fds
    except BaseException:
        close_all(fds)
        raise
