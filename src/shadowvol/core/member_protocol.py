"""A member obeying its leader: requests in, answers out (core/messages.py); also `tick`.

Requests of an older epoch or another incarnation are ignored; within a subject each seq is executed once, its answer
repeated when the request is, and anything older ignored.
"""

from shadowvol.core.geometry import Run, overlaps, runs_of
from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET, Phase
from shadowvol.core.member_flush import MemberFlush
from shadowvol.core.member_state import DoFlush, DoPrepare, MemberWindow, Send
from shadowvol.core.messages import (
    Close,
    Drop,
    Flush,
    Freeze,
    HoldBlocks,
    LegLost,
    Open,
    Prepare,
    Reply,
    Request,
    SetState,
    Thaw,
    Touched,
    UnlogZones,
)
from shadowvol.core.route import FRESH, HELD, IN_WINDOW, SETTLED, published_table

HOLD_LIMIT_S = 0.25  # a member lets a window's held writes go by itself after this long (DESIGN 7)
WINDOW_TOMBSTONES = 64  # a request for a window this far behind the newest ended one is a late duplicate


class MemberProtocol(MemberFlush):
    """Part of MemberEngine: receive, tick, prepared."""

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
            self._obey_set_state(request, body)
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
            if "drop-ends-fresh" not in self.omit:
                self._unmark_fresh(body.runs)
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
            self._obey_close(request, self.windows[body.window])
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

    def _obey_set_state(self, request: Request, body: SetState) -> None:
        """Answered when no read that was admitted before goes on where reads have moved: writes will be let go then,
        and it could return a write that the new leg does not have yet."""
        everywhere: list[Run] = [(0, len(self.own))]
        runs = [run for _, _, runs in body.changes for run in runs] if body.preferred is None else everywhere
        before = [self.table[lo:hi] for lo, hi in runs]
        self._set_state(body)
        moved = [run for run, old in zip(runs, before, strict=True) if self._reads_moved(run, old)]
        if moved and "switch-drains-reads" not in self.omit:
            extents = [self.geometry.region_extent(*run) for run in moved]
            self.inflight.drain(extents, reads=True, writes=False, done=lambda: self._answer(request, {}))
        else:
            self._answer(request, {})

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
            if any(not own & BOTH_OK for lo, hi in runs for own in set(self.own[lo:hi])):
                raise AssertionError("a region was left without an ok leg")
        for window in body.close:
            self._close_window(window)
        if body.phase is not None or body.preferred is not None or body.bits is not None:
            self._published = published_table(self.phase, self.preferred)
            self._publish([(0, len(self.own))])
            self._undo_kept = self.phase is Phase.COMMITTED and self.own.count(BOTH_OK) > 0
            self._let_go_of_closed_legs()

    def _let_go_of_closed_legs(self) -> None:
        for leg in (SOURCE, TARGET):
            if not self.open_legs() & (1 << leg):
                self.activity.forget_dirty(leg, [(0, self.geometry.zone_count)], self.activity.capture())
        if self.phase is not Phase.COPYING:
            self._unmark_fresh([(0, len(self.own))])

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
        self._mark(body.runs, IN_WINDOW if "settled-when-closed" not in self.omit else IN_WINDOW | SETTLED, True)
        fresh: list[Run] = []
        for lo, hi in body.runs:
            fresh += [run for run in self._runs_marked(FRESH, lo, hi)]
        zones = {zone for extent in extents for zone in self.geometry.zones_of(*extent)}
        if self.activity.expect(zones):
            self._want_log()

        def drained() -> None:
            self._answer(request, {"fresh": fresh})

        if "open-drains" in self.omit:
            drained()
        else:
            self.inflight.drain(extents, reads=False, writes=True, done=drained)

    def _obey_touched(self, request: Request, window: MemberWindow) -> None:
        if window.closed:
            self._answer(request, {"no": "the window is closed, its writes are not noted any more"})
            return
        answer = runs_of(window.touched)
        self._answer(request, {"blocks": answer})
        keep: set[int] = set()
        if "touched-keeps-inflight" not in self.omit:
            self.inflight.gather_writes([self.geometry.region_extent(*run) for run in window.runs])
            for ticket in self.inflight.writes.values():
                keep.update(self.geometry.blocks_of(ticket.start, ticket.end))
        window.touched &= keep

    def _obey_close(self, request: Request, window: MemberWindow) -> None:
        """From here on no block is noted, and only those that are held need the engine: what is copied yet is copied
        under a hold, so a block that is written now and is not in the answer stays as it is written."""
        window.closed = True
        self._answer(request, {"blocks": runs_of(window.touched)})
        self._mark(window.runs, SETTLED, True)

    def _obey_hold(self, request: Request, window: MemberWindow, blocks: list[Run]) -> None:
        if "hold-slows" not in self.omit:
            self._mark(self._block_regions(blocks), HELD, True)
        window.held = blocks
        window.held_since_s = self.now_s
        window.broken = False
        extents = [self.geometry.block_extent(*run) for run in blocks]
        if "hold-drains" in self.omit:
            self._answer(request, {})
        else:
            self.inflight.drain(extents, reads=False, writes=True, done=lambda: self._answer(request, {}))

    def _release_hold(self, window: MemberWindow, *, broken: bool) -> None:
        self._mark(self._block_regions(window.held), HELD, False)
        window.held = []
        window.held_since_s = None
        window.broken = broken

    def _close_window(self, number: int) -> None:
        """The window has ended here: with its bits (they were set before) or without."""
        window = self.windows.pop(number, None)
        if window is not None:
            self._mark(window.runs, IN_WINDOW | SETTLED | HELD, False)
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
