"""What the data path and the copier need of a leg: one small protocol.

Its contract suite, which every implementation passes, is tests/contract/test_endpoint.py.

An endpoint is blocking and thread-safe: any number of threads may call it at once (it never moves a file position).
Every method raises OSError with the errno of the leg; nothing is retried here. Offsets and lengths are bytes.
Requests are any length and alignment; an endpoint whose medium needs alignment (O_DIRECT, 4 KiB sectors) does the
bounce buffers and read-modify-write itself: the caller has already made the rounded-out range its own.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes; `hole` means: reads as zeroes and holds no data (space may still be reserved for it)."""

    offset: int
    length: int
    hole: bool


class Endpoint(Protocol):
    """One open leg."""

    size_bytes: int
    block_bytes: int  # smallest unit the medium itself writes (512, 4096; 1 for files through the page cache)
    can_punch: bool  # punch() works here (probed at open)

    def pread_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill `buffer` completely from `offset`; a short medium raises OSError(EIO)."""
        ...

    def pwrite(self, data: bytes | memoryview | bytearray, offset: int) -> None:
        """Write all of `data` at `offset`. Not durable before flush()."""
        ...

    def zero(self, offset: int, length: int, may_punch: bool) -> None:
        """Make the range read as zeroes; a hole if `may_punch` and the medium can, else allocated zeroes.

        Falls back to writing zeroes.
        """
        ...

    def punch(self, offset: int, length: int) -> None:
        """Deallocate so that the range reads as zeroes; OSError(EOPNOTSUPP) where that cannot be promised."""
        ...

    def flush(self) -> None:
        """All completed writes of every opener of this medium are durable when this returns (fdatasync)."""
        ...

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Runs that cover exactly [offset, offset+length), in order; one non-hole run where the medium cannot tell."""
        ...

    def close(self) -> None:
        """Let go of the medium. Never raises; may be called again; the caller has waited for its own operations."""
        ...
