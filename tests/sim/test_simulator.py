"""No acknowledged write is lost, nothing goes back, the legs are equal when synced, everything comes to rest.

Thousands of seeds of all profiles (tests/sim/scenario.py); scripts/soak_sim runs more. A failure says how to replay it.
"""

from collections import Counter
from dataclasses import replace

import pytest

from tests.sim.scenario import PROFILES, profile_for, profile_of, run

SEEDS = 5600
CHUNK = 100  # seeds per test: enough tests for each processor, few enough for a short report
TRACE_LINES = 40
COVERAGE_SEEDS = 1400  # a subset, all in one test, so that it is the same whoever runs the others

RARE = (
    "abort -> 0",
    "commit -> 0",
    "copier killed",
    "copier's flush failed",
    "cutover -> 0",
    "fault found open while preparing a change",
    "filter op handed over after a failure",
    "filter op taken",
    "flush answered with an error",
    "fresh region spared its copy",
    "goal None -> abort",
    "goal None -> undo",
    "goal abort -> None",
    "goal undo -> None",
    "hold broken",
    "kill leader after: committed",
    "kill leader after: member started",
    "leader at rest",
    "leader cut off, goes on",
    "leader deposed",
    "member paused",
    "member at rest",
    "message lost",
    "message repeated",
    "power after: bits set",
    "power after: flush answered",
    "power after: zones unlogged",
    "power loss",
    "read done by the filter",
    "read moved to the other leg after an error",
    "relaxed commits undone by a power loss",
    "refused: a failed write there is not settled yet",
    "refused: a write failed in the window",
    "regions in doubt",
    "takeover with a transition committed",
    "takeover with a transition preparing",
    "takeover with open windows",
    "transaction of a deposed leader refused",
    "undo -> 0",
    "undo after commit -> 0",
    "window failed: a leg failed in it",
    "window failed: a member joined or was recovered",
    "window failed: a member's flush failed",
    "window failed: abort",
    "window failed: commit",
    "window failed: flush: flush failed",
    "window failed: read error",
    "window failed: the copier stopped",
    "window failed: the copier was restarted: the flush of another one proves nothing",
    "window failed: the copier's flush failed: flush failed",
    "window failed: write error",
    "window's bits set",
    "write answered with an error",
    "write done by the filter",
    "write succeeded although a leg failed",
    "zones left the log",
)


def report(seed: int) -> str:
    """What went wrong, the command that replays it, and the end of the story."""
    name = profile_of(seed)
    profile = profile_for(seed)
    outcome = run(seed, profile, trace=True)
    return "\n".join(
        [
            f"seed {seed}, profile {name!r}{' with the filter' if profile.filtered else ''}:",
            *outcome.problems,
            f"replay: .venv/bin/python -m tests.sim.replay {seed}",
            *outcome.trace[-TRACE_LINES:],
        ]
    )


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_acknowledged_is_lost(first: int) -> None:
    """All profiles in turn, by seed."""
    failed = [seed for seed in range(first, first + CHUNK) if run(seed, profile_for(seed)).problems]
    if failed:
        pytest.fail(f"seeds that fail: {failed}\n{report(failed[0])}", pytrace=False)


@pytest.mark.timeout(900)  # seconds; about a minute where nothing else runs
def test_rare_events_are_hit() -> None:
    """A run in which the rare paths do not occur proves nothing about them. Prints the counts (pytest -rA)."""
    coverage: Counter[str] = Counter()
    for seed in range(SEEDS, SEEDS + COVERAGE_SEEDS):
        coverage.update(run(seed, profile_for(seed)).coverage)
    for event in RARE:
        print(f"{coverage[event]:7} {event}")
    assert not [event for event in RARE if not coverage[event]]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_a_seed_replays_exactly(name: str, filtered: bool) -> None:
    """The same seed gives the same trace, line by line: a failure can be looked at as often as needed."""
    profile = replace(PROFILES[name], filtered=filtered)
    assert run(7, profile, trace=True).trace == run(7, profile, trace=True).trace


ABORTS = replace(
    PROFILES["one host"],
    verbs=("abort", "start"),
    commands=4.0,
    clients=4,
    think_s=0.005,
    flush_share=0.03,
    leg_faults=3.0,
    both_legs=0.0,
    power_loss=0.0,
    member_kill=0.0,
    leader_kill=0.0,
    duration_s=2.0,
)
ABORT_SEEDS = 200  # without the rule of core/route.py for windows in setup, one of 85 fails


@pytest.mark.parametrize("filtered", [False, True], ids=["python", "filter"])
def test_the_activity_log_empties_after_an_abort(filtered: bool) -> None:
    """A window that is not dropped yet when an abort has ended sends no more writes to the target, which nobody would
    flush: their zones would stay in the log, and the member would not come to rest."""
    profile = replace(ABORTS, filtered=filtered)
    failed = {seed: problems for seed in range(ABORT_SEEDS) if (problems := run(seed, profile).problems)}
    assert not failed
