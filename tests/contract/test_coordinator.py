"""The contract of Coordinator (src/shadowvol/clustersync/coordinator.py), passed by every engine and by the fake.

The first part runs against each; the second is what only the SQLite file promises: durability over kill -9, full disks,
damaged and foreign files.
"""

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shadowvol.clustersync import statefile
from shadowvol.clustersync.coordinator import Change, Coordinator, CoordinatorUnreachable, RecordDamaged
from shadowvol.clustersync.open import open_coordinator
from shadowvol.clustersync.sqlite import GROUP_BYTES_MAX, SqliteCoordinator
from shadowvol.clustersync.statefile import FORMAT, TOMBSTONES_MAX, TRIM_EVERY_REVISIONS, HistoryCompacted, StateFile
from shadowvol.core.txn import Compare, Entry, Holds, Txn
from tests.support.loopdev import loop_device, make_ext4, mounted
from tests.support.memory_coordinator import MemoryCoordinator, MemoryStore

DEADLINE_S = 20  # of anything that waits for a change


class Place:
    """Where one record lives. Each open() is one more handle to it, closed with the test."""

    def __init__(self) -> None:
        self.handles: list[Coordinator] = []

    def open(self) -> Coordinator:
        handle = self._open()
        self.handles.append(handle)
        return handle

    def _open(self) -> Coordinator:
        raise NotImplementedError


class SqlitePlace(Place):
    def __init__(self, folder: Path, tombstones_max: int) -> None:
        super().__init__()
        self.path = folder / "record.db"
        self.tombstones_max = tombstones_max

    def _open(self) -> SqliteCoordinator:
        return SqliteCoordinator(self.path, reserve_bytes=256 << 10, tombstones_max=self.tombstones_max)


class MemoryPlace(Place):
    def __init__(self, folder: Path, tombstones_max: int) -> None:
        super().__init__()
        self.store = MemoryStore(tombstones_max)

    def _open(self) -> MemoryCoordinator:
        return MemoryCoordinator(self.store)


ENGINES = {"sqlite": SqlitePlace, "memory": MemoryPlace}


@pytest.fixture(params=ENGINES)
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A place without content."""
    place = ENGINES[request.param](tmp_path, TOMBSTONES_MAX)
    yield place
    for handle in place.handles:
        await handle.aclose()


@pytest.fixture(params=ENGINES)
async def forgetful_place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """A place that remembers ten deletions."""
    place = ENGINES[request.param](tmp_path, 10)
    yield place
    for handle in place.handles:
        await handle.aclose()


def put(key: str, value: bytes, *compares: Compare) -> Txn:
    return Txn(compares, ((key, value),))


async def values(coordinator: Coordinator, prefix: str = "") -> dict[str, bytes]:
    return {key: entry.value for key, entry in (await coordinator.read(prefix)).entries.items()}


async def watch_until(coordinator: Coordinator, prefix: str, after_revision: int, last_revision: int) -> list[Change]:
    """Every change that a watch tells, up to the one of `last_revision`."""
    told: list[Change] = []
    watch: Any = coordinator.watch(prefix, after_revision)
    with trio.fail_after(DEADLINE_S):
        async with aclosing(watch):
            async for batch in watch:
                assert batch, "a watch never tells an empty batch"
                told += batch
                if told[-1].revision >= last_revision:
                    return told
    raise AssertionError("a watch ended by itself")


# ---- transactions ----


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare("key", Holds.VALUE, b"two"), True),
        (Compare("key", Holds.VALUE, b"one"), False),
        (Compare("key", Holds.VALUE, b""), False),
        (Compare("missing", Holds.VALUE, b""), False),
        (Compare("empty", Holds.VALUE, b""), True),
        (Compare("key", Holds.PRESENT), True),
        (Compare("empty", Holds.PRESENT), True),
        (Compare("missing", Holds.PRESENT), False),
        (Compare("ke", Holds.PRESENT), False),
        (Compare("key", Holds.ABSENT), False),
        (Compare("missing", Holds.ABSENT), True),
        (Compare("key", Holds.MOD_REVISION, revision=2), True),
        (Compare("key", Holds.MOD_REVISION, revision=1), False),
        (Compare("missing", Holds.MOD_REVISION, revision=0), False),
        (Compare("empty", Holds.MOD_REVISION, revision=3), True),
    ],
    ids=lambda argument: f"{argument.holds.name}-{argument.key}" if isinstance(argument, Compare) else None,
)
async def test_each_kind_of_compare(place: Place, compare: Compare, holds: bool) -> None:
    """Each compare judges the key as it stands, and a change follows exactly when it holds."""
    coordinator = place.open()
    base = (await coordinator.commit(put("key", b"one"))).revision - 1
    await coordinator.commit(put("key", b"two"))
    await coordinator.commit(put("empty", b""))
    at = Compare(compare.key, compare.holds, compare.value, base + compare.revision)
    committed = await coordinator.commit(put("outcome", b"", at))
    assert committed.ok == holds
    assert ("outcome" in await values(coordinator)) == holds


async def test_a_relaxed_transaction_is_seen_at_once(place: Place) -> None:
    assert (await place.open().commit(replace(put("a", b"1"), relaxed=True))).ok
    assert (await place.open().commit(replace(put("a", b"2", Compare("a", Holds.VALUE, b"1")), relaxed=True))).ok
    assert await values(place.open()) == {"a": b"2"}


async def test_one_failing_compare_refuses_everything(place: Place) -> None:
    """Puts and deletes take effect together or not at all, and a refusal does not move the revision."""
    coordinator = place.open()
    before = await coordinator.commit(Txn(puts=(("a", b"1"), ("b/x", b"2"))))
    txn = Txn(
        compares=(Compare("a", Holds.PRESENT), Compare("b/x", Holds.VALUE, b"other"), Compare("c", Holds.ABSENT)),
        puts=(("a", b"changed"), ("c", b"new")),
        deletes=("b/",),
    )
    committed = await coordinator.commit(txn)
    assert (committed.ok, committed.revision) == (False, before.revision)
    assert await values(coordinator) == {"a": b"1", "b/x": b"2"}


async def test_a_prefix_is_replaced_in_one_transaction(place: Place) -> None:
    """Deletes come before puts; a delete with a final slash takes every key below it and no neighbour."""
    coordinator = place.open()
    keys = ("map", "map-old", "map/0", "map/1", "map/1/x", "map0", "mao/9")
    await coordinator.commit(Txn(puts=tuple((key, b"old") for key in keys)))
    committed = await coordinator.commit(Txn(puts=(("map/1", b"new"), ("map/2", b"new")), deletes=("map/",)))
    assert committed.ok
    expected = {"map": b"old", "map-old": b"old", "map0": b"old", "mao/9": b"old", "map/1": b"new", "map/2": b"new"}
    assert await values(coordinator) == expected


async def test_a_delete_without_slash_takes_one_key(place: Place) -> None:
    coordinator = place.open()
    await coordinator.commit(Txn(puts=(("a", b""), ("a/b", b""), ("ab", b""))))
    assert (await coordinator.commit(Txn(deletes=("a", "missing")))).ok
    assert set(await values(coordinator)) == {"a/b", "ab"}


async def test_compares_see_the_state_before_the_transaction(place: Place) -> None:
    coordinator = place.open()
    await coordinator.commit(put("a", b"1"))
    txn = Txn((Compare("a", Holds.VALUE, b"1"), Compare("b", Holds.ABSENT)), (("b", b"2"),), ("a",))
    assert (await coordinator.commit(txn)).ok
    assert await values(coordinator) == {"b": b"2"}


@pytest.mark.parametrize("txn", [Txn(puts=(("a", b"1"), ("b", b"2"), ("a", b"3"))), Txn(puts=(("a", "text"),))])  # type: ignore[arg-type]
async def test_a_malformed_transaction_is_refused(place: Place, txn: Txn) -> None:
    """Putting a key twice, or something that is not bytes, is a mistake of the caller; nothing happens."""
    coordinator = place.open()
    with pytest.raises(ValueError):
        await coordinator.commit(txn)
    assert await values(coordinator) == {}


async def test_revisions_grow_with_each_change_and_only_then(place: Place) -> None:
    """create_revision and mod_revision of an entry are the store's revision of those transactions."""
    coordinator = place.open()
    first = await coordinator.commit(Txn(puts=(("a", b"1"), ("b", b"1"))))
    second = await coordinator.commit(put("a", b"2"))
    idle = [await coordinator.commit(Txn()), await coordinator.commit(Txn(deletes=("missing", "none/")))]
    assert second.revision > first.revision
    assert [(each.ok, each.revision) for each in idle] == [(True, second.revision)] * 2
    snapshot = await coordinator.read("")
    assert snapshot.revision == second.revision
    assert snapshot.entries == {
        "a": Entry(b"2", first.revision, second.revision),
        "b": Entry(b"1", first.revision, first.revision),
    }
    await coordinator.commit(Txn(deletes=("a",)))
    again = await coordinator.commit(put("a", b"3"))
    assert (await coordinator.read("a")).entries["a"] == Entry(b"3", again.revision, again.revision)


async def test_read_gives_a_prefix_in_key_order(place: Place) -> None:
    coordinator = place.open()
    keys = ["v/2", "v/10", "v", "v/", "w", "u/ä", "V/1", "v0", "v/ü", "v/\u20ac"]
    await coordinator.commit(Txn(puts=tuple((key, key.encode()) for key in keys)))
    assert list(await values(coordinator)) == sorted(keys)
    assert list(await values(coordinator, "v/")) == ["v/", "v/10", "v/2", "v/ü", "v/\u20ac"]
    assert list(await values(coordinator, "v")) == ["v", "v/", "v/10", "v/2", "v/ü", "v/\u20ac", "v0"]
    assert await values(coordinator, "v/10") == {"v/10": b"v/10"}
    assert await values(coordinator, "x") == {}


async def test_large_values_and_many_operations(place: Place) -> None:
    """300 operations in one transaction, values of 64 KiB with every byte value in them."""
    coordinator = place.open()
    content = {f"chunk/{index:03}": bytes([index % 256]) + bytes(range(256)) * 255 + bytes(255) for index in range(100)}
    assert all(len(value) == 64 << 10 for value in content.values())
    assert (await coordinator.commit(Txn(puts=tuple((f"old/{index}", b"") for index in range(100))))).ok
    compares = tuple(Compare(f"old/{index}", Holds.PRESENT) for index in range(100))
    txn = Txn(compares, tuple(content.items()), tuple(f"old/{index}" for index in range(100)))
    assert (await coordinator.commit(txn)).ok
    assert await values(coordinator) == content


async def test_no_increment_is_lost(place: Place) -> None:
    """Ten writers over two handles count one number up by compare-and-swap on its revision."""
    handles = [place.open(), place.open()]
    await handles[0].commit(put("count", b"0"))
    revisions: list[int] = []

    async def count_up(coordinator: Coordinator) -> None:
        done = 0
        while done < 20:
            entry = (await coordinator.read("count")).entries["count"]
            unchanged = Compare("count", Holds.MOD_REVISION, revision=entry.mod_revision)
            committed = await coordinator.commit(put("count", b"%d" % (int(entry.value) + 1), unchanged))
            if committed.ok:
                done += 1
                revisions.append(committed.revision)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for index in range(10):
                nursery.start_soon(count_up, handles[index % 2])
    assert await values(handles[1]) == {"count": b"200"}
    assert len(set(revisions)) == 200, "two commits share a revision"


async def test_of_racing_creators_one_wins(place: Place) -> None:
    handles = [place.open(), place.open()]
    winners: list[int] = []

    async def create(index: int) -> None:
        if (await handles[index % 2].commit(put("leader", b"%d" % index, Compare("leader", Holds.ABSENT)))).ok:
            winners.append(index)

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(create, index)
    assert len(winners) == 1
    assert await values(handles[0]) == {"leader": b"%d" % winners[0]}


async def test_a_cancelled_commit_is_whole_or_absent(place: Place) -> None:
    """Whenever the task is cancelled, both keys are there, or neither; and the coordinator goes on."""
    coordinator = place.open()
    for index in range(30):
        keys = (f"{index}/a", f"{index}/b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(coordinator.commit, Txn(puts=tuple((key, bytes(1000)) for key in keys)))
            for _ in range(index % 6):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert (await coordinator.commit(put("after", b"%d" % index))).ok  # queued behind the cancelled one
        assert len(await values(coordinator, f"{index}/")) in (0, 2)


async def test_content_is_there_for_the_next_handle(place: Place) -> None:
    """A store outlives its handles, and revisions go on where they stood."""
    first = place.open()
    committed = await first.commit(Txn(puts=(("a", b"1"), ("b", b"2"))))
    await first.aclose()
    second = place.open()
    assert (await second.read("")).revision == committed.revision
    assert await values(second) == {"a": b"1", "b": b"2"}
    assert (await second.commit(put("a", b"3"))).revision > committed.revision


async def test_a_closed_handle_refuses(place: Place) -> None:
    coordinator = place.open()
    await coordinator.aclose()
    await coordinator.aclose()
    with pytest.raises(CoordinatorUnreachable):
        await coordinator.read("")
    with pytest.raises(CoordinatorUnreachable):
        await coordinator.commit(put("a", b""))


# ---- watches ----


async def test_a_watch_tells_what_another_handle_changes(place: Place) -> None:
    """Puts and deletes under the prefix, made while the watch waits, and nothing else."""
    watching, changing = place.open(), place.open()
    start = (await changing.commit(Txn(puts=(("v/a", b"1"), ("w/a", b"1"))))).revision
    told: list[Change] = []

    async def listen(until_revision: int, after_revision: int) -> None:
        told.extend(await watch_until(watching, "v/", after_revision, until_revision))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, start + 1, start)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await changing.commit(put("v/b", b"2"))).revision == start + 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, start + 3, start + 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await changing.commit(put("w/b", b"2"))
        await changing.commit(Txn(deletes=("v/", "w/a")))
    assert told == [
        Change("v/b", Entry(b"2", start + 1, start + 1), start + 1),
        Change("v/a", None, start + 3),
        Change("v/b", None, start + 3),
    ]


async def test_a_watch_begins_after_its_revision(place: Place) -> None:
    """Changes made before the watch started are told once, oldest first, in their last state."""
    coordinator = place.open()
    old = await coordinator.commit(put("old", b""))
    await coordinator.commit(put("a", b"1"))
    await coordinator.commit(put("gone", b"1"))
    await coordinator.commit(Txn(deletes=("gone",)))
    b = await coordinator.commit(put("b", b"1"))
    a = await coordinator.commit(put("a", b"2"))
    await coordinator.commit(put("back", b""))
    await coordinator.commit(Txn(deletes=("back",)))
    back = await coordinator.commit(put("back", b"again"))
    told = await watch_until(coordinator, "", old.revision, back.revision)
    assert [(change.key, change.entry and change.entry.value, change.revision) for change in told] == [
        ("gone", None, b.revision - 1),
        ("b", b"1", b.revision),
        ("a", b"2", a.revision),
        ("back", b"again", back.revision),
    ]


async def test_a_watch_misses_no_last_state(place: Place) -> None:
    """Writers put and delete while two watches follow; what the watches know in the end is what is there."""
    handles = [place.open(), place.open()]
    known: list[dict[str, bytes]] = [{}, {}]

    async def follow(index: int) -> None:
        watch: Any = handles[index].watch("k/", 0)
        revision = 0
        async with aclosing(watch):
            async for batch in watch:
                for change in batch:
                    if change.entry is None:
                        known[index].pop(change.key, None)
                    else:
                        known[index][change.key] = change.entry.value
                assert batch[0].revision > revision, "a change was told twice"
                revision = batch[-1].revision
                if "k/end" in known[index]:
                    return

    async def change_much(writer: int) -> None:
        for index in range(40):
            key = f"k/{writer}-{index % 7}"
            txn = Txn(deletes=(key,)) if index % 3 == 2 else put(key, b"%d" % index)
            await handles[writer % 2].commit(txn)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as followers:
            followers.start_soon(follow, 0)
            followers.start_soon(follow, 1)
            async with trio.open_nursery() as writers:
                for writer in range(4):
                    writers.start_soon(change_much, writer)
            await handles[0].commit(put("k/end", b""))
    assert known == [await values(handles[0], "k/")] * 2


async def test_a_watch_from_before_the_remembered_deletions_is_refused(forgetful_place: Place) -> None:
    """Rather than pass over a deletion; the caller reads again and watches from there."""
    coordinator = forgetful_place.open()
    start = (await coordinator.commit(put("key", b""))).revision
    for index in range(TRIM_EVERY_REVISIONS * 2):
        await coordinator.commit(Txn(puts=((f"{index}", b""),), deletes=(f"{index - 1}",)))
    with pytest.raises(HistoryCompacted, match="compacted"):
        await watch_until(coordinator, "", start, start + 1)
    snapshot = await coordinator.read("")
    committed = await coordinator.commit(Txn(deletes=("key",)))
    told = await watch_until(coordinator, "", snapshot.revision, committed.revision)
    assert told == [Change("key", None, committed.revision)]


async def test_a_watch_ends_with_its_handle(place: Place) -> None:
    coordinator = place.open()
    ended = trio.Event()

    async def listen() -> None:
        with pytest.raises(CoordinatorUnreachable):
            await watch_until(coordinator, "", 0, 1)
        ended.set()

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await coordinator.aclose()
            await ended.wait()


# ---- only the SQLite file ----


@pytest.fixture
async def file_place(tmp_path: Path) -> AsyncIterator[SqlitePlace]:
    place = SqlitePlace(tmp_path, TOMBSTONES_MAX)
    yield place
    for handle in place.handles:
        await handle.aclose()


def script(code: str, *arguments: object) -> list[str]:
    """Command line of a Python program that has the imports below; its arguments are sys.argv[1:]."""
    imports = """
        import os, sys, trio
        from shadowvol.clustersync.coordinator import CoordinatorUnreachable
        from shadowvol.clustersync.sqlite import SqliteCoordinator
        from shadowvol.clustersync.statefile import RESERVE_BYTES, TOMBSTONES_MAX, StateFile
        from shadowvol.core.txn import Compare, Holds, Txn
    """
    return [sys.executable, "-c", textwrap.dedent(imports) + textwrap.dedent(code), *map(str, arguments)]


async def test_every_acknowledged_commit_survives_kill_9(file_place: SqlitePlace) -> None:
    """A process commits as fast as it can and is killed, several times over; nothing that it reported is missing."""
    writer = """
        async def main():
            coordinator = SqliteCoordinator(sys.argv[1])
            async def write(task):
                for index in range(100_000):
                    key = f"{sys.argv[2]}/{task}/{index:06}"
                    await coordinator.commit(Txn(puts=((key, key.encode() * 50), (key + "+", b""))))
                    os.write(1, f"{key}\\n".encode())
            async with trio.open_nursery() as nursery:
                for task in range(3):
                    nursery.start_soon(write, task)
        trio.run(main)
    """
    acknowledged: list[str] = []
    for round_index in range(3):
        with subprocess.Popen(
            script(writer, file_place.path, round_index), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(200 + 77 * round_index):
                acknowledged.append(process.stdout.readline().strip())
            process.send_signal(signal.SIGKILL)
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
    there = await values(file_place.open())
    assert len(acknowledged) > 3 * 200
    assert [key for key in acknowledged if there.get(key) != key.encode() * 50] == []
    assert all(f"{key}+" in there for key in there if not key.endswith("+")), "half a transaction"


async def test_a_commit_of_another_process_is_told(file_place: SqlitePlace) -> None:
    coordinator = file_place.open()
    told: list[Change] = []

    async def listen() -> None:
        told.extend(await watch_until(coordinator, "v/", 0, 1))

    commit = 'trio.run(SqliteCoordinator(sys.argv[1]).commit, Txn(puts=(("v/a", b"1"),)))'
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await trio.run_process(script(commit, file_place.path))
    assert told == [Change("v/a", Entry(b"1", 1, 1), 1)]


async def test_many_processes_may_create_the_file_at_once(tmp_path: Path) -> None:
    """Eight start together on a file that does not exist; each commits once, and all eight are there."""
    commit = 'trio.run(SqliteCoordinator(sys.argv[1]).commit, Txn(puts=((sys.argv[2], b""),)))'
    path = tmp_path / "record.db"
    async with trio.open_nursery() as nursery:
        for index in range(8):
            nursery.start_soon(trio.run_process, script(commit, path, index))
    coordinator = SqliteCoordinator(path)
    snapshot = await coordinator.read("")
    assert (snapshot.revision, list(snapshot.entries)) == (8, [str(index) for index in range(8)])
    await coordinator.aclose()


def test_many_threads_may_create_the_file_at_once(tmp_path: Path) -> None:
    """Whoever comes second finds the tables made; nobody is turned away because another is making them."""
    for round_index in range(20):
        path = tmp_path / f"{round_index}.db"
        together = threading.Barrier(6)

        def open_and_commit(index: int, path: Path = path, together: threading.Barrier = together) -> Any:
            together.wait()
            file = StateFile(path, reserve_bytes=64 << 10, tombstones_max=TOMBSTONES_MAX)
            outcome = file.commit_group([put(f"{index}", b"")])
            file.close()
            return outcome

        with ThreadPoolExecutor(6) as pool:
            outcomes = [outcome for [outcome] in pool.map(open_and_commit, range(6))]
        assert sorted(outcome.revision for outcome in outcomes) == [1, 2, 3, 4, 5, 6]


FULL_DISK = """
    async def main(folder, reserve_bytes):
        arguments = {} if reserve_bytes == "default" else {"reserve_bytes": int(reserve_bytes)}
        path = os.path.join(folder, "record.db")
        coordinator = SqliteCoordinator(path, **arguments)
        await coordinator.commit(Txn(puts=tuple((f"map/{i}", os.urandom(10240)) for i in range(10))))
        with open(os.path.join(folder, "filling"), "wb", buffering=0) as filling:
            for block_bytes in (1 << 20, 4096, 1):
                try:
                    while True:
                        filling.write(bytes(block_bytes))
                except OSError as error:
                    print(error.strerror)
        expected = {}
        async def commit_much(rounds):
            for index in range(rounds):
                key, value = f"map/{index % 50}", os.urandom(10240)
                assert (await coordinator.commit(Txn(puts=((key, value),)))).ok
                expected[key] = value
        await commit_much(1000)
        await coordinator.aclose()
        coordinator = SqliteCoordinator(path, **arguments)  # a new agent, the disk still full
        await commit_much(1000)
        snapshot = await coordinator.read("")
        assert {key: entry.value for key, entry in snapshot.entries.items()} == expected
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commit_much, 5)
                await coordinator.commit(Txn(puts=(("large", os.urandom(60 << 20)),)))
        except* CoordinatorUnreachable as error:
            print("large:", error.exceptions[0])
        await commit_much(100)
        await coordinator.aclose()
        file = StateFile(path, RESERVE_BYTES, TOMBSTONES_MAX)
        large = Txn(puts=(("large", os.urandom(60 << 20)),))
        outcomes = file.commit_group([Txn(puts=(("map/1", b""),)), large, Txn(puts=(("map/2", b""),))])
        assert [type(outcome).__name__ for outcome in outcomes] == ["Committed", "CoordinatorUnreachable", "Committed"]
        file.close()
        print("went on")
    try:
        trio.run(main, *sys.argv[1:])
    except CoordinatorUnreachable as error:
        print("unreachable:", error)
"""


def run_on_small_disk(folder: Path, reserve_bytes: str) -> str:
    """Run FULL_DISK on a file system of 48 MiB in a mount namespace of its own, which ends with the process."""
    namespace = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    mount = 'mount -t tmpfs -o size=48m none "$1"; shift; exec "$@"'
    command = [*namespace, "sh", "-ec", mount, "sh", str(folder), *script(FULL_DISK, folder, reserve_bytes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return done.stdout


def test_a_full_disk_does_not_stop_commits(tmp_path: Path) -> None:
    """2000 commits of 10 KiB and a restart with not a page left; a value too large fails alone, and says why."""
    output = run_on_small_disk(tmp_path, "default")
    assert "No space left on device" in output
    assert "record.db: no space left" in output.partition("large:")[2]
    assert output.endswith("went on\n")


def test_without_the_reserve_a_full_disk_would_stop_commits(tmp_path: Path) -> None:
    """So the test above can fail."""
    output = run_on_small_disk(tmp_path, "0")
    assert "record.db: no space left" in output.partition("unreachable:")[2]


async def test_the_log_is_kept_and_reused(tmp_path: Path) -> None:
    """It is neither deleted by the last one to close nor grown by use, so its space stays ours."""
    path, log = tmp_path / "record.db", tmp_path / "record.db-wal"
    reserve_bytes = 4 << 20
    for _ in range(2):
        coordinator = SqliteCoordinator(path, reserve_bytes=reserve_bytes)
        for index in range(200):
            await coordinator.commit(put(f"{index % 10}", bytes(100_000)))
        statistics = await coordinator.statistics()
        assert statistics.log_bytes == reserve_bytes
        assert statistics.free_bytes >= reserve_bytes // 2
        await coordinator.aclose()
        assert log.stat().st_size == reserve_bytes


async def test_a_deleted_log_is_filled_again(tmp_path: Path) -> None:
    """As after an administrator looked into the file with sqlite3, which deletes the log on its way out."""
    path, log = tmp_path / "record.db", tmp_path / "record.db-wal"
    for _ in range(2):
        coordinator = SqliteCoordinator(path, reserve_bytes=1 << 20)
        assert log.stat().st_size >= 1 << 20
        await coordinator.aclose()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("SELECT count(*) FROM kv").fetchone()
        assert not log.exists()


async def test_the_files_are_readable_by_their_owner_only(file_place: SqlitePlace) -> None:
    await file_place.open().commit(put("a", b""))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file_place.path.parent.iterdir()}
    assert modes == {"record.db": 0o600, "record.db-wal": 0o600, "record.db-shm": 0o600}


async def test_concurrent_commits_share_an_fsync(file_place: SqlitePlace) -> None:
    """Each still gets its own outcome, in order: of the 100 creators of ten keys, ten win."""
    coordinator = file_place.open()
    assert isinstance(coordinator, SqliteCoordinator)
    outcomes: list[bool] = []

    async def create(index: int) -> None:
        key = f"{index % 10}"
        outcomes.append((await coordinator.commit(put(key, b"", Compare(key, Holds.ABSENT)))).ok)

    async with trio.open_nursery() as nursery:
        for index in range(100):
            nursery.start_soon(create, index)
    statistics = await coordinator.statistics()
    assert outcomes.count(True) == 10
    assert statistics.commits == 100
    assert statistics.fsync_groups < 50
    async with trio.open_nursery() as nursery:
        for index in range(30):
            nursery.start_soon(coordinator.commit, put(f"{index}", bytes(GROUP_BYTES_MAX // 3)))
    large_groups = (await coordinator.statistics()).fsync_groups - statistics.fsync_groups
    assert large_groups >= 10, "a group outgrew its limit"


async def test_a_relaxed_commit_costs_no_flush_and_is_durable_with_the_next_that_is(tmp_path: Path) -> None:
    """The record on a file system of its own; a copy of that disk, as it is, is what a power failure leaves."""
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 64 << 20)
    make_ext4(disk)
    with loop_device(disk, "--direct-io=on") as device, mounted(device, tmp_path / "live") as live:
        counted = Path("/sys/block") / Path(device).name / "stat"
        async with AsyncExitStack() as stack:
            coordinator = SqliteCoordinator(live / "record.db", reserve_bytes=256 << 10)
            stack.push_async_callback(coordinator.aclose)

            async def flushes_of(txns: list[Txn]) -> int:
                before = int(counted.read_text().split()[15])
                for txn in txns:
                    assert (await coordinator.commit(txn)).ok
                return int(counted.read_text().split()[15]) - before

            durable = await flushes_of([put(f"durable{number}", b"") for number in range(20)])
            relaxed = await flushes_of([replace(put(f"relaxed{number}", b""), relaxed=True) for number in range(20)])
            assert durable >= 20 > 10 > relaxed  # the file system itself flushes every 5 s
            at_relaxed, at_durable = tmp_path / "at_relaxed", tmp_path / "at_durable"
            shutil.copy(disk, at_relaxed)
            await coordinator.commit(put("last", b""))
            shutil.copy(disk, at_durable)

    async def keys(image: Path) -> set[str]:
        with loop_device(image) as device, mounted(device, tmp_path / "after") as after:
            coordinator = SqliteCoordinator(after / "record.db", reserve_bytes=256 << 10)
            try:
                return set((await coordinator.read("")).entries)
            finally:
                await coordinator.aclose()

    all_durable = {f"durable{number}" for number in range(20)}
    assert all_durable <= await keys(at_relaxed)
    assert await keys(at_durable) == all_durable | {f"relaxed{number}" for number in range(20)} | {"last"}


async def test_a_value_that_does_not_match_its_checksum_is_named(file_place: SqlitePlace) -> None:
    """Reads and compares that meet it stop; other keys, other commits of the group, and overwriting it go on."""
    coordinator = file_place.open()
    await coordinator.commit(Txn(puts=(("v/bad", b"right"), ("w/good", b"right"))))
    with closing(sqlite3.connect(file_place.path)) as connection, connection:
        connection.execute("UPDATE kv SET value = ? WHERE key = 'v/bad'", (b"wrong",))
    named = r"record\.db is damaged: the value of v/bad does not match its checksum"
    with pytest.raises(RecordDamaged, match=named) as kept:  # kept: its traceback must not keep an old snapshot alive
        await coordinator.read("")
    assert await values(coordinator, "w/") == {"w/good": b"right"}
    refused = 0

    async def commit(compare: Compare) -> None:
        nonlocal refused
        try:
            await coordinator.commit(put(f"by/{compare.key}", b"", compare))
        except RecordDamaged:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(commit, Compare("v/bad", Holds.PRESENT))
            nursery.start_soon(commit, Compare("w/good", Holds.PRESENT))
    assert refused == 3
    assert list(await values(coordinator, "by/")) == ["by/w/good"]
    await coordinator.commit(put("v/bad", b"new"))
    assert await values(coordinator, "v/") == {"v/bad": b"new"}
    assert kept.value.__traceback__ is not None


def damage_newer_format(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")


def damage_other_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE places (url TEXT)")


def damage_no_database(path: Path) -> None:
    path.write_bytes(b"[general]\nname = value\n" * 400)


def damage_truncated(path: Path) -> None:
    os.truncate(path, 8192)


def damage_zeroed_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def damage_lost_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE meta")


DAMAGES = {
    damage_newer_format: rf"was written by a newer shadowvol \(format {FORMAT + 1}; this one reads {FORMAT}\)",
    damage_other_program: "is an SQLite database, but not a record of shadowvol",
    damage_no_database: "is not a record of shadowvol, or is damaged: file is not a database",
    damage_truncated: "is damaged",
    damage_zeroed_page: "is damaged",
    damage_lost_table: "is damaged: no such table: meta",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
async def test_a_file_that_does_not_check_out_is_refused(tmp_path: Path, damage: Any) -> None:
    """With one line that says what is wrong, and without changing the file."""
    path = tmp_path / "record.db"
    coordinator = SqliteCoordinator(path, reserve_bytes=0)
    await coordinator.commit(put("a", b"1"))
    await coordinator.aclose()
    with closing(sqlite3.connect(path)) as connection:  # the last of all: carries the log over and deletes it
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(path)
    before = path.read_bytes()
    with pytest.raises(RecordDamaged, match=DAMAGES[damage]) as refusal:
        SqliteCoordinator(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("loss", [Path.unlink, lambda path: os.truncate(path, 0)], ids=["missing", "empty"])
async def test_a_log_without_its_file_is_not_taken_for_a_new_record(tmp_path: Path, loss: Any) -> None:
    path = tmp_path / "record.db"
    coordinator = SqliteCoordinator(path, reserve_bytes=0)
    await coordinator.commit(put("a", b"1"))
    await coordinator.aclose()
    loss(path)
    with pytest.raises(RecordDamaged, match="is missing or empty, but its log"):
        SqliteCoordinator(path)


def test_a_place_that_cannot_hold_the_file_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorUnreachable, match=r"record\.db: No such file or directory"):
        SqliteCoordinator(tmp_path / "missing" / "record.db")
    with pytest.raises(CoordinatorUnreachable, match=r"cannot be opened"):
        SqliteCoordinator(tmp_path)


async def test_a_lock_that_is_never_released_is_unreachable(
    file_place: SqlitePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a limit, and the next commit works again. Reads do not need the lock."""
    monkeypatch.setattr(statefile, "BUSY_LIMIT_MS", 100)
    coordinator = file_place.open()
    with closing(sqlite3.connect(file_place.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CoordinatorUnreachable, match="locked by another process"):
            await coordinator.commit(put("a", b""))
        assert await values(coordinator) == {}
        other.execute("ROLLBACK")
    assert (await coordinator.commit(put("a", b""))).ok


async def test_a_state_url_names_the_file(tmp_path: Path) -> None:
    coordinator = open_coordinator(f"sqlite:{tmp_path}/a b?c#d%20e.db")
    await coordinator.commit(put("a", b"1"))
    await coordinator.aclose()
    assert (tmp_path / "a b?c#d%20e.db").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("etcd://host:2379/prefix", "etcd is not in this version"),
        ("", "is not a state URL"),
        ("record.db", "is not a state URL"),
        ("sqlite:", "names no file"),
        ("sqlite:folder/", "names no file"),
        ("redis://host", "unknown scheme"),
    ],
)
def test_another_state_url_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        open_coordinator(url)
    assert "\n" not in str(refusal.value)
    assert "sqlite:PATH" in str(refusal.value)
