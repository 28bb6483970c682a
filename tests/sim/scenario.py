"""One simulated run: clients, an operator and misfortune on a World, then calm, convergence and judgement."""

from dataclasses import dataclass, replace

from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET, Phase
from tests.sim.client import Client
from tests.sim.world import Profile, World

SETTLE_S = 240.0  # virtual seconds of calm in which everything must converge
CHECK_S = 0.1


@dataclass(frozen=True)
class Outcome:
    problems: list[str]
    coverage: dict[str, int]
    trace: list[str]
    operations: int


def _misfortune(world: World) -> None:
    """Schedule what may go wrong, at the profile's rates."""
    profile, rng = world.profile, world.rng

    def every(rate: float, action) -> None:
        if rate <= 0:
            return

        def fire() -> None:
            if world.stopping:
                return
            action()
            world.at(rng.expovariate(rate), fire)

        world.at(rng.expovariate(rate), fire)

    def leg_trouble() -> None:
        disk = world.disks[rng.randrange(2)]
        if rng.random() < profile.flush_faults:
            disk.fail_flush = 0.5
        else:
            disk.fail_write, disk.fail_read = rng.choice(profile.fail_kinds)
        world.note(f"leg trouble on {disk.name}: {disk.fail_write} {disk.fail_read} {disk.fail_flush}")
        if rng.random() < profile.both_legs:
            other = world.disks[1 - world.disks.index(disk)]
            other.fail_write = 0.2
        world.at(rng.random() * 0.4, calm_legs)

    def calm_legs() -> None:
        for disk in world.disks:
            disk.fail_write = disk.fail_read = disk.fail_flush = 0.0

    def pause_member() -> None:
        member = world.members[rng.choice(world.hosts)]
        if member is not None:
            world.coverage["member paused"] += 1
            member.paused_until = world.now + rng.random() * 0.8

    def be_quiet() -> None:
        world.quiet_until = world.now + 1.0 + rng.random()

    every(profile.leg_faults, leg_trouble)
    every(profile.member_kill, lambda: world.kill_member(rng.choice(world.hosts)))
    every(profile.leader_kill, lambda: world.kill_leader(rng.random() < profile.zombie))
    every(profile.copier_kill, world.kill_copier)
    every(profile.member_pause, pause_member)
    every(profile.quiet, be_quiet)
    every(profile.commands, lambda: operator(world, rng.choice(profile.verbs)))
    if profile.power_loss > 0 and rng.random() < profile.power_loss * profile.duration_s:
        world.power_at = rng.random() * profile.duration_s


def operator(world: World, verb: str) -> None:
    leader = world.leader
    if leader is None or len(world.commands_open) > 3:
        return
    options: dict[str, object] = {}
    if verb in ("cutover", "undo"):
        options["early"] = world.rng.random() < 0.5
    if verb == "commit":
        options = {"keep_undo": world.rng.random() < 0.6, "force": world.rng.random() < 0.3}
    world.command_number += 1
    committed = leader.engine.phase is Phase.COMMITTED
    world.commands_open[world.command_number] = f"{verb} after commit" if committed else verb
    world.note(f"operator: {verb} {options}")
    leader.engine.command(world.command_number, verb, options, world.now)
    world.pump_leader(leader)


def run(seed: int, profile: Profile, omit: frozenset[str] = frozenset(), trace: bool = False) -> Outcome:
    """The whole of one seed. Problems come with the trace if it was asked for."""
    world = World(seed, profile, omit, trace)
    for host in world.hosts:
        world.start_member(host)
    world.start_leader()
    clients = [Client(world, host, number) for host in world.hosts for number in range(profile.clients)]
    try:
        world.run_until(0.5)
        if profile.start_at_once:
            operator(world, "start")
        _begin(world, clients)
        _converge(world)
        world.compare_legs()
        if not world.history.problems:
            _read_everything(world)
        world.history.judge()
    except Stuck as stuck:
        world.history.problems.append(f"stuck: {stuck}")
    except Exception as error:
        world.history.problems.append(f"engine failed: {error!r}")
        if trace:
            raise
    return Outcome(
        world.history.problems, dict(world.coverage), world.trace or [], sum(client.operations for client in clients)
    )


class Stuck(Exception):
    """The world does not settle: a protocol waits for ever."""


def _begin(world: World, clients: list[Client]) -> None:
    for client in clients:
        client.start()
    _misfortune(world)
    end = world.now + world.profile.duration_s
    while world.now < end:
        if world.power_at is not None and world.now >= world.power_at:
            world.power_at = None
            world.power_loss()
            for client in clients:
                client.idle = True
                client.start()
            _misfortune(world)
            world.power_at = None
        until = min(end, world.power_at if world.power_at is not None else end)
        world.run_until(
            max(until, world.now + 0.0001), lambda: world.power_at is not None and world.now >= world.power_at
        )


def _converge(world: World) -> None:
    """Calm: no more faults or requests; everything must come to rest, and the copy to its end."""
    world.calm = True
    world.stopping = True
    for disk in world.disks:
        disk.fail_write = disk.fail_read = disk.fail_flush = 0.0
    for member in filter(None, world.members.values()):
        member.paused_until = min(member.paused_until, world.now + 0.3)

    def resume() -> None:
        if world.leader is not None and world.leader.engine.state.paused:
            operator(world, "resume")
        world.at(1.0, resume)

    resume()

    def settled() -> bool:
        leader = world.leader
        if leader is None or leader.engine.exclusive or leader.engine.windows or leader.engine.sync_queued:
            return False
        if leader.engine.commands:
            return False
        members = [member for member in world.members.values() if member is not None]
        if len(members) < len(world.members):
            return False
        if any(not member.engine.joined or member.busy for member in members):
            return False
        if world.profile.log_empties and any(member.engine.activity.logged for member in members):
            return False
        phase = leader.engine.phase
        if leader.engine.state.goal is not None or world.zombies_writing():
            return False
        return phase in (Phase.SETUP, Phase.SYNCED, Phase.COMMITTED)

    limit = world.now + SETTLE_S
    while world.now < limit:
        world.run_until(world.now + CHECK_S)
        if settled():
            return
    leader = world.leader
    doing = leader.engine.doing() if leader else "no leader"
    members = {host: member and member.engine.snapshot() for host, member in world.members.items()}
    waiting = {host: (len(member.waiting), member.engine.blocked) for host, member in world.members.items() if member}
    raise Stuck(f"{doing}, phase {leader and leader.engine.phase}, {members}, waiting {waiting}")


def _read_everything(world: World) -> None:
    """After the end: what the map says is readable is what was acknowledged; also after one more power loss."""
    for tail in (False, True):
        if tail:
            if world.rng.random() < 0.5:
                return
            world.power_loss()
            world.calm = True
            world.run_until(world.now + 3.0)
            world.compare_legs()
        record = world.record()
        for region in range(world.geometry.region_count):
            bits = record.map.bits[region]
            leg = record.state.preferred if bits & (1 << record.state.preferred) else 1 - record.state.preferred
            if record.state.phase is Phase.COMMITTED:
                leg = TARGET
            for block in range(*world.geometry.region_extent(region, region + 1)):
                value = world.disks[leg].cache[block]
                world.history.blocks[block].reads.append((value, world.now, world.now + 0.01))
        world.now += 1.0


DEFAULT = Profile()
PROFILES: dict[str, Profile] = {
    "one host": DEFAULT,
    "two hosts": replace(DEFAULT, hosts=2, clients=1),
    "three hosts": replace(DEFAULT, hosts=3, clients=1, regions=6),
    "faults": replace(DEFAULT, leg_faults=2.0, member_kill=0.05, leader_kill=0.05),
    "switches": replace(DEFAULT, hosts=2, commands=8.0, leg_faults=0.1, verbs=("cutover", "undo")),
    "power": replace(DEFAULT, power_loss=1.0, leg_faults=0.8, flush_faults=0.8, quiet=0.5, flush_share=0.25),
    "leaders": replace(DEFAULT, hosts=2, leader_kill=1.0, zombie=0.7, member_kill=0.1),
    # Old leaders and copiers whose transactions and writes land late.
    "late": replace(
        DEFAULT, hosts=2, leader_kill=1.0, zombie=0.8, copier_stall=0.1, slow_persist=0.2, whole_writes=0.4
    ),
    "members": replace(DEFAULT, hosts=3, clients=1, member_kill=1.5, member_pause=0.3, regions=6, whole_writes=0.4),
    "slow asks": replace(
        DEFAULT, leg_faults=2.0, both_legs=0.5, slow_ask=0.5, span_blocks=6, quiet=0.5, duration_s=3.0
    ),
    "commits": replace(
        DEFAULT,
        commands=8.0,
        verbs=("cutover", "cutover", "commit", "commit", "commit", "undo"),
        leg_faults=0.2,
        power_loss=0.05,
        copy_s=0.003,
        duration_s=5.0,
    ),
    "flushes": replace(DEFAULT, hosts=2, flush_share=0.4, flush_faults=1.0, leg_faults=2.0, io_s=0.03, power_loss=0.5),
    "slow legs": replace(DEFAULT, clients=4, io_s=0.3, copy_s=0.03, regions=4, whole_writes=0.4, leg_faults=0.8),
    "all at once": replace(
        DEFAULT,
        hosts=2,
        leader_kill=1.0,
        member_kill=1.0,
        copier_kill=1.0,
        leg_faults=1.5,
        both_legs=0.4,
        lose=0.15,
        repeat=0.2,
        slow_message=0.1,
        slow_ask=0.2,
        slow_persist=0.1,
        copier_stall=0.05,
        commands=4.0,
        whole_writes=0.4,
        verbs=("start", "cutover", "undo", "commit", "abort", "cutover", "undo", "start"),
    ),
}


def profile_of(seed: int) -> str:
    """The suite's mix."""
    names = list(PROFILES)
    return names[seed % len(names)]


def profile_for(seed: int, name: str | None = None) -> Profile:
    """The seed's profile, or the named one: in every second lap over the profiles with the filter."""
    return replace(PROFILES[name or profile_of(seed)], filtered=seed // len(PROFILES) % 2 == 1)


__all__ = ["BOTH_OK", "PROFILES", "SOURCE", "Outcome", "profile_for", "profile_of", "run"]
