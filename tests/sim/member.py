"""One incarnation of a host's data plane in the simulated world: the engine, and the filter beside it or none.

The engine is called here only, each call in the order that nbd/gate.py asks for, as nbd/member.py and nbd/datapath.py
keep it in the product. The rules of that order (core/rules.py, GATE_RULES) are left out here and in OmittingGate.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from shadowvol.core.geometry import Run
from shadowvol.core.inflight import Ticket
from shadowvol.core.member import FlushTicket, MemberEngine
from shadowvol.core.messages import Reply, Request
from shadowvol.nbd.filter.cgate import FilterGate
from shadowvol.nbd.gate import Gate, NoExecutor
from tests.sim.disk import Disk
from tests.sim.filter_model import FilterModel, Op


class OmittingGate(FilterGate):
    """The real gate to the model of the filter, less the rules of `omit` that concern taking."""

    def __init__(self, engine: MemberEngine, model: FilterModel, omit: frozenset[str]) -> None:
        self._omit = omit
        self._taking = False
        self.notes_wait = False
        super().__init__(engine, cast(Any, model))
        if "touched-takes" in omit:
            engine.inflight.gather_writes = lambda extents: None  # type: ignore[method-assign]

    def publish(self) -> None:
        if not self._taking:
            super().publish()

    def collect_notes(self) -> None:
        if not self.notes_wait:
            super().collect_notes()

    def take(self, extents: list[Run] | None, reads: bool, writes: bool) -> None:
        if "take-on-drain" in self._omit:
            self.publish()
            return
        self._taking = "publish-before-take" in self._omit
        super().take(extents, reads, writes)
        self._taking = False
        self.publish()


@dataclass(eq=False)
class Member:
    host: str
    engine: MemberEngine
    omit: frozenset[str] = frozenset()
    alive: bool = True
    paused_until: float = 0.0
    waiting: list[Callable[[], bool]] = field(default_factory=list)
    pending_puts: list[tuple[Disk, int, int]] = field(default_factory=list)
    flush_failing: int = 0  # flushes that failed and are not settled
    pumping: bool = False
    filter: FilterModel | None = None

    def __post_init__(self) -> None:
        self.gate: Gate = NoExecutor(self.engine, "this run has none")

    def put_filter_in_front(self, model: FilterModel) -> None:
        """Before anything else is done."""
        self.filter = model
        self.gate = OmittingGate(self.engine, model, self.omit)

    @property
    def opener(self) -> str:
        return f"{self.host}.{self.engine.incarnation}"

    @property
    def busy(self) -> bool:
        """Some request is not answered."""
        inflight = self.engine.inflight
        return bool(self.waiting or inflight.writes or inflight.reads or (self.filter is not None and self.filter.busy))

    # ------------------------------------------------------------ rule 1: publish after each call

    def _publish(self) -> None:
        if "publish-before-effects" not in self.omit:
            self.gate.publish()

    def prepared(self, token: int, reason: str | None) -> None:
        self.engine.prepared(token, reason)
        self._publish()

    def admit_read(self, start: int, end: int) -> Ticket | None:
        ticket = self.engine.admit_read(start, end)
        self._publish()
        return ticket

    def finish_read(self, ticket: Ticket, failed: list[tuple[int, int, int]], error: str) -> None:
        self.engine.finish_read(ticket, failed, error)
        self._publish()

    def admit_write(self, start: int, end: int) -> Ticket | None:
        ticket = self.engine.admit_write(start, end)
        self._publish()
        return ticket

    def finish_write(
        self, ticket: Ticket, start: int, end: int, failed: list[tuple[int, int, int]], error: str
    ) -> None:
        self.engine.finish_write(ticket, start, end, failed, error)
        self._publish()

    def claim(self, op: Op, kind: int) -> tuple[Ticket | None, bool]:
        """For the thread of this request, which the filter has let through or hands over."""
        assert self.filter is not None
        self.filter.hand_over(op)
        return self.gate.claim(kind, op.start, op.end)

    # ------------------------------------------------------------ rule 3: collect before these

    def _collect(self, rule: str, now_s: float) -> None:
        if rule not in self.omit:
            self.gate.collect(now_s)

    def begin_flush(self, token: int, now_s: float) -> FlushTicket | None:
        self._collect("collect-before-flush", now_s)
        return self.engine.begin_flush(token)

    def finish_flush(self, ticket: FlushTicket, failed: dict[int, str], now_s: float) -> None:
        self._collect("collect-before-flush-ends", now_s)
        self.engine.finish_flush(ticket, failed)
        self._publish()

    def receive(self, message: Request | Reply, now_s: float) -> None:
        if isinstance(self.gate, OmittingGate):
            self.gate.notes_wait = "notes-before-receive" in self.omit
        self._collect("collect-before-receive", now_s)
        if isinstance(self.gate, OmittingGate):
            self.gate.notes_wait = False
        self.engine.receive(message, now_s)
        self._publish()

    # ------------------------------------------------------------ rule 4: the filter lets go of a zone first

    def tick(self, now_s: float) -> None:
        activity = self.engine.activity
        self.gate.collect(now_s)
        leaving = activity.idle_zones(now_s)
        if leaving:
            self._let_go(leaving, now_s)
        self.engine.tick(now_s)
        if leaving:
            self.gate.log_zones([zone for zone in leaving if zone in activity.logged], True)
        self.gate.publish()

    def _let_go(self, leaving: Iterable[int], now_s: float) -> None:
        if "unlog-lets-go-first" not in self.omit:
            self.gate.log_zones(leaving, False)
        self._collect("unlog-collects-again", now_s)
