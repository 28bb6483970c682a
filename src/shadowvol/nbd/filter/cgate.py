"""The gate (nbd/gate.py) to the C filter: what the engine publishes, in the memory of filter.c.

filter.c is loaded by nbdkit in front of the plugin; its functions are found in this process by ctypes. They are called
with the GIL kept (PyDLL): each is some microseconds of plain memory under the filter's own mutex, and nobody who has
that mutex wants the GIL.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import replace

from shadowvol.core.geometry import Run, merge_runs
from shadowvol.core.inflight import READ, WRITE, Ticket
from shadowvol.core.latency import BUCKET_COUNT
from shadowvol.core.legs import BOTH_OK
from shadowvol.core.member import MemberEngine
from shadowvol.core.messages import Freeze
from shadowvol.core.route import SLOW
from shadowvol.endpoints.base import Endpoint
from shadowvol.endpoints.local import LocalEndpoint
from shadowvol.nbd.counters import READS, WRITES, Counters, Totals
from shadowvol.nbd.gate import NOT_BEGUN, Gate, NoExecutor

INTERFACE = 3  # of filter.c; it has the same constant
OPS_MAX = 1024  # in flight in the filter at once, as in filter.c
NOTES_MAX = 16384  # writes to open windows that it notes between two collects, likewise
READ_SLOW = 64  # the filter's own bit of a region's byte: reads belong to the engine

_CLAIMED, _TAKEN, _DONE, _LEGS_SHIFT, _OP_SHIFT = 1, 2, 4, 3, 8  # what shadowvol_claim() answers


class _Taken(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("op", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
        ("legs", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 2),
    ]


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class _FilterCounters(ctypes.Structure):
    """By kind, as `struct counters` in filter.c."""

    _fields_ = [
        ("ended", ctypes.c_uint64 * 2),
        ("bytes", ctypes.c_uint64 * 2),
        ("longest_ns", ctypes.c_uint64 * 2),
        ("handed_over", ctypes.c_uint64 * 2),
        ("let_through", ctypes.c_uint64 * 2),
        ("took_ns", ctypes.c_uint64 * 2),
        ("in_flight", ctypes.c_uint64),
        ("buckets", ctypes.c_uint64 * BUCKET_COUNT * 2),
    ]


def gate_for(engine: MemberEngine, no_filter: str | None) -> Gate:
    """The filter's gate if it is in this process; `no_filter`: why it was not loaded, as far as the starter knew."""
    library = ctypes.PyDLL(None)
    try:
        interface = library.shadowvol_interface()
    except AttributeError:
        return NoExecutor(engine, no_filter or "nbdkit was started without it")
    if interface != INTERFACE:
        return NoExecutor(engine, f"it was built from another source (interface {interface}, not {INTERFACE})")
    _declare(library)
    geometry = engine.geometry
    if library.shadowvol_start(geometry.size_bytes, geometry.region_bytes, geometry.zone_bytes) != 0:
        return NoExecutor(engine, "no memory for its tables")
    return FilterGate(engine, library)


def _declare(library: ctypes.PyDLL) -> None:
    """The types of filter.c's functions."""
    number, size, pointer = ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p
    types: dict[str, tuple[type | None, list[type]]] = {
        "start": (number, [size, size, size]),
        "publish": (None, [size, pointer, size]),
        "hold": (None, [number, number, number]),
        "log_zones": (None, [pointer, ctypes.c_uint32, number]),
        "collect": (ctypes.c_uint32, [pointer]),
        "collect_notes": (ctypes.c_uint32, [pointer]),
        "take": (ctypes.c_uint32, [size, size, number, number, pointer]),
        "claim": (ctypes.c_uint32, []),
        "begun_ns": (ctypes.c_int64, []),
        "align": (None, [size]),
        "open_leg": (None, [number, number, number, ctypes.c_uint32, size, number]),
        "close_leg": (number, [number]),
        "counters": (None, [pointer, number]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, f"shadowvol_{name}")
        function.restype, function.argtypes = result, arguments


class FilterGate:
    """Implements Gate. Made by gate_for()."""

    def __init__(self, engine: MemberEngine, library: ctypes.PyDLL) -> None:
        self.why_not: str | None = None
        self.noted = 0
        self._engine = engine
        self._library = library
        self._freeze: Freeze | None = None  # as the filter has it
        self._preferred = engine.preferred
        self._tickets: dict[int, Ticket] = {}  # by op of the filter: taken, and not claimed yet
        self._taken = (_Taken * OPS_MAX)()
        self._zones = (ctypes.c_uint32 * engine.geometry.zone_count)()
        self._notes = (_Range * NOTES_MAX)()
        self._counters = _FilterCounters()
        engine.changed = []
        engine.activity.entering = []
        engine.inflight.gather = self.take

    # ------------------------------------------------------------------ what is decided

    def publish(self) -> None:
        self.log_zones(self._engine.activity.entering or (), True)
        self._engine.activity.entering = []
        self._publish_table()

    def _publish_table(self) -> None:
        engine, before, after = self._engine, self._freeze, self._engine.freeze
        changed = engine.changed
        if not changed and after is before and engine.preferred == self._preferred:
            return
        engine.changed = []
        if not engine.joined:  # the state will come as a whole
            return
        runs = list(changed or [])
        for freeze in (before, after):
            if freeze is not None and freeze.runs is not None:
                runs += freeze.runs
        self._hold(before, after)  # holds begin before the table changes, and end after it
        for run in merge_runs(runs):
            self._library.shadowvol_publish(run[0], self._bytes_of(run, after), run[1] - run[0])
        self._hold(after)
        self._freeze, self._preferred = after, engine.preferred

    def _hold(self, *freezes: Freeze | None) -> None:
        """What is held everywhere."""
        everywhere = [freeze for freeze in freezes if freeze is not None and freeze.runs is None]
        reads, writes = any(freeze.reads for freeze in everywhere), any(freeze.writes for freeze in everywhere)
        self._library.shadowvol_hold(self._engine.preferred, reads, writes)

    def _bytes_of(self, run: Run, freeze: Freeze | None) -> "ctypes.Array[ctypes.c_char]":
        """The engine's bytes, and what is held there. The table itself where nothing is: it may be of megabytes."""
        lo, hi = run
        if freeze is None or freeze.runs is None:
            return (ctypes.c_char * (hi - lo)).from_buffer(self._engine.table, lo)
        bytes_ = self._engine.table[lo:hi]
        held = (SLOW if freeze.writes else 0) | (READ_SLOW if freeze.reads else 0)
        table = bytes(byte | held for byte in range(256))
        for first, last in freeze.runs:
            first, last = max(first, lo) - lo, min(last, hi) - lo
            if first < last:
                bytes_[first:last] = bytes_[first:last].translate(table)
        return (ctypes.c_char * (hi - lo)).from_buffer(bytes_)

    def log_zones(self, zones: Iterable[int], logged: bool) -> None:
        some = list(zones)
        if some:
            array = (ctypes.c_uint32 * len(some))(*some)
            self._library.shadowvol_log_zones(array, len(some), logged)

    # ------------------------------------------------------------------ what is in flight

    def take(self, extents: list[Run] | None, reads: bool, writes: bool) -> None:
        """InFlight.gather: the engine is about to look what is in flight there."""
        self.publish()
        if not reads and not writes:
            return
        for start, end in extents if extents is not None else [(0, self._engine.geometry.size_bytes)]:
            count = self._library.shadowvol_take(start, end, reads, writes, ctypes.byref(self._taken))
            for op in self._taken[:count]:
                kind = WRITE if op.is_write else READ
                self._tickets[op.op] = self._engine.adopt(kind, op.start, op.end, op.legs)

    def claim(self, kind: int, start: int, end: int) -> tuple[Ticket | None, bool]:
        code = self._library.shadowvol_claim()
        if not code:
            return NOT_BEGUN
        if code & _TAKEN:
            ticket = self._tickets.pop(code >> _OP_SHIFT)
        else:
            ticket = self._engine.adopt(kind, start, end, code >> _LEGS_SHIFT & BOTH_OK)
        return ticket, bool(code & _DONE)

    def collect(self, now_s: float) -> None:
        count = self._library.shadowvol_collect(ctypes.byref(self._zones))
        if count:
            written = [(code >> 2, code & BOTH_OK) for code in self._zones[:count]]
            self._engine.activity.written_elsewhere(written, now_s)
        self.collect_notes()

    def collect_notes(self) -> None:
        """Of the writes to open windows that have begun since the last time. Part of collect()."""
        count = self._library.shadowvol_collect_notes(ctypes.byref(self._notes))
        self.noted += count
        for note in self._notes[:count]:
            self._engine.touch(note.start, note.end)

    def begun_s(self, now_s: float) -> float:
        return float(self._library.shadowvol_begun_ns() / 1e9)

    # ------------------------------------------------------------------ legs

    def leg_opened(self, leg: int, endpoint: Endpoint) -> None:
        if isinstance(endpoint, LocalEndpoint):
            medium = endpoint.medium()
            self._library.shadowvol_open_leg(
                leg,
                medium.fd,
                medium.direct_fd,
                medium.align,
                medium.direct_end,
                medium.punches,
            )

    def leg_closes(self, leg: int) -> bool:
        return bool(self._library.shadowvol_close_leg(leg))

    def align(self, align_bytes: int) -> None:
        self._library.shadowvol_align(align_bytes)

    # ------------------------------------------------------------------ statistics

    def in_flight(self) -> int:
        return int(self._count(False).in_flight)

    def totals(self, counters: Counters) -> Totals:
        ours = Totals.of(counters)
        theirs = self._count(False)
        buckets = [
            [mine + filters for mine, filters in zip(ours.buckets[kind], theirs.buckets[kind], strict=True)]
            for kind in (READS, WRITES)
        ]
        return replace(
            ours,
            reads=ours.reads + theirs.ended[READS],
            read_bytes=ours.read_bytes + theirs.bytes[READS],
            writes=ours.writes + theirs.ended[WRITES],
            write_bytes=ours.write_bytes + theirs.bytes[WRITES],
            buckets=(buckets[READS], buckets[WRITES]),
            took_ns=(ours.took_ns[READS] + theirs.took_ns[READS], ours.took_ns[WRITES] + theirs.took_ns[WRITES]),
        )

    def take_longest(self, counters: Counters) -> dict[str, float]:
        longest = counters.take_longest()
        theirs = self._count(True)
        for kind, name in ((READS, "read_longest_s"), (WRITES, "write_longest_s")):
            longest[name] = max(longest[name], theirs.longest_ns[kind] / 1e9)
        return longest

    def statistics(self) -> dict[str, int] | None:
        counted = self._count(False)
        names = ("ended", "handed_over", "let_through")
        return {
            f"{kind}s_{name}": getattr(counted, name)[number]
            for name in names
            for number, kind in ((READS, "read"), (WRITES, "write"))
        }

    def _count(self, reset_longest: bool) -> _FilterCounters:
        self._library.shadowvol_counters(ctypes.byref(self._counters), reset_longest)
        return self._counters
