"""Readings as Prometheus metrics. Pure: no clock, no I/O; a reading makes the same families always.

What is not known (no agent's leadership, no member that tells, no estimate) has no sample: absence is what Prometheus
has for that, and an old number would be taken for a new one. Counters of a member start again with the next one, as
Prometheus expects of counters. Free text, such as why copying backs off, is no label: each would be a series.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from shadowvol import __version__
from shadowvol.agent.metrics.reading import AgentReading, VolumeReading
from shadowvol.agent.status import CopyState, Health
from shadowvol.core.legs import LEG_NAMES
from shadowvol.nbd.counters import KINDS, counts_below

PHASES = ("setup", "copying", "synced", "committed")
IMPACTS = ("low", "normal", "max")
# Ends of buckets: powers of two of nanoseconds, 16 us to 17 s, at which the member's own buckets end as well.
LATENCY_LIMITS_NS = tuple(1 << power for power in range(14, 35))
_LATENCY_LIMITS = (*(repr(limit_ns / 1e9) for limit_ns in LATENCY_LIMITS_NS), "+Inf")


class _Families:
    """Families in the order of their first sample. A sample whose value is None is left out."""

    def __init__(self) -> None:
        self.by_name: dict[str, Metric] = {}

    def gauge(self, name: str, text: str, value: float | None, **labels: str) -> None:
        if value is not None:
            family = self.by_name.setdefault(name, GaugeMetricFamily(f"shadowvol_{name}", text, labels=list(labels)))
            family.add_sample(family.name, labels, float(value))

    def states(self, name: str, text: str, states: Sequence[str], now: str | None, **labels: str) -> None:
        """A gauge per state, 1 for the one that it is; `name` without its subject is the label."""
        for state in states if now is not None else ():
            self.gauge(name, text, state == now, **labels, **{name.rpartition("_")[2]: state})

    def counter(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """`_total` is appended."""
        if value is not None:
            family = self.by_name.setdefault(name, CounterMetricFamily(f"shadowvol_{name}", text, labels=list(labels)))
            family.add_sample(f"{family.name}_total", labels, float(value))

    def histogram(self, name: str, text: str, pairs: Any, sum_s: float, **labels: str) -> None:
        """`pairs`: (bucket, count) as the member tells them."""
        family = self.by_name.get(name)
        if family is None:
            family = self.by_name[name] = HistogramMetricFamily(f"shadowvol_{name}", text, labels=list(labels))
        assert isinstance(family, HistogramMetricFamily)
        counts = [*counts_below(pairs, LATENCY_LIMITS_NS), sum(count for _, count in pairs)]
        family.add_metric(list(labels.values()), list(zip(_LATENCY_LIMITS, counts, strict=True)), sum_s)


def families_of(reading: AgentReading) -> Iterable[Metric]:
    """Every family that has a sample."""
    families = _Families()
    families.gauge("agent_info", "The agent that answers.", 1, host=reading.host, version=__version__)
    families.gauge("damaged_records", "Volumes whose record does not check out.", reading.damaged_records)
    for volume in reading.volumes:
        _add_volume(families, volume)
        if volume.status is not None:
            _add_state(families, volume.status)
            _add_copy(families, volume.status)
            _add_legs(families, volume.status)
            _add_requests(families, volume, volume.status["io"])
    return families.by_name.values()


def _add_volume(families: _Families, volume: VolumeReading) -> None:
    name = volume.name
    led = volume.status is not None
    families.gauge("volume_led", "1: this agent leads the volume; 0: it tries to.", led, volume=name)
    families.gauge("member_up", "1: a member serves the volume's I/O, and tells.", volume.member_up, volume=name)


def _add_state(families: _Families, status: dict[str, Any]) -> None:
    name, pause_ms = status["name"], status["last_switch_pause_ms"]
    families.states("phase", "1 for the phase that the volume is in.", PHASES, status["phase"], volume=name)
    text = "1 for the leg that reads come from where it is ok."
    for leg in LEG_NAMES:
        families.gauge("preferred_leg", text, leg == status["preferred"], volume=name, leg=leg)
    families.gauge("size_bytes", "Size of the volume.", status["size_bytes"], volume=name)
    families.gauge("region_size_bytes", "Size of a region.", status["region_bytes"], volume=name)
    families.gauge("regions", "Regions of the volume.", status["regions_total"], volume=name)
    text = "Regions in which the leg holds everything that was acknowledged."
    for leg in LEG_NAMES:
        families.gauge("regions_ok", text, status[f"regions_{leg}_ok"], volume=name, leg=leg)
    families.gauge("regions_both_ok", "Regions that are ok on both legs.", status["regions_both_ok"], volume=name)
    families.gauge("undo_available", "1: undo would be done.", status["undo_available"], volume=name)
    text = "How long writes were held at the last cutover or undo."
    families.gauge("last_switch_pause_seconds", text, None if pause_ms is None else pause_ms / 1000, volume=name)


def _add_copy(families: _Families, status: dict[str, Any]) -> None:
    name, copy = status["name"], status["copy"]
    throttle = copy["throttle"]
    text = "1 for what copying does."
    families.states("copy_state", text, get_args(CopyState), copy["state"], volume=name)
    families.gauge("copy_paused", "1: the operator has paused copying.", status["paused"], volume=name)
    text = "What the copier reads, over the last seconds."
    families.gauge("copy_rate_bytes_per_second", text, copy["rate_bytes_per_s"], volume=name)
    families.gauge("copy_eta_seconds", "Estimate until all is on both legs.", copy["eta_s"], volume=name)
    families.counter("copied_bytes", "Copied since the last start.", copy["bytes_copied"], volume=name)
    text = "Copied again since the last start: written to meanwhile."
    families.counter("recopied_bytes", text, copy["bytes_recopied"], volume=name)
    families.gauge("windows_open", "Windows of the copy that are open.", status["io"]["windows_open"], volume=name)
    limit = math.inf if throttle["rate_bytes_per_s"] is None else throttle["rate_bytes_per_s"]
    families.gauge("throttle_rate_bytes_per_second", "Limit of copying; +Inf: none.", limit, volume=name)
    allowed = math.inf if throttle["allowed_bytes_per_s"] is None else throttle["allowed_bytes_per_s"]
    text = "What copying may do now, beside the application; +Inf: full speed."
    families.gauge("throttle_allowed_bytes_per_second", text, allowed, volume=name)
    families.states("throttle_impact", "1 for the impact chosen.", IMPACTS, throttle["impact"], volume=name)


def _add_legs(families: _Families, status: dict[str, Any]) -> None:
    name = status["name"]
    for leg in LEG_NAMES:
        seen = status["legs"][leg]
        families.states("leg_health", "1 for the leg's health.", get_args(Health), seen["health"], volume=name, leg=leg)
        text = "Faults of the leg that this leadership saw."
        families.counter("leg_errors", text, seen["errors"], volume=name, leg=leg)


def _add_requests(families: _Families, volume: VolumeReading, io: dict[str, Any]) -> None:
    """Of the application, whoever executed them."""
    name = volume.name
    for kind in (*KINDS, "flush"):
        value = io["flushes" if kind == "flush" else f"{kind}s"]
        text = "Requests that have ended since the member's start; write: trims and zeroes included."
        families.counter("operations", text, value, volume=name, operation=kind)
    for kind in KINDS:
        text = "Bytes of these requests."
        families.counter("transferred_bytes", text, io[f"{kind}_bytes"], volume=name, operation=kind)
    for kind, told in (volume.latencies or {}).items():
        text = "How long requests took in the member."
        families.histogram("latency_seconds", text, told["buckets"], told["sum_s"], volume=name, operation=kind)
    for kind in KINDS:
        text = "The longest request since the volume is up here."
        longest_s = _seconds(io[f"{kind}_longest_ms"])
        families.gauge("latency_longest_seconds", text, longest_s, volume=name, operation=kind)
    holds = volume.holds or {}
    families.counter("holds", "Requests that waited for a hold.", holds.get("count"), volume=name)
    families.counter("held_seconds", "How long they waited together.", holds.get("sum_s"), volume=name)
    text = "The longest wait for a hold since the volume is up here."
    families.gauge("hold_longest_seconds", text, _seconds(io["hold_longest_ms"]), volume=name)
    families.gauge("requests_in_flight", "Requests that have not ended.", io["in_flight"], volume=name)
    families.gauge("clients", "Connections of clients.", io["clients"], volume=name)
    families.gauge("zones_logged", "Zones in the activity log.", io["zones_logged"], volume=name)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
