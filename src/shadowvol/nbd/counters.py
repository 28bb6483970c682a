"""What the data path has done, as plain numbers, and how long it took, as histograms: the same for both executors.

Histograms (core/latency.py) only grow while the member lives, so what was done between two looks is their difference.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from shadowvol.core.latency import BUCKET_COUNT, between, bucket_of, percentile_s, to_sparse

READS: Final = 0
WRITES: Final = 1  # trims and zeroes included
KINDS: Final = ("read", "write")
RECENT_S: Final = 5.0  # rates and percentiles are of about the last 5 s


def counts_below(pairs: Iterable[Sequence[int]], limits_ns: Sequence[int]) -> list[int]:
    """How many were shorter than each limit; `pairs` of (bucket, count) as Totals.latencies() tells them.

    Exact where each limit is a bucket's end, as powers of two are; the limits ascend."""
    counts = [0] * (len(limits_ns) + 1)
    first_buckets = [bucket_of(limit_ns) for limit_ns in limits_ns]
    for bucket, count in pairs:
        counts[bisect_right(first_buckets, bucket)] += count  # the first limit that the whole bucket is below
    return list(accumulate(counts[:-1]))


NUMBERS = ("reads", "read_bytes", "writes", "write_bytes", "flushes")  # what Totals.numbers() tells


class Counters:
    """Plain numbers, changed under the data path's lock. `*_longest_s` are since the last take_longest().

    `took_ns`: sums of the latencies, by kind. `holds`: requests that had to wait for a hold; `held_s`: together that.
    """

    __slots__ = (
        "buckets",
        "flushes",
        "held_s",
        "hold_longest_s",
        "holds",
        "read_bytes",
        "read_longest_s",
        "reads",
        "took_ns",
        "write_bytes",
        "write_longest_s",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = self.read_bytes = self.writes = self.write_bytes = self.flushes = 0
        self.hold_longest_s = self.read_longest_s = self.write_longest_s = 0.0
        self.holds, self.held_s = 0, 0.0
        self.took_ns = [0, 0]
        self.buckets = ([0] * BUCKET_COUNT, [0] * BUCKET_COUNT)

    def read_ended(self, length_bytes: int, took_s: float) -> None:
        self.reads += 1
        self.read_bytes += length_bytes
        took_ns = int(took_s * 1e9)
        self.took_ns[READS] += took_ns
        self.buckets[READS][bucket_of(took_ns)] += 1
        if took_s > self.read_longest_s:
            self.read_longest_s = took_s

    def write_ended(self, length_bytes: int, took_s: float) -> None:
        self.writes += 1
        self.write_bytes += length_bytes
        took_ns = int(took_s * 1e9)
        self.took_ns[WRITES] += took_ns
        self.buckets[WRITES][bucket_of(took_ns)] += 1
        if took_s > self.write_longest_s:
            self.write_longest_s = took_s

    def hold_ended(self, held_s: float) -> None:
        """A request has waited for a hold so long."""
        self.holds += 1
        self.held_s += held_s
        self.hold_longest_s = max(self.hold_longest_s, held_s)

    def take_longest(self) -> dict[str, float]:
        names = ("hold_longest_s", "read_longest_s", "write_longest_s")
        taken = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, 0.0)
        return taken


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the member's start, of both executors together; `buckets` and `took_ns` by kind."""

    reads: int
    read_bytes: int
    writes: int
    write_bytes: int
    flushes: int
    buckets: tuple[list[int], list[int]]
    took_ns: tuple[int, int]
    holds: int
    held_s: float

    @classmethod
    def of(cls, counters: Counters) -> "Totals":
        """A copy of one executor's."""
        numbers = (counters.reads, counters.read_bytes, counters.writes, counters.write_bytes, counters.flushes)
        buckets = (list(counters.buckets[READS]), list(counters.buckets[WRITES]))
        took_ns = (counters.took_ns[READS], counters.took_ns[WRITES])
        return cls(*numbers, buckets, took_ns, counters.holds, counters.held_s)

    def numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in NUMBERS}

    def latencies(self) -> dict[str, dict[str, Any]]:
        """By kind: `sum_s`, and `buckets`, pairs of (bucket, count) of those that are not empty."""
        return {
            name: {
                "sum_s": self.took_ns[kind] / 1e9,
                "buckets": to_sparse(self.buckets[kind]),
            }
            for kind, name in enumerate(KINDS)
        }


class Recent:
    """Rates and percentiles of the last RECENT_S seconds, from totals that are noted now and then."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, Totals, dict[str, float]]] = deque()

    def note(self, now_s: float, totals: Totals, longest: dict[str, float]) -> dict[str, Any]:
        """`longest`: since the last call, as of take_longest(). Answers `interval_s`, the time that the rest is about
        (0 at the first call: nothing is known yet), and by kind `iops`, `bytes_per_s`, `p50_s`, `p99_s`, `longest_s`
        (None where nothing was done); `hold`: `count` and `longest_s` of the requests that waited for a hold."""
        noted = self._noted
        noted.append((now_s, totals, longest))
        while len(noted) > 2 and noted[1][0] <= now_s - RECENT_S:
            noted.popleft()
        since_s, before, _ = noted[0]
        span_s = now_s - since_s
        recent: dict[str, Any] = {"interval_s": span_s}
        for kind, name in enumerate(KINDS):
            deltas = between(before.buckets[kind], totals.buckets[kind])
            counts = getattr(totals, name + "s") - getattr(before, name + "s")
            moved = getattr(totals, name + "_bytes") - getattr(before, name + "_bytes")
            recent[name] = {
                "iops": counts / span_s if span_s > 0 else 0.0,
                "bytes_per_s": moved / span_s if span_s > 0 else 0.0,
                "p50_s": percentile_s(deltas, 0.50),
                "p99_s": percentile_s(deltas, 0.99),
                "longest_s": self._longest_s(f"{name}_longest_s") if counts else None,
            }
        holds = totals.holds - before.holds
        recent["hold"] = {"count": holds, "longest_s": self._longest_s("hold_longest_s") if holds else None}
        return recent

    def _longest_s(self, name: str) -> float:
        """Of what ended after the first noting, which the others tell of."""
        return max((noted[2][name] for noted in list(self._noted)[1:]), default=0.0)
