"""Every † rule is necessary: leave one out, and the simulator loses data within few seeds of the rule's hunt.

So each rule of core/rules.py is executed where it says, and the simulator is able to see what it protects. The rules of
the gate to the C filter are left out in the simulated member (tests/sim/member.py) and the filter's model.
"""

import pytest

from shadowvol.core.rules import BY_CONSTRUCTION, GATE_RULES, RULES
from tests.sim.hunts import HUNTS
from tests.sim.rule_table import hunt


@pytest.mark.parametrize("rule", [*RULES, *GATE_RULES])
def test_a_rule_left_out_is_found_and_the_same_seeds_are_clean_with_it(rule: str) -> None:
    """Prints the rule's row of the table (pytest -rA; or python -m tests.sim.rule_table for the whole of it)."""
    found = hunt(rule)
    print(found.row())
    assert found.seeds is not None, f"{rule}: {HUNTS[rule].seeds} seeds of its hunt found nothing"
    assert not found.unclean, found.unclean


def test_every_rule_has_a_hunt_or_a_reason_why_it_needs_none() -> None:
    """The two lists and the hunts agree."""
    assert not set(RULES) & set(GATE_RULES)
    assert set(HUNTS) == {*RULES, *GATE_RULES}
    assert not set(HUNTS) & set(BY_CONSTRUCTION)
    assert all(BY_CONSTRUCTION.values())
