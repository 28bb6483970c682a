"""A leg on this host: a regular file (sparse or not) or a block device.

Two ways to the medium. `cache="host"`: the page cache, straight between the caller's buffer and the kernel.
`cache="none"`: O_DIRECT, for media that another host can reach. O_DIRECT wants offset, length and memory aligned;
what is not (nbdkit's buffers never are) goes through bounce buffers, and edges are read, modified and written back.

Invariants:
- `_fd` is buffered, holds the claim, and serves flush, fallocate and lseek. `_direct_fd` is the same open medium with
  O_DIRECT, or -1. The kernel keeps both views coherent.
- A file's last partial block is written through `_fd`: an aligned write there would make the file longer.
- Nothing is ever read or written beyond `size_bytes`, the size at open.
- Who writes less than a block through O_DIRECT owns the whole block (base.py), so read-modify-write races with nobody.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections import deque
from dataclasses import dataclass
from typing import Literal

from shadowvol.endpoints import kernelcalls
from shadowvol.endpoints.base import Extent
from shadowvol.endpoints.blockdev import writes_zeroes

Cache = Literal["host", "none"]

BOUNCE_BYTES = 1 << 20  # larger requests are served in pieces: at 1 MiB a piece costs far more than its system call
RWF_DONTCACHE = 0x80  # preadv2(2); the os module has no name for it
BOUNCE_IDLE_MAX = 16  # buffers kept for reuse; more may exist while more threads are inside
DIRECT_ALIGN_MAX = 4096  # no medium that we know asks for more
_NOT_HERE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EBUSY})

_zeroes = memoryview(mmap.mmap(-1, BOUNCE_BYTES))  # page-aligned; never written


@dataclass(frozen=True, slots=True)
class Medium:
    """The open descriptors of a LocalEndpoint, and what holds for them.

    `direct_fd` is -1 without O_DIRECT. Else it takes what is aligned to `align` and lies before `direct_end`; the rest
    goes through the endpoint. `punches`: FALLOC_FL_PUNCH_HOLE on `fd` makes any range read as zeroes.
    """

    fd: int
    direct_fd: int
    align: int
    direct_end: int
    punches: bool


def open_local(path: str, *, cache: Cache, writable: bool, claim: bool) -> "LocalEndpoint":
    """Open a leg. `claim`: nobody else may claim it, or mount it, while it is open (O_EXCL on disks, flock on files).

    Raises OSError: EBUSY when somebody else holds the claim, EINVAL for what is neither a file nor a disk. Where the
    medium refuses O_DIRECT the page cache is used, and `cache_reason` says so.
    """
    fd = _open(path, writable=writable, claim=claim)
    try:
        return LocalEndpoint(fd, path, cache=cache, writable=writable)
    except BaseException:
        os.close(fd)
        raise


def claim_local(path: str) -> int:
    """A writable descriptor that holds the claim. Unlike open_local() it tries nothing out, not even what changes only
    a file's times; for who wants to know whether it could be opened. Raises as open_local()."""
    return _open(path, writable=True, claim=True)


def _open(path: str, *, writable: bool, claim: bool) -> int:
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    if claim and stat.S_ISBLK(kind):
        flags |= os.O_EXCL
    fd = os.open(path, flags)
    try:
        if claim and stat.S_ISREG(kind):
            _lock_file(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_file(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "claimed by another process", path) from None


def _align_down(value: int, align: int) -> int:
    return value - value % align


def _align_up(value: int, align: int) -> int:
    return value + -value % align


def _is_aligned_memory(view: memoryview) -> bool:
    """Whether O_DIRECT can use this memory. A read-only buffer does not tell its address: treated as not aligned."""
    if view.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % DIRECT_ALIGN_MAX == 0


class LocalEndpoint:
    """Implements Endpoint; made by open_local(). `cache`: what is in effect; `cache_reason`: why not what was asked.
    `reads_once`: whether pread_once() leaves the page cache as it was; None: not known before the first."""

    def __init__(self, fd: int, path: str, *, cache: Cache, writable: bool) -> None:
        """Takes over `fd` (buffered) when it returns; when it raises, the caller still owns it."""
        self.path = path
        self.is_disk = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.size_bytes = os.lseek(fd, 0, os.SEEK_END)
        self.cache: Cache = "host"
        self.cache_reason: str | None = None
        self._fd = fd
        self._direct_fd = -1
        self._align = 1
        self.reads_once: bool | None = None
        self._bounce_idle: deque[memoryview] = deque()
        self._allocation_align = kernelcalls.logical_block_bytes(fd) if self.is_disk else 1
        self._zero_range_works = writable
        self.can_punch = writable and self._probe_punch()
        if cache == "none":
            self._open_direct(os.O_RDWR if writable else os.O_RDONLY)
        self.block_bytes = self._allocation_align if self.is_disk else self._align

    def _open_direct(self, access: int) -> None:
        try:
            # Through the open file, not the path: it is the same medium whatever was renamed meanwhile.
            fd = os.open(f"/proc/self/fd/{self._fd}", access | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            self.cache_reason = f"O_DIRECT refused: {error.strerror}"
            return
        align = self._allocation_align if self.is_disk else _probe_direct_align(fd)
        if align == 0:
            os.close(fd)
            self.cache_reason = "O_DIRECT refused: no alignment up to 4096 bytes is accepted"
            return
        self._direct_fd, self._align, self.cache = fd, align, "none"
        self.reads_once = True

    def _probe_punch(self) -> bool:
        if self.is_disk:
            # On a disk a punch is REQ_OP_WRITE_ZEROES without fall-back: it zeroes, or fails with EOPNOTSUPP.
            return writes_zeroes(os.fstat(self._fd).st_rdev)
        try:
            # Beyond the end and with the size kept, nothing that anybody can read is changed.
            mode = kernelcalls.FALLOC_PUNCH_HOLE | kernelcalls.FALLOC_KEEP_SIZE
            kernelcalls.fallocate(self._fd, mode, _align_up(self.size_bytes, BOUNCE_BYTES), DIRECT_ALIGN_MAX)
        except OSError:
            return False
        return True

    # --- reading -------------------------------------------------------------------------------------------------

    def pread_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        if self._direct_fd >= 0:
            self._direct_read(memoryview(buffer), offset)
            return
        got = os.preadv(self._fd, (buffer,), offset)
        if got != len(buffer):
            self._read_rest(self._fd, memoryview(buffer), got, offset)

    def pread_once(self, buffer: memoryview, offset: int) -> None:
        """As pread_into, for what nobody will read again: what it brings into the page cache is dropped again, where
        the kernel can do that."""
        if self._direct_fd < 0 and self.reads_once is not False:
            try:
                got = os.preadv(self._fd, (buffer,), offset, RWF_DONTCACHE)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.reads_once = False  # a kernel before 6.14, a disk, or a file system that cannot
            else:
                self.reads_once = True
                self._read_rest(self._fd, buffer, got, offset)
                return
        self.pread_into(buffer, offset)

    def _read_rest(self, fd: int, view: memoryview, done: int, offset: int) -> None:
        """The way of a short read: go on until full, or until the medium ends."""
        while done < len(view):
            got = os.preadv(fd, (view[done:],), offset + done)
            if got == 0:
                raise OSError(errno.EIO, f"medium ends at {offset + done}, {len(view) - done} bytes short", self.path)
            done += got

    def _direct_read(self, view: memoryview, offset: int) -> None:
        align, length = self._align, len(view)
        if offset % align == 0 and length % align == 0 and _is_aligned_memory(view):
            self._read_rest(self._direct_fd, view, 0, offset)
            return
        bounce = self._take_bounce()
        try:
            done = 0
            while done < length:
                start = _align_down(offset + done, align)
                skip = offset + done - start
                span = min(BOUNCE_BYTES, _align_up(skip + length - done, align))
                got = os.preadv(self._direct_fd, (bounce[:span],), start)
                take = min(got - skip, length - done)
                if take <= 0:
                    raise OSError(errno.EIO, f"medium ends at {start + got}", self.path)
                view[done : done + take] = bounce[skip : skip + take]
                done += take
        finally:
            self._give_bounce(bounce)

    # --- writing -------------------------------------------------------------------------------------------------

    def pwrite(self, data: bytes | memoryview | bytearray, offset: int) -> None:
        length = len(data)
        self._check_range(offset, length)
        if self._direct_fd >= 0:
            self._direct_write(memoryview(data), offset)
            return
        done = os.pwrite(self._fd, data, offset)
        if done != length:
            self._write_rest(self._fd, memoryview(data), done, offset)

    def _write_rest(self, fd: int, view: memoryview, done: int, offset: int) -> None:
        """The way of a short write. On an O_DIRECT fd, a block that was written in part is written again."""
        align = self._align if fd == self._direct_fd else 1
        while done < len(view):
            wrote = os.pwrite(fd, view[done:], offset + done)
            if wrote < align:
                raise OSError(errno.EIO, f"medium took {wrote} bytes at {offset + done}", self.path)
            done += _align_down(wrote, align) if wrote < len(view) - done else wrote

    def _direct_write(self, view: memoryview, offset: int) -> None:
        align, end = self._align, offset + len(view)
        direct_end = _align_down(self.size_bytes, align)
        if end > direct_end:
            ragged = max(offset, direct_end)
            self._write_rest(self._fd, view[ragged - offset :], 0, ragged)
            view, end = view[: ragged - offset], ragged
        if offset % align == 0 and end % align == 0 and _is_aligned_memory(view):
            self._write_rest(self._direct_fd, view, 0, offset)
            return
        bounce = self._take_bounce()
        try:
            while offset < end:
                start = _align_down(offset, align)
                span = min(BOUNCE_BYTES, _align_up(end, align) - start)
                piece_end = min(end, start + span)
                piece = bounce[:span]
                self._read_edges(piece, start, offset, piece_end)
                take = piece_end - offset
                piece[offset - start : piece_end - start] = view[:take]
                self._write_rest(self._direct_fd, piece, 0, start)
                view, offset = view[take:], piece_end
        finally:
            self._give_bounce(bounce)

    def _read_edges(self, piece: memoryview, start: int, offset: int, end: int) -> None:
        """Fill the first and last block of `piece` (at `start`) where [offset, end) covers them only in part."""
        align, last = self._align, len(piece) - self._align
        if offset > start:
            self._read_rest(self._direct_fd, piece[:align], 0, start)
        if end < start + len(piece) and not (offset > start and last == 0):
            self._read_rest(self._direct_fd, piece[last:], 0, start + last)

    # --- zeroes and holes ----------------------------------------------------------------------------------------

    def zero(self, offset: int, length: int, may_punch: bool) -> None:
        self._check_range(offset, length)
        if length == 0:
            return
        if may_punch and self.can_punch and self._fallocate(kernelcalls.FALLOC_PUNCH_HOLE, offset, length):
            return
        if self._zero_range_works:
            if self._fallocate(kernelcalls.FALLOC_ZERO_RANGE, offset, length):
                return
            # A disk may just be busy (see punch); a file system that cannot will not learn it.
            self._zero_range_works = self.is_disk
        self._write_zeroes(offset, length)

    def punch(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if not self.can_punch:
            raise OSError(errno.EOPNOTSUPP, "cannot punch holes here", self.path)
        if length == 0 or self._fallocate(kernelcalls.FALLOC_PUNCH_HOLE, offset, length):
            return
        if not self.is_disk:
            raise OSError(errno.EOPNOTSUPP, "cannot punch a hole here", self.path)
        # A disk that another opener has claimed answers EBUSY while its page cache is dirty: the promise that
        # matters, reading as zeroes, is kept by writing them.
        self._write_zeroes(offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whole blocks by fallocate, the edges by writing. False: the medium cannot, and nothing was changed."""
        align, end = self._allocation_align, offset + length
        inner, inner_end = _align_up(offset, align), _align_down(end, align)
        if inner >= inner_end:
            self._write_zeroes(offset, length)
            return True
        try:
            kernelcalls.fallocate(self._fd, mode | kernelcalls.FALLOC_KEEP_SIZE, inner, inner_end - inner)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return False
            raise
        self._write_zeroes(offset, inner - offset)
        self._write_zeroes(inner_end, end - inner_end)
        return True

    def _write_zeroes(self, offset: int, length: int) -> None:
        while length > 0:
            step = min(length, BOUNCE_BYTES)
            self.pwrite(_zeroes[:step], offset)
            offset, length = offset + step, length - step

    def extents(self, offset: int, length: int) -> list[Extent]:
        """By SEEK_DATA and SEEK_HOLE; a disk cannot tell. Allocated but never written space counts as a hole."""
        self._check_range(offset, length)
        if self.is_disk:
            return [Extent(offset, length, False)] if length else []
        runs: list[Extent] = []
        end = offset + length
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                runs.append(Extent(offset, data - offset, True))
            if data < end:
                hole = max(self._seek(data, os.SEEK_HOLE, end), data + 1)
                runs.append(Extent(data, hole - data, False))
                data = hole
            offset = data
        return runs

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return min(end, os.lseek(self._fd, offset, whence))
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                if os.fstat(self._fd).st_size < self.size_bytes:  # …that got shorter: what is gone is not a hole
                    raise OSError(errno.EIO, "the file is shorter than when it was opened", self.path) from None
                return end
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot tell: all of it is data
                return offset if whence == os.SEEK_DATA else end
            raise

    def medium(self) -> Medium:
        """For I/O beside this object: by who stops before close()."""
        direct_end = _align_down(self.size_bytes, self._align)
        return Medium(self._fd, self._direct_fd, self._align, direct_end, self.can_punch and not self.is_disk)

    # --- durability, write-back, the end ---------------------------------------------------------------------------

    def flush(self) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, "closed", self.path)
        os.fdatasync(self._fd)

    def start_writeback(self, offset: int, length: int) -> None:
        """Have the kernel begin to write a range of the page cache back, so that a later flush() is short."""
        if self._direct_fd < 0:
            kernelcalls.sync_file_range(self._fd, offset, length, kernelcalls.SYNC_WRITE)

    def forget_cached(self, offset: int, length: int) -> None:
        """Write a range back, wait, and drop it from the page cache: the next read comes from the medium."""
        flags = kernelcalls.SYNC_WAIT_BEFORE | kernelcalls.SYNC_WRITE | kernelcalls.SYNC_WAIT_AFTER
        kernelcalls.sync_file_range(self._fd, offset, length, flags)
        self.drop_cached(offset, length)

    def resident_pages(self, offset: int, length: int) -> bytes:
        """One byte per page: 1, it is in the page cache. `offset` is at a page."""
        return kernelcalls.resident_pages(self._fd, offset, length)

    def drop_cached(self, offset: int, length: int) -> None:
        """Drop a range from the page cache, but for what is not on the medium yet: that stays."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the claim back. The caller has waited for its own operations; calling again is harmless.

        Never raises: Linux lets go of the file even where close() reports an error (a server that is gone), and whether
        writes are durable is what flush() tells.
        """
        fds, self._fd, self._direct_fd = (self._direct_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass
        self._bounce_idle.clear()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise OSError(errno.ENOSPC, f"[{offset}, +{length}) is outside of {self.size_bytes} bytes", self.path)

    def _take_bounce(self) -> memoryview:
        try:
            return self._bounce_idle.pop()  # deque operations are atomic: no lock
        except IndexError:
            return memoryview(mmap.mmap(-1, BOUNCE_BYTES))

    def _give_bounce(self, bounce: memoryview) -> None:
        if len(self._bounce_idle) < BOUNCE_IDLE_MAX:
            self._bounce_idle.append(bounce)


def _probe_direct_align(fd: int) -> int:
    """The smallest alignment at which an O_DIRECT read of this file is accepted; 0 when none is."""
    probe = memoryview(mmap.mmap(-1, DIRECT_ALIGN_MAX))
    for align in (512, 1024, 2048, DIRECT_ALIGN_MAX):
        try:
            os.preadv(fd, (probe[:align],), 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                continue
            raise
        return align
    return 0
