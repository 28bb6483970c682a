"""Sizes, rates and durations as people write them, in both directions."""

import math
import re
from fractions import Fraction

import click

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "PIB": 1 << 50}
RATE_BYTES_PER_S_MAX = 1 << 50
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


class DurationType(click.ParamType):
    name = "seconds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration_s(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, RATE, DURATION = SizeType(), RateType(), DurationType()
