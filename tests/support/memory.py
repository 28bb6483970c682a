"""A machine's memory as it is after some days: none of it free, and in the page cache what is in use.

Some virtual machines page out what has been in the page cache for a minute unused (DAMON's proactive reclaim; here
/sys/kernel/mm/damon says so): a file of 4 GiB, read at random 1,400 times per second, then loses pages all the time,
and one read of fifty is from the disk. Pages that a process has mapped are left alone, so both functions map theirs.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

MIB = 1 << 20
LEFT_FREE = 512 * MIB
_MAP_LOCKED = 0x2000  # <bits/mman.h>; Python has no name for it


def free_bytes() -> int:
    """Of memory that nobody uses, not even the page cache."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))


@contextmanager
def filled_memory(folder: Path | None = None) -> Iterator[None]:
    """Meanwhile most of what was free is clean page cache, which the kernel gives to whoever asks for memory.

    For benches on virtual machines: one that tells its host which pages are free gets each of them back at its first
    use only, and that may take longer than to write it. (Measured: a tmpfs is filled at 0.4 GB/s instead of 2.5.)
    """
    with tempfile.TemporaryFile(prefix="shadowvol-fill-", dir=folder) as file, ExitStack() as stack:
        size = max(0, free_bytes() - LEFT_FREE)
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
        buffer = bytearray(2 * MIB)
        while file.readinto(buffer):
            pass
        if size:
            stack.enter_context(_mapped(file.fileno(), 0))
        yield


@contextmanager
def kept_in_memory(path: Path) -> Iterator[None]:
    """All of the file is in the page cache meanwhile. Needs root, or a limit of locked memory above its size."""
    with path.open("rb") as file, _mapped(file.fileno(), _MAP_LOCKED):
        yield


def _mapped(fd: int, flags: int) -> mmap.mmap:
    return mmap.mmap(fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE | flags, mmap.PROT_READ)
