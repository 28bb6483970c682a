"""The coordinator in memory: the same semantics as the real ones, proved by the same contract suite.

`MemoryStore` is the pure heart, synchronous and deterministic: the seeded simulator and the crash enumeration drive it
directly. `MemoryCoordinator` is a handle to a store, as an agent holds one; several may share it. A store lives as long
as the object does, never fails, and loses only relaxed commits, at power_loss(): faults are added by who wraps it.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import trio

from shadowvol.clustersync.coordinator import Change, Committed, CoordinatorUnreachable, Snapshot
from shadowvol.clustersync.statefile import TOMBSTONES_MAX, TRIM_EVERY_REVISIONS, HistoryCompacted, check_txn
from shadowvol.core.txn import Compare, Entry, Holds, Txn


class MemoryStore:
    """Keys, revisions, remembered deletions. `on_commit` is called after each transaction that changed something."""

    def __init__(self, tombstones_max: int = TOMBSTONES_MAX) -> None:
        self.revision = 0
        self.entries: dict[str, Entry] = {}
        self.on_commit: list[Callable[[], Any]] = []
        self._deleted: dict[str, int] = {}  # key -> revision of its deletion, oldest first
        self._compacted = 0
        self._tombstones_max = tombstones_max
        self._undone_by_power: list[tuple[int, dict[str, Entry], dict[str, int], int]] = []  # before each relaxed one

    def read(self, prefix: str) -> Snapshot:
        keys = sorted(key for key in self.entries if key.startswith(prefix))
        return Snapshot(self.revision, {key: self.entries[key] for key in keys})

    def commit(self, txn: Txn) -> Committed:
        check_txn(txn)
        if not all(self._holds(compare) for compare in txn.compares):
            return Committed(False, self.revision)
        doomed = {key for deleted in txn.deletes for key in self.entries if _covers(deleted, key)}
        if doomed or txn.puts:
            if txn.relaxed:
                before = (self.revision, dict(self.entries), dict(self._deleted), self._compacted)
                self._undone_by_power.append(before)
            else:
                self._undone_by_power.clear()
            self.revision += 1
            self._delete(doomed)
            for key, value in txn.puts:
                old = self.entries.get(key)
                created = self.revision if old is None else old.create_revision
                self.entries[key] = Entry(value, created, self.revision)
                self._deleted.pop(key, None)
            if self.revision % TRIM_EVERY_REVISIONS == 0:
                self._trim_tombstones()
            for call in list(self.on_commit):
                call()
        return Committed(True, self.revision)

    def changes(self, prefix: str, after_revision: int) -> list[Change]:
        """Last states of the keys changed above `after_revision`, oldest change first."""
        if after_revision < self._compacted:
            raise HistoryCompacted(f"changes after revision {after_revision} are gone (compacted to {self._compacted})")
        changes = [Change(key, entry, entry.mod_revision) for key, entry in self.entries.items()]
        changes += [Change(key, None, revision) for key, revision in self._deleted.items()]
        return sorted(
            (change for change in changes if change.revision > after_revision and change.key.startswith(prefix)),
            key=lambda change: (change.revision, change.key),
        )

    @property
    def relaxed_count(self) -> int:
        """Commits at the end that a power failure may undo."""
        return len(self._undone_by_power)

    def power_loss(self, undone: int) -> None:
        """The last `undone` relaxed commits (at most relaxed_count) have not happened."""
        if undone:
            before = self._undone_by_power[-undone]
            self.revision, self.entries, self._deleted, self._compacted = before
        self._undone_by_power.clear()

    def _holds(self, compare: Compare) -> bool:
        entry = self.entries.get(compare.key)
        match compare.holds:
            case Holds.PRESENT:
                return entry is not None
            case Holds.ABSENT:
                return entry is None
            case Holds.VALUE:
                return entry is not None and entry.value == compare.value
            case Holds.MOD_REVISION:
                return entry is not None and entry.mod_revision == compare.revision

    def _delete(self, keys: set[str]) -> None:
        for key in sorted(keys):
            del self.entries[key]
            self._deleted.pop(key, None)  # so that it goes to the end
            self._deleted[key] = self.revision

    def _trim_tombstones(self) -> None:
        """Whole revisions only, so that `_compacted` says exactly what is gone."""
        if len(self._deleted) > self._tombstones_max:
            self._compacted = list(self._deleted.values())[-self._tombstones_max - 1]
            self._deleted = {key: revision for key, revision in self._deleted.items() if revision > self._compacted}


def _covers(deleted: str, key: str) -> bool:
    return key.startswith(deleted) if deleted.endswith("/") else key == deleted


class MemoryCoordinator:
    """Coordinator protocol over a MemoryStore, for one trio run."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store if store is not None else MemoryStore()
        self._closed = False
        self._watch_events: list[trio.Event] = []

    async def read(self, prefix: str) -> Snapshot:
        await self._reach()
        return self.store.read(prefix)

    async def commit(self, txn: Txn) -> Committed:
        await self._reach()
        return self.store.commit(txn)

    async def watch(self, prefix: str, after_revision: int) -> AsyncGenerator[list[Change], None]:
        """Also raises HistoryCompacted."""
        while True:
            await self._reach()
            changes = self.store.changes(prefix, after_revision)
            after_revision = self.store.revision
            if changes:
                yield changes
                continue
            await self._wait_for_commit()

    async def aclose(self) -> None:
        self._closed = True
        for event in self._watch_events:
            event.set()
        await trio.lowlevel.checkpoint()

    async def _reach(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise CoordinatorUnreachable("was closed here")

    async def _wait_for_commit(self) -> None:
        event = trio.Event()
        self._watch_events.append(event)
        self.store.on_commit.append(event.set)
        try:
            await event.wait()
        finally:
            self.store.on_commit.remove(event.set)
            self._watch_events.remove(event)
