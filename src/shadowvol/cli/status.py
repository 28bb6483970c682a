"""`shadowvol status`: a table for people, JSON for programs, or a live view."""

import json
import time
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shadowvol.cli.completion import volume_argument
from shadowvol.cli.invocation import Invocation, pass_invocation
from shadowvol.cli.iotable import io_table, is_quiet
from shadowvol.cli.units import format_bytes, format_eta

WATCH_PER_S = 2
WIDTH_WHEN_PIPED = 240  # nothing is folded where a program or a file reads

_PHASE_STYLE = {"setup": "dim", "copying": "cyan", "synced": "green", "committed": "bold green"}
_HEALTH_STYLE = {"ok": "green", "degraded": "yellow", "failed": "red", "released": "dim"}


@click.command()
@volume_argument(required=False)
@click.option("--watch", is_flag=True, help="A live view, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One object; without NAME, a list.")
@pass_invocation
def status(invocation: Invocation, name: str | None, watch: bool, as_json: bool) -> None:
    """Where volumes stand."""
    if watch and as_json:
        raise click.UsageError("--watch and --json do not go together")
    if as_json:
        click.echo(json.dumps(_fetch(invocation, name)[0 if name is None else 1]))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WHEN_PIPED)
    if not watch:
        console.print(_picture(invocation, name))
        return
    try:
        with Live(_picture(invocation, name), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1 / WATCH_PER_S)
                live.update(_picture(invocation, name), refresh=True)
    except KeyboardInterrupt:
        return


def _fetch(invocation: Invocation, name: str | None) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """All wanted as a list, the first of them, whether an agent told."""
    if name is None:
        found, by_agent = invocation.statuses()
        return found, found[0] if found else {}, by_agent
    one, by_agent = invocation.status(name)
    return [one], one, by_agent


def _picture(invocation: Invocation, name: str | None) -> RenderableType:
    found, _, by_agent = _fetch(invocation, name)
    if not found:
        return Text("no volumes")
    parts: list[RenderableType] = [_table(found)]
    if any(one["endpoint"] is not None for one in found):
        parts += [Text(), io_table(found)]
    for one in found:
        parts += [Text(f"{one['name']}: {line}") for line in _remarks(one)]
    if not by_agent:
        parts.append(Text("no agent is running on this host: this is what is recorded", style="yellow"))
    return Group(*parts)


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "PHASE", "READS FROM"):
        table.add_column(heading, no_wrap=True)
    for heading in ("SIZE", "COPIED", "RATE", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("SOURCE", "TARGET"):
        table.add_column(heading, no_wrap=True)
    table.add_column("ENDPOINT", overflow="fold")
    for one in found:
        copy, endpoint = one["copy"], one["endpoint"]
        table.add_row(
            one["name"],
            Text(one["phase"], style=_PHASE_STYLE.get(one["phase"], "")),
            one["preferred"],
            format_bytes(one["size_bytes"]),
            _copied(one),
            f"{format_bytes(copy['rate_bytes_per_s'])}/s" if copy["rate_bytes_per_s"] else "-",
            format_eta(copy["eta_s"]) if copy["eta_s"] is not None else "-",
            _health(one, "source"),
            _health(one, "target"),
            "down" if endpoint is None else endpoint.get("device") or endpoint.get("nbd_uri") or "",
        )
    return table


def _copied(one: dict[str, Any]) -> str:
    """Rounded down: 100 % only when nothing is missing."""
    if one["phase"] in ("setup", "committed"):
        return "-"
    return f"{int(one['fraction_both_ok'] * 1000) / 10:g} %"


def _health(one: dict[str, Any], leg: str) -> Text:
    health = one["legs"][leg]["health"]
    return Text(health or "-", style=_HEALTH_STYLE.get(health or "", ""))


def _remarks(one: dict[str, Any]) -> list[str]:
    """What does not fit into the table and somebody should know."""
    remarks = []
    copy = one["copy"]
    if is_quiet(one):
        remarks.append(f"the member has told nothing for {one['io']['age_s']:.0f} s: how I/O goes is not known")
    if copy["state"] in ("paused", "backoff", "failed"):
        remarks.append(f"copying: {copy['state']}" + (f" ({copy['reason']})" if copy["reason"] else ""))
    if one["goal"]:
        remarks.append(f"{one['goal']} is under way")
    if one["transition"]:
        waiting = ", ".join(["", *one["transition"]["waiting_for"]])
        remarks.append(f"{one['transition']['verb']}: {one['transition']['state']}{waiting}")
    for name in ("source", "target"):
        leg = one["legs"][name]
        if not leg["last_error"] or leg["health"] == "released":
            continue
        since = f" since {leg['since']}" if leg["since"] else ""
        history = "; before that: " if leg["health"] == "ok" else ": "
        remarks.append(f"{name}: {leg['health']}{since}{history}{leg['last_error']}")
    if one["last_error"]:
        remarks.append(f"last error: {one['last_error']}")
    return remarks
