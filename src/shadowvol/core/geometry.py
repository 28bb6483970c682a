"""Sizes of a volume's units: region (map), block (touched), zone (activity log). Pure arithmetic on bytes.

Invariants: region and zone are powers of two times one another (a zone is at least a region), a block divides a region;
the last region and the last zone may be short. Ranges are half open, [lo, hi).
"""

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
REGION_BYTES_DEFAULT = 1 * MIB
REGIONS_MAX_DEFAULT = 4 * MIB  # 4 Mi regions: the map stays at 4 MiB of memory in each process
BLOCK_BYTES = 64 * KIB
ZONE_BYTES = 16 * MIB

Run = tuple[int, int]  # [lo, hi) of region, zone or block indexes


def region_bytes_for(size_bytes: int) -> int:
    """The default region size of a volume: 1 MiB, doubled while there would be more than 4 Mi regions."""
    region_bytes = REGION_BYTES_DEFAULT
    while size_bytes > region_bytes * REGIONS_MAX_DEFAULT:
        region_bytes *= 2
    return region_bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """`size_bytes` of the volume and its units. Raises ValueError on sizes that do not fit each other."""

    size_bytes: int
    region_bytes: int
    block_bytes: int = BLOCK_BYTES
    zone_bytes: int = ZONE_BYTES

    def __post_init__(self) -> None:
        if self.size_bytes <= 0:
            raise ValueError("a volume has at least one byte")
        if self.region_bytes <= 0 or self.region_bytes & (self.region_bytes - 1):
            raise ValueError(f"region size {self.region_bytes} is not a power of two")
        if self.region_bytes % self.block_bytes or self.zone_bytes % self.region_bytes:
            raise ValueError("a block divides a region, a region divides a zone")

    @classmethod
    def of(cls, size_bytes: int, region_bytes: int) -> "Geometry":
        """The product's geometry: 64 KiB blocks, zones of 16 MiB or one region if that is larger."""
        return cls(size_bytes, region_bytes, min(BLOCK_BYTES, region_bytes), max(ZONE_BYTES, region_bytes))

    @property
    def region_count(self) -> int:
        return -(-self.size_bytes // self.region_bytes)

    @property
    def zone_count(self) -> int:
        return -(-self.size_bytes // self.zone_bytes)

    @property
    def regions_per_zone(self) -> int:
        return self.zone_bytes // self.region_bytes

    @property
    def blocks_per_region(self) -> int:
        return self.region_bytes // self.block_bytes

    def regions_of(self, start: int, end: int) -> Run:
        """Regions that the bytes [start, end) lie in; `end` > `start`."""
        return start // self.region_bytes, (end - 1) // self.region_bytes + 1

    def zones_of(self, start: int, end: int) -> range:
        return range(start // self.zone_bytes, (end - 1) // self.zone_bytes + 1)

    def blocks_of(self, start: int, end: int) -> range:
        return range(start // self.block_bytes, (end - 1) // self.block_bytes + 1)

    def zone_regions(self, zone: int) -> Run:
        lo = zone * self.regions_per_zone
        return lo, min(lo + self.regions_per_zone, self.region_count)

    def region_extent(self, lo: int, hi: int) -> tuple[int, int]:
        """Bytes [start, end) of the regions [lo, hi)."""
        return lo * self.region_bytes, min(hi * self.region_bytes, self.size_bytes)

    def block_extent(self, lo: int, hi: int) -> tuple[int, int]:
        return lo * self.block_bytes, min(hi * self.block_bytes, self.size_bytes)

    def whole_regions(self, start: int, end: int) -> Run:
        """Regions that [start, end) covers completely (the short last one counts as whole); may be empty."""
        lo = -(-start // self.region_bytes)
        hi = self.region_count if end == self.size_bytes else end // self.region_bytes
        return lo, max(lo, hi)


def runs_of(indexes: list[int] | set[int]) -> list[Run]:
    """Sorted, merged runs of single indexes."""
    runs: list[Run] = []
    for index in sorted(indexes):
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def merge_runs(runs: list[Run]) -> list[Run]:
    """Sorted, with overlapping and touching runs merged."""
    merged: list[Run] = []
    for lo, hi in sorted(runs):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        elif hi > lo:
            merged.append((lo, hi))
    return merged


def overlaps(runs: list[Run] | tuple[Run, ...], lo: int, hi: int) -> bool:
    return any(a < hi and lo < b for a, b in runs)


def without(runs: list[Run], taken: list[Run]) -> list[Run]:
    """`runs` without `taken`; both sorted and merged."""
    left: list[Run] = []
    for lo, hi in runs:
        position = lo
        for first, last in taken:
            if last <= lo or first >= hi:
                continue
            if first > position:
                left.append((position, first))
            position = max(position, last)
        if position < hi:
            left.append((position, hi))
    return left
