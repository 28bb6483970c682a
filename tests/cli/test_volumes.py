"""retarget and delete on records in every phase, and what happens when the record changes at the same time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shadowvol.agent.errors import VerbError
from shadowvol.agent.volumes import create_volume, delete_volume, read_volume, read_volumes, retarget_volume
from shadowvol.clustersync.coordinator import Committed, CoordinatorUnreachable
from shadowvol.core.legs import TARGET, Phase
from shadowvol.core.records import Keys, VolumeConfig, VolumeState, encode_member, encode_state
from shadowvol.core.txn import Txn
from tests.cli.conftest import MIB
from tests.support.memory_coordinator import MemoryCoordinator, MemoryStore

Leg = Callable[..., Path]
KEYS = Keys("v")


class LostReply(MemoryCoordinator):
    """Allows this fault: a commit takes effect, but its answer is lost."""

    async def commit(self, txn: Txn) -> Committed:
        await super().commit(txn)
        raise CoordinatorUnreachable("the answer was lost")


async def make(coordinator: MemoryCoordinator, leg: Leg, **state: Any) -> VolumeConfig:
    """Volume v over the files a and b, in the given state."""
    config = await create_volume(coordinator, name="v", source=str(leg("a")), target=str(leg("b")))
    await coordinator.commit(Txn(puts=((KEYS.state, encode_state(replace(VolumeState(), **state))),)))
    return config


async def test_retarget_changes_only_the_target(leg: Leg) -> None:
    coordinator = MemoryCoordinator()
    before = await make(coordinator, leg)
    after = await retarget_volume(coordinator, "v", str(leg("c", 9 * MIB)))
    assert after == replace(before, target=after.target) == (await read_volume(coordinator, "v")).config
    assert after.target.uri.endswith("/c") and after.target.size_bytes == 9 * MIB
    assert await retarget_volume(coordinator, "v", after.target.uri) == after
    await create_volume(coordinator, name="w", source=before.target.uri, target=str(leg("d")))  # b is free again


async def test_retarget_provisions_and_checks_as_create_does(leg: Leg) -> None:
    coordinator = MemoryCoordinator()
    config = await make(coordinator, leg)
    folder = Path(config.source.uri).parent
    after = await retarget_volume(coordinator, "v", "new", provision=True, directory=str(folder))
    assert (folder / "new").stat().st_size == 8 * MIB and after.target.uri == str(folder / "new")
    await create_volume(coordinator, name="w", source=str(leg("c")), target=str(leg("d")))
    for bad, words in {
        config.source.uri: "same storage",
        str(leg("small", MIB)): "too small",
        str(folder): "directory",
        str(folder / "d"): "target of volume w",
    }.items():
        with pytest.raises(VerbError, match=words) as caught:
            await retarget_volume(coordinator, "v", bad)
        assert caught.value.code == 2
    assert (await read_volume(coordinator, "v")).config == after


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.COMMITTED])
async def test_retarget_needs_setup(leg: Leg, phase: Phase) -> None:
    coordinator = MemoryCoordinator()
    config = await make(coordinator, leg, phase=phase)
    folder = Path(config.source.uri).parent
    with pytest.raises(VerbError, match="needs phase setup") as caught:
        await retarget_volume(coordinator, "v", str(folder / "new"), provision=True)
    assert caught.value.code == 3
    assert not (folder / "new").exists()


async def test_retarget_of_an_unknown_volume(leg: Leg) -> None:
    with pytest.raises(VerbError) as caught:
        await retarget_volume(MemoryCoordinator(), "v", str(leg("a")))
    assert caught.value.code == 4


async def test_a_start_at_the_same_time_wins_over_retarget(leg: Leg) -> None:
    """The state changes between retarget's look and its commit: refused, and what it provisioned is gone."""
    store = MemoryStore()
    config = await make(MemoryCoordinator(store), leg)
    started = encode_state(VolumeState(phase=Phase.COPYING))

    class Racing(MemoryCoordinator):
        async def commit(self, txn: Txn) -> Committed:
            store.commit(Txn(puts=((KEYS.state, started),)))
            return await super().commit(txn)

    new = Path(config.source.uri).parent / "new"
    with pytest.raises(VerbError, match="at the same time") as caught:
        await retarget_volume(Racing(store), "v", str(new), provision=True)
    assert caught.value.code == 3
    assert not new.exists()
    assert (await read_volume(MemoryCoordinator(store), "v")).config == config


async def test_with_an_unknown_outcome_the_provisioned_target_stays(leg: Leg) -> None:
    """The record may name it, as it does here."""
    store = MemoryStore()
    source = leg("a")
    new = source.parent / "new"
    with pytest.raises(VerbError, match="not known") as caught:
        await create_volume(LostReply(store), name="v", source=str(source), target=str(new), provision=True)
    assert caught.value.code == 6
    assert new.exists()
    assert (await read_volume(MemoryCoordinator(store), "v")).config.target.uri == str(new)


@pytest.mark.parametrize("state", [{}, {"phase": Phase.COMMITTED, "preferred": TARGET}])
async def test_delete_takes_everything_below_the_volume_and_nothing_else(leg: Leg, state: dict[str, Any]) -> None:
    coordinator = MemoryCoordinator()
    await make(coordinator, leg, **state)
    others = (Keys("v2").member("h"), Keys("v-").member("h"))
    puts = tuple((key, encode_member(1)) for key in (KEYS.member("h"), *others))
    await coordinator.commit(Txn(puts=puts))
    await delete_volume(coordinator, "v")
    assert sorted(coordinator.store.entries) == sorted(others)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"phase": Phase.COPYING}, "shadowvol abort v"),
        ({"phase": Phase.COPYING, "up": True}, "shadowvol abort v"),
        ({"up": True}, "shadowvol down v first"),
        ({"phase": Phase.COMMITTED, "up": True}, "shadowvol down v first"),
    ],
)
async def test_delete_is_refused_while_copying_or_up(leg: Leg, state: dict[str, Any], words: str) -> None:
    coordinator = MemoryCoordinator()
    await make(coordinator, leg, **state)
    before = dict(coordinator.store.entries)
    with pytest.raises(VerbError, match=words) as caught:
        await delete_volume(coordinator, "v")
    assert caught.value.code == 3
    assert coordinator.store.entries == before


async def test_an_up_at_the_same_time_wins_over_delete(leg: Leg) -> None:
    store = MemoryStore()
    await make(MemoryCoordinator(store), leg)

    class Racing(MemoryCoordinator):
        async def commit(self, txn: Txn) -> Committed:
            store.commit(Txn(puts=((KEYS.state, encode_state(VolumeState(up=True))),)))
            return await super().commit(txn)

    with pytest.raises(VerbError, match="at the same time"):
        await delete_volume(Racing(store), "v")
    assert (await read_volume(MemoryCoordinator(store), "v")).state.up


async def test_a_damaged_record_stops_its_volume_and_no_other(leg: Leg) -> None:
    coordinator = MemoryCoordinator()
    await make(coordinator, leg)
    await create_volume(coordinator, name="w", source=str(leg("c")), target=str(leg("d")))
    await coordinator.commit(Txn(puts=((KEYS.chunk(0), b"noise"),)))
    sound, damaged = await read_volumes(coordinator)
    assert list(sound) == ["w"] and "does not check out" in damaged["v"]
    with pytest.raises(VerbError, match="does not check out") as caught:
        await read_volume(coordinator, "v")
    assert caught.value.code == 1
