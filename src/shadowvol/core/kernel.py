"""The kernel of the leader engine: it runs protocols, and knows nothing of what they are about.

A protocol is a generator. It yields one step (Persist, AskAll, Copy …), is resumed with its outcome, and so
emits step n+1 only on completion of step n; the kernel starts the steps as effects and resumes the generators.

Invariants
- One transaction is under way at a time, built when it is issued, so memory is changed only by what is durable.
- Exclusive changes (membership, bits, preferred, phase) are done one after the other: `exclusive` is their queue.
- A transaction that does not hold although its builder thought so means another leader: this one is `deposed`
  and does nothing any more. The same for a transaction whose outcome is unknown, and for a protocol that raised
  (a bug of ours): a new leadership, which reads the record, goes on.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shadowvol.core.messages import Request
from shadowvol.core.steps import (
    AskAll,
    CopierFlush,
    Copy,
    CopyResult,
    Deposed,
    DoCopierFlush,
    DoCopy,
    DoPersist,
    DoProbe,
    Effect,
    Exclusive,
    Persist,
    SendTo,
    Step,
    Steps,
    WaitFor,
    WindowVoid,
)

if TYPE_CHECKING:
    from shadowvol.core.windows import Window


@dataclass(slots=True)
class Task:
    steps: Steps
    name: str
    window: "Window | None" = None
    parent: "Task | None" = None
    waiting: Step | None = None
    job: int | None = None
    value: Any = None


@dataclass(slots=True)
class PendingAsk:
    task: Task
    wanted: dict[str, Request]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked_s: float = 0.0
    sent_s: float = 0.0
    deadline_s: float | None = None


class Kernel:
    """Tasks, their steps, and the effects that perform them. `live` and `joining`: host -> incarnation."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.deposed = False
        self.epoch = 0
        self.live: dict[str, int] = {}
        self.joining: dict[str, int] = {}
        self.copier_up = False
        self.copier_jobs: dict[int, Task] = {}
        self.exclusive: deque[Task] = deque()
        self._effects: list[Effect] = []
        self._waiting: list[Task] = []
        self._asks: dict[int, PendingAsk] = {}
        self._seq = 0
        self._job = 0
        self._txns: deque[tuple[Task, Persist]] = deque()
        self._txn_token = 0
        self._txn_task: tuple[Task, Persist] | None = None

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

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def silent_hosts(self, since_s: float) -> list[str]:
        """Those that have left a request unanswered for so long."""
        late = [pending for pending in self._asks.values() if self.now_s - pending.asked_s >= since_s]
        return sorted({host for pending in late for host in pending.wanted})

    def spawn(self, steps: Steps, name: str, window: "Window | None" = None) -> None:
        task = Task(steps, name, window)
        if window is not None:
            window.task = task
        self._resume(task, None)

    def queue_exclusive(self, steps: Steps, name: str, parent: Task | None = None) -> None:
        task = Task(steps, name, None, parent)
        self.exclusive.append(task)
        if len(self.exclusive) == 1:
            self._resume(task, None)

    # ------------------------------------------------------------ tasks and steps

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
        except Exception as error:
            self._depose(f"{task.name} failed: {error!r}")
            raise
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
        except Exception as error:
            self._depose(f"{task.name} failed: {error!r}")
            raise
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
                missing = CopyResult(False, error="the copier is not running")
                self._resume(task, missing if isinstance(step, Copy) else None)
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
        self._asks[self._seq] = PendingAsk(task, wanted, {}, self.now_s, self.now_s, deadline)
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
