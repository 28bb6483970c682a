"""A machine's memory as it is after some days: none of it free, the page cache has it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
LEFT_FREE = 512 * MIB


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
    with tempfile.TemporaryFile(prefix="shadowvol-fill-", dir=folder) as file:
        size = max(0, free_bytes() - LEFT_FREE)
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
        buffer = bytearray(2 * MIB)
        while file.readinto(buffer):
            pass
        yield
