"""Verbs at moments at which a member is away: they wait for it, in bounded time, and say what is so.

Scripts on the simulated world: a member is killed or stopped at a given moment of a verb, on a virtual clock.
"""

from dataclasses import replace

import pytest

from shadowvol.core.commands import RUN_LIMIT_S, TURN_LIMIT_S
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import SOURCE, TARGET, Phase
from shadowvol.core.transitions import HOLD_LIMIT_S, PREPARE_LIMIT_S
from tests.sim.client import Client
from tests.sim.hunts import STILL
from tests.sim.member import Member
from tests.sim.world import World

BACK_S = 2.0  # a member that was killed serves again within this long
STEPS = [round(0.01 * step, 2) for step in range(14)] + [0.2, 0.3, 0.4]  # after the kill, or after the verb
FOR_EVER_S = 1e9
SLACK_S = 1.0  # ticks and messages
PROFILE = replace(STILL, duration_s=0.0, members_may_stay_away=True)


def copying_world(seed: int = 1, hosts: int = 1) -> World:
    """The copy has begun."""
    world = World(seed, replace(PROFILE, hosts=hosts))
    for host in world.hosts:
        world.start_member(host)
    world.start_leader()
    for number, host in enumerate(world.hosts):
        Client(world, host, number).start()
    world.run_until(0.5)
    assert do(world, "start") == (0, "")
    return world


def synced_world(seed: int = 1, hosts: int = 1) -> World:
    world = copying_world(seed, hosts)
    world.run_until(world.now + 60, lambda: engine(world).phase is Phase.SYNCED and at_rest(world))
    assert engine(world).phase is Phase.SYNCED
    return world


def at_rest(world: World) -> bool:
    return not engine(world).exclusive and not engine(world).windows and not engine(world).commands


def engine(world: World) -> LeaderEngine:
    assert world.leader is not None
    return world.leader.engine


def order(world: World, verb: str) -> int:
    """The command's number."""
    assert world.leader is not None
    world.command_number += 1
    world.commands_open[world.command_number] = verb
    options = {"early": True} if verb in ("cutover", "undo") else {}
    world.leader.engine.command(world.command_number, verb, options, world.now)
    world.pump_leader(world.leader)
    return world.command_number


def answer(world: World, number: int, limit_s: float) -> tuple[int, str]:
    """The command's, within `limit_s` from now."""
    world.run_until(world.now + limit_s, lambda: number in world.answers)
    assert number in world.answers, f"no answer within {limit_s} s: {engine(world).doing()}"
    return world.answers[number][1:]


def do(world: World, verb: str, limit_s: float = BACK_S) -> tuple[int, str]:
    return answer(world, order(world, verb), limit_s)


def stop(world: World, host: str = "h0") -> Member:
    member = world.members[host]
    assert member is not None
    member.paused_until = FOR_EVER_S
    return member


def go_on(world: World, member: Member) -> None:
    member.paused_until = 0.0
    world.pump_member(member)


def assert_sound(world: World) -> None:
    """Applications read what they wrote, nothing is under way any more, and reads come from where the record says."""
    world.calm = world.stopping = True
    world.run_until(world.now + 20, lambda: at_rest(world) and engine(world).phase is Phase.SYNCED)
    world.run_until(world.now + 1)
    assert engine(world).phase is Phase.SYNCED and at_rest(world)
    for member in world.members.values():
        assert member is not None and member.engine.preferred == world.record().state.preferred
        assert not member.waiting
    world.compare_legs()
    world.history.judge()
    assert not world.history.problems


@pytest.mark.parametrize("verb", ["cutover", "abort"])
@pytest.mark.parametrize("after_s", STEPS)
def test_a_verb_after_the_death_of_a_member_waits_for_the_next_one(after_s: float, verb: str) -> None:
    world = synced_world(seed=int(after_s * 100))
    world.kill_member("h0")
    world.run_until(world.now + after_s)
    assert do(world, verb) == (0, "")
    if verb == "cutover":
        assert engine(world).state.preferred == TARGET
        assert_sound(world)


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("after_s", [step / 10 for step in STEPS])
def test_a_verb_in_which_a_member_dies_is_done_with_the_next_one(after_s: float, hosts: int) -> None:
    """At whichever step: before the record says committed it begins again, after that it is finished."""
    world = synced_world(seed=int(after_s * 1000), hosts=hosts)
    number = order(world, "cutover")
    world.run_until(world.now + after_s)
    world.kill_member("h0")
    assert answer(world, number, BACK_S) == (0, "")
    assert engine(world).state.preferred == TARGET
    assert_sound(world)


def test_a_verb_is_withdrawn_when_no_member_comes_back() -> None:
    """It says so, and is not done later."""
    world = synced_world()
    world.start_member = lambda host: None  # type: ignore[method-assign]
    world.kill_member("h0")
    world.run_until(world.now + 0.2)
    code, text = do(world, "cutover", TURN_LIMIT_S + SLACK_S)
    assert code == 3 and "its member has ended and is being started again" in text and "nothing changed" in text
    del world.start_member  # type: ignore[method-assign]
    world.start_member("h0")
    assert_sound(world)
    assert engine(world).state.preferred != TARGET


def test_a_verb_that_a_stopped_member_does_not_prepare_is_aborted_in_time() -> None:
    """The verbs after it are withdrawn. When the member goes on it lets its writes go, and verbs are done again."""
    world = synced_world()
    member = stop(world)
    first = order(world, "cutover")
    code, text = answer(world, first, PREPARE_LIMIT_S + HOLD_LIMIT_S + SLACK_S)
    assert code == 3 and "its member did not answer" in text and "nothing changed" in text
    assert world.record().transition is None
    for verb in ("cutover", "pause"):
        code, text = do(world, verb, TURN_LIMIT_S + SLACK_S)
        assert code == 3 and "the member on host h0 does not answer" in text and "nothing changed" in text
    go_on(world, member)
    assert do(world, "cutover") == (0, "")
    assert_sound(world)


def test_an_abort_that_ends_between_its_two_halves_says_so() -> None:
    """Its undo is done, its second half is not prepared."""
    world = synced_world()
    assert do(world, "cutover") == (0, "")
    number = order(world, "abort")
    world.run_until(world.now + BACK_S, lambda: (world.record().transition or {}).get("verb") == "abort")
    member = stop(world)
    code, text = answer(world, number, PREPARE_LIMIT_S + HOLD_LIMIT_S + SLACK_S)
    assert code == 1 and "reads from the source again, and is not aborted" in text and "nothing changed" not in text
    assert world.record().state.preferred == SOURCE
    go_on(world, member)
    assert_sound(world)


def test_a_verb_that_is_recorded_and_not_applied_says_that_it_goes_on() -> None:
    world = synced_world()
    world.event = lambda name: stop(world) if name == "committed" else None  # type: ignore[assignment]
    code, text = do(world, "cutover", RUN_LIMIT_S + SLACK_S)
    assert code == 5 and "the member on host h0 does not answer; it goes on" in text
    assert world.record().state.preferred == TARGET
    member = world.members["h0"]
    assert member is not None
    go_on(world, member)
    world.run_until(world.now + BACK_S, lambda: not engine(world).commands)
    assert_sound(world)


def test_a_leader_is_calm_while_it_only_copies() -> None:
    """Then it is ticked less often: not while an operator waits, nor at rest, where it needs no tick at all."""
    world = copying_world()
    world.run_until(world.now + 5, lambda: engine(world).calm)
    assert engine(world).calm and engine(world).windows
    number = order(world, "pause")
    assert not engine(world).calm
    assert answer(world, number, SLACK_S) == (0, "")
    world.run_until(world.now + 5, lambda: at_rest(world))
    assert at_rest(world) and not engine(world).calm
