"""The gate between what the member engine decides and who executes settled I/O.

The engine publishes, per region, where reads and writes go (core/route.py), and which zones are in the activity log.
The data path (nbd/datapath.py) always can execute that. A second executor, the C filter in front of it, may: it answers
what is settled by itself, and lets everything else through to the data path. The gate is all that the engine's side
says to it, and hears from it:

    publish        where I/O goes from now on, whatever has changed in the engine; holds of a freeze included, and the
                   zones that have entered the activity log
    take           whatever the executor has in flight there becomes a ticket of the engine, as if admitted by it
    log_zones      these zones are (not) in the activity log, while some are about to leave it
    collect        which zones it has written since, on which legs: what a flush and the cleaning of the log must know;
                   and which ranges in open windows: what TOUCHED and CLOSE must answer
    claim          the request of this thread was begun by the executor: its ticket, and whether its I/O is done

Order, for the engine to be exact about what it did not admit itself (each call with the data path's lock):
1. `publish` comes after each call of the engine and before its effects are performed: an answer to the leader is not
   sent before the executor obeys what it says.
2. The engine's drains call `take` themselves (InFlight.gather), after the change that they wait for. So: table changed,
   executor obeys it, and only then the snapshot of what was in flight before. What comes later obeys the new table.
3. `collect` comes before begin_flush, finish_flush, receive and tick. What the executor has in flight counts as written
   at that time; it counts again at its end. So a write in flight during a flush stays dirty, as in core/activity.py.
   A write to an open window is noted when it begins: one that began before CLOSE came is in its answer, and what begins
   later no copy can undo. TOUCHED takes what is in flight, as a drain does: those blocks are answered once more.
4. A zone may leave the log only in `tick`: before it, the idle zones are taken from the executor (log_zones off), then
   collected once more; a zone that was written meanwhile is not idle any more. Those that stay are given back.
5. A leg's descriptors are given to the executor after they were opened, and taken back before they are closed:
   `leg_closes` refuses while the executor has I/O on them.
1 to 4 have names, GATE_RULES in core/rules.py: the simulator finds the omission of each (tests/sim/member.py).
"""

from collections.abc import Iterable
from typing import Protocol

from shadowvol.core.inflight import Ticket
from shadowvol.core.member import MemberEngine
from shadowvol.endpoints.base import Endpoint
from shadowvol.nbd.counters import Counters, Totals

NOT_BEGUN: tuple[Ticket | None, bool] = (None, False)


class Gate(Protocol):
    """See the module. Every method is called with the data path's lock; none blocks."""

    why_not: str | None  # why there is no second executor; None: there is one
    noted: int  # ranges in open windows that it has told so far

    def publish(self) -> None: ...

    def log_zones(self, zones: Iterable[int], logged: bool) -> None: ...

    def collect(self, now_s: float) -> None: ...

    def claim(self, kind: int, start: int, end: int) -> tuple[Ticket | None, bool]:
        """NOT_BEGUN: the request was only let through, and is to be admitted. Else its ticket, and whether its runs
        have been done: without a failure. If not, the data path does them (again) under the ticket."""
        ...

    def begun_s(self, now_s: float) -> float:
        """When this thread's request reached us, on the monotonic clock."""
        ...

    def leg_opened(self, leg: int, endpoint: Endpoint) -> None: ...

    def leg_closes(self, leg: int) -> bool:
        """False: not yet, there is I/O on it. True: it will not be used again."""
        ...

    def align(self, align_bytes: int) -> None:
        """Ranges of writes are rounded out to this."""
        ...

    def in_flight(self) -> int:
        """Requests that the executor has in flight and the engine has no tickets of."""
        ...

    def totals(self, counters: Counters) -> Totals:
        """What was done by both, `counters` being the data path's."""
        ...

    def take_longest(self, counters: Counters) -> dict[str, float]: ...

    def statistics(self) -> dict[str, int] | None:
        """What became of the requests that the executor has seen; None: there is none."""
        ...


class NoExecutor:
    """Implements Gate where there is no filter: everything comes to the data path."""

    def __init__(self, engine: MemberEngine, why_not: str) -> None:
        self.why_not: str | None = why_not
        self.noted = 0
        assert engine.changed is None and engine.inflight.gather is None, "nobody listens"

    def publish(self) -> None:
        """The engine's table is the only one."""

    def log_zones(self, zones: Iterable[int], logged: bool) -> None:
        """The engine's set is the only one."""

    def collect(self, now_s: float) -> None:
        """The engine has seen every write."""

    def claim(self, kind: int, start: int, end: int) -> tuple[Ticket | None, bool]:
        return NOT_BEGUN

    def begun_s(self, now_s: float) -> float:
        return now_s

    def leg_opened(self, leg: int, endpoint: Endpoint) -> None:
        """The data path fetches it from OpenLegs."""

    def leg_closes(self, leg: int) -> bool:
        return True

    def align(self, align_bytes: int) -> None:
        """The engine's in-flight table rounds."""

    def in_flight(self) -> int:
        return 0

    def totals(self, counters: Counters) -> Totals:
        return Totals.of(counters)

    def take_longest(self, counters: Counters) -> dict[str, float]:
        return counters.take_longest()

    def statistics(self) -> dict[str, int] | None:
        return None
