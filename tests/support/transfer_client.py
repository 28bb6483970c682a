"""The transfer process as a test meets it: started for real, spoken to over its control socket."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from shadowvol.transfer.wire import LineBuffer, Message, encode

ANSWER_TIMEOUT_S = 60.0  # far above anything that is right, so that only a hang fails
SOURCE_ROOT = Path(__file__).resolve().parents[2] / "src"


class TransferClient:
    """A context: starts the process, and at the end hangs up and waits for it. `exit_code` is set then."""

    def __init__(self, lock: Path) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        command = [sys.executable, "-m", "shadowvol.transfer", "--volume", "v", "--control-fd", str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*command, "--lock", str(lock)],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        self._buffer = LineBuffer()
        self._jobs = 0
        self.events: list[Message] = []  # arrived and not yet waited for

    def __enter__(self) -> "TransferClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def hang_up(self) -> int:
        """Close the connection; the exit code."""
        self._socket.close()
        return self.process.wait(ANSWER_TIMEOUT_S)

    def send(self, message: Message) -> None:
        self._socket.sendall(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def wait(self, event: str, job: int | None = None) -> Message:
        """The first event of this kind (and job), whether it has arrived already or not. Others are kept."""
        while True:
            for message in self.events:
                if message["event"] == event and (job is None or message.get("job") == job):
                    self.events.remove(message)
                    return message
            data = self._socket.recv(1 << 16)
            if not data:
                raise AssertionError(f"the transfer process hung up before {event!r}; kept: {self.events}")
            self.events += self._buffer.feed(data)

    def open(self, source: Path | str | None, target: Path | str | None, cache: str = "host") -> Message:
        legs = {"source": source, "target": target}
        orders = {
            name: None if path is None else {"path": str(path), "cache": cache, "identity": None}
            for name, path in legs.items()
        }
        self.send({"cmd": "open", "legs": orders})
        return self.wait("opened")

    def begin(self, ranges: list[tuple[int, int]], reverse: bool = False, **options: bool) -> int:
        """Order a copy; the job's number."""
        self._jobs += 1
        names = ("target", "source") if reverse else ("source", "target")
        flags = {"urgent": False, "verify": False, "compare_first": False} | options
        order = {"cmd": "copy", "job": self._jobs, "from": names[0], "to": names[1], "ranges": ranges}
        self.send(order | flags)
        return self._jobs

    def copy(self, ranges: list[tuple[int, int]], reverse: bool = False, **options: bool) -> Message:
        """Order a copy and wait for its end."""
        return self.wait("copied", self.begin(ranges, reverse, **options))

    def flush(self, *legs: str) -> Message:
        self._jobs += 1
        self.send({"cmd": "flush", "job": self._jobs, "legs": list(legs)})
        return self.wait("flushed", self._jobs)

    def probe(self, offset: int, length: int, budget: int, leg: str = "source") -> Message:
        self._jobs += 1
        self.send({"cmd": "probe", "job": self._jobs, "leg": leg, "offset": offset, "length": length, "budget": budget})
        return self.wait("probed", self._jobs)
