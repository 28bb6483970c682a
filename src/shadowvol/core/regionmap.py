"""The map: per region one byte with `source_ok` (1) and `target_ok` (2). The same class at leader and members.

Invariant: the byte of a region is never 0 (at least one leg holds everything acknowledged).
One byte per region, so that searches and changes of long runs are operations at the speed of C (core/bytemap.py).
"""

import zlib

from shadowvol.core import bytemap
from shadowvol.core.geometry import Run
from shadowvol.core.legs import BOTH_OK, S_OK, bit, other

CHUNK_REGIONS = 65536  # regions per record in the coordinator: 64 KiB before compression, 4 Mi regions = 64 records


_SET = tuple(bytes(value | leg_bit for value in range(256)) for leg_bit in (1, 2))
_CLEAR = tuple(
    bytes((value & ~leg_bit) if value & ~leg_bit & BOTH_OK else value for value in range(256)) for leg_bit in (1, 2)
)
_CLEAR_EVEN_LAST = tuple(bytes(value & ~leg_bit for value in range(256)) for leg_bit in (1, 2))


class RegionMap:
    """Bits of `region_count` regions; at creation the source is ok everywhere and the target nowhere."""

    def __init__(self, region_count: int, bits: bytes | None = None) -> None:
        if bits is not None and len(bits) != region_count:
            raise ValueError(f"map of {len(bits)} regions where {region_count} are expected")
        self.bits = bytearray(bits) if bits is not None else bytearray([S_OK]) * region_count
        if 0 in self.bits:
            raise ValueError("a region without an ok leg")

    def __len__(self) -> int:
        return len(self.bits)

    def set_ok(self, leg: int, runs: list[Run]) -> None:
        for lo, hi in runs:
            bytemap.translate(self.bits, lo, hi, _SET[leg], self.bits)

    def clear_ok(self, leg: int, runs: list[Run], *, even_last: bool = False) -> None:
        """Clear the leg's bit where the other leg is ok; the last ok leg's bit stays (†: last-ok-leg)."""
        table = _CLEAR_EVEN_LAST if even_last else _CLEAR
        for lo, hi in runs:
            bytemap.translate(self.bits, lo, hi, table[leg], self.bits)

    def count_ok(self, leg: int) -> int:
        return self._count(bit(leg)) + self._count(BOTH_OK)

    def count_both(self) -> int:
        return self._count(BOTH_OK)

    def _count(self, value: int) -> int:
        return bytemap.count(self.bits, value, 0, len(self.bits))

    def is_ok(self, leg: int, lo: int, hi: int) -> bool:
        """The leg is ok in every region of [lo, hi): none has the other one alone, or nothing."""
        return self.bits.find(bit(other(leg)), lo, hi) < 0 and self.bits.find(0, lo, hi) < 0

    def runs_equal(self, value: int, lo: int, hi: int) -> list[Run]:
        """Maximal runs within [lo, hi) whose byte is exactly `value`."""
        return bytemap.runs_equal(self.bits, value, lo, hi)

    def next_one_legged(self, start: int, values: tuple[int, ...] = (1, 2)) -> int:
        """First region at or after `start` with exactly one ok leg (of the kinds in `values`); -1: none."""
        found = [position for value in values if (position := self.bits.find(value, start)) >= 0]
        return min(found, default=-1)

    def chunk_count(self) -> int:
        return -(-len(self.bits) // CHUNK_REGIONS)

    def chunks_of(self, runs: list[Run]) -> set[int]:
        """Indexes of the records that hold these regions."""
        chunks: set[int] = set()
        for lo, hi in runs:
            chunks.update(range(lo // CHUNK_REGIONS, (hi - 1) // CHUNK_REGIONS + 1))
        return chunks

    def chunk(self, index: int) -> bytes:
        """The record of one chunk, compressed."""
        return zlib.compress(bytes(self.bits[index * CHUNK_REGIONS : (index + 1) * CHUNK_REGIONS]), 1)

    def copy(self) -> "RegionMap":
        return RegionMap(len(self.bits), bytes(self.bits))

    @classmethod
    def from_chunks(cls, region_count: int, chunks: list[bytes]) -> "RegionMap":
        """ValueError when the records do not make up a map of this size."""
        try:
            return cls(region_count, b"".join(zlib.decompress(chunk) for chunk in chunks))
        except zlib.error as error:
            raise ValueError(f"map record cannot be read: {error}") from error
