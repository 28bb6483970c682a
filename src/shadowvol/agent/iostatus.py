"""The `io` part of a status: what a member has told of its requests, as people and metrics read it. Pure.

All fields are always there. What the member told is shown only while it is fresh: a member that is not there, or has
not told for STALE_S, leaves null, never old numbers, and `age_s` says which of the two it is. The exceptions are
`*_longest_ms` outside of `recent`: they are history, kept by the agent since the volume came up here.
"""

import math
from typing import Any, Final

from shadowvol.nbd.counters import KINDS, NUMBERS

STALE_S: Final = 3.0  # a member tells at least once a second; above this it is stopped, or cut off
_LONGEST = ("hold_longest_s", "read_longest_s", "write_longest_s")
_RATES = ("iops", "bytes_per_s")
_TIMES = ("p50", "p99", "longest")


def is_fresh(age_s: float | None) -> bool:
    """`age_s`: since the member last told; None: there is none, or it has not told yet."""
    return age_s is not None and age_s <= STALE_S


def io_status(
    statistics: dict[str, Any], age_s: float | None, longest: dict[str, float] | None = None, **known: Any
) -> dict[str, Any]:
    """`statistics`: the member's last Stats frame. `longest`: since the volume is up here, in seconds; None where it is
    not up. `known`: what the agent itself knows (`windows_open`, `change`)."""
    told = statistics if is_fresh(age_s) else {}
    totals, engine, holds = told.get("totals", {}), told.get("engine", {}), told.get("holds", {})
    return {
        **{name: totals.get(name) for name in NUMBERS},
        "clients": told.get("clients"),
        "in_flight": told.get("in_flight"),
        "zones_logged": engine.get("zones_logged"),
        "holds": holds.get("count"),
        **{f"{name.removesuffix('_s')}_ms": None if longest is None else _ms(longest[name]) for name in _LONGEST},
        "windows_open": known.get("windows_open"),
        "change": known.get("change"),
        "age_s": None if age_s is None else math.ceil(10 * age_s) / 10,  # up: what is not fresh does not look so
        "recent": _recent(told.get("recent") or {}),
    }


def _recent(told: dict[str, Any]) -> dict[str, Any]:
    """Nothing is known where the interval is 0: the member has just started."""
    interval_s = told.get("interval_s") or None
    recent: dict[str, Any] = {"interval_s": None if interval_s is None else round(interval_s, 3)}
    for kind in KINDS:
        one = told[kind] if interval_s else {}
        recent[kind] = {
            **{name: None if one.get(name) is None else round(one[name], 1) for name in _RATES},
            **{f"{name}_ms": _ms(one.get(f"{name}_s")) for name in _TIMES},
        }
    hold = told["hold"] if interval_s else {}
    recent["hold"] = {"count": hold.get("count"), "longest_ms": _ms(hold.get("longest_s"))}
    return recent


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
