"""kill -9 of any process, in the copy and when synced, under clients that reconnect: nothing acknowledged is lost."""

import random
from pathlib import Path

import pytest

from tests.support.load import KeepingClient
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 192 * MIB
SMALL_BYTES = 32 * MIB
SEED = 20260


def kill_and_recover(volume: Volume, process: str) -> None:
    """A killed agent is started by the next `up`, as a service manager would; the others are the agent's to restart."""
    volume.product.kill(volume.name, process)
    if process == "agent":
        volume.run("up")


def rounds(volume: Volume, client: KeepingClient, processes: tuple[str, ...], count: int) -> None:
    for process in processes * count:
        kill_and_recover(volume, process)
        client.wait_acknowledged(40)


@pytest.mark.parametrize("preferred", ["source", "target"])
def test_nothing_acknowledged_is_lost_when_processes_are_killed(product: Product, legs: Path, preferred: str) -> None:
    """Copying at a rate that lasts, then synced, then quiet: both legs hold every acknowledged write."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    client = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED)
    try:
        client.wait_acknowledged(50)
        volume.run("throttle", "--rate", "4MiB/s")
        volume.run("start")
        if preferred == "target":
            volume.run("cutover", "--early")
        rounds(volume, client, ("member", "transfer", "agent"), 2)
        assert volume.phase == ("copying", preferred)
        volume.run("throttle", "--rate", "none")
        volume.wait_synced()
        rounds(volume, client, ("member", "agent"), 2)
        volume.wait_synced()
        client.wait_acknowledged(50)
    finally:
        client.stop()
    volume.wait_synced()
    assert client.reconnects > 0
    client.check_file(volume.source)
    client.check_file(volume.target)
    volume.assert_legs_equal()


def test_agent_and_member_killed_together_are_back_with_one_command(product: Product, legs: Path) -> None:
    """As after a power failure of the host, but for the page cache."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    client = KeepingClient(volume.uri, SIZE_BYTES, seed=random.Random(SEED).randrange(1000))
    try:
        client.wait_acknowledged(50)
        volume.run("start")
        volume.wait_synced()
        volume.run("cutover")
        for _ in range(3):
            client.wait_acknowledged(50)
            product.end()
            volume.run("up")
        client.wait_acknowledged(50)
    finally:
        client.stop()
    status = volume.wait_synced()
    assert status["preferred"] == "target"
    client.check_file(volume.source)
    client.check_file(volume.target)
    volume.assert_legs_equal()


def test_a_member_killed_after_the_commit_loses_nothing(product: Product, legs: Path) -> None:
    """The volume stays committed and is served from the target, which alone is written."""
    volume = Volume.make(product, make_source(legs / "source", SMALL_BYTES), legs / "target")
    volume.run("start")
    volume.wait_synced()
    volume.run("cutover")
    volume.run("commit")
    source = volume.source.read_bytes()
    client = KeepingClient(volume.uri, SMALL_BYTES, seed=SEED)
    try:
        client.wait_acknowledged(50)
        rounds(volume, client, ("member",), 3)
    finally:
        client.stop()
    assert client.reconnects > 0 and volume.phase == ("committed", "target")
    client.check_file(volume.target)
    assert volume.source.read_bytes() == source
