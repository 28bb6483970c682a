"""Histograms of latencies: how long requests took, small enough to be kept, sent and merged.

8 buckets per power of two of nanoseconds: each is at most 12.5 % wide, 320 of them reach 18 minutes (the idea is that
of HdrHistogram). The C filter does the same arithmetic (nbd/filter/filter.c, `bucket_of`).
"""

from collections.abc import Iterable
from typing import Final

BUCKET_COUNT: Final = 320

_SUB_BITS = 3


def bucket_of(ns: int) -> int:
    """The bucket that counts a latency of `ns` nanoseconds."""
    if ns < 1 << _SUB_BITS:
        return max(ns, 0)
    power = ns.bit_length() - 1 - _SUB_BITS
    return min((power << _SUB_BITS) + (ns >> power), BUCKET_COUNT - 1)


def bucket_end_ns(bucket: int) -> int:
    """The first latency that is too long for the bucket."""
    if bucket < 1 << _SUB_BITS:
        return bucket + 1
    power = (bucket >> _SUB_BITS) - 1
    return (bucket - (power << _SUB_BITS) + 1) << power


def percentile_s(buckets: list[int], fraction: float) -> float | None:
    """The latency that `fraction` of what was counted did not exceed, from above by at most 12.5 %; None: nothing."""
    total = sum(buckets)
    if not total:
        return None
    wanted, seen = fraction * total, 0
    for bucket, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return bucket_end_ns(bucket) / 1e9
    return None


def between(before: list[int], after: list[int]) -> list[int]:
    """What was counted from one look at a histogram to the next."""
    return [new - old for new, old in zip(after, before, strict=True)]


def merged(histograms: Iterable[list[int]]) -> list[int]:
    """All of them as one."""
    total = [0] * BUCKET_COUNT
    for histogram in histograms:
        total = [have + more for have, more in zip(total, histogram, strict=True)]
    return total


def to_sparse(buckets: list[int]) -> list[tuple[int, int]]:
    """(bucket, count) of those that count something: as it is sent."""
    return [pair for pair in enumerate(buckets) if pair[1]]


def from_sparse(pairs: Iterable[Iterable[int]]) -> list[int]:
    """The inverse. Raises IndexError or ValueError where it is none."""
    buckets = [0] * BUCKET_COUNT
    for bucket, count in pairs:
        buckets[bucket] += count
    return buckets
