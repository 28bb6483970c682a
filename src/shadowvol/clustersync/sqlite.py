"""The coordinator of one host: the record in an SQLite file (statefile.py), shared by the agent and the CLI.

A thread of its own works on the file; tasks queue jobs and wait. A thread hop costs some 50 us, a commit's fsync more.

Invariants
- Jobs taken from the queue together are all under way at once, so any order of them is linearizable. Reads run first:
  they need no fsync. Then the commits, which share one SQLite transaction and one fsync.
- A `commit` cancelled while it waits was carried out completely or will be; it is never half done, nor withdrawn.
- A watch looks at the file, is told of a change, looks again. It is told after each commit made here, and within
  POLL_INTERVAL_S of one by another process or handle. The event it waits for is replaced before each look, so no change
  falls between look and wait.
"""

import copy
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from shadowvol.clustersync.coordinator import Change, Committed, CoordinatorUnreachable, RecordDamaged, Snapshot
from shadowvol.clustersync.statefile import RESERVE_BYTES, TOMBSTONES_MAX, StateFile, check_txn
from shadowvol.core.txn import Txn

POLL_INTERVAL_S = 0.05  # while somebody watches: look for commits of other processes
GROUP_TXNS_MAX = 64  # one SQLite transaction carries at most so many commits,
GROUP_BYTES_MAX = 1 << 20  # and fits the reserved log (a single larger one goes alone)


@dataclass(frozen=True, slots=True)
class SqliteStatistics:
    """What a coordinator did and is doing, for status and metrics."""

    commits: int  # transactions judged
    fsync_groups: int  # SQLite transactions that carried them
    queue_length: int
    watchers: int
    log_bytes: int
    free_bytes: int  # free pages inside the database


class _Job:
    """A task's request to the thread. `txn` for a commit, else `work`."""

    __slots__ = ("_done", "_error", "_result", "_token", "txn", "work")

    def __init__(self, work: Callable[[], Any] | None, txn: Txn | None = None) -> None:
        self.work = work
        self.txn = txn
        self._result: Any = None
        self._error: BaseException | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._done = trio.Event()

    def size_bytes(self) -> int:
        return sum(len(value) for _, value in self.txn.puts) if self.txn else 0

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Called in the thread."""
        self._result, self._error = result, error
        _wake(self._token, self._done.set)

    async def outcome(self) -> Any:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


def _wake(token: trio.lowlevel.TrioToken, call: Callable[[], object]) -> None:
    try:
        token.run_sync_soon(call)
    except trio.RunFinishedError:
        pass  # nobody is left to be told


class _Watcher:
    """One running watch(). `event` is replaced before each look at the file, so that no change falls between."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.event = trio.Event()

    def wake(self) -> None:
        """Called in the thread."""
        _wake(self._token, lambda: self.event.set())


class SqliteCoordinator:
    """Coordinator over one SQLite file. Any number of these, in any number of processes, may share the file.

    The constructor blocks (milliseconds; longer where the file is created) and raises RecordDamaged or
    CoordinatorUnreachable.
    """

    def __init__(
        self, path: Path | str, *, reserve_bytes: int = RESERVE_BYTES, tombstones_max: int = TOMBSTONES_MAX
    ) -> None:
        self._file = StateFile(Path(path), reserve_bytes, tombstones_max)
        self._wanted = threading.Condition()  # guards the three below
        self._queue: deque[_Job] = deque()  # bounded by the number of tasks: each waits for its own job
        self._watchers: set[_Watcher] = set()
        self._closing = False
        self._commits = 0  # changed by the thread only
        self._groups = 0
        # A daemon: a program that ends without aclose() is not held up, and loses nothing that was acknowledged.
        self._thread = threading.Thread(target=self._serve, name="shadowvol-record", daemon=True)
        self._thread.start()

    async def read(self, prefix: str) -> Snapshot:
        snapshot: Snapshot = await self._do(_Job(lambda: self._file.read(prefix)))
        return snapshot

    async def commit(self, txn: Txn) -> Committed:
        check_txn(txn)
        committed: Committed = await self._do(_Job(None, txn))
        return committed

    async def watch(self, prefix: str, after_revision: int) -> AsyncGenerator[list[Change], None]:
        """Also raises HistoryCompacted. Close it (aclosing) when done: while watches exist, the file is polled."""
        watcher = _Watcher()
        with self._wanted:
            self._watchers.add(watcher)
        try:
            while True:
                watcher.event = event = trio.Event()
                work = _Job(lambda: self._file.changes(prefix, after_revision))  # noqa: B023 (awaited right here)
                changes, after_revision = await self._do(work)
                if changes:
                    yield changes
                else:
                    await event.wait()
        finally:
            with self._wanted:
                self._watchers.discard(watcher)

    async def aclose(self) -> None:
        """Finish what was asked, close the file. Watches and later calls raise CoordinatorUnreachable."""
        with self._wanted:
            self._closing = True
            self._wanted.notify()
        await trio.to_thread.run_sync(self._thread.join)

    async def statistics(self) -> SqliteStatistics:
        statistics: SqliteStatistics = await self._do(_Job(self._statistics))
        return statistics

    async def _do(self, job: _Job) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._wanted:
            if self._closing:
                raise CoordinatorUnreachable(f"{self._file.path}: was closed here")
            self._queue.append(job)
            self._wanted.notify()
        return await job.outcome()

    # Below: in the thread.

    def _serve(self) -> None:
        while True:
            with self._wanted:
                if not self._queue and not self._closing:
                    self._wanted.wait(POLL_INTERVAL_S if self._watchers else None)
                jobs = list(self._queue)
                self._queue.clear()
                closing = self._closing
                watched = bool(self._watchers)
            for job in jobs:
                if job.work is not None:
                    self._run(job, job.work)
            for group in _groups([job for job in jobs if job.txn is not None]):
                self._commit(group)
            if closing:
                self._wake_watchers()
                self._file.close()
                return
            if watched and self._file_changed():
                self._wake_watchers()

    def _run(self, job: _Job, work: Callable[[], Any]) -> None:
        try:
            result = work()
        except Exception as error:
            job.finish(None, error)
        else:
            job.finish(result)

    def _commit(self, group: list[_Job]) -> None:
        self._commits += len(group)
        self._groups += 1
        try:
            outcomes = self._file.commit_group([job.txn for job in group if job.txn is not None])
        except (CoordinatorUnreachable, RecordDamaged) as error:
            for job in group:  # an exception of its own for each: tracebacks are written into them
                job.finish(None, copy.copy(error))
            return
        except Exception as error:
            for job in group:
                job.finish(None, error)
            return
        for job, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Committed):
                job.finish(outcome)
            else:
                job.finish(None, outcome)

    def _file_changed(self) -> bool:
        try:
            return self._file.changed_since_last_asked()
        except Exception:
            return True  # the watches look themselves, and raise what is wrong

    def _wake_watchers(self) -> None:
        with self._wanted:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.wake()

    def _statistics(self) -> SqliteStatistics:
        return SqliteStatistics(
            self._commits,
            self._groups,
            len(self._queue),
            len(self._watchers),
            self._file.log_bytes(),
            self._file.free_bytes(),
        )


def _groups(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """Cut into groups within the limits, in order."""
    group: list[_Job] = []
    group_bytes = 0
    for job in jobs:
        size_bytes = job.size_bytes()
        if group and (len(group) == GROUP_TXNS_MAX or group_bytes + size_bytes > GROUP_BYTES_MAX):
            yield group
            group, group_bytes = [], 0
        group.append(job)
        group_bytes += size_bytes
    if group:
        yield group
