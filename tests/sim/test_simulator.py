"""The real engines in thousands of seeded worlds: nothing acknowledged is lost, no read goes back, all comes to rest.

A failure prints the seed, the profile, what was wrong, the last lines of its trace, and the command that replays it.
"""

from collections import Counter

import pytest

from tests.sim.scenario import PROFILES, profile_of, run

SEEDS = 5040
CHUNK = 120  # seeds per test, so that the chunks spread over the workers
TRACE_LINES = 40
COVERAGE_SEEDS = 700  # a fixed part of the seeds that must have met every rare transition

RARE = (
    "message lost",
    "message repeated",
    "power loss",
    "member paused",
    "copier killed",
    "leader cut off, goes on",
    "takeover with open windows",
    "takeover with a transition preparing",
    "takeover with a transition committed",
    "leg write failed",
    "leg read failed",
    "flush failed",
    "copier's flush failed",
    "write succeeded although a leg failed",
    "read moved to the other leg after an error",
    "write answered with an error",
    "flush answered with an error",
    "start -> 0",
    "cutover -> 0",
    "cutover -> 3",
    "undo -> 0",
    "commit -> 0",
    "abort -> 0",
)


def report(seed: int, name: str) -> str:
    """Run it again with its trace, for the reader."""
    outcome = run(seed, PROFILES[name], trace=True)
    lines = [f"seed {seed}, profile {name!r}:", *(f"  {problem}" for problem in outcome.problems[:4])]
    lines += [f"replay: .venv/bin/python -m tests.sim.replay {seed} {name!r}", "the trace ends with:"]
    return "\n".join(lines + outcome.trace[-TRACE_LINES:])


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_seed_finds_a_violation(first: int) -> None:
    operations = 0
    for seed in range(first, first + CHUNK):
        name = profile_of(seed)
        outcome = run(seed, PROFILES[name])
        operations += outcome.operations
        if outcome.problems:
            pytest.fail(report(seed, name), pytrace=False)
    print(f"{CHUNK} seeds, {operations} client operations, 0 violations")


def test_rare_transitions_are_met() -> None:
    """A suite that no longer meets them would prove less than it says."""
    met: Counter[str] = Counter()
    for seed in range(20_000, 20_000 + COVERAGE_SEEDS):
        met.update(run(seed, PROFILES[profile_of(seed)]).coverage)
    for name, count in sorted(met.items()):
        print(f"{count:8} {name}")
    assert [name for name in RARE if not met[name]] == []
