"""A real member (nbdkit with our plugin) for a test, with the stub of a leader at the other end of its link.

The test owns the listening socket, as the agent does in the product.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd

from shadowvol.core.geometry import MIB, Geometry
from shadowvol.endpoints.identity import LegRefused, identity_of
from shadowvol.nbd.serve import member_argv
from tests.support.leader_stub import LeaderStub
from tests.support.poll import wait_for

VOLUME = "vol"
DEADLINE_S = 20.0


def leg_record(path: Path | str, cache: str = "host", identity: str | None = None) -> dict[str, str]:
    """As the agent keeps it. A path that is not there gets an identity that nothing has."""
    try:
        identity = identity or identity_of(str(path))
    except (LegRefused, OSError):
        identity = "none"
    return {"path": str(path), "cache": cache, "identity": identity}


def sparse_file(path: Path, size_bytes: int) -> Path:
    path.touch()
    os.truncate(path, size_bytes)
    return path


class Client:
    """A connection of libnbd, without its own checks of what is sent. Closed by dropping it."""

    def __init__(self, uri: str) -> None:
        self.nbd = nbd.NBD()
        self.nbd.set_strict_mode(0)
        self.nbd.add_meta_context("base:allocation")
        self.nbd.connect_uri(uri)

    def write(self, data: bytes, offset: int, flags: int = 0) -> None:
        self.nbd.pwrite(data, offset, flags)

    def read(self, length: int, offset: int) -> bytes:
        return bytes(self.nbd.pread(length, offset))

    def start_write(self, data: bytes, offset: int, flags: int = 0) -> int:
        """Without waiting for it; see `done`."""
        return int(self.nbd.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, flags=flags))

    def start_read(self, length: int, offset: int) -> int:
        return int(self.nbd.aio_pread(nbd.Buffer(length), offset))

    def start_flush(self) -> int:
        return int(self.nbd.aio_flush())

    def done(self, cookie: int) -> bool:
        """Whether it has been answered by now; raises nbd.Error when the answer is an error."""
        self.nbd.poll(0)
        return bool(self.nbd.aio_command_completed(cookie))

    def wait(self, cookie: int) -> None:
        def ended() -> bool:
            try:
                return self.done(cookie)
            except nbd.Error as error:
                failures.append(error)
                return True

        failures: list[nbd.Error] = []
        wait_for(ended, DEADLINE_S, "the answer to a request", every_s=0.005)
        if failures:
            raise failures[0]

    def holes(self, count: int, offset: int) -> list[tuple[int, int]]:
        """(length, flags) of base:allocation from `offset` on."""
        found: list[tuple[int, int]] = []

        def extent(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
            found.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        self.nbd.block_status(count, offset, extent)
        return found

    def close(self) -> None:
        self.nbd.shutdown()


class NbdMember:
    """Made by nbd_member(). `start` and `kill` may be repeated; the listening socket stays."""

    def __init__(
        self, directory: Path, source: dict[str, str], target: dict[str, str] | None, geometry: Geometry
    ) -> None:
        self.directory = directory
        self.geometry = geometry
        self.source = source
        self.target = target
        self.lock_path = directory / "vol.lock"
        self.socket_path = directory / "nbd"
        self.incarnation = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.socket_path))
        self.listener.listen(64)
        self.leader = LeaderStub(directory / "link", geometry)
        self.process: subprocess.Popen[bytes] | None = None
        self.stderr_path = directory / "stderr"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{VOLUME}?socket={self.socket_path}"

    def spec(self) -> dict[str, Any]:
        return {
            "volume": VOLUME,
            "description": "a test's volume",
            "size_bytes": self.geometry.size_bytes,
            "region_bytes": self.geometry.region_bytes,
            "block_bytes": self.geometry.block_bytes,
            "zone_bytes": self.geometry.zone_bytes,
            "incarnation": self.incarnation,
            "link": str(self.leader.path),
            "legs": {"source": self.source, "target": self.target},
        }

    def start(self) -> None:
        """Start the next incarnation, and wait for its hello."""
        self.incarnation += 1
        self.process = self.spawn()
        self.leader.wait_hello(self.incarnation)

    def spawn(self) -> "subprocess.Popen[bytes]":
        listen_fd = self.listener.fileno()
        argv = member_argv(listen_fd=listen_fd, lock_path=str(self.lock_path), spec=self.spec())
        with self.stderr_path.open("ab") as stderr:
            return subprocess.Popen(argv, pass_fds=(listen_fd,), stdin=subprocess.DEVNULL, stderr=stderr)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> Client:
        return Client(self.uri)

    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def close(self) -> None:
        self.kill()
        self.leader.close()
        self.listener.close()


@contextmanager
def nbd_member(
    directory: Path,
    source: dict[str, str],
    target: dict[str, str] | None = None,
    *,
    size_bytes: int = 64 * MIB,
    phase: str | None = "setup",
    preferred: int = 0,
    target_ok: bool = False,
) -> Iterator[NbdMember]:
    """A member that runs and, unless `phase` is None, has been given the state. `target_ok`: both legs are ok."""
    member = NbdMember(directory, source, target, Geometry.of(size_bytes, MIB))
    try:
        if target_ok:
            member.leader.map.set_ok(1, [(0, member.geometry.region_count)])
        member.start()
        if phase is not None:
            member.leader.join(phase, preferred)
        yield member
    finally:
        member.close()
