"""The member engine: everything a data plane decides, without I/O, clock or threads.

Two sides meet here, and its owner calls both under one lock:
- the data path: `admit_read`, `admit_write`, `finish_read`, `finish_write`, `begin_flush`, `finish_flush`. An admit that
  returns None means: wait until something changed, then call again (`blocked` says why);
- the protocol: `receive` (the leader's requests and replies), `tick`. What they want done lies in `take_effects()`.

The member's picture of a region is its own byte (`own`: map bits, IN_WINDOW, FRESH); `table` is what is published of it
(core/route.py) and all that a settled I/O looks at. A member that has not been given the state admits nothing.

Any fault of a leg goes the same way: the request keeps its range, the fault is told to the leader, and only when the
consequence is durable and known everywhere (the reply) is the request settled: success where a leg that is ok then
took it, else the error. So no member ever decides alone that a leg is out, and reads never fall back on their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shadowvol.core.activity import IDLE_S, Activity
from shadowvol.core.geometry import Geometry, Run, merge_runs, overlaps, runs_of
from shadowvol.core.inflight import READ, WRITE, InFlight, Ticket
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, S_OK, SOURCE, T_OK, TARGET, Phase
from shadowvol.core.messages import (
    Answer,
    Ask,
    ClearUndo,
    Close,
    Drop,
    Fault,
    Flush,
    Freeze,
    HoldBlocks,
    LegLost,
    LogZones,
    Open,
    Prepare,
    Reply,
    Request,
    SetState,
    Thaw,
    Touched,
    UnlogZones,
)
from shadowvol.core.route import (
    FRESH,
    IN_WINDOW,
    MIXED,
    READ_TARGET,
    SLOW,
    WHOLE_SLOW,
    WRITE_SHIFT,
    equal_runs,
    published_table,
    route,
)
from shadowvol.core.rules import NONE_OMITTED

HOLD_LIMIT_S = 0.25  # a member lets a window's held writes go by itself after this long (DESIGN 7)
READ_TRIES = 3  # a read that keeps failing on the leg it is sent to ends with the error
APPLICATION = 0  # token of a flush that the application asked for; DoFlush has tokens of its own
LEG_LOST = -1
WINDOW_TOMBSTONES = 64  # a request for a window this far behind the newest ended one is a late duplicate


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

    __slots__ = ("capture", "error", "failed", "legs", "settled", "token", "zones")

    def __init__(self, legs: int, capture: int, token: int) -> None:
        self.legs = legs
        self.capture = capture
        self.token = token
        self.zones: dict[int, list[Run]] = {}
        self.failed: dict[int, str] = {}
        self.settled = False
        self.error: str | None = None


class MemberWindow:
    """An open window as a member sees it."""

    __slots__ = ("broken", "failed", "from_leg", "held", "held_since_s", "hi", "lo", "runs", "to_leg", "touched")

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


class MemberEngine:
    """See the module's header. `incarnation` is unique for each start of a member."""

    def __init__(
        self,
        geometry: Geometry,
        incarnation: int,
        *,
        align_bytes: int = 512,
        idle_s: float = IDLE_S,
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
        self._published = published_table(self.phase, self.preferred)
        self.inflight = InFlight(align_bytes)
        self.activity = Activity(omit, idle_s)
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
        self._flushes_ending: list[FlushTicket] = []
        self._owed: dict[int, str] = {}  # flush errors of last ok legs that no application flush has been told yet
        self._prepare_tokens: dict[int, Request] = {}
        self._token = 0
        self._idle_flush = 0

    # ------------------------------------------------------------------ data path: reads

    def admit_read(self, start: int, end: int) -> Ticket | None:
        lo, hi = self.geometry.regions_of(start, end)
        if not self.joined:
            self.blocked = "joining"
            return None
        freeze = self._freeze
        if freeze is not None and freeze.reads and (freeze.runs is None or overlaps(freeze.runs, lo, hi)):
            self.blocked = "hold"
            return None
        byte = route(self.table, lo, hi)
        if byte != MIXED:
            runs = [(start, end, (byte & READ_TARGET) + 1)]
        else:
            runs = [
                (first, last, (each & READ_TARGET) + 1) for first, last, each in self._split(start, end, lo, hi)
            ]
        return self.inflight.admit(READ, start, end, runs)

    def finish_read(self, ticket: Ticket, failed: list[tuple[int, int, int]], error: str = "") -> None:
        """`failed`: (leg, start, end) of the runs that could not be read. Settles the ticket, or will at the reply."""
        if not failed:
            self._settle(ticket, None)
            return
        ticket.failed = failed
        ticket.tries += 1
        legs = self._zones_by_leg(failed)
        mirrored = any(
            self.own[region] & BOTH_OK == BOTH_OK
            for _, start, end in failed
            for region in range(*self.geometry.regions_of(start, end))
        )
        if mirrored and ticket.tries < READ_TRIES:
            self._tell_fault(legs, "read", error, lambda: self._retry_read(ticket))
        else:
            self._tell_fault(legs, "read", error, lambda: None)
            self._settle(ticket, error or "read error")

    def _retry_read(self, ticket: Ticket) -> None:
        ticket.retry = True
        self._settle(ticket, None)

    # ------------------------------------------------------------------ data path: writes

    def admit_write(self, start: int, end: int) -> Ticket | None:
        """Writes, trims and zeroes. Runs carry the legs to write."""
        geometry = self.geometry
        lo, hi = geometry.regions_of(start, end)
        if not self.joined:
            self.blocked = "joining"
            return None
        freeze = self._freeze
        if freeze is not None and freeze.writes and (freeze.runs is None or overlaps(freeze.runs, lo, hi)):
            self.blocked = "hold"
            return None
        first, last = self.inflight.rounded(start, end)
        if self.inflight.write_conflicts(first, last):
            self.blocked = "overlap"
            return None
        byte = route(self.table, lo, hi)
        zones = geometry.zones_of(start, end)
        adopt: Run | None = None
        if byte != MIXED and not byte & (SLOW | WHOLE_SLOW):
            legs = byte >> WRITE_SHIFT & BOTH_OK
            if legs == BOTH_OK and self.activity.missing(zones):
                self._want_log()
                return None
            runs = [(start, end, legs)]
        else:
            slow = self._admit_slow(start, end, lo, hi)
            if slow is None:
                return None
            runs, legs, adopt = slow
        ticket = self.inflight.admit(WRITE, first, last, runs)
        ticket.adopt = adopt
        self.activity.begin(zones, legs)
        if self.windows:
            self._touch(start, end)
        return ticket

    def _admit_slow(
        self, start: int, end: int, lo: int, hi: int
    ) -> tuple[list[tuple[int, int, int]], int, Run | None] | None:
        """Mixed regions, windows, whole-region overwrites, undo zones: (runs, union of legs, regions to adopt)."""
        if self._held(start, end):
            self.blocked = "hold"
            return None
        pieces = self._split(start, end, lo, hi)
        if self.phase is Phase.COMMITTED and any(byte & SLOW for _, _, byte in pieces):
            if "undo-zone-clear" not in self.omit:
                self._want_undo_clear(start, end)
                self.blocked = "undo"
                return None
        adopt = self._adoptable(start, end, pieces)
        runs: list[tuple[int, int, int]] = []
        union = 0
        for first, last, byte in pieces:
            legs = byte >> WRITE_SHIFT & BOTH_OK
            if adopt is not None and byte & WHOLE_SLOW:
                inner = self._adopted_part(first, last, adopt)
                for piece_start, piece_end, inside in inner:
                    runs.append((piece_start, piece_end, BOTH_OK if inside else legs))
                    union |= BOTH_OK if inside else legs
                continue
            runs.append((first, last, legs))
            union |= legs
        mirrored = [zone for first, last, legs in runs if legs == BOTH_OK for zone in self.geometry.zones_of(first, last)]
        if mirrored and self.activity.missing(range(min(mirrored), max(mirrored) + 1)):
            self._want_log()
            return None
        return runs, union, adopt

    def _adoptable(self, start: int, end: int, pieces: list[tuple[int, int, int]]) -> Run | None:
        if not self.fresh_allowed or not any(byte & WHOLE_SLOW for _, _, byte in pieces):
            return None
        lo, hi = self.geometry.whole_regions(start, end)
        return (lo, hi) if hi > lo else None

    def _adopted_part(self, start: int, end: int, adopt: Run) -> list[tuple[int, int, bool]]:
        """[start, end) cut at the borders of the regions to adopt."""
        inner_start, inner_end = self.geometry.region_extent(*adopt)
        cuts = [
            (start, min(end, inner_start), False),
            (max(start, inner_start), min(end, inner_end), True),
            (max(start, inner_end), end, False),
        ]
        return [cut for cut in cuts if cut[1] > cut[0]]

    def finish_write(self, ticket: Ticket, start: int, end: int, failed: list[tuple[int, int, int]], error: str = "") -> None:
        """The I/O has ended. `failed`: (leg, start, end) of runs that the leg did not take. Settles now or at the reply."""
        union = 0
        for _, _, legs in ticket.runs:
            union |= legs
        self.activity.end(self.geometry.zones_of(start, end), union)
        if self.windows and "touch-on-completion" not in self.omit:
            self._touch(start, end)
        if not failed:
            if ticket.adopt is not None and self.phase is Phase.COPYING and self.fresh_allowed:
                self._mark_fresh([ticket.adopt])
            self._settle(ticket, None)
            return
        ticket.failed = failed
        if "fresh-dropped" not in self.omit:
            self._unmark_fresh([self.geometry.regions_of(first, last) for _, first, last in failed])
        if "failed-write-ends-window" not in self.omit:
            for _, first, last in failed:
                self._fail_windows(first, last)
        self.inflight.stopped(ticket)
        if "fault-before-ack" in self.omit:
            self._tell_fault(self._zones_by_leg(failed), "write", error, lambda: None)
            self._settle_write(ticket, error)
            return
        self._tell_fault(self._zones_by_leg(failed), "write", error, lambda: self._settle_write(ticket, error))

    def _settle_write(self, ticket: Ticket, error: str) -> None:
        """Success exactly where every leg that is ok now took the write.

        A leg that became ok since (a window ended) cannot have lost it: OPEN is refused while the fault is not
        settled, and a window in which a write failed is refused every further step."""
        lost = any(
            self.own[region] & (1 << leg)
            for leg, start, end in ticket.failed
            for region in range(*self.geometry.regions_of(start, end))
        )
        if "fault-before-ack" in self.omit:
            lost = len({leg for leg, _, _ in ticket.failed}) == 2
        self._settle(ticket, (error or "write error") if lost else None)

    def _settle(self, ticket: Ticket, error: str | None) -> None:
        ticket.error = error
        ticket.settled = True
        self.inflight.remove(ticket)

    # ------------------------------------------------------------------ data path: flush

    def begin_flush(self, token: int = APPLICATION) -> FlushTicket | None:
        """A flush of every leg written since its last good one. None: not joined yet, wait."""
        if not self.joined:
            self.blocked = "joining"
            return None
        legs = self.activity.legs_to_flush() & self.open_legs()
        ticket = FlushTicket(legs, self.activity.capture(), token)
        if "flush-set-when-failed" in self.omit:
            for leg in (SOURCE, TARGET):
                ticket.zones[leg] = []
        return ticket

    def finish_flush(self, ticket: FlushTicket, failed: dict[int, str]) -> None:
        """`failed`: error text per leg. Settles the ticket, or will at the reply.

        The kernel tells an open file of a failed write-back once, so of several flushes only one sees the error:
        those that overlap it fail with it, and the error of a flush of our own is owed to the application's next."""
        for leg in (SOURCE, TARGET):
            if ticket.legs & (1 << leg) and self._flush_failed_at[leg] > ticket.capture and leg not in failed:
                failed[leg] = "a flush at the same time failed"
        for leg in failed:
            self._flush_failed_at[leg] = self.activity.capture()
        ticket.failed = failed
        for leg in (SOURCE, TARGET):
            if ticket.legs & (1 << leg) and leg not in failed:
                self.activity.flushed(leg, ticket.capture)
        request = self._flush_tokens.pop(ticket.token, None)
        if self._idle_flush == ticket.token:
            self._idle_flush = 0
        if failed:
            zones = {leg: self.activity.dirty_zones(leg, self.geometry.zone_count) for leg in failed}
            ticket.zones = ticket.zones or zones
            if "fresh-dropped" not in self.omit:
                for runs in zones.values():
                    self._unmark_fresh(self._zone_regions(runs))
            self.activity.unsettled_flush_failures += 1
            faults = () if "flush-failure-clears" in self.omit else tuple(sorted(ticket.zones.items()))
            text = "; ".join(failed.values())
            self._tell_fault(faults, "flush", text, lambda: self._settle_flush(ticket))
        else:
            self._end_flush(ticket)
        if request is not None:
            self._answer(request, {"failed": sorted(failed)})

    def _settle_flush(self, ticket: FlushTicket) -> None:
        self.activity.unsettled_flush_failures -= 1
        for leg, zones in ticket.zones.items():
            regions = self._zone_regions(zones)
            still_ok = any(self.own[region] & (1 << leg) for lo, hi in regions for region in range(lo, hi))
            if leg in ticket.failed:
                self.activity.settle_dirty(leg, zones, still_ok)
                if still_ok and "flush-failure-clears" not in self.omit:
                    self._owed[leg] = ticket.failed[leg]
                    self._flush_failed_at[leg] = self.activity.capture()
        self._end_flush(ticket)

    def _end_flush(self, ticket: FlushTicket) -> None:
        """The application is told what is owed to it; while a failure is not settled, no flush is answered."""
        self._flushes_ending.append(ticket)
        if self.activity.unsettled_flush_failures:
            return
        ending, self._flushes_ending = self._flushes_ending, []
        told = False
        for each in ending:
            if each.token == APPLICATION and self._owed:
                each.error = "; ".join(self._owed.values())
                told = True
            each.settled = True
        if told:
            self._owed.clear()

    def leg_lost_writes(self, leg: int, error: str) -> None:
        """The leg's server was restarted or reconnected: what was not flushed may be gone (as a failed flush)."""
        ticket = FlushTicket(1 << leg, self.activity.capture(), LEG_LOST)
        self.finish_flush(ticket, {leg: error})

    def open_legs(self) -> int:
        """Legs that may have to be written or flushed in this phase, as bits.

        After commit --keep-undo the source is still flushed of what was written before the commit."""
        if self.phase is Phase.SETUP:
            return S_OK
        return T_OK if self.phase is Phase.COMMITTED and not self._undo_kept else BOTH_OK

    # ------------------------------------------------------------------ protocol: in

    def receive(self, message: Request | Reply, now_s: float) -> None:
        """A request or reply of the leader."""
        self.now_s = now_s
        self.activity.now_s = now_s
        if message.incarnation != self.incarnation:
            return
        if isinstance(message, Reply):
            self._replied(message.number)
            return
        if message.epoch < self.epoch:
            return
        if message.epoch > self.epoch:
            self._new_epoch(message.epoch)
        last = self._answers.get(message.subject)
        if last is not None and last.seq == message.seq:
            self._effects.append(Send(last))
            if isinstance(message.body, Open) and "open-repeat-keeps" in self.omit:
                self._forget_touched(message.body.window)
            return
        if message.seq <= self._begun.get(message.subject, 0) or self._is_late(message.body):
            return
        self._begun[message.subject] = message.seq
        self._obey(message)

    def tick(self, now_s: float) -> None:
        """Call a few times a second and at each hold limit."""
        self.now_s = now_s
        self.activity.now_s = now_s
        for window in self.windows.values():
            if window.held_since_s is not None and now_s - window.held_since_s > HOLD_LIMIT_S:
                self._release_hold(window, broken=True)
        if not self.joined:
            return
        if self.activity.needs_flush(now_s) and not self._idle_flush:
            self._token += 1
            self._idle_flush = self._token
            self._effects.append(DoFlush(self._token))
        zones = self.activity.take_cleanable(now_s)
        if zones:
            self._ask(UnlogZones(runs_of(zones)), self.activity.left)

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

    def prepared(self, token: int, reason: str | None) -> None:
        """DoPrepare has been performed."""
        request = self._prepare_tokens.pop(token, None)
        if request is not None:
            self._answer(request, {} if reason is None else {"no": reason})

    def _new_epoch(self, epoch: int) -> None:
        """A new leader: its requests start afresh; block holds of the old one end. A freeze stays until it thaws it."""
        self.epoch = epoch
        self._answers.clear()
        self._begun.clear()
        self._flush_tokens.clear()
        self._prepare_tokens.clear()
        self._window_floor = self._newest_dropped = 0
        self.inflight.forget_drains()
        for window in self.windows.values():
            self._release_hold(window, broken=True)

    def _is_late(self, body: object) -> bool:
        """A duplicate for a window that has ended."""
        window = getattr(body, "window", None)
        return window is not None and window <= self._window_floor and window not in self.windows

    def _obey(self, request: Request) -> None:
        body = request.body
        if isinstance(body, Freeze):
            self._obey_freeze(request, body)
        elif isinstance(body, SetState):
            self._set_state(body)
            self._answer(request, {})
        elif isinstance(body, Thaw):
            self._freeze = None
            self._answer(request, {})
        elif isinstance(body, LegLost):
            self.leg_lost_writes(body.leg, body.error)
            self._answer(request, {})
        elif isinstance(body, Prepare):
            self._token += 1
            self._prepare_tokens[self._token] = request
            self._effects.append(DoPrepare(self._token, body.verb, body.legs))
        elif isinstance(body, Open):
            self._obey_open(request, body)
        elif isinstance(body, Drop):
            self._close_window(body.window)
            self._answer(request, {})
        elif body.window not in self.windows:
            self._answer(request, {"no": "window is not open here"})
        elif self.windows[body.window].failed:
            self._answer(request, {"no": "a write failed in the window"})
        elif isinstance(body, Flush):
            self._token += 1
            self._flush_tokens[self._token] = request
            self._effects.append(DoFlush(self._token))
        elif isinstance(body, Touched):
            self._obey_touched(request, self.windows[body.window])
        elif isinstance(body, Close):
            self._answer(request, {"blocks": runs_of(self.windows[body.window].touched)})
        elif isinstance(body, HoldBlocks):
            self._obey_hold(request, self.windows[body.window], body.blocks)
        else:
            window = self.windows[body.window]
            unbroken = not window.broken or "hold-limit-tells" in self.omit
            self._release_hold(window, broken=False)
            self._answer(request, {"unbroken": unbroken})

    # ------------------------------------------------------------------ protocol: exclusive changes

    def _obey_freeze(self, request: Request, body: Freeze) -> None:
        hold = "switch-holds" not in self.omit or body.runs is not None
        if body.runs is not None and "done-holds" in self.omit and body.writes:
            hold = False
        if hold and not (body.reads and "clear-holds-reads" in self.omit):
            self._freeze = body
        extents = None if body.runs is None else [self.geometry.region_extent(*run) for run in body.runs]

        def drained() -> None:
            faults = [[leg, runs] for legs in self._open_faults.values() for leg, runs in legs]
            self._answer(request, {"faults": faults})

        self.inflight.drain(extents, reads=body.reads and hold, writes=body.writes and hold, done=drained)

    def _set_state(self, body: SetState) -> None:
        if body.phase is not None:
            self.phase = Phase(body.phase)
        if body.preferred is not None:
            self.preferred = body.preferred
        if body.fresh_allowed is not None:
            self.fresh_allowed = body.fresh_allowed
        if body.bits is not None:
            self.own[:] = body.bits
            self.windows.clear()
            self.joined = True
        for leg, ok, runs in body.changes:
            self._change_bits(leg, ok, runs)
        for _, _, runs in body.changes:
            self._publish(runs)
            if any(self.own.count(mark, *run) for run in runs for mark in (0, IN_WINDOW, FRESH, IN_WINDOW | FRESH)):
                raise AssertionError("a region was left without an ok leg")
        for window in body.close:
            self._close_window(window)
        if body.phase is not None or body.preferred is not None or body.bits is not None:
            self._published = published_table(self.phase, self.preferred)
            self._publish([(0, len(self.own))])
            self._undo_kept = self.phase is Phase.COMMITTED and self.own.count(BOTH_OK) > 0
            self._let_go_of_closed_legs()

    def _change_bits(self, leg: int, ok: bool, runs: list[Run]) -> None:
        on = bytes(value | (1 << leg) for value in range(256))
        off = bytes(value & ~(1 << leg) for value in range(256))
        for lo, hi in runs:
            self.own[lo:hi] = self.own[lo:hi].translate(on if ok else off)

    def _let_go_of_closed_legs(self) -> None:
        for leg in (SOURCE, TARGET):
            if not self.open_legs() & (1 << leg):
                self.activity.settle_dirty(leg, [(0, self.geometry.zone_count)], False)
        if self.phase is not Phase.COPYING:
            self._unmark_fresh([(0, len(self.own))])

    def _publish(self, runs: list[Run]) -> None:
        for lo, hi in runs:
            self.table[lo:hi] = self.own[lo:hi].translate(self._published)

    def _mark(self, runs: list[Run], mark: int, on: bool) -> None:
        table = bytes((value | mark) if on else (value & ~mark) for value in range(256))
        for lo, hi in runs:
            self.own[lo:hi] = self.own[lo:hi].translate(table)
        self._publish(runs)

    def _mark_fresh(self, runs: list[Run]) -> None:
        self._mark(runs, FRESH, True)

    def _unmark_fresh(self, runs: list[Run]) -> None:
        self._mark(runs, FRESH, False)

    # ------------------------------------------------------------------ protocol: windows

    def _fail_windows(self, start: int, end: int) -> None:
        lo, hi = self.geometry.regions_of(start, end)
        for window in self.windows.values():
            window.failed |= overlaps(window.runs, lo, hi)

    def _obey_open(self, request: Request, body: Open) -> None:
        extents = [self.geometry.region_extent(*run) for run in body.runs]
        unsettled = any(
            ticket.failed and overlaps(extents, ticket.start, ticket.end) for ticket in self.inflight.writes.values()
        )
        if unsettled and "unsettled-fault-refuses-open" not in self.omit:
            self._answer(request, {"no": "a failed write there is not settled yet"})
            return
        self.windows[body.window] = MemberWindow(body.runs, body.from_leg, body.to_leg)
        self._mark(body.runs, IN_WINDOW, True)
        fresh: list[Run] = []
        for lo, hi in body.runs:
            fresh += [run for run in self._runs_marked(FRESH, lo, hi)]

        def drained() -> None:
            self._answer(request, {"fresh": fresh})

        if "open-drains" in self.omit:
            drained()
        else:
            self.inflight.drain(extents, reads=False, writes=True, done=drained)

    def _runs_marked(self, mark: int, lo: int, hi: int) -> list[Run]:
        if not any(self.own.count(value, lo, hi) for value in range(16) if value & mark):
            return []
        return runs_of([region for region in range(lo, hi) if self.own[region] & mark])

    def _obey_touched(self, request: Request, window: MemberWindow) -> None:
        answer = runs_of(window.touched)
        self._answer(request, {"blocks": answer})
        keep: set[int] = set()
        if "touched-keeps-inflight" not in self.omit:
            for ticket in self.inflight.writes.values():
                keep.update(self.geometry.blocks_of(ticket.start, ticket.end))
        window.touched &= keep

    def _obey_hold(self, request: Request, window: MemberWindow, blocks: list[Run]) -> None:
        window.held = blocks
        window.held_since_s = self.now_s
        window.broken = False
        extents = [self.geometry.block_extent(*run) for run in blocks]
        if "hold-drains" in self.omit:
            self._answer(request, {})
        else:
            self.inflight.drain(extents, reads=False, writes=True, done=lambda: self._answer(request, {}))

    def _release_hold(self, window: MemberWindow, *, broken: bool) -> None:
        window.held = []
        window.held_since_s = None
        window.broken = broken

    def _close_window(self, number: int) -> None:
        """The window has ended here: with its bits (they were set before) or without."""
        window = self.windows.pop(number, None)
        if window is not None:
            self._mark(window.runs, IN_WINDOW, False)
            if "fresh-dropped" not in self.omit:
                self._unmark_fresh(window.runs)
        self._newest_dropped = max(self._newest_dropped, number)
        self._window_floor = max(self._window_floor, self._newest_dropped - WINDOW_TOMBSTONES)
        for subject in [f"w{number - WINDOW_TOMBSTONES}"]:
            self._answers.pop(subject, None)
            self._begun.pop(subject, None)

    def _forget_touched(self, number: int) -> None:
        if number in self.windows:
            self.windows[number].touched.clear()

    def _touch(self, start: int, end: int) -> None:
        lo, hi = self.geometry.regions_of(start, end)
        for window in self.windows.values():
            if lo < window.hi and window.lo < hi:
                window.touched.update(self.geometry.blocks_of(start, end))

    def _held(self, start: int, end: int) -> bool:
        blocks = self.geometry.blocks_of(start, end)
        return any(
            overlaps(window.held, blocks.start, blocks.stop) for window in self.windows.values() if window.held
        )

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
        self.blocked = "log"
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
        if request.epoch != self.epoch:
            return
        answer = Answer(request.epoch, self.incarnation, request.seq, body)
        self._answers[request.subject] = answer
        self._effects.append(Send(answer))

    # ------------------------------------------------------------------ ranges

    def _split(self, start: int, end: int, lo: int, hi: int) -> list[tuple[int, int, int]]:
        """(start, end, published byte) pieces of [start, end), cut where regions disagree."""
        size = self.geometry.region_bytes
        return [
            (max(start, first * size), min(end, last * size), byte) for first, last, byte in equal_runs(self.table, lo, hi)
        ]

    def _zones_by_leg(self, failed: list[tuple[int, int, int]]) -> tuple[tuple[int, list[Run]], ...]:
        zones: dict[int, list[Run]] = {}
        for leg, start, end in failed:
            span = self.geometry.zones_of(start, end)
            zones.setdefault(leg, []).append((span.start, span.stop))
        return tuple((leg, merge_runs(runs)) for leg, runs in sorted(zones.items()))

    def _zone_regions(self, zones: list[Run]) -> list[Run]:
        per_zone = self.geometry.regions_per_zone
        return [(lo * per_zone, min(hi * per_zone, self.geometry.region_count)) for lo, hi in zones]


