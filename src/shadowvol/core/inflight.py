"""The in-flight table of a member: one owner per range, and drains that wait for what was admitted before.

Invariants
- Writes (trims and zeroes included) that overlap, rounded out to `align_bytes`, are never in flight together;
  so both legs see them in the same order. Reads do not wait for anything here.
- A drain waits for a snapshot of tickets. It does not keep newer ones out: a hold does that.
- A request whose I/O has ended but whose fault is not settled keeps its range, but no drain waits for it: its bytes
  have stopped moving, and who drains learns of the open fault by other means (Freeze's answer). A drain that did wait
  could be the one that the settling of the fault waits for.
- Where another executor obeys the published table too (nbd/gate.py), `gather` is called before each snapshot, with
  (extents, reads, writes): it makes a ticket of everything that the other one has in flight there.
"""

from collections.abc import Callable

from shadowvol.core.geometry import Run, overlaps

READ = 0
WRITE = 1


class Ticket:
    """One admitted request. Runs are (start, end, legs) in bytes; legs as map bits (a read has exactly one)."""

    __slots__ = (
        "adopt", "end", "error", "failed", "fua", "kind", "number", "retry", "runs", "settled", "start", "tries",
    )  # fmt: skip

    def __init__(self, number: int, kind: int, start: int, end: int, runs: list[tuple[int, int, int]]) -> None:
        self.number = number
        self.kind = kind
        self.start = start  # rounded out
        self.end = end
        self.runs = runs
        self.adopt: Run | None = None  # regions that this write covers whole while one-legged
        self.failed: list[tuple[int, int, int]] = []  # (leg, start, end)
        self.settled = False
        self.error: str | None = None  # what the application gets; None: success
        self.retry = False  # a read whose faulty leg has been taken out: admit it again
        self.tries = 0


class Drain:
    """Calls `done` once all tickets of the snapshot have ended; `settled`: once they are settled, whoever leads."""

    __slots__ = ("done", "settled", "waiting")

    def __init__(self, waiting: set[int], done: Callable[[], None], settled: bool) -> None:
        self.waiting = waiting
        self.done = done
        self.settled = settled


class InFlight:
    """Tickets by number. Not locked: its owner calls it under the member's one lock."""

    def __init__(self, align_bytes: int) -> None:
        self.align_bytes = align_bytes
        self.writes: dict[int, Ticket] = {}
        self.reads: dict[int, Ticket] = {}
        self.gather: Callable[[list[Run] | None, bool, bool], None] | None = None
        self._drains: list[Drain] = []
        self._number = 0

    def rounded(self, start: int, end: int) -> tuple[int, int]:
        align = self.align_bytes
        return start - start % align, end + (-end) % align

    def write_conflicts(self, start: int, end: int) -> bool:
        return any(held.start < end and start < held.end for held in self.writes.values())

    def admit(self, kind: int, start: int, end: int, runs: list[tuple[int, int, int]]) -> Ticket:
        self._number += 1
        ticket = Ticket(self._number, kind, start, end, runs)
        (self.writes if kind == WRITE else self.reads)[ticket.number] = ticket
        return ticket

    def stopped(self, ticket: Ticket) -> None:
        """The ticket's I/O has ended: drains no longer wait for it, except those for settled ones."""
        self._leave(ticket, settled=False)

    def remove(self, ticket: Ticket) -> None:
        (self.writes if ticket.kind == WRITE else self.reads).pop(ticket.number, None)
        self._leave(ticket, settled=True)

    def _leave(self, ticket: Ticket, *, settled: bool) -> None:
        if self._drains:
            for drain in self._drains:
                if settled or not drain.settled:
                    drain.waiting.discard(ticket.number)
            self._fire()

    def drain(self, extents: list[Run] | None, *, reads: bool, writes: bool, done: Callable[[], None]) -> None:
        """Call `done` when the I/O now in flight that touches `extents` (bytes; None: all) has ended; maybe at once."""
        self._gather(extents, reads, writes)
        waiting: set[int] = set()
        for wanted, held in ((writes, self.writes), (reads, self.reads)):
            if wanted:
                waiting.update(
                    number
                    for number, ticket in held.items()
                    if not ticket.failed and (extents is None or overlaps(extents, ticket.start, ticket.end))
                )
        self._drains.append(Drain(waiting, done, settled=False))
        self._fire()

    def gather_writes(self, extents: list[Run]) -> None:
        """`writes` has every write that is in flight in `extents`, whoever executes it."""
        self._gather(extents, False, True)

    def _gather(self, extents: list[Run] | None, reads: bool, writes: bool) -> None:
        if self.gather is not None:
            self.gather(extents, reads, writes)

    def when_settled(self, done: Callable[[], None]) -> None:
        """Call `done` when the writes now in flight are settled; maybe at once."""
        self._gather(None, False, True)
        self._drains.append(Drain(set(self.writes), done, settled=True))
        self._fire()

    def forget_drains(self) -> None:
        """Those of an old leader's requests."""
        self._drains = [drain for drain in self._drains if drain.settled]

    def _fire(self) -> None:
        for drain in [drain for drain in self._drains if not drain.waiting]:
            self._drains.remove(drain)
            drain.done()
