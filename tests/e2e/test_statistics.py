"""What `status` says of the application's I/O is what the application did, in each phase, and never an old number."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.support.load import KIB, MIB, Fio, KeepingClient
from tests.support.nbd_file import nbd_file
from tests.support.poll import wait_for
from tests.support.product import Product, Volume, make_source

SIZE = 64 * MIB
IOPS = 500
BLOCK = 4 * KIB
DELAY_MS = 20
WATCHED_S = 4.0
NEAR = 0.1  # a rate of a busy machine, over five seconds


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    return Volume.make(product, make_source(legs / "source", SIZE), legs / "target")


def without_rates(volume: Volume) -> dict[str, Any] | None:
    """`io` once its rates are not known; else None."""
    io: dict[str, Any] = volume.status()["io"]
    return io if io["recent"]["interval_s"] is None else None


def recent(volume: Volume) -> dict[str, Any]:
    found: dict[str, Any] = volume.status()["io"]["recent"]
    return found


def is_near(one: dict[str, Any]) -> bool:
    return bool(
        abs(one["iops"] - IOPS) <= NEAR * IOPS and abs(one["bytes_per_s"] - IOPS * BLOCK) <= NEAR * IOPS * BLOCK
    )


def assert_ordered(one: dict[str, Any]) -> None:
    """A percentile is told from above, by an eighth at most."""
    assert 0 < one["p50_ms"] <= one["p99_ms"] <= one["longest_ms"] * 1.125, one


def test_a_known_load_is_what_status_shows(volume: Volume, tmp_path: Path) -> None:
    options = ("--rw=randrw", f"--bs={BLOCK}", f"--rate_iops={IOPS},{IOPS}", "--rwmixread=50", f"--size={SIZE}")
    with Fio(tmp_path, volume.uri, *options):
        for verb in ("setup", "start", "cutover"):
            if verb != "setup":
                volume.run(verb)
                volume.wait_synced()
            is_full = wait_for(
                lambda: (found := recent(volume))["interval_s"] and all(map(is_near, (found["read"], found["write"]))),
                30,
                f"status shows the load after {verb}: {IOPS} reads and writes per second",
            )
            assert is_full
            found = recent(volume)
            assert_ordered(found["read"])
            assert_ordered(found["write"])
            assert 0 < found["interval_s"] < 7
        printed = volume.run("status")
        assert "P99 ms" in printed and printed.count("reads") == 1, printed
    at_rest = wait_for(lambda: (found := recent(volume))["read"]["iops"] == 0 and found, 20, "the load has left")
    assert at_rest["read"]["p99_ms"] is None and at_rest["write"]["longest_ms"] is None


def test_a_cutover_s_hold_is_counted(volume: Volume, tmp_path: Path) -> None:
    volume.run("start")
    volume.wait_synced()
    with Fio(tmp_path, volume.uri, "--rw=randwrite", f"--bs={BLOCK}", "--iodepth=16", f"--size={SIZE}") as fio:
        fio.wait_served(volume, 1000)
        before = volume.status()["io"]["holds"]
        volume.run("cutover")
        wait_for(lambda: volume.status()["io"]["holds"] > before, 20, "the writes that the cutover held are counted")
        hold = recent(volume)["hold"]
        assert hold["count"] > 0 and 0 < hold["longest_ms"] <= volume.status()["io"]["hold_longest_ms"]


def test_a_slow_leg_shows_in_the_percentiles(product: Product, legs: Path) -> None:
    """nbdkit delays each read of the source."""
    slow = ("--filter=delay", "memory", str(SIZE), f"rdelay={DELAY_MS}ms")
    with nbd_file(legs, *slow) as source:
        volume = Volume.make(product, source, legs / "target")
        client = nbd.NBD()
        client.connect_uri(volume.uri)
        for number in range(100):
            client.pread(BLOCK, number * SIZE // 100 // BLOCK * BLOCK)
        read = wait_for(lambda: (found := recent(volume)["read"])["p50_ms"] and found, 20, "reads are told")
        assert DELAY_MS <= read["p50_ms"] <= 3 * DELAY_MS, read
        assert_ordered(read)
        assert 0 < read["iops"] <= 1000 / DELAY_MS
        client.shutdown()
        volume.run("down")


@pytest.mark.parametrize("process", ["member", "agent"])
def test_a_restart_shows_neither_a_negative_rate_nor_a_spike(process: str, volume: Volume) -> None:
    """A member counts from zero: the difference to its predecessor is negative, and all of it at once a spike."""
    load = KeepingClient(volume.uri, SIZE, seed=1)
    load.wait_acknowledged(2000)
    fastest = wait_for(lambda: recent(volume)["write"]["iops"], 20, "a rate is told")
    volume.product.kill("v", process)
    if process == "agent":
        volume.run("up")
    acknowledged, begun_s, seen = load.acknowledged, time.monotonic(), []

    def watched() -> bool:
        seen.append(volume.status()["io"])
        load.assert_working()
        return time.monotonic() - begun_s > WATCHED_S

    wait_for(watched, 60, "some seconds have been watched")
    load.stop()
    told = [io["recent"] for io in seen if io["recent"]["interval_s"] is not None]
    assert told, seen
    # A request of the client may be cut where regions differ, but here none do: a write is one of the member's.
    ceiling = 3 * max(fastest, (load.acknowledged - acknowledged) / WATCHED_S)
    for one in told:
        assert 0 < one["interval_s"] < 7
        assert 0 <= one["write"]["iops"] <= ceiling and 0 <= one["read"]["iops"] <= ceiling, (one, ceiling)
    if process == "member":
        unknown = [io for io in seen if io["recent"]["interval_s"] is None]
        assert all(io["recent"]["write"] == dict.fromkeys(io["recent"]["write"]) for io in unknown)


def test_a_member_that_is_stopped_is_seen_not_to_tell(volume: Volume) -> None:
    wait_for(lambda: recent(volume)["interval_s"], 20, "the member tells")
    pid = volume.product.pid("v", "member")
    os.kill(pid, signal.SIGSTOP)
    try:
        io = wait_for(lambda: without_rates(volume), 20, "rates are not known")
        assert io is not None and io["age_s"] >= 3 and io["reads"] is None and io["recent"]["read"]["p50_ms"] is None
        printed = volume.run("status")
        assert "the member has told nothing for" in printed, printed
        row = next(line.split() for line in printed.splitlines() if " reads " in line)
        assert row[1:] == ["-", "reads", *["-"] * 5], printed
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: recent(volume)["interval_s"], 20, "it tells again")
    assert "the member has told nothing" not in volume.run("status")


def test_without_a_member_the_fields_are_null(volume: Volume) -> None:
    volume.run("down")
    for status in (volume.status(), volume.product.printed_status("v")):
        assert status["io"]["recent"]["read"]["iops"] is None and status["io"]["age_s"] is None
