"""Replay one seed with its trace:  python -m tests.sim.replay SEED [PROFILE] [--omit RULE]"""

import argparse
import sys

from tests.sim.rule_table import rules_named
from tests.sim.scenario import PROFILES, profile_for, run


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("profile", nargs="?", choices=sorted(PROFILES))
    parser.add_argument("--omit", type=rules_named, default=frozenset(), metavar="RULE[,RULE]")
    parser.add_argument("--tail", type=int, default=0, help="only the last N lines of the trace")
    arguments = parser.parse_args()
    profile = profile_for(arguments.seed, arguments.profile)
    outcome = run(arguments.seed, profile, arguments.omit, trace=True)
    for line in outcome.trace[-arguments.tail :]:
        sys.stdout.write(line + "\n")
    for problem in outcome.problems:
        sys.stdout.write(f"PROBLEM {problem}\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
