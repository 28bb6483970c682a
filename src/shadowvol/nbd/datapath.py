"""The application's I/O through a member: admit under the lock, do it without the lock, finish under the lock.

The way of one write, the whole of it (`_write`):
1. `admit_write` under the lock gives a ticket: runs of bytes, each with the legs that it must reach. None: wait.
2. The runs are written, without the lock. On both legs: first the leg that is *not* preferred, so that a value that
   somebody has read from the preferred leg is on the other one already. A leg that fails is noted, the other goes on.
3. `finish_write` under the lock. Without a failure the ticket is settled at once; else the leader's reply settles it.
4. FUA: a flush of everything. Then the application has its answer.

Invariants
- Every admitted ticket is finished, whatever is raised in between: it owns its range, and drains wait for it.
- Nothing here decides where an I/O goes, or what a failure means: the engine does.
- The lock is never held across I/O of a leg or of the link. `perform` is called with it and only fills queues.
- An endpoint is fetched between admission (or begin_flush) and the end of that I/O, never kept: see OpenLegs.
- A request may have been begun by the executor in front of us (nbd/gate.py). Then its ticket is claimed, not admitted,
  and step 2 is left out if it has been done without a failure. Every call of the engine is followed by `perform`.

Waiting: writes blocked by an overlapping one wait for `_overlap_ended`, all others for `changed`, so that a held write
is not woken by each of its neighbours that ends. The member's clock, slow while nothing goes on, is `stirred`.
"""

import errno
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from shadowvol.core.inflight import READ, WRITE, Ticket
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, SOURCE, TARGET
from shadowvol.core.member import Effect, FlushTicket, MemberEngine
from shadowvol.endpoints.base import Endpoint
from shadowvol.nbd.counters import Counters
from shadowvol.nbd.gate import Gate
from shadowvol.nbd.openlegs import OpenLegs

Buffer = memoryview | bytearray
Operate = Callable[[Endpoint, int, int], None]  # (endpoint, start, end)

WAIT_S = 1.0  # a waiting request looks at least this often whether the member has been stopped
EXTENTS_BYTES_MAX = 1 << 30  # one answer about holes covers no more; the client asks on
_LOG_LEG_ERROR_S = 10.0  # one line per leg and this time

_ORDER = (  # [preferred][legs]: the legs of a write in the order they are written
    ((), (SOURCE,), (TARGET,), (TARGET, SOURCE)),
    ((), (SOURCE,), (TARGET,), (SOURCE, TARGET)),
)
_NO_FAILURE: list[tuple[int, int, int]] = []  # shared, never changed
_DONE: tuple[int, list[tuple[int, int, int]], str] = (0, _NO_FAILURE, "")  # first errno, failed runs, text


class DataPath:
    """Called by many threads at once. Every method raises OSError with what the application is to be told."""

    def __init__(
        self,
        engine: MemberEngine,
        gate: Gate,
        legs: OpenLegs,
        perform: Callable[[list[Effect]], None],
        log: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.gate = gate
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.waiting = 0  # requests that wait for something to change
        self.stirred = threading.Condition(self.lock)  # notified when one begins to wait
        self.counters = Counters()
        self.flushing = [0, 0]  # flushes under way, by leg
        self._legs = legs
        self._queue = perform
        self._log = log
        self._overlap_ended = threading.Condition(self.lock)
        self._overlap_waiters = 0
        self._stopped = False
        self._logged_s = [-_LOG_LEG_ERROR_S, -_LOG_LEG_ERROR_S]

    def stop(self) -> None:
        """Requests that wait end with ESHUTDOWN."""
        with self.lock:
            self._stopped = True
            self.changed.notify_all()
            self._overlap_ended.notify_all()

    def perform(self) -> None:
        """With the lock, after each call of the engine: obey what it published, then hand on its effects."""
        self.gate.publish()
        effects = self.engine.take_effects()
        if effects:
            self._queue(effects)

    # ------------------------------------------------------------------ reads

    def pread_into(self, buffer: Buffer, start: int) -> None:
        """Fill `buffer` from `start`."""
        begun_s = monotonic()
        length = len(buffer)
        if not length:
            return
        engine, counters, tries = self.engine, self.counters, 0
        with self.lock:
            begun_s = self.gate.begun_s(begun_s)
            claimed, done = self.gate.claim(READ, start, start + length)
            ticket = claimed or self._admit(engine.admit_read, start, start + length)
        while True:
            first_error, failed, text = _DONE if done else self._read_runs(ticket, buffer, start)
            with self.lock:
                ticket.tries = tries
                engine.finish_read(ticket, failed, text)
                self.perform()
                if not ticket.settled:
                    self._wait_settled(ticket)
                if not ticket.retry:
                    counters.read_ended(length, monotonic() - begun_s)
                    break
                tries, done = ticket.tries, False
                ticket = self._admit(engine.admit_read, start, start + length)
        if ticket.error is not None:
            raise OSError(first_error or errno.EIO, ticket.error)

    def _read_runs(self, ticket: Ticket, buffer: Buffer, start: int) -> tuple[int, list[tuple[int, int, int]], str]:
        """(errno of the first failure or 0, failed (leg, start, end), text)."""
        runs = ticket.runs
        first_error, failed, text = 0, _NO_FAILURE, ""
        for first, last, legs in runs:
            leg = legs - 1  # exactly one bit
            try:
                piece = buffer if len(runs) == 1 else memoryview(buffer)[first - start : last - start]
                self._legs.endpoints[leg].pread_into(piece, first)
            except Exception as error:
                number, text = self._leg_failed(leg, "read", first, error)
                first_error = first_error or number
                failed = [*failed, (leg, first, last)]
        return first_error, failed, text

    def extents(self, count: int, start: int) -> list[tuple[int, int, bool]]:
        """(offset, length, hole) in order from `start` on; perhaps for less than `count` bytes."""
        end = start + min(count, EXTENTS_BYTES_MAX)
        with self.lock:
            ticket = self._admit(self.engine.admit_read, start, end)
        found: list[tuple[int, int, bool]] = []
        try:
            for first, last, legs in ticket.runs:
                try:
                    extents = self._legs.endpoints[legs - 1].extents(first, last - first)
                    found += [(extent.offset, extent.length, extent.hole) for extent in extents]
                except OSError:  # no harm done: a read will find out
                    found.append((first, last - first, False))
        finally:
            with self.lock:
                self.engine.finish_read(ticket, _NO_FAILURE)
                self.perform()
        return found

    # ------------------------------------------------------------------ writes

    def pwrite(self, data: bytes | Buffer, start: int, fua: bool) -> None:
        length = len(data)

        def operate(endpoint: Endpoint, first: int, last: int) -> None:
            if last - first == length:
                endpoint.pwrite(data, first)
            else:
                endpoint.pwrite(memoryview(data)[first - start : last - start], first)

        self._write(start, start + length, operate, fua, False)

    def zero(self, start: int, count: int, may_trim: bool, fua: bool, fast: bool) -> None:
        """EOPNOTSUPP when it is to be `fast` and some leg would have to write the zeroes."""
        if fast and not self._can_punch(self.engine.open_legs()):
            raise OSError(errno.EOPNOTSUPP, "a leg cannot zero without writing")

        def operate(endpoint: Endpoint, first: int, last: int) -> None:
            endpoint.zero(first, last - first, may_trim)

        self._write(start, start + count, operate, fua, False)

    def trim(self, start: int, count: int, fua: bool) -> None:
        """A hole on each leg of a run, or on none: both must hold the same bytes afterwards."""
        self._write(start, start + count, _punch, fua, True)

    def _write(self, start: int, end: int, operate: Operate, fua: bool, only_where_punched: bool) -> None:
        begun_s = monotonic()
        if end <= start:
            return
        engine = self.engine
        with self.lock:  # step 1
            begun_s = self.gate.begun_s(begun_s)
            claimed, done = self.gate.claim(WRITE, start, end)
            ticket = claimed or self._admit(engine.admit_write, start, end)
        first_error, failed, text = _DONE
        order = _ORDER[engine.preferred]  # does not change while a write is in flight
        for first, last, legs in () if done else ticket.runs:  # step 2
            if only_where_punched and not self._can_punch(legs):
                ticket.adopt = None  # nothing was written: nothing can count as overwritten
                continue
            for leg in order[legs]:
                try:
                    operate(self._legs.endpoints[leg], first, last)
                except Exception as error:
                    number, text = self._leg_failed(leg, "write", first, error)
                    first_error = first_error or number
                    failed = [*failed, (leg, first, last)]
        with self.lock:  # step 3
            engine.finish_write(ticket, start, end, failed, text)
            self.perform()
            if self._overlap_waiters:
                self._overlap_ended.notify_all()
            if not ticket.settled:
                self._wait_settled(ticket)
                self._overlap_ended.notify_all()
            self.counters.write_ended(end - start, monotonic() - begun_s)
        if ticket.error is not None:
            raise OSError(first_error or errno.EIO, ticket.error)
        if fua:  # step 4
            self.flush()

    def _can_punch(self, legs: int) -> bool:
        endpoints = self._legs.endpoints
        return all(endpoints[leg].can_punch for leg in (SOURCE, TARGET) if legs & (1 << leg))

    # ------------------------------------------------------------------ flush

    def flush(self) -> None:
        """Everything acknowledged before is durable on every leg that still counts; EIO otherwise."""
        ticket = self.flush_legs(0)
        with self.lock:
            while not ticket.settled:
                self._wait_changed()
            self.counters.flushes += 1
        if ticket.error is not None:
            raise OSError(errno.EIO, ticket.error)

    def flush_legs(self, token: int) -> FlushTicket:
        """Flush, and tell the engine. The ticket may not be settled yet."""
        with self.lock:
            self.gate.collect(monotonic())
            ticket = self.engine.begin_flush(token)
            while ticket is None:
                self._wait_changed()
                self.gate.collect(monotonic())
                ticket = self.engine.begin_flush(token)
            legs = [leg for leg in (SOURCE, TARGET) if ticket.legs & (1 << leg)]
            for leg in legs:
                self.flushing[leg] += 1
        failed: dict[int, str] = {}
        for leg in legs:
            try:
                self._legs.endpoints[leg].flush()
            except Exception as error:
                failed[leg] = self._leg_failed(leg, "flush", 0, error)[1]
        with self.lock:
            for leg in legs:
                self.flushing[leg] -= 1
            self.gate.collect(monotonic())
            self.engine.finish_flush(ticket, failed)
            self.perform()
            self.changed.notify_all()  # it may have settled other flushes
        return ticket

    # ------------------------------------------------------------------ waiting (with the lock)

    def _admit(self, admit: Callable[[int, int], Ticket | None], start: int, end: int) -> Ticket:
        """Ask `admit`; when it returns None, again whenever something has changed."""
        ticket = admit(start, end)
        if ticket is not None:
            return ticket
        held_since_s = 0.0
        while True:
            blocked = self.engine.blocked
            if blocked == "hold" and not held_since_s:
                held_since_s = monotonic()
            self.perform()
            if blocked == "overlap":
                self._overlap_waiters += 1
                try:
                    self._wait_changed(self._overlap_ended)
                finally:
                    self._overlap_waiters -= 1
            else:
                self._wait_changed()
            ticket = admit(start, end)
            if ticket is not None:
                if held_since_s:
                    self.counters.hold_ended(monotonic() - held_since_s)
                return ticket

    def _wait_settled(self, ticket: Ticket) -> None:
        while not ticket.settled:
            self._wait_changed()

    def _wait_changed(self, condition: threading.Condition | None = None) -> None:
        if self._stopped:
            raise OSError(errno.ESHUTDOWN, "the member is stopping")
        self.waiting += 1
        self.stirred.notify()
        try:
            (condition or self.changed).wait(WAIT_S)
        finally:
            self.waiting -= 1

    # ------------------------------------------------------------------ failures

    def _leg_failed(self, leg: int, operation: str, offset: int, error: Exception) -> tuple[int, str]:
        """Note it; (errno, text)."""
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        cause = (error.strerror if isinstance(error, OSError) else None) or repr(error)
        text = f"{LEG_NAMES[leg]}: {operation} at {offset}: {cause}"
        self._legs.count_error(leg, text)
        now_s = monotonic()
        if now_s - self._logged_s[leg] >= _LOG_LEG_ERROR_S:
            self._logged_s[leg] = now_s
            self._log(text)
        return number, text

    # ------------------------------------------------------------------ for the member

    def uses(self, leg: int) -> bool:
        """Some I/O on this leg is in flight. With the lock."""
        inflight = self.engine.inflight
        if self.flushing[leg]:
            return True
        tickets: list[Any] = [*inflight.writes.values(), *inflight.reads.values()]
        return any(legs & (1 << leg) for ticket in tickets for _, _, legs in ticket.runs)

    def in_flight(self) -> bool:
        """With the lock."""
        inflight = self.engine.inflight
        return bool(inflight.writes or inflight.reads or any(self.flushing) or self.gate.in_flight())


def _punch(endpoint: Endpoint, first: int, last: int) -> None:
    """A hole; where the medium refuses after all, zeroes: the other leg may have its hole already."""
    try:
        endpoint.punch(first, last - first)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        endpoint.zero(first, last - first, True)


assert len(_ORDER[SOURCE]) == BOTH_OK + 1
