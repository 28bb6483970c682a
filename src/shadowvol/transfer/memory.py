"""Page-aligned buffers, and fast questions about their bytes: are they equal, are they zero, where not.

The comparisons are libc's memcmp, without the GIL: it stops at the first difference, so data costs nearly nothing.
"""

import ctypes
import mmap
from collections.abc import Iterator

from shadowvol.transfer.throttle import PIECE_BYTES_MAX

BLOCK_BYTES = 64 << 10  # the grain of zero detection and of comparing; also the block of "touched" (DESIGN 2)

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Buffer:
    """Reusable page-aligned memory for one piece. Belongs to one thread."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PIECE_BYTES_MAX)
        self.view = memoryview(self._memory)
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._anchor)


_zeroes = Buffer()


def equal(one: Buffer, other: Buffer, start: int, length: int) -> bool:
    """Whether both hold the same bytes at the same place."""
    return bool(_memcmp(one.address + start, other.address + start, length) == 0)


def is_zero(buffer: Buffer, start: int, length: int) -> bool:
    return bool(_memcmp(buffer.address + start, _zeroes.address, length) == 0)


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the blocks of a piece; the last one may be short."""
    for start in range(0, length, BLOCK_BYTES):
        yield start, min(BLOCK_BYTES, length - start)


def zero_runs(buffer: Buffer, length: int) -> list[tuple[int, int]]:
    """(start, end) of the runs of whole blocks that are all zero."""
    if 0 not in buffer.view[:length:BLOCK_BYTES].tobytes():  # a zero block begins with a zero byte
        return []
    return _merge((start, size) for start, size in blocks(length) if is_zero(buffer, start, size))


def differing_runs(one: Buffer, other: Buffer, length: int) -> list[tuple[int, int]]:
    """(start, end) of the runs of blocks in which two buffers differ."""
    if equal(one, other, 0, length):
        return []
    return _merge((start, size) for start, size in blocks(length) if not equal(one, other, start, size))


def _merge(parts: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for start, size in parts:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + size)
        else:
            runs.append((start, start + size))
    return runs
