"""A member's flushes: every leg written since its last good one, and what the failure of one means.

A failed flush is a fault of every zone written since the leg's last good one; it is told to the leader, and the flush
ends when the consequence is known everywhere. The kernel tells an open file of a failed write-back once, so the error
must find its way to the application whoever's flush met it: flushes that overlap are concluded together and fail
together, and the error of a last ok leg is owed (`_owed`) until a flush of the application has carried it. It is told
after the writes that were in flight: their bytes may be among the lost, and a write that is answered later would seem
to be covered by a later flush.
"""

from functools import partial

from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET
from shadowvol.core.member_state import APPLICATION, FlushTicket, MemberState
from shadowvol.core.messages import Flush

LEG_LOST = -1  # token of a flush that nobody asked for: the leg's server forgot what it had


class MemberFlush(MemberState):
    """Part of MemberEngine: begin_flush, finish_flush, leg_lost_writes."""

    def begin_flush(self, token: int = APPLICATION) -> FlushTicket | None:
        """A flush of every leg written since its last good one. None: not joined yet, wait."""
        if not self.joined:
            self.blocked = "joining"
            return None
        legs = self.activity.legs_to_flush() & self.open_legs()
        if "flush-both-legs" in self.omit:
            legs &= self._window_legs(token)
        ticket = FlushTicket(legs, self.activity.capture(), token)
        if "flush-set-when-failed" in self.omit:
            for leg in (SOURCE, TARGET):
                ticket.zones[leg] = []
        self._flushing.add(ticket)
        return ticket

    def finish_flush(self, ticket: FlushTicket, failed: dict[int, str]) -> None:
        """`failed`: error text per leg. Settles the ticket, or will: after the flushes now in flight, and the reply."""
        self._flushing.discard(ticket)
        for leg in failed:
            self._flush_failed_at[leg] = self.activity.capture()
        ticket.failed = failed
        together = "flushes-end-together" not in self.omit
        self._finished.append((ticket, set(self._flushing) if together else set()))
        waiting, self._finished = self._finished, []
        for each, in_flight in waiting:
            in_flight.discard(ticket)
            if in_flight:
                self._finished.append((each, in_flight))
            else:
                self._conclude(each)

    def _conclude(self, ticket: FlushTicket) -> None:
        """The flush and all that overlapped its end have ended: what has it done?"""
        failed = ticket.failed
        for leg in (SOURCE, TARGET):
            overtaken = self._flush_failed_at[leg] > ticket.capture and "flush-error-owed" not in self.omit
            if ticket.legs & (1 << leg) and overtaken and leg not in failed:
                failed[leg] = "a flush at the same time failed"
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
            ticket.concluded = self.activity.capture()
            self.activity.unsettled_flush_failures += 1
            faults = () if "flush-failure-clears" in self.omit else tuple(sorted(ticket.zones.items()))
            text = "; ".join(failed.values())
            if "flush-error-after-writes" in self.omit:
                self._tell_fault(faults, "flush", text, lambda: self._settle_flush(ticket))
            else:
                settle = partial(self._settle_flush, ticket)
                self._tell_fault(faults, "flush", text, partial(self.inflight.when_settled, settle))
        else:
            self._end_flush(ticket)
        if request is not None:
            unsettled = self.activity.unsettled_flush_failures and "doubt-flips" not in self.omit
            self._answer(request, {"failed": [SOURCE, TARGET] if unsettled else sorted(failed)})

    def _settle_flush(self, ticket: FlushTicket) -> None:
        self.activity.unsettled_flush_failures -= 1
        for leg, zones in ticket.zones.items():
            regions = self._zone_regions(zones)
            still_ok = any(self.own[region] & (1 << leg) for lo, hi in regions for region in range(lo, hi))
            if leg in ticket.failed:
                if not still_ok:
                    late = "settle-keeps-later" in self.omit
                    self.activity.forget_dirty(leg, zones, self.activity.capture() if late else ticket.concluded)
                if still_ok and "flush-error-owed" in self.omit:
                    ticket.error = ticket.failed[leg]  # whose flush it was hears of it, nobody else
                elif still_ok and "flush-failure-clears" not in self.omit:
                    self._owed[leg] = ticket.failed[leg]
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

    def _window_legs(self, token: int) -> int:
        """The leg that the flush's window copies to, as a bit; all where it is for no window."""
        request = self._flush_tokens.get(token)
        window = self.windows.get(request.body.window) if request and isinstance(request.body, Flush) else None
        return BOTH_OK if window is None else 1 << window.to_leg

    def owes_error(self) -> bool:
        """A flush error has not been told to the application yet. It is lost if the member dies now."""
        return bool(self._owed)

    def leg_lost_writes(self, leg: int, error: str) -> None:
        """The leg's server was restarted or reconnected: what was not flushed may be gone (as a failed flush)."""
        ticket = FlushTicket(1 << leg, self.activity.capture(), LEG_LOST)
        self.finish_flush(ticket, {leg: error})
