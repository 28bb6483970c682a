"""A member under the window protocol and exclusive changes: mirrored, held, released, switched, with I/O going on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowvol.core.geometry import KIB, MIB
from shadowvol.core.member import HOLD_LIMIT_S
from shadowvol.core.messages import (
    ClearUndo,
    Close,
    Drop,
    Flush,
    Freeze,
    HoldBlocks,
    LogZones,
    Open,
    ReleaseBlocks,
    SetState,
    Thaw,
    Touched,
    UnlogZones,
)
from tests.support.nbd_file import nbd_file, paused
from tests.support.nbd_member import Client, NbdMember, leg_record, nbd_member, sparse_file
from tests.support.poll import wait_for

SIZE = 64 * MIB


@pytest.fixture
def legs(tmp_path: Path) -> tuple[Path, Path]:
    return sparse_file(tmp_path / "source", SIZE), sparse_file(tmp_path / "target", SIZE)


@pytest.fixture
def copying(tmp_path: Path, legs: tuple[Path, Path]) -> Iterator[NbdMember]:
    """Only the source is ok; the target was opened by a prepare."""
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1])) as member:
        assert member.leader.prepare("start", {"source": member.source, "target": member.target}) == {}
        member.leader.join("copying")
        yield member


@pytest.fixture
def synced(tmp_path: Path, legs: tuple[Path, Path]) -> Iterator[NbdMember]:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        yield member


def in_flight(member: NbdMember, count: int) -> None:
    """Until the member reports that many requests that it has admitted."""
    member.leader.latest_stats(lambda stats: stats["in_flight"] == count)


def never_done(client: Client, *cookies: int) -> bool:
    return not any(client.done(cookie) for cookie in cookies)


def test_writes_outside_of_windows_reach_the_source_only(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    client = copying.client()
    client.write(b"s" * 4096, 5 * MIB)
    client.close()
    assert legs[0].read_bytes()[5 * MIB : 5 * MIB + 4096] == b"s" * 4096
    assert legs[1].stat().st_blocks == 0


def test_an_open_window_mirrors_and_remembers(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    leader = copying.leader
    client = copying.client()
    assert leader.request("w1", Open(1, [(4, 8)], 0, 1)) == {"fresh": []}
    client.write(b"m" * 4096, 5 * MIB)  # in the window
    client.write(b"n" * 4096, 12 * MIB)  # outside
    client.write(b"o" * 2 * MIB, 7 * MIB)  # half in, half out
    assert leader.request("w1", Touched(1)) == {"blocks": [[80, 81], [112, 144]]}
    assert leader.request("w1", Touched(1)) == {"blocks": []}
    target = legs[1].read_bytes()
    assert target[5 * MIB : 5 * MIB + 4096] == b"m" * 4096
    assert target[12 * MIB : 12 * MIB + 4096] == bytes(4096)
    assert target[7 * MIB : 9 * MIB] == b"o" * MIB + bytes(MIB)
    client.close()


def test_a_block_with_a_write_in_flight_is_answered_again(tmp_path: Path, slow: Path, legs: tuple[Path, Path]) -> None:
    """TOUCHED comes in the middle of a write: the copy that it leads to may read what was there before."""
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(slow)) as member:
        leader = member.leader
        assert leader.prepare("start", {"source": member.source, "target": member.target}) == {}
        leader.join("copying")
        client = member.client()
        leader.request("w1", Open(1, [(4, 6)], 0, 1))
        client.write(b"1" * 4096, 5 * MIB)  # logs the zone
        with paused(tmp_path / "control"):
            begun = client.start_write(b"2" * 4096, 4 * MIB)
            in_flight(member, 1)
            for blocks in ([[64, 65], [80, 81]], [[64, 65]]):
                assert leader.request("w1", Touched(1)) == {"blocks": blocks}
        client.wait(begun)
        assert leader.request("w1", Touched(1)) == {"blocks": [[64, 65]]}
        assert leader.request("w1", Close(1)) == {"blocks": []}
        client.close()


def test_a_window_logs_its_zones_when_it_opens(copying: NbdMember) -> None:
    """Where an application writes: its first write there does not wait for the log. Else it would be for nothing."""
    leader = copying.leader
    leader.request("w1", Open(1, [(4, 20)], 0, 1))
    assert not leader.asked(LogZones), "nobody writes"
    client = copying.client()
    client.write(b"1" * 4096, 60 * MIB)
    leader.request("w2", Open(2, [(20, 34)], 0, 1))
    wait_for(lambda: leader.asked(LogZones), 5, "the request for the log")
    assert leader.asked(LogZones)[0].zones == [(1, 3)]
    with leader.withholding(LogZones):
        client.write(b"2" * 4096, 33 * MIB)
    client.close()


def test_a_window_becomes_ok_and_reads_may_move(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    """The whole round of a window, the copy done by the test; then a cutover shows the target's bytes."""
    leader = copying.leader
    client = copying.client()
    client.write(b"a" * MIB, 4 * MIB)
    leader.request("w1", Open(1, [(4, 5)], 0, 1))
    with legs[1].open("r+b") as target:
        target.seek(4 * MIB)
        target.write(b"a" * MIB)
    client.write(b"b" * 4096, 4 * MIB)
    assert leader.request("w1", Close(1)) == {"blocks": [[64, 65]]}
    assert leader.request("w1", HoldBlocks(1, [(64, 65)])) == {}
    assert leader.request("w1", ReleaseBlocks(1)) == {"unbroken": True}
    assert leader.request("w1", Flush(1)) == {"failed": []}
    leader.map.set_ok(1, [(4, 5)])
    assert leader.request("x", SetState(changes=((1, True, [(4, 5)]),), close=(1,), preferred=1)) == {}
    with legs[1].open("r+b") as target:  # to see from where it is read
        target.seek(4 * MIB + 8192)
        target.write(b"T")
    assert client.read(1, 4 * MIB + 8192) == b"T"
    assert client.read(4096, 4 * MIB) == b"b" * 4096
    client.close()


def test_a_hold_keeps_new_writes_to_its_blocks_only(copying: NbdMember) -> None:
    leader = copying.leader
    client = copying.client()
    leader.request("w1", Open(1, [(4, 5)], 0, 1))
    client.write(b"1" * 4096, 4 * MIB)
    assert leader.request("w1", HoldBlocks(1, [(64, 65)])) == {}
    held = client.start_write(b"2" * 4096, 4 * MIB)
    other = client.start_write(b"3" * 4096, 4 * MIB + 64 * KIB)
    client.wait(other)
    assert never_done(client, held)
    assert client.read(4096, 4 * MIB) == b"1" * 4096, "reads are not held"
    leader.request("w1", ReleaseBlocks(1))
    client.wait(held)
    assert client.read(4096, 4 * MIB) == b"2" * 4096
    client.close()


def test_a_window_needs_the_engine_only_where_it_is_held(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    """The filter writes to both legs by itself, and notes the blocks until the window is closed. A hold takes the
    regions of its blocks from it, and gives them back."""
    leader = copying.leader
    client = copying.client()

    def let_through() -> int | None:
        filtered = leader.latest_stats(lambda stats: not stats["in_flight"])["filter"]
        return filtered and int(filtered["writes_let_through"])

    leader.request("w1", Open(1, [(4, 6)], 0, 1))
    client.write(b"1" * 4096, 4 * MIB)  # its zone is logged from now on
    before = let_through()
    client.write(b"1" * 4096, 4 * MIB + 2 * 64 * KIB)
    client.write(b"1" * 4096, 4 * MIB + 3 * 64 * KIB - 2048)  # two blocks
    assert leader.request("w1", Touched(1)) == {"blocks": [[64, 65], [66, 68]]}
    client.write(b"1" * 4096, 4 * MIB)
    assert leader.request("w1", Close(1)) == {"blocks": [[64, 65]]}
    client.write(b"2" * 4096, 4 * MIB)
    client.write(b"3" * 4096, 5 * MIB)
    assert let_through() == before
    assert leader.request("w1", HoldBlocks(1, [(64, 65)])) == {}
    held = client.start_write(b"4" * 4096, 4 * MIB)
    client.write(b"5" * 4096, 4 * MIB + 64 * KIB)  # beside the block that is held, in its region
    client.write(b"6" * 4096, 5 * MIB)
    assert never_done(client, held)
    assert leader.request("w1", ReleaseBlocks(1)) == {"unbroken": True}
    client.wait(held)
    before = let_through()
    client.write(b"7" * 4096, 4 * MIB + 64 * KIB)
    assert let_through() == before
    assert "no" in leader.request("w1", Touched(1)), "it could not tell what was written since"
    for leg in legs:
        assert leg.read_bytes()[4 * MIB : 4 * MIB + 4096] == b"4" * 4096
        assert leg.read_bytes()[4 * MIB + 64 * KIB : 4 * MIB + 68 * KIB] == b"7" * 4096
        assert leg.read_bytes()[5 * MIB : 5 * MIB + 4096] == b"6" * 4096
    client.close()


def test_a_hold_ends_by_itself_at_its_limit(copying: NbdMember) -> None:
    leader = copying.leader
    client = copying.client()
    leader.request("w1", Open(1, [(4, 5)], 0, 1))
    begun_s = time.monotonic()
    leader.request("w1", HoldBlocks(1, [(64, 65)]))
    client.write(b"2" * 4096, 4 * MIB)
    took_s = time.monotonic() - begun_s
    assert took_s >= HOLD_LIMIT_S
    stats = leader.latest_stats(lambda stats: stats["totals"]["writes"] == 1)
    longest = max(each["hold_longest_s"] for each in leader.stats)
    assert HOLD_LIMIT_S / 2 <= longest <= took_s, stats
    assert leader.request("w1", ReleaseBlocks(1)) == {"unbroken": False}
    client.close()


def test_a_dropped_window_is_forgotten(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    leader = copying.leader
    client = copying.client()
    leader.request("w1", Open(1, [(4, 5)], 0, 1))
    assert leader.request("w1", Drop(1, [(4, 5)])) == {}
    client.write(b"s" * 4096, 4 * MIB)
    assert legs[1].stat().st_blocks == 0
    client.close()


def test_a_region_overwritten_whole_is_fresh_on_both_legs(copying: NbdMember, legs: tuple[Path, Path]) -> None:
    leader = copying.leader
    leader.join("copying", fresh_allowed=True)
    client = copying.client()
    client.write(b"f" * 2 * MIB, 4 * MIB - 4096)  # covers region 4 only
    assert leader.request("w1", Open(1, [(3, 6)], 0, 1)) == {"fresh": [[4, 5]]}
    assert legs[1].read_bytes()[4 * MIB : 5 * MIB] == b"f" * MIB
    client.close()


def test_a_dropped_trim_makes_nothing_fresh(tmp_path: Path) -> None:
    """The target cannot punch (it is not there), the trim writes nothing, so the region still needs its copy."""
    source = sparse_file(tmp_path / "source", SIZE)
    with nbd_member(tmp_path, leg_record(source), leg_record(tmp_path / "no")) as member:
        member.leader.join("copying", fresh_allowed=True)
        client = member.client()
        client.nbd.trim(MIB, 4 * MIB)
        assert member.leader.request("w1", Open(1, [(4, 5)], 0, 1)) == {"fresh": []}
        client.close()


def test_a_mirrored_write_waits_for_its_zone_in_the_log(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    client = synced.client()
    with synced.leader.withholding(LogZones):
        held = [client.start_write(b"z" * 4096, offset) for offset in (0, 8 * MIB, 40 * MIB)]
        wait_for(lambda: synced.leader.asked(LogZones), 5, "the request for the log")
        assert client.read(4096, 0) == bytes(4096), "reads go on"
        assert never_done(client, *held)
        assert legs[0].stat().st_blocks == legs[1].stat().st_blocks == 0
    for cookie in held:
        client.wait(cookie)
    asked = [run for want in synced.leader.asked(LogZones) for run in want.zones]
    assert sorted(asked) == [(0, 1), (2, 3)], "each zone is asked for once"
    client.close()


def test_an_idle_volume_empties_its_log(synced: NbdMember) -> None:
    client = synced.client()
    client.write(b"z" * 4096, 0)
    wait_for(lambda: synced.leader.asked(UnlogZones), 15, "the zone's removal")
    assert synced.leader.asked(UnlogZones)[0].zones == [(0, 1)]
    synced.leader.latest_stats(lambda stats: stats["engine"]["zones_logged"] == 0)
    client.close()


def test_a_zone_that_leaves_the_log_is_asked_for_again_before_the_next_write(synced: NbdMember) -> None:
    """From the moment its removal is asked for: a crash after the removal would find no trace of that write."""
    client = synced.client()
    client.write(b"z" * 4096, 0)
    with synced.leader.withholding(UnlogZones):
        wait_for(lambda: synced.leader.asked(UnlogZones), 15, "the zone's removal")
        held = client.start_write(b"y" * 4096, 0)
        client.write(b"x" * 4096, 32 * MIB)  # another zone, there and back
        assert never_done(client, held)
    client.wait(held)
    assert [want.zones for want in synced.leader.asked(LogZones)] == [[(0, 1)], [(2, 3)], [(0, 1)]]
    client.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Path]:
    """A leg whose I/O waits while `paused(tmp_path / "control")`."""
    folder = tmp_path / "slow"
    folder.mkdir()
    with nbd_file(folder, "--filter=pause", "memory", str(SIZE), f"pause-control={tmp_path / 'control'}") as file:
        yield file


@pytest.mark.parametrize("kind", ["write", "read"])
def test_who_drains_waits_for_what_was_begun_before(
    tmp_path: Path, slow: Path, legs: tuple[Path, Path], kind: str
) -> None:
    """OPEN for a write (it goes to one leg only), a freeze for a read: not answered while that is under way, whoever
    executes it. A request about other regions, sent later, is answered meanwhile."""
    with nbd_member(tmp_path, leg_record(slow), leg_record(legs[1])) as member:
        leader = member.leader
        assert leader.prepare("start", {"source": member.source, "target": member.target}) == {}
        leader.join("copying")
        client = member.client()
        with paused(tmp_path / "control"):
            is_write = kind == "write"
            begun = client.start_write(b"w" * 4096, 40 * MIB) if is_write else client.start_read(4096, 40 * MIB)
            in_flight(member, 1)
            drain = Open(1, [(40, 44)], 0, 1) if is_write else Freeze([(40, 44)], True, True)
            waiting = leader.send("w1" if is_write else "x", drain)
            assert leader.request("w2", Open(2, [(20, 24)], 0, 1)) == {"fresh": []}
            assert not leader.answered(waiting) and never_done(client, begun)
        client.wait(begun)
        leader.answer(waiting)
        client.close()


def test_a_mirrored_write_comes_last_to_the_leg_that_is_read(
    tmp_path: Path, slow: Path, legs: tuple[Path, Path]
) -> None:
    """What somebody has read is on both legs: reads that move to the other leg, after a fault, do not go back."""
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(slow), phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"old" * 1024, 0)
        with paused(tmp_path / "control"):
            begun = client.start_write(b"new" * 1024, 0)
            in_flight(member, 1)
            assert client.read(3072, 0) == b"old" * 1024
        client.wait(begun)
        assert client.read(3072, 0) == b"new" * 1024
        client.close()


def test_cutover_and_undo_under_io(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    """Freeze, set, thaw, and back; held writes are answered after the thaw, reads show the new preferred leg."""
    leader = synced.leader
    client = synced.client()
    for leg, mark in zip(legs, (b"S", b"T"), strict=True):  # unequal on purpose, to see from where it is read
        with leg.open("r+b") as file:
            file.seek(32 * MIB)
            file.write(mark)
    client.write(b"0", 0)
    for preferred, mark in ((1, b"T"), (0, b"S")):
        assert leader.request("x", Freeze(None, False, True)) == {"faults": []}
        held = client.start_write(bytes([preferred]) * 4096, 0)
        client.read(1, 0)
        assert never_done(client, held)
        assert leader.request("x", SetState(preferred=preferred)) == {}
        assert never_done(client, held), "set does not thaw"
        assert leader.request("x", Thaw()) == {}
        client.wait(held)
        assert client.read(1, 32 * MIB) == mark
        assert legs[0].read_bytes()[:4096] == legs[1].read_bytes()[:4096] == bytes([preferred]) * 4096
    client.close()


def test_a_freeze_of_reads_holds_reads(synced: NbdMember) -> None:
    client = synced.client()
    assert synced.leader.request("x", Freeze([(0, 1)], True, True)) == {"faults": []}
    held = client.start_read(4096, 0)
    client.wait(client.start_read(4096, MIB))
    assert never_done(client, held)
    synced.leader.request("x", Thaw())
    client.wait(held)
    client.close()


def test_before_the_state_is_known_everything_waits(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), phase=None) as member:
        client = member.client()
        waiting = [client.start_read(512, 0), client.start_write(b"w" * 512, 0), client.start_flush()]
        assert never_done(client, *waiting)
        member.leader.join("setup")
        for cookie in waiting:
            client.wait(cookie)
        client.close()


def test_commit_lets_go_of_the_source_and_undo_needs_it_again(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    leader = synced.leader
    client = synced.client()
    leader.map.clear_ok(0, [(0, SIZE // MIB)])
    leader.join("committed", preferred=1)
    leader.latest_stats(lambda stats: not stats["legs"]["source"]["open"])
    client.write(b"c" * 4096, 0)
    client.nbd.flush()
    assert legs[1].read_bytes()[:4096] == b"c" * 4096
    assert legs[0].stat().st_blocks == 0
    assert leader.prepare("undo", {"source": synced.source}) == {}
    leader.latest_stats(lambda stats: stats["legs"]["source"]["open"])
    client.close()


def test_commit_with_undo_kept_clears_the_source_before_the_first_write(
    synced: NbdMember, legs: tuple[Path, Path]
) -> None:
    leader = synced.leader
    client = synced.client()
    leader.join("committed", preferred=1)
    with leader.withholding(ClearUndo):
        held = client.start_write(b"c" * 4096, 20 * MIB)
        wait_for(lambda: leader.asked(ClearUndo), 5, "the request to clear the zone")
        assert never_done(client, held)
        assert legs[1].stat().st_blocks == 0
    client.wait(held)
    client.write(b"d" * 4096, 21 * MIB)
    assert [want.zones for want in leader.asked(ClearUndo)] == [[(1, 2)]], "once per zone"
    assert leader.latest_stats()["legs"]["source"]["open"]
    assert legs[0].stat().st_blocks == 0
    client.close()


def test_abort_lets_go_of_the_target(synced: NbdMember) -> None:
    synced.leader.join("setup")
    synced.leader.latest_stats(lambda stats: not stats["legs"]["target"]["open"])
    assert synced.leader.stats[-1]["legs"]["target"]["open_error"] is None


def test_prepare_says_what_is_wrong_with_a_leg(copying: NbdMember, tmp_path: Path) -> None:
    leader = copying.leader
    leader.join("setup")
    leader.latest_stats(lambda stats: not stats["legs"]["target"]["open"])
    other = sparse_file(tmp_path / "other", SIZE)
    small = sparse_file(tmp_path / "small", MIB)
    assert "another medium" in leader.prepare("start", {"target": leg_record(other, identity="disk:x")})["no"]
    assert "does not exist" in leader.prepare("start", {"target": leg_record(tmp_path / "missing")})["no"]
    assert "the volume" in leader.prepare("start", {"target": leg_record(small)})["no"]
    assert leader.prepare("start", {"target": leg_record(other)}) == {}
    assert leader.prepare("start", {"target": copying.target}) == {}, "a prepared leg may be replaced before it is used"
