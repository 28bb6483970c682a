"""What only the agent knows of a volume that is up, as data for status (STYLE: observability is part of a part)."""

import os
from typing import Any

from shadowvol.agent.iostatus import io_status
from shadowvol.agent.paths import Home
from shadowvol.agent.status import CopyState, Health, LegLive, LiveStatus, MemberLive
from shadowvol.agent.volume import Volume
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import LEG_NAMES, SOURCE, TARGET, Phase
from shadowvol.core.records import VolumeRecord


def record_of(engine: LeaderEngine) -> VolumeRecord:
    """The volume's record as the engine holds it in memory: what is durable."""
    members = {**engine.unresolved, **engine.live}
    return VolumeRecord(
        engine.config,
        engine.state,
        engine.map,
        epoch=engine.epoch,
        leader_host=engine.host,
        transition=engine.transition,
        members=members,
    )


def copy_state(volume: Volume, engine: LeaderEngine) -> tuple[CopyState, str | None]:
    """(idle | running | paused | backoff, why) as DESIGN 12."""
    if engine.state.phase is not Phase.COPYING:
        return "idle", None
    if engine.map.count_both() == len(engine.map):
        return "idle", None
    if engine.state.paused:
        return "paused", "paused by the operator"
    if not engine.live:
        return "backoff", "the member is not there; it is being started"
    if engine.backoff.failures:
        wait_s = max(0.0, engine.backoff.until_s - engine.now_s)
        return "backoff", f"{engine.backoff.reason}; next attempt in {wait_s:.1f} s"
    if not engine.copier_up:
        return "running", "the transfer process is starting"
    if engine.quarantine:
        return "running", "regions of an earlier leader's windows wait until its copier is known to have stopped"
    if volume.copies_ahead:
        return "running", f"waits for its turn: {' and '.join(volume.copies_ahead)} copy first on this host"
    if volume.allowed.rate is not None and volume.allowed.rate != engine.state.rate_bytes_per_s:
        return "running", "yields to the application"
    return "running", engine.state.goal and f"resync before {engine.state.goal}"


def leg_status(volume: Volume, engine: LeaderEngine, leg: int) -> LegLive:
    """Health from the leader's fault records and the member's own view of the open leg."""
    health = engine.legs[leg]
    members_view: dict[str, Any] = (volume.plane.statistics if volume.plane else {}).get("legs", {})
    open_error = members_view.get(LEG_NAMES[leg], {}).get("open_error")
    let_go = engine.state.phase is Phase.COMMITTED and leg == SOURCE and not engine.state.keep_undo
    in_use = not let_go and not (engine.state.phase is Phase.SETUP and leg == TARGET)
    state: Health = "ok"
    if let_go:
        state = "released"
    elif in_use and (open_error or health.failed):
        state = "failed" if open_error else "degraded"
    elif leg == SOURCE and engine.state.phase is Phase.COPYING and not engine.map.is_ok(SOURCE, 0, len(engine.map)):
        state = "degraded"  # it is being resynced
    since = None if health.since_s is None else volume.wall_clock(health.since_s)
    return LegLive(state, health.errors, open_error or health.last_error, since)


def live_status(home: Home, volume: Volume) -> LiveStatus:
    """Everything for `status --json` that is not in the record. The volume has an engine."""
    engine = volume.engine
    assert engine is not None and volume.plane is not None
    state, reason = copy_state(volume, engine)
    bytes_left = (len(engine.map) - engine.map.count_both()) * engine.geometry.region_bytes
    running = state == "running"
    reachable = [leg_status(volume, engine, leg).health != "failed" for leg in (SOURCE, TARGET)]
    members = tuple(
        MemberLive(host, "live" if host in engine.live else "lost", number, reachable[SOURCE], reachable[TARGET])
        for host, number in {**engine.unresolved, **engine.live}.items()
    )
    doing = engine.doing()
    transition = None
    if engine.transition is not None:
        transition = {**engine.transition, "waiting_for": doing["waiting_for"]}
    return LiveStatus(
        copy_state=state,
        copy_reason=reason,
        allowed_bytes_per_s=None if volume.allowed.rate is None else int(volume.allowed.rate),
        rate_bytes_per_s=volume.progress.rate_bytes_per_s() if running else 0.0,
        eta_s=volume.progress.eta_s(bytes_left) if running else None,
        legs=(leg_status(volume, engine, SOURCE), leg_status(volume, engine, TARGET)),
        nbd_uri=home.nbd_uri(volume.name) if volume.serving else None,
        device=volume.attachment.device,
        agent_pid=os.getpid(),
        member_pid=volume.plane.pid,
        transfer_pid=volume.copier.pid,
        host=volume.host,
        leader=engine.host,
        members=members,
        transition=transition,
        last_error=volume.attachment.error,
        io=io_status(
            volume.plane.statistics,
            volume.plane.age_s(),
            volume.longest,
            windows_open=len(engine.windows),
            change=doing["change"],
        ),
    )
