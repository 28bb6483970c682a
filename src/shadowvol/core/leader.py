"""The leader engine: kernel. It runs the protocols (core/windows.py, core/changes.py) step by step on events.

A protocol is a generator. It yields one step (Persist, AskAll, Copy …), is resumed with its outcome, and so
emits step n+1 only on completion of step n; this module starts the steps as effects and resumes the generators.
No I/O, clock or thread is here: the shell performs effects and calls the `on_…` methods and `tick`.

Invariants
- One transaction is under way at a time, built when it is issued, so memory is changed only by what is durable.
- Exclusive changes (membership, bits, preferred, phase) are done one after the other: `exclusive` is their queue.
- A transaction that does not hold although its builder thought so means another leader: this one is `deposed`
  and does nothing any more. The same for a transaction whose outcome is unknown: start a new leadership.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from shadowvol.core import changes, transitions, windows
from shadowvol.core.geometry import Run
from shadowvol.core.legs import LEG_NAMES, Phase
from shadowvol.core.messages import Answer, Ask, ClearUndo, Fault, Request
from shadowvol.core.records import Keys, VolumeRecord, VolumeState, encode_leader, encode_state
from shadowvol.core.rules import NONE_OMITTED
from shadowvol.core.steps import (
    AskAll,
    Command,
    CommandDone,
    CopierFlush,
    Copy,
    CopyResult,
    Deposed,
    DoCancel,
    DoCopierFlush,
    DoCopy,
    DoPersist,
    DoProbe,
    Effect,
    Exclusive,
    Persist,
    Probe,
    SendTo,
    Step,
    Steps,
    WaitFor,
    WindowVoid,
)
from shadowvol.core.txn import Compare, Holds, Txn

RESEND_S = 0.5  # an unanswered request is sent again after this long
COMMANDS_MAX = 32  # operator commands waiting for the exclusive queue

@dataclass(slots=True)
class LegHealth:
    errors: int = 0
    last_error: str | None = None
    since_s: float | None = None
    failed: bool = False  # the last operation on it failed


@dataclass(slots=True)
class Task:
    steps: Steps
    name: str
    window: windows.Window | None = None
    parent: "Task | None" = None
    waiting: Step | None = None
    job: int | None = None
    value: Any = None


@dataclass(slots=True)
class PendingAsk:
    task: Task
    wanted: dict[str, Request]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent_s: float = 0.0
    deadline_s: float | None = None


class LeaderEngine:
    """The leadership of one volume from one epoch on. `record` is what was read after the epoch was taken."""

    def __init__(
        self,
        record: VolumeRecord,
        host: str,
        *,
        limits: windows.Limits | None = None,
        omit: frozenset[str] = NONE_OMITTED,
    ) -> None:
        self.limits = limits or windows.Limits()
        self.config = record.config
        self.geometry = record.config.geometry
        self.keys = Keys(record.config.name)
        self.state: VolumeState = record.state
        self.map = record.map
        self.epoch = record.epoch
        self.host = host
        self.omit = omit
        self.now_s = 0.0
        self.deposed = False
        # members: recorded ones are unresolved until each is live or proven gone
        self.unresolved: dict[str, int] = dict(record.members)
        self.live: dict[str, int] = {}
        self.joining: dict[str, int] = {}
        self.gone: dict[str, list[Run]] = {}  # host -> logged zones, to be recovered
        self.sync_queued = True  # the takeover is one
        self.transition = record.transition
        # windows
        self.windows: dict[int, windows.Window] = {}
        self.quarantine: dict[int, list[Run]] = {number: list(w.runs) for number, w in record.windows.items()}
        self.cursor = 0
        self.backoff = windows.Backoff()
        self.copier_up = False
        self.copier_session = 0
        self.copier_jobs: dict[int, Task] = {}
        # faults and commands
        self.faults: list[tuple[str, Ask]] = []
        self.clear_queued = False
        self.legs = (LegHealth(), LegHealth())
        self.commands_waiting = 0
        self.freeze_began_s = 0.0
        self.goal_retry_s = 0.0
        self._transition_number = 0
        # kernel
        self.exclusive: deque[Task] = deque()
        self._effects: list[Effect] = []
        self._waiting: list[Task] = []
        self._asks: dict[int, PendingAsk] = {}
        self._seq = 0
        self._job = 0
        self._txns: deque[tuple[Task, Persist]] = deque()
        self._txn_token = 0
        self._txn_task: tuple[Task, Persist] | None = None
        self.queue_exclusive(changes.take_over(self), "takeover")
        self.spawn(windows.picker(self), "picker")

    # ------------------------------------------------------------ events

    def on_member_up(self, host: str, incarnation: int, now_s: float) -> None:
        """A member's link is up (again). One that is live already only gets its unanswered requests again."""
        self.now_s = now_s
        if self.live.get(host) == incarnation:
            self._resend(host)
            return
        self.joining[host] = incarnation
        self.unresolved.pop(host, None) if self.unresolved.get(host) == incarnation else None
        self._need_sync()
        self._run_waiting()

    def on_member_gone(self, host: str, logged: list[Run], now_s: float) -> None:
        """The member is proven dead (its lock is free, or it is fenced). `logged`: its durable activity log."""
        self.now_s = now_s
        self.live.pop(host, None)
        self.joining.pop(host, None)
        self.unresolved.pop(host, None)
        self.gone[host] = logged
        self.faults = [(owner, ask) for owner, ask in self.faults if owner != host]
        for seq, pending in list(self._asks.items()):
            if host in pending.wanted:
                del pending.wanted[host]
                self._maybe_answered(seq)
        self._need_sync()
        self._run_waiting()

    def on_member_message(self, host: str, message: Answer | Ask, now_s: float) -> None:
        self.now_s = now_s
        incarnation = self.live.get(host) or self.joining.get(host)
        if message.incarnation != incarnation:
            return
        if isinstance(message, Answer):
            pending = self._asks.get(message.seq)
            if message.epoch == self.epoch and pending is not None and host in pending.wanted:
                del pending.wanted[host]
                pending.answers[host] = message.body
                self._maybe_answered(message.seq)
        elif isinstance(message.want, Fault | ClearUndo):
            self._take_fault(host, message)
        self._run_waiting()

    def on_persisted(self, token: int, ok: bool, now_s: float) -> None:
        self.now_s = now_s
        if self._txn_task is None or token != self._txn_token:
            return
        task, step = self._txn_task
        self._txn_task = None
        if not ok and not step.may_fail:
            self._depose("another leader has taken over")
            return
        self._resume(task, ok)
        self._issue_txn()
        self._run_waiting()

    def on_unknown(self, reason: str) -> None:
        """A transaction's outcome is unknown: only a new leadership, which reads the record, can go on."""
        self._depose(reason)

    def on_job_done(self, job: int, outcome: Any, now_s: float) -> None:
        """A copy (CopyResult), flush ({leg: error}) or probe (offset or None) has ended."""
        self.now_s = now_s
        task = self.copier_jobs.pop(job, None)
        if task is not None:
            task.job = None
            self._resume(task, outcome)
        self._run_waiting()

    def on_copier(self, up: bool, now_s: float) -> None:
        """The copier is ready; or it is proven to have stopped, and none of its writes can land any more."""
        self.now_s = now_s
        self.copier_up = up
        self.copier_session += up
        if not up:
            for job, task in list(self.copier_jobs.items()):
                step = task.waiting
                failed: Any = CopyResult(False, error="the copier stopped")
                if isinstance(step, CopierFlush):
                    failed = {leg: "the copier stopped" for leg in step.legs}
                elif isinstance(step, Probe):
                    failed = None
                self.on_job_done(job, failed, now_s)
        self._run_waiting()

    def on_old_copiers_stopped(self, now_s: float) -> None:
        """No copier of an earlier epoch can write any more: the quarantine ends."""
        self.now_s = now_s
        if self.quarantine:
            self.queue_exclusive(changes.end_quarantine(self), "end quarantine")
        self._run_waiting()

    def command(self, number: int, verb: str, options: dict[str, Any], now_s: float) -> None:
        """An operator's verb; answered by CommandDone."""
        self.now_s = now_s
        if self.commands_waiting >= COMMANDS_MAX:
            self.emit(CommandDone(number, 1, "too many commands are waiting; nothing changed"))
            return
        self.commands_waiting += 1
        self.queue_exclusive(transitions.perform(self, Command(number, verb, options)), verb)
        self._run_waiting()

    def tick(self, now_s: float) -> None:
        self.now_s = now_s
        for seq, pending in list(self._asks.items()):
            if pending.deadline_s is not None and now_s >= pending.deadline_s:
                pending.wanted.clear()
                self._maybe_answered(seq)
            elif now_s - pending.sent_s >= RESEND_S:
                pending.sent_s = now_s
                for host, request in pending.wanted.items():
                    self.emit(SendTo(host, request))
        transitions.advance_goal(self)
        self._run_waiting()

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ------------------------------------------------------------ what protocols use

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def done(self, command: Command, code: int, text: str = "") -> None:
        self.commands_waiting -= 1
        self.emit(CommandDone(command.number, code, text))

    def spawn(self, steps: Steps, name: str, window: windows.Window | None = None) -> None:
        task = Task(steps, name, window)
        if window is not None:
            window.task = task
        self._resume(task, None)

    def queue_exclusive(self, steps: Steps, name: str, parent: Task | None = None) -> None:
        task = Task(steps, name, None, parent)
        self.exclusive.append(task)
        if len(self.exclusive) == 1:
            self._resume(task, None)

    def txn(
        self,
        *,
        state: VolumeState | None = None,
        chunks: list[Run] | None = None,
        new_map: Any = None,
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
        compares: tuple[Compare, ...] = (),
    ) -> Txn:
        """A transaction of this leadership: it compares the epoch. `chunks`: regions of `new_map` to write."""
        guard = () if "epoch-compare" in self.omit else (
            Compare(self.keys.leader, Holds.VALUE, encode_leader(self.epoch, self.host)),
        )
        all_puts = list(puts)
        if state is not None:
            all_puts.append((self.keys.state, encode_state(state)))
        if new_map is not None and chunks:
            all_puts += [(self.keys.chunk(index), new_map.chunk(index)) for index in sorted(new_map.chunks_of(chunks))]
        return Txn(guard + compares, tuple(all_puts), deletes)

    def void_windows(self, reason: str, runs: list[Run] | None = None) -> list[windows.Window]:
        """Open windows that touch `runs` (None: all). The caller deletes their records, then calls void() on each."""
        return [
            window
            for window in self.windows.values()
            if not window.void_reason and (runs is None or window.touches(runs))
        ]

    def void(self, window: windows.Window, reason: str) -> None:
        """The window's record is gone: end its protocol at its next step (at once where it waits for members)."""
        if window.void_reason or "window-record-compare" in self.omit:
            return
        window.void_reason = reason
        task = window.task
        if task is None or window.void_thrown:
            return
        if isinstance(task.waiting, AskAll | WaitFor):
            self._forget_waits(task)
            self._throw(task, WindowVoid(reason))
        elif isinstance(task.waiting, Copy) and task.job is not None:
            self.emit(DoCancel(task.job))
            if "void-waits-for-copier" in self.omit:
                del self.copier_jobs[task.job]
                self._throw(task, WindowVoid(reason))

    def change_state(self, **changed: Any) -> VolumeState:
        return replace(self.state, **changed)

    def next_transition(self) -> str:
        self._transition_number += 1
        return f"{self.epoch}.{self._transition_number}"

    def leg_spec(self, leg: int) -> dict[str, Any]:
        """What a member needs to open the leg."""
        record = self.config.leg(leg)
        return {"path": record.uri, "identity": record.identity, "cache": record.cache}

    def last_leg_error(self) -> str:
        latest = max(self.legs, key=lambda health: health.since_s or 0.0)
        return latest.last_error or "unknown"

    def single_member(self) -> bool:
        return len(self.live) == 1 and not self.joining and not self.unresolved

    def leg_failed(self, leg: int, error: str) -> None:
        health = self.legs[leg]
        health.errors += 1
        health.last_error = error
        health.failed = True
        if health.since_s is None:
            health.since_s = self.now_s

    def leg_worked(self, leg: int) -> None:
        self.legs[leg].failed = False
        self.legs[leg].since_s = None

    @property
    def phase(self) -> Phase:
        """The phase that an operator sees: copying with both bits everywhere is synced."""
        if self.state.phase is Phase.COPYING and self.state.goal is None and self.map.count_both() == len(self.map):
            return Phase.SYNCED
        return self.state.phase

    def doing(self) -> dict[str, Any]:
        """A snapshot for status and logs: exclusive change under way, windows with their step."""
        return {
            "change": self.exclusive[0].name if self.exclusive else None,
            "windows": {window.id: window.step for window in self.windows.values()},
            "waiting_for": sorted({host for pending in self._asks.values() for host in pending.wanted}),
            "preferred": LEG_NAMES[self.state.preferred],
        }

    # ------------------------------------------------------------ kernel

    def _need_sync(self) -> None:
        if not self.sync_queued:
            self.sync_queued = True
            self.queue_exclusive(changes.sync(self), "membership")

    def _take_fault(self, host: str, ask: Ask) -> None:
        if any(owner == host and known.number == ask.number for owner, known in self.faults):
            return
        self.faults.append((host, ask))
        if not self.clear_queued:
            self.clear_queued = True
            self.queue_exclusive(changes.clear(self), "leg fault")

    def _resume(self, task: Task, value: Any) -> None:
        if self.deposed:
            return
        window = task.window
        if window is not None and window.void_reason and not window.void_thrown:
            window.void_thrown = True
            self._throw(task, WindowVoid(window.void_reason))
            return
        task.waiting = None
        try:
            step = task.steps.send(value)
        except StopIteration as stop:
            self._ended(task, stop.value)
            return
        self._start(task, step)

    def _throw(self, task: Task, error: WindowVoid) -> None:
        if task.window is not None:
            task.window.void_thrown = True
        task.waiting = None
        try:
            step = task.steps.throw(error)
        except StopIteration as stop:
            self._ended(task, stop.value)
            return
        self._start(task, step)

    def _ended(self, task: Task, value: Any) -> None:
        if self.exclusive and self.exclusive[0] is task:
            self.exclusive.popleft()
            if task.parent is not None:
                self._resume(task.parent, value)
            if self.exclusive and self.exclusive[0].waiting is None:
                self._resume(self.exclusive[0], None)

    def _start(self, task: Task, step: Step) -> None:
        task.waiting = step
        if isinstance(step, Persist):
            self._txns.append((task, step))
            self._issue_txn()
        elif isinstance(step, AskAll):
            self._start_ask(task, step)
        elif isinstance(step, WaitFor):
            self._waiting.append(task)
        elif isinstance(step, Exclusive):
            self.queue_exclusive(step.steps, task.name, task)
        else:
            self._job += 1
            task.job = self._job
            if not self.copier_up:
                failed: Any = CopyResult(False, error="the copier is not running")
                if isinstance(step, CopierFlush):
                    failed = {leg: "the copier is not running" for leg in step.legs}
                self._resume(task, None if isinstance(step, Probe) else failed)
                return
            self.copier_jobs[self._job] = task
            if isinstance(step, Copy):
                self.emit(DoCopy(self._job, step))
            elif isinstance(step, CopierFlush):
                self.emit(DoCopierFlush(self._job, step.legs))
            else:
                self.emit(DoProbe(self._job, step))

    def _start_ask(self, task: Task, step: AskAll) -> None:
        self._seq += 1
        incarnations = {**self.joining, **self.live}
        hosts = step.hosts if step.hosts is not None else list(self.live)
        wanted = {
            host: Request(self.epoch, incarnations[host], self._seq, step.subject, step.body)
            for host in hosts
            if host in incarnations
        }
        deadline = None if step.timeout_s is None else self.now_s + step.timeout_s
        self._asks[self._seq] = PendingAsk(task, wanted, {}, self.now_s, deadline)
        for host, request in wanted.items():
            self.emit(SendTo(host, request))
        self._maybe_answered(self._seq)

    def _maybe_answered(self, seq: int) -> None:
        pending = self._asks[seq]
        if not pending.wanted:
            del self._asks[seq]
            self._resume(pending.task, pending.answers)

    def _forget_waits(self, task: Task) -> None:
        self._asks = {seq: pending for seq, pending in self._asks.items() if pending.task is not task}
        self._waiting = [waiting for waiting in self._waiting if waiting is not task]

    def _resend(self, host: str) -> None:
        for pending in self._asks.values():
            if host in pending.wanted:
                self.emit(SendTo(host, pending.wanted[host]))

    def _run_waiting(self) -> None:
        """Resume those whose condition holds, until none does."""
        progress = True
        while progress and not self.deposed:
            progress = False
            for task in list(self._waiting):
                step = task.waiting
                if isinstance(step, WaitFor) and step.ready():
                    self._waiting.remove(task)
                    self._resume(task, None)
                    progress = True
                    break

    def _issue_txn(self) -> None:
        while self._txn_task is None and self._txns and not self.deposed:
            task, step = self._txns.popleft()
            txn = step.build()
            if txn is None:
                self._resume(task, False)
                continue
            self._txn_task = (task, step)
            self._txn_token += 1
            self.emit(DoPersist(self._txn_token, txn))

    def _depose(self, reason: str) -> None:
        self.deposed = True
        self.emit(Deposed(reason))
