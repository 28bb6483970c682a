"""Paces the copies of this host: feeds core/throttle.py with what members measure, and gives each copier its rate.

One task over all volumes that are up here. At most `copies_max` of them copy at once, in the order in which they came
to want it; who pauses, backs off or is done gives its place away.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.core.latency import between, from_sparse
from shadowvol.core.legs import Phase
from shadowvol.core.records import VolumeState
from shadowvol.core.throttle import MAX, AdaptiveThrottle, Copying, Pace
from shadowvol.nbd.counters import KINDS

if TYPE_CHECKING:
    from shadowvol.agent.volume import Volume
    from shadowvol.core.leader import LeaderEngine

PACE_S = 0.25
PACE_AT_REST_S = 2.0  # while no volume has anything under way
_PROCESSOR_CLOCK = 2  # of a process: what it and its threads have run for, as in clock_getcpuclockid(3)
DEADLINE_MARGIN = 1.15  # a deadline's rate leaves time for quiet turns and the last flush


@dataclass(frozen=True, slots=True)
class _Heard:
    """When a frame came, and the histograms that were in it: since the member's start."""

    at_s: float
    incarnation: int
    reads: list[int]
    writes: list[int]


class Pacer:
    """`volumes`: the agent's own dict of those that are up. Call run() in a task."""

    def __init__(self, volumes: "dict[str, Volume]", copies_max: int) -> None:
        self._volumes = volumes
        self._copies_max = copies_max
        self._throttle = AdaptiveThrottle()
        self._places: list[str] = []  # who wants to copy, the first come first
        self._copied: dict[str, int] = {}  # as last seen, of a volume's running copier
        self._worked: dict[str, tuple[int, float]] = {}  # its process, and seconds on a processor, likewise
        self._heard: dict[str, _Heard] = {}  # a member's last frame
        self._known: set[str] = set()
        self._stirred = trio.Event()

    async def run(self) -> None:
        while True:
            at_rest = all(volume.engine is None or volume.engine.at_rest for volume in self._volumes.values())
            if at_rest:
                self._stirred = trio.Event()
                with trio.move_on_after(PACE_AT_REST_S):
                    await self._stirred.wait()
            else:
                await trio.sleep(PACE_S)
            self.pace()

    def stir(self) -> None:
        """Some volume has something under way: its turn and pace do not wait for the slow round."""
        self._stirred.set()

    def heard(self, volume: "Volume", statistics: dict[str, Any]) -> None:
        """A member's Stats frame has come."""
        last = self._heard.get(volume.name)
        if last is not None and last.incarnation == statistics["incarnation"] and not _counted(statistics):
            self._heard[volume.name] = replace(last, at_s=trio.current_time())
            return
        reads, writes = (from_sparse(statistics["latencies"][kind]["buckets"]) for kind in KINDS)
        now = _Heard(trio.current_time(), statistics["incarnation"], reads, writes)
        self._heard[volume.name] = now
        if last is not None and last.incarnation == now.incarnation and volume.engine is not None:
            counted = between(last.reads, reads), between(last.writes, writes)
            self._throttle.frame(volume.name, volume.engine.state.impact, last.at_s, now.at_s, *counted)

    def pace(self) -> None:
        """Give each volume its turn and its pace."""
        now_s, wall_s = trio.current_time(), time.time()
        engines = {name: volume.engine for name, volume in self._volumes.items() if volume.engine is not None}
        for name in self._known - set(self._volumes):
            self._throttle.forget(name)
            self._heard.pop(name, None)
            self._copied.pop(name, None)
            self._worked.pop(name, None)
        self._known = set(self._volumes)
        wanting = {name for name, engine in engines.items() if _wants_to_copy(engine)}
        self._places = [name for name in self._places if name in wanting]
        self._places += sorted(wanting - set(self._places))
        copying = self._places[: self._copies_max]
        self._note_copied(copying)
        orders = [_copying(name, engines[name], wall_s) for name in copying]
        paces = self._throttle.plan(now_s, orders)
        for name, engine in engines.items():
            ahead = [] if name in copying or name not in wanting else copying
            engine.copy_turn = not ahead
            self._volumes[name].pace(paces.get(name, Pace(None)), ahead)

    def _note_copied(self, copying: list[str]) -> None:
        for name in copying:
            volume = self._volumes[name]
            before, now = self._copied.get(name, 0), volume.copier.bytes_read
            self._copied[name] = now
            worked_s = self._worked_s(name, volume.copier.pid)
            if volume.engine is not None and volume.engine.state.impact != MAX:
                self._throttle.copied(max(0, now - before))
                self._throttle.worked(worked_s, len(os.sched_getaffinity(0)))

    def _worked_s(self, name: str, pid: int | None) -> float:
        """Processor time of the volume's copier since the last call; 0 where that is not known."""
        try:
            now_s = time.clock_gettime(~pid << 3 | _PROCESSOR_CLOCK) if pid is not None else 0.0
        except OSError:  # it has just ended
            pid, now_s = None, 0.0
        before_pid, before_s = self._worked.get(name, (None, 0.0))
        self._worked[name] = (pid or 0, now_s)
        return now_s - before_s if pid is not None and pid == before_pid else 0.0


def _counted(statistics: dict[str, Any]) -> bool:
    return bool(statistics["reads"] or statistics["writes"])


def _wants_to_copy(engine: "LeaderEngine") -> bool:
    return (
        engine.state.phase is Phase.COPYING
        and not engine.state.paused
        and bool(engine.live)
        and engine.now_s >= engine.backoff.until_s
        and engine.map.count_both() < len(engine.map)
    )


def _copying(name: str, engine: "LeaderEngine", wall_s: float) -> Copying:
    state = engine.state
    bytes_left = (len(engine.map) - engine.map.count_both()) * engine.geometry.region_bytes
    needed = rate_needed(state, bytes_left, wall_s)
    impact = MAX if needed is None else state.impact  # the deadline is over: as fast as it may
    return Copying(name, impact, state.rate_bytes_per_s, max(state.min_rate_bytes_per_s or 0, needed or 0))


def rate_needed(state: VolumeState, bytes_left: int, wall_s: float) -> float | None:
    """Bytes per second with which the copy is done by its deadline; 0: it has none; None: that is over."""
    if state.finish_by_s is None:
        return 0.0
    left_s = state.finish_by_s - wall_s
    return None if left_s <= 0 else DEADLINE_MARGIN * bytes_left / left_s
