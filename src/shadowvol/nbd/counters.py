"""What the data path has done, as plain numbers, and how long it took, as histograms: the same for both executors.

A histogram has 8 buckets per power of two of nanoseconds: each is at most 12.5 % wide, 320 of them reach 18 minutes.
A latency is counted in `bucket_of(ns)`; the C filter does the same arithmetic (nbd/filter/filter.c, `bucket_of`).
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

READS: Final = 0
WRITES: Final = 1  # trims and zeroes included
KINDS: Final = ("read", "write")
BUCKET_COUNT: Final = 320
RECENT_S: Final = 5.0  # rates and percentiles are of about the last 5 s

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


NUMBERS = ("reads", "read_bytes", "writes", "write_bytes", "flushes")  # what Totals.numbers() tells


class Counters:
    """Plain numbers, changed under the data path's lock. `*_longest_s` are since the last take_longest()."""

    __slots__ = (
        "buckets",
        "flushes",
        "hold_longest_s",
        "read_bytes",
        "read_longest_s",
        "reads",
        "write_bytes",
        "write_longest_s",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = self.read_bytes = self.writes = self.write_bytes = self.flushes = 0
        self.hold_longest_s = self.read_longest_s = self.write_longest_s = 0.0
        self.buckets = ([0] * BUCKET_COUNT, [0] * BUCKET_COUNT)

    def read_ended(self, length_bytes: int, took_s: float) -> None:
        self.reads += 1
        self.read_bytes += length_bytes
        self.buckets[READS][bucket_of(int(took_s * 1e9))] += 1
        if took_s > self.read_longest_s:
            self.read_longest_s = took_s

    def write_ended(self, length_bytes: int, took_s: float) -> None:
        self.writes += 1
        self.write_bytes += length_bytes
        self.buckets[WRITES][bucket_of(int(took_s * 1e9))] += 1
        if took_s > self.write_longest_s:
            self.write_longest_s = took_s

    def take_longest(self) -> dict[str, float]:
        names = ("hold_longest_s", "read_longest_s", "write_longest_s")
        taken = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, 0.0)
        return taken


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the member's start, of both executors together; `buckets` by kind."""

    reads: int
    read_bytes: int
    writes: int
    write_bytes: int
    flushes: int
    buckets: tuple[list[int], list[int]]

    @classmethod
    def of(cls, counters: Counters) -> "Totals":
        """A copy of one executor's."""
        numbers = (counters.reads, counters.read_bytes, counters.writes, counters.write_bytes, counters.flushes)
        return cls(*numbers, (list(counters.buckets[READS]), list(counters.buckets[WRITES])))

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in NUMBERS}


class Recent:
    """Rates and percentiles of the last RECENT_S seconds, from totals that are noted now and then."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, Totals]] = deque()

    def note(self, now_s: float, totals: Totals) -> dict[str, dict[str, Any]]:
        """By kind: `iops`, `bytes_per_s`, `p50_s`, `p99_s` (None where nothing was done)."""
        noted = self._noted
        noted.append((now_s, totals))
        while len(noted) > 2 and noted[1][0] <= now_s - RECENT_S:
            noted.popleft()
        since_s, before = noted[0]
        span_s = now_s - since_s
        recent: dict[str, dict[str, Any]] = {}
        for kind, name in enumerate(KINDS):
            deltas = [new - old for new, old in zip(totals.buckets[kind], before.buckets[kind], strict=True)]
            counts = getattr(totals, name + "s") - getattr(before, name + "s")
            moved = getattr(totals, name + "_bytes") - getattr(before, name + "_bytes")
            recent[name] = {
                "iops": counts / span_s if span_s > 0 else 0.0,
                "bytes_per_s": moved / span_s if span_s > 0 else 0.0,
                "p50_s": percentile_s(deltas, 0.50),
                "p99_s": percentile_s(deltas, 0.99),
            }
        return recent
