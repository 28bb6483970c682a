"""The member engine: everything a data plane decides, without I/O, clock or threads.

Two sides meet here, and its owner calls both under one lock:
- the data path: `admit_read`, `admit_write`, `finish_read`, `finish_write`, `begin_flush`, `finish_flush`. An admit
  that returns None means: wait until something changed, then call again (`blocked` says why);
- the protocol: `receive` (the leader's requests and replies), `tick`. What they want done lies in `take_effects()`.

The member's picture of a region is its own byte (`own`: map bits, IN_WINDOW, FRESH); `table` is what is published of it
(core/route.py) and all that a settled I/O looks at. A member that has not been given the state admits nothing.

Any fault of a leg goes the same way: the request keeps its range, the fault is told to the leader, and only when the
consequence is durable and known everywhere (the reply) is the request settled: success where a leg that is ok then
took it, else the error. So no member ever decides alone that a leg is out, and reads never fall back on their own.

The parts: this file is the data path; core/member_state.py lists the others.
"""

from shadowvol.core.geometry import Run, overlaps
from shadowvol.core.inflight import READ, WRITE, Ticket
from shadowvol.core.legs import BOTH_OK, Phase
from shadowvol.core.member_flush import LEG_LOST
from shadowvol.core.member_protocol import HOLD_LIMIT_S, MemberProtocol
from shadowvol.core.member_state import (
    APPLICATION,
    DoFlush,
    DoPrepare,
    Effect,
    FlushTicket,
    MemberSnapshot,
    MemberWindow,
    Send,
)
from shadowvol.core.route import MIXED, NOTE, READ_TARGET, SLOW, WHOLE_SLOW, WRITE_SHIFT, route

READ_TRIES = 3  # a read that keeps failing on the leg it is sent to ends with the error

__all__ = [
    "APPLICATION",
    "HOLD_LIMIT_S",
    "LEG_LOST",
    "DoFlush",
    "DoPrepare",
    "Effect",
    "FlushTicket",
    "MemberEngine",
    "MemberSnapshot",
    "MemberWindow",
    "Send",
]


class MemberEngine(MemberProtocol):
    """See the module's header."""

    # ------------------------------------------------------------------ data path: another executor

    def adopt(self, kind: int, start: int, end: int, legs: int) -> Ticket:
        """A ticket for I/O that another executor has begun by the published table (nbd/gate.py): one run, in flight.

        It ends as every ticket does, by finish_read or finish_write."""
        runs = [(start, end, legs)]
        if kind == READ:
            return self.inflight.admit(READ, start, end, runs)
        self.activity.begin(self.geometry.zones_of(start, end), legs)
        return self.inflight.admit(WRITE, *self.inflight.rounded(start, end), runs)

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
            runs = [(first, last, (each & READ_TARGET) + 1) for first, last, each in self._split(start, end, lo, hi)]
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
            self.inflight.stopped(ticket)
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
                self.blocked = "log"
                self._want_log()
                return None
            if byte & NOTE:
                self.touch(start, end)
            runs = [(start, end, legs)]
        else:
            slow = self._admit_slow(start, end, lo, hi)
            if slow is None:
                return None
            runs, legs, adopt = slow
            if self.windows:
                self.touch(start, end)
        ticket = self.inflight.admit(WRITE, first, last, runs)
        ticket.adopt = adopt
        self.activity.begin(zones, legs)
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
        spans = [self.geometry.zones_of(first, last) for first, last, legs in runs if legs == BOTH_OK]
        mirrored = [zone for span in spans for zone in span]
        if mirrored and self.activity.missing(range(min(mirrored), max(mirrored) + 1)):
            self.blocked = "log"
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

    def finish_write(
        self, ticket: Ticket, start: int, end: int, failed: list[tuple[int, int, int]], error: str = ""
    ) -> None:
        """The I/O has ended. `failed`: (leg, start, end) of what a leg did not take. Settles now or at the reply."""
        union = 0
        for _, _, legs in ticket.runs:
            union |= legs
        self.activity.end(self.geometry.zones_of(start, end), union)
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
        self.activity.unsettled_write_failures += 1
        self._tell_fault(self._zones_by_leg(failed), "write", error, lambda: self._fault_settled(ticket, error))
        if "fault-before-ack" in self.omit:
            self._settle_write(ticket, error)

    def _fault_settled(self, ticket: Ticket, error: str) -> None:
        self.activity.unsettled_write_failures -= 1
        if not ticket.settled:
            self._settle_write(ticket, error)

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
