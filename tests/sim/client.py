"""The applications of a simulated run: threads that read, write and flush, and tell the history what they saw.

Where a member has a filter, a request goes to it first (tests/sim/filter_io.py), as in the product; what it lets
through or hands over, and all requests where there is none, go the way of nbd/datapath.py: admit or claim, do, finish.
"""

from collections.abc import Callable

from shadowvol.core.inflight import READ, WRITE, Ticket
from tests.sim import filter_io
from tests.sim.filter_model import Op
from tests.sim.history import WriteOp
from tests.sim.member import Member
from tests.sim.world import World


class Client:
    """One application thread on one host: a request at a time, again after its member comes back."""

    def __init__(self, world: World, host: str, number: int) -> None:
        self.world = world
        self.host = host
        self.number = number
        self.operations = 0
        self.idle = True

    def start(self) -> None:
        self.world.at(self.world.rng.random() * 0.05, self.next)

    def next(self) -> None:
        world, rng = self.world, self.world.rng
        self.idle = True
        member = world.members[self.host]
        if world.stopping:
            return
        if member is None or not member.alive or world.now < member.paused_until:
            world.at(0.02, self.next)
            return
        self.idle = False
        self.operations += 1
        roll = rng.random()
        if roll < world.profile.flush_share:
            self.flush(member)
        elif roll < world.profile.flush_share + world.profile.read_share:
            self.read(member)
        elif world.now > 0.5 + world.profile.writes_end_s:
            self.again()
        else:
            self.write(member)
        # A client whose member dies starts over when it is back.
        self._watch(member, self.operations, world.power_epoch)

    def _watch(self, member: Member, operation: int, power: int) -> None:
        world = self.world
        if power != world.power_epoch or self.idle or operation != self.operations:
            return
        if not member.alive:
            self.next()
            return
        world.at(0.05, lambda: self._watch(member, operation, power))

    def again(self) -> None:
        world = self.world
        self.idle = True
        if world.now < world.quiet_until:
            world.at(world.quiet_until - world.now + 0.01, self.next)
        else:
            world.at(world.rng.random() * world.profile.think_s, self.next)

    def _range(self) -> tuple[int, int]:
        world, rng = self.world, self.world.rng
        size = world.geometry.size_bytes
        if rng.random() < world.profile.whole_writes:
            start = rng.randrange(0, size, 2)
            return start, min(size, start + 2 * rng.randint(1, 2))
        start = rng.randrange(min(size, world.profile.span_blocks))
        return start, min(size, start + rng.randint(1, 3))

    def _lock(self, start: int, end: int) -> int:
        """Lock as many blocks of [start, end) as no other host is writing: without a lock, nothing is defined."""
        for block in range(start, end):
            if not self.world.lock(self.host, block):
                return block
        return end

    def write(self, member: Member) -> None:
        world = self.world
        start, end = self._range()
        end = self._lock(start, end)
        if end == start:
            world.coverage["another host held the block"] += 1
            self.again()
            return
        values: dict[int, int] = {}
        writes: list[WriteOp] = []
        for block in range(start, end):
            world.value += 1
            values[block] = world.value
            write = WriteOp(world.value, self.host, world.now)
            writes.append(write)
            world.history.wrote(block, write)
        ticket: list[Ticket] = []
        op: list[Op] = []  # of the filter, while it is in its table
        failed: list[tuple[int, int, int]] = []
        legs_left: list[tuple[int, int, int]] = []
        name = f"client {self.number}@{self.host} write [{start},{end}) = {writes[0].value}.."

        def admitted() -> bool:
            made = member.admit_write(start, end)
            if made is None:
                return False
            begin(made)
            return True

        def let_through(entered: Op) -> None:
            op.append(entered)
            made, done = member.claim(entered, WRITE)
            if made is None:
                world.wait(member, admitted)
            elif done:
                ticket.append(made)
                finish()
            else:
                begin(made)

        def begin(made: Ticket) -> None:
            ticket.append(made)
            first = 1 - member.engine.preferred
            for leg in (first, 1 - first):
                legs_left.extend((leg, a, b) for a, b, legs in made.runs if legs & (1 << leg))
            world.note(f"{name} admitted to {made.runs}")
            world.at(0, next_leg)

        def next_leg() -> None:
            if not member.alive:
                return
            if not legs_left:
                finish()
                return
            leg, a, b = legs_left.pop(0)

            def landed(ok: bool) -> None:
                if not ok:
                    failed.append((leg, a, b))
                    world.coverage["leg write failed"] += 1
                    world.event("write faulted")
                next_leg()

            world.leg_write(member, leg, {block: values[block] for block in range(a, b)}, landed)

        def finish() -> None:
            member.finish_write(ticket[0], start, end, failed, "EIO")
            world.wait(member, settled)

        def settled() -> bool:
            if not ticket[0].settled:
                return False
            if op:
                assert member.filter is not None
                member.filter.leave(op[0])
            if failed and ticket[0].error is None:
                world.coverage["write succeeded although a leg failed"] += 1
            answered(ticket[0].error)
            return True

        def answered(error: str | None) -> None:
            if error is None:
                for write in writes:
                    write.end = world.now
            else:
                for write in writes:
                    write.failed = True
                world.coverage["write answered with an error"] += 1
            world.note(f"{name} answered {error or 'ok'}")
            world.unlock(range(start, end))
            self.again()

        if member.filter is None:
            world.wait(member, admitted)
        else:
            filter_io.write(world, member, start, end, values, lambda: answered(None), let_through)

    def read(self, member: Member) -> None:
        world = self.world
        start, end = self._range()
        began = world.now
        op: list[Op] = []  # of the filter, while it is in its table

        def attempt(tries: int) -> None:
            def admitted() -> bool:
                made = member.admit_read(start, end)
                if made is None:
                    return False
                made.tries = tries
                self._read_runs(member, made, list(made.runs), {}, ended)
                return True

            world.wait(member, admitted)

        def let_through(entered: Op | None, got: dict[int, int]) -> None:
            if entered is None:
                attempt(0)
                return
            op.append(entered)
            made, done = member.claim(entered, READ)
            assert made is not None
            self._read_runs(member, made, [] if done else list(made.runs), got, ended)

        def ended(ticket: Ticket, got: dict[int, int]) -> None:
            if ticket.retry:
                world.coverage["read moved to the other leg after an error"] += 1
                attempt(ticket.tries)
                return
            if op:
                assert member.filter is not None
                member.filter.leave(op[0])
            if ticket.error is None:
                answered(got)
            else:
                self.again()

        def answered(got: dict[int, int]) -> None:
            for block, value in got.items():
                world.history.blocks[block].reads.append((value, began, world.now))
            world.note(f"client {self.number}@{self.host} read [{start},{end}) = {[got[b] for b in sorted(got)]}")
            self.again()

        if member.filter is None:
            attempt(0)
        else:
            filter_io.read(world, member, start, end, answered, let_through)

    def _read_runs(
        self,
        member: Member,
        ticket: Ticket,
        left: list[tuple[int, int, int]],
        got: dict[int, int],
        ended: Callable[[Ticket, dict[int, int]], None],
    ) -> None:
        """Read the runs in `left` beside what is in `got`."""
        world = self.world
        failed: list[tuple[int, int, int]] = []

        def next_run() -> None:
            if not left:
                member.finish_read(ticket, failed, "EIO" if failed else "")
                world.wait(member, settled)
                return
            a, b, leg_bit = left.pop(0)
            leg = leg_bit - 1

            def fetched(values: dict[int, int] | None) -> None:
                if values is None:
                    failed.append((leg, a, b))
                    world.coverage["leg read failed"] += 1
                else:
                    got.update(values)
                next_run()

            world.leg_read(member, leg, range(a, b), fetched)

        def settled() -> bool:
            if ticket.settled:
                ended(ticket, got)
            return ticket.settled

        next_run()

    def flush(self, member: Member) -> None:
        world = self.world
        began = world.now

        def done(ticket) -> None:
            if ticket.error is None:
                world.history.flushed(self.host, began)
                world.event("flush answered")
            else:
                world.history.flush_failed(self.host)
                world.coverage["flush answered with an error"] += 1
            self.again()

        world.flush(member, 0, done)
