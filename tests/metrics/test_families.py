"""Readings as metrics: names, units and help as Prometheus wants them, and nothing said that is not known."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from shadowvol.agent.iostatus import STALE_S, io_status
from shadowvol.agent.metrics.families import LATENCY_LIMITS_NS, families_of
from shadowvol.agent.metrics.reading import AgentReading, VolumeReading
from shadowvol.agent.status import LegLive, LiveStatus, status_of
from shadowvol.core.geometry import MIB
from shadowvol.core.legs import TARGET, Phase
from shadowvol.core.records import LegRecord, VolumeConfig, VolumeRecord, VolumeState
from shadowvol.core.regionmap import RegionMap
from shadowvol.nbd.counters import Counters, Recent, Totals
from tests.support.scrape import Samples, samples_of, state, value

UNIT = re.compile(r"_(?:bytes|seconds|bytes_per_second)$")
# What counts things; everything else ends with its unit.
UNITLESS = re.compile(
    r"shadowvol_(agent_info|damaged_records|volume_led|member_up|phase|preferred_leg|regions|regions_ok|regions_both_ok"
    r"|undo_available|copy_state|copy_paused|windows_open|throttle_impact|leg_health|leg_errors|operations|holds"
    r"|requests_in_flight|clients|zones_logged)"
)


def member_told() -> dict[str, Any]:
    counters, recent = Counters(), Recent()
    recent.note(0.0, Totals.of(counters), counters.take_longest())
    for latency_s in (1e-6, 20e-6, 0.001, 0.001, 0.5, 60.0):
        counters.read_ended(4096, latency_s)
    counters.write_ended(512, 0.002)
    counters.hold_ended(0.25)
    totals = Totals.of(counters)
    return {
        "totals": totals.numbers(),
        "recent": recent.note(2.0, totals, counters.take_longest()),
        "latencies": totals.latencies(),
        "holds": {"count": totals.holds, "sum_s": totals.held_s},
        "engine": {"zones_logged": 7},
        "clients": 2,
        "in_flight": 1,
    }


LONGEST = {"read_longest_s": 60.0, "write_longest_s": 0.002, "hold_longest_s": 0.25}


def reading(name: str = "v", age_s: float | None = 0.1, **state: Any) -> VolumeReading:
    """Of a volume of 8 regions, 3 of them on both legs, that copies."""
    leg = LegRecord("/a", "file:a", 8 * MIB)
    config = VolumeConfig(name, "block", 8 * MIB, MIB, leg, replace(leg, uri="/b"), 64 << 10, 16 * MIB)
    fields = {"phase": Phase.COPYING, "up": True, "bytes_copied": 5, "bytes_recopied": 1, **state}
    record = VolumeRecord(config, VolumeState(**fields), RegionMap(8, b"\3\3\3\1\1\1\1\1"))
    told = member_told()
    live = LiveStatus(
        "h",
        copy_state="running",
        rate_bytes_per_s=10.0,
        eta_s=4.0,
        legs=(LegLive(), LegLive("degraded", 3, "EIO", None)),
        io=io_status(told, age_s, LONGEST, windows_open=2),
    )
    is_up = age_s is not None and age_s <= STALE_S
    latencies, holds = (told["latencies"], told["holds"]) if is_up else (None, None)
    return VolumeReading(name, status_of(record, live), is_up, latencies, holds)


class Fixed:
    """A collector of one reading."""

    def __init__(self, *volumes: VolumeReading) -> None:
        self.reading = AgentReading("h1", 0, volumes)

    def collect(self) -> list[Metric]:
        return list(families_of(self.reading))

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()

    def samples(self) -> Samples:
        return samples_of(self.text())


def test_what_is_known_is_told() -> None:
    samples = Fixed(reading(preferred=TARGET, last_switch_pause_ms=12.5, rate_bytes_per_s=1000)).samples()
    assert value(samples, "agent_info", host="h1", version="0.1.0") == 1
    assert value(samples, "member_up", volume="v") == value(samples, "volume_led", volume="v") == 1
    assert state(samples, "phase", "phase", volume="v") == "copying"
    assert state(samples, "copy_state", "state", volume="v") == "running"
    assert state(samples, "preferred_leg", "leg", volume="v") == "target"
    assert state(samples, "throttle_impact", "impact", volume="v") == "normal"
    assert state(samples, "leg_health", "health", volume="v", leg="target") == "degraded"
    assert value(samples, "leg_errors_total", volume="v", leg="target") == 3
    assert value(samples, "regions_ok", volume="v", leg="source") == value(samples, "regions", volume="v") == 8
    assert value(samples, "regions_ok", volume="v", leg="target") == value(samples, "regions_both_ok", volume="v") == 3
    assert value(samples, "copied_bytes_total", volume="v") == 5
    assert value(samples, "copy_rate_bytes_per_second", volume="v") == 10
    assert value(samples, "copy_eta_seconds", volume="v") == 4
    assert value(samples, "last_switch_pause_seconds", volume="v") == 0.0125
    assert value(samples, "throttle_rate_bytes_per_second", volume="v") == 1000
    assert value(samples, "windows_open", volume="v") == 2
    assert value(samples, "operations_total", volume="v", operation="read") == 6
    assert value(samples, "transferred_bytes_total", volume="v", operation="write") == 512
    assert value(samples, "holds_total", volume="v") == 1
    assert value(samples, "held_seconds_total", volume="v") == 0.25
    assert value(samples, "hold_longest_seconds", volume="v") == 0.25
    assert value(samples, "latency_longest_seconds", volume="v", operation="read") == 60
    assert value(samples, "requests_in_flight", volume="v") == 1
    assert value(samples, "clients", volume="v") == 2
    assert value(samples, "zones_logged", volume="v") == 7


def test_a_histogram_is_cumulative_and_has_its_sum_and_count() -> None:
    samples = Fixed(reading()).samples()
    labels = {"volume": "v", "operation": "read"}
    limits = [*(repr(limit_ns / 1e9) for limit_ns in LATENCY_LIMITS_NS), "+Inf"]
    counts = [value(samples, "latency_seconds_bucket", **labels, le=limit) for limit in limits]
    assert counts[0] == 1 and counts[1] == 2 and counts[-2] == 5 and counts[-1] == 6
    assert counts == sorted(counts, key=lambda count: -1 if count is None else count)
    assert value(samples, "latency_seconds_count", **labels) == 6
    assert value(samples, "latency_seconds_sum", **labels) == pytest.approx(60.502021)


@pytest.mark.parametrize("age_s", [None, STALE_S + 0.1], ids=["no member", "a member that is stopped"])
def test_numbers_that_nobody_tells_any_more_are_absent(age_s: float | None) -> None:
    samples = Fixed(reading(age_s=age_s)).samples()
    assert value(samples, "member_up", volume="v") == 0 and value(samples, "volume_led", volume="v") == 1
    names = {name for name, _ in samples}
    old = ("operations", "transferred", "latency_seconds", "holds", "held", "requests", "clients", "zones")
    assert not [name for name in names if name.startswith(tuple(f"shadowvol_{one}" for one in old))]
    assert state(samples, "phase", "phase", volume="v") == "copying"


def test_a_volume_without_a_leadership_is_there_and_nothing_more() -> None:
    samples = Fixed(VolumeReading("v", None, False)).samples()
    about_it = {name: found for (name, labels), found in samples.items() if ("volume", "v") in labels}
    assert about_it == {"shadowvol_volume_led": 0, "shadowvol_member_up": 0}


def test_no_limit_is_infinite_and_no_estimate_is_absent() -> None:
    one = reading()
    assert one.status is not None
    one.status["copy"]["eta_s"] = None
    samples = Fixed(one).samples()
    assert value(samples, "throttle_rate_bytes_per_second", volume="v") == math.inf
    assert value(samples, "copy_eta_seconds", volume="v") is None
    assert value(samples, "last_switch_pause_seconds", volume="v") is None


def test_names_units_and_help_are_as_prometheus_wants_them() -> None:
    families = Fixed(reading()).collect()
    for family in families:
        assert re.fullmatch(r"shadowvol_[a-z][a-z_]*", family.name), family.name
        assert bool(UNITLESS.fullmatch(family.name)) != bool(UNIT.search(family.name)), family.name
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample
    assert len({family.name for family in families}) == len(families)


def test_all_volumes_are_in_one_family_and_both_formats_can_be_read() -> None:
    """Prometheus asks for OpenMetrics first; its parser is the strict one."""
    fixed = Fixed(reading("a.b-c_d"), reading("v2", age_s=None), VolumeReading("v3", None, False))
    registry = CollectorRegistry()
    registry.register(fixed)
    strict = {family.name: family for family in parse_openmetrics(openmetrics.generate_latest(registry).decode())}
    assert {family.name for family in fixed.collect()} == set(strict)
    assert fixed.text().count("# TYPE shadowvol_phase ") == 1
    assert {sample.labels["volume"] for sample in strict["shadowvol_member_up"].samples} == {"a.b-c_d", "v2", "v3"}
