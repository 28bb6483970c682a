"""The worker threads that copy, and who of them does what next.

Order: urgent jobs first, always; then ordinary jobs in the order of arrival, unless paused, as the rate limit allows.
A worker that waits for the rate limit waits on the pool's condition, so an urgent job finds it at once. One worker does
urgent jobs only: an urgent job never waits for a piece of an ordinary one.

Wake-ups, each of which costs somebody else some 50 us of a processor: what happens wakes one worker, and who begins a
piece wakes the next, which looks for another one. While the rate limit holds pieces back, one worker minds the clock
(`_clock_s`), and the others sleep until it goes to work. Whoever is awake looks at everything before it sleeps.

Locks: the pool's lock guards everything but a job's planner, and is never held over a system call on a leg. A job's
plan_lock is held over its extents() calls, and never together with the pool's lock.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shadowvol.transfer.jobs import CopyJob, Tally
from shadowvol.transfer.legs import LegError
from shadowvol.transfer.piece import Halted, PieceCopier, PieceResult
from shadowvol.transfer.plan import Piece, PieceKind
from shadowvol.transfer.throttle import PIECE_BYTES_MAX, RateLimit

WORKERS = 6  # ordinary workers; on two cores 4 leave the disk idle now and then, 8 gain nothing more (measured)
RETRY_WAITS_S = (0.02, 0.08)  # between the three tries of a piece; short, since a hold may be waiting


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Totals since the start of the process."""

    bytes_read: int
    bytes_written: int
    jobs: int


class CopyPool:
    """`report` is called, by a worker or by the caller of cancel(), once for each job when it is done."""

    def __init__(self, report: Callable[[CopyJob], None]) -> None:
        self._report = report
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # ordinary workers wait here
        self._urgent_came = threading.Condition(lock)  # and here the one for urgent jobs
        self._clock_s: float | None = None  # when the worker that minds the clock wakes up
        self._jobs: list[CopyJob] = []
        self._total = Tally()
        self._limit = RateLimit(time.monotonic())
        self._paused = False
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(number == 0,), name=f"copy-{number}")
            for number in range(WORKERS + 1)
        ]
        for thread in self._threads:
            thread.start()

    # --- called by the control thread ------------------------------------------------------------------------------

    def submit(self, job: CopyJob) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
            if job.order.urgent:
                self._urgent_came.notify()

    def has(self, job_id: int) -> bool:
        with self._changed:
            return any(job.order.job_id == job_id for job in self._jobs)

    def cancel(self, job_id: int) -> None:
        """Drop what has not begun. The job is reported when nothing of it is in flight. Unknown or done: nothing."""
        with self._changed:
            done = []
            for job in self._jobs:
                if job.order.job_id == job_id:
                    job.cancelled = True
                    job.halt.set()
                    done += self._take_finished(job)
        for job in done:
            self._report(job)

    def pause(self, on: bool) -> None:
        with self._changed:
            self._paused = on
            self._changed.notify()

    def throttle(self, rate: int | None) -> None:
        with self._changed:
            self._limit.set_rate(rate, time.monotonic())
            self._changed.notify()

    def statistics(self) -> PoolStatistics:
        with self._changed:
            return PoolStatistics(self._total.read, self._total.written, len(self._jobs))

    def stop(self) -> None:
        """Begin nothing more; returns when every thread has finished its system call and ended. Nothing is reported."""
        with self._changed:
            self._stopping = True
            for job in self._jobs:
                job.halt.set()
            self._changed.notify_all()
            self._urgent_came.notify_all()
        for thread in self._threads:
            thread.join()

    # --- the workers -----------------------------------------------------------------------------------------------

    def _work(self, urgent_only: bool) -> None:
        copier = PieceCopier()
        while True:
            with self._changed:
                picked = self._pick(urgent_only)
            if picked is None:
                return
            job, charged = picked
            failure: LegError | None = None
            piece: Piece | None = None
            result: PieceResult | None = None
            try:
                piece, result = self._do_piece(copier, job)
            except LegError as error:
                failure = error
            except Halted:
                pass
            self._account(job, charged, piece, result, failure)

    def _pick(self, urgent_only: bool) -> tuple[CopyJob, int] | None:
        """Wait for a job with something to do; (job, bytes charged in advance). None: stop. The lock is held."""
        while not self._stopping:
            job = self._first(urgent=True)
            if job is not None:
                return self._begin(job, 0)
            job = None if urgent_only or self._paused else self._first(urgent=False)
            if job is None:
                (self._urgent_came if urgent_only else self._changed).wait()
                continue
            now_s = time.monotonic()
            wait_s = self._limit.delay_s(now_s)
            if wait_s == 0:
                return self._begin(job, self._limit.piece_bytes())
            self._wait_for_rate(now_s + wait_s, wait_s)
        return None

    def _begin(self, job: CopyJob, charged: int) -> tuple[CopyJob, int]:
        self._limit.charge(charged)
        job.in_flight += 1
        self._changed.notify()
        return job, charged

    def _wait_for_rate(self, due_s: float, wait_s: float) -> None:
        """Mind the clock, or sleep if another worker wakes up early enough."""
        if self._clock_s is not None and self._clock_s <= due_s:
            self._changed.wait()
            return
        self._clock_s = due_s
        self._changed.wait(wait_s)
        if self._clock_s == due_s:
            self._clock_s = None

    def _first(self, urgent: bool) -> CopyJob | None:
        for job in self._jobs:
            if job.order.urgent == urgent and not job.exhausted and not job.halt.is_set():
                return job
        return None

    def _do_piece(self, copier: PieceCopier, job: CopyJob) -> tuple[Piece | None, PieceResult | None]:
        """The next piece of a job, with retries of what failed. (None, None): there was no piece left."""
        piece: Piece | None = None
        for attempt in range(len(RETRY_WAITS_S) + 1):
            if attempt and job.halt.wait(RETRY_WAITS_S[attempt - 1]):
                raise Halted
            try:
                if piece is None:
                    piece = self._plan(job)
                if piece is None:
                    return None, None
                return piece, copier.run(piece, job)
            except LegError as error:
                if error.final or attempt == len(RETRY_WAITS_S):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _plan(self, job: CopyJob) -> Piece | None:
        with job.plan_lock:
            limit = (lambda: PIECE_BYTES_MAX) if job.order.urgent else self._limit.piece_bytes
            may_zero_far = not (job.order.verify or job.order.compare_first)
            return job.planner.next_piece(limit, may_zero_far)

    def _account(
        self,
        job: CopyJob,
        charged: int,
        piece: Piece | None,
        result: PieceResult | None,
        failure: LegError | None,
    ) -> None:
        with self._changed:
            unused = charged - self._cost(job, piece, charged)
            self._limit.charge(-unused)
            job.in_flight -= 1
            if result is not None and piece is not None:
                job.tally.add(result.tally)
                self._total.add(result.tally)
                if result.digest is not None:
                    job.digests[piece.index] = result.digest
            elif failure is not None:
                job.failure = job.failure or failure
                job.halt.set()
            elif piece is None:
                job.exhausted = True
            done = self._take_finished(job)
            if unused:
                self._changed.notify()  # what was given back may let another piece begin
        for finished in done:
            self._report(finished)

    def _cost(self, job: CopyJob, piece: Piece | None, charged: int) -> int:
        """What a piece counts against the rate limit: nothing for holes, unless zeroes had to be written."""
        if piece is None or not charged or piece.kind is PieceKind.SKIP:
            return 0
        if piece.kind is PieceKind.ZERO and job.target.endpoint.can_punch:
            return 0
        return piece.length

    def _take_finished(self, job: CopyJob) -> list[CopyJob]:
        """[job] if it is done now and was not taken before. The lock is held."""
        if job not in self._jobs or not job.finished or self._stopping:
            return []
        self._jobs.remove(job)
        return [job]
