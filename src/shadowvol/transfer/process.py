"""The transfer process: orders in, events out. It performs the leader's copy effects and has no opinion of its own.

Threads: the control thread reads orders (and opens legs, so that what follows an `open` finds them open); the pool's
workers copy; one lane per leg flushes; one thread answers probes; one reports progress. Any of them sends events.
End: when the control connection closes or on `quit`, nothing more begins, every thread finishes its system call and
ends, and only then does the process exit and its lock fall: who gets the lock knows that no write can still land.
"""

import errno
import queue
import threading
from collections.abc import Callable

from shadowvol.transfer.flushlane import FlushLane, FlushRequest
from shadowvol.transfer.jobs import CopyJob, CopyOrder, OrderRefused, refusal
from shadowvol.transfer.legs import LEG_NAMES, LegError, LegTable
from shadowvol.transfer.plan import probe_end
from shadowvol.transfer.pool import CopyPool
from shadowvol.transfer.wire import Channel, Message

PROGRESS_EVERY_S = 0.25


class TransferProcess:
    """All of the process but its lock and its place in the system. run() returns when everything has stopped."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._legs = LegTable()
        self._stopped = threading.Event()
        self._busy = threading.Event()
        self._pool = CopyPool(self._copied)
        self._lanes = {name: FlushLane(name, self._legs, self._flushed_leg) for name in LEG_NAMES}
        self._probes: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._helpers = [
            threading.Thread(target=self._answer_probes, name="probe"),
            threading.Thread(target=self._report_progress, name="progress"),
        ]
        self._orders: dict[str, Callable[[Message], None]] = {
            "open": self._open,
            "copy": self._copy,
            "probe": self._probes.put,
            "flush": self._flush,
            "throttle": lambda order: self._pool.throttle(order["rate"]),
            "pause": lambda order: self._pool.pause(bool(order["on"])),
            "cancel": lambda order: self._pool.cancel(order["job"]),
        }

    def run(self) -> None:
        """Serve until the other end is gone or says quit. Raises WireError when it does not keep to the protocol."""
        for helper in self._helpers:
            helper.start()
        try:
            for message in self._channel.receive():
                if message.get("cmd") == "quit":
                    break
                self._obey(message)
        finally:
            self._stop()

    def _obey(self, message: Message) -> None:
        """A malformed order is answered, not obeyed: `refused`, with what it was."""
        command = message.get("cmd")
        order = self._orders.get(str(command))
        if order is None:
            self._refuse(message, f"no such command: {command!r}")
            return
        try:
            order(message)
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(message, f"malformed {command}: {error!r}")

    def _refuse(self, message: Message, error: str) -> None:
        self._channel.send({"event": "refused", "cmd": message.get("cmd"), "job": message.get("job"), "error": error})

    # --- orders ----------------------------------------------------------------------------------------------------

    def _open(self, message: Message) -> None:
        orders = message["legs"]
        answers = {name: self._legs.reopen(name, orders.get(name)) for name in LEG_NAMES}
        self._channel.send({"event": "opened", **answers})

    def _copy(self, message: Message) -> None:
        job_id = int(message["job"])
        try:
            order = CopyOrder.parse(message)
            if self._pool.has(job_id):
                raise OrderRefused(f"job {job_id} is running already")
        except OrderRefused as error:
            self._channel.send(refusal(job_id, str(error)))
            return
        source, target = self._legs.acquire(order.from_leg), self._legs.acquire(order.to_leg)
        self._pool.submit(CopyJob.start(order, source, target))
        self._busy.set()  # after: the progress thread asks the pool once more when it has cleared this

    def _copied(self, job: CopyJob) -> None:
        self._legs.release(job.source)
        self._legs.release(job.target)
        self._channel.send(job.answer())

    def _flush(self, message: Message) -> None:
        job_id, names = int(message["job"]), set(message["legs"])
        if not names <= set(LEG_NAMES):
            raise ValueError(f"unknown leg in {sorted(names)}")
        request = FlushRequest(job_id, names)
        if not names:
            self._channel.send({"event": "flushed", "job": job_id, "failed": {}})
        for name in names:
            self._lanes[name].submit(request)

    def _flushed_leg(self, request: FlushRequest, leg_name: str, error: str | None) -> None:
        if request.note(leg_name, error):
            self._channel.send({"event": "flushed", "job": request.job_id, "failed": request.failed})

    # --- helper threads --------------------------------------------------------------------------------------------

    def _answer_probes(self) -> None:
        while (message := self._probes.get()) is not None:
            try:
                self._channel.send(self._probe(message))
            except (KeyError, TypeError, ValueError) as error:
                self._refuse(message, f"malformed probe: {error!r}")

    def _probe(self, message: Message) -> Message:
        job_id, offset, length = int(message["job"]), int(message["offset"]), int(message["length"])
        budget_bytes = int(message["budget"])
        leg = self._legs.acquire(message["leg"])
        answer: Message = {"event": "probed", "job": job_id, "ok": True, "end": offset, "errno": None, "error": None}
        try:
            answer["end"] = probe_end(leg, offset, length, budget_bytes)
        except LegError as error:
            answer |= {"ok": False, "errno": error.error_number or errno.EIO, "error": error.text}
        finally:
            self._legs.release(leg)
        return answer

    def _report_progress(self) -> None:
        while not self._stopped.is_set():
            self._busy.wait()
            if self._stopped.wait(PROGRESS_EVERY_S):
                return
            statistics = self._pool.statistics()
            if not statistics.jobs:
                self._busy.clear()
                if self._pool.statistics().jobs:  # one came between the two lines above
                    self._busy.set()
                continue
            self._channel.send(
                {
                    "event": "progress",
                    "bytes_read": statistics.bytes_read,
                    "bytes_written": statistics.bytes_written,
                    "in_flight": statistics.jobs,
                }
            )

    def _stop(self) -> None:
        self._stopped.set()
        self._busy.set()
        self._probes.put(None)
        self._pool.stop()
        for lane in self._lanes.values():
            lane.stop()
        for helper in self._helpers:
            helper.join()
        self._legs.close()
