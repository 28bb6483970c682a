"""A volume at which nothing goes on is hardly looked at, and still acts at once when something happens to it."""

import time
from pathlib import Path

from shadowvol.agent.volume import TICK_AT_REST_S
from tests.support.product import MIB, Product, Volume, make_source

ROUNDS = 4


def test_a_copy_begins_and_ends_without_waiting_for_a_tick(product: Product, legs: Path) -> None:
    """The fastest of some: a busy machine may be slow, but a wake-up that is lost makes all of them wait."""
    volume = Volume.make(product, make_source(legs / "source", 4 * MIB), legs / "target")
    took_s = []
    for _ in range(ROUNDS):
        begun_s = time.monotonic()
        volume.order("start", {})
        volume.order("status", {"until": "synced", "limit_s": 60.0})
        took_s.append(time.monotonic() - begun_s)
        assert volume.phase == ("synced", "source")
        volume.order("abort", {})
        volume.wait_setup()
    assert min(took_s) < TICK_AT_REST_S, took_s
