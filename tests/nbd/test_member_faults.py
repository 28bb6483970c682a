"""A leg fails: the application does not see it while the other leg is ok, and sees its errno when none is."""

import errno
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from shadowvol.core.geometry import KIB, MIB
from shadowvol.core.messages import Fault, Flush, Open
from tests.support.loopdev import loop_device, small_disk
from tests.support.nbd_member import Client, NbdMember, leg_record, nbd_member, sparse_file
from tests.support.poll import wait_for

SIZE = 64 * MIB
SMALL_BYTES = 4 * MIB  # what the file system under a leg has room for


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sparse_file(tmp_path / "source", SIZE)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file that runs out of space after 4 MiB."""
    with small_disk(tmp_path / "small", SMALL_BYTES) as directory:
        yield sparse_file(directory / "leg", SIZE)


def faults(member: NbdMember) -> list[tuple[str, tuple[tuple[int, list[tuple[int, int]]], ...]]]:
    return [(want.operation, want.legs) for want in member.leader.asked(Fault)]


def until_told(member: NbdMember, client: Client) -> None:
    def told() -> bool:
        client.nbd.poll(0)  # a large request is sent in pieces
        return bool(faults(member))

    wait_for(told, 10, "the fault is told")


def test_a_full_target_is_no_business_of_the_application(tmp_path: Path, source: Path, full: Path) -> None:
    with nbd_member(tmp_path, leg_record(source), leg_record(full), phase="copying", target_ok=True) as member:
        client = member.client()
        with member.leader.withholding(Fault):
            cookie = client.start_write(b"x" * 8 * MIB, 20 * MIB)
            until_told(member, client)
            assert faults(member) == [("write", ((1, [(1, 2)]),))]
            assert not client.done(cookie), "not acknowledged before the fault is durable everywhere"
        client.wait(cookie)
        assert client.read(8 * MIB, 20 * MIB) == b"x" * 8 * MIB
        client.write(b"y" * MIB, 24 * MIB)
        assert len(faults(member)) == 1, "the zone is written on the source only from now on"
        legs = member.leader.latest_stats()["legs"]
        assert legs["target"]["errors"] == 1
        assert "No space left" in legs["target"]["last_error"]
        assert legs["source"]["errors"] == 0
        client.close()


def test_the_last_leg_s_error_reaches_the_application(tmp_path: Path, full: Path) -> None:
    with nbd_member(tmp_path, leg_record(full)) as member:
        client = member.client()
        with pytest.raises(nbd.Error) as failed:
            client.write(b"x" * 8 * MIB, 0)
        assert failed.value.errnum == errno.ENOSPC
        assert faults(member) == [("write", ((0, [(0, 1)]),))]
        client.write(b"x" * 4096, 0)
        assert client.read(4096, 0) == b"x" * 4096
        client.close()


def test_both_legs_fail_and_the_first_error_is_told(tmp_path: Path, full: Path) -> None:
    target = leg_record(tmp_path / "missing")
    with nbd_member(tmp_path, leg_record(full), target, phase="copying", target_ok=True) as member:
        client = member.client()
        with pytest.raises(nbd.Error) as failed:
            client.write(b"x" * 8 * MIB, 0)
        assert failed.value.errnum in (errno.EIO, errno.ENOSPC)
        client.close()


def test_a_failed_write_prints_no_trace(tmp_path: Path, full: Path) -> None:
    with nbd_member(tmp_path, leg_record(full)) as member:
        client = member.client()
        with pytest.raises(nbd.Error):
            client.write(b"x" * 8 * MIB, 0)
        client.close()
        lines = member.stderr().splitlines()
        assert not [line for line in lines if line.lstrip().startswith("File ")]
        assert 1 <= len([line for line in lines if "No space left" in line]) <= 2


def test_a_missing_target_is_reported_and_served_around(tmp_path: Path, source: Path) -> None:
    target = leg_record(tmp_path / "missing")
    with nbd_member(tmp_path, leg_record(source), target, phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"x" * 4096, 0)
        client.nbd.flush()
        assert client.read(4096, 0) == b"x" * 4096
        assert faults(member)[0] == ("write", ((1, [(0, 1)]),))
        leg = member.leader.latest_stats()["legs"]["target"]
        assert not leg["open"]
        assert "does not exist" in leg["open_error"]
        client.close()


def test_a_leg_that_is_another_medium_is_not_used(tmp_path: Path, source: Path) -> None:
    other = sparse_file(tmp_path / "other", SIZE)
    target = leg_record(other, identity="disk:serial=elsewhere")
    with nbd_member(tmp_path, leg_record(source), target, phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"x" * 4096, 0)
        assert "another medium" in member.leader.latest_stats()["legs"]["target"]["open_error"]
        assert other.stat().st_blocks == 0
        client.close()


def test_a_read_error_moves_to_the_other_leg_after_the_reply(tmp_path: Path, source: Path) -> None:
    source.write_bytes(b"s" * SIZE)
    target = leg_record(tmp_path / "missing")
    with nbd_member(tmp_path, leg_record(source), target, phase="copying", preferred=1, target_ok=True) as member:
        client = member.client()
        with member.leader.withholding(Fault):
            cookie = client.start_read(4096, 0)
            until_told(member, client)
            assert not client.done(cookie), "no member decides alone that a leg is out"
        client.wait(cookie)
        assert client.read(4096, 0) == b"s" * 4096
        assert faults(member) == [("read", ((1, [(0, 1)]),))]
        client.close()


def test_a_read_that_no_leg_can_serve_is_an_error(tmp_path: Path) -> None:
    with nbd_member(tmp_path, leg_record(tmp_path / "missing")) as member:
        client = member.client()
        with pytest.raises(nbd.Error) as failed:
            client.read(4096, 0)
        assert failed.value.errnum == errno.EIO
        client.close()


def test_a_failed_flush_of_the_target_is_settled_by_the_leader(tmp_path: Path, source: Path, full: Path) -> None:
    """Writes into the page cache of a disk succeed; only the flush finds that the medium is full."""
    with loop_device(full) as device:
        with nbd_member(tmp_path, leg_record(source), leg_record(device), phase="copying", target_ok=True) as member:
            client = member.client()
            client.write(b"x" * 8 * MIB, 0)
            with member.leader.withholding(Fault):
                cookie = client.start_flush()
                until_told(member, client)
                assert not client.done(cookie)
            client.wait(cookie)
            operation, legs = faults(member)[0]
            assert operation == "flush"
            assert [leg for leg, _ in legs] == [1]
            client.nbd.flush()
            client.close()


def test_a_failed_flush_of_the_only_leg_is_an_error(tmp_path: Path, full: Path) -> None:
    with loop_device(full) as device, nbd_member(tmp_path, leg_record(device)) as member:
        client = member.client()
        client.write(b"x" * 8 * MIB, 0)
        with pytest.raises(nbd.Error) as failed:
            client.nbd.flush()
        assert failed.value.errnum == errno.EIO
        client.close()


def test_a_flush_right_after_a_write_reaches_the_leg(tmp_path: Path, full: Path) -> None:
    """Whoever executed the write, and although nothing was dirty before it: the leg's failure is told at once."""
    with loop_device(full) as device, nbd_member(tmp_path, leg_record(device)) as member:
        client = member.client()
        client.nbd.flush()  # a new member takes its leg as dirty; from here on it does not
        with suppress(OSError), (full.parent / "filler").open("wb") as filler:
            filler.write(bytes(2 * SMALL_BYTES))
        client.write(b"x" * 64 * KIB, 0)
        with pytest.raises(nbd.Error) as failed:
            client.nbd.flush()
        assert failed.value.errnum == errno.EIO
        client.close()


def test_the_leader_s_flush_fails_when_a_leg_does(tmp_path: Path, source: Path) -> None:
    target = leg_record(tmp_path / "missing")
    with nbd_member(tmp_path, leg_record(source), target, phase="copying", target_ok=True) as member:
        member.leader.request("w1", Open(1, [(0, 1)], 0, 1))
        # While the failure is not settled the other leg is not vouched for either.
        assert member.leader.request("w1", Flush(1)) == {"failed": [0, 1]}


def test_a_failed_write_in_a_window_waits_for_the_leader(tmp_path: Path, source: Path) -> None:
    with nbd_member(tmp_path, leg_record(source), leg_record(tmp_path / "missing")) as member:
        member.leader.join("copying")
        member.leader.request("w1", Open(1, [(0, 4)], 0, 1))
        client = member.client()
        with member.leader.withholding(Fault):
            cookie = client.start_write(b"x" * 4096, 0)
            until_told(member, client)
            assert not client.done(cookie)
        client.wait(cookie)
        assert client.read(4096, 0) == b"x" * 4096
        client.close()


def test_a_leg_that_is_back_is_opened_again(tmp_path: Path, source: Path) -> None:
    target = sparse_file(tmp_path / "target", SIZE)
    record = leg_record(target)
    away = target.rename(tmp_path / "away")
    with nbd_member(tmp_path, leg_record(source), record, phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"1" * 4096, 0)
        away.rename(target)
        member.leader.latest_stats(lambda stats: stats["legs"]["target"]["open"])
        wait_for(lambda: "open again" in member.stderr(), 5, "the message")
        member.leader.set_ok(1, [(32, 33)])  # as after a resync
        client.write(b"2" * 4096, 32 * MIB)
        client.close()
        assert target.read_bytes()[32 * MIB :][:4096] == b"2" * 4096
        assert target.read_bytes()[:4096] == bytes(4096)
