"""Copying one piece: read, hash, find zeroes, write, begin write-back, read back. Runs in a worker's thread.

Whether a byte may be copied at all is not asked here: the window protocol guarantees that every write of an application
since the window opened is recopied. For the same reason a difference at reading back may be an application's mirrored
write that came in between (or that our older data overwrote): such blocks are copied and read back again before
anything is called a failure.

What is written goes to the medium at once, and a worker waits for what it wrote a few pieces ago: with gigabytes of
dirty pages the medium's queue is always full, and reads of the application and of the copy wait behind them. (nbdcopy
does the same; measured here: 1.3 times as fast as without.) An urgent piece waits for nothing.
"""

import errno
import threading
from collections import deque
from dataclasses import dataclass

import xxhash

from shadowvol.endpoints.local import LocalEndpoint
from shadowvol.transfer.jobs import CopyJob, Tally
from shadowvol.transfer.legs import Leg, LegError
from shadowvol.transfer.memory import Buffer, differing_runs, zero_runs
from shadowvol.transfer.plan import Piece, PieceKind

VERIFY_TRIES = 3  # copies of a differing block after the first
VERIFY_WAIT_S = 0.01  # grows with each try
BEHIND_BYTES_MAX = 8 << 20  # written by a worker and not yet known to be on the medium
# To the page cache. A large write makes the kernel look for a page of its size, for up to milliseconds in which nobody
# else gets the processor: these take half of its time (measured), and the copy is as fast.
WRITE_CALL_BYTES = 64 << 10
PUNCH_BYTES_MIN = 256 << 10  # a shorter run of zeroes over data is cheaper to write than to punch


class Halted(Exception):
    """The job was halted between two steps of a piece."""


@dataclass(frozen=True, slots=True)
class PieceResult:
    """What one piece came to; `digest` is of what was read from the leg copied from."""

    tally: Tally
    digest: bytes | None


class PieceCopier:
    """One worker's buffers and the steps of a piece. Belongs to one thread."""

    def __init__(self) -> None:
        self._front = Buffer()  # what was read
        self._back = Buffer()  # what the other leg has
        self._behind: deque[tuple[Leg, int, int]] = deque()  # (leg, offset, length): write-back was started

    def run(self, piece: Piece, job: CopyJob) -> PieceResult:
        """Raises LegError, naming the leg, or Halted. May be repeated as a whole."""
        source, target, order, halt = job.source, job.target, job.order, job.halt
        verify, compare_first = order.verify, order.compare_first
        tally, digest = Tally(), None
        if piece.kind is PieceKind.SKIP:
            tally.skipped = piece.length
        elif piece.kind is PieceKind.ZERO:
            self._make_hole(piece, source, target, verify, compare_first, tally)
            if verify:
                self._verify(piece, source, target, halt)
        else:
            front = self._front.view[: piece.length]
            source.pread_once(front, piece.offset, job.before)
            tally.read = piece.length
            digest = xxhash.xxh3_128_digest(front)
            if halt.is_set():
                raise Halted
            if compare_first:
                self._store_differences(piece, target, tally)
            else:
                self._store(piece, target, tally)
            if verify:
                self._verify(piece, source, target, halt)
            if tally.written and not order.urgent:
                self._write_behind(target, piece)
        return PieceResult(tally, digest)

    def _write_behind(self, target: Leg, piece: Piece) -> None:
        target.start_writeback(piece.offset, piece.length)
        self._behind.append((target, piece.offset, piece.length))
        while sum(length for _, _, length in self._behind) > BEHIND_BYTES_MAX:
            leg, offset, length = self._behind.popleft()
            leg.finish_writeback(offset, length)

    def _make_hole(
        self, piece: Piece, source: Leg, target: Leg, verify: bool, compare_first: bool, tally: Tally
    ) -> None:
        """With `verify` or `compare_first` the piece fits the buffers (Planner), and the hole is read like data."""
        if verify or compare_first:
            source.pread_into(self._front.view[: piece.length], piece.offset)
        if compare_first:
            target.pread_into(self._back.view[: piece.length], piece.offset)
            if zero_runs(self._back, piece.length) == [(0, piece.length)]:
                tally.skipped = piece.length
                return
        target.zero(piece.offset, piece.length)
        tally.zeroed = piece.length

    def _store_differences(self, piece: Piece, target: Leg, tally: Tally) -> None:
        target.pread_into(self._back.view[: piece.length], piece.offset)
        for start, end in differing_runs(self._front, self._back, piece.length):
            target.pwrite(self._front.view[start:end], piece.offset + start)
            tally.written += end - start

    def _store(self, piece: Piece, target: Leg, tally: Tally) -> None:
        """Write the piece, leaving holes where it is zero and the target is a hole, making them where that pays."""
        written = 0  # up to here the piece is dealt with
        for start, end in self._zero_runs_apart(piece, target, tally):
            self._write(piece, target, written, start, tally)
            written = end
        self._write(piece, target, written, piece.length, tally)

    def _zero_runs_apart(self, piece: Piece, target: Leg, tally: Tally) -> list[tuple[int, int]]:
        """Deal with the runs of zeroes that are not worth writing; (start, end) of each."""
        runs = zero_runs(self._front, piece.length)
        if not runs:
            return []
        holes = [
            (extent.offset - piece.offset, extent.offset + extent.length - piece.offset)
            for extent in target.extents(piece.offset, piece.length)
            if extent.hole
        ]
        apart = []
        for start, end in runs:
            if any(hole_start <= start and end <= hole_end for hole_start, hole_end in holes):
                tally.skipped += end - start
            elif end - start >= min(PUNCH_BYTES_MIN, piece.length):
                target.zero(piece.offset + start, end - start)
                tally.zeroed += end - start
            else:
                continue
            apart.append((start, end))
        return apart

    def _write(self, piece: Piece, target: Leg, start: int, end: int, tally: Tally) -> None:
        if end > start:
            cached = isinstance(target.endpoint, LocalEndpoint) and target.endpoint.cache == "host"
            step_bytes = WRITE_CALL_BYTES if cached else piece.length
            for at in range(start, end, step_bytes):
                target.pwrite(self._front.view[at : min(end, at + step_bytes)], piece.offset + at)
            tally.written += end - start

    def _verify(self, piece: Piece, source: Leg, target: Leg, halt: threading.Event) -> None:
        """Compare what the target's medium holds with what was read."""
        target.read_back(self._back.view[: piece.length], piece.offset)
        for start, end in differing_runs(self._front, self._back, piece.length):
            for attempt in range(1, VERIFY_TRIES + 1):
                if halt.wait(VERIFY_WAIT_S * attempt):
                    raise Halted
                source.pread_into(self._front.view[start:end], piece.offset + start)
                target.pwrite(self._front.view[start:end], piece.offset + start)
                target.read_back(self._back.view[start:end], piece.offset + start)
                if self._front.view[start:end] == self._back.view[start:end]:
                    break
            else:
                text = f"verify mismatch at {piece.offset + start}, {end - start} bytes"
                raise LegError(target.name, errno.EIO, text, final=True)
