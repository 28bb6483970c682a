"""The two legs as the transfer process has them open, and who is using them.

- A leg that is not open, or could not be opened, is a DeadEndpoint: copies on it fail and say why.
- A reopened leg replaces the old one at once for new work; the old one is closed when its last user is done with it.
- Reading back goes through an open file of its own: the kernel tells each open file once about a failed write-back, and
  only flush() may use that up, or a failure would be lost to the window that it belongs to (law D1).
"""

import errno
import threading
from collections.abc import Sequence

from shadowvol.endpoints.base import Extent
from shadowvol.endpoints.dead import DeadEndpoint
from shadowvol.endpoints.identity import LegRefused, identity_of
from shadowvol.endpoints.local import Cache, LocalEndpoint, open_local
from shadowvol.transfer.pagecache import CachedBefore
from shadowvol.transfer.wire import Message

LEG_NAMES = ("source", "target")
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class LegError(Exception):
    """A leg failed. `final`: trying again is pointless."""

    def __init__(self, leg: str, error_number: int, text: str, final: bool = False) -> None:
        super().__init__(f"{leg}: {text}")
        self.leg = leg
        self.error_number = error_number
        self.text = text
        self.final = final

    @staticmethod
    def of(leg: str, error: OSError) -> "LegError":
        return LegError(leg, error.errno or errno.EIO, str(error.strerror or error))


class Leg:
    """One opening of a leg. Each operation is the endpoint's, with its OSError turned into a LegError of this leg."""

    def __init__(self, name: str, endpoint: LocalEndpoint | DeadEndpoint, reader: LocalEndpoint | None) -> None:
        self.name = name
        self.endpoint = endpoint
        self._reader = reader
        # Or the kernel lets writers of one file spin for it: a third of the CPU (measured).
        self._write_turn = threading.Lock()
        self.users = 0  # guarded by LegTable
        self.retired = False

    def cached_before(self, ranges: Sequence[tuple[int, int]]) -> CachedBefore | None:
        """For a job that reads these (offset, length), none of them empty; None: its reads leave nothing behind."""
        endpoint = self.endpoint
        if not ranges or not isinstance(endpoint, LocalEndpoint) or endpoint.reads_once:
            return None
        start, end = min(offset for offset, _ in ranges), max(offset + length for offset, length in ranges)
        return CachedBefore(endpoint.resident_pages, start, min(end, endpoint.size_bytes))

    def pread_once(self, buffer: memoryview, offset: int, before: CachedBefore | None) -> None:
        """As pread_into, and the page cache holds afterwards what it held `before`."""
        absent = [] if before is None else before.absent(offset, len(buffer))
        self.pread_into(buffer, offset)
        if isinstance(self.endpoint, LocalEndpoint) and not self.endpoint.reads_once:
            for start, length in absent:
                self.endpoint.drop_cached(start, length)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        try:
            if isinstance(self.endpoint, LocalEndpoint):
                self.endpoint.pread_once(buffer, offset)
            else:
                self.endpoint.pread_into(buffer, offset)
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def pwrite(self, data: memoryview, offset: int) -> None:
        try:
            with self._write_turn:
                self.endpoint.pwrite(data, offset)
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def zero(self, offset: int, length: int) -> None:
        try:
            self.endpoint.zero(offset, length, may_punch=True)
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def extents(self, offset: int, length: int) -> list[Extent]:
        try:
            return self.endpoint.extents(offset, length)
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def start_writeback(self, offset: int, length: int) -> None:
        """A hint: what goes wrong here comes out at the flush."""
        if isinstance(self.endpoint, LocalEndpoint):
            try:
                self.endpoint.start_writeback(offset, length)
            except OSError:
                pass

    def finish_writeback(self, offset: int, length: int) -> None:
        """Wait for a write-back that was started, and drop the range from the page cache. A hint, as above."""
        if self._reader is not None and isinstance(self.endpoint, LocalEndpoint) and self.endpoint.cache == "host":
            try:
                self._reader.forget_cached(offset, length)
            except OSError:
                pass

    def read_back(self, buffer: memoryview, offset: int) -> None:
        """Read what the medium holds, not what the page cache does."""
        if self._reader is None:
            self.pread_into(buffer, offset)
            return
        try:
            if self._reader.cache == "host":
                self._reader.forget_cached(offset, len(buffer))
            self._reader.pread_into(buffer, offset)
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def flush(self) -> None:
        try:
            self.endpoint.flush()
        except OSError as error:
            raise LegError.of(self.name, error) from error

    def close(self) -> None:
        self.endpoint.close()
        if self._reader is not None:
            self._reader.close()


def open_leg(name: str, path: str, cache: Cache, identity: str | None) -> Leg:
    """Open a leg for copying from and to. The copier never claims: the member has done that. Raises LegError."""
    try:
        found = identity_of(path)
        if identity is not None and found != identity:
            raise LegError(name, errno.ESTALE, f"{path} is not the recorded leg: found {found}, recorded {identity}")
        try:
            endpoint = open_local(path, cache=cache, writable=True, claim=False)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            endpoint = open_local(path, cache=cache, writable=False, claim=False)  # still fit to be copied from
    except LegRefused as refusal:
        raise LegError(name, errno.ENODEV, str(refusal)) from None
    except OSError as error:
        raise LegError(name, error.errno or errno.EIO, f"{path}: {error.strerror}") from None
    try:
        reader = open_local(path, cache="none", writable=False, claim=False)
    except OSError as error:
        endpoint.close()
        raise LegError(name, error.errno or errno.EIO, f"{path}: {error.strerror}") from None
    return Leg(name, endpoint, reader)


class LegTable:
    """The present opening of each leg, with counts of users. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._legs = {name: _dead(name, errno.ENODEV, "not open") for name in LEG_NAMES}

    def acquire(self, name: str) -> Leg:
        """Take part in the present opening; give it back with release()."""
        with self._lock:
            leg = self._legs[name]
            leg.users += 1
            return leg

    def release(self, leg: Leg) -> None:
        with self._lock:
            leg.users -= 1
            last = leg.retired and leg.users == 0
        if last:
            leg.close()

    def reopen(self, name: str, order: Message | None) -> Message:
        """Open anew (or, with None, only close) and answer what came of it, for the `opened` event."""
        answer: Message
        if order is None:
            leg, answer = _dead(name, errno.ENODEV, "not open"), {"ok": False, "error": "not open"}
        else:
            try:
                leg = open_leg(name, order["path"], order["cache"], order.get("identity"))
                answer = {"ok": True, "size": leg.endpoint.size_bytes}
                if isinstance(leg.endpoint, LocalEndpoint):
                    answer |= {"cache": leg.endpoint.cache, "cache_reason": leg.endpoint.cache_reason}
            except LegError as error:
                leg, answer = _dead(name, error.error_number, error.text), {"ok": False, "error": error.text}
        self._replace(name, leg)
        return answer

    def close(self) -> None:
        """After everything has stopped."""
        for name in LEG_NAMES:
            self._replace(name, _dead(name, errno.ENODEV, "closed"))

    def _replace(self, name: str, leg: Leg) -> None:
        with self._lock:
            old, self._legs[name] = self._legs[name], leg
            old.retired = True
            unused = old.users == 0
        if unused:
            old.close()


def _dead(name: str, error_number: int, reason: str) -> Leg:
    return Leg(name, DeadEndpoint(0, reason, error_number), None)
