"""One copy order of the leader and what has become of it so far."""

import errno
import threading
import time
from dataclasses import dataclass, field

import xxhash

from shadowvol.transfer.legs import LEG_NAMES, Leg, LegError
from shadowvol.transfer.pagecache import CachedBefore
from shadowvol.transfer.plan import Planner
from shadowvol.transfer.wire import Message

RANGES_MAX = 1 << 16  # a window is bounded to far less; more is a bug of the sender


class OrderRefused(Exception):
    """An order that makes no sense."""


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """A `copy` message, checked."""

    job_id: int
    from_leg: str
    to_leg: str
    ranges: tuple[tuple[int, int], ...]  # (offset, length) in bytes
    urgent: bool  # a recopy under a hold: before all others, not limited, not paused
    verify: bool  # read back from the medium and compare
    compare_first: bool  # read both legs, write only what differs

    @staticmethod
    def parse(message: Message) -> "CopyOrder":
        """Raises OrderRefused."""
        try:
            ranges = tuple((int(offset), int(length)) for offset, length in message["ranges"])
            order = CopyOrder(
                job_id=int(message["job"]),
                from_leg=message["from"],
                to_leg=message["to"],
                ranges=ranges,
                urgent=bool(message.get("urgent", False)),
                verify=bool(message.get("verify", False)),
                compare_first=bool(message.get("compare_first", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise OrderRefused(f"malformed copy order: {error!r}") from None
        if {order.from_leg, order.to_leg} != set(LEG_NAMES):
            raise OrderRefused(f"cannot copy from {order.from_leg!r} to {order.to_leg!r}")
        if len(ranges) > RANGES_MAX or any(offset < 0 or length < 0 for offset, length in ranges):
            raise OrderRefused("ranges are (offset, length), not negative, and not more than 65536")
        return order


@dataclass(slots=True)
class Tally:
    """Bytes dealt with, by what was done."""

    read: int = 0
    written: int = 0
    zeroed: int = 0
    skipped: int = 0  # zeroes or holes where the target was a hole already

    def add(self, other: "Tally") -> None:
        self.read += other.read
        self.written += other.written
        self.zeroed += other.zeroed
        self.skipped += other.skipped


@dataclass(slots=True, eq=False)
class CopyJob:
    """A running order. All fields but `planner` are guarded by the pool's lock; `planner` by `plan_lock`."""

    order: CopyOrder
    source: Leg  # the leg to copy from, whatever its name
    target: Leg
    planner: Planner
    before: CachedBefore | None  # None: what is read needs no dropping
    plan_lock: threading.Lock = field(default_factory=threading.Lock)
    halt: threading.Event = field(default_factory=threading.Event)  # begin nothing more, give up waiting
    started_s: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)
    digests: dict[int, bytes] = field(default_factory=dict)  # by piece index
    in_flight: int = 0
    exhausted: bool = False  # every piece was handed out
    failure: LegError | None = None
    cancelled: bool = False

    @staticmethod
    def start(order: CopyOrder, source: Leg, target: Leg) -> "CopyJob":
        # What is copied again under a hold was written just now: the application's pages, all of them.
        ranges = () if order.urgent else [(offset, length) for offset, length in order.ranges if length > 0]
        return CopyJob(order, source, target, Planner(source, target, order.ranges), source.cached_before(ranges))

    @property
    def finished(self) -> bool:
        return self.in_flight == 0 and (self.exhausted or self.halt.is_set())

    def answer(self) -> Message:
        """The `copied` event."""
        failure, ok = self.failure, self.failure is None and not self.cancelled
        error = "cancelled" if self.cancelled else None
        return {
            "event": "copied",
            "job": self.order.job_id,
            "ok": ok,
            "leg": failure.leg if failure else None,
            "errno": failure.error_number if failure else None,
            "error": failure.text if failure else error,
            "bytes_read": self.tally.read,
            "bytes_written": self.tally.written,
            "bytes_zeroed": self.tally.zeroed,
            "bytes_skipped": self.tally.skipped,
            "digest": self._digest() if ok else None,
            "elapsed_s": round(time.monotonic() - self.started_s, 6),
        }

    def _digest(self) -> str:
        """xxh3_128 over the digests of the data pieces in order. Comparable only where pieces were cut alike."""
        combined = xxhash.xxh3_128()
        for index in sorted(self.digests):
            combined.update(self.digests[index])
        return combined.hexdigest()


def refusal(job_id: int, error: str) -> Message:
    """A `copied` event for an order that was not begun."""
    return {
        "event": "copied",
        "job": job_id,
        "ok": False,
        "leg": None,
        "errno": errno.EINVAL,
        "error": error,
        "bytes_read": 0,
        "bytes_written": 0,
        "bytes_zeroed": 0,
        "bytes_skipped": 0,
        "digest": None,
        "elapsed_s": 0.0,
    }
