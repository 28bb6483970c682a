"""The second table of `status`: how the application's I/O went in the last seconds. "-" is what is not known."""

from typing import Any

from rich.table import Table

from shadowvol.agent.iostatus import is_fresh

_MIB = 1 << 20


def io_table(found: list[dict[str, Any]]) -> Table:
    """A row for reads and one for writes of each volume that is served; its holds are with the writes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "LAST", "I/O"):
        table.add_column(heading, no_wrap=True)
    for heading in ("IOPS", "MiB/s", "P50 ms", "P99 ms", "LONGEST ms", "HOLDS", "LONGEST HOLD ms"):
        table.add_column(heading, justify="right")  # headings are folded on a narrow terminal
    for one in found:
        if one["endpoint"] is None:
            continue
        recent = one["io"]["recent"]
        for kind in ("read", "write"):
            table.add_row(*_row(one["name"], recent, kind))
    return table


def _row(name: str, recent: dict[str, Any], kind: str) -> list[str]:
    one, hold, interval_s = recent[kind], recent["hold"], recent["interval_s"]
    moved = one["bytes_per_s"]
    is_first = kind == "read"
    return [
        name if is_first else "",
        ("-" if interval_s is None else f"{interval_s:.1f} s") if is_first else "",
        f"{kind}s",
        _figure(one["iops"]),
        _figure(None if moved is None else moved / _MIB),
        *(_figure(one[f"{time}_ms"]) for time in ("p50", "p99", "longest")),
        "" if is_first else "-" if hold["count"] is None else str(hold["count"]),
        "" if is_first else _figure(hold["longest_ms"]),
    ]


def is_quiet(one: dict[str, Any]) -> bool:
    """There is a member, and it does not tell."""
    age_s = one["io"]["age_s"]
    return age_s is not None and not is_fresh(age_s)


def _figure(value: float | None) -> str:
    """Three figures; rates above that in full."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
