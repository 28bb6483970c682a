"""The two legs of a volume as small integers, for the path of each I/O; and the phases."""

from enum import StrEnum
from typing import Final

SOURCE: Final = 0
TARGET: Final = 1
LEG_NAMES: Final = ("source", "target")

S_OK: Final = 1  # bit of the source in a region's byte; 1 << SOURCE
T_OK: Final = 2  # 1 << TARGET
BOTH_OK: Final = 3


def bit(leg: int) -> int:
    return 1 << leg


def other(leg: int) -> int:
    return 1 - leg


def leg_number(name: str) -> int:
    """0 or 1; ValueError for another name."""
    return LEG_NAMES.index(name)


class Phase(StrEnum):
    """Where the migration stands. `synced` is `copying` with both bits set everywhere: derived, never stored."""

    SETUP = "setup"
    COPYING = "copying"
    SYNCED = "synced"
    COMMITTED = "committed"
