"""The agent's hold on a volume's transfer process: start it, give it the leader's copy effects, tell how it ends.

Ordering: a transfer process holds NAME.transfer.lock for its life. The one that could take the lock knows that no
write of an earlier one can still land; so `started` may end the quarantine, and `stopped` comes only after its exit.
"""

import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from shadowvol.core.legs import LEG_NAMES, leg_number
from shadowvol.core.steps import CopierFlush, Copy, CopyResult, Probe
from shadowvol.link import locks
from shadowvol.link.outbox import Outbox
from shadowvol.transfer.wire import LineBuffer, WireError, encode

RESTART_S = 0.5  # between two starts, so that a process that dies at once does not spin
REOPEN_S = 1.0  # a leg that could not be opened is tried again at most this often
LOCK_HELD_EXIT = 3
_RECEIVE_BYTES = 1 << 16

_logger = logging.getLogger("shadowvol.agent")


class Copier:
    """One volume's transfer process. Call run() in a task; the other methods do not block."""

    def __init__(
        self,
        volume: str,
        lock_path: Path,
        *,
        started: Callable[[], None],
        stopped: Callable[[], None],
        job_done: Callable[[int, Any], None],
    ) -> None:
        self.pid: int | None = None
        self.bytes_read = 0  # of this process; progress only
        self.leg_errors: dict[int, str] = {}
        self._volume = volume
        self._lock_path = lock_path
        self._started = started
        self._stopped = stopped
        self._job_done = job_done
        self._outbox: Outbox | None = None
        self._legs: dict[str, Any] = {}
        self._kinds: dict[int, str] = {}
        self._reopen_at_s = 0.0
        self._process_pid = 0
        self._verify = False
        self._rate: int | None = None
        self._paused = False

    async def run(self, legs: dict[str, Any], *, verify: bool, rate: int | None, paused: bool) -> None:
        """Keep a process alive until cancelled; then let it finish its system calls and end."""
        self._legs, self._verify, self._rate, self._paused = legs, verify, rate, paused
        while True:
            await self._one_process()
            await trio.sleep(RESTART_S)

    def copy(self, job: int, step: Copy) -> None:
        self._kinds[job] = "copy"
        ranges = [[start, end - start] for start, end in step.extents]
        self._send(
            {
                "cmd": "copy",
                "job": job,
                "from": LEG_NAMES[step.from_leg],
                "to": LEG_NAMES[step.to_leg],
                "ranges": ranges,
                "urgent": step.urgent,
                "verify": self._verify,
                "compare_first": step.compare_first,
            }
        )

    def flush(self, job: int, step: CopierFlush) -> None:
        self._kinds[job] = "flush"
        self._send({"cmd": "flush", "job": job, "legs": [LEG_NAMES[leg] for leg in step.legs]})

    def probe(self, job: int, step: Probe) -> None:
        self._kinds[job] = "probe"
        order = {"cmd": "probe", "job": job, "leg": LEG_NAMES[step.leg], "offset": step.start}
        self._send({**order, "length": step.end - step.start, "budget": step.budget})

    def cancel(self, job: int) -> None:
        self._send({"cmd": "cancel", "job": job})

    def throttle(self, rate: int | None) -> None:
        if rate != self._rate:
            self._rate = rate
            self._send({"cmd": "throttle", "rate": rate})

    def pause(self, on: bool) -> None:
        if on != self._paused:
            self._paused = on
            self._send({"cmd": "pause", "on": on})

    def lock_is_free(self) -> bool:
        """No transfer process of this volume lives on this host."""
        return locks.is_free(self._lock_path)

    # ------------------------------------------------------------ the process

    async def _one_process(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "shadowvol.transfer", "--volume", self._volume]
        with theirs:
            process = await trio.lowlevel.open_process(
                [*command, "--control-fd", str(theirs.fileno()), "--lock", str(self._lock_path)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        self._process_pid = process.pid
        _logger.debug("%s: started the transfer process, process %d", self._volume, process.pid)
        try:
            await self._serve(ours)
        finally:
            # Hanging up makes it end; whatever happens here, its end is awaited.
            self._outbox = None
            ours.close()
            with trio.CancelScope(shield=True):
                code = await process.wait()
            if self.pid is not None:
                self.pid = None
                self._kinds.clear()
                self._stopped()
            if code not in (0, LOCK_HELD_EXIT):
                _logger.warning("%s: the transfer process ended with code %s; starting it again", self._volume, code)

    async def _serve(self, connection: socket.socket) -> None:
        self._outbox = Outbox(connection)
        self._send({"cmd": "open", "legs": self._legs})
        self._send({"cmd": "throttle", "rate": self._rate})
        self._send({"cmd": "pause", "on": self._paused})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.send_rest)
            try:
                await self._receive(connection)
            except (OSError, WireError) as error:
                _logger.warning("%s: the transfer process: %s", self._volume, error)
            nursery.cancel_scope.cancel()

    async def _receive(self, connection: socket.socket) -> None:
        """Events until the process ends. Raises OSError and WireError."""
        buffer = LineBuffer()
        while True:
            await trio.lowlevel.wait_readable(connection)
            try:
                data = connection.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                return
            for message in buffer.feed(data):
                self._event(message)

    def _send(self, message: dict[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.put(encode(message))

    def _event(self, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "opened":
            self._opened(message)
        elif event == "progress":
            self.bytes_read = message["bytes_read"]
        elif event == "copied":
            leg = message["leg"]
            text = message["error"] or ""
            result = CopyResult(
                message["ok"],
                message["bytes_read"],
                message["bytes_written"],
                None if leg is None else leg_number(leg),
                text if leg is None else f"{leg}: {text}",
            )
            self._ended(message["job"], result, leg)
        elif event == "probed":
            self._ended(message["job"], message["end"] if message["ok"] else None, None)
        elif event == "flushed":
            failed = {leg_number(name): error for name, error in message["failed"].items()}
            self._ended(message["job"], failed, next(iter(message["failed"]), None))
        elif event == "refused":
            _logger.error("%s: the transfer process refused %s: %s", self._volume, message["cmd"], message["error"])
            if message["job"] is not None:
                self._refused(message["job"], message["error"])

    def _refused(self, job: int, error: str) -> None:
        kind = self._kinds.get(job)
        outcome: Any = CopyResult(False, error=error)
        if kind != "copy":
            outcome = None if kind == "probe" else {0: error, 1: error}
        self._ended(job, outcome, None)

    def _ended(self, job: int, outcome: Any, failed_leg: str | None) -> None:
        if self._kinds.pop(job, None) is None:
            return
        if failed_leg is not None and trio.current_time() >= self._reopen_at_s:
            self._reopen_at_s = trio.current_time() + REOPEN_S
            self._send({"cmd": "open", "legs": self._legs})
        self._job_done(job, outcome)

    def _opened(self, message: dict[str, Any]) -> None:
        self.leg_errors = {
            leg: message[name]["error"]
            for leg, name in enumerate(LEG_NAMES)
            if message.get(name) is not None and not message[name]["ok"]
        }
        if self.pid is None:
            self.pid = self._process_pid
            self._started()
