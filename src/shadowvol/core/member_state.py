"""What a member knows, and the small operations on it that all its parts share: map picture, asks, ranges.

The member engine is one machine in four files, each a part of the one class (core/member.py says what it does):
    member_state.py     the fields; publishing a region's byte; asking the leader or agent and hearing the reply
    member_flush.py     flushes: what a failed one means, who is told
    member_protocol.py  obeying the leader's requests
    member.py           the data path: reads and writes

Invariant: `table` is `own` translated by `_published`, always; only `_publish` writes it, and notes what it wrote in
`changed` where somebody else obeys the table too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shadowvol.core import bytemap
from shadowvol.core.activity import IDLE_S, ZONES_EXPECTED_MAX, Activity
from shadowvol.core.geometry import Geometry, Run, merge_runs, overlaps, runs_of
from shadowvol.core.inflight import InFlight
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, S_OK, SOURCE, T_OK, Phase
from shadowvol.core.messages import Answer, Ask, ClearUndo, Fault, Freeze, LogZones, Request
from shadowvol.core.route import FRESH, HELD, READ_TARGET, SLOW, equal_runs, published_table
from shadowvol.core.rules import NONE_OMITTED

_READ_LEG = bytes(byte & READ_TARGET for byte in range(256))
_OWN_BYTES = range(2 * HELD)  # HELD is the highest mark
APPLICATION = 0  # token of a flush that the application asked for; DoFlush has tokens of its own


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: send this to the agent (and again after a reconnect, if it is an Ask)."""

    message: Answer | Ask


@dataclass(frozen=True, slots=True)
class DoFlush:
    """Effect: begin_flush(), flush the ticket's legs, finish_flush()."""

    token: int


@dataclass(frozen=True, slots=True)
class DoPrepare:
    """Effect: open these legs if they are not open, then call prepared(token, reason or None)."""

    token: int
    verb: str
    legs: dict[str, Any]


Effect = Send | DoFlush | DoPrepare


class FlushTicket:
    """One flush of the legs in `legs`; `zones[leg]` is the set of its failure."""

    __slots__ = ("capture", "concluded", "error", "failed", "legs", "settled", "token", "zones")

    def __init__(self, legs: int, capture: int, token: int) -> None:
        self.legs = legs
        self.capture = capture
        self.concluded = capture  # when a failure was seen: later writes are not its concern
        self.token = token
        self.zones: dict[int, list[Run]] = {}
        self.failed: dict[int, str] = {}
        self.settled = False
        self.error: str | None = None


class MemberWindow:
    """An open window as a member sees it. `closed`: CLOSE has been answered."""

    __slots__ = (
        "broken",
        "closed",
        "failed",
        "from_leg",
        "held",
        "held_since_s",
        "hi",
        "lo",
        "runs",
        "to_leg",
        "touched",
    )

    def __init__(self, runs: list[Run], from_leg: int, to_leg: int) -> None:
        self.runs = runs
        self.lo = runs[0][0]
        self.hi = runs[-1][1]
        self.from_leg = from_leg
        self.to_leg = to_leg
        self.touched: set[int] = set()
        self.held: list[Run] = []
        self.held_since_s: float | None = None
        self.broken = False
        self.closed = False
        self.failed = False  # a write failed in it: every further step of it is refused here


@dataclass(frozen=True, slots=True)
class MemberSnapshot:
    """What the member is doing, for status and logs."""

    joined: bool
    epoch: int
    phase: str
    preferred: str
    writes_in_flight: int
    reads_in_flight: int
    windows: int
    zones_logged: int
    faults_open: int
    frozen: bool


class MemberState:
    """See the module's header. `incarnation` is unique for each start of a member."""

    def __init__(
        self,
        geometry: Geometry,
        incarnation: int,
        *,
        align_bytes: int = 512,
        idle_s: float = IDLE_S,
        zones_expected_max: int = ZONES_EXPECTED_MAX,
        omit: frozenset[str] = NONE_OMITTED,
    ) -> None:
        self.geometry = geometry
        self.incarnation = incarnation
        self.omit = omit
        self.joined = False
        self.epoch = 0
        self.phase = Phase.SETUP
        self.preferred = SOURCE
        self.fresh_allowed = False
        self.own = bytearray(geometry.region_count)
        self.table = bytearray([SLOW]) * geometry.region_count
        self.changed: list[Run] | None = None  # None: nobody wants to know
        self._published = published_table(self.phase, self.preferred)
        self.inflight = InFlight(align_bytes)
        self.activity = Activity(omit, idle_s, zones_expected_max)
        self.windows: dict[int, MemberWindow] = {}
        self.blocked = ""
        self.now_s = 0.0
        self._freeze: Freeze | None = None
        self._effects: list[Effect] = []
        self._answers: dict[str, Answer] = {}  # last answer per subject
        self._begun: dict[str, int] = {}  # last seq begun per subject
        self._window_floor = 0
        self._newest_dropped = 0
        self._ask_number = 0
        self._asks: dict[int, Ask] = {}
        self._on_reply: dict[int, Callable[[], None]] = {}
        self._open_faults: dict[int, tuple[tuple[int, list[Run]], ...]] = {}
        self._undo_asked: set[int] = set()
        self._undo_kept = False
        self._flush_tokens: dict[int, Request] = {}
        self._flush_failed_at = [0, 0]  # activity clock of each leg's last failed flush
        self._flushing: set[FlushTicket] = set()
        self._finished: list[tuple[FlushTicket, set[FlushTicket]]] = []  # with the flushes in flight at its end
        self._flushes_ending: list[FlushTicket] = []
        self._owed: dict[int, str] = {}  # flush errors of last ok legs that no application flush has been told yet
        self._prepare_tokens: dict[int, Request] = {}
        self._token = 0
        self._idle_flush = 0

    # ------------------------------------------------------------------ out

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def outstanding(self) -> list[Ask]:
        """Asks without a reply, to be sent again after a reconnect."""
        return list(self._asks.values())

    def snapshot(self) -> MemberSnapshot:
        return MemberSnapshot(
            self.joined,
            self.epoch,
            self.phase.value,
            LEG_NAMES[self.preferred],
            len(self.inflight.writes),
            len(self.inflight.reads),
            len(self.windows),
            len(self.activity.logged),
            len(self._open_faults),
            self._freeze is not None,
        )

    @property
    def at_rest(self) -> bool:
        """Nothing happens because time passes: until something is logged or a window opens, a tick does nothing."""
        return not self.windows and not self.activity.logged

    # ------------------------------------------------------------------ the picture of the map

    @property
    def freeze(self) -> Freeze | None:
        """What is held of new I/O now, beside the blocks of windows."""
        return self._freeze

    def open_legs(self) -> int:
        """Legs that may have to be written or flushed in this phase, as bits.

        After commit --keep-undo the source is still flushed of what was written before the commit."""
        if self.phase is Phase.SETUP:
            return S_OK
        return T_OK if self.phase is Phase.COMMITTED and not self._undo_kept else BOTH_OK

    def _change_bits(self, leg: int, ok: bool, runs: list[Run]) -> None:
        on = bytes(value | (1 << leg) for value in range(256))
        off = bytes(value & ~(1 << leg) for value in range(256))
        for lo, hi in runs:
            bytemap.translate(self.own, lo, hi, on if ok else off, self.own)

    def _reads_moved(self, run: Run, before: bytearray) -> bool:
        """Some region of the run is read from another leg than when its part of the table was `before`."""
        return bytemap.differs(before, self.table, *run, _READ_LEG)

    def _publish(self, runs: list[Run]) -> None:
        for lo, hi in runs:
            bytemap.translate(self.own, lo, hi, self._published, self.table)
        if self.changed is not None:
            self.changed += runs

    def _mark(self, runs: list[Run], mark: int, on: bool) -> None:
        table = bytes((value | mark) if on else (value & ~mark) for value in range(256))
        for lo, hi in runs:
            bytemap.translate(self.own, lo, hi, table, self.own)
        self._publish(runs)

    def _mark_fresh(self, runs: list[Run]) -> None:
        self._mark(runs, FRESH, True)

    def _unmark_fresh(self, runs: list[Run]) -> None:
        """Also for writes in flight that were to make these regions fresh."""
        self._mark(runs, FRESH, False)
        for ticket in self.inflight.writes.values():
            if ticket.adopt is not None and overlaps(runs, *ticket.adopt):
                ticket.adopt = None

    def _runs_marked(self, mark: int, lo: int, hi: int) -> list[Run]:
        if not any(self.own.count(value, lo, hi) for value in _OWN_BYTES if value & mark):
            return []
        return runs_of([region for region in range(lo, hi) if self.own[region] & mark])

    def touch(self, start: int, end: int) -> None:
        """The blocks of a write that begins; by whoever executes it, before its first byte."""
        lo, hi = self.geometry.regions_of(start, end)
        for window in self.windows.values():
            if not window.closed and lo < window.hi and window.lo < hi:
                window.touched.update(self.geometry.blocks_of(start, end))

    def _held(self, start: int, end: int) -> bool:
        blocks = self.geometry.blocks_of(start, end)
        return any(overlaps(window.held, blocks.start, blocks.stop) for window in self.windows.values() if window.held)

    # ------------------------------------------------------------------ asks

    def _ask(self, want: Any, on_reply: Callable[[], None]) -> int:
        self._ask_number += 1
        ask = Ask(self.incarnation, self._ask_number, want)
        self._asks[ask.number] = ask
        self._on_reply[ask.number] = on_reply
        self._effects.append(Send(ask))
        return ask.number

    def _replied(self, number: int) -> None:
        self._asks.pop(number, None)
        self._open_faults.pop(number, None)
        on_reply = self._on_reply.pop(number, None)
        if on_reply is not None:
            on_reply()

    def _want_log(self) -> None:
        if not self.activity.asked:
            self._ask_log()

    def _ask_log(self) -> None:
        zones = self.activity.take_wanted()
        if zones:
            self._ask(LogZones(runs_of(zones)), self._log_entered)

    def _log_entered(self) -> None:
        self.activity.entered()
        self._ask_log()

    def _want_undo_clear(self, start: int, end: int) -> None:
        zones = {zone for zone in self.geometry.zones_of(start, end) if zone not in self._undo_asked}
        if zones:
            self._undo_asked |= zones
            self._ask(ClearUndo(runs_of(zones)), lambda: self._undo_asked.difference_update(zones))

    def _tell_fault(
        self, legs: tuple[tuple[int, list[Run]], ...], operation: str, error: str, on_reply: Callable[[], None]
    ) -> None:
        number = self._ask(Fault(legs, operation, error), on_reply)
        self._open_faults[number] = legs

    def _answer(self, request: Request, body: dict[str, Any]) -> None:
        """Not where a newer request of the subject has begun: the leader waits for that one's answer only."""
        if request.epoch != self.epoch or request.seq != self._begun.get(request.subject):
            return
        answer = Answer(request.epoch, self.incarnation, request.seq, body)
        self._answers[request.subject] = answer
        self._effects.append(Send(answer))

    # ------------------------------------------------------------------ ranges

    def _split(self, start: int, end: int, lo: int, hi: int) -> list[tuple[int, int, int]]:
        """(start, end, published byte) pieces of [start, end), cut where regions disagree."""
        size = self.geometry.region_bytes
        runs = equal_runs(self.table, lo, hi)
        return [(max(start, first * size), min(end, last * size), byte) for first, last, byte in runs]

    def _zones_by_leg(self, failed: list[tuple[int, int, int]]) -> tuple[tuple[int, list[Run]], ...]:
        zones: dict[int, list[Run]] = {}
        for leg, start, end in failed:
            span = self.geometry.zones_of(start, end)
            zones.setdefault(leg, []).append((span.start, span.stop))
        return tuple((leg, merge_runs(runs)) for leg, runs in sorted(zones.items()))

    def _zone_regions(self, zones: list[Run]) -> list[Run]:
        per_zone = self.geometry.regions_per_zone
        return [(lo * per_zone, min(hi * per_zone, self.geometry.region_count)) for lo, hi in zones]

    def _block_regions(self, blocks: list[Run]) -> list[Run]:
        """The regions that these runs of blocks lie in."""
        return merge_runs([self.geometry.regions_of(*self.geometry.block_extent(*run)) for run in blocks])
