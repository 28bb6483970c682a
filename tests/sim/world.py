"""The simulated world: virtual clock, hosts with agents and members, one coordinator, two disks, an unreliable network.

The engines are the product's own; this module performs their effects. Everything random comes from one seeded
generator, so a seed replays exactly. Members, leaders and the copier can be killed, paused and restarted, messages
between hosts are lost, repeated and overtaken; transactions take time; all may lose power.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shadowvol.core import commands, windows
from shadowvol.core.activity import ZONES_EXPECTED_MAX
from shadowvol.core.geometry import Geometry
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET, Phase
from shadowvol.core.member import DoFlush, DoPrepare, FlushTicket, MemberEngine, Send
from shadowvol.core.messages import Answer, Ask, LogZones, Reply, Request, UnlogZones
from shadowvol.core.records import (
    ActivityLog,
    Keys,
    LegRecord,
    VolumeConfig,
    creation_txn,
    decode_volume,
    decode_zones,
    leadership_txn,
)
from shadowvol.core.steps import (
    CommandDone,
    CopyResult,
    Deposed,
    DoCancel,
    DoCopierFlush,
    DoCopy,
    DoPersist,
    DoProbe,
    SendTo,
)
from tests.sim.disk import Disk
from tests.sim.filter_model import FilterModel
from tests.sim.history import History
from tests.sim.member import Member
from tests.support.memory_coordinator import MemoryStore

NAME = "vol"
IDLE_S = 0.4  # zones are cleaned this long after their last write
TICK_S = 0.05
LIMITS = windows.Limits(
    window_bytes=6,
    window_bytes_max=6,
    window_regions=4,
    windows_copying=3,
    windows_open=5,
    flush_delay_s=0.0,
    touched_small_bytes=1,
    part_bytes=2,
)


@dataclass
class Profile:
    """What a run may do. Rates are per virtual second; probabilities per occasion."""

    hosts: int = 1
    regions: int = 8
    clients: int = 2
    duration_s: float = 4.0
    io_s: float = 0.006  # longest I/O of a leg
    think_s: float = 0.02
    lose: float = 0.05  # messages between agent and member
    repeat: float = 0.05
    message_s: float = 0.004
    slow_message: float = 0.02  # probability of a delay of up to 0.4 s
    commands: float = 2.0
    member_kill: float = 0.15
    leader_kill: float = 0.15
    zombie: float = 0.3  # a replaced leader goes on for a while
    power_loss: float = 0.15
    leg_faults: float = 0.4
    flush_faults: float = 0.5  # of leg faults
    copier_kill: float = 0.1
    member_pause: float = 0.1
    quiet: float = 0.2  # clients pause: zones get idle
    start_at_once: bool = True
    flush_share: float = 0.1
    read_share: float = 0.4
    whole_writes: float = 0.15
    verbs: tuple[str, ...] = ("start", "cutover", "undo", "commit", "abort", "pause", "resume", "cutover", "undo")
    span_blocks: int = 1000  # small writes start below this: a small span makes them meet
    copier_faults: float = 0.5  # of the legs' faults, how many meet the copier as well
    both_legs: float = 0.15  # probability that a fault of one leg is one of the other, too
    writes_end_s: float = 1e9  # no writes are begun after this long
    copy_s: float = 0.008  # longest time between the copier's read of a block and its write
    slow_ask: float = 0.02  # probability that a member's ask takes up to 1 s more
    fail_kinds: tuple[tuple[float, float], ...] = ((0.5, 0.0), (0.0, 0.5), (1.0, 1.0), (0.3, 0.3))  # write, read
    slow_hold: float = 0.1  # probability that a copy under a hold is slower than the hold limit
    copier_stall: float = 0.01  # probability per block that its write lands up to 0.6 s later
    persist_s: float = 0.012  # longest transaction
    slow_persist: float = 0.02  # probability that one takes up to 0.5 s (its leader or the coordinator was paused)
    log_s: float = 0.01  # longest transaction of an activity log
    announce_s: float = 0.05  # longest time until a leader hears of a member
    shared_cache: float = 0.5  # probability that a disk's cache is shared by all who have it open
    trouble_at: tuple[tuple[str, str, float], ...] = (
        ("bits set", "power", 0.02),
        ("flush answered", "power", 0.002),
        ("zones unlogged", "power", 0.01),
        ("zones unlogged", "kill member", 0.01),
        ("write faulted", "kill leader", 0.02),
        ("write faulted", "kill member", 0.02),
        ("committed", "kill leader", 0.05),
        ("member started", "kill leader", 0.05),
    )  # (event, what happens within trouble_s after it, with which probability)
    trouble_s: float = 0.05
    members_may_stay_away: bool = False  # else all are back soon, and no verb has to give up
    zones_expected_max: int = ZONES_EXPECTED_MAX  # of a window that are logged when it opens
    log_empties: bool = True  # at the end, within the time in which everything must come to rest
    filtered: bool = False  # members have the C filter's model in front of their engines
    lock_s: float = 0.002  # longest wait of one of the filter's threads: for its lock, for a processor, for the engine


@dataclass(eq=False)
class Leader:
    engine: LeaderEngine
    host: str
    alive: bool = True
    zombie: bool = False
    copier_alive: bool = False
    copier_number: int = 0
    failures_seen: int = 0
    goal_seen: str | None = None
    doubt_seen: bool = False
    copier_jobs: int = 0
    stop_notified: bool = True
    cancelled: set[int] = field(default_factory=set)

    @property
    def opener(self) -> str:
        return f"copier.{self.engine.epoch}.{self.copier_number}"


class World:
    def __init__(self, seed: int, profile: Profile, omit: frozenset[str] = frozenset(), trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.profile = profile
        self.omit = omit
        self.trace: list[str] | None = [] if trace else None
        self.now = 0.0
        self.coverage: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.geometry = Geometry(profile.regions * 2, 2, 1, 4)
        blocks = self.geometry.size_bytes
        shared = [self.rng.random() < profile.shared_cache for _ in range(2)]
        self.disks = (Disk("source", blocks, self.rng, shared[0]), Disk("target", blocks, self.rng, shared[1]))
        for disk_block in range(blocks):
            self.disks[TARGET].cache[disk_block] = self.disks[TARGET].durable[disk_block] = -1
        self.history = History(blocks)
        self.store = MemoryStore()
        leg = LegRecord("", "", blocks)
        config = VolumeConfig(NAME, "block", blocks, 2, leg, leg, block_bytes=1, zone_bytes=4)
        self.config = config
        self.store.commit(creation_txn(config))
        self.hosts = [f"h{number}" for number in range(profile.hosts)]
        self.members: dict[str, Member | None] = dict.fromkeys(self.hosts)
        self.incarnation = 0
        self.leader: Leader | None = None
        self.zombies: list[Leader] = []
        self.logs: dict[str, ActivityLog] = {}
        self.log_busy: dict[str, list[Callable[[], None]]] = {}
        self.log_queued: list[tuple[str, Ask]] = []
        self.value = 0
        self.command_number = 0
        self.commands_open: dict[int, str] = {}
        self.answers: dict[int, tuple[float, int, str]] = {}  # of commands: when, exit code, text
        self.calm = False
        self.stopping = False
        self.power_epoch = 0
        self.dead_logs: dict[str, int] = {}
        self.quiet_until = 0.0
        self.power_at: float | None = None
        self.locked: dict[int, tuple[str, int]] = {}  # block -> host whose application is writing it, times

    # ------------------------------------------------------------ clock

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay, self._order, action))

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {text}")

    def run_until(self, until: float, stop: Callable[[], bool] | None = None) -> bool:
        while self._heap and self._heap[0][0] <= until:
            when, _, action = heapq.heappop(self._heap)
            self.now = when
            action()
            if stop is not None and stop():
                return True
        self.now = until
        return stop is not None and stop()

    def event(self, name: str) -> None:
        """Something has happened after which trouble may be interesting."""
        if self.calm:
            return
        for event, what, probability in self.profile.trouble_at:
            if event == name and self.rng.random() < probability:
                self.coverage[f"{what} after: {name}"] += 1
                self.at(self.rng.random() * self.profile.trouble_s, lambda what=what: self._trouble(what))  # type: ignore[misc]

    def _trouble(self, what: str) -> None:
        if what == "power":
            self.power_at = self.now
            self.at(0, lambda: None)
        elif what == "kill member":
            self.kill_member(self.rng.choice(self.hosts))
        elif what == "kill copier":
            self.kill_copier()
        elif what == "flushes fail":
            for disk in self.disks:
                disk.fail_flush = 1.0
                self.at(0.04, lambda disk=disk: setattr(disk, "fail_flush", 0.0))  # type: ignore[misc]
        elif what == "target's flushes fail":
            self.disks[TARGET].fail_flush = 1.0
            self.at(0.04, lambda: setattr(self.disks[TARGET], "fail_flush", 0.0))
        elif what == "target fails writes":
            self.disks[TARGET].fail_write = 0.7
            self.at(0.15, lambda: setattr(self.disks[TARGET], "fail_write", 0.0))
        else:
            self.kill_leader(self.rng.random() < self.profile.zombie)

    # ------------------------------------------------------------ network

    def carry(self, action: Callable[[], None], *, lossy: bool = True, delay: float = 0.0) -> None:
        """Deliver a message, or not, or twice."""
        profile, rng = self.profile, self.rng
        copies = 1
        if lossy and not self.calm:
            roll = rng.random()
            if roll < profile.lose:
                self.coverage["message lost"] += 1
                return
            if roll < profile.lose + profile.repeat:
                self.coverage["message repeated"] += 1
                copies = 2
        for _ in range(copies):
            took = rng.random() * profile.message_s
            if lossy and not self.calm and rng.random() < profile.slow_message:
                took = rng.random() * 0.4
            self.at(delay + took, action)

    # ------------------------------------------------------------ the applications' own locks

    def lock(self, host: str, block: int) -> bool:
        """Hosts do not write a block at the same time; False: another one does."""
        owner, times = self.locked.get(block, (host, 0))
        if owner == host:
            self.locked[block] = (host, times + 1)
        return owner == host

    def unlock(self, blocks: range) -> None:
        for block in blocks:
            owner, times = self.locked.pop(block)
            if times > 1:
                self.locked[block] = (owner, times - 1)

    # ------------------------------------------------------------ members

    def start_member(self, host: str) -> None:
        if self.members[host] is not None:
            return
        self.incarnation += 1
        engine = MemberEngine(
            self.geometry,
            self.incarnation,
            align_bytes=1,
            idle_s=IDLE_S,
            zones_expected_max=self.profile.zones_expected_max,
            omit=self.omit,
        )
        member = Member(host, engine, self.omit)
        if self.profile.filtered:
            member.put_filter_in_front(FilterModel(self.geometry, self.rng, partial(self.soon, member), self.omit))
        self.members[host] = member
        for disk in self.disks:
            disk.openers.add(member.opener)
        self.note(f"member {host} starts as {self.incarnation}")
        self._member_tick(member)
        self.at(self.rng.random() * self.profile.announce_s, lambda: self._announce(member))
        self.event("member started")

    def soon(self, member: Member, step: Callable[[], None]) -> None:
        """A thread of the member's filter gets a lock, or a processor."""
        self.at(self.rng.random() * self.profile.lock_s, lambda: step() if member.alive else None)

    def _announce(self, member: Member) -> None:
        leader = self.leader
        if leader is not None and member.alive:
            known = leader.engine.unresolved.get(member.host) or leader.engine.live.get(member.host)
            if known is not None and known != member.engine.incarnation:
                self._tell_gone(member.host)
            leader.engine.on_member_up(member.host, member.engine.incarnation, self.now)
            self.pump_leader(leader)

    def _member_tick(self, member: Member) -> None:
        """A shell may leave out the ticks of an engine at rest: they must come to nothing."""
        if not member.alive:
            return
        if self.now >= member.paused_until:
            self.pump_member(member)  # what a pause has put off
            at_rest = member.engine.at_rest
            self.coverage["member at rest"] += at_rest
            member.tick(self.now)
            effects = member.engine.take_effects()
            if at_rest and effects:
                raise AssertionError("a member at rest acted on a tick")
            for effect in effects:
                self._member_effect(member, effect)
            self.pump_member(member)
            for ask in member.engine.outstanding():
                if self.rng.random() < 0.1:
                    self._member_says(member, ask)
        self.at(TICK_S, lambda: self._member_tick(member))

    def kill_member(self, host: str) -> None:
        """kill -9: what was on its way to a leg lands in part; the lock is free a little later."""
        member = self.members[host]
        if member is None or not member.alive:
            return
        owes = member.flush_failing or member.engine.owes_error()
        if owes or any(disk.must_tell(member.opener) for disk in self.disks):
            # The known limit (DESIGN 9), a double fault: a leg has lost what this member wrote, and it dies before
            # it could record that or tell the application; its successor's flushes succeed.
            self.coverage["kill put off: a failed flush is not told yet"] += 1
            self.at(0.05, lambda: self.kill_member(host))
            return
        self.note(f"member {host} {member.engine.incarnation} is killed")
        member.alive = False
        for disk, block, value in member.pending_puts:
            if self.rng.random() < 0.5:
                disk.put(block, value, host, member.opener)
        member.pending_puts.clear()
        self.locked = {block: owner for block, owner in self.locked.items() if owner[0] != host}
        self._clients_lost(member)
        for disk in self.disks:
            disk.openers.discard(member.opener)
            disk.orphan(host)
        power = self.power_epoch
        self.at(self.rng.random() * 0.05, lambda: self._bury(member, power))

    def _clients_lost(self, member: Member) -> None:
        member.waiting.clear()

    def _bury(self, member: Member, power: int) -> None:
        if power != self.power_epoch or self.members[member.host] is not member:
            return
        self.dead_logs[member.host] = member.engine.incarnation
        self.members[member.host] = None
        self._tell_gone(member.host)
        self.at(self.rng.random() * 0.3, lambda: self.start_member(member.host) if power == self.power_epoch else None)

    def _tell_gone(self, host: str) -> None:
        leader = self.leader
        if leader is None:
            return
        leader.engine.on_member_gone(host, self.activity_log(host).runs(), self.now)
        self.pump_leader(leader)

    def pump_member(self, member: Member) -> None:
        """Perform effects, wake waiters, until nothing changes."""
        if member.pumping:
            return
        member.pumping = True
        progress = True
        while progress and member.alive and self.now >= member.paused_until:
            progress = False
            for effect in member.engine.take_effects():
                progress = True
                self._member_effect(member, effect)
            for waiter in list(member.waiting):
                if waiter() and waiter in member.waiting:
                    member.waiting.remove(waiter)
                    progress = True
        member.pumping = False

    def wait(self, member: Member, ready: Callable[[], bool]) -> None:
        member.waiting.append(ready)
        self.pump_member(member)

    def _member_effect(self, member: Member, effect: Any) -> None:
        if isinstance(effect, Send):
            self._member_says(member, effect.message)
        elif isinstance(effect, DoFlush):
            self.flush(member, effect.token, lambda ticket: None)
        elif isinstance(effect, DoPrepare):
            self.at(self.rng.random() * 0.01, lambda: self._prepared(member, effect.token))

    def _prepared(self, member: Member, token: int) -> None:
        if member.alive:
            member.prepared(token, None)
            self.pump_member(member)

    def _member_says(self, member: Member, message: Any) -> None:
        if isinstance(message, Answer):
            if message.body.get("unbroken") is False:
                self.coverage["hold broken"] += 1
            if message.body.get("fresh") and member.engine.fresh_allowed:
                self.coverage["fresh region spared its copy"] += 1
            if message.body.get("faults"):
                self.coverage["fault found open while preparing a change"] += 1
            if message.body.get("no"):
                self.coverage[f"refused: {message.body['no']}"] += 1
        if isinstance(message, Ask) and isinstance(message.want, LogZones | UnlogZones):
            want = message.want
            self.carry(lambda: self._log_zones(member, message, want), lossy=False)
            return
        slow = isinstance(message, Ask) and not self.calm and self.rng.random() < self.profile.slow_ask
        delay = self.rng.random() if slow else 0.0
        leader = self.leader
        if leader is not None:
            self.carry(lambda: self._leader_hears(leader, member.host, message), delay=delay)
        for zombie in self.zombies:
            self.carry(lambda zombie=zombie: self._leader_hears(zombie, member.host, message))

    def _leader_hears(self, leader: Leader, host: str, message: Any) -> None:
        if leader.alive:
            leader.engine.on_member_message(host, message, self.now)
            self.pump_leader(leader)

    # ------------------------------------------------------------ activity log (the host's agent)

    def activity_log(self, host: str) -> ActivityLog:
        """The host's durable log, as its agent reads it."""
        zones: set[int] = set()
        for entry in self.store.read(Keys(NAME).activity(host)).entries.values():
            zones |= decode_zones(entry.value, 0)
        return ActivityLog(NAME, host, zones)

    def _log_zones(self, member: Member, ask: Ask, want: LogZones | UnlogZones) -> None:
        """One transaction after the other per host, as an agent does."""
        queue = self.log_busy.setdefault(member.host, [])
        if (member.host, ask) in self.log_queued:
            return  # a repetition of what is waiting already
        self.log_queued.append((member.host, ask))
        queue.append(lambda: self._log_one(member, ask, want))
        if len(queue) == 1:
            queue[0]()

    def _log_one(self, member: Member, ask: Ask, want: LogZones | UnlogZones) -> None:
        host = member.host
        power = self.power_epoch
        log = self.activity_log(host)
        add, remove = (want.zones, []) if isinstance(want, LogZones) else ([], want.zones)
        already = member.engine.incarnation == self.dead_logs.get(host)
        txn = log.txn(add, remove, member.engine.incarnation)

        def committed() -> None:
            if power != self.power_epoch:
                return
            if ask in member.engine.outstanding() and not already:
                result = self.store.commit(txn)
                if result.ok and isinstance(want, UnlogZones):
                    self.coverage["zones left the log"] += 1
                    self.event("zones unlogged")
                if result.ok:
                    self.carry(lambda: self._member_hears(member, Reply(ask.incarnation, ask.number)), lossy=False)
            self.log_queued.remove((host, ask))
            queue = self.log_busy[host]
            queue.pop(0)
            if queue:
                queue[0]()

        self.at(0.0005 + self.rng.random() * self.profile.log_s, committed)

    def _member_hears(self, member: Member, message: Request | Reply) -> None:
        if not member.alive:
            return
        if self.now < member.paused_until:
            self.at(member.paused_until - self.now + 0.0001, lambda: self._member_hears(member, message))
            return
        member.receive(message, self.now)
        self.pump_member(member)

    # ------------------------------------------------------------ leg I/O

    def leg_write(self, member: Member, leg: int, values: dict[int, int], done: Callable[[bool], None]) -> None:
        disk, rng = self.disks[leg], self.rng
        length = rng.random() * self.profile.io_s
        if rng.random() < disk.fail_write:
            disk.faults += 1
            values = {block: value for block, value in values.items() if rng.random() < 0.3}
            ok = False
        else:
            ok = True
        for block, value in values.items():
            entry = (disk, block, value)
            member.pending_puts.append(entry)
            self.at(rng.random() * length, lambda entry=entry: self._land(member, entry))
        self.at(length + 0.00001, lambda: done(ok) if member.alive else None)

    def _land(self, member: Member, entry: tuple[Disk, int, int]) -> None:
        if entry in member.pending_puts:
            member.pending_puts.remove(entry)
            entry[0].put(entry[1], entry[2], member.host, member.opener)

    def leg_read(self, member: Member, leg: int, blocks: range, done: Callable[[dict[int, int] | None], None]) -> None:
        disk, rng = self.disks[leg], self.rng
        length = rng.random() * self.profile.io_s
        got: dict[int, int] = {}
        failing = rng.random() < disk.fail_read
        for block in blocks:
            self.at(rng.random() * length, lambda block=block: got.__setitem__(block, disk.cache[block]))

        def finish() -> None:
            if member.alive:
                if failing:
                    disk.faults += 1
                done(None if failing else got)

        self.at(length + 0.00001, finish)

    def flush(self, member: Member, token: int, done: Callable[[FlushTicket], None]) -> None:
        ticket: list[FlushTicket] = []
        told: list[int] = []

        def begin() -> bool:
            made = member.begin_flush(token, self.now)
            if made is None:
                return False
            ticket.append(made)
            self.at(self.rng.random() * self.profile.io_s, perform)
            return True

        def perform() -> None:
            if not member.alive:
                return
            failed = {}
            for leg in (SOURCE, TARGET):
                if ticket[0].legs & (1 << leg) and not self.disks[leg].flush(member.opener, member.host):
                    failed[leg] = "flush failed"
                    self.coverage["flush failed"] += 1
            member.flush_failing += bool(failed)
            self.note(f"flush {member.opener} token {token} legs {ticket[0].legs} failed {sorted(failed)}")
            told.extend(failed)
            self.at(self.rng.random() * self.profile.io_s * 0.5, lambda: finish(failed))

        def finish(failed: dict[int, str]) -> None:
            if member.alive:
                member.finish_flush(ticket[0], failed, self.now)
                self.wait(member, settled)

        def settled() -> bool:
            if ticket[0].settled:
                member.flush_failing -= bool(told)
                self.note(f"flush {member.opener} token {token} settled {ticket[0].error}")
                # Answers of one instant: the writes' first, which the flush has waited for.
                self.at(0, lambda: done(ticket[0]) if member.alive else None)
            return ticket[0].settled

        self.wait(member, begin)

    # ------------------------------------------------------------ leaders

    def record(self) -> Any:
        return decode_volume(NAME, self.store.read(Keys(NAME).prefix).entries)

    def start_leader(self) -> None:
        """A new leadership: epoch + 1, then the record is read."""
        if self.leader is not None:
            return
        host = self.rng.choice(self.hosts)
        if not self.store.commit(leadership_txn(NAME, self.record(), host)).ok:
            raise AssertionError("leadership transaction refused")
        engine = LeaderEngine(self.record(), host, limits=LIMITS, omit=self.omit)
        leader = Leader(engine, host)
        self.leader = leader
        self.commands_open.clear()
        self.note(f"leader {host} epoch {engine.epoch}")
        self.coverage["leader started"] += 1
        if engine.transition is not None:
            self.coverage[f"takeover with a transition {engine.transition['state']}"] += 1
        if engine.quarantine:
            self.coverage["takeover with open windows"] += 1
        self._leader_tick(leader)
        for name in self.hosts:
            member = self.members[name]
            if member is not None and member.alive:
                self.at(self.rng.random() * self.profile.announce_s, lambda member=member: self._announce(member))
            elif member is None and name in engine.unresolved:
                self._tell_gone(name)
        self.at(self.rng.random() * 0.2, lambda: self._copier_up(leader))
        self._old_copiers(leader)

    def _old_copiers(self, leader: Leader) -> None:
        """The quarantine ends when no older copier can write any more."""
        if not leader.alive:
            return
        if self.zombies_writing():
            self.at(0.1, lambda: self._old_copiers(leader))
            return
        leader.engine.on_old_copiers_stopped(self.now)
        self.pump_leader(leader)

    def _copier_up(self, leader: Leader) -> None:
        if leader.alive and not leader.copier_alive:
            leader.copier_alive = True
            leader.copier_number += 1
            for disk in self.disks:
                disk.openers.add(leader.opener)
            leader.engine.on_copier(True, self.now)
            self.pump_leader(leader)

    def kill_copier(self) -> None:
        leader = self.leader
        if leader is None or not leader.copier_alive:
            return
        self.coverage["copier killed"] += 1
        leader.copier_alive = False
        self._await_copier_end(leader)

    def _await_copier_end(self, leader: Leader) -> None:
        if leader.copier_jobs:
            self.at(0.005, lambda: self._await_copier_end(leader))
            return
        if leader.alive:
            for disk in self.disks:
                disk.openers.discard(leader.opener)
            leader.engine.on_copier(False, self.now)
            self.pump_leader(leader)
            self.at(0.05, lambda: self._copier_up(leader))

    def _leader_tick(self, leader: Leader) -> None:
        """A shell may leave out the ticks of an engine at rest: they must come to nothing."""
        if leader.alive:
            at_rest = leader.engine.at_rest
            self.coverage["leader at rest"] += at_rest
            leader.engine.tick(self.now)
            acted = self.pump_leader(leader)
            if at_rest and acted:
                raise AssertionError("a leader at rest acted on a tick")
            self.at(TICK_S, lambda: self._leader_tick(leader))

    def kill_leader(self, zombie: bool) -> None:
        """The leader dies, or is only cut off: then it goes on for a while although another one leads."""
        leader = self.leader
        if leader is None:
            return
        self.note(f"leader epoch {leader.engine.epoch} {'is cut off' if zombie else 'dies'}")
        self.leader = None
        self.zombies.append(leader)
        if zombie:
            self.coverage["leader cut off, goes on"] += 1
            self.at(0.05 + self.rng.random() * 0.6, lambda: setattr(leader, "alive", False))
        else:
            leader.alive = False
        power = self.power_epoch
        self.at(self.rng.random() * 0.2, lambda: self.start_leader() if power == self.power_epoch else None)

    def pump_leader(self, leader: Leader) -> bool:
        """Perform what the engine wants; whether that was anything."""
        acted = False
        while leader.alive and (effects := leader.engine.take_effects()):
            acted = True
            for effect in effects:
                self._leader_effect(leader, effect)
            self._observe(leader)
        return acted

    def _observe(self, leader: Leader) -> None:
        """Count what the leader has come through."""
        backoff, goal = leader.engine.backoff, leader.engine.state.goal
        if backoff.failures != leader.failures_seen and backoff.failures:
            reason = backoff.reason.rpartition(": ")[2] if backoff.reason.startswith("h") else backoff.reason
            self.coverage[f"window failed: {reason.partition(' (')[0]}"] += 1
        leader.failures_seen = backoff.failures
        if goal != leader.goal_seen:
            self.coverage[f"goal {leader.goal_seen} -> {goal}"] += 1
            leader.goal_seen = goal
        if any(leader.engine.state.doubtful) and not leader.doubt_seen:
            leader.doubt_seen = True
            self.coverage["regions in doubt"] += 1

    def _leader_effect(self, leader: Leader, effect: Any) -> None:
        if isinstance(effect, SendTo):
            member = self.members.get(effect.host)
            if member is not None:
                self.note(f"L{leader.engine.epoch} -> {effect.host}: {_short(effect.message)}")
                self.carry(lambda: self._member_hears(member, effect.message))
        elif isinstance(effect, DoPersist):
            slow = not self.calm and self.rng.random() < self.profile.slow_persist
            longest = 0.5 if slow else self.profile.persist_s
            self.at(0.0005 + self.rng.random() * longest, lambda: self._persist(leader, effect))
        elif isinstance(effect, DoCopy):
            self._copy(leader, effect)
        elif isinstance(effect, DoCancel):
            leader.cancelled.add(effect.job)
        elif isinstance(effect, DoCopierFlush):
            leader.copier_jobs += 1
            self.at(self.rng.random() * 0.02, lambda: self._copier_flush(leader, effect))
        elif isinstance(effect, DoProbe):
            leader.copier_jobs += 1
            end = min(effect.step.end, effect.step.start + effect.step.budget)
            self.at(0.001, lambda: self._job_done(leader, effect.job, end))
        elif isinstance(effect, CommandDone):
            verb = self.commands_open.pop(effect.number, "?")
            self.note(f"command {verb}: {effect.code} {effect.text}")
            self.answers[effect.number] = (self.now, effect.code, effect.text)
            if commands.is_overdue(effect) and not self.profile.members_may_stay_away:
                self.history.problems.append(f"{verb} was overdue at {self.now:.3f}: {effect.text}")
            self.coverage[f"{verb} -> {effect.code}"] += 1
        elif isinstance(effect, Deposed):
            self.coverage["leader deposed"] += 1
            leader.alive = False
            if self.leader is leader:
                self.kill_leader(zombie=False)

    def _persist(self, leader: Leader, effect: DoPersist) -> None:
        if leader.alive:
            result = self.store.commit(effect.txn)
            puts = [key.split("/", 2)[2] for key, _ in effect.txn.puts]
            deletes = [key.split("/", 2)[2] for key in effect.txn.deletes]
            self.note(f"L{leader.engine.epoch} persists {puts} -{deletes}: {result.ok}")
            self._persist_events(leader, puts, deletes, result.ok)
            self.at(0.0002, lambda: self._persisted(leader, effect.token, result.ok))

    def _persist_events(self, leader: Leader, puts: list[str], deletes: list[str], ok: bool) -> None:
        if not ok:
            self.coverage["transaction of a deposed leader refused"] += 1
        elif "map/000000" in puts and any(key.startswith("windows/") for key in deletes) and len(deletes) == 1:
            self.coverage["window's bits set"] += 1
            self.event("bits set")
        elif "map/000000" in puts and not deletes:
            self.event("bits cleared")
        if ok and any(key.startswith("windows/") for key in puts):
            self.event("window opened")
        if ok and deletes and not puts and all(key.startswith("activity/") for key in deletes):
            self.event("log emptied apart")
        if ok and "transition" in puts and "state" in puts:
            self.event("committed")

    def _persisted(self, leader: Leader, token: int, ok: bool) -> None:
        if leader.alive:
            leader.engine.on_persisted(token, ok, self.now)
            self.pump_leader(leader)

    def _job_done(self, leader: Leader, job: int, outcome: Any) -> None:
        leader.copier_jobs -= 1
        if leader.alive and leader.copier_alive:
            leader.engine.on_job_done(job, outcome, self.now)
            self.pump_leader(leader)

    def _copier_flush(self, leader: Leader, effect: DoCopierFlush) -> None:
        failed = {leg: "flush failed" for leg in effect.legs if not self.disks[leg].flush(leader.opener, leader.opener)}
        self.note(f"copier flush legs {effect.legs} failed {sorted(failed)}")
        if failed:
            self.coverage["copier's flush failed"] += 1
        if len(effect.legs) == 2:
            self.event("copier flushed both")
        self.at(self.rng.random() * 0.005, lambda: self._job_done(leader, effect.job, failed))

    def _copy(self, leader: Leader, effect: DoCopy) -> None:
        """Block by block, each read and written at instants of its own; a cancelled job stops between blocks."""
        leader.copier_jobs += 1
        step = effect.step
        legs = f"{step.from_leg}->{step.to_leg}"
        self.note(f"L{leader.engine.epoch} copies {step.extents} {legs}{' urgent' if step.urgent else ''}")
        blocks = [block for start, end in step.extents for block in range(start, end)]
        from_disk, to_disk = self.disks[step.from_leg], self.disks[step.to_leg]
        opener = leader.opener
        speed = 0.3 if step.urgent else 1.0
        if step.urgent and not self.calm and self.rng.random() < self.profile.slow_hold:
            speed = 60.0  # slower than the hold limit

        def read_next(index: int) -> None:
            if index == len(blocks) or effect.job in leader.cancelled:
                ok = effect.job not in leader.cancelled
                self._job_done(leader, effect.job, CopyResult(ok, index, index, None, "" if ok else "cancelled"))
            elif self.rng.random() < from_disk.fail_read * self.profile.copier_faults:
                self._job_done(leader, effect.job, CopyResult(False, 0, 0, step.from_leg, "read error"))
            else:
                value = from_disk.cache[blocks[index]]
                stall = 0.6 if not self.calm and self.rng.random() < self.profile.copier_stall else 0.0
                delay = self.rng.random() * (self.profile.copy_s * speed + stall)
                self.at(delay, lambda: write(index, value))

        def write(index: int, value: int) -> None:
            if self.rng.random() < to_disk.fail_write * self.profile.copier_faults:
                self._job_done(leader, effect.job, CopyResult(False, 0, 0, step.to_leg, "write error"))
                return
            to_disk.put(blocks[index], value, opener, opener)
            self.at(self.rng.random() * self.profile.copy_s * 0.5 * speed, lambda: read_next(index + 1))

        read_next(0)

    # ------------------------------------------------------------ power

    def power_loss(self) -> None:
        """Everything dies at once; disks keep what they please of what was not flushed, the record all but relaxed
        commits at its end."""
        self.note("POWER LOSS")
        self.coverage["power loss"] += 1
        self.power_epoch += 1
        self._heap.clear()
        self.log_busy.clear()
        self.log_queued.clear()
        for host, member in self.members.items():
            if member is not None:
                member.alive = False
                self.dead_logs[host] = member.engine.incarnation
            self.members[host] = None
        if self.leader is not None:
            self.leader.alive = False
        self.leader = None
        self.zombies.clear()
        self.locked.clear()
        for disk in self.disks:
            disk.openers.clear()
            disk.power_loss()
        undone = self.rng.randint(0, self.store.relaxed_count)
        self.coverage["relaxed commits undone by a power loss"] += undone
        self.store.power_loss(undone)
        self.commands_open.clear()
        self.history.power_loss(self.now)
        self.now += 0.1
        self.history.era_start = self.now - 0.05
        for host in self.hosts:
            self.at(self.rng.random() * 0.2, lambda host=host: self.start_member(host))
        self.at(self.rng.random() * 0.2, self.start_leader)

    def zombies_writing(self) -> bool:
        return any(zombie.alive or zombie.copier_jobs for zombie in self.zombies)

    # ------------------------------------------------------------ judgement

    def compare_legs(self) -> None:
        """Where both bits are set and everything is quiet, the legs are equal."""
        record = self.record()
        for region in range(self.geometry.region_count):
            if record.map.bits[region] == BOTH_OK and record.state.phase is Phase.COPYING:
                for block in range(*self.geometry.region_extent(region, region + 1)):
                    source, target = (disk.cache[block] for disk in self.disks)
                    if source != target:
                        self.history.problems.append(f"block {block}: legs differ at rest: {source} and {target}")


def _short(message: Any) -> str:
    if isinstance(message, Reply):
        return f"reply {message.number}"
    return f"{message.subject}#{message.seq} {message.body}"


__all__ = ["Profile", "World"]
