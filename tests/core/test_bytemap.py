"""Operations on long maps give what plain bytes give, across the borders of the stretches that they work in."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowvol.core import bytemap
from shadowvol.core.bytemap import STRETCH
from shadowvol.core.geometry import runs_of

LENGTH = 3 * STRETCH + 100
VALUES = (0, 1, 2, 3, 10, 92)  # 10 and 92: a newline and a backslash mean something to a search
TABLE = bytes(value ^ 1 for value in range(256))
BORDERS = st.one_of(
    st.integers(0, LENGTH),
    st.builds(lambda stretch, by: stretch * STRETCH + by, st.integers(0, 3), st.integers(0, 2)),
)


@st.composite
def maps(draw: st.DrawFn) -> bytearray:
    """Mostly uniform, as real ones are."""
    values = bytearray([draw(st.sampled_from(VALUES))]) * LENGTH
    for _ in range(draw(st.integers(0, 6))):
        lo = draw(BORDERS)
        hi = min(LENGTH, lo + draw(st.sampled_from((1, 7, STRETCH, 2 * STRETCH))))
        values[lo:hi] = bytes([draw(st.sampled_from(VALUES))]) * (hi - lo)
    return values


@settings(max_examples=150, deadline=None)
@given(maps(), maps(), BORDERS, BORDERS, st.sampled_from(VALUES))
def test_long_maps_are_treated_as_plain_bytes_would_be(
    values: bytearray, other: bytearray, one: int, two: int, value: int
) -> None:
    lo, hi = min(one, two), max(one, two)
    assert bytemap.count(values, value, lo, hi) == values.count(value, lo, hi)
    plain = bytes(values)
    target = bytearray(LENGTH)
    bytemap.translate(values, lo, hi, TABLE, target)
    assert target == bytes(lo) + plain[lo:hi].translate(TABLE) + bytes(LENGTH - hi)
    bytemap.translate(values, lo, hi, TABLE, values)
    assert values == plain[:lo] + plain[lo:hi].translate(TABLE) + plain[hi:], "in its own place"
    found = bytemap.runs_equal(values, value, lo, hi)
    assert found == runs_of([index for index in range(lo, hi) if values[index] == value])
    one_bit = bytes(byte & 1 for byte in range(256))
    before = other[lo:hi]
    seen = [before.translate(one_bit), values[lo:hi].translate(one_bit)]
    assert bytemap.differs(before, values, lo, hi, one_bit) == (seen[0] != seen[1])


@pytest.mark.parametrize("pattern", [b"\x03" * 64, b"\x01\x03" * 32], ids=["uniform", "without order"])
def test_a_map_of_four_million_regions_is_searched_in_one_pass(pattern: bytes) -> None:
    """What copies the rest of the map for each of its runs needs hours for the second of these."""
    values = bytearray(pattern * (1 << 16))
    begun_s = time.process_time()
    runs = bytemap.runs_equal(values, 3, 0, len(values))
    assert len(runs) == (1 if pattern[0] == 3 else 1 << 21)
    assert sum(hi - lo for lo, hi in runs) == bytemap.count(values, 3, 0, len(values)) == values.count(3)
    assert time.process_time() - begun_s < 30  # about one
