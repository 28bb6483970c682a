"""Linux calls that Python's os module lacks: fallocate, sync_file_range, mincore, ioctls of disks and loop devices.

Thin and stateless: each function is one system call (resident_pages maps memory for its). It raises OSError with the
call's errno and restarts after EINTR.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

SYNC_WAIT_BEFORE = 1
SYNC_WRITE = 2
SYNC_WAIT_AFTER = 4

_BLKSSZGET = 0x1268
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232

_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)  # CDLL releases the GIL for the duration of a call
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with any mode (os.posix_fallocate knows only allocation)."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, f"fallocate(mode={mode:#x}): {os.strerror(error)}")


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """Start, or wait for, write-back of a range. Never a substitute for fdatasync: no metadata, no device flush."""
    while _libc.sync_file_range(fd, offset, length, flags) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, f"sync_file_range: {os.strerror(error)}")


def resident_pages(fd: int, offset: int, length: int) -> bytes:
    """One byte per page of [offset, offset+length), `offset` at a page: 1, it is in the page cache. It is not touched.

    By mincore(2). The kernel says 1 for every page of a file that the caller may neither own nor write.
    """
    # Nothing is ever accessed through it (PROT_NONE), so a file that gets shorter meanwhile does no harm.
    address = _libc.mmap(None, length, 0, _MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"mmap: {os.strerror(error)}")
    pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    try:
        while _libc.mincore(address, length, pages) != 0:
            error = ctypes.get_errno()
            if error not in (errno.EINTR, errno.EAGAIN):
                raise OSError(error, f"mincore: {os.strerror(error)}")
    finally:
        _libc.munmap(address, length)
    return pages.raw


def logical_block_bytes(fd: int) -> int:
    """The logical block (sector) of an open block device."""
    raw = fcntl.ioctl(fd, _BLKSSZGET, b"\0" * 4)
    return int(struct.unpack("=i", raw)[0])


@dataclass(frozen=True, slots=True)
class LoopBacking:
    """What a loop device lies on: st_dev and st_ino of the backing file; `rdev` only when that is a block device."""

    device: int
    inode: int
    rdev: int
    offset_bytes: int
    limit_bytes: int  # 0: to the end of the backing file


def loop_backing(fd: int) -> LoopBacking:
    """Ask an open loop device; OSError(ENXIO) when it is not bound to a file, ENOTTY when it is no loop device."""
    raw = fcntl.ioctl(fd, _LOOP_GET_STATUS64, b"\0" * _LOOP_INFO64_BYTES)
    device, inode, rdev, offset_bytes, limit_bytes = struct.unpack_from("=5Q", raw)
    return LoopBacking(_kernel_to_user_dev(device), inode, _kernel_to_user_dev(rdev), offset_bytes, limit_bytes)


def _kernel_to_user_dev(encoded: int) -> int:
    """The kernel's huge_encode_dev (32 bits in use) as the number that stat() gives."""
    major = (encoded & 0xFFF00) >> 8
    minor = (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00)
    return os.makedev(major, minor)
