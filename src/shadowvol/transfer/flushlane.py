"""Flushing on threads of their own, so that copies go on meanwhile.

One lane per leg. All flushes that are waiting when a lane begins are served by one fdatasync. When a flush is worth
asking for is the leader's business (core/flushround.py). A flush is never tried again: the kernel tells each open file
once about a failed write-back, and a second try would call lost data durable.
"""

import threading
from collections.abc import Callable

from shadowvol.transfer.legs import LegError, LegTable


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
