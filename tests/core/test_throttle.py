"""The adaptive throttle against a model of an application whose latency grows with the rate of the copy."""

import random
from collections.abc import Callable

import pytest

from shadowvol.core.geometry import MIB
from shadowvol.core.latency import BUCKET_COUNT, bucket_of
from shadowvol.core.throttle import (
    ALLOWED_RATIO,
    BUSY_KEPT_S,
    LOW,
    MAX,
    NORMAL,
    PROCESSOR_SHARE,
    RATE_MIN,
    AdaptiveThrottle,
    Copying,
    share,
)

FRAME_S = 0.25
NONE = [0] * BUCKET_COUNT
PROCESSORS = 2


def histogram(latencies_s: list[float]) -> list[int]:
    buckets = [0] * BUCKET_COUNT
    for latency_s in latencies_s:
        buckets[bucket_of(int(latency_s * 1e9))] += 1
    return buckets


class Host:
    """One volume that copies; `slow`: the factor by which requests take longer at a rate of the copy."""

    def __init__(
        self,
        impact: str,
        slow: Callable[[float], float],
        *,
        disk: float = 400.0 * MIB,
        processor_s_per_gib: float = 0.0,
    ) -> None:
        self.processor_s_per_byte = processor_s_per_gib / (1 << 30)
        self.throttle = AdaptiveThrottle()
        self.volume = Copying("v", impact)
        self.slow, self.disk = slow, disk
        self.iops = 2000
        self.slowness = 1.0  # of the application's requests, with a copy or without
        self.now_s = 100.0
        self.rate = 0.0  # of the copy, in the last frame
        self.quiet_frames = self.frames = 0
        self.copied = 0.0
        self._chance = random.Random(7)

    def run(self, seconds: float, *, copying: bool = True) -> None:
        for _ in range(int(seconds / FRAME_S)):
            self.now_s += FRAME_S
            pace = self.throttle.plan(self.now_s, [self.volume] if copying else []).get("v")
            allowed = 0.0 if pace is None or pace.quiet else min(pace.rate or self.disk, self.disk)
            self.frames += 1
            self.quiet_frames += pace is not None and pace.quiet
            self.rate = allowed
            self.copied += allowed * FRAME_S
            self.throttle.copied(int(allowed * FRAME_S))
            self.throttle.worked(allowed * FRAME_S * self.processor_s_per_byte, PROCESSORS)
            base = [self._chance.lognormvariate(-9, 0.3) for _ in range(int(self.iops * FRAME_S))]
            took = histogram([latency * self.slowness * self.slow(allowed) for latency in base])
            self.throttle.frame("v", self.volume.impact, self.now_s - FRAME_S, self.now_s, took, NONE)


def linear(rate_that_doubles: float) -> Callable[[float], float]:
    return lambda rate: 1 + rate / rate_that_doubles


@pytest.mark.parametrize("impact", [LOW, NORMAL])
def test_the_budget_settles_where_the_application_is_slowed_by_what_is_allowed(impact: str) -> None:
    host = Host(impact, linear(100 * MIB))
    host.run(5, copying=False)
    host.run(60)
    begun, copied = host.now_s, host.copied
    host.run(120)
    mean = (host.copied - copied) / (host.now_s - begun)
    right = (ALLOWED_RATIO[impact] - 1) * 100 * MIB  # p99 is then just as much longer as is allowed
    assert 0.4 * right < mean < 1.2 * right, mean / MIB


def test_a_copy_that_nobody_feels_reaches_what_the_disk_gives() -> None:
    host = Host(LOW, lambda rate: 1.0)
    host.run(3, copying=False)
    host.run(60)
    assert host.throttle.budget >= host.disk


@pytest.mark.parametrize("impact", [LOW, NORMAL])
def test_copiers_keep_to_their_share_of_the_processors(impact: str) -> None:
    """Though the member sees nothing of it, as what waits for a processor has not reached it yet."""
    host = Host(impact, lambda rate: 1.0, processor_s_per_gib=1.0)
    host.run(120)
    rates = []
    for _ in range(60):
        host.run(1)
        rates.append(host.rate)
    share_mib = PROCESSOR_SHARE[impact] * PROCESSORS * 1024
    assert 0.7 * share_mib < sum(sorted(rates)[10:]) / 50 / MIB < 1.15 * share_mib


def test_the_share_does_not_bind_beside_requests_that_take_long_anyway() -> None:
    host = Host(LOW, lambda rate: 1.0, processor_s_per_gib=1.0)
    host.slowness = 10.0
    host.run(120)
    assert host.throttle.budget >= host.disk


def test_the_share_binds_where_requests_are_too_few_to_have_a_percentile() -> None:
    host = Host(LOW, lambda rate: 1.0, processor_s_per_gib=4.0)
    host.iops = 40
    host.run(60)
    assert host.rate < 16 * MIB, "at first it is that"
    host = Host(LOW, lambda rate: 1.0)
    host.iops = 40
    host.run(60)
    assert host.throttle.budget == 16 * MIB, "nothing speaks for more"


def test_a_copy_that_hurts_at_any_rate_goes_on_at_the_smallest() -> None:
    host = Host(LOW, lambda rate: 1.0 if rate == 0 else 50.0)
    host.run(3, copying=False)
    host.run(30)
    before = host.copied
    host.run(60)
    assert host.throttle.budget == RATE_MIN
    assert host.copied - before > 0.8 * 60 * RATE_MIN
    assert host.quiet_frames / host.frames < 0.2


def test_a_load_that_changes_is_compared_with_itself() -> None:
    """Ten times longer requests of a new load are not the copy's fault."""
    host = Host(LOW, lambda rate: 1.0)
    host.run(3, copying=False)
    host.run(30)
    host.slow = lambda rate: 10.0
    host.run(60)
    assert host.throttle.budget > 100 * MIB


def test_what_others_do_to_the_application_is_not_put_down_to_the_copy() -> None:
    """Latencies that swing by themselves, for some seconds at a time."""
    host = Host(LOW, lambda rate: 1.0)
    chance = random.Random(3)
    for second in range(200):
        factor = chance.choice([1.0, 1.3, 1.7, 2.5])
        host.slow = lambda rate, factor=factor: factor
        host.run(1, copying=second > 3)
    assert host.copied / host.now_s > 40 * MIB


def test_idle_is_full_speed_and_an_application_that_comes_back_finds_the_old_budget() -> None:
    host = Host(NORMAL, linear(50 * MIB))
    host.run(3, copying=False)
    host.run(60)
    host.iops = 0
    host.run(BUSY_KEPT_S + 1)
    found = host.throttle.budget
    assert host.rate == host.disk > found
    host.iops = 2000
    host.run(0.5)  # its first frame is one of full speed
    assert host.throttle.budget == found and host.rate <= found


def test_an_application_that_nobody_spares_has_no_effect() -> None:
    host = Host(MAX, linear(1 * MIB))
    host.run(3, copying=False)
    host.run(20)
    assert host.rate == host.disk and host.quiet_frames == 0


def test_sudden_pain_ends_a_turn_at_once() -> None:
    host = Host(NORMAL, lambda rate: 1.0)
    host.run(3, copying=False)
    host.run(40)
    before = host.throttle.budget
    host.slow = lambda rate: 1.0 if rate < 10 * MIB else 100.0
    host.run(1.0)
    assert host.throttle.budget < before


def test_the_smallest_rate_and_the_largest_hold() -> None:
    host = Host(LOW, lambda rate: 1.0 if rate == 0 else 50.0)
    host.volume = Copying("v", LOW, rate_max=90 * MIB, rate_min=60 * MIB)
    host.run(30)
    assert host.throttle.budget == RATE_MIN
    assert host.throttle.plan(host.now_s, [host.volume])["v"].rate == 60 * MIB
    host.volume = Copying("v", LOW, rate_max=30 * MIB, rate_min=60 * MIB)
    assert host.throttle.plan(host.now_s, [host.volume])["v"].rate == 30 * MIB


def test_an_application_without_a_past_is_first_looked_at_in_quiet() -> None:
    host = Host(LOW, linear(100 * MIB))
    host.run(0.5)
    assert host.rate == 0 and host.quiet_frames > 0


@pytest.mark.parametrize(
    ("volumes", "shares"),
    [
        ([Copying("a"), Copying("b")], {"a": 50, "b": 50}),
        ([Copying("a", rate_max=10), Copying("b")], {"a": 10, "b": 90}),
        ([Copying("a", rate_min=80), Copying("b")], {"a": 80, "b": 20}),
        ([Copying("a"), Copying("b", rate_min=80)], {"a": 20, "b": 80}),
        ([Copying("a", rate_max=45), Copying("b", rate_min=80)], {"a": 20, "b": 80}),
        ([Copying("a", rate_max=10), Copying("b", rate_min=50)], {"a": 10, "b": 90}),
        ([Copying("a", rate_min=500), Copying("b")], {"a": 500, "b": 0}),
        ([Copying("a", rate_min=500, rate_max=20), Copying("b"), Copying("c")], {"a": 20, "b": 40, "c": 40}),
        ([], {}),
    ],
)
def test_one_budget_is_shared(volumes: list[Copying], shares: dict[str, float]) -> None:
    assert share(100.0, volumes) == pytest.approx(shares)


def test_nobody_is_left_without_any_rate() -> None:
    host = Host(NORMAL, lambda rate: 1.0)
    host.run(3, copying=False)
    paces = host.throttle.plan(host.now_s, [Copying("v", rate_min=500 * MIB), Copying("w"), Copying("x", rate_max=9)])
    assert {name: pace.rate for name, pace in paces.items()} == {"v": 500 * MIB, "w": MIB, "x": 9}
