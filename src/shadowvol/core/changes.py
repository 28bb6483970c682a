"""Exclusive changes that are nobody's verb: membership and recovery, clearing bits after a leg's fault.

Each runs alone in the leader's exclusive queue and has the same shape: hold at every member what must not happen
meanwhile; make the change durable; tell every member; let go. So a member never sees half a change, and one
that joins, or a leader that takes over, needs no knowledge of what its predecessor was in the middle of.

Doubt. When the flush of a region's only ok leg fails, the application is told, and the leg stays ok: there is no better
one. But its medium may show older data after a power loss although every later flush succeeds, so a copy made
of it would not stay equal to it. Such regions are recorded as doubtful; the window that copies one makes the *copy*
its only ok leg (windows.done), and the next window writes the doubtful leg anew.
"""

from typing import TYPE_CHECKING

from shadowvol.core.geometry import Run, merge_runs, without
from shadowvol.core.legs import BOTH_OK, SOURCE, TARGET, Phase, other
from shadowvol.core.messages import ClearUndo, Drop, Fault, Freeze, LegLost, Reply, SetState, Thaw
from shadowvol.core.records import encode_member
from shadowvol.core.regionmap import RegionMap
from shadowvol.core.steps import AskAll, Persist, SendTo, Steps, WaitFor
from shadowvol.core.txn import Txn

if TYPE_CHECKING:
    from shadowvol.core.leader import LeaderEngine

FaultLegs = list[tuple[int, list[Run]]]  # (leg, runs of zones)


# ---------------------------------------------------------------- membership, recovery, takeover


def take_over(leader: "LeaderEngine") -> Steps:
    """The first change of a leadership: every recorded member is live or proven gone, then all get this epoch's state.

    What the old leader left half done ends here: its windows are void (their regions quarantined until its copier
    is known to have stopped), a transition that was not committed is aborted, one that was is in the state."""
    yield WaitFor(lambda: not leader.unresolved)
    yield from sync(leader)


def sync(leader: "LeaderEngine") -> Steps:
    """Recover members that are gone, register those that join, give everyone the whole state."""
    leader.sync_queued = True
    everyone = sorted({**leader.live, **leader.joining})
    # 1. Hold all I/O of every member and learn of faults that are not settled.
    answers = yield AskAll(Freeze(None, reads=True, writes=True), "x", hosts=everyone)
    faults: FaultLegs = [(leg, _pairs(runs)) for answer in answers.values() for leg, runs in answer["faults"]]
    # 2. One transaction: bits cleared for crashed members' zones and open faults, logs emptied, windows void,
    #    a transition not committed aborted, joiners registered.
    joined: dict[str, int] = {}
    recovered: list[str] = []
    doubtful: list[tuple[tuple[Run, ...], ...]] = []
    changed = RegionMap(len(leader.map), bytes(leader.map.bits))
    void = leader.void_windows("membership changed") if "crash-voids" not in leader.omit else []

    def build() -> Txn:
        joined.update(leader.joining)
        recovered.extend(leader.gone)
        changed.bits[:] = leader.map.bits
        for zones in leader.gone.values():
            _recover(leader, changed, _zone_regions(leader, zones))
        for leg, zones in faults:
            _clear(leader, changed, [(leg, zones)])
        doubtful.append(_doubtful(leader, changed, faults))
        gone_keys = tuple(leader.keys.member(host) for host in recovered if host not in joined)
        logs = tuple(leader.keys.activity(host) for host in {*recovered})
        void_puts, void_deletes = leader.void_records(void)
        transition = (leader.keys.transition,) if leader.transition is not None else ()
        members = tuple((leader.keys.member(host), encode_member(number)) for host, number in joined.items())
        everything: list[Run] = [(0, len(changed))]
        return leader.txn(
            state=leader.change_state(doubtful=doubtful[-1]),
            new_map=changed,
            chunks=everything if recovered or faults else None,
            puts=members + void_puts,
            deletes=gone_keys + logs + void_deletes + transition,
        )

    if "join-state-after-register" in leader.omit and leader.joining:
        yield AskAll(full_state(leader), "x", hosts=sorted(leader.joining))
        yield AskAll(Thaw(), "x", hosts=sorted(leader.joining))
    if "recovery-same-txn" in leader.omit and leader.gone:
        logs = tuple(leader.keys.activity(host) for host in leader.gone)
        yield Persist(lambda: leader.txn(deletes=logs))
        yield WaitFor(lambda: True)
    persisted = yield Persist(build)
    if not persisted:
        return
    leader.map.bits[:] = changed.bits
    leader.state = leader.change_state(doubtful=doubtful[-1])
    leader.transition = None
    for host in recovered:
        leader.gone.pop(host, None)
    for window in void:
        leader.void(window, "a member joined or was recovered")
    for host, number in joined.items():
        if leader.joining.get(host) == number:
            del leader.joining[host]
            leader.live[host] = number
    # 3. Everyone gets the state, 4. and only then lets its I/O go. No window is opened before.
    yield AskAll(full_state(leader), "x")
    yield AskAll(Thaw(), "x")
    leader.sync_queued = bool(leader.joining or leader.gone)
    if leader.joining or leader.gone:
        leader.queue_exclusive(sync(leader), "membership")


def full_state(leader: "LeaderEngine") -> SetState:
    """Everything a member needs to know."""
    return SetState(
        phase=leader.state.phase.value,
        preferred=leader.state.preferred,
        bits=bytes(leader.map.bits),
        fresh_allowed=leader.single_member() or "fresh-one-member" in leader.omit,
    )


def _recover(leader: "LeaderEngine", changed: RegionMap, runs: list[Run]) -> None:
    """The preferred leg is the truth: where both are ok in a crashed member's zones, the other one is not any more."""
    if "recovery-clears" in leader.omit:
        return
    loser = other(leader.state.preferred)
    if "recovery-only-both" in leader.omit:
        changed.clear_ok(loser, runs, even_last=True)
        for lo, hi in runs:
            for region in range(lo, hi):
                changed.bits[region] |= 1 << leader.state.preferred
        return
    changed.clear_ok(loser, runs)


def end_quarantine(leader: "LeaderEngine") -> Steps:
    """Old copiers have stopped: their windows' records go, and their regions may be copied again."""
    numbers = list(leader.quarantine)
    for number in numbers:
        yield AskAll(Drop(number, leader.quarantine[number]), "x")
    yield Persist(lambda: leader.txn(deletes=tuple(leader.keys.window(number) for number in numbers)))
    for number in numbers:
        leader.quarantine.pop(number, None)


# ---------------------------------------------------------------- faults of a leg


def clear(leader: "LeaderEngine") -> Steps:
    """All faults told so far: their bits are cleared durably and at every member, then their tellers are answered."""
    leader.clear_queued = False
    batch, leader.faults = leader.faults, []
    legs: FaultLegs = []
    flush_failed = False
    for host, ask in batch:
        if isinstance(ask.want, Fault):
            both = len(ask.want.legs) == 2
            for leg, zones in ask.want.legs:
                leader.leg_failed(leg, f"{ask.want.operation} on {host}: {ask.want.error}")
                if not both or leg != leader.state.preferred:
                    legs.append((leg, zones))
            flush_failed |= ask.want.operation == "flush"
        elif isinstance(ask.want, ClearUndo):
            legs.append((SOURCE, ask.want.zones))
    told = [(ask.want, fault) for _, ask in batch if isinstance(ask.want, Fault) for fault in ask.want.legs]
    doubts = [fault for want, fault in told if want.operation == "flush"]
    if leader.state.phase is Phase.COMMITTED:
        # What the target lost since the commit, the source may still have: an undo must not spare those zones.
        legs += [(SOURCE, zones) for leg, zones in doubts if leg == TARGET]
    yield from clear_bits(leader, legs, voiding=[fault for _, fault in told], void_all=flush_failed, doubts=doubts)
    for host, ask in batch:
        leader.emit(SendTo(host, Reply(ask.incarnation, ask.number)))


def clear_bits(
    leader: "LeaderEngine",
    faults: FaultLegs,
    *,
    voiding: FaultLegs | None = None,
    void_all: bool = False,
    doubts: FaultLegs | None = None,
) -> Steps:
    """Clear each leg's bits in its zones, where the other leg is ok, and void the windows there.

    Where reads move (the preferred leg is cleared), no member reads the old leg once any member reads the other."""
    touched = _regions(leader, voiding if voiding is not None else faults)
    void = leader.void_windows("fault", None if void_all else touched)
    if "failed-write-voids" in leader.omit and not void_all:
        void = []
    changed = RegionMap(len(leader.map), bytes(leader.map.bits))
    _clear(leader, changed, faults)
    cleared = [
        (leg, runs)
        for leg in (SOURCE, TARGET)
        if (runs := _cleared_runs(leader.map, changed, leg, _regions(leader, [f for f in faults if f[0] == leg])))
    ]
    doubtful = _doubtful(leader, changed, doubts or [])
    if not cleared and not void and doubtful == leader.state.doubtful:
        return
    moving = [run for leg, runs in cleared if leg == leader.state.preferred for run in runs]
    if moving and "clear-holds-reads" not in leader.omit:
        yield AskAll(Freeze(moving, reads=True, writes=False), "x")

    def build() -> Txn:
        now = [run for _, runs in cleared for run in runs]
        puts, deletes = leader.void_records(void)
        state = leader.change_state(doubtful=doubtful)
        return leader.txn(state=state, new_map=changed, chunks=now, puts=puts, deletes=deletes)

    persisted = yield Persist(build)
    if not persisted:
        return
    leader.map.bits[:] = changed.bits
    leader.state = leader.change_state(doubtful=doubtful)
    for window in void:
        leader.void(window, _leg_failed_in_it(leader))
    yield AskAll(SetState(changes=tuple((leg, False, runs) for leg, runs in cleared)), "x")
    if moving and "clear-holds-reads" not in leader.omit:
        yield AskAll(Thaw(), "x")


def persist_clear(leader: "LeaderEngine", faults: FaultLegs, inside: list[Run]) -> Steps:
    """Only the durable half of clear_bits(), in the regions `inside`, for a change that holds these and tells members
    of these itself. The fault's other regions are left to clear(): no member would hear of them here."""
    changed = RegionMap(len(leader.map), bytes(leader.map.bits))
    _clear(leader, changed, faults)
    if "clear-inside" not in leader.omit:
        for lo, hi in without([(0, len(changed))], inside):
            changed.bits[lo:hi] = leader.map.bits[lo:hi]
    regions = _regions(leader, faults) if "clear-inside" in leader.omit else inside
    persisted = yield Persist(lambda: leader.txn(new_map=changed, chunks=regions))
    if persisted:
        before = leader.map.bits[:]
        leader.map.bits[:] = changed.bits
        window_void = [w for w in leader.void_windows("fault", regions) if before != changed.bits]
        for window in window_void:
            leader.void(window, _leg_failed_in_it(leader))


def _leg_failed_in_it(leader: "LeaderEngine") -> str:
    error = leader.last_leg_error()
    return "a leg failed in it" + (f" ({error})" if error else "")


def copier_flush_failed(leader: "LeaderEngine", legs: list[int], error: str) -> Steps:
    """The copier's own flush failed: windows are void, and every member takes its unflushed writes as lost."""
    void = leader.void_windows("flush failed")
    puts, deletes = leader.void_records(void)
    yield Persist(lambda: leader.txn(puts=puts, deletes=deletes))
    for window in void:
        leader.void(window, f"the copier's flush failed: {error}")
    for leg in legs:
        yield AskAll(LegLost(leg, error), "x")


def _doubtful(leader: "LeaderEngine", changed: RegionMap, faults: FaultLegs) -> tuple[tuple[Run, ...], ...]:
    """The doubtful regions with those added where a faulty leg stays the only ok one."""
    doubtful = [list(runs) for runs in leader.state.doubtful]
    for leg, zones in faults:
        for lo, hi in _zone_regions(leader, zones):
            doubtful[leg] += changed.runs_equal(1 << leg, lo, hi)
    return tuple(tuple(merge_runs(runs)) for runs in doubtful)


def _clear(leader: "LeaderEngine", changed: RegionMap, faults: FaultLegs) -> None:
    # The non-preferred leg first: where both have faults it is the one to go, so that reads do not move.
    for leg, zones in sorted(faults, key=lambda fault: fault[0] == leader.state.preferred):
        if leader.state.phase is Phase.COMMITTED and leg == TARGET:
            continue  # after commit the source only marks what an undo may spare; it serves nothing
        changed.clear_ok(leg, _zone_regions(leader, zones), even_last="last-ok-leg" in leader.omit)


def _cleared_runs(before: RegionMap, after: RegionMap, leg: int, runs: list[Run]) -> list[Run]:
    cleared: list[Run] = []
    for lo, hi in runs:
        for both in before.runs_equal(BOTH_OK, lo, hi):
            cleared += after.runs_equal(1 << other(leg), *both)
    return merge_runs(cleared)


def _regions(leader: "LeaderEngine", faults: FaultLegs) -> list[Run]:
    return merge_runs([run for _, zones in faults for run in _zone_regions(leader, zones)])


def _zone_regions(leader: "LeaderEngine", zones: list[Run]) -> list[Run]:
    per_zone, last = leader.geometry.regions_per_zone, leader.geometry.region_count
    return [(lo * per_zone, min(hi * per_zone, last)) for lo, hi in zones]


def _pairs(runs: list[Run]) -> list[Run]:
    return [(lo, hi) for lo, hi in runs]
