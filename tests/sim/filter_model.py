"""A model of the C filter (src/shadowvol/nbd/filter/filter.c), for the simulator: what it does, not how fast.

The real gate (nbd/filter/cgate.py) takes it for its library: the `shadowvol_*` methods are the functions at the end of
filter.c, with arguments as ctypes hands them over. The simulated clients are nbdkit's threads (tests/sim/filter_io.py).

Whatever the C does with its mutex is one method here, and nothing comes between its lines. A thread that is about to
lock has *arrived*: it goes on a little later, or before any of the gate's calls, as the seed has it. So the filter
moves on between two calls of the gate, as it does beside the data path's lock, of which it knows nothing.

Not played: legs that are not open (they always are), the limit of operations in flight, trims, counters.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shadowvol.core.geometry import Geometry
from shadowvol.core.legs import BOTH_OK
from shadowvol.core.route import NOTE, READ_TARGET, SLOW, WHOLE_SLOW, WRITE_SHIFT
from shadowvol.nbd.filter.cgate import READ_SLOW

OVERTAKES = 0.5  # probability that a thread which has arrived locks before the gate's call does
_READ_BITS = READ_TARGET | READ_SLOW
_WRITE_BITS = BOTH_OK << WRITE_SHIFT | SLOW | WHOLE_SLOW | NOTE

Step = Callable[[], None]


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    LET_THROUGH = "let through"  # a write that is the data path's


@dataclass(eq=False)
class Op:
    """As `struct op`. `legs`: bits; `order`: the legs of a write as they are written, as it was when it began."""

    number: int
    kind: Kind
    legs: int
    start: int
    end: int
    first: int
    last: int
    order: tuple[int, int]
    noted: bool = False  # its range is
    taken: bool = False
    done: bool = False  # handed over, and nothing is left to do


class FilterModel:
    """`later` calls what it is given after a short while, if the member is alive then."""

    def __init__(
        self, geometry: Geometry, rng: random.Random, later: Callable[[Step], None], omit: frozenset[str]
    ) -> None:
        self._geometry = geometry
        self._rng = rng
        self._later = later
        self._omit = omit
        self._table = bytearray([SLOW | READ_SLOW]) * geometry.region_count
        self._logged = [False] * geometry.zone_count
        self._dirty: dict[int, int] = {}  # zone -> legs
        self._notes: list[tuple[int, int]] = []
        self._ops: dict[int, Op] = {}
        self._preferred = 0
        self._hold_reads = self._hold_writes = False
        self._align = 1
        self._handing: Op | None = None
        self._arrived: list[Step] = []  # threads about to lock
        self._waiting: list[Step] = []  # writes that wait for others to leave

    # ------------------------------------------------------------ threads

    def arrive(self, step: Step) -> None:
        """A thread wants the lock: it gets it soon, or before one of the gate's calls."""
        self._arrived.append(step)
        self._later(lambda: self._lock(step))

    def _lock(self, step: Step) -> None:
        if step in self._arrived:
            self._arrived.remove(step)
            step()

    def _let_others_lock(self) -> None:
        """The gate is about to lock."""
        for step in list(self._arrived):
            if self._rng.random() < OVERTAKES:
                self._lock(step)

    def wait(self, step: Step) -> None:
        """Until some write leaves."""
        self._waiting.append(step)

    @property
    def busy(self) -> bool:
        return bool(self._ops or self._arrived or self._waiting)

    # ------------------------------------------------------------ requests: each under the lock

    def begin_read(self, start: int, end: int) -> Op | None:
        """None: the data path's."""
        legs = self._settled_read(start, end)
        return self._enter(Kind.READ, legs, start, end) if legs else None

    def begin_write(self, start: int, end: int) -> Op | None:
        """None: another write owns a part of the range. Else ours, or LET_THROUGH."""
        first, last = self._rounded(start, end)
        if any(self._owns(op, first, last) for op in self._ops.values()):
            return None
        legs = self._settled_write(start, end)
        op = self._enter(Kind.WRITE if legs else Kind.LET_THROUGH, legs, start, end)
        op.noted = bool(legs and self._table[self._geometry.regions_of(start, end)[0]] & NOTE)
        if "noted-when-begun" not in self._omit:
            self._note(op)
        return op

    def settle(self, op: Op, ok: bool) -> bool:
        """Its I/O has ended. False: it is handed over."""
        if op.kind is Kind.WRITE and "ended-write-counts-again" not in self._omit:
            self._mark_dirty(op)
        if "noted-when-begun" in self._omit:
            self._note(op)
        if not ok or op.taken:
            op.done = ok
            return False
        self.leave(op)
        return True

    def leave(self, op: Op) -> None:
        del self._ops[op.number]
        if op.kind is not Kind.READ:
            waiting, self._waiting = self._waiting, []
            for step in waiting:
                self.arrive(step)

    def hand_over(self, op: Op) -> None:
        """This thread has called the data path, which is about to claim."""
        self._handing = op if op.kind is not Kind.LET_THROUGH else None

    # ------------------------------------------------------------ looking

    def _settled_read(self, start: int, end: int) -> int:
        """The leg that serves it, as a bit; 0: the data path's."""
        lo, hi = self._geometry.regions_of(start, end)
        bytes_ = {byte & _READ_BITS for byte in self._table[lo:hi]}
        if self._hold_reads or len(bytes_) > 1:
            return 0
        byte = bytes_.pop()
        return 0 if byte & READ_SLOW else 1 << (byte & READ_TARGET)

    def _settled_write(self, start: int, end: int) -> int:
        """The legs that it must reach; 0: the data path's."""
        lo, hi = self._geometry.regions_of(start, end)
        bytes_ = {byte & _WRITE_BITS for byte in self._table[lo:hi]}
        if self._hold_writes or len(bytes_) > 1:
            return 0
        byte = bytes_.pop()
        if byte & SLOW:
            return 0
        whole_lo, whole_hi = self._geometry.whole_regions(start, end)
        if byte & WHOLE_SLOW and whole_hi > whole_lo:
            return 0
        legs = byte >> WRITE_SHIFT & BOTH_OK
        if legs == BOTH_OK and not all(self._logged[zone] for zone in self._geometry.zones_of(start, end)):
            return 0
        return legs

    def _owns(self, op: Op, first: int, last: int) -> bool:
        """A write has a part of the range."""
        if op.kind is Kind.READ or (op.kind is Kind.LET_THROUGH and "let-through-owns-range" in self._omit):
            return False
        return op.first < last and first < op.last

    def _rounded(self, start: int, end: int) -> tuple[int, int]:
        return start - start % self._align, end + (-end) % self._align

    def _enter(self, kind: Kind, legs: int, start: int, end: int) -> Op:
        """Numbers are used again, as places in the C's table are."""
        number = next(number for number in range(len(self._ops) + 1) if number not in self._ops)
        first, last = (start, end) if kind is Kind.READ else self._rounded(start, end)
        op = Op(number, kind, legs, start, end, first, last, (1 - self._preferred, self._preferred))
        self._ops[number] = op
        return op

    def _note(self, op: Op) -> None:
        if op.noted and "write-is-noted" not in self._omit:
            self._notes.append((op.start, op.end))

    def _mark_dirty(self, op: Op) -> None:
        for zone in self._geometry.zones_of(op.start, op.end):
            self._dirty[zone] = self._dirty.get(zone, 0) | op.legs

    # ------------------------------------------------------------ the gate's functions

    def shadowvol_publish(self, region: int, bytes_: Any, count: int) -> None:
        self._let_others_lock()
        self._table[region : region + count] = bytes(bytes_)

    def shadowvol_hold(self, preferred: int, reads: bool, writes: bool) -> None:
        self._let_others_lock()
        self._preferred, self._hold_reads, self._hold_writes = preferred, reads, writes

    def shadowvol_log_zones(self, zones: Any, count: int, on: bool) -> None:
        self._let_others_lock()
        for zone in zones[:count]:
            self._logged[zone] = on

    def shadowvol_collect(self, out: Any) -> int:
        self._let_others_lock()
        if "write-in-flight-counts" not in self._omit:
            for op in self._ops.values():
                if op.kind is Kind.WRITE:
                    self._mark_dirty(op)
        codes = [zone << 2 | legs for zone, legs in self._dirty.items()]
        self._dirty.clear()
        out._obj[: len(codes)] = codes
        return len(codes)

    def shadowvol_collect_notes(self, out: Any) -> int:
        self._let_others_lock()
        notes, self._notes = self._notes, []
        for told, (start, end) in zip(out._obj, notes, strict=False):
            told.start, told.end = start, end
        return len(notes)

    def shadowvol_take(self, start: int, end: int, reads: bool, writes: bool, out: Any) -> int:
        self._let_others_lock()
        count = 0
        for op in self._ops.values():
            wanted = (op.kind is Kind.READ and reads) or (op.kind is Kind.WRITE and writes)
            if not wanted or op.taken or op.first >= end or start >= op.last:
                continue
            op.taken = True
            told = out._obj[count]
            told.op, told.start, told.end, told.legs = op.number, op.start, op.end, op.legs
            told.is_write = op.kind is Kind.WRITE
            count += 1
        return count

    def shadowvol_claim(self) -> int:
        op, self._handing = self._handing, None
        if op is None:
            return 0
        self._let_others_lock()
        code = 1 | op.taken << 1 | op.done << 2 | op.legs << 3 | op.number << 8
        if op.kind is Kind.WRITE:
            op.kind = Kind.LET_THROUGH
        else:
            op.taken = True
        op.legs = 0
        return code

    def shadowvol_align(self, align_bytes: int) -> None:
        self._let_others_lock()
        self._align = align_bytes
