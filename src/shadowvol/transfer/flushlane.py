"""Flushing on threads of their own, so that copies go on meanwhile.

One lane per leg. All flushes that are waiting when a lane begins are served by one fdatasync. When a flush is worth
asking for is the leader's business (core/flushround.py). A flush is never tried again: the kernel tells each open file
once about a failed write-back, and a second try would call lost data durable.

Most of what a flush finds dirty are the application's own writes, spread over the volume: milliseconds of work for the
processor (measured: 5 ms for 150 pages), in one go, with what the application does next waiting behind it. So the
write-back is begun in steps, with a pause after each that was work. The application has dirtied other pages by then, so
that is done again, shorter each time, until fdatasync has little left to begin.
"""

import threading
import time
from collections.abc import Callable

from shadowvol.transfer.legs import Leg, LegError, LegTable

PASSES_MAX = 4
PASS_CPU_SHORT_S = 0.002  # of the last one
STEPS = 32  # of equal length at first; then as long as STEP_CPU_S of work
STEPS_MAX = 2048  # of all passes; the rest is fdatasync's
LONGEST_S = 0.75  # likewise: windows that wait for the flush are copied again after a kill
STEP_CPU_S = 0.0001
STEP_BYTES_MIN = 1 << 20
PAUSE_S = 0.0005


def begin_writeback(leg: Leg) -> None:
    """Have the kernel begin to write back all that is dirty now. What goes wrong comes out at the flush."""
    steps_left, until_s = STEPS_MAX, time.monotonic() + LONGEST_S
    for _ in range(PASSES_MAX):
        steps, used_s = _pass(leg, steps_left, until_s)
        steps_left -= steps
        if used_s < PASS_CPU_SHORT_S:
            return


def _pass(leg: Leg, steps_max: int, until_s: float) -> tuple[int, float]:
    """Once over the leg: steps, and the processor time that they took."""
    size_bytes = leg.endpoint.size_bytes
    steps, total_s = 0, 0.0
    position, step_bytes = 0, max(STEP_BYTES_MIN, -(-size_bytes // STEPS))
    while position < size_bytes and steps < steps_max and time.monotonic() < until_s:
        began_s = time.thread_time()
        leg.start_writeback(position, min(step_bytes, size_bytes - position))
        used_s = time.thread_time() - began_s
        steps += 1
        total_s += used_s
        position += step_bytes
        if used_s > STEP_CPU_S:
            step_bytes = max(STEP_BYTES_MIN, step_bytes // 2)
        elif used_s < STEP_CPU_S / 4:
            step_bytes *= 2
        if used_s >= STEP_CPU_S / 4:
            time.sleep(PAUSE_S)
    return steps, total_s


class FlushLane:
    """Flushes one leg. The lane's thread calls `report(request, leg name, error text or None)` once per request."""

    def __init__(
        self,
        leg_name: str,
        legs: LegTable,
        report: Callable[["FlushRequest", str, str | None], None],
    ) -> None:
        self._leg_name = leg_name
        self._legs = legs
        self._report = report
        self._changed = threading.Condition()
        self._waiting: list[FlushRequest] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"flush-{leg_name}")
        self._thread.start()

    def submit(self, request: "FlushRequest") -> None:
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()

    def stop(self) -> None:
        """Returns when the present fdatasync has ended. What waits is not reported any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                served, self._waiting = self._waiting, []
            error = self._flush()
            for request in served:
                self._report(request, self._leg_name, error)

    def _flush(self) -> str | None:
        leg = self._legs.acquire(self._leg_name)
        try:
            begin_writeback(leg)
            leg.flush()
        except LegError as error:
            return error.text
        finally:
            self._legs.release(leg)
        return None


class FlushRequest:
    """One `flush` order: done when each of its legs has answered. Thread-safe."""

    def __init__(self, job_id: int, leg_names: set[str]) -> None:
        self.job_id = job_id
        self.failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._pending = set(leg_names)

    def note(self, leg_name: str, error: str | None) -> bool:
        """Record a leg's outcome. True for the last one."""
        with self._lock:
            self._pending.discard(leg_name)
            if error is not None:
                self.failed[leg_name] = error
            return not self._pending
