"""Verbs about a volume's being: create, up, down, agent, delete."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import click

from shadowvol.agent import client
from shadowvol.agent.errors import FAILED, REFUSED, VerbError
from shadowvol.cli.completion import paths, volume_argument
from shadowvol.cli.invocation import Invocation, pass_invocation
from shadowvol.cli.units import CACHE, DURATION, SIZE, format_bytes


@click.command()
@click.argument("name")
@click.option(
    "--source",
    required=True,
    metavar="LEG",
    shell_complete=paths,
    help="The storage in use now: a file or block device.",
)
@click.option(
    "--target", required=True, metavar="LEG", shell_complete=paths, help="The new storage, at least as large."
)
@click.option("--kind", type=click.Choice(["block", "tree"]), default="block", show_default=True)
@click.option("--region-size", type=SIZE, metavar="SIZE", help="Unit of the map; a power of two.  [default: 1MiB]")
@click.option("--provision", is_flag=True, help="Make the target: a sparse file of the source's size.")
@click.option("--source-cache", type=CACHE, default="host", help="host: through the page cache; none: O_DIRECT.")
@click.option("--target-cache", type=CACHE, default="host", help="The same for the target.")
@click.option("--verify-copy", is_flag=True, help="Read back and compare what was copied.")
@click.option("--leg-timeout", type=DURATION, metavar="TIME", help="For legs on a network; files and disks have none.")
@click.option("--force", is_flag=True, help="Take a target that carries a file system, LVM or RAID signature.")
@click.option("--dry-run", is_flag=True, help="Check everything, record and make nothing.")
@pass_invocation
def create(
    invocation: Invocation,
    name: str,
    source: str,
    target: str,
    kind: str,
    region_size: int | None,
    provision: bool,
    source_cache: str,
    target_cache: str,
    verify_copy: bool,
    leg_timeout: float | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Record a new volume; nothing is copied yet."""
    invocation.check_volume_name(name)
    from shadowvol.agent.volumes import create_volume

    if not dry_run:
        invocation.prepare()
    work = partial(
        create_volume,
        name=name,
        source=source,
        target=target,
        kind=kind,
        region_size=region_size,
        provision=provision,
        source_cache=source_cache,
        target_cache=target_cache,
        verify_copy=verify_copy,
        force=force,
        dry_run=dry_run,
    )
    if leg_timeout is not None:
        click.echo("shadowvol: note: --leg-timeout is for legs on a network; files and disks have none", err=True)
    config = invocation.on_record_if_any(work) if dry_run else invocation.on_record(work)
    what = f"volume {name}: {format_bytes(config.size_bytes)}, {config.source.uri} -> {config.target.uri}"
    click.echo(f"would create {what}" if dry_run else f"created {what}; next: {invocation.command('up', name)}")


@click.command()
@volume_argument("names", nargs=-1, metavar="[NAME…]")
@pass_invocation
def up(invocation: Invocation, names: tuple[str, ...]) -> None:
    """Open volumes on this host (default: all). Prints an NBD URI for each when it serves."""
    wanted = _chosen(invocation, names)
    if not wanted:
        click.echo(f"no volume is recorded; make one: {invocation.command('create')} …", err=True)
        return
    for name in wanted:
        invocation.check_volume_name(name)
    invocation.agent_settings({})  # an agent that this starts could only refuse them
    invocation.prepare()
    settings = invocation.settings
    try:
        client.ensure_agent(settings.home, settings.state_url, settings.host)
    except client.AgentFailed as error:
        raise VerbError(FAILED, str(error)) from None
    first_error: VerbError | None = None
    for name in wanted:
        try:
            result = invocation.call("up", name)
        except VerbError as error:
            first_error = first_error or error
            continue
        if result.text:
            click.echo(f"shadowvol: note: {result.text}", err=True)
        told = result.data.get("nbd_uri") if isinstance(result.data, dict) else None
        click.echo(told or settings.home.nbd_uri(name))
    if first_error is not None:
        raise first_error


@click.command()
@volume_argument("names", nargs=-1, metavar="[NAME…]")
@click.option("--force", is_flag=True, help="Also with clients connected.")
@pass_invocation
def down(invocation: Invocation, names: tuple[str, ...], force: bool) -> None:
    """Drain and close volumes on this host (default: all that are up)."""
    wanted = _chosen(invocation, names)
    if not names:
        wanted = [name for name in wanted if invocation.record(name).state.up]
    first_error: VerbError | None = None
    for name in wanted:
        try:
            invocation.call("down", name, {"force": force})
        except VerbError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _chosen(invocation: Invocation, names: tuple[str, ...]) -> list[str]:
    """Volumes that all exist, each once."""
    for name in names:
        invocation.record(name)
    return list(dict.fromkeys(names)) or list(invocation.records())


@click.command()
@click.option("--log-level", metavar="LEVEL", help="error, warning, info or debug.  [default: info]")
@click.option("--socket-group", metavar="GROUP", help="Who may connect to volumes' sockets, besides the owner.")
@click.option("--socket-mode", metavar="MODE", help="Mode of volumes' sockets.  [default: 0600; 0660 with a group]")
@click.option(
    "--metrics",
    metavar="ADDRESS:PORT",
    help="Serve metrics for Prometheus there; PORT alone: on loopback (SHADOWVOL_METRICS).  [default: none]",
)
@click.option("--copies-max", metavar="N", help="How many volumes copy at once.  [default: 2]")
@pass_invocation
def agent(
    invocation: Invocation,
    log_level: str | None,
    socket_group: str | None,
    socket_mode: str | None,
    metrics: str | None,
    copies_max: str | None,
) -> int:
    """Be the agent of this host, in the foreground."""
    from shadowvol.agent.daemon import run_agent

    flags = {
        "log_level": log_level,
        "socket_group": socket_group,
        "socket_mode": socket_mode,
        "metrics": metrics,
        "copies_max": copies_max,
    }
    settings, agent_settings = invocation.settings, invocation.agent_settings(flags)
    invocation.prepare()
    return run_agent(settings, agent_settings)


@click.command()
@volume_argument()
@click.option("--force", is_flag=True, help="Bring it down first, also with clients connected.")
@pass_invocation
def delete(invocation: Invocation, name: str, force: bool) -> None:
    """Forget a volume. The data on its legs stays."""
    from shadowvol.agent.volumes import delete_volume

    record = invocation.record(name)
    if force and record.state.up and record.state.phase in ("setup", "committed"):
        invocation.call("down", name, {"force": True})
    with _lock_files(invocation, name) as nobody_runs:
        if not nobody_runs and not invocation.record(name).state.up:
            up, down = invocation.command("up", name), invocation.command("down", name)
            raise VerbError(REFUSED, f"volume {name} is coming up, or left a process behind; {up}, then {down} first")
        invocation.on_record(lambda coordinator: delete_volume(coordinator, name, force))


@contextmanager
def _lock_files(invocation: Invocation, name: str) -> Iterator[bool]:
    """The locks of the volume's processes are ours for the time of the block, and their files are gone after it.

    False: one of them is held, so a process lives; then nothing is removed. A file is removed only while its lock is
    held here, so whoever waits for it meanwhile looks again and finds a new file.
    """
    from shadowvol.link import locks

    home = invocation.settings.home
    paths = [path for path in (home.member_lock(name), home.transfer_lock(name)) if path.exists()]
    with ExitStack() as held:
        taken = []
        for path in paths:
            lock = locks.take(path)
            if lock is not None:
                taken.append(path)
                held.callback(os.close, lock)
        yield len(taken) == len(paths)
        if len(taken) == len(paths):
            for path in taken:
                path.unlink(missing_ok=True)
