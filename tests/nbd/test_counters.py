"""Histograms of latencies, and what is made of them: percentiles, rates of the last seconds, counts below a limit."""

import random
from typing import Any

import pytest

from shadowvol.core.latency import BUCKET_COUNT, bucket_end_ns, bucket_of, percentile_s
from shadowvol.nbd.counters import RECENT_S, Counters, Recent, Totals, counts_below

ERROR_MAX = 0.125  # of a percentile, as documented
LIMIT_NS = bucket_end_ns(BUCKET_COUNT - 2)  # what is longer is all in the last bucket


def histogram(latencies_s: list[float]) -> list[int]:
    counters = Counters()
    for latency_s in latencies_s:
        counters.read_ended(1, latency_s)
    return counters.buckets[0]


def test_buckets_follow_each_other_without_a_gap_and_are_at_most_an_eighth_wide() -> None:
    begin_ns = 0
    for bucket in range(BUCKET_COUNT - 1):
        end_ns = bucket_end_ns(bucket)
        assert bucket_of(begin_ns) == bucket_of(end_ns - 1) == bucket < bucket_of(end_ns)
        assert end_ns - begin_ns <= max(1, begin_ns * ERROR_MAX)
        begin_ns = end_ns
    assert LIMIT_NS > 15 * 60 * 1e9
    assert bucket_of(10 * LIMIT_NS) == BUCKET_COUNT - 1


@pytest.mark.parametrize("seed", range(20))
def test_a_percentile_is_never_too_small_and_at_most_an_eighth_too_large(seed: int) -> None:
    chance = random.Random(seed)
    latencies_s = sorted(chance.lognormvariate(-8, 2) for _ in range(chance.randint(1, 3000)))
    buckets = histogram(latencies_s)
    for fraction in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact_s = next(value for index, value in enumerate(latencies_s, 1) if index >= fraction * len(latencies_s))
        told_s = percentile_s(buckets, fraction)
        assert told_s is not None and exact_s - 1e-9 <= told_s <= exact_s * (1 + ERROR_MAX) + 1e-9, (fraction, exact_s)


def test_nothing_has_no_percentile() -> None:
    assert percentile_s([0] * BUCKET_COUNT, 0.5) is None


@pytest.mark.parametrize("seed", range(5))
def test_counts_below_limits_are_exact_at_powers_of_two(seed: int) -> None:
    chance = random.Random(seed)
    latencies_ns = [chance.randrange(1 << chance.randint(1, 45)) for _ in range(500)]
    counters = Counters()
    for latency_ns in latencies_ns:
        counters.write_ended(512, latency_ns / 1e9)
    latencies_ns = [int(latency_ns / 1e9 * 1e9) for latency_ns in latencies_ns]
    told = Totals.of(counters).latencies()["write"]
    limits_ns = [1 << power for power in range(14, 35)]
    expected = [sum(latency_ns < limit_ns for latency_ns in latencies_ns) for limit_ns in limits_ns]
    assert counts_below(told["buckets"], limits_ns) == expected
    assert told["sum_s"] == pytest.approx(sum(latencies_ns) / 1e9)
    assert sum(count for _, count in told["buckets"]) == counters.writes == 500


def noted(recent: Recent, now_s: float, counters: Counters) -> dict[str, Any]:
    return recent.note(now_s, Totals.of(counters), counters.take_longest())


def test_rates_and_percentiles_are_of_the_last_seconds_only() -> None:
    counters, recent = Counters(), Recent()
    counters.write_ended(4096, 9.0)  # before anybody looked: in no interval
    noted(recent, 100.0, counters)
    now_s = 100.0
    for _ in range(20):
        now_s += 0.5
        for _ in range(50):
            counters.read_ended(4096, 0.001)
        told = noted(recent, now_s, counters)
    assert told["interval_s"] == RECENT_S
    assert told["read"]["iops"] == 100 and told["read"]["bytes_per_s"] == 409600
    assert 0.001 <= told["read"]["p50_s"] <= told["read"]["p99_s"] <= 0.001125
    assert told["write"] == {"iops": 0, "bytes_per_s": 0, "p50_s": None, "p99_s": None, "longest_s": None}
    assert told["hold"] == {"count": 0, "longest_s": None}


def test_the_longest_is_of_the_interval_and_leaves_with_it() -> None:
    counters, recent = Counters(), Recent()
    noted(recent, 0.0, counters)
    counters.read_ended(1, 0.5)
    counters.hold_ended(0.2)
    counters.hold_ended(0.1)
    assert noted(recent, 1.0, counters)["read"]["longest_s"] == 0.5
    counters.read_ended(1, 0.001)
    told = noted(recent, 2.0, counters)
    assert told["read"]["longest_s"] == 0.5 and told["hold"] == {"count": 2, "longest_s": 0.2}
    for now_s in (3.0, 4.0, 5.0, 6.0):
        counters.read_ended(1, 0.001)
        told = noted(recent, now_s, counters)
    assert told["read"]["longest_s"] == 0.001 and told["hold"] == {"count": 0, "longest_s": None}


def test_the_first_look_after_a_start_knows_no_rate() -> None:
    """However much was done before it: neither a spike nor a zero that somebody could take for one."""
    counters, recent = Counters(), Recent()
    for _ in range(10_000):
        counters.write_ended(1 << 20, 0.001)
    told = noted(recent, 50.0, counters)
    assert told["interval_s"] == 0 and told["write"]["p50_s"] is None


def test_a_member_that_was_stopped_tells_of_the_whole_time() -> None:
    counters, recent = Counters(), Recent()
    for now_s in (0.0, 0.5, 1.0):
        noted(recent, now_s, counters)
    for _ in range(100):
        counters.read_ended(512, 0.001)
    told = noted(recent, 21.0, counters)
    assert told["interval_s"] == 20 and told["read"]["iops"] == 5
