"""The leader engine: the state of one leadership, and the events that change it.

The protocols are in core/windows.py (copying), core/changes.py (membership, faults) and core/transitions.py (verbs);
core/kernel.py runs them step by step. No I/O, clock or thread is here: the shell performs effects and calls the
`on_…` methods and `tick`.
"""

from dataclasses import dataclass, replace
from typing import Any

from shadowvol.core import changes, commands, flushround, transitions, windows
from shadowvol.core.geometry import Run
from shadowvol.core.kernel import Kernel
from shadowvol.core.legs import LEG_NAMES, S_OK, SOURCE, T_OK, TARGET, Phase
from shadowvol.core.messages import Answer, Ask, ClearUndo, Fault
from shadowvol.core.records import Keys, VolumeRecord, VolumeState, encode_leader, encode_state
from shadowvol.core.rules import NONE_OMITTED
from shadowvol.core.steps import (
    AskAll,
    Command,
    CommandDone,
    Copy,
    CopyResult,
    DoCancel,
    SendTo,
    WaitFor,
    WindowVoid,
)
from shadowvol.core.txn import Compare, Holds, Txn

RESEND_S = 0.5  # an unanswered request is sent again after this long
COMMANDS_MAX = 32  # operators' verbs that have not ended


@dataclass(slots=True)
class LegHealth:
    """`errors` and `last_error` are history: they stay when the leg works again."""

    errors: int = 0
    last_error: str | None = None
    last_error_s: float = 0.0
    since_s: float | None = None  # since when it has been as it is; None: always
    failed: bool = False  # the last operation on it failed


class LeaderEngine(Kernel):
    """The leadership of one volume from one epoch on. `record` is what was read after the epoch was taken."""

    def __init__(
        self,
        record: VolumeRecord,
        host: str,
        *,
        limits: windows.Limits | None = None,
        omit: frozenset[str] = NONE_OMITTED,
    ) -> None:
        super().__init__()
        self.limits = limits or windows.Limits()
        self.window_bytes = self.limits.window_bytes  # of the next window
        self.config = record.config
        self.geometry = record.config.geometry
        self.keys = Keys(record.config.name)
        self.state: VolumeState = record.state
        self.map = record.map
        self.epoch = record.epoch
        self.host = host
        self.omit = omit
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
        self.application_busy = False  # told by the shell: requests came in lately
        self.copy_rate: int | None = None  # told by the shell: bytes per second that the copier may do; None: no limit
        self.copy_turn = True  # told by the shell: False while others on this host copy first
        self.flush_delay = windows.FlushDelay(self.limits.flush_delay_s)
        self.copier_session = 0
        # faults and commands
        self.faults: list[tuple[str, Ask]] = []
        self.clear_queued = False
        self.legs = (LegHealth(), LegHealth())
        self.commands: list[Command] = []  # that have not ended
        self.freeze_began_s = 0.0
        self.goal_retry_s = 0.0
        self._transition_number = 0
        self.queue_exclusive(changes.take_over(self), "takeover")
        self.spawn(windows.picker(self), "picker")
        self.spawn(flushround.flusher(self), "flusher")

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

    def on_copier(self, up: bool, now_s: float) -> None:
        """The copier is ready; or it is proven to have stopped, and none of its writes can land any more."""
        self.now_s = now_s
        self.copier_up = up
        self.copier_session += up
        if not up:
            for job, task in list(self.copier_jobs.items()):
                stopped = CopyResult(False, error="the copier stopped")
                self.on_job_done(job, stopped if isinstance(task.waiting, Copy) else None, now_s)
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
        if len(self.commands) >= COMMANDS_MAX:
            self.emit(CommandDone(number, 1, "too many commands are waiting; nothing changed"))
            return
        command = Command(number, verb, options, now_s)
        self.commands.append(command)
        self.spawn(commands.steps(self, command), verb)
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
        commands.answer_overdue(self)
        self._run_waiting()

    # ------------------------------------------------------------ what protocols use

    def done(self, command: Command, code: int, text: str = "") -> None:
        """The verb has ended. Nobody is told any more if it was answered before: that it goes on."""
        self.commands.remove(command)
        self.answer(command, code, text)

    def answer(self, command: Command, code: int, text: str) -> None:
        if not command.answered:
            command.answered = True
            self.emit(CommandDone(command.number, code, text))

    def txn(
        self,
        *,
        state: VolumeState | None = None,
        chunks: list[Run] | None = None,
        new_map: Any = None,
        puts: tuple[tuple[str, bytes], ...] = (),
        deletes: tuple[str, ...] = (),
        compares: tuple[Compare, ...] = (),
        relaxed: bool = False,
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
        relaxed = relaxed or "relaxed-only-adds" in self.omit
        return Txn(guard + compares, tuple(all_puts), deletes, relaxed)

    def void_windows(self, reason: str, runs: list[Run] | None = None) -> list[windows.Window]:
        """Open windows that touch `runs` (None: all). The caller persists void_records(), then calls void() on each."""
        return [
            window
            for window in self.windows.values()
            if not window.void_reason and (runs is None or window.touches(runs))
        ]

    def void_records(self, void: list[windows.Window]) -> tuple[tuple[tuple[str, bytes], ...], tuple[str, ...]]:
        """(puts, deletes) that make these void; each keeps a record until its copier has ended (windows._fail)."""
        void = [window for window in void if window.id in self.windows]
        if "void-keeps-record" in self.omit:
            return (), tuple(self.keys.window(window.id) for window in void)
        return tuple(windows.record_put(self, window, void=True) for window in void), ()

    def is_copying(self, window: windows.Window) -> bool:
        """The copier may be writing for it."""
        return window.task is not None and any(task is window.task for task in self.copier_jobs.values())

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

    def last_leg_error(self) -> str | None:
        """Which leg failed last, and how; None: none did."""
        leg = max((SOURCE, TARGET), key=lambda leg: self.legs[leg].last_error_s)
        error = self.legs[leg].last_error
        return None if error is None else f"{LEG_NAMES[leg]}: {error}"

    def single_member(self) -> bool:
        return len(self.live) == 1 and not self.joining and not self.unresolved

    def leg_failed(self, leg: int, error: str) -> None:
        health = self.legs[leg]
        health.errors += 1
        health.last_error = error
        health.last_error_s = self.now_s
        if not health.failed:
            health.failed, health.since_s = True, self.now_s

    def leg_worked(self, leg: int) -> None:
        health = self.legs[leg]
        if health.failed:
            health.failed, health.since_s = False, self.now_s

    @property
    def phase(self) -> Phase:
        """The phase that an operator sees: copying with both bits everywhere is synced."""
        if self.state.phase is Phase.COPYING and self.state.goal is None and self.map.count_both() == len(self.map):
            return Phase.SYNCED
        return self.state.phase

    @property
    def at_rest(self) -> bool:
        """Nothing is under way, and nothing begins only because time passes: a tick does nothing until an event."""
        under_way = self._asks or self.exclusive or self.windows or self.faults or self.copier_jobs or self._txn_task
        if under_way or self._txns or self.commands or self.state.goal is not None:
            return False
        copying = self.state.phase is Phase.COPYING and not self.state.paused
        return not copying or self.map.next_one_legged(0, (S_OK, T_OK)) < 0

    @property
    def calm(self) -> bool:
        """Windows are being copied, which events bring on, and nothing else is under way: ticks may be fewer."""
        waited_for = self.exclusive or self.faults or self.commands or self.sync_queued or self.unresolved
        backing_off = self.backoff.until_s > self.now_s
        return bool(self.windows) and not waited_for and self.state.goal is None and not backing_off

    def doing(self) -> dict[str, Any]:
        """A snapshot for status and logs: exclusive change under way, windows with their step."""
        return {
            "change": self.exclusive[0].name if self.exclusive else None,
            "windows": {window.id: window.step for window in self.windows.values()},
            "waiting_for": sorted({host for pending in self._asks.values() for host in pending.wanted}),
            "preferred": LEG_NAMES[self.state.preferred],
        }

    # ------------------------------------------------------------ inside

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
            start = self.queue_exclusive if "done-before-clear" not in self.omit else self.spawn
            start(changes.clear(self), "leg fault")


