"""The leader's choices about windows that are not part of the protocol, and so not the simulator's business."""

from shadowvol.core.geometry import MIB
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.records import LegRecord, VolumeConfig, VolumeRecord, VolumeState
from shadowvol.core.regionmap import RegionMap
from shadowvol.core.windows import Limits
from shadowvol.core.windowsize import COPY_LONG_S, COPY_SHORT_S, fit_next_window, next_window_bytes

LIMITS = Limits()


def leader() -> LeaderEngine:
    leg = LegRecord("", "", 64 * MIB, "host")
    config = VolumeConfig("v", "block", 64 * MIB, MIB, leg, leg, 64 << 10, 16 * MIB)
    return LeaderEngine(VolumeRecord(config, VolumeState(), RegionMap(64)), "h1", limits=LIMITS)


def test_windows_grow_while_they_are_copied_soon_up_to_a_limit() -> None:
    engine, sizes = leader(), []
    for _ in range(4):
        fit_next_window(engine, COPY_SHORT_S / 2)
        sizes.append(engine.window_bytes // MIB)
    assert sizes == [128, 256, 256, 256] and LIMITS.window_bytes_max == 256 * MIB


def test_windows_shrink_to_the_first_size_where_the_copy_is_slow_or_throttled() -> None:
    engine = leader()
    engine.window_bytes = LIMITS.window_bytes_max
    fit_next_window(engine, (COPY_SHORT_S + COPY_LONG_S) / 2)
    assert engine.window_bytes == LIMITS.window_bytes_max
    for _ in range(4):
        fit_next_window(engine, COPY_LONG_S * 2)
    assert engine.window_bytes == LIMITS.window_bytes


def test_windows_are_of_some_seconds_where_the_copy_is_held_back() -> None:
    """Of some seconds of copying: few messages and flushes, and yet the map goes on."""
    engine = leader()
    sizes = {}
    for rate in (MIB // 2, 4 * MIB, 40 * MIB, 400 * MIB, None):
        engine.copy_rate = rate
        sizes[rate] = next_window_bytes(engine) // MIB
    assert sizes == {MIB // 2: 4, 4 * MIB: 16, 40 * MIB: 64, 400 * MIB: 64, None: 64}
