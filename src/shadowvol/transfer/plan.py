"""What there is to do in a set of ranges, found step by step: data to copy, holes to make, holes that are there.

Nothing here is ever a list of all extents: a volume may have a terabyte of hole, or a million extents. What was found
may be out of date when it is used: harmless, because every write since the window opened is recopied (DESIGN 7).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from shadowvol.endpoints.base import Extent
from shadowvol.transfer.legs import Leg

STEP_BYTES_MIN = 64 << 20  # how far one extents() call looks where there is much to see: 16 Ki extents at most (4 KiB)
STEP_BYTES_MAX = 1 << 62  # and where there was nothing but one run, twice as far each time
ZERO_BYTES_MAX = 64 << 20  # one zero() call: short enough to pause and cancel between


class PieceKind(Enum):
    DATA = "data"  # read `from`, write `to`
    ZERO = "zero"  # a hole of `from` over data of `to`
    SKIP = "skip"  # a hole of both


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of work. `index` numbers the pieces of a job in the order of its ranges."""

    index: int
    kind: PieceKind
    offset: int
    length: int


class Walker:
    """Looks along one leg, remembering what the last extents() call told."""

    def __init__(self, leg: Leg) -> None:
        self._leg = leg
        self._runs: deque[Extent] = deque()
        self._step_bytes = STEP_BYTES_MIN

    def run_at(self, position: int, end: int) -> Extent:
        """The run that `position` is in, from there to its end or `end`. Raises LegError; may then be called again."""
        while self._runs and self._runs[0].offset + self._runs[0].length <= position:
            self._runs.popleft()
        if not self._runs or self._runs[0].offset > position:
            runs = self._leg.extents(position, min(self._step_bytes, end - position))
            self._step_bytes = min(STEP_BYTES_MAX, self._step_bytes * 2) if len(runs) == 1 else STEP_BYTES_MIN
            self._runs = deque(runs)
        run = self._runs[0]
        return Extent(position, min(run.offset + run.length, end) - position, run.hole)


class Planner:
    """Hands out the pieces of one job. One thread at a time."""

    def __init__(self, source: Leg, target: Leg, ranges: Sequence[tuple[int, int]]) -> None:
        """`source` and `target` are the legs to copy from and to, whatever their names."""
        self._from, self._to = Walker(source), Walker(target)
        self._zeroes_are_cheap = target.endpoint.can_punch
        self._ranges = deque((offset, offset + length) for offset, length in ranges if length > 0)
        self._position = self._ranges[0][0] if self._ranges else 0
        self._index = 0

    def next_piece(self, piece_bytes_max: Callable[[], int], may_zero_far: bool) -> Piece | None:
        """The next piece, None after the last. Raises LegError, and then has not moved: call again to retry."""
        if not self._ranges:
            return None
        end = self._ranges[0][1]
        run = self._from.run_at(self._position, end)
        if not run.hole:
            kind, length = PieceKind.DATA, min(run.length, piece_bytes_max())
        else:
            over = self._to.run_at(self._position, self._position + run.length)
            kind, length = PieceKind.SKIP, over.length
            if not over.hole:
                limit = ZERO_BYTES_MAX if may_zero_far and self._zeroes_are_cheap else piece_bytes_max()
                kind, length = PieceKind.ZERO, min(over.length, limit)
        piece = Piece(self._index, kind, self._position, length)
        self._index += 1
        self._position += length
        if self._position == end:
            self._ranges.popleft()
            self._position = self._ranges[0][0] if self._ranges else 0
        return piece


def probe_end(leg: Leg, offset: int, length: int, budget_bytes: int) -> int:
    """Where a walk from `offset` stops: after `budget_bytes` of data were seen, or at the end. Raises LegError."""
    walker, position, end = Walker(leg), offset, offset + length
    while position < end and budget_bytes > 0:
        run = walker.run_at(position, end)
        take = run.length if run.hole else min(run.length, budget_bytes)
        position += take
        budget_bytes -= 0 if run.hole else take
    while position < end and (run := walker.run_at(position, end)).hole:  # a hole that follows costs nothing
        position += run.length
    return position
