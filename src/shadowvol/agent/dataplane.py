"""The agent's hold on a volume's member process: its listening socket, its life and death, its link.

Ordering: a member holds NAME.lock for its life, so the agent waits for that lock, not for a pid: it also notices the
end of a member that an earlier agent started. `gone` is called only with the lock in hand, and before a successor
is started. The listening socket is the agent's; a new agent gets it back from the living member's hello.
"""

import fcntl
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from shadowvol.agent.access import SocketAccess
from shadowvol.core.messages import Answer, Ask, Reply, Request, from_wire, to_wire
from shadowvol.link import locks
from shadowvol.link.framing import Frame, FramingError, close_all
from shadowvol.link.listening import listen_private
from shadowvol.link.triolink import TrioLink
from shadowvol.nbd.serve import member_argv

BACKLOG = 128
RESTART_S = 0.05  # between two starts of a member
RESTART_LAST_S = 3.0  # it doubles up to this while members die before they say hello
_WAITING = trio.CapacityLimiter(10_000)  # a thread for each lock; the default limit would cap the volumes at 40

_logger = logging.getLogger("shadowvol.agent")


class DataPlane:
    """One volume's member on this host. Call run() in a task; `send` does not block."""

    def __init__(
        self,
        volume: str,
        socket_path: Path,
        lock_path: Path,
        spec: Callable[[int], dict[str, Any]],
        access: SocketAccess,
        *,
        listening: Callable[[], None],
        up: Callable[[int], None],
        gone: Callable[[], None],
        message: Callable[[Answer | Ask], None],
        statistics: Callable[[dict[str, Any]], None],
        newest_incarnation: int,
    ) -> None:
        self.pid: int | None = None
        self.incarnation: int | None = None  # of the member whose link is up
        self.proven_dead = False  # no member lives: its lock was in our hands, and none was started since
        self.statistics: dict[str, Any] = {}  # the last Stats frame of the member whose link is up
        self._told_at_s: float | None = None  # when it came
        self.down_ready = trio.Event()
        self.down_clients = 0  # why the member refused to go down
        self._volume = volume
        self._socket_path = socket_path
        self._lock_path = lock_path
        self._spec = spec
        self._access = access
        self._listening = listening
        self._up = up
        self._gone = gone
        self._message = message
        self._counts = statistics
        self._newest = newest_incarnation
        self._listener: int | None = None  # descriptor
        self._link: TrioLink | None = None  # None: nothing is sent
        self._said_hello = False
        self._no_filter_told: str | None = None
        self._stopping = False
        self._stopped = trio.Event()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Until stop(): there is always a member, and each death is told before the next one is started."""
        delay_s = RESTART_S
        while not self._stopping:
            if locks.is_free(self._lock_path):
                self._told_gone()
                if self._listener is None:  # no member lives, so nobody listens at the old one
                    self._listener = listen_private(self._socket_path, BACKLOG).detach()
                    self._give_access()
                self._listening()
                await self._start()
            else:
                self._listening()
            await self._wait_for_death()
            delay_s = RESTART_S if self._said_hello else min(delay_s * 2, RESTART_LAST_S)
            self._said_hello = False
            self._told_gone()
            if not self._stopping:
                _logger.warning("%s: the member is gone; starting it again", self._volume)
                await trio.sleep(delay_s)
        self._stopped.set()

    async def stop(self) -> None:
        """End the member for good; returns when it is proven dead and its socket is gone."""
        self._stopping = True
        self.kill()
        await self._stopped.wait()
        if self._listener is not None:
            os.close(self._listener)
            self._listener = None
        self._socket_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL: on SIGTERM nbdkit would answer its clients with an error."""
        if self.pid is not None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _told_gone(self) -> None:
        self.incarnation = None
        self.pid = None
        self.statistics, self._told_at_s = {}, None
        self.proven_dead = True
        self._gone()

    async def _wait_for_death(self) -> None:
        """Returns with the lock having been ours: no write of that member can still land."""
        lock = locks.open_lock(self._lock_path)
        try:
            await trio.to_thread.run_sync(fcntl.flock, lock, fcntl.LOCK_EX, abandon_on_cancel=True, limiter=_WAITING)
        finally:
            os.close(lock)

    def _give_access(self) -> None:
        """To a socket that is new here. Without it the volume works as well, for its owner."""
        try:
            self._access.give(self._socket_path)
        except OSError as error:
            _logger.error("%s: %s keeps its mode and group: %s", self._volume, self._socket_path, error.strerror)

    async def _start(self) -> None:
        """A new member. When its starter has ended well, the member has its lock, and we wait for its death."""
        assert self._listener is not None
        self._newest = max(self._newest + 1, time.time_ns() // 1_000_000)
        argv = member_argv(
            listen_fd=self._listener, lock_path=str(self._lock_path), spec=self._spec(self._newest), detach=True
        )
        self.proven_dead = False
        started = await trio.run_process(
            argv, stdin=subprocess.DEVNULL, capture_stdout=True, check=False, pass_fds=(self._listener,), cwd="/"
        )
        if started.returncode == 0:
            self.pid = int(started.stdout)
            _logger.debug("%s: started the member, process %d, incarnation %d", self._volume, self.pid, self._newest)
        else:
            _logger.error("%s: the member did not start (exit code %d)", self._volume, started.returncode)

    # ------------------------------------------------------------ link

    async def serve_link(self, link: TrioLink, hello: dict[str, Any], fds: list[int]) -> None:
        """A member said hello on this link; serve it until it ends."""
        if fds:
            if self._listener is None:
                self._listener = fds.pop(0)
                self._give_access()  # an agent with other settings may have made it
            close_all(fds)
        self.pid = hello["pid"]
        self._said_hello = True
        self._tell_no_filter(hello.get("no_filter"))
        incarnation = hello["incarnation"]
        self._newest = max(self._newest, incarnation)
        self._link = link
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_rest, link)
            self.incarnation = incarnation
            self._up(incarnation)
            try:
                async for frame, more in link:
                    close_all(more)
                    self._take(frame)
            except (OSError, EOFError, FramingError, trio.ClosedResourceError) as error:
                _logger.warning("%s: link to the member: %s", self._volume, error)
            nursery.cancel_scope.cancel()
        if self._link is link:
            self._link = None
        link.close()

    def _tell_no_filter(self, why: str | None) -> None:
        """Once, not at each start of a member."""
        if why is not None and why != self._no_filter_told:
            _logger.info("%s: the C filter is not used, I/O goes through Python: %s", self._volume, why)
        self._no_filter_told = why

    def send(self, message: Request | Reply) -> None:
        """Queue for the member; dropped while there is no link (the leader repeats requests, the member its asks)."""
        self._put(*to_wire(message))

    def age_s(self) -> float | None:
        """How long ago the member last told its statistics; None: not yet, or there is no member."""
        return None if self._told_at_s is None else trio.current_time() - self._told_at_s

    def ask_down(self, force: bool) -> None:
        """The member drains, and says when (`down_ready`); without `force` it may refuse (`down_clients`)."""
        self.down_ready = trio.Event()
        self.down_clients = 0
        self._put({"type": "Down", "force": force}, b"")

    def _put(self, message: dict[str, Any], blob: bytes) -> None:
        if self._link is not None:
            try:
                self._link.put(message, blob)
            except trio.WouldBlock:
                self._link = None
                _logger.warning("%s: the member does not read its link", self._volume)

    def _take(self, frame: Frame) -> None:
        kind = frame.message.get("type")
        if kind == "Stats":
            if frame.message["incarnation"] == self.incarnation:  # not the last words of a dead one
                self.statistics, self._told_at_s = frame.message, trio.current_time()
                self._counts(frame.message)
        elif kind == "DownReady":
            self.down_ready.set()
        elif kind == "DownRefused":
            self.down_clients = frame.message["clients"]
            self.down_ready.set()
        else:
            message = from_wire(frame.message, frame.blob)
            if isinstance(message, Answer | Ask):
                self._message(message)


async def _send_rest(link: TrioLink) -> None:
    with suppress(trio.ClosedResourceError):  # the receiving side notices
        await link.send_rest()
