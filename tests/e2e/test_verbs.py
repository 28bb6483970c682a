"""The verbs beyond the straight way: undo after commit, force, abort, retarget, delete, down and up, refusals, wait."""

from pathlib import Path

import nbd
import pytest

from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, assert_same_bytes, make_source

SIZE_BYTES = 32 * MIB


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """Up, in setup."""
    return Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")


def write(volume: Volume, *places: tuple[int, int]) -> None:
    """(offset, fill byte): 100 KiB each."""
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    for offset, fill in places:
        client.pwrite(bytes([fill]) * 102_400, offset)
    client.shutdown()
    wait_for(lambda: volume.status()["io"]["clients"] == 0, 20, "the client has left")


def synced_after_cutover(volume: Volume) -> None:
    volume.run("start")
    volume.wait_synced()
    volume.run("cutover")


def test_undo_after_commit_brings_the_source_up_to_date(volume: Volume) -> None:
    """Only what was written after the commit is copied back; the source is preferred when it has everything."""
    synced_after_cutover(volume)
    volume.run("commit", "--keep-undo")
    status = volume.status()
    assert status["phase"] == "committed" and status["undo_available"]
    write(volume, (1 * MIB, 0x11), (20 * MIB + 777, 0x22))
    copied_before = volume.status()["copy"]["bytes_copied"]
    volume.run("undo")
    status = volume.wait_synced()
    assert status["preferred"] == "source"
    assert status["copy"]["bytes_copied"] - copied_before <= 2 * 16 * MIB  # two zones
    data = volume.source.read_bytes()
    assert data[1 * MIB : 1 * MIB + 102_400] == b"\x11" * 102_400
    assert data[20 * MIB + 777 :][:102_400] == b"\x22" * 102_400
    volume.assert_legs_equal()


def test_undo_after_commit_at_once_with_early(volume: Volume) -> None:
    synced_after_cutover(volume)
    volume.run("commit", "--keep-undo")
    write(volume, (3 * MIB, 0x33))
    volume.run("undo", "--early")
    assert volume.status()["preferred"] == "source"
    write(volume, (9 * MIB, 0x44))
    volume.wait_synced()
    volume.assert_legs_equal()


def test_commit_again_ends_the_undo(volume: Volume) -> None:
    synced_after_cutover(volume)
    volume.run("commit", "--keep-undo")
    volume.run("commit")
    assert not volume.status()["undo_available"]
    assert "--keep-undo" in volume.refused("undo")
    assert volume.status()["legs"]["source"]["health"] == "released"
    before = volume.source.read_bytes()
    write(volume, (5 * MIB, 0x55))
    assert volume.source.read_bytes() == before
    assert volume.target.read_bytes()[5 * MIB : 5 * MIB + 100] == b"\x55" * 100


def test_commit_with_force_needs_no_complete_source(volume: Volume) -> None:
    """After an undo of a commit was begun with --early and held, the target is complete and the source is not."""
    synced_after_cutover(volume)
    volume.run("commit", "--keep-undo")
    write(volume, (2 * MIB, 0x66), (17 * MIB, 0x67))
    volume.run("pause")
    volume.run("undo", "--early")
    volume.run("cutover", "--early")
    status = volume.status()
    assert status["regions_source_ok"] < status["regions_total"] == status["regions_target_ok"]
    assert "--force" in volume.refused("commit")
    volume.run("commit", "--force")
    assert volume.phase == ("committed", "target")
    assert volume.target.read_bytes()[2 * MIB : 2 * MIB + 100] == b"\x66" * 100


def test_abort_after_cutover_goes_back_to_the_source(volume: Volume) -> None:
    synced_after_cutover(volume)
    write(volume, (4 * MIB, 0x77))
    volume.run("abort")
    volume.product.wait_phase(volume.name, "setup")
    assert volume.phase == ("setup", "source")
    assert volume.source.read_bytes()[4 * MIB : 4 * MIB + 100] == b"\x77" * 100
    target = volume.target.read_bytes()
    write(volume, (4 * MIB, 0x78))
    assert volume.source.read_bytes()[4 * MIB : 4 * MIB + 100] == b"\x78" * 100
    assert volume.target.read_bytes() == target


def test_retarget_in_setup_and_delete_after_commit(volume: Volume, legs: Path) -> None:
    other = legs / "other"
    volume.run("retarget", "--target", str(other), "--provision")
    synced_after_cutover(volume)
    assert "setup" in volume.refused("retarget", "--target", str(volume.target))
    assert_same_bytes(volume.source, other, SIZE_BYTES)
    assert "committed" in volume.refused("delete")
    volume.run("commit")
    assert "down" in volume.refused("delete")
    volume.run("down")
    volume.run("delete")
    volume.run("status", code=4)
    assert_same_bytes(volume.source, other, SIZE_BYTES)


def test_retarget_after_abort(volume: Volume, legs: Path) -> None:
    """The old target's leg has been let go, and the new one is what is copied to."""
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    volume.run("abort")
    volume.product.wait_phase(volume.name, "setup")
    other = legs / "other"
    volume.run("retarget", "--target", str(other), "--provision")
    volume.run("throttle", "--rate", "none")
    volume.run("start")
    volume.wait_synced()
    assert_same_bytes(volume.source, other, SIZE_BYTES)


def test_down_and_up_keep_everything(volume: Volume) -> None:
    """Phase, preferred, map, pause and throttle outlive down, up, and an agent that was killed."""
    volume.run("throttle", "--rate", "2MiB/s", "--impact", "low")
    volume.run("start")
    volume.run("pause")
    volume.run("cutover", "--early")
    before = volume.status()
    for crash in (False, True):
        volume.run("down")
        assert volume.status()["endpoint"] is None
        assert volume.status()["phase"] == "copying"
        if crash:
            volume.product.kill(volume.name, "agent")
        volume.run("up")
        after = volume.status()
        for field in ("phase", "preferred", "regions_both_ok", "paused"):
            assert after[field] == before[field], field
        assert after["copy"]["throttle"].items() >= {"rate_bytes_per_s": 2 * MIB, "impact": "low"}.items()
        assert after["copy"]["state"] == "paused"
    volume.run("throttle", "--rate", "none")
    volume.run("resume")
    status = volume.wait_synced()
    assert status["preferred"] == "target"
    volume.assert_legs_equal()


def test_down_waits_for_clients_to_leave_unless_forced(volume: Volume) -> None:
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    wait_for(lambda: volume.status()["io"]["clients"] == 1, 20, "the client is counted")
    assert "client" in volume.refused("down")
    client.pwrite(b"x" * 4096, 0)
    volume.run("down", "--force")
    with pytest.raises(nbd.Error):
        client.pread(4096, 0)
    assert volume.source.read_bytes()[:4096] == b"x" * 4096


def test_a_verb_in_the_wrong_phase_is_refused_and_changes_nothing(volume: Volume) -> None:
    def refused(*verbs: str) -> None:
        before = volume.phase
        for verb in verbs:
            volume.refused(*verb.split())
        assert volume.phase == before

    refused("cutover", "cutover --early", "undo", "commit", "abort")
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    refused("start", "cutover", "undo", "commit", "commit --force", "delete")
    volume.run("throttle", "--rate", "none")
    volume.wait_synced()
    refused("start", "undo", "commit", "delete")
    volume.run("cutover")
    refused("start", "cutover", "delete")
    volume.run("commit")
    refused("start", "cutover", "undo", "commit", "abort", "delete")


def test_wait_ends_with_what_happened(volume: Volume) -> None:
    """0 reached, 1 only an operator can, 4 no such volume, 5 not yet."""
    volume.run("wait", "--for", "setup")
    volume.run("wait", "--for", "synced", "--timeout", "1", code=1)
    volume.product.run("wait", "nobody", "--for", "synced", code=4)
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    volume.run("wait", "--for", "copying")
    volume.run("wait", "--for", "synced", "--timeout", "0.5", code=5)
    volume.run("pause")
    volume.run("wait", "--for", "synced", "--timeout", "10", code=1)
    volume.run("resume")
    volume.run("throttle", "--rate", "none")
    volume.run("wait", "--for", "synced", "--timeout", "60")
    volume.run("wait", "--for", "committed", "--timeout", "1", code=1)


def test_verify_copy_reads_back_what_it_copied(product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target", "--verify-copy")
    volume.run("start")
    status = volume.wait_synced()
    assert status["copy"]["bytes_copied"] == SIZE_BYTES
    volume.assert_legs_equal()
