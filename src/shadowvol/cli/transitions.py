"""Verbs that the agent performs on a volume: the transitions, retarget, throttle; and waiting for a phase."""

import time
from typing import Any

import click

from shadowvol.agent.errors import BAD_INPUT, FAILED, TIMED_OUT, VerbError, check_name
from shadowvol.cli.completion import paths, volume_argument
from shadowvol.cli.invocation import Invocation, pass_invocation
from shadowvol.cli.units import CACHE, DEADLINE, DURATION, RATE
from shadowvol.core.throttle import IMPACTS

WAIT_POLL_S = 0.2  # where no agent can tell at once
WAIT_TURN_S = 2.0  # how long the agent keeps a status back while the phase is not reached
AGENT_ABSENCE_S = 15.0  # an agent that was there may be restarting


def _perform(invocation: Invocation, verb: str, name: str, options: dict[str, Any] | None = None) -> None:
    result = invocation.call(verb, name, options)
    if result.text:
        click.echo(result.text)


@click.command()
@volume_argument()
@pass_invocation
def start(invocation: Invocation, name: str) -> None:
    """Begin to copy to the target."""
    _perform(invocation, "start", name)


@click.command()
@volume_argument()
@pass_invocation
def pause(invocation: Invocation, name: str) -> None:
    """Stop copying; I/O goes on."""
    _perform(invocation, "pause", name)


@click.command()
@volume_argument()
@pass_invocation
def resume(invocation: Invocation, name: str) -> None:
    """Go on copying."""
    _perform(invocation, "resume", name)


@click.command()
@volume_argument()
@click.option("--early", is_flag=True, help="Also before the copy is complete.")
@pass_invocation
def cutover(invocation: Invocation, name: str, early: bool) -> None:
    """Serve reads from the target; the source gets every write still."""
    _perform(invocation, "cutover", name, {"early": early})


@click.command()
@volume_argument()
@click.option("--early", is_flag=True, help="After a commit: before the source is complete again.")
@pass_invocation
def undo(invocation: Invocation, name: str, early: bool) -> None:
    """Serve reads from the source again."""
    _perform(invocation, "undo", name, {"early": early})


@click.command()
@volume_argument()
@click.option("--keep-undo", is_flag=True, help="Keep track, so that even the commit can be undone.")
@click.option("--force", is_flag=True, help="Also with a source that is not complete.")
@pass_invocation
def commit(invocation: Invocation, name: str, keep_undo: bool, force: bool) -> None:
    """Let the source go."""
    _perform(invocation, "commit", name, {"keep_undo": keep_undo, "force": force})


@click.command()
@volume_argument()
@pass_invocation
def abort(invocation: Invocation, name: str) -> None:
    """Give the migration up: let the target go."""
    _perform(invocation, "abort", name)


@click.command()
@volume_argument()
@click.option("--target", required=True, metavar="LEG", shell_complete=paths, help="The new target.")
@click.option("--provision", is_flag=True, help="Make it: a sparse file of the volume's size.")
@click.option("--target-cache", type=CACHE, default="host", help="host: through the page cache; none: O_DIRECT.")
@click.option("--force", is_flag=True, help="Take one that carries a file system, LVM or RAID signature.")
@pass_invocation
def retarget(
    invocation: Invocation, name: str, target: str, provision: bool, target_cache: str, force: bool
) -> None:
    """Give a volume in phase setup another target."""
    from shadowvol.endpoints.identity import LegRefused, LegSpec

    check_name(name)
    try:
        path = LegSpec.parse(target).path  # here, where relative paths mean what the operator means
    except LegRefused as error:
        raise VerbError(BAD_INPUT, f"target {error}") from None
    options = {"target": path, "force": force, "provision": provision, "target_cache": target_cache}
    _perform(invocation, "retarget", name, options)


@click.command()
@volume_argument()
@click.option("--rate", type=RATE, metavar="RATE", help="Copy at most so fast: 200MiB/s; none: no limit.")
@click.option("--impact", type=click.Choice(IMPACTS), help="How much copying may be felt.")
@click.option("--min-rate", type=RATE, metavar="RATE", help="But not slower than this, whoever feels it; or none.")
@click.option("--finish-by", type=DEADLINE, metavar="TIME", help="But be done by then: 2026-12-31T06:00, 8h, or none.")
@pass_invocation
def throttle(
    invocation: Invocation,
    name: str,
    rate: tuple[int | None] | None,
    impact: str | None,
    min_rate: tuple[int | None] | None,
    finish_by: tuple[float | None] | None,
) -> None:
    """Change how fast a volume is copied, at once."""
    options: dict[str, Any] = {}
    if rate is not None:
        options["rate_bytes_per_s"] = rate[0]
    if impact is not None:
        options["impact"] = impact
    if min_rate is not None:
        options["min_rate_bytes_per_s"] = min_rate[0]
    if finish_by is not None:
        options["finish_by_s"] = finish_by[0]
    if not options:
        raise click.UsageError("give --rate, --impact, --min-rate or --finish-by")
    _perform(invocation, "throttle", name, options)


# ---------------------------------------------------------------- wait


@click.command()
@volume_argument()
@click.option("--for", "phase", required=True, type=click.Choice(["synced", "setup", "copying", "committed"]))
@click.option("--timeout", "timeout_s", type=DURATION, metavar="SECONDS", help="Exit 5 when it takes longer.")
@pass_invocation
def wait(invocation: Invocation, name: str, phase: str, timeout_s: float | None) -> None:
    """Wait until a volume is in a phase. Exit 1 when that needs an operator first."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    agent_seen_s: float | None = None
    until: tuple[str, float] | None = None  # the first answer comes at once: it may be hopeless
    while True:
        left_s = WAIT_TURN_S if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        status, by_agent = invocation.status(name, until)
        until = (phase, min(WAIT_TURN_S, left_s))
        if is_reached(status, phase):
            return
        now_s = time.monotonic()
        if by_agent:
            agent_seen_s = now_s
        absent = not by_agent and (agent_seen_s is None or now_s - agent_seen_s > AGENT_ABSENCE_S)
        why = hopeless(status, phase)
        if why is not None and (by_agent or absent):
            raise VerbError(FAILED, f"volume {name} will not be {phase} by itself: {why}")
        if absent:
            raise invocation.no_agent(name)
        if deadline_s is not None and now_s >= deadline_s:
            percent = int(status["fraction_both_ok"] * 100)
            raise VerbError(TIMED_OUT, f"volume {name} is still {status['phase']} ({percent} % on both legs)")
        if not by_agent:
            time.sleep(WAIT_POLL_S if deadline_s is None else max(0.0, min(WAIT_POLL_S, deadline_s - now_s)))


def is_reached(status: dict[str, Any], wanted: str) -> bool:
    """Synced is copying, with nothing left to copy."""
    return status["phase"] == wanted or (wanted == "copying" and status["phase"] == "synced")


def hopeless(status: dict[str, Any], wanted: str) -> str | None:
    """Why the phase cannot be reached without an operator; None: it may be, with time."""
    name, phase, goal = status["name"], status["phase"], status["goal"]
    if status["transition"] is not None:
        return None
    heading = "setup" if goal == "abort" else "synced" if phase == "copying" else phase
    if heading != wanted:
        verb = {"committed": "commit", "setup": "abort"}.get(wanted, "start")
        if goal is not None:
            return f"its {goal} is under way"
        if phase == "committed":
            return "it is committed"
        return f"it is {phase}; shadowvol {verb} {name} leads there"
    if not status["up"]:
        return f"it is down; shadowvol up {name}"
    if status["paused"]:
        return f"copying is paused; shadowvol resume {name}"
    if status["copy"]["state"] == "failed":
        return f"copying failed: {status['copy']['reason'] or 'see shadowvol status'}"
    return None
