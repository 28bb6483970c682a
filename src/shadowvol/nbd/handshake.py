"""An NBD client's handshake, and nothing after it: the connected socket is then somebody else's, as the kernel's.

Fixed newstyle, no zeroes, one NBD_OPT_GO; no structured replies and no TLS, since the kernel's client speaks neither.
(libnbd hands out the descriptor of a connection, but has by then negotiated what the kernel cannot read.)
"""

import socket
import struct
import time
from dataclasses import dataclass

Place = str | tuple[str, int]  # path of a unix socket, or host and port

_NBDMAGIC, _IHAVEOPT, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x0003E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_REPLY_BYTES_MAX = 64 << 10  # an information is some tens of bytes, an error a sentence
_REPLIES_MAX = 64  # a server has fewer things to tell about an export
SECTOR_BYTES = 512  # the least that a block device may have


class HandshakeError(OSError):
    """What answers is no NBD server of ours, or refuses the export."""


@dataclass(frozen=True, slots=True)
class Export:
    """What a server told. `flags` are NBD's transmission flags; `block_bytes` the smallest request, at least 512."""

    size_bytes: int
    flags: int
    block_bytes: int


class Handshake:
    """One attempt. `open` may be interrupted from another thread by `abandon`."""

    def __init__(self, place: Place) -> None:
        self.connected = False
        self._place = place
        family = socket.AF_UNIX if isinstance(place, str) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)

    def open(self, name: str, limit_s: float) -> tuple[socket.socket, Export]:
        """The connected socket, blocking, and what is behind it. OSError; TimeoutError after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        try:
            self._socket.settimeout(limit_s)
            self._socket.connect(self._place)
            self.connected = True
            if self._socket.family == socket.AF_INET:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            export = _negotiate(self._socket, name, deadline_s)
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise
        return self._socket, export

    def abandon(self) -> None:
        """End the attempt that is under way: `open` raises."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._socket.close()  # not connected yet


def look(place: Place, name: str, limit_s: float) -> Export:
    """What is served there; the connection is closed again."""
    connection, export = Handshake(place).open(name, limit_s)
    connection.close()
    return export


def _negotiate(connection: socket.socket, name: str, deadline_s: float) -> Export:
    magic, option_magic, flags = struct.unpack(">QQH", _read(connection, 18, deadline_s))
    if magic != _NBDMAGIC or option_magic != _IHAVEOPT or not flags & _FIXED_NEWSTYLE:
        raise HandshakeError("it does not answer as an NBD server")
    ours = flags & (_FIXED_NEWSTYLE | _NO_ZEROES)
    text = name.encode()
    asked = struct.pack(">I", len(text)) + text + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
    connection.sendall(struct.pack(">IQII", ours, _IHAVEOPT, _OPT_GO, len(asked)) + asked)
    size_bytes, transmission, block_bytes = -1, 0, SECTOR_BYTES
    for _ in range(_REPLIES_MAX):
        magic, option, kind, length = struct.unpack(">QIII", _read(connection, 20, deadline_s))
        if magic != _REPLY_MAGIC or option != _OPT_GO or length > _REPLY_BYTES_MAX:
            raise HandshakeError("its answer to NBD_OPT_GO makes no sense")
        content = _read(connection, length, deadline_s)
        if kind & _REP_ERROR:
            raise HandshakeError(f"it refuses export {name!r}: {content.decode(errors='replace') or hex(kind)}")
        if kind == _REP_ACK:
            break
        if kind == _REP_INFO and content[:2] == struct.pack(">H", _INFO_EXPORT):
            size_bytes, transmission = struct.unpack_from(">QH", content, 2)
        elif kind == _REP_INFO and content[:2] == struct.pack(">H", _INFO_BLOCK_SIZE):
            block_bytes = max(SECTOR_BYTES, struct.unpack_from(">I", content, 2)[0])
    if size_bytes < 0:
        raise HandshakeError("it did not tell the export's size")
    return Export(size_bytes, transmission, block_bytes)


def _read(connection: socket.socket, count: int, deadline_s: float) -> bytes:
    """Exactly so many bytes."""
    received = bytearray()
    while len(received) < count:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it does not answer")
        connection.settimeout(left_s)
        piece = connection.recv(count - len(received))
        if not piece:
            raise HandshakeError("it hung up in the handshake")
        received += piece
    return bytes(received)
