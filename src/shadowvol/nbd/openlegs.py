"""The legs that a member has open, and how they are opened, found again and let go.

A leg is always something that can be called: what is not open is a DeadEndpoint that says why, so that I/O to it goes
the way of any fault.

Invariants
- A medium is opened only when it is what the record says (identity), and large enough; it is claimed while open.
- `endpoints[leg]` is replaced in one assignment. A dead one is replaced at any time; an open one only by `take_out`,
  whose caller has made sure that no I/O uses it (closing a descriptor in use could send a write to another file).
- `kept[leg]`: the leg is to be open, and is tried again while it is dead. It belongs to the member's lock.
"""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from shadowvol.core.legs import LEG_NAMES, SOURCE, TARGET
from shadowvol.endpoints import blockdev
from shadowvol.endpoints.base import Endpoint
from shadowvol.endpoints.dead import DeadEndpoint
from shadowvol.endpoints.identity import LegRefused, identity_of, other_medium
from shadowvol.endpoints.local import Cache, LocalEndpoint, open_local

PROBE_BYTES = 512  # what is read of a leg to see that it answers


@dataclass(frozen=True, slots=True)
class LegRecord:
    """Which medium a leg is."""

    path: str
    cache: Cache
    identity: str

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> "LegRecord":
        """KeyError or ValueError when the record is not whole."""
        if plain["cache"] not in ("host", "none"):
            raise ValueError(f"cache {plain['cache']!r} is neither host nor none")
        return cls(str(plain["path"]), cast(Cache, plain["cache"]), str(plain["identity"]))


class OpenLegs:
    """Both legs by number. `open_leg` takes time and may be called by several threads: one opens, the others wait."""

    def __init__(self, size_bytes: int, log: Callable[[str], None]) -> None:
        self.size_bytes = size_bytes
        self.records: list[LegRecord | None] = [None, None]
        self.endpoints: list[Endpoint] = [DeadEndpoint(size_bytes, f"{name} is not open") for name in LEG_NAMES]
        self.kept = [False, False]
        self.open_errors: list[str | None] = [None, None]
        self.errors = [0, 0]
        self.last_errors: list[str | None] = [None, None]
        self._log = log
        self._opening = threading.Lock()

    def is_open(self, leg: int) -> bool:
        return not isinstance(self.endpoints[leg], DeadEndpoint)

    def open_leg(self, leg: int, record: LegRecord | None = None) -> str | None:
        """Open the leg unless it is; None, or why it cannot be. `record` replaces the one known."""
        with self._opening:
            if record is not None and record != self.records[leg]:
                if self.is_open(leg):
                    return f"{LEG_NAMES[leg]}: {cast(LocalEndpoint, self.endpoints[leg]).path} is still open"
                self.records[leg] = record
            if self.is_open(leg):
                return None
            wanted = self.records[leg]
            try:
                if wanted is None:
                    raise LegRefused("no such leg is known")
                endpoint = self._open(wanted)
            except (OSError, LegRefused) as error:
                reason = f"{LEG_NAMES[leg]}: {_text(error)}"
                if reason != self.open_errors[leg]:
                    self._log(f"cannot open the {reason}")
                self.endpoints[leg] = DeadEndpoint(self.size_bytes, reason)
                self.open_errors[leg] = reason
                return reason
            self.endpoints[leg] = endpoint
            self.open_errors[leg] = None
            return None

    def _open(self, record: LegRecord) -> LocalEndpoint:
        changed = other_medium(identity_of(record.path), record.identity)
        if changed is not None:
            raise LegRefused(f"{record.path}: {changed}")
        endpoint = open_local(record.path, cache=record.cache, writable=True, claim=True)
        if endpoint.size_bytes < self.size_bytes:
            endpoint.close()
            raise LegRefused(f"{record.path}: has {endpoint.size_bytes} bytes, the volume {self.size_bytes}")
        return endpoint

    def answers(self, leg: int) -> str | None:
        """None when an open leg can be read, or why not."""
        try:
            self.endpoints[leg].pread_into(bytearray(min(PROBE_BYTES, self.size_bytes)), 0)
        except OSError as error:
            return f"{LEG_NAMES[leg]}: {_text(error)}"
        return None

    def take_out(self, leg: int) -> Endpoint:
        """The leg is let go: nobody uses it. The caller closes what is returned."""
        endpoint = self.endpoints[leg]
        self.endpoints[leg] = DeadEndpoint(self.size_bytes, f"{LEG_NAMES[leg]} has been let go", errno.ENODEV)
        self.open_errors[leg] = None
        return endpoint

    def block_bytes(self) -> int:
        """The largest unit that an open leg writes."""
        return max([1] + [self.endpoints[leg].block_bytes for leg in (SOURCE, TARGET) if self.is_open(leg)])

    def smallest_request_bytes(self) -> int:
        """What the application may send: the source's block. Where the source is not open (let go after commit, or
        dead) it must not become larger than it was, and a target with larger blocks is read, modified and written."""
        if self.is_open(SOURCE) or not self.is_open(TARGET):
            return self.endpoints[SOURCE].block_bytes
        return min(self.endpoints[SOURCE].block_bytes, self.endpoints[TARGET].block_bytes)

    def is_rotational(self) -> bool:
        """Whether the source is a disk that turns, as far as the kernel knows."""
        endpoint = self.endpoints[SOURCE]
        if not isinstance(endpoint, LocalEndpoint) or not endpoint.is_disk:
            return False
        directory = blockdev.whole_disk_directory(os.stat(endpoint.path).st_rdev)
        return blockdev.sys_number(directory / "queue" / "rotational") == 1

    def count_error(self, leg: int, text: str) -> None:
        self.errors[leg] += 1
        self.last_errors[leg] = text

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By leg name, for the agent."""
        return {
            name: {
                "open": self.is_open(leg),
                "open_error": self.open_errors[leg],
                "errors": self.errors[leg],
                "last_error": self.last_errors[leg],
                "block_bytes": self.endpoints[leg].block_bytes,
            }
            for leg, name in enumerate(LEG_NAMES)
        }


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
