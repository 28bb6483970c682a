"""One byte per region, in long stretches: count, translate, compare and find runs, fast at millions of regions.

Maps are uniform over most of their length: nearly all is ok, or nearly nothing. To compare a stretch with its own first
byte is a memcmp, some twenty times as fast as to count or translate it, so that is tried first, stretch by stretch.
Both are done while writes are held (a switch) or with the member's lock in hand: at 4 Mi regions it is the difference
between one millisecond and ten. A map without order costs what it would cost without this.
"""

import re
from functools import lru_cache

from shadowvol.core.geometry import Run

STRETCH = 1 << 16


@lru_cache(maxsize=64)  # that many values a region's byte has at most: 4 MiB
def _uniform(value: int) -> bytes:
    return bytes([value]) * STRETCH


def _is_uniform(piece: bytearray) -> bool:
    return len(piece) == STRETCH and piece == _uniform(piece[0])


def count(values: bytearray, value: int, lo: int, hi: int) -> int:
    """How many of [lo, hi) are `value`."""
    found = 0
    for start in range(lo, hi, STRETCH):
        piece = values[start : min(start + STRETCH, hi)]
        if _is_uniform(piece):
            found += STRETCH if piece[0] == value else 0
        else:
            found += piece.count(value)
    return found


def translate(source: bytearray, lo: int, hi: int, table: bytes, target: bytearray) -> None:
    """target[lo:hi] = source[lo:hi].translate(table); they may be the same."""
    for start in range(lo, hi, STRETCH):
        end = min(start + STRETCH, hi)
        piece = source[start:end]
        target[start:end] = _uniform(table[piece[0]]) if _is_uniform(piece) else piece.translate(table)


def differs(before: bytearray, values: bytearray, lo: int, hi: int, table: bytes) -> bool:
    """Whether values[lo:hi], seen through `table`, is not what it was: `before`."""
    for start in range(lo, hi, STRETCH):
        end = min(start + STRETCH, hi)
        old, new = before[start - lo : end - lo], values[start:end]
        if old != new and old.translate(table) != new.translate(table):
            return True
    return False


def runs_equal(values: bytearray, value: int, lo: int, hi: int) -> list[Run]:
    """Maximal runs within [lo, hi) whose byte is exactly `value`."""
    return [found.span() for found in _run_of(value).finditer(values, lo, hi)]


@lru_cache(maxsize=64)
def _run_of(value: int) -> "re.Pattern[bytes]":
    return re.compile(re.escape(bytes([value])) + b"+", re.DOTALL)
