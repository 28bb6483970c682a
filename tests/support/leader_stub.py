"""The agent's end of a member's link, driven by a test: sends a leader's requests, answers the member's asks.

It decides nothing about a migration. What it does by itself, and what a test may switch off: it replies to each ask
(`reply_to`), after having cleared, for a Fault, the faulty legs' bits in the named zones as the leader would.
"""

import os
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from shadowvol.core.geometry import Geometry, Run
from shadowvol.core.messages import (
    Answer,
    Ask,
    ClearUndo,
    Fault,
    LogZones,
    Prepare,
    Reply,
    Request,
    SetState,
    UnlogZones,
    from_wire,
    to_wire,
)
from shadowvol.core.regionmap import RegionMap
from shadowvol.link.framing import FramingError, receive_frame, send_frame
from tests.support.poll import wait_for

DEADLINE_S = 20.0
W = TypeVar("W", LogZones, UnlogZones, Fault, ClearUndo)


class LeaderStub:
    """Listens at `path`. One member at a time; a new hello replaces the connection before."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self.path = path
        self.geometry = geometry
        self.map = RegionMap(geometry.region_count)
        self.epoch = 1
        self.incarnation = 0  # of the member that said hello last
        self.hellos: list[dict[str, Any]] = []
        self.asks: list[Ask] = []
        self.stats: list[dict[str, Any]] = []
        self.downs: list[dict[str, Any]] = []
        self.reply_to: set[type] = {LogZones, UnlogZones, Fault, ClearUndo}
        self.listening_fds: list[int] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._seq: dict[str, int] = defaultdict(int)
        self._number = 0
        self._lock = threading.RLock()
        self._connection: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.listen()

    # ---- the agent's life ----

    def listen(self) -> None:
        """Be there (again)."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen()
        self._listener = listener
        self._spawn(self._accept, listener)

    def vanish(self) -> None:
        """Like an agent that died: neither the connection nor the socket answers."""
        with self._lock:
            for thing in (self._listener, self._connection):
                if thing is not None and thing.fileno() >= 0:
                    thing.shutdown(socket.SHUT_RDWR)
            self._listener = self._connection = None
        self.path.unlink(missing_ok=True)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._threads.clear()

    def close(self) -> None:
        self.vanish()
        for descriptor in self.listening_fds:
            os.close(descriptor)
        self.listening_fds.clear()

    def _spawn(self, run: Any, sock: socket.socket) -> None:
        thread = threading.Thread(target=run, args=(sock,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                self._spawn(self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        try:
            while True:
                frame, descriptors = receive_frame(connection)
                with self._lock:
                    self.listening_fds += descriptors
                    self._received(connection, frame.message, frame.blob)
        except (OSError, EOFError, FramingError):
            pass  # the member, or the test, has hung up
        finally:
            with self._lock:  # not while somebody sends
                connection.close()

    def _received(self, connection: socket.socket, wire: dict[str, Any], blob: bytes) -> None:
        if wire["type"] == "Hello":
            if wire["incarnation"] != self.incarnation:
                self._seq.clear()
            self._connection = connection
            self.incarnation = wire["incarnation"]
            self.hellos.append(wire)
        elif wire["type"] == "Stats":
            self.stats.append(wire)
        elif wire["type"] == "DownReady":
            self.downs.append(wire)
        else:
            message = from_wire(wire, blob)
            if isinstance(message, Answer):
                self._answers[message.seq * 1000 + message.epoch] = message.body
            elif isinstance(message, Ask):
                self.asks.append(message)
                if type(message.want) in self.reply_to:
                    self.reply(message)

    # ---- a leader's requests ----

    def send(self, subject: str, body: Any) -> int:
        """Send a request; the number by which its answer is found."""
        with self._lock:
            self._number += 1
            request = Request(self.epoch, self.incarnation, self._number, subject, body)
            self._put(*to_wire(request))
            return self._number * 1000 + self.epoch

    def answered(self, number: int) -> bool:
        with self._lock:
            return number in self._answers

    def answer(self, number: int) -> dict[str, Any]:
        wait_for(lambda: self.answered(number), DEADLINE_S, "the member's answer")
        with self._lock:
            return self._answers[number]

    def request(self, subject: str, body: Any) -> dict[str, Any]:
        return self.answer(self.send(subject, body))

    def send_frame(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._put(message, b"")

    def _put(self, message: dict[str, Any], blob: bytes) -> None:
        assert self._connection is not None, "no member is connected"
        send_frame(self._connection, message, blob)

    # ---- what a leader does, in one call ----

    def wait_hello(self, incarnation: int) -> None:
        wait_for(lambda: self.incarnation == incarnation, DEADLINE_S, f"hello of incarnation {incarnation}")

    def join(self, phase: str, preferred: int = 0, fresh_allowed: bool = False) -> None:
        """Give the member the whole state."""
        state = SetState(phase, preferred, bytes(self.map.bits), fresh_allowed=fresh_allowed)
        assert self.request("x", state) == {}

    def prepare(self, verb: str, legs: dict[str, Any]) -> dict[str, Any]:
        return self.request("x", Prepare(verb, legs))

    def set_ok(self, leg: int, runs: list[Run]) -> None:
        self.map.set_ok(leg, runs)
        assert self.request("x", SetState(changes=((leg, True, runs),))) == {}

    def clear(self, fault: Fault) -> None:
        """The consequence of a fault: the legs' bits are gone where the other leg still has them."""
        changes: list[tuple[int, bool, list[Run]]] = []
        for leg, zones in fault.legs:
            regions = [(self.geometry.zone_regions(lo)[0], self.geometry.zone_regions(hi - 1)[1]) for lo, hi in zones]
            before = bytes(self.map.bits)
            self.map.clear_ok(leg, regions)
            gone = [
                (index, index + 1)
                for index, (old, new) in enumerate(zip(before, self.map.bits, strict=True))
                if old != new
            ]
            if gone:
                changes.append((leg, False, gone))
        if changes:
            self.send("x", SetState(changes=tuple(changes)))

    def reply(self, ask: Ask) -> None:
        with self._lock:
            if isinstance(ask.want, Fault):
                self.clear(ask.want)
            elif isinstance(ask.want, ClearUndo):
                self.clear(Fault(((0, ask.want.zones),), "write", ""))
            self._put(*to_wire(Reply(ask.incarnation, ask.number)))

    @contextmanager
    def withholding(self, *kinds: type) -> Iterator[None]:
        """Asks of these kinds wait; at the end they are replied to."""
        with self._lock:
            self.reply_to -= set(kinds)
            seen = len(self.asks)
        yield
        with self._lock:
            self.reply_to |= set(kinds)
            late = {ask.number: ask for ask in self.asks[seen:] if type(ask.want) in kinds}
            for ask in late.values():
                self.reply(ask)

    def asked(self, kind: type[W]) -> list[W]:
        """What was asked for, of this kind."""
        with self._lock:
            return [ask.want for ask in self.asks if isinstance(ask.want, kind)]

    def latest_stats(self, condition: Any = lambda stats: True) -> dict[str, Any]:
        """The next statistics that satisfy `condition`."""
        seen = len(self.stats)

        def found() -> dict[str, Any] | None:
            with self._lock:
                return next((stats for stats in self.stats[seen:] if condition(stats)), None)

        stats = wait_for(found, DEADLINE_S, "statistics as wanted")
        assert stats is not None
        return stats
