"""What the CLI asks of the agent: each verb's way to the engine, and back to an exit code, a text and data.

The engine decides whether a verb is allowed; here is only what is about this host: is the volume up, does it come up.
"""

import os
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.agent.errors import FAILED, VerbError, no_such_volume
from shadowvol.agent.legcheck import check_before_up, failed_leg
from shadowvol.agent.snapshot import live_status, record_of
from shadowvol.agent.status import status_of
from shadowvol.agent.volume import Volume
from shadowvol.agent.volumes import record_up, retarget_volume
from shadowvol.core.records import Keys, RecordError, VolumeRecord, decode_volume, volume_names
from shadowvol.link import locks

if TYPE_CHECKING:
    from shadowvol.agent.daemon import Agent

UP_LIMIT_S = 20.0
STATISTICS_LIMIT_S, STATISTICS_POLL_S = 2.0, 0.05  # a member sends them at least once a second
Outcome = tuple[int, str, Any]

# What goes to the engine, and the options that it takes.
TRANSITIONS: dict[str, tuple[str, ...]] = {
    "start": (),
    "cutover": ("early",),
    "undo": ("early",),
    "commit": ("keep_undo", "force"),
    "abort": (),
    "pause": (),
    "resume": (),
    "throttle": ("rate_bytes_per_s", "impact", "min_rate_bytes_per_s", "finish_by_s"),
}


async def perform(agent: "Agent", verb: str, name: str | None, options: dict[str, Any]) -> Outcome:
    """(exit code, text, data). Raises CoordinatorUnreachable, RecordDamaged, RecordError."""
    if verb == "ping":
        metrics = None if agent.metrics is None else agent.metrics.snapshot()
        about = {"pid": os.getpid(), "host": agent.host, "state_url": agent.state_url, "metrics": metrics}
        return 0, "", about
    if verb == "status":
        return await _status(agent, name, options)
    if name is None:
        return 2, f"{verb} needs a volume", None
    try:
        if verb in ("up", "down"):
            async with agent.coming_and_going[name]:
                return await (_up(agent, name) if verb == "up" else _down(agent, name, bool(options.get("force"))))
        if verb == "attach":
            return await _attach(agent, name, options)
        if verb == "detach":
            return await _detach(agent, name)
        if verb == "retarget":
            return await _retarget(agent, name, options)
        if verb in TRANSITIONS:
            unknown = set(options) - set(TRANSITIONS[verb])
            if unknown:
                return 2, f"{verb} takes no option {sorted(unknown)[0]}", None
            code, text = await (await _up_here(agent, name)).command(verb, options)
            return code, text, None
    except VerbError as error:
        return error.code, error.text, None
    return 2, f"the agent knows no verb {verb}", None


async def _record(agent: "Agent", name: str) -> VolumeRecord:
    snapshot = await agent.coordinator.read(Keys(name).prefix)
    if Keys(name).config not in snapshot.entries:
        raise no_such_volume(name)
    return decode_volume(name, snapshot.entries)


async def _up_here(agent: "Agent", name: str) -> Volume:
    volume = agent.volumes.get(name)
    if volume is None:
        await _record(agent, name)
        raise VerbError(3, f"volume {name} is down; bring it up first: shadowvol up {name}")
    return volume


async def _up(agent: "Agent", name: str) -> Outcome:
    """That it is to be up is recorded before anything starts, so that it cannot be deleted meanwhile."""
    record = await _record(agent, name)
    agent.home.check(name)
    note, known = "", agent.volumes.get(name)
    is_new = known is None or known.ended.is_set()
    looked = is_new and locks.is_free(agent.home.member_lock(name))  # else a member may have claimed the legs
    if looked:
        note = await check_before_up(record)
    if is_new:
        record = await record_up(agent.coordinator, name)
    volume = agent.bring_up(record.config)
    if not await volume.wait_serving(UP_LIMIT_S):
        error = volume.error or VerbError(FAILED, "its member did not start")
        text = f"volume {name} does not serve yet: {error.text}; see the agent's log {agent.home.agent_log}"
        return error.code, text, None
    engine = volume.engine
    if engine is not None and not engine.state.up:
        code, text = await volume.command("wishes", {"up": True})
        if code != 0:
            return code, text, None
    if not looked and volume.plane is not None:
        with trio.move_on_after(STATISTICS_LIMIT_S):
            while not volume.plane.statistics:
                await trio.sleep(STATISTICS_POLL_S)
    if volume.plane is not None and (failed := failed_leg(record, volume.plane.statistics)) is not None:
        return 1, f"volume {name} is up, but I/O fails until its leg is back: {failed}", None
    return 0, note, {"nbd_uri": agent.home.nbd_uri(name)}


async def _down(agent: "Agent", name: str, force: bool) -> Outcome:
    await _record(agent, name)
    volume = agent.volumes.get(name)
    if volume is None:
        return 0, "", None
    attachment = volume.attachment
    if attachment.wanted:
        where = f" as {attachment.device}" if attachment.device else ""
        return 3, f"volume {name} is attached{where}, which must not die; shadowvol detach {name} first", None
    attachment.closing = True
    try:
        code, text = await volume.take_down(force)
    finally:
        attachment.closing = False
    return code, text, None


async def _attach(agent: "Agent", name: str, options: dict[str, Any]) -> Outcome:
    """Only while it is up: what is attached to a volume that is down would hang."""
    volume = await _up_here(agent, name)
    return 0, "", {"device": await volume.attachment.attach(options.get("device"))}


async def _detach(agent: "Agent", name: str) -> Outcome:
    record = await _record(agent, name)
    volume = agent.volumes.get(name)
    if volume is not None:
        await volume.attachment.detach()
    elif agent.host in record.attached:
        return 3, f"volume {name} is down, but was attached; shadowvol up {name}, then detach", None
    return 0, "", None


async def _retarget(agent: "Agent", name: str, options: dict[str, Any]) -> Outcome:
    config = await retarget_volume(
        agent.coordinator,
        name,
        options["target"],
        force=bool(options.get("force")),
        provision=bool(options.get("provision")),
        target_cache=options.get("target_cache", "host"),
    )
    volume = agent.volumes.get(name)
    if volume is not None:
        volume.use_config(config)
    return 0, "", None


async def _status(agent: "Agent", name: str | None, options: dict[str, Any]) -> Outcome:
    """`until` with `limit_s`: the answer is kept back so long while the volume is not in that phase."""
    waited = agent.volumes.get(name) if name is not None and "until" in options else None
    if waited is not None:
        await waited.wait_phase(options["until"], float(options["limit_s"]))
    snapshot = await agent.coordinator.read("volumes/" if name is None else Keys(name).prefix)
    names = [name] if name is not None else volume_names(snapshot.entries)
    found: list[dict[str, Any]] = []
    for each in names:
        volume = agent.volumes.get(each)
        if volume is not None and volume.engine is not None:
            found.append(status_of(record_of(volume.engine), live_status(agent.home, volume)))
            continue
        keys = Keys(each)
        entries = {key: entry for key, entry in snapshot.entries.items() if key.startswith(keys.prefix)}
        if keys.config not in entries:
            return 4, f"no volume {each}", None
        try:
            found.append(status_of(decode_volume(each, entries), None, host=agent.host, agent_pid=os.getpid()))
        except RecordError:
            if name is not None:
                raise
    return 0, "", found[0] if name is not None else found
