"""One file that the kernel shows through FUSE: the protocol, spoken on /dev/fuse; who serves the I/O is `bridge`.

The mount point is a file, and the file system has nothing but its root, which is that file. All I/O is direct: nothing
is cached by the kernel above us, writes may be in flight side by side, and an fsync is always told. Whoever has the
right to read /dev/fuse of this mount is the server: when its process ends, the kernel fails every request.

Layouts are those of linux/fuse.h, version 7.23 and later, of which every kernel in use speaks the part that is here.
"""

import ctypes
import errno
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

REQUEST_BYTES_MAX = 1 << 20  # of data in one request
BACKGROUND_MAX = 64  # requests that the kernel has in flight with us; a loop device keeps 128
ATTRIBUTES_VALID_S = 86_400  # they never change, and the kernel should not have to ask while there is no member

OPEN_READ_WRITE_OPS = READ, WRITE, FSYNC, FALLOCATE = 15, 16, 20, 43
_FORGET, _GETATTR, _SETATTR, _OPEN, _STATFS, _RELEASE = 2, 3, 4, 14, 17, 18
_INIT, _INTERRUPT, _DESTROY, _IOCTL, _BATCH_FORGET = 26, 36, 38, 39, 42
_NO_REPLY = (_FORGET, _INTERRUPT, _DESTROY, _BATCH_FORGET)

_MAJOR, _MINOR_MAX, _MINOR_MIN = 7, 38, 23
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
_OPEN_DIRECT_IO, _OPEN_NO_FLUSH, _OPEN_PARALLEL_WRITES = 1 << 0, 1 << 5, 1 << 6
_OPEN_ANSWER = _OPEN_DIRECT_IO | _OPEN_NO_FLUSH | _OPEN_PARALLEL_WRITES  # no flush: a close never waits for a member
_SETATTR_SIZE = 1 << 3
_PAGE_BYTES = 4096
_PUNCH_HOLE, _ZERO_RANGE, _KEEP_SIZE = 0x02, 0x10, 0x01

_IN = struct.Struct("=IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, more
_OUT = struct.Struct("=IiQ")  # length, -errno, unique
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("=QII QQQQQQ III IIIIII I")
_IO = struct.Struct("=QQI")  # handle, offset, size: how READ and WRITE begin
_FALLOCATE = struct.Struct("=QQQI")
_WRITE_HEAD_BYTES = _IN.size + 40
_READ_BYTES = _WRITE_HEAD_BYTES + REQUEST_BYTES_MAX
_MS_NOSUID, _MS_NODEV = 2, 4


@dataclass(slots=True)
class Request:
    """What is to be done with the bytes [offset, offset + length); `data` is what WRITE writes."""

    unique: int
    kind: int  # READ, WRITE, FSYNC, FALLOCATE
    offset: int = 0
    length: int = 0
    data: bytes = b""
    may_punch: bool = True  # of FALLOCATE: zeroes need no space


class FuseFile:
    """A mounted file of this size. `fileno()` is readable when there is a request."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={self._fd},rootmode={stat.S_IFREG | 0o600:o},user_id={os.geteuid()},group_id={os.getegid()}"
        _mount(path, options)

    def fileno(self) -> int:
        return self._fd

    def next(self) -> Request | None:
        """A request for I/O; None where there is none now, or it was answered here. EOFError: it is unmounted."""
        try:
            length = os.readv(self._fd, [self._buffer])
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise EOFError("the file is unmounted") from None
            if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # ENOENT: it was withdrawn while being read
                return None
            raise
        _, kind, unique, *_ = _IN.unpack_from(self._buffer)
        if kind in OPEN_READ_WRITE_OPS:
            return self._io(kind, unique, length)
        if kind not in _NO_REPLY:
            self._answer(kind, unique)
        return None

    def done(self, request: Request, data: bytes | bytearray = b"") -> None:
        """`data` is what was read."""
        if request.kind == WRITE:
            data = struct.pack("=II", request.length, 0)
        self._reply(request.unique, 0, data)

    def failed(self, request: Request, error: int) -> None:
        self._reply(request.unique, error)

    # ------------------------------------------------------------ what is not for the volume

    def _io(self, kind: int, unique: int, length: int) -> Request | None:
        if kind == FSYNC:
            return Request(unique, kind)
        if kind == FALLOCATE:
            _, offset, size, mode = _FALLOCATE.unpack_from(self._buffer, _IN.size)
            if mode not in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE, _ZERO_RANGE):
                return self._refuse(unique, errno.EOPNOTSUPP)
            if offset + size > self._size_bytes:
                return self._refuse(unique, errno.EFBIG)
            return Request(unique, kind, offset, size, may_punch=bool(mode & _PUNCH_HOLE))
        _, offset, size = _IO.unpack_from(self._buffer, _IN.size)
        if kind == READ:
            size = max(0, min(size, self._size_bytes - offset))
            return Request(unique, kind, offset, size) if size else self._refuse(unique, 0)  # the end of the file
        if offset + size > self._size_bytes:
            return self._refuse(unique, errno.EFBIG)
        return Request(unique, kind, offset, size, bytes(self._view[_WRITE_HEAD_BYTES : _WRITE_HEAD_BYTES + size]))

    def _refuse(self, unique: int, error: int) -> Request | None:
        """No request for anybody: this is the answer."""
        self._reply(unique, error)
        return None

    def _answer(self, kind: int, unique: int) -> None:
        if kind == _INIT:
            self._answer_init(unique)
        elif kind == _GETATTR:
            self._reply(unique, 0, self._attributes())
        elif kind == _SETATTR:
            valid = struct.unpack_from("=I", self._buffer, _IN.size)[0]
            if valid & _SETATTR_SIZE:
                self._reply(unique, errno.EPERM)
            else:
                self._reply(unique, 0, self._attributes())
        elif kind == _OPEN:
            self._reply(unique, 0, struct.pack("=QII", 0, _OPEN_ANSWER, 0))
        elif kind == _STATFS:
            self._reply(unique, 0, struct.pack("=QQQQQIIII24x", 0, 0, 0, 1, 0, _PAGE_BYTES, 255, _PAGE_BYTES, 0))
        elif kind == _RELEASE:
            self._reply(unique, 0)
        else:  # the kernel remembers that, and does without
            self._reply(unique, errno.ENOTTY if kind == _IOCTL else errno.ENOSYS)

    def _answer_init(self, unique: int) -> None:
        major, minor, readahead, offered = struct.unpack_from("=IIII", self._buffer, _IN.size)
        if major != _MAJOR or minor < _MINOR_MIN:
            self._reply(unique, errno.EPROTO)
            return
        flags = offered & (_ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _MAX_PAGES)
        pages = REQUEST_BYTES_MAX // _PAGE_BYTES
        limits = (BACKGROUND_MAX, BACKGROUND_MAX * 3 // 4, REQUEST_BYTES_MAX, 1, pages)
        self._reply(unique, 0, _INIT_OUT.pack(_MAJOR, min(minor, _MINOR_MAX), readahead, flags, *limits, 0, 0))

    def _attributes(self) -> bytes:
        times = (0, 0, 0, 0, 0, 0)
        who = (stat.S_IFREG | 0o600, 1, os.geteuid(), os.getegid(), 0, _PAGE_BYTES)
        blocks = self._size_bytes // 512
        return _ATTRIBUTES.pack(ATTRIBUTES_VALID_S, 0, 0, 1, self._size_bytes, blocks, *times, *who, 0)

    def _reply(self, unique: int, error: int, data: bytes | bytearray = b"") -> None:
        try:
            os.writev(self._fd, [_OUT.pack(_OUT.size + len(data), -error, unique), data])
        except OSError as refused:
            if refused.errno not in (errno.ENOENT, errno.ENODEV):  # ENOENT: nobody waits for it any more
                raise


def _mount(path: Path, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    kind, flags = b"fuse.shadowvol", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    if libc.mount(b"shadowvol", os.fsencode(path), kind, flags, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mounting {path}: {os.strerror(code)}")
