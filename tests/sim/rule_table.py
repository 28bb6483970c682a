"""The table of † rules: for each, how many seeds of its hunt it takes until its omission is found.

.venv/bin/python -m tests.sim.rule_table [RULE…]
"""

import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass

from shadowvol.core.rules import GATE_RULES, RULES
from tests.sim.hunts import HUNTS
from tests.sim.scenario import run


def rules_named(text: str) -> frozenset[str]:
    """The rules of an option, by comma. Raises ArgumentTypeError for one that there is not: a run that
    leaves nothing out would say that nothing is lost."""
    rules = frozenset(filter(None, text.split(",")))
    if unknown := rules - RULES.keys() - GATE_RULES.keys():
        raise ArgumentTypeError(f"there is no rule {', '.join(sorted(unknown))}; core/rules.py has them")
    return rules


@dataclass(frozen=True)
class Found:
    """`seeds`: how many were needed, the last of which shows the problem; None: not within the hunt's limit."""

    rule: str
    hosts: int
    seeds: int | None
    problem: str
    unclean: list[str]  # problems of the same seeds without the omission: there must be none

    def row(self) -> str:
        needed = "not found" if self.seeds is None else f"{self.seeds:4} seeds"
        return f"{self.rule:28} {self.hosts} member(s)  {needed}  {self.problem[:70]}"


def hunt(rule: str) -> Found:
    """Leave the rule out, seed after seed, until something is lost; then run the same seeds with it."""
    profile, first, limit = HUNTS[rule].profile, HUNTS[rule].first, HUNTS[rule].seeds
    omitted = frozenset([rule])
    seeds, problem = None, ""
    for seed in range(first, first + limit):
        problems = run(seed, profile, omitted).problems
        if problems:
            seeds, problem = seed + 1 - first, problems[0]
            break
    unclean = [
        f"seed {seed}: {problems[0]}"
        for seed in range(first, first + (seeds or limit))
        if (problems := run(seed, profile).problems)
    ]
    return Found(rule, profile.hosts, seeds, problem, unclean)


def main() -> int:
    failed = False
    for rule in sys.argv[1:] or [*RULES, *GATE_RULES]:
        found = hunt(rule)
        failed |= found.seeds is None or bool(found.unclean)
        sys.stdout.write("\n".join([found.row(), *found.unclean]) + "\n")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
