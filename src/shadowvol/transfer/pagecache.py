"""What of a leg lay in the page cache before a job read it: that is somebody else's, and stays.

Reading a whole volume through the page cache drives out what applications have there, and memory has to be found for
every page, which costs the copy time as well (docs/performance.md, "From a disk"). Where the kernel can read
without that (RWF_DONTCACHE, endpoints/local.py), nothing of this is used. A disk cannot, nor can kernels before 6.14:
there each piece is dropped again after it was read, but for the pages that had been there.

Which those are must be asked before the kernel's own read-ahead gets there: so it looks a chunk ahead of the pieces.
Right or wrong, it is only about speed: a page that is dropped is clean, and is read again by who wants it.
"""

import mmap
import threading
from collections.abc import Callable
from itertools import groupby

CHUNK_BYTES = 64 << 20  # looked at in one go, about 1 ms; far more than any read-ahead

Resident = Callable[[int, int], bytes]  # (offset, length) -> one byte per page, 1: it is in the page cache


class CachedBefore:
    """Of one job. Thread-safe. Where `resident` raises OSError, all counts as having been there."""

    def __init__(self, resident: Resident, first_offset: int, end: int) -> None:
        """[first_offset, end): what the job may read. Looks at its first chunk at once."""
        self._resident = resident
        self._end = end
        self._chunks: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._chunk(first_offset // CHUNK_BYTES)

    def absent(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of the runs of whole pages in a piece that were not there. To be asked before it is read."""
        pages = self._pages(offset, length)
        runs, position = [], offset - offset % mmap.PAGESIZE
        for was_there, group in groupby(pages):
            run_bytes = mmap.PAGESIZE * sum(1 for _ in group)
            if not was_there:
                runs.append((position, run_bytes))
            position += run_bytes
        return runs

    def _pages(self, offset: int, length: int) -> bytes:
        first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
        with self._lock:
            chunks = b"".join(self._chunk(number) for number in range(first, last + 1))
            self._chunk(last + 1)
        start = offset - first * CHUNK_BYTES
        return chunks[start // mmap.PAGESIZE : -(-(start + length) // mmap.PAGESIZE)]

    def _chunk(self, number: int) -> bytes:
        """A chunk's pages, as they were when it was first asked for. The lock is held."""
        if number not in self._chunks:
            start = number * CHUNK_BYTES
            length = min(CHUNK_BYTES, self._end - start)
            try:
                self._chunks[number] = self._resident(start, length) if length > 0 else b""
            except OSError:
                self._chunks[number] = bytes([1]) * -(-length // mmap.PAGESIZE)
        return self._chunks[number]
