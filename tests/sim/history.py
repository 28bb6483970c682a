"""What clients saw, block by block, and the judgement: a register that loses nothing and never goes back.

Each write of a block carries a value of its own, so a history is linearizable exactly if the zones of its clusters
(a value's write and its reads) do not conflict (P. B. Gibbons, E. Korach, "Testing shared memories", 1997):
a cluster's zone runs from its earliest end to its latest start; where the end comes first it is a *forward* zone.
Two forward zones must not overlap, and no backward zone may lie inside a forward one.

A power loss ends an era. What survives it is one of the values that no flushed, acknowledged, later write replaced;
the first read of the next era tells which, and then it is a value like any other.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise

NEVER = float("inf")


@dataclass(slots=True, eq=False)
class WriteOp:
    value: int
    host: str
    start: float
    end: float = NEVER  # NEVER: not acknowledged (or answered with an error)
    durable: bool = False  # a flush that began after its end was acknowledged
    doubtful: bool = False  # a flush answered with an error may have lost it
    failed: bool = False  # answered with an error: until the block is written again it may hold either, as on any disk


@dataclass(slots=True)
class BlockHistory:
    """One block in one era. `initial` are the values that it may have begun with."""

    initial: set[int]
    writes: list[WriteOp] = field(default_factory=list)
    reads: list[tuple[int, float, float]] = field(default_factory=list)  # value, start, end


class History:
    """All blocks. `problems` lists violations in words."""

    def __init__(self, block_count: int) -> None:
        self.blocks = [BlockHistory({0}) for _ in range(block_count)]
        self.problems: list[str] = []
        self.era_start = 0.0
        self._unflushed: dict[str, list[WriteOp]] = {}  # host -> its writes that are neither durable nor doubtful

    def wrote(self, block: int, write: WriteOp) -> None:
        """A write has begun; who made it sets `end` when it is acknowledged."""
        self.blocks[block].writes.append(write)
        self._unflushed.setdefault(write.host, []).append(write)

    def flushed(self, host: str, began: float) -> None:
        """A flush on `host` that began at `began` was acknowledged: its host's writes before are durable."""
        left = []
        for write in self._unflushed.get(host, []):
            if write.end <= began:
                write.durable = True
            else:
                left.append(write)
        self._unflushed[host] = left

    def flush_failed(self, host: str) -> None:
        """The application was told: of its host's writes so far nothing is certain any more, as on any disk."""
        left = []
        for write in self._unflushed.get(host, []):
            if write.end < NEVER:
                write.doubtful = True
            else:
                left.append(write)
        self._unflushed[host] = left

    def judge(self) -> None:
        for number, block in enumerate(self.blocks):
            self._judge_block(number, block)

    def power_loss(self, now: float) -> None:
        """Judge the era, and begin the next with what may have survived."""
        self.judge()
        for block in self.blocks:
            survivors: set[int] = set()
            known = self._initial_seen(block)
            candidates = [WriteOp(value, "", -1.0, -0.5) for value in ({known} if known is not None else block.initial)]
            candidates += block.writes
            kept_from = max((write.start for write in block.writes if write.durable), default=-NEVER)
            survivors.update(write.value for write in candidates if not write.end < kept_from)
            block.initial = survivors
            block.writes, block.reads = [], []
        self._unflushed.clear()
        self.era_start = now

    def _initial_seen(self, block: BlockHistory) -> int | None:
        written = {write.value for write in block.writes}
        seen = {value for value, _, _ in block.reads if value not in written}
        return seen.pop() if len(seen) == 1 else None

    def _judge_block(self, number: int, block: BlockHistory) -> None:
        written = {write.value: write for write in block.writes}
        old = {value for value, _, _ in block.reads if value not in written}
        if len(old) > 1:
            self.problems.append(f"block {number}: reads disagree on what survived: {sorted(old)}")
            return
        if old - block.initial:
            self.problems.append(
                f"block {number}: read {old.pop()}, but only {sorted(block.initial)} can have survived"
            )
            return
        clusters: dict[int, list[float]] = {}  # value -> [earliest end, latest start]
        for value in old or {min(block.initial)}:
            clusters[value] = [self.era_start - 1.0, self.era_start - 2.0]
        for write in block.writes:
            clusters[write.value] = [write.end, write.start]
        for value, start, end in block.reads:
            if value in written and end < written[value].start:
                self.problems.append(f"block {number}: {value} was read before it was written")
            if value in written and written[value].failed:
                continue
            zone = clusters[value]
            zone[0] = min(zone[0], end)
            zone[1] = max(zone[1], start)
        self._judge_zones(number, {value: zone for value, zone in clusters.items() if zone[0] != NEVER})

    def _judge_zones(self, number: int, clusters: dict[int, list[float]]) -> None:
        forward = sorted((zone[0], zone[1], value) for value, zone in clusters.items() if zone[0] < zone[1])
        for (_, high, value), (low, _, following) in pairwise(forward):
            if low < high:
                self.problems.append(
                    f"block {number}: values {value} and {following} alternate: a read went back or a write was lost"
                )
        lows = [low for low, _, _ in forward]
        for value, zone in clusters.items():
            before = bisect_left(lows, zone[1]) - 1  # forward zones do not overlap: only the last begun can contain it
            if zone[0] < zone[1] or before < 0:
                continue
            low, high, other = forward[before]
            if zone[0] < high:
                self.problems.append(
                    f"block {number}: value {value} (all within {zone[1]:.4f}-{zone[0]:.4f}) never appeared "
                    f"between reads of {other} ({low:.4f}-{high:.4f}): a write was lost or a read went back"
                )
