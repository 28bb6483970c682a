"""A migration under a verifying load: no error and no mismatch through every transition, and equal legs at the end."""

from collections.abc import Callable
from pathlib import Path

import nbd

from tests.support.load import VERIFIED_MIX, Fio, longest_write_ms, unaligned_pass
from tests.support.product import MIB, Product, Volume, make_source

SWITCH_LIMIT_MS = 1000  # expected are a few; the machine may be shared

Record = Callable[[str, object], None]  # pytest's record_property


def test_nothing_is_lost_from_start_to_commit(product: Product, legs: Path, record_property: Record) -> None:
    """start, copy, cutover and undo ten times under load, then quiet: equal; cutover and commit under load again."""
    volume = Volume.make(product, make_source(legs / "source", 256 * MIB), legs / "target")

    def unaligned() -> None:
        """The last 16 MiB belong to a second client."""
        done = unaligned_pass(legs, volume.uri, 240 * MIB, 16 * MIB)
        assert done["write"]["total_ios"] > 20

    with Fio(legs, volume.uri, *VERIFIED_MIX, "--size=240m") as fio:
        fio.wait_served(volume, 100)
        unaligned()
        volume.run("throttle", "--rate", "40MiB/s")
        volume.run("start")
        unaligned()
        assert volume.phase == ("copying", "source")
        volume.run("throttle", "--rate", "none")
        volume.wait_synced()
        unaligned()
        pauses_ms = volume.switches_ms(10)
        unaligned()
        fio.assert_running()
    longest_ms = longest_write_ms(fio.stop())
    volume.wait_synced()
    volume.assert_legs_equal()

    with Fio(legs, volume.uri, *VERIFIED_MIX, "--size=240m", name="again") as fio:
        volume.run("cutover")
        unaligned()
        volume.run("commit")
        unaligned()
        fio.wait_served(volume, 100)
    assert volume.phase == ("committed", "target")
    record_property("last_switch_pause_ms", pauses_ms)
    record_property("longest_write_ms", longest_ms)
    print(f"switch pauses {pauses_ms} ms, longest write of the client {longest_ms:.1f} ms")
    assert max(pauses_ms) < SWITCH_LIMIT_MS


def test_no_error_through_early_cutover_undo_pause_abort_and_start_again(product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 384 * MIB), legs / "target")
    with Fio(legs, volume.uri, *VERIFIED_MIX) as fio:
        fio.wait_served(volume, 50)
        status = volume.start_and_hold(0.02)
        assert status["phase"] == "copying" and status["fraction_both_ok"] < 1
        volume.run("cutover", "--early")
        fio.wait_served(volume, 50)
        assert volume.phase == ("copying", "target")
        volume.run("undo")
        fio.wait_served(volume, 50)
        volume.run("pause")
        assert volume.status()["copy"]["state"] == "paused"
        fio.wait_served(volume, 50)
        volume.run("resume")
        assert volume.status()["copy"]["state"] in ("running", "backoff")
        fio.wait_served(volume, 50)
        volume.run("abort")
        volume.wait_setup()
        fio.wait_served(volume, 50)
        fio.assert_running()

        volume.start_and_hold(0.02)
        volume.run("cutover", "--early")
        fio.wait_served(volume, 50)
        volume.run("abort")
        volume.wait_setup()
        assert volume.phase == ("setup", "source")
        fio.wait_served(volume, 50)

        volume.run("throttle", "--rate", "none")
        volume.run("start")
        volume.wait_synced()
        fio.wait_served(volume, 50)
        fio.assert_running()
    volume.wait_synced()
    volume.assert_legs_equal()


def test_a_write_acknowledged_after_cutover_is_on_the_source_after_undo(product: Product, legs: Path) -> None:
    """Raw source file, read from below; the write is neither flushed nor followed by anything but the undo."""
    volume = Volume.make(product, make_source(legs / "source", 32 * MIB), legs / "target")
    volume.run("start")
    volume.wait_synced()
    volume.run("cutover")
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    patterns = {offset: bytes([offset % 251 + 1]) * 70_000 for offset in (0, 5 * MIB + 512, 31 * MIB)}
    for offset, pattern in patterns.items():
        client.pwrite(pattern, offset)
    volume.run("undo")
    data = volume.source.read_bytes()
    for offset, pattern in patterns.items():
        assert data[offset : offset + len(pattern)] == pattern
    client.shutdown()
    volume.assert_legs_equal()


def test_a_saturating_writer_does_not_keep_the_copy_from_its_end(
    product: Product, legs: Path, record_property: Record
) -> None:
    """32 writes of 1 MiB in flight over a hot eighth: synced is reached while it runs, and no hold is long."""
    volume = Volume.make(product, make_source(legs / "source", 256 * MIB), legs / "target")
    hot = ["--rw=write", "--bs=1m", "--iodepth=32", "--offset=64m", "--size=32m"]
    with Fio(legs, volume.uri, *hot) as fio:
        fio.wait_served(volume, 100)
        volume.run("start")
        status = volume.wait_synced()
        fio.assert_running()
    job = fio.stop()
    hold_ms = status["io"]["hold_longest_ms"]
    record_property("hold_longest_ms", hold_ms)
    print(
        f"longest hold {hold_ms} ms, longest write of the client {longest_write_ms(job):.1f} ms, "
        f"{job['write']['bw_bytes'] / MIB:.0f} MiB/s written, {status['copy']['bytes_recopied'] / MIB:.0f} MiB recopied"
    )
    assert hold_ms < SWITCH_LIMIT_MS
    volume.wait_synced()
    volume.assert_legs_equal()


def test_regions_overwritten_whole_need_no_copy(product: Product, legs: Path) -> None:
    """Beyond the windows that are open when copying is paused, 64 MiB are overwritten: that much less is copied."""
    size, overwritten = 320 * MIB, 64 * MIB
    volume = Volume.make(product, make_source(legs / "source", size), legs / "target")
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    volume.run("pause")
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    for offset in range(size - overwritten, size, 2 * MIB):
        client.pwrite(bytes([offset // MIB % 255 + 1]) * (2 * MIB), offset)
    client.shutdown()
    assert volume.phase[0] == "copying"
    volume.run("throttle", "--rate", "none")
    volume.run("resume")
    status = volume.wait_synced()
    assert status["copy"]["bytes_copied"] + status["copy"]["bytes_recopied"] == size - overwritten
    volume.assert_legs_equal()
