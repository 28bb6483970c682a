"""Before and after a volume is brought up: are the legs that it needs there, and what was recorded?

A member opens its legs by itself, tries again while one is missing, and serves what it can. So a volume whose disk is
late heals by itself; but an operator who brings one up is told at once, instead of the application by its first error.
"""

import os
from functools import partial
from typing import Any

import trio

from shadowvol.agent.errors import REFUSED, VerbError
from shadowvol.core.legs import LEG_NAMES, SOURCE, TARGET, Phase, other
from shadowvol.core.records import LegRecord, VolumeRecord
from shadowvol.endpoints.identity import LegRefused, identity_of, other_medium
from shadowvol.endpoints.local import claim_local


def needed_legs(record: VolumeRecord) -> tuple[list[int], list[int]]:
    """(legs without which some I/O must fail, legs that are in use besides)."""
    if record.state.phase is Phase.SETUP:
        return [SOURCE], []
    if record.state.phase is Phase.COMMITTED:
        return [TARGET], [SOURCE] if record.state.keep_undo else []
    needed = [leg for leg in (SOURCE, TARGET) if not record.map.is_ok(other(leg), 0, len(record.map))]
    return needed, [leg for leg in (SOURCE, TARGET) if leg not in needed]


async def check_before_up(record: VolumeRecord) -> str:
    """What the operator should know of a leg that can be done without. Raises VerbError. No member may be running."""
    needed, others = needed_legs(record)
    problems = {}
    for leg in needed + others:
        problem = await trio.to_thread.run_sync(partial(_problem, record.config.leg(leg)))
        if problem is not None:
            problems[leg] = f"{LEG_NAMES[leg]} {problem}"
    name = record.config.name
    if any(leg in problems for leg in needed) or len(problems) == 2:
        reason = next(iter(problems.values()))
        raise VerbError(REFUSED, f"volume {name} cannot be served: {reason}; nothing changed")
    return "; ".join(f"volume {name} is served without its {problem}" for problem in problems.values())


def failed_leg(record: VolumeRecord, statistics: dict[str, Any]) -> str | None:
    """Which leg that it needs a member could not open, as its statistics say."""
    legs = statistics.get("legs", {})
    errors = (legs.get(LEG_NAMES[leg], {}).get("open_error") for leg in needed_legs(record)[0])
    return next((str(error) for error in errors if error), None)


def _problem(leg: LegRecord) -> str | None:
    """Blocks. Opens the leg as a member would, and closes it again."""
    try:
        if (changed := other_medium(identity_of(leg.uri), leg.identity)) is not None:
            return f"{leg.uri}: {changed}"
        os.close(claim_local(leg.uri))
    except LegRefused as refused:
        return str(refused)
    except OSError as error:
        return f"{leg.uri}: {error.strerror}"
    return None
