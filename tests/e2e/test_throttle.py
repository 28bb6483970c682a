"""Copies yield to applications, deadlines, and each other (DESIGN 7). How much is for scripts/bench_throttle."""

import time
from pathlib import Path

import pytest

from tests.support.load import Fio
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

LOAD = ("--rw=randrw", "--bs=4k", "--iodepth=4", "--rate_iops=300,300")
LIMIT_S = 30


def throttle_of(volume: Volume) -> dict[str, object]:
    shown: dict[str, object] = volume.status()["copy"]["throttle"]
    return shown


def wait_for_reason(volume: Volume, reason: str) -> None:
    wait_for(lambda: volume.status()["copy"]["reason"] == reason, LIMIT_S, f"its copy {reason}")


def test_a_copy_yields_while_an_application_works_and_only_then(product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 512 * MIB), legs / "target")
    volume.run("throttle", "--impact", "normal")
    with Fio(legs, volume.uri, *LOAD, "--size=16m") as fio:
        fio.wait_served(volume, 300)
        volume.run("start")
        wait_for(lambda: throttle_of(volume)["allowed_bytes_per_s"], LIMIT_S, "the copy is held back")
        wait_for_reason(volume, "yields to the application")
        volume.run("throttle", "--impact", "max", "--rate", "8MiB/s")
        status = volume.status()
        assert status["copy"]["throttle"]["allowed_bytes_per_s"] == 8 * MIB and status["copy"]["reason"] is None
        volume.run("throttle", "--impact", "low", "--rate", "none")
        wait_for_reason(volume, "yields to the application")
    wait_for(lambda: throttle_of(volume)["allowed_bytes_per_s"] is None, LIMIT_S, "it is not any more")
    volume.wait_synced()
    volume.assert_legs_equal()


def test_a_deadline_and_a_smallest_rate_count_more_than_the_application(product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 512 * MIB), legs / "target")
    volume.run("throttle", "--impact", "low", "--min-rate", "60MiB/s", "--rate", "70MiB/s")
    with Fio(legs, volume.uri, *LOAD, "--size=16m") as fio:
        fio.wait_served(volume, 300)
        volume.run("start")
        wait_for(lambda: throttle_of(volume)["allowed_bytes_per_s"] == 60 * MIB, LIMIT_S, "the smallest rate")
        volume.run("throttle", "--min-rate", "none", "--finish-by", "4s", "--rate", "none")
        shown = throttle_of(volume)
        assert shown["min_rate_bytes_per_s"] is None and isinstance(shown["finish_by"], str)
        needed = volume.status()["size_bytes"] // 2 / 4
        wait_for(lambda: (throttle_of(volume)["allowed_bytes_per_s"] or needed) >= needed, LIMIT_S, "what is needed")
        volume.wait_synced()
    assert throttle_of(volume)["finish_by"] == shown["finish_by"]
    volume.run("throttle", "--finish-by", "none")
    assert throttle_of(volume)["finish_by"] is None


def test_a_deadline_that_is_over_is_full_speed(product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 256 * MIB), legs / "target")
    volume.run("throttle", "--impact", "low", "--finish-by", "50ms")
    with Fio(legs, volume.uri, *LOAD, "--size=16m") as fio:
        fio.wait_served(volume, 300)
        volume.run("start")
        deadline_s = time.monotonic() + LIMIT_S
        while volume.status()["phase"] == "copying":
            assert throttle_of(volume)["allowed_bytes_per_s"] is None and time.monotonic() < deadline_s


def test_two_copies_run_at_once_and_others_wait_their_turn(product: Product, legs: Path) -> None:
    volumes = [
        Volume.make(product, make_source(legs / f"source-{name}", 8 * MIB), legs / f"target-{name}", name=name)
        for name in ("a", "b", "c")
    ]
    first, second, third = volumes
    for volume in volumes[:2]:
        volume.run("throttle", "--rate", "64KiB/s")
        volume.run("start")
        wait_for(lambda volume=volume: volume.status()["copy"]["bytes_copied"] or _reads(volume), LIMIT_S, "it copies")
    third.run("start")
    wait_for_reason(third, "waits for its turn: a and b copy first on this host")
    assert third.status()["regions_both_ok"] == 0
    first.run("pause")  # gives its place away
    third.wait_synced()
    first.run("resume")
    for volume in (first, second):
        volume.run("throttle", "--rate", "none")
        volume.wait_synced()
        volume.assert_legs_equal()


def test_as_many_copies_run_at_once_as_the_agent_is_told(
    product: Product, legs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWVOL_COPIES_MAX", "1")
    first, second = [
        Volume.make(product, make_source(legs / f"source-{name}", 8 * MIB), legs / f"target-{name}", name=name)
        for name in ("a", "b")
    ]
    first.run("throttle", "--rate", "64KiB/s")
    first.run("start")
    second.run("start")
    wait_for_reason(second, "waits for its turn: a copy first on this host")
    first.run("pause")
    second.wait_synced()


def _reads(volume: Volume) -> bool:
    return bool(volume.status()["copy"]["rate_bytes_per_s"])
