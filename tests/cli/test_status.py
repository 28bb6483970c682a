"""status_of: phase, counts and health from record and agent; and when waiting is hopeless."""

from dataclasses import replace
from typing import Any

import pytest

from shadowvol.agent.status import LegLive, LiveStatus, MemberLive, status_of
from shadowvol.cli.transitions import hopeless, is_reached
from shadowvol.core.geometry import MIB
from shadowvol.core.legs import SOURCE, TARGET, Phase
from shadowvol.core.records import LegRecord, VolumeConfig, VolumeRecord, VolumeState
from shadowvol.core.regionmap import RegionMap

REGIONS = 8
SIZE_BYTES = REGIONS * MIB - 512  # the last region is short


def record(bits: bytes = b"\1" * REGIONS, **state: Any) -> VolumeRecord:
    source, target = LegRecord("/a", "file:a", SIZE_BYTES), LegRecord("/b", "file:b", SIZE_BYTES)
    config = VolumeConfig("v", "block", SIZE_BYTES, MIB, source, target, 64 << 10, 16 * MIB)
    return VolumeRecord(config, VolumeState(**state), RegionMap(REGIONS, bits))


BOTH = b"\3" * REGIONS
HALF = b"\3" * 4 + b"\1" * 4
COPYING: dict[str, Any] = {"phase": Phase.COPYING, "up": True}


def test_copying_is_shown_as_synced_when_nothing_is_left() -> None:
    assert status_of(record(HALF, **COPYING), None)["phase"] == "copying"
    assert status_of(record(BOTH, **COPYING), None)["phase"] == "synced"
    assert status_of(record(BOTH, **COPYING, goal="abort"), None)["phase"] == "copying"
    assert status_of(record(BOTH, phase=Phase.COMMITTED), None)["phase"] == "committed"


def test_counts_and_bytes() -> None:
    half, both = status_of(record(HALF, **COPYING), None), status_of(record(BOTH, **COPYING), None)
    counts = [half[f"regions_{key}"] for key in ("total", "source_ok", "target_ok", "both_ok")]
    assert counts == [8, 8, 4, 4]
    assert half["fraction_both_ok"] == 0.5 and half["bytes_both_ok"] == 4 * MIB
    assert both["fraction_both_ok"] == 1 and both["bytes_both_ok"] == SIZE_BYTES


def test_after_commit_the_source_counts_only_with_keep_undo() -> None:
    gone = status_of(record(BOTH, phase=Phase.COMMITTED, preferred=TARGET), LiveStatus("h"))
    kept = status_of(record(BOTH, phase=Phase.COMMITTED, preferred=TARGET, keep_undo=True), LiveStatus("h"))
    assert (gone["regions_source_ok"], gone["legs"]["source"]["health"]) == (0, "released")
    assert (kept["regions_source_ok"], kept["legs"]["source"]["health"]) == (8, "ok")
    assert gone["legs"]["target"]["health"] == "ok"
    assert (gone["undo_available"], kept["undo_available"]) == (False, True)


@pytest.mark.parametrize(
    ("state", "available"),
    [
        ({}, False),
        ({**COPYING, "preferred": SOURCE}, False),
        ({**COPYING, "preferred": TARGET}, True),
        ({**COPYING, "preferred": TARGET, "goal": "undo"}, False),
    ],
)
def test_undo_is_available_after_a_cutover(state: dict[str, Any], available: bool) -> None:
    assert status_of(record(BOTH, **state), None)["undo_available"] is available


def test_what_the_agent_knows_is_shown() -> None:
    live = LiveStatus(
        "h1",
        copy_state="backoff",
        copy_reason="the target fails",
        rate_bytes_per_s=5.0,
        eta_s=7.0,
        legs=(LegLive(), LegLive("failed", 3, "EIO", "2024-01-01T00:00:00Z")),
        nbd_uri="nbd+unix:///v?socket=s",
        agent_pid=1,
        member_pid=2,
        transfer_pid=3,
        leader="h1",
        members=(MemberLive("h1", "live", 4, True, False),),
        transition={"verb": "cutover", "id": 9, "state": "preparing", "waiting_for": ["h1"]},
        io={"reads": 1},
    )
    found = status_of(record(HALF, **COPYING, bytes_copied=6, last_switch_pause_ms=1.5), live)
    assert found["copy"]["state"] == "backoff" and found["copy"]["bytes_copied"] == 6 and found["copy"]["eta_s"] == 7
    leg = {"uri": "/b", "cache": "host", "health": "failed", "errors": 3, "last_error": "EIO"}
    assert found["legs"]["target"] == {**leg, "since": "2024-01-01T00:00:00Z"}
    assert found["endpoint"] == {"nbd_uri": "nbd+unix:///v?socket=s", "device": None}
    assert found["processes"] == {"agent": 1, "member": 2, "transfer": 3}
    reach = {"source": "reachable", "target": "unreachable"}
    assert found["members"] == [{"host": "h1", "state": "live", "incarnation": 4, "legs": reach}]
    assert found["transition"] == live.transition
    assert (found["leader"], found["last_switch_pause_ms"], found["io"]) == ("h1", 1.5, {"reads": 1})


def test_with_and_without_an_agent_the_fields_are_the_same() -> None:
    offline = status_of(record(HALF, **COPYING), None, host="h1")
    online = status_of(record(HALF, **COPYING), LiveStatus("h1"))
    assert offline.keys() == online.keys()
    assert offline["host"] == online["host"] == "h1"


def test_a_recorded_transition_is_shown_without_an_agent() -> None:
    found = replace(record(HALF, **COPYING), transition={"verb": "commit", "id": 1, "epoch": 2, "state": "committed"})
    shown = {"verb": "commit", "id": 1, "state": "committed", "waiting_for": []}
    assert status_of(found, None)["transition"] == shown


@pytest.mark.parametrize(
    ("state", "bits", "wanted", "reason"),
    [
        ({}, HALF, "synced", "shadowvol start v"),
        ({}, HALF, "copying", "shadowvol start v"),
        ({}, HALF, "committed", "shadowvol commit v"),
        (COPYING, HALF, "synced", None),
        (COPYING, HALF, "setup", "shadowvol abort v"),
        (COPYING, HALF, "committed", "shadowvol commit v"),
        (COPYING, BOTH, "setup", "shadowvol abort v"),
        ({**COPYING, "paused": True}, HALF, "synced", "shadowvol resume v"),
        ({**COPYING, "up": False}, HALF, "synced", "shadowvol up v"),
        ({**COPYING, "goal": "abort"}, HALF, "setup", None),
        ({**COPYING, "goal": "abort"}, HALF, "synced", "abort is under way"),
        ({**COPYING, "goal": "undo"}, HALF, "synced", None),
        ({**COPYING, "goal": "undo"}, HALF, "setup", "undo is under way"),
        ({"phase": Phase.COMMITTED}, BOTH, "synced", "it is committed"),
    ],
)
def test_waiting_is_hopeless_only_when_an_operator_is_needed(
    state: dict[str, Any], bits: bytes, wanted: str, reason: str | None
) -> None:
    found = status_of(record(bits, **state), LiveStatus("h1"))
    assert not is_reached(found, wanted)
    why = hopeless(found, wanted)
    assert why is None if reason is None else why is not None and reason in why


def test_a_failed_copy_is_hopeless_and_a_running_transition_is_not() -> None:
    failed = LiveStatus("h", copy_state="failed", copy_reason="no space")
    assert "no space" in (hopeless(status_of(record(HALF, **COPYING), failed), "synced") or "")
    busy = LiveStatus("h", transition={"verb": "start", "id": 1, "state": "preparing", "waiting_for": []})
    assert hopeless(status_of(record(), busy), "synced") is None


def test_synced_counts_as_copying() -> None:
    assert is_reached(status_of(record(BOTH, **COPYING), None), "copying")
