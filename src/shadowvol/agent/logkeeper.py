"""Keeps a member's activity log in the record of truth: each ask of it is replied to when it is durable."""

import logging
from collections import deque

import trio

from shadowvol.agent.dataplane import DataPlane
from shadowvol.clustersync.coordinator import Coordinator, CoordinatorUnreachable
from shadowvol.core.geometry import Run
from shadowvol.core.messages import Ask, LogZones, Reply, UnlogZones
from shadowvol.core.records import ActivityLog, VolumeRecord

RETRY_S = 0.5

_logger = logging.getLogger("shadowvol.agent")


class LogKeeper:
    """One volume's, on this host. Call load() first, then run() in a task; the other methods do not block."""

    def __init__(self, volume: str, coordinator: Coordinator, host: str) -> None:
        self._volume = volume
        self._coordinator = coordinator
        self._host = host
        self._log = ActivityLog(volume, host, set())
        self._incarnation = 0
        self._asks: deque[Ask] = deque()
        self._wanted = trio.Event()

    def load(self, record: VolumeRecord) -> None:
        """What is durable."""
        self._log = ActivityLog(self._volume, self._host, record.activity.get(self._host, set()))
        self._incarnation = record.members.get(self._host, 0)

    def runs(self) -> list[Run]:
        """What is logged, as runs of zones."""
        return self._log.runs()

    def take(self, ask: Ask) -> None:
        """The member wants zones logged, or let go."""
        self._asks.append(ask)
        self._wanted.set()

    def forget_asks(self) -> None:
        """The member is gone."""
        self._asks.clear()

    async def run(self, plane: DataPlane) -> None:
        """One transaction after the other."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._asks:
                await self._perform(plane, self._asks.popleft())

    async def _perform(self, plane: DataPlane, ask: Ask) -> None:
        want = ask.want
        zones = want.zones if isinstance(want, LogZones | UnlogZones) else []
        if ask.incarnation != self._incarnation:  # it has joined, so its predecessor's log has been emptied
            self._log = ActivityLog(self._volume, self._host, set())
            self._incarnation = ask.incarnation
        while ask.incarnation == plane.incarnation:
            before = set(self._log.zones)
            add, remove = (zones, []) if isinstance(want, LogZones) else ([], zones)
            try:
                committed = await self._coordinator.commit(self._log.txn(add, remove, ask.incarnation))
            except CoordinatorUnreachable as error:
                self._log.zones = before | self._log.zones
                _logger.error("%s: the activity log cannot be written: %s; trying again", self._volume, error)
                await trio.sleep(RETRY_S)
                continue
            if committed.ok:
                plane.send(Reply(ask.incarnation, ask.number))
            else:
                self._log.zones = before
            return
