"""What a scrape is made from: a snapshot of every volume that is up here, taken in the agent's own loop.

A scrape comes on another thread, which must not look into engines: it asks the loop for readings, and these are plain
data that nobody changes afterwards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.agent.iostatus import is_fresh
from shadowvol.agent.snapshot import live_status, record_of
from shadowvol.agent.status import status_of

if TYPE_CHECKING:
    from shadowvol.agent.daemon import Agent
    from shadowvol.agent.paths import Home
    from shadowvol.agent.volume import Volume


@dataclass(frozen=True, slots=True)
class VolumeReading:
    """`status`: as `status --json`, None while the volume has no leadership. `latencies`, `holds`: as the member told
    them (nbd/counters.py), None where it does not. `member_up`: it is there, has the state, and tells."""

    name: str
    status: dict[str, Any] | None
    member_up: bool
    latencies: dict[str, Any] | None = None
    holds: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AgentReading:
    """`damaged_records`: volumes whose record does not check out."""

    host: str
    damaged_records: int
    volumes: tuple[VolumeReading, ...]


async def read_agent(agent: "Agent") -> AgentReading:
    """Lets other tasks run between two volumes: that of a large map takes some milliseconds."""
    readings = []
    for volume in list(agent.volumes.values()):
        readings.append(_read_volume(agent.home, volume))
        await trio.lowlevel.checkpoint()
    readings.sort(key=lambda reading: reading.name)
    return AgentReading(agent.host, len(agent.broken), tuple(readings))


def _read_volume(home: "Home", volume: "Volume") -> VolumeReading:
    engine, plane = volume.engine, volume.plane
    told = plane.statistics if plane is not None and is_fresh(plane.age_s()) else {}
    return VolumeReading(
        volume.name,
        status_of(record_of(engine), live_status(home, volume)) if engine is not None and plane is not None else None,
        volume.serving and bool(told),
        told.get("latencies"),
        told.get("holds"),
    )
