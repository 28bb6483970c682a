"""The map keeps its invariant, and each region's byte routes I/O as DESIGN 3 says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowvol.core.geometry import MIB, Geometry, merge_runs, region_bytes_for, runs_of
from shadowvol.core.legs import BOTH_OK, S_OK, SOURCE, T_OK, TARGET, Phase
from shadowvol.core.records import ActivityLog, decode_zones
from shadowvol.core.regionmap import CHUNK_REGIONS, RegionMap
from shadowvol.core.route import (
    FRESH,
    HELD,
    IN_WINDOW,
    MIXED,
    NOTE,
    READ_TARGET,
    SETTLED,
    SLOW,
    WHOLE_SLOW,
    WRITE_SHIFT,
    equal_runs,
    published,
    route,
)

CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 11), st.integers(1, 12)), max_size=30)


@given(CHANGES)
def test_the_map_agrees_with_a_dumb_model_and_never_loses_the_last_ok_leg(
    changes: list[tuple[bool, int, int, int]],
) -> None:
    region_map = RegionMap(12)
    model = [{SOURCE} for _ in range(12)]
    for on, leg, lo, length in changes:
        hi = min(12, lo + length)
        if on:
            region_map.set_ok(leg, [(lo, hi)])
        else:
            region_map.clear_ok(leg, [(lo, hi)])
        for region in range(lo, hi):
            if on:
                model[region].add(leg)
            elif len(model[region]) == 2:
                model[region].discard(leg)
    assert list(region_map.bits) == [sum(1 << leg for leg in legs) for legs in model]
    assert region_map.count_both() == sum(len(legs) == 2 for legs in model)
    assert region_map.count_ok(TARGET) == sum(TARGET in legs for legs in model)
    one = [region for region, legs in enumerate(model) if len(legs) == 1]
    assert region_map.next_one_legged(0) == (one[0] if one else -1)
    assert region_map.runs_equal(BOTH_OK, 0, 12) == runs_of([r for r, legs in enumerate(model) if len(legs) == 2])


def test_a_map_survives_its_records() -> None:
    region_map = RegionMap(CHUNK_REGIONS + 10)
    region_map.set_ok(TARGET, [(5, 9), (CHUNK_REGIONS - 1, CHUNK_REGIONS + 3)])
    assert region_map.chunks_of([(5, 9), (CHUNK_REGIONS - 1, CHUNK_REGIONS + 3)]) == {0, 1}
    chunks = [region_map.chunk(index) for index in range(region_map.chunk_count())]
    assert RegionMap.from_chunks(len(region_map), chunks).bits == region_map.bits
    with pytest.raises(ValueError, match="regions"):
        RegionMap.from_chunks(7, chunks)
    with pytest.raises(ValueError, match="cannot be read"):
        RegionMap.from_chunks(len(region_map), [b"junk"])


@pytest.mark.parametrize(
    ("own", "phase", "preferred", "read", "write"),
    [
        (S_OK, Phase.SETUP, SOURCE, SOURCE, S_OK),
        (S_OK, Phase.COPYING, SOURCE, SOURCE, S_OK),
        (S_OK, Phase.COPYING, TARGET, SOURCE, S_OK),  # early cutover: not there yet
        (S_OK | IN_WINDOW, Phase.SETUP, SOURCE, SOURCE, S_OK),  # after an abort, a window that is not dropped yet
        (S_OK | FRESH, Phase.SETUP, SOURCE, SOURCE, S_OK),
        (S_OK | IN_WINDOW, Phase.COPYING, SOURCE, SOURCE, BOTH_OK),
        (S_OK | IN_WINDOW | SETTLED, Phase.COPYING, TARGET, SOURCE, BOTH_OK),
        (S_OK | FRESH, Phase.COPYING, SOURCE, SOURCE, BOTH_OK),
        (BOTH_OK, Phase.COPYING, SOURCE, SOURCE, BOTH_OK),
        (BOTH_OK, Phase.COPYING, TARGET, TARGET, BOTH_OK),
        (T_OK, Phase.COPYING, SOURCE, TARGET, T_OK),
        (T_OK, Phase.COMMITTED, TARGET, TARGET, T_OK),
        (BOTH_OK, Phase.COMMITTED, TARGET, TARGET, T_OK),  # the source's bit only serves an undo
    ],
)
def test_where_an_io_goes(own: int, phase: Phase, preferred: int, read: int, write: int) -> None:
    byte = published(own, phase, preferred)
    assert (TARGET if byte & READ_TARGET else SOURCE) == read
    assert byte >> WRITE_SHIFT & BOTH_OK == write


def test_a_write_is_noted_in_open_windows_and_needs_the_engine_where_blocks_are_held_or_an_undo_must_be_told() -> None:
    assert published(S_OK | IN_WINDOW, Phase.COPYING, SOURCE) & (NOTE | SLOW | WHOLE_SLOW) == NOTE
    assert not published(S_OK | IN_WINDOW | SETTLED, Phase.COPYING, SOURCE) & (NOTE | SLOW | WHOLE_SLOW)
    assert published(S_OK | IN_WINDOW | SETTLED | HELD, Phase.COPYING, SOURCE) & SLOW
    assert published(BOTH_OK, Phase.COMMITTED, TARGET) & SLOW
    assert not published(BOTH_OK, Phase.COPYING, SOURCE) & SLOW
    assert not published(T_OK, Phase.COMMITTED, TARGET) & SLOW


def test_a_range_of_equal_regions_has_one_route_and_others_are_cut() -> None:
    table = bytearray([3, 3, 5, 5, 5, 3])
    assert route(table, 0, 2) == 3
    assert route(table, 1, 3) == MIXED
    assert equal_runs(table, 0, 6) == [(0, 2, 3), (2, 5, 5), (5, 6, 3)]


def test_region_size_grows_so_that_the_map_stays_small() -> None:
    assert region_bytes_for(1 << 30) == MIB
    assert region_bytes_for(4 << 40) == MIB
    assert region_bytes_for(64 << 40) == 16 * MIB


def test_geometry_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Geometry(1 << 20, 3 << 16)
    with pytest.raises(ValueError, match="divides"):
        Geometry(1 << 20, 1 << 12, 1 << 16, 1 << 24)
    with pytest.raises(ValueError, match="at least one byte"):
        Geometry(0, 1 << 20)


def test_a_short_last_region_counts_as_whole() -> None:
    geometry = Geometry.of(5 * MIB + 512, MIB)
    assert geometry.region_count == 6
    assert geometry.whole_regions(4 * MIB + 1, 5 * MIB + 512) == (5, 6)
    assert geometry.whole_regions(MIB + 1, 3 * MIB - 1) == (2, 2)
    assert geometry.region_extent(5, 6) == (5 * MIB, 5 * MIB + 512)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_merged_runs_hold_the_same_indexes(pairs: list[tuple[int, int]]) -> None:
    runs = [(min(pair), max(pair)) for pair in pairs]
    assert merge_runs(runs) == runs_of({index for lo, hi in runs for index in range(lo, hi)})


@given(st.sets(st.integers(0, 70000), max_size=40), st.sets(st.integers(0, 70000), max_size=10))
def test_an_activity_log_survives_its_records(zones: set[int], removed: set[int]) -> None:
    log = ActivityLog("v", "h", set())
    stored: dict[str, bytes] = {}
    for add, remove in ((runs_of(zones), []), ([], runs_of(removed))):
        if add or remove:
            stored.update(log.txn(add, remove, 1).puts)
    found: set[int] = set()
    for key, value in stored.items():
        found |= decode_zones(value, int(key.rsplit("/", 1)[1]))
    assert found == log.zones == zones - removed
