"""A member's own picture of its activity log, and of what each leg has been written since its last good flush.

Invariants (each is a † rule, proved by the simulator)
- A zone in `logged` is durable in the coordinator. It enters `logged` only after the reply, and leaves `logged`
  before its removal is asked for; until that is replied to it cannot be asked for again.
- `dirty[leg]` holds each zone written on that leg since that leg's last good flush began; a write counts at its
  admission and again at its completion, so one in flight during a flush stays dirty.
- A zone leaves only when nothing is in flight there, both legs are clean there, and no fault of a write or flush is
  unsettled: until its bits are cleared durably, the log is all that knows of the difference.

Times are seconds on whatever clock the caller ticks with; the path of an I/O reads no clock.
"""

from collections.abc import Iterable

from shadowvol.core.geometry import Run, runs_of
from shadowvol.core.rules import NONE_OMITTED

IDLE_S = 3.0  # a zone is cleaned this long after its last mirrored write: long enough for a hot zone to stay logged
EAGER_IDLE_S = 0.5  # the same, above the soft limit
SOFT_LIMIT_ZONES = 4096  # 64 GiB of 16 MiB zones: about what resyncs within 5 minutes
ZONES_PER_REQUEST = 4096  # one record change stays small
ZONES_EXPECTED_MAX = 64  # of one window: 1 GiB; larger ones are mostly holes


class Activity:
    """Zones by index."""

    def __init__(
        self,
        omit: frozenset[str] = NONE_OMITTED,
        idle_s: float = IDLE_S,
        expected_max: int = ZONES_EXPECTED_MAX,
    ) -> None:
        self._omit = omit
        self._expected_max = expected_max
        self.idle_s = idle_s
        self.logged: set[int] = set()
        self.wanted: set[int] = set()  # to be asked for when the request under way is replied to
        self.asked: set[int] = set()
        self.leaving: set[int] = set()
        self.entering: list[int] | None = None  # logged since this was looked at; None: nobody wants to know
        self.dirty: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.all_dirty = [("new-member-all-dirty" not in omit)] * 2
        self._inflight: dict[int, int] = {}
        self._last_write_s: dict[int, float] = {}
        self._written_s = float("-inf")  # the last write of all
        self._clock = 0  # orders writes against flush captures
        self.now_s = 0.0
        self.unsettled_flush_failures = 0
        self.unsettled_write_failures = 0

    # ---- path of a write ----

    def missing(self, zones: range) -> bool:
        """True when some zone is not durable yet; it is then wanted."""
        absent = [zone for zone in zones if zone not in self.logged]
        if not absent:
            return False
        if "log-before-mirrored" in self._omit:
            self.logged.update(absent)
            return False
        for zone in absent:
            returning = zone in self.leaving and "unlog-own-set-first" not in self._omit
            if zone not in self.asked and not returning:
                self.wanted.add(zone)
        return True

    def expect(self, zones: set[int]) -> bool:
        """Mirrored writes to these zones are about to begin: they are wanted before the first of them waits for it.
        True where something is to be asked for. Nothing is where no write came lately, or too many zones are meant."""
        if self.now_s - self._written_s > self.idle_s or len(zones) > self._expected_max:
            return False
        self.wanted |= zones - self.logged - self.asked - self.leaving
        return bool(self.wanted)

    def begin(self, zones: range, legs: int) -> None:
        self._mark(zones, legs)
        for zone in zones:
            self._inflight[zone] = self._inflight.get(zone, 0) + 1

    def end(self, zones: range, legs: int) -> None:
        """The I/O has ended (also with an error)."""
        self._mark(zones, legs)
        self._written_s = self.now_s
        for zone in zones:
            left = self._inflight[zone] - 1
            if left:
                self._inflight[zone] = left
            else:
                del self._inflight[zone]
            self._last_write_s[zone] = self.now_s

    def _mark(self, zones: range, legs: int) -> None:
        self._clock += 1
        for leg in (0, 1):
            if legs & (1 << leg):
                dirty = self.dirty[leg]
                for zone in zones:
                    dirty[zone] = self._clock

    def written_elsewhere(self, zones: Iterable[tuple[int, int]], now_s: float) -> None:
        """(zone, legs) that another executor has written since the last call, or is writing now (nbd/gate.py)."""
        self._clock += 1
        for zone, legs in zones:
            self._last_write_s[zone] = self._written_s = now_s
            for leg in (0, 1):
                if legs & (1 << leg):
                    self.dirty[leg][zone] = self._clock

    # ---- flush ----

    def capture(self) -> int:
        """Call when a flush begins; give the value to flushed()."""
        self._clock += 1
        return self._clock

    def legs_to_flush(self) -> int:
        return sum(1 << leg for leg in (0, 1) if self.dirty[leg] or self.all_dirty[leg])

    def flushed(self, leg: int, capture: int) -> None:
        """A flush of the leg that began at `capture` has succeeded."""
        self.all_dirty[leg] = False
        keep_inflight = "flush-counts-inflight" not in self._omit
        for zone, last in list(self.dirty[leg].items()):
            if (last < capture and not (keep_inflight and zone in self._inflight)) or not keep_inflight:
                del self.dirty[leg][zone]

    def dirty_zones(self, leg: int, zone_count: int) -> list[Run]:
        """Zones whose writes on this leg may be lost when a flush has failed now."""
        return [(0, zone_count)] if self.all_dirty[leg] else runs_of(set(self.dirty[leg]))

    def forget_dirty(self, leg: int, zones: list[Run], before: int) -> None:
        """What was written on this leg before the capture `before` is not to be flushed: its bits are cleared."""
        dirty = self.dirty[leg]
        for lo, hi in zones:
            for zone in [zone for zone in dirty if lo <= zone < hi and dirty[zone] < before]:
                del dirty[zone]
        self.all_dirty[leg] = False

    # ---- cleaning ----

    def idle_zones(self, now_s: float) -> list[int]:
        """Logged zones without a write in flight whose last write is long enough ago."""
        limit = EAGER_IDLE_S if len(self.logged) > SOFT_LIMIT_ZONES else self.idle_s
        return [
            zone
            for zone in self.logged
            if zone not in self._inflight and now_s - self._last_write_s.get(zone, -limit) >= limit
        ]

    def take_cleanable(self, now_s: float) -> list[int]:
        """Zones to remove from the log, already gone from `logged`; the caller asks for their durable removal."""
        if self.unsettled_write_failures and "unlog-not-unsettled" not in self._omit:
            return []
        if self.unsettled_flush_failures or any(self.all_dirty) or self.leaving:
            return []
        clean = [
            zone
            for zone in self.idle_zones(now_s)
            if "unlog-only-clean" in self._omit or not (zone in self.dirty[0] or zone in self.dirty[1])
        ][:ZONES_PER_REQUEST]
        self.leaving = set(clean)
        if "unlog-own-set-first" not in self._omit:
            self.logged -= self.leaving
        return clean

    def needs_flush(self, now_s: float) -> bool:
        """An idle zone waits for a flush before it can be cleaned."""
        if any(self.all_dirty) and self.logged:
            return True
        return any(zone in self.dirty[0] or zone in self.dirty[1] for zone in self.idle_zones(now_s))

    def left(self) -> None:
        """The removal under way is durable."""
        if "unlog-own-set-first" in self._omit:
            self.logged -= self.leaving
        for zone in self.leaving:
            self._last_write_s.pop(zone, None)
        self.leaving = set()

    def entered(self) -> None:
        """The request for `asked` is durable. A fresh zone is not idle before its write has come."""
        self.logged |= self.asked
        if self.entering is not None:
            self.entering += self.asked
        for zone in self.asked:
            self._last_write_s[zone] = self.now_s
        self.asked = set()

    def take_wanted(self) -> list[int]:
        """The next batch to ask for; concurrent misses share it."""
        batch = sorted(self.wanted)[:ZONES_PER_REQUEST]
        self.wanted.difference_update(batch)
        self.asked = set(batch)
        return batch
