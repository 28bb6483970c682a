"""The `io` part of a status: what a member told, while it is fresh; and how people see it."""

from typing import Any

import pytest
from rich.console import Console

from shadowvol.agent.iostatus import STALE_S, io_status
from shadowvol.cli.iotable import io_table, is_quiet
from shadowvol.nbd.counters import Counters, Recent, Totals

LONGEST = {"read_longest_s": 0.5, "write_longest_s": 0.25, "hold_longest_s": 0.0}


def told(seconds: float) -> dict[str, Any]:
    """A member's frame after 1000 reads of 4 KiB in so many seconds; 0: it has just started."""
    counters, recent = Counters(), Recent()
    first = recent.note(10.0, Totals.of(counters), counters.take_longest())
    for _ in range(1000):
        counters.read_ended(4096, 0.002)
    counters.hold_ended(0.006)
    totals = Totals.of(counters)
    later = recent.note(10.0 + seconds, totals, counters.take_longest()) if seconds else first
    holds = {"count": totals.holds, "sum_s": totals.held_s}
    return {"totals": totals.numbers(), "recent": later, "holds": holds, "engine": {"zones_logged": 3}, "clients": 1}


def leaves(found: Any) -> list[Any]:
    return [leaf for value in found.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_what_a_member_told_is_shown_with_its_interval() -> None:
    io = io_status(told(2.0), 0.25, LONGEST, windows_open=1, change="sync")
    assert io["recent"] == {
        "interval_s": 2.0,
        "read": {"iops": 500, "bytes_per_s": 2048000, "p50_ms": 2.097, "p99_ms": 2.097, "longest_ms": 2.0},
        "write": {"iops": 0, "bytes_per_s": 0, "p50_ms": None, "p99_ms": None, "longest_ms": None},
        "hold": {"count": 1, "longest_ms": 6.0},
    }
    assert (io["reads"], io["read_bytes"], io["writes"], io["holds"], io["clients"]) == (1000, 4096000, 0, 1, 1)
    assert (io["zones_logged"], io["windows_open"], io["change"], io["age_s"]) == (3, 1, "sync", 0.3)
    assert (io["read_longest_ms"], io["write_longest_ms"], io["hold_longest_ms"]) == (500, 250, 0)


@pytest.mark.parametrize("age_s", [None, STALE_S + 0.1, 1000.0])
def test_old_numbers_are_not_shown(age_s: float | None) -> None:
    """Frames are kept by whoever asks; it is the age that decides."""
    io = io_status(told(2.0), age_s, LONGEST, windows_open=0)
    history = ("read_longest_ms", "write_longest_ms", "hold_longest_ms")
    known = {name: value for name, value in io.items() if value is not None and name not in history}
    assert set(known) == {"windows_open", "recent"} | ({"age_s"} if age_s else set())
    assert set(leaves(io["recent"])) == {None}


def test_a_member_that_has_just_started_has_totals_and_no_rates() -> None:
    io = io_status(told(0), 0.0, LONGEST)
    assert io["reads"] == 1000 and set(leaves(io["recent"])) == {None}


def test_the_fields_are_always_the_same() -> None:
    def names(found: Any) -> Any:
        return {name: names(value) if isinstance(value, dict) else None for name, value in found.items()}

    full = names(io_status(told(2.0), 0.0, LONGEST))
    assert full == names(io_status({}, None)) == names(io_status(told(0), 99.0))
    assert set(leaves(io_status({}, None))) == {None}


def shown(*volumes: tuple[str, dict[str, Any] | None, dict[str, Any]]) -> list[list[str]]:
    """The words of each row."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(io_table([{"name": name, "endpoint": endpoint, "io": io} for name, endpoint, io in volumes]))
    return [line.split() for line in capture.get().splitlines()[1:]]


def test_the_table_has_figures_where_there_are_some_and_dashes_elsewhere() -> None:
    is_up = {"nbd_uri": "x", "device": None}
    silent = io_status(told(2.0), STALE_S + 4, LONGEST)
    rows = shown(("a", is_up, io_status(told(2.0), 0.0, LONGEST)), ("b", is_up, silent), ("c", None, silent))
    assert rows == [
        ["a", "2.0", "s", "reads", "500", "1.95", "2.1", "2.1", "2"],
        ["writes", "0", "0", "-", "-", "-", "1", "6"],
        ["b", "-", "reads", "-", "-", "-", "-", "-"],
        ["writes", "-", "-", "-", "-", "-", "-", "-"],
    ]


def test_a_quiet_member_is_one_that_is_there() -> None:
    assert is_quiet({"io": io_status(told(2.0), STALE_S + 0.01, LONGEST)})
    assert not is_quiet({"io": io_status(told(2.0), 0.5, LONGEST)})
    assert not is_quiet({"io": io_status({}, None, LONGEST)})
