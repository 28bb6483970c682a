"""The real engines against a deliberately dumb model: whatever the order of things, the legs end up equal and right.

Hypothesis chooses which outstanding effect happens next: a leg write lands, a copier read or write happens, a message
arrives, a transaction commits, a client begins a write. The first thing it must never find is nbdkit's cow-on-read
flaw (FACTS 2): a copy that read old data lands after a newer write was acknowledged.
"""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET
from shadowvol.core.member import DoFlush, DoPrepare, MemberEngine, Send
from shadowvol.core.messages import Ask, LogZones, Reply, UnlogZones
from shadowvol.core.records import Keys, LegRecord, VolumeConfig, creation_txn, decode_volume, leadership_txn
from shadowvol.core.steps import (
    CommandDone,
    CopyResult,
    DoCancel,
    DoCopierFlush,
    DoCopy,
    DoPersist,
    DoProbe,
    SendTo,
)
from shadowvol.core.windows import Limits
from tests.support.memory_coordinator import MemoryStore

BLOCKS = 8
LIMITS = Limits(
    window_bytes=4,
    window_bytes_max=4,
    window_regions=2,
    windows_copying=2,
    windows_open=3,
    flush_delay_s=0.0,
    touched_small_bytes=1,
    part_bytes=2,
)


class Machine:
    """One host, no faults, no clock: a pool of things that may happen, in any order."""

    def __init__(self) -> None:
        self.legs = [[0] * BLOCKS, [-1] * BLOCKS]
        self.model = [0] * BLOCKS
        self.pool: list[Callable[[], None]] = []
        self.now = 0.0
        self.value = 0
        self.open_writes = 0
        leg = LegRecord("", "", BLOCKS)
        self.store = MemoryStore()
        self.store.commit(creation_txn(VolumeConfig("v", "block", BLOCKS, 2, leg, leg, 1, 4)))
        self.store.commit(leadership_txn("v", self.record(), "h"))
        self.leader = LeaderEngine(self.record(), "h", limits=LIMITS)
        self.member = MemberEngine(self.leader.geometry, 1, align_bytes=1)
        self.leader.on_copier(True, 0.0)
        self.leader.on_member_up("h", 1, 0.0)
        self.waiting: list[Callable[[], bool]] = []
        self.pump()
        self.settle()
        self.leader.command(1, "start", {}, self.now)
        self.pump()

    def record(self) -> Any:
        return decode_volume("v", self.store.read(Keys("v").prefix).entries)

    # ---- effects become things that may happen ----

    def pump(self) -> None:
        """Turn effects into pool entries; wake writes that wait."""
        again = True
        while again:
            again = False
            for effect in self.leader.take_effects():
                again = True
                self._leader_effect(effect)
            for wish in self.member.take_effects():
                again = True
                self._member_effect(wish)
            for ready in list(self.waiting):
                if ready() and ready in self.waiting:
                    self.waiting.remove(ready)
                    again = True

    def may(self, action: Callable[[], None]) -> None:
        self.pool.append(action)

    def _leader_effect(self, effect: Any) -> None:
        if isinstance(effect, SendTo):
            self.may(lambda: self.member.receive(effect.message, self.now))
        elif isinstance(effect, DoPersist):
            self.may(lambda: self.leader.on_persisted(effect.token, self.store.commit(effect.txn).ok, self.now))
        elif isinstance(effect, DoCopy):
            blocks = [block for start, end in effect.step.extents for block in range(start, end)]
            self._copy(effect, blocks)
        elif isinstance(effect, DoCopierFlush):
            self.may(lambda: self.leader.on_job_done(effect.job, {}, self.now))
        elif isinstance(effect, DoProbe):
            self.may(lambda: self.leader.on_job_done(effect.job, effect.step.end, self.now))
        else:
            assert isinstance(effect, CommandDone | DoCancel), effect

    def _copy(self, effect: DoCopy, blocks: list[int]) -> None:
        """Each block is read, and later written, each an event of its own."""
        step = effect.step
        if not blocks:
            self.may(lambda: self.leader.on_job_done(effect.job, CopyResult(True), self.now))
            return

        def read() -> None:
            value = self.legs[step.from_leg][blocks[0]]

            def write() -> None:
                self.legs[step.to_leg][blocks[0]] = value
                self._copy(effect, blocks[1:])

            self.may(write)

        self.may(read)

    def _member_effect(self, effect: Any) -> None:
        if isinstance(effect, Send):
            message = effect.message
            if isinstance(message, Ask) and isinstance(message.want, LogZones | UnlogZones):
                self.may(lambda: self.member.receive(Reply(message.incarnation, message.number), self.now))
            else:
                self.may(lambda: self.leader.on_member_message("h", message, self.now))
        elif isinstance(effect, DoFlush):
            ticket = self.member.begin_flush(effect.token)
            assert ticket is not None
            self.may(lambda: self.member.finish_flush(ticket, {}))
        else:
            assert isinstance(effect, DoPrepare)
            self.may(lambda: self.member.prepared(effect.token, None))

    # ---- the client ----

    def write(self, start: int, length: int) -> None:
        end = min(BLOCKS, start + length)
        self.value += 1
        value = self.value
        self.open_writes += 1

        def admitted() -> bool:
            ticket = self.member.admit_write(start, end)
            if ticket is None:
                return False
            todo = [
                (leg, block)
                for leg in (TARGET, SOURCE)
                for a, b, legs in ticket.runs
                if legs & (1 << leg)
                for block in range(a, b)
            ]
            self._land(ticket, start, end, value, todo)
            return True

        self.waiting.append(admitted)
        self.pump()

    def _land(self, ticket: Any, start: int, end: int, value: int, todo: list[tuple[int, int]]) -> None:
        if todo:

            def land() -> None:
                leg, block = todo[0]
                self.legs[leg][block] = value
                self._land(ticket, start, end, value, todo[1:])

            self.may(land)
            return

        def finish() -> None:
            self.member.finish_write(ticket, start, end, [])
            assert ticket.settled and ticket.error is None
            self.model[start:end] = [value] * (end - start)
            self.open_writes -= 1

        self.may(finish)

    # ---- running ----

    def happen(self, choice: int) -> None:
        if self.pool:
            self.pool.pop(choice % len(self.pool))()
            self.pump()

    def settle(self) -> None:
        """Let everything happen, oldest first; time passes only when nothing else does."""
        for _ in range(5000):
            if self.pool:
                self.happen(0)
            else:
                self.now += 0.3
                self.leader.tick(self.now)
                self.member.tick(self.now)
                self.pump()
                if not self.pool and not self.waiting:
                    return
        raise AssertionError("it does not come to rest")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(1, 4)),
        st.tuples(st.just("happen"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("late"), st.integers(0, 40), st.just(0)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(ACTIONS)
def test_any_interleaving_of_writes_and_copying_ends_with_equal_and_right_legs(actions: list[Any]) -> None:
    machine = Machine()
    for action, number, length in actions:
        if action == "write" and machine.open_writes < 4:
            machine.write(number, length)
        elif action == "late":
            machine.happen(-1 - number)  # newest first: what is old stays outstanding
        else:
            machine.happen(number)
    machine.settle()
    assert machine.open_writes == 0
    assert machine.leader.map.count_both() == len(machine.leader.map), "the copy did not come to its end"
    assert bytes(machine.record().map.bits) == bytes([BOTH_OK]) * len(machine.leader.map)
    assert machine.legs[SOURCE] == machine.model
    assert machine.legs[TARGET] == machine.model


def test_a_copy_that_read_old_data_never_survives_a_newer_acknowledged_write() -> None:
    """nbdkit's cow-on-read flaw, step by step: copier reads, write is acknowledged, the copier's stale block lands."""
    machine = Machine()
    reads: list[Callable[[], None]] = []
    for _ in range(200):  # until the copier has a block in its hands
        before = list(machine.pool)
        index = next((i for i, action in enumerate(before) if action.__name__ == "write"), None)
        if index is not None:
            reads.append(machine.pool.pop(index))
            break
        machine.happen(0)
    assert reads, "the copier never held a block"
    machine.write(0, BLOCKS)
    for _ in range(400):
        if machine.open_writes == 0:
            break
        index = next(i for i, a in enumerate(machine.pool) if a.__name__ != "write")
        machine.happen(index)
    assert machine.open_writes == 0, "the write was not acknowledged while the copier held its stale block"
    reads[0]()
    machine.pump()
    machine.settle()
    assert machine.legs[TARGET] == machine.legs[SOURCE] == machine.model == [1] * BLOCKS
