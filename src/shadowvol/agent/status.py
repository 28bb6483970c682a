"""The status of a volume: what `status --json` prints, made from the record and from what the agent alone knows.

Pure. The fields of DESIGN 12 are all there, always; without an agent (`live` is None) those that only a running agent
knows are null, and `copy.state` is what it can only be: nothing copies without an agent.
Beyond the contract: `up`, `paused`, `goal` (abort or undo under way), `bytes_both_ok`, `io` (numbers from the member).
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from shadowvol.agent.iostatus import io_status
from shadowvol.agent.volumes import shown_phase
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, SOURCE, TARGET, Phase
from shadowvol.core.records import VolumeRecord

CopyState = Literal["idle", "running", "paused", "backoff", "failed"]
Health = Literal["ok", "degraded", "failed", "released"]
MemberState = Literal["live", "lost", "fenced"]


@dataclass(frozen=True, slots=True)
class LegLive:
    """What is seen of one leg. `since`: ISO 8601 with zone, when it came to this health."""

    health: Health = "ok"
    errors: int = 0
    last_error: str | None = None
    since: str | None = None


@dataclass(frozen=True, slots=True)
class MemberLive:
    """A member and which legs it reaches; None: not known."""

    host: str
    state: MemberState
    incarnation: int | None
    source_reachable: bool | None = None
    target_reachable: bool | None = None


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """What only the agent knows of a volume. `nbd_uri` is None while down; pids are those on this host.

    `transition`: None or {"verb", "id", "state", "waiting_for": [host…]}. `io`: see agent/iostatus.py.
    """

    host: str
    copy_state: CopyState = "idle"
    copy_reason: str | None = None
    rate_bytes_per_s: float | None = None
    allowed_bytes_per_s: int | None = None  # to the copy, by the throttle; None: full speed
    eta_s: float | None = None
    legs: tuple[LegLive, LegLive] = (LegLive(), LegLive())
    nbd_uri: str | None = None
    device: str | None = None
    agent_pid: int | None = None
    member_pid: int | None = None
    transfer_pid: int | None = None
    leader: str | None = None
    members: tuple[MemberLive, ...] = ()
    transition: dict[str, Any] | None = None
    last_error: str | None = None  # overrides the recorded one
    io: dict[str, Any] = field(default_factory=dict)


def status_of(
    record: VolumeRecord, live: LiveStatus | None, *, host: str | None = None, agent_pid: int | None = None
) -> dict[str, Any]:
    """One object of `status --json`. `host` (this one) and `agent_pid` are for a volume that is not up here."""
    config, state, region_map = record.config, record.state, record.map
    total = len(region_map)
    both = region_map.count_both()
    released = _released(record)
    transition = live.transition if live is not None else _recorded_transition(record)
    return {
        "name": config.name,
        "kind": config.kind,
        "phase": str(shown_phase(record)),
        "preferred": LEG_NAMES[state.preferred],
        "size_bytes": config.size_bytes,
        "region_bytes": config.region_bytes,
        "regions_total": total,
        "regions_source_ok": 0 if released == SOURCE else region_map.count_ok(SOURCE),
        "regions_target_ok": region_map.count_ok(TARGET),
        "regions_both_ok": both,
        "fraction_both_ok": both / total,
        "bytes_both_ok": _bytes_both_ok(record),
        "copy": _copy(record, live),
        "legs": {name: _leg(record, live, leg) for leg, name in enumerate(LEG_NAMES)},
        "endpoint": None if live is None or live.nbd_uri is None else {"nbd_uri": live.nbd_uri, "device": live.device},
        "processes": {
            "agent": live.agent_pid if live else agent_pid,
            "member": live.member_pid if live else None,
            "transfer": live.transfer_pid if live else None,
        },
        "host": live.host if live is not None else host,
        "leader": (live.leader if live is not None else record.leader_host) or None,
        "epoch": record.epoch,
        "members": _members(record, live),
        "transition": transition,
        "last_switch_pause_ms": state.last_switch_pause_ms,
        "undo_available": _undo_available(record),
        "last_error": (live.last_error if live is not None else None) or state.last_error,
        "up": state.up,
        "paused": state.paused,
        "goal": state.goal,
        "io": dict(live.io) if live is not None else io_status({}, None),
    }


def iso_utc(wall_s: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds")


def _released(record: VolumeRecord) -> int | None:
    """The leg that the volume has let go of, if any."""
    return SOURCE if record.state.phase is Phase.COMMITTED and not record.state.keep_undo else None


def _bytes_both_ok(record: VolumeRecord) -> int:
    """The last region may be short."""
    total = record.map.count_both() * record.config.region_bytes
    if record.map.bits[-1] == BOTH_OK:
        total -= -record.config.size_bytes % record.config.region_bytes
    return total


def _copy(record: VolumeRecord, live: LiveStatus | None) -> dict[str, Any]:
    state = record.state
    if live is not None:
        copy_state, reason = live.copy_state, live.copy_reason
    elif shown_phase(record) is Phase.COPYING:
        copy_state = "paused" if state.paused else "idle"
        reason = "no agent serves it" if state.up else "the volume is down"
    else:
        copy_state, reason = "idle", None
    return {
        "state": copy_state,
        "reason": reason,
        "rate_bytes_per_s": live.rate_bytes_per_s if live else None,
        "eta_s": live.eta_s if live else None,
        "bytes_copied": state.bytes_copied,
        "bytes_recopied": state.bytes_recopied,
        "throttle": {
            "rate_bytes_per_s": state.rate_bytes_per_s,
            "impact": state.impact,
            "min_rate_bytes_per_s": state.min_rate_bytes_per_s,
            "finish_by": None if state.finish_by_s is None else iso_utc(state.finish_by_s),
            "allowed_bytes_per_s": live.allowed_bytes_per_s if live else None,
        },
    }


def _leg(record: VolumeRecord, live: LiveStatus | None, leg: int) -> dict[str, Any]:
    released = leg == _released(record)
    seen = live.legs[leg] if live is not None else None
    return {
        "uri": record.config.leg(leg).uri,
        "cache": record.config.leg(leg).cache,
        "health": "released" if released else seen.health if seen else None,
        "errors": seen.errors if seen else None,
        "last_error": seen.last_error if seen else None,
        "since": seen.since if seen else None,
    }


def _members(record: VolumeRecord, live: LiveStatus | None) -> list[dict[str, Any]]:
    if live is None:
        nothing = {name: None for name in LEG_NAMES}
        return [
            {"host": host, "state": None, "incarnation": incarnation, "legs": dict(nothing)}
            for host, incarnation in sorted(record.members.items())
        ]
    return [
        {
            "host": member.host,
            "state": member.state,
            "incarnation": member.incarnation,
            "legs": {"source": _reach(member.source_reachable), "target": _reach(member.target_reachable)},
        }
        for member in live.members
    ]


def _reach(reachable: bool | None) -> str | None:
    return None if reachable is None else "reachable" if reachable else "unreachable"


def _recorded_transition(record: VolumeRecord) -> dict[str, Any] | None:
    if record.transition is None:
        return None
    return {
        "verb": record.transition.get("verb"),
        "id": record.transition.get("id"),
        "state": record.transition.get("state"),
        "waiting_for": [],
    }


def _undo_available(record: VolumeRecord) -> bool:
    state = record.state
    if state.goal is not None:
        return False
    if state.phase is Phase.COMMITTED:
        return state.keep_undo
    return state.phase is Phase.COPYING and state.preferred == TARGET
