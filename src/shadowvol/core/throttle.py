"""The adaptive throttle (DESIGN 7): how fast a host's copies may run so that its applications hardly feel them.

Additive increase, multiplicative decrease (as TCP's congestion control, Jacobson 1988) of one budget for all copies of
a host. The signal is a comparison, not a fixed limit, since nobody knows what is slow for this application on this
storage: turns in which copies run are compared with *quiet* turns, short ones in which none does. So a load that
changes, or writes that take longer because they are mirrored, are in both. Before copying begins all is quiet.

A turn is over when its time is, or as soon as it shows that the application suffers. Judged is the 99th percentile of
reads and of writes of each volume on the host that is not `max`: the worst ratio of copying to quiet, divided by what
the volume's impact allows. Where no application is at work, copies run at full speed.

What members measure begins when a request has reached them. What an application waits for before and after that is
above all a processor on which a copier is at work in the kernel: some hundred microseconds, which matter to requests
that are as quick as that. So beside such an application copiers also have a share of the host's processors that they
are not to exceed: who is there one percent of the time may be found there by the 99th percentile.

Pure: time is an argument, what was measured comes in frames.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from shadowvol.core.geometry import MIB
from shadowvol.core.latency import merged, percentile_s

LOW: Final = "low"
NORMAL: Final = "normal"
MAX: Final = "max"
IMPACTS: Final = (LOW, NORMAL, MAX)
ALLOWED_RATIO: Final = {LOW: 1.15, NORMAL: 1.6}  # what is promised, 1.25 and 2, is overstepped to find it

PROCESSOR_SHARE: Final = {LOW: 0.015, NORMAL: 0.04}  # of all of the host's together; measured: docs/decisions/0006
QUICK_S = 0.0005  # the 99th percentile, in quiet turns, of an application to which that share matters

QUIET_TURN_S = 1.25
COPY_TURN_S = 2.0
QUIET_EVERY_S = 10.0  # copying loses an eighth of its time to being measured
QUIET_AGAIN_S = 4.0  # but before a budget is cut twice, it is looked again whether the load has changed
SETTLE_S = 0.25  # a turn's first frames still show what was in flight before it
QUIET_KEPT = 4  # quiet turns that the comparison is with
SAMPLES_MIN = 100  # requests of a kind in a turn; fewer have no 99th percentile

RATE_FIRST = 16.0 * MIB  # bytes per second, when an application is met for the first time
RATE_MIN = 4.0 * MIB  # of the budget, whatever the application feels: a migration ends
SHARE_MIN = 1.0 * MIB  # of one volume, whatever the others must have
RATE_STEP = 4.0 * MIB  # per turn; a tenth of the budget where that is more
GROWTH_FIRST = 1.5  # per turn, until the first decrease
DECREASE_MOST = 0.5  # at once; less where the limit was overstepped by less
UNUSED_FACTOR = 2.0  # the budget does not grow beyond so much of what is really copied
BUSY_IOPS = 10.0  # an application that does less does not count as at work
BUSY_KEPT_S = 2.0  # and it counts so long after it did
SUFFERS = 4.0  # so many times what is allowed ends a turn at once

_BISECTIONS = 60  # to a fraction of a byte


@dataclass(frozen=True, slots=True)
class Copying:
    """A volume that copies on this host, and what its operator wants. Rates are bytes per second."""

    name: str
    impact: str = NORMAL
    rate_max: int | None = None  # --rate
    rate_min: float = 0.0  # --min-rate, or what --finish-by needs


@dataclass(frozen=True, slots=True)
class Pace:
    """What a volume's copy may do now: `rate` None is full speed, `quiet` nothing at all."""

    rate: float | None
    quiet: bool = False


@dataclass(slots=True)
class _Measured:
    """One volume's latencies in one turn: histograms of reads and of writes."""

    reads: list[int]
    writes: list[int]

    @classmethod
    def of(cls, parts: "Iterable[_Measured]") -> "_Measured":
        parts = list(parts)
        return cls(merged(part.reads for part in parts), merged(part.writes for part in parts))


@dataclass(slots=True)
class _Application:
    """What is known of the application of one volume."""

    impact: str = NORMAL
    busy_s: float = float("-inf")  # when it was last seen at work
    quiet: deque[_Measured] = field(default_factory=lambda: deque(maxlen=QUIET_KEPT))
    turn: list[_Measured] = field(default_factory=list)

    def end_quiet_turn(self) -> None:
        if self.turn:
            self.quiet.append(_Measured.of(self.turn))
            self.turn = []

    @property
    def quick(self) -> bool:
        """Its requests are short, as far as is known."""
        quiet = _Measured.of(self.quiet)
        return all((percentile_s(kind, 0.99) or 0.0) < QUICK_S for kind in (quiet.reads, quiet.writes))

    def ratio(self) -> float | None:
        """99th percentile of this turn to what is allowed after the quiet ones; None: too few requests."""
        allowed = ALLOWED_RATIO.get(self.impact)
        if allowed is None or not self.turn or not self.quiet:
            return None
        now = _Measured.of(self.turn)
        ratios = [
            _ratio(ours, quiet, allowed)
            for ours, quiet in (
                (now.reads, [turn.reads for turn in self.quiet]),
                (now.writes, [turn.writes for turn in self.quiet]),
            )
        ]
        return max((ratio for ratio in ratios if ratio is not None), default=None)


def _ratio(ours: list[int], quiet: list[list[int]], allowed: float) -> float | None:
    """Allowed is a multiple of what all quiet turns together show, and what the worst of them showed: where others
    disturb the application as well, that is not put down to the copy."""
    theirs = merged(quiet)
    if min(sum(ours), sum(theirs)) < SAMPLES_MIN:
        return None
    p99, base = percentile_s(ours, 0.99), percentile_s(theirs, 0.99)
    worst_quiet = max(percentile_s(turn, 0.99) or 0.0 for turn in quiet)
    if p99 is None or not base:
        return None
    return p99 / max(allowed * base, worst_quiet)


class AdaptiveThrottle:
    """One host's. Call frame() for what was measured and plan() a few times a second; it tells each copy's pace."""

    def __init__(self) -> None:
        self.budget = RATE_FIRST  # bytes per second of all copies that are not `max` together
        self._found = False  # the budget has met its limit once
        self._applications: dict[str, _Application] = {}
        self._copying: list[Copying] = []
        self._turn_s = 0.0  # when this turn began
        self._quiet = False  # this turn is
        self._quiet_ended_s = 0.0
        self._copied_in_turn = 0
        self._worked_in_turn = 0.0  # share of the host's processors, times seconds
        self._was_busy = False

    # ------------------------------------------------------------------ what was measured

    def frame(self, name: str, impact: str, from_s: float, to_s: float, reads: list[int], writes: list[int]) -> None:
        """Histograms of the requests to volume `name` that ended in [from_s, to_s)."""
        known = self._applications.setdefault(name, _Application())
        known.impact = impact
        if sum(reads) + sum(writes) >= BUSY_IOPS * (to_s - from_s) > 0:
            known.busy_s = to_s
        measured = _Measured(reads, writes)
        if not sum(reads) + sum(writes):
            return
        if not self._copying:
            known.turn.append(measured)
            if len(known.turn) * (to_s - from_s) >= QUIET_TURN_S:
                known.end_quiet_turn()
        elif from_s >= self._turn_s + SETTLE_S:
            known.turn.append(measured)

    def copied(self, byte_count: int) -> None:
        """So much has been copied since the last call, by volumes that are not `max`."""
        self._copied_in_turn += byte_count

    def worked(self, processor_s: float, processors: int) -> None:
        """So long have these copiers been on one of the host's processors since the last call."""
        self._worked_in_turn += processor_s / processors

    def forget(self, name: str) -> None:
        """The volume is not up any more."""
        self._applications.pop(name, None)

    # ------------------------------------------------------------------ what follows

    def plan(self, now_s: float, copying: list[Copying]) -> dict[str, Pace]:
        """The pace of each volume that copies."""
        self._copying = copying
        busy = bool(copying) and bool(self._busy(now_s))
        if busy and not self._was_busy:
            self._quiet_ended_s = now_s
            self._begin(now_s, quiet=not self._has_baseline(now_s))
        elif busy:
            self._judge(now_s)
        self._was_busy = busy
        return self._paces(busy)

    def _busy(self, now_s: float) -> list[_Application]:
        """The applications at work that copying must spare."""
        return [
            known
            for known in self._applications.values()
            if known.impact in ALLOWED_RATIO and now_s - known.busy_s < BUSY_KEPT_S
        ]

    def _has_baseline(self, now_s: float) -> bool:
        return all(known.quiet for known in self._busy(now_s))

    def _begin(self, now_s: float, *, quiet: bool) -> None:
        """A new turn."""
        self._turn_s = now_s
        self._quiet = quiet
        self._copied_in_turn = 0
        self._worked_in_turn = 0.0
        for known in self._applications.values():
            known.turn = []

    def _judge(self, now_s: float) -> None:
        took_s = now_s - self._turn_s
        if self._quiet:
            if took_s >= QUIET_TURN_S:
                for known in self._applications.values():
                    known.end_quiet_turn()
                self._quiet_ended_s = now_s
                self._begin(now_s, quiet=False)
            return
        ratios = [ratio for known in self._busy(now_s) if (ratio := known.ratio()) is not None]
        worst = max(ratios, default=None)
        suffers = worst is not None and worst >= SUFFERS and self.budget > RATE_MIN
        if took_s < COPY_TURN_S and not suffers:
            return
        strain = self._strain(now_s, took_s)
        if worst is not None or strain > 1.0:  # where nothing was measured it says nothing in favour of the copy
            worst = max(worst or 0.0, strain)
        if worst is not None:
            self._adapt(worst, took_s)
        again = worst is not None and worst > 1.0 and self.budget > RATE_MIN
        due = now_s - self._quiet_ended_s >= (QUIET_AGAIN_S if again else QUIET_EVERY_S)
        self._begin(now_s, quiet=due or not self._has_baseline(now_s))

    def _strain(self, now_s: float, took_s: float) -> float:
        """The copiers' share of the processors to what is theirs beside the quick applications at work."""
        quick = [known for known in self._busy(now_s) if known.quick]
        allowed = min((PROCESSOR_SHARE[known.impact] for known in quick), default=1.0)
        return self._worked_in_turn / took_s / allowed

    def _adapt(self, worst: float, took_s: float) -> None:
        if worst > 1.0:
            self.budget = max(RATE_MIN, self.budget * max(DECREASE_MOST, 1 / worst))
            self._found = True
        else:
            used = self._copied_in_turn / took_s
            grown = self.budget + max(RATE_STEP, self.budget / 10) if self._found else self.budget * GROWTH_FIRST
            self.budget = max(self.budget, min(grown, UNUSED_FACTOR * used))

    def _paces(self, busy: bool) -> dict[str, Pace]:
        paces = {volume.name: Pace(volume.rate_max) for volume in self._copying}
        if not busy:
            return paces
        spared = [volume for volume in self._copying if volume.impact in ALLOWED_RATIO]
        rates = share(self.budget, spared)
        for volume in spared:
            least = min(SHARE_MIN, volume.rate_max or SHARE_MIN)
            paces[volume.name] = Pace(max(rates[volume.name], least), quiet=self._quiet)
        return paces


def share(budget: float, volumes: list[Copying]) -> dict[str, float]:
    """The budget in equal parts; what one cannot use (its rate_max) goes to the others, what one must have (its
    rate_min, but never above its rate_max) it gets even beyond the budget. Bytes per second by name."""

    def parts(level: float) -> dict[str, float]:
        return {
            volume.name: min(max(level, volume.rate_min), volume.rate_max or float("inf")) for volume in volumes
        }

    low, high = 0.0, budget
    for _ in range(_BISECTIONS):
        level = (low + high) / 2
        low, high = (low, level) if sum(parts(level).values()) > budget else (level, high)
    return parts(low)
