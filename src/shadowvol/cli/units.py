"""Sizes, rates and durations as people write them, in both directions."""

import math
import re
import time
from datetime import datetime
from fractions import Fraction

import click

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "PIB": 1 << 50}
RATE_BYTES_PER_S_MAX = 1 << 50
DEADLINE_S_MAX = 10 * 365 * 86400.0
_NUMBER = re.compile(r"(\d{1,20}(?:\.\d{1,12})?)\s*([A-Za-z]*)")
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """`4MiB`, `1.5GiB`, plain bytes. Raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write 4MiB, 1GiB, or bytes")
    size = Fraction(match.group(1)) * unit
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def parse_rate(text: str) -> int | None:
    """`200MiB/s`; `none`: no limit. Raises ValueError."""
    if text.strip().lower() == "none":
        return None
    try:
        rate = parse_size(text.strip().removesuffix("/s"))
    except ValueError:
        raise ValueError(f"{text!r} is not a rate; write 200MiB/s, or none") from None
    if rate <= 0:
        raise ValueError("a rate is above 0; shadowvol pause stops copying, none is no limit")
    if rate > RATE_BYTES_PER_S_MAX:
        raise ValueError("a rate is at most 1PiB/s; none is no limit")
    return rate


def parse_duration_s(text: str) -> float:
    """`30`, `30s`, `2min`. Raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    unit = _SECONDS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a duration; write seconds, or 30s, 2min")
    return float(match.group(1)) * unit


def parse_deadline_s(text: str, now_s: float) -> float | None:
    """`8h` from now, or a time by the local clock or with its zone: `2026-12-31T06:00`; `none`: no deadline.

    Seconds since 1970, as `now_s`. Raises ValueError, also for a time that is over.
    """
    if text.strip().lower() == "none":
        return None
    try:
        deadline_s = now_s + parse_duration_s(text)
    except ValueError:
        try:
            deadline_s = datetime.fromisoformat(text.strip()).timestamp()
        except ValueError:
            raise ValueError(f"{text!r} is not a time; write 8h, 2026-12-31T06:00, or none") from None
    if not now_s < deadline_s <= now_s + DEADLINE_S_MAX:
        raise ValueError(f"{text!r} is over already, or years away")
    return deadline_s


def format_bytes(size: float) -> str:
    """Three figures at most, for tables."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} PiB"


def format_eta(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class SizeType(click.ParamType):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RateType(click.ParamType):
    """Gives (rate,): click takes a bare None for "not given"."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None]:
        try:
            return (parse_rate(str(value)),)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DeadlineType(click.ParamType):
    """Gives (seconds since 1970,), or (None,)."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float | None]:
        try:
            return (parse_deadline_s(str(value), time.time()),)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DurationType(click.ParamType):
    name = "seconds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration_s(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, RATE, DURATION, DEADLINE = SizeType(), RateType(), DurationType(), DeadlineType()
CACHE = click.Choice(["host", "none"])
