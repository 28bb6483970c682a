"""The settled data path of a member, through real NBD clients: everything goes to the source, or to both legs."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from shadowvol.core.geometry import KIB, MIB
from shadowvol.core.messages import Fault
from tests.support.loopdev import loop_device
from tests.support.nbd_member import VOLUME, Client, NbdMember, leg_record, nbd_member, sparse_file
from tests.support.poll import wait_for

SIZE = 64 * MIB
TOOL_TIMEOUT_S = 60


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def legs(tmp_path: Path) -> tuple[Path, Path]:
    return sparse_file(tmp_path / "source", SIZE), sparse_file(tmp_path / "target", SIZE)


@pytest.fixture
def in_setup(tmp_path: Path, legs: tuple[Path, Path]) -> Iterator[NbdMember]:
    """A target is named but not open: nothing may reach it."""
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1])) as member:
        yield member


@pytest.fixture
def synced(tmp_path: Path, legs: tuple[Path, Path]) -> Iterator[NbdMember]:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        yield member


def test_setup_reads_and_writes_the_source_only(in_setup: NbdMember, legs: tuple[Path, Path]) -> None:
    client = in_setup.client()
    client.write(b"one" * 1000, 12345)
    assert client.read(3000, 12345) == b"one" * 1000
    assert client.read(100, SIZE - 100) == bytes(100)
    client.nbd.flush()
    assert legs[0].read_bytes()[12345:15345] == b"one" * 1000
    assert not legs[1].stat().st_blocks
    client.close()


def test_a_request_across_regions_is_one_request(in_setup: NbdMember, legs: tuple[Path, Path]) -> None:
    client = in_setup.client()
    data = os.urandom(3 * MIB + 17)
    client.write(data, MIB // 2 + 3)
    assert client.read(len(data), MIB // 2 + 3) == data
    assert legs[0].read_bytes()[MIB // 2 + 3 :][: len(data)] == data
    client.close()


def test_synced_writes_reach_both_legs(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    client = synced.client()
    data = os.urandom(2 * MIB + 511)
    client.write(data, 15 * MIB + 1)
    client.nbd.flush()
    for leg in legs:
        assert leg.read_bytes()[15 * MIB + 1 :][: len(data)] == data
    assert synced.leader.asks, "the activity log is written before a mirrored write"
    client.close()


def test_fua_and_flush_succeed_and_are_counted(synced: NbdMember) -> None:
    client = synced.client()
    client.write(b"x" * 512, 0, nbd.CMD_FLAG_FUA)
    client.nbd.zero(4096, 8192, nbd.CMD_FLAG_FUA)
    client.nbd.trim(4096, 65536, nbd.CMD_FLAG_FUA)
    client.nbd.flush()
    stats = synced.leader.latest_stats(lambda stats: stats["totals"]["flushes"] >= 4)
    assert stats["totals"]["writes"] == 3
    assert stats["clients"] == 1
    client.close()


@pytest.mark.parametrize("no_hole", [True, False])
def test_zero_leaves_equal_legs(synced: NbdMember, legs: tuple[Path, Path], no_hole: bool) -> None:
    client = synced.client()
    client.write(b"\xff" * MIB, 0)
    client.nbd.zero(300 * KIB, 100 * KIB + 7, nbd.CMD_FLAG_NO_HOLE if no_hole else 0)
    expected = b"\xff" * (100 * KIB + 7) + bytes(300 * KIB)
    for leg in legs:
        assert leg.read_bytes()[: 400 * KIB + 7] == expected
    client.close()


def test_trim_makes_holes_in_both_legs(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    client = synced.client()
    client.write(b"\xff" * MIB, 0)
    client.nbd.trim(MIB, 0)
    for leg in legs:
        assert leg.read_bytes()[:MIB] == bytes(MIB)
        assert leg.stat().st_blocks == 0
    client.close()


def test_trim_is_dropped_where_one_leg_cannot(tmp_path: Path) -> None:
    """The target is not there, so it cannot punch: the source keeps its bytes too, and no fault comes of it."""
    source = sparse_file(tmp_path / "source", SIZE)
    with nbd_member(tmp_path, leg_record(source), leg_record(tmp_path / "no"), phase="setup") as member:
        client = member.client()
        client.write(b"\xff" * MIB, 0)
        member.leader.map.set_ok(1, [(0, SIZE // MIB)])
        member.leader.join("copying")
        client.nbd.trim(MIB, 0)
        assert client.read(MIB, 0) == b"\xff" * MIB
        with pytest.raises(nbd.Error) as refused:
            client.nbd.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert refused.value.errnum in (errno.EOPNOTSUPP, errno.ENOTSUP)
        assert not member.leader.asked(Fault)
        client.close()


def test_fast_zero_is_done_where_both_legs_can(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    client = synced.client()
    client.write(b"\xff" * MIB, 0)
    client.nbd.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert legs[0].read_bytes()[:MIB] == legs[1].read_bytes()[:MIB] == bytes(MIB)
    client.close()


def test_sparse_stays_sparse(in_setup: NbdMember) -> None:
    client = in_setup.client()
    client.write(b"d" * 64 * KIB, 8 * MIB)
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert client.holes(16 * MIB, 0) == [(8 * MIB, hole), (64 * KIB, 0), (8 * MIB - 64 * KIB, hole)]
    client.close()


def test_extents_are_those_of_the_leg_that_is_read(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    with legs[1].open("r+b") as target:  # data where the source has a hole: bytes are equal, allocation is not
        target.write(bytes(MIB))
    client = synced.client()
    assert client.holes(2 * MIB, 0)[0][1] & nbd.STATE_HOLE
    synced.leader.join("copying", preferred=1)
    assert client.holes(2 * MIB, 0)[0] == (MIB, 0)
    client.close()


def test_the_export_is_listed_by_name(in_setup: NbdMember) -> None:
    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={in_setup.socket_path}"))
    (export,) = listed["exports"]
    assert (export["export-name"], export["description"]) == (VOLUME, "a test's volume")
    assert export["export-size"] == SIZE
    assert run("nbdinfo", "--size", in_setup.uri).strip() == str(SIZE)
    assert run("nbdinfo", "--size", f"nbd+unix:///?socket={in_setup.socket_path}").strip() == str(SIZE)


def test_what_the_export_offers(in_setup: NbdMember) -> None:
    client = in_setup.client()
    handle = client.nbd
    offers = (handle.can_flush, handle.can_fua, handle.can_trim, handle.can_zero, handle.can_fast_zero)
    assert all(offer() for offer in (*offers, handle.can_multi_conn, handle.can_cache))
    assert not handle.is_read_only()
    sizes = [handle.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    assert sizes == [1, 4096, 32 * MIB]
    client.close()


def test_another_export_name_is_refused(in_setup: NbdMember) -> None:
    with pytest.raises(nbd.Error):
        Client(in_setup.uri.replace(f"/{VOLUME}?", "/other?"))


def test_overlapping_writes_leave_equal_legs(synced: NbdMember, legs: tuple[Path, Path]) -> None:
    """Many writes to the same place from two connections: whatever wins, it wins on both legs."""
    clients = [synced.client(), synced.client()]
    for turn in range(40):
        cookies = [
            (client, client.start_write(bytes([(turn * 8 + index + 4 * side) % 256]) * 9000, 100 * index))
            for side, client in enumerate(clients)
            for index in range(4)
        ]
        for client, cookie in cookies:
            client.wait(cookie)
    assert legs[0].read_bytes() == legs[1].read_bytes()
    for client in clients:
        client.close()


def test_one_byte_writes_on_a_leg_with_large_sectors(tmp_path: Path) -> None:
    """A target with 4 KiB sectors through O_DIRECT: neighbours in one sector do not undo each other."""
    source = sparse_file(tmp_path / "source", SIZE)
    backing = sparse_file(tmp_path / "backing", SIZE)
    with loop_device(backing, "--sector-size", "4096") as device:
        target = leg_record(device, cache="none")
        with nbd_member(tmp_path, leg_record(source), target, phase="copying", target_ok=True) as member:
            client = member.client()
            for cookie in [client.start_write(bytes([index + 1]), index) for index in range(64)]:
                client.wait(cookie)
            client.nbd.flush()
            client.close()
            assert member.leader.latest_stats()["legs"]["target"]["block_bytes"] == 4096
        assert backing.read_bytes()[:64] == source.read_bytes()[:64] == bytes(range(1, 65))


def test_a_device_as_source_sets_the_smallest_block(tmp_path: Path) -> None:
    with loop_device(sparse_file(tmp_path / "backing", SIZE), "--sector-size", "4096") as device:
        with nbd_member(tmp_path, leg_record(device)) as member:
            client = member.client()
            assert client.nbd.get_block_size(nbd.SIZE_MINIMUM) == 4096
            client.write(b"y" * 8192, 4096)
            assert client.read(8192, 4096) == b"y" * 8192
            client.close()


def test_qemu_io_reads_back_its_pattern(synced: NbdMember) -> None:
    commands = ["write -P 7 1M 3M", "write -z 2M 64k", "discard 3M 1M", "flush", "read -P 7 1M 1M", "read -P 0 2M 64k"]
    arguments = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, synced.uri)
    assert "verification failed" not in output


def test_nbdcopy_over_four_connections(synced: NbdMember, legs: tuple[Path, Path], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(9 * MIB))
    os.truncate(image, SIZE)
    run("nbdcopy", "--connections=4", "--flush", str(image), synced.uri)
    assert legs[0].read_bytes() == legs[1].read_bytes() == image.read_bytes()
    copy = tmp_path / "copy"
    run("nbdcopy", "--connections=4", synced.uri, str(copy))
    assert copy.read_bytes() == image.read_bytes()


def test_fio_verifies_what_it_wrote(synced: NbdMember, legs: tuple[Path, Path], tmp_path: Path) -> None:
    job = ["--ioengine=nbd", f"--uri={synced.uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=24m"]
    check = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
    run("fio", "--name=v", *job, *check, f"--aux-path={tmp_path}")
    wait_for(lambda: legs[0].read_bytes() == legs[1].read_bytes(), 5, "equal legs")
