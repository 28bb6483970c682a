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

Waiting: writes blocked by an overlapping one wait for `_overlap_ended`, all others for `changed`, so that a held write
is not woken by each of its neighbours that ends.
"""

import errno
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from shadowvol.core.inflight import Ticket
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, SOURCE, TARGET
from shadowvol.core.member import Effect, FlushTicket, MemberEngine
from shadowvol.endpoints.base import Endpoint
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


class Counters:
    """Plain numbers, changed under the lock. `*_longest_s` are since the last take_longest()."""

    __slots__ = (
        "flushes",
        "hold_longest_s",
        "read_bytes",
        "read_longest_s",
        "reads",
        "write_bytes",
        "write_longest_s",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = self.read_bytes = self.writes = self.write_bytes = self.flushes = 0
        self.hold_longest_s = self.read_longest_s = self.write_longest_s = 0.0

    def totals(self) -> dict[str, int]:
        names = ("reads", "read_bytes", "writes", "write_bytes", "flushes")
        return {name: getattr(self, name) for name in names}

    def take_longest(self) -> dict[str, float]:
        names = ("hold_longest_s", "read_longest_s", "write_longest_s")
        taken = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, 0.0)
        return taken


class DataPath:
    """Called by many threads at once. Every method raises OSError with what the application is to be told."""

    def __init__(
        self,
        engine: MemberEngine,
        legs: OpenLegs,
        perform: Callable[[list[Effect]], None],
        log: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.counters = Counters()
        self.flushing = [0, 0]  # flushes under way, by leg
        self._legs = legs
        self._perform = perform
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

    # ------------------------------------------------------------------ reads

    def pread_into(self, buffer: Buffer, start: int) -> None:
        """Fill `buffer` from `start`."""
        begun_s = monotonic()
        length = len(buffer)
        if not length:
            return
        engine, counters, tries = self.engine, self.counters, 0
        while True:
            with self.lock:
                ticket = engine.admit_read(start, start + length)
                if ticket is None:
                    ticket = self._wait_admitted(engine.admit_read, start, start + length)
            first_error, failed, text = self._read_runs(ticket, buffer, start)
            with self.lock:
                ticket.tries = tries
                engine.finish_read(ticket, failed, text)
                effects = engine.take_effects()
                if effects:
                    self._perform(effects)
                if not ticket.settled:
                    self._wait_settled(ticket)
                if not ticket.retry:
                    counters.reads += 1
                    counters.read_bytes += length
                    took_s = monotonic() - begun_s
                    if took_s > counters.read_longest_s:
                        counters.read_longest_s = took_s
                    break
                tries = ticket.tries
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
            ticket = self.engine.admit_read(start, end)
            if ticket is None:
                ticket = self._wait_admitted(self.engine.admit_read, start, end)
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
                self._perform(self.engine.take_effects())
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
        engine, counters = self.engine, self.counters
        with self.lock:  # step 1
            ticket = engine.admit_write(start, end)
            if ticket is None:
                ticket = self._wait_admitted(engine.admit_write, start, end)
        first_error, failed, text = 0, _NO_FAILURE, ""
        order = _ORDER[engine.preferred]  # does not change while a write is in flight
        for first, last, legs in ticket.runs:  # step 2
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
            effects = engine.take_effects()
            if effects:
                self._perform(effects)
            if self._overlap_waiters:
                self._overlap_ended.notify_all()
            if not ticket.settled:
                self._wait_settled(ticket)
                self._overlap_ended.notify_all()
            counters.writes += 1
            counters.write_bytes += end - start
            took_s = monotonic() - begun_s
            if took_s > counters.write_longest_s:
                counters.write_longest_s = took_s
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
            ticket = self.engine.begin_flush(token)
            while ticket is None:
                self._wait_changed()
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
            self.engine.finish_flush(ticket, failed)
            self._perform(self.engine.take_effects())
            self.changed.notify_all()  # it may have settled other flushes
        return ticket

    # ------------------------------------------------------------------ waiting (with the lock)

    def _wait_admitted(self, admit: Callable[[int, int], Ticket | None], start: int, end: int) -> Ticket:
        """`admit` has just returned None; ask it again whenever something has changed."""
        held_since_s = 0.0
        while True:
            blocked = self.engine.blocked
            if blocked == "hold" and not held_since_s:
                held_since_s = monotonic()
            self._perform(self.engine.take_effects())
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
                    held_s = monotonic() - held_since_s
                    self.counters.hold_longest_s = max(self.counters.hold_longest_s, held_s)
                return ticket

    def _wait_settled(self, ticket: Ticket) -> None:
        while not ticket.settled:
            self._wait_changed()

    def _wait_changed(self, condition: threading.Condition | None = None) -> None:
        if self._stopped:
            raise OSError(errno.ESHUTDOWN, "the member is stopping")
        (condition or self.changed).wait(WAIT_S)

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
        return bool(self.engine.inflight.writes or self.engine.inflight.reads or any(self.flushing))


def _punch(endpoint: Endpoint, first: int, last: int) -> None:
    """A hole; where the medium refuses after all, zeroes: the other leg may have its hole already."""
    try:
        endpoint.punch(first, last - first)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        endpoint.zero(first, last - first, True)


assert len(_ORDER[SOURCE]) == BOTH_OK + 1
