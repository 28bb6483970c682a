"""Load on a volume by real clients: fio as a process of its own, and a client that reconnects and remembers.

- `Fio` runs fio with JSON output; `stop` and `wait` assert that no job saw an error (a verify mismatch is one).
- `KeepingClient` writes numbered blocks over libnbd, goes on after a lost connection as a kernel client would, and
  afterwards checks that each block holds the last write that was acknowledged. A write whose connection was lost is
  repeated until it is acknowledged, so there is never a block that may hold one of two things.
"""

import json
import os
import random
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import nbd

from tests.support.poll import wait_for
from tests.support.product import Volume

KIB, MIB = 1 << 10, 1 << 20
END_LIMIT_S = 60.0
RUN_LIMIT_S = 600  # no load outlives a test that has died
INTERRUPTED_EXIT = 128  # fio's exit code after SIGINT

# fio's check of its own writes, at once. Without serialize_overlap, fio that goes over the same bytes again sends a
# read that it will verify beside a write of the same bytes, and a torn sector is a legal answer to that. Seen on
# nbdkit's own file plugin (1 run of 60); on a server that tears every write in 10 runs of 10, with serialize_overlap
# in none of 10.
VERIFY = ("--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--serialize_overlap=1")

# A mix as unfriendly as a volume may meet. Lengths that are no multiple of 512 bytes only in UNALIGNED_PASS: with
# them fio 3.33 finds mismatches of its own making when it goes over the same bytes twice, on any server.
VERIFIED = ("--rw=randrw", "--iodepth=16", *VERIFY)
VERIFIED_MIX = (*VERIFIED, "--bsrange=512-256k")
UNALIGNED_PASS = (*VERIFIED, "--bsrange=512-256k", "--bs_unaligned=1")


class Fio:
    """One running fio over NBD. Use as a context manager: on an exception it is killed, else stopped and judged."""

    def __init__(self, folder: Path, uri: str, *options: str, name: str = "load", timed: bool = True) -> None:
        self._output = folder / f"fio-{name}.json"
        self._errors = folder / f"fio-{name}.err"
        self._result: dict[str, Any] | None = None
        forever = ["--time_based", f"--runtime={RUN_LIMIT_S}"] if timed else []
        command = ["fio", f"--name={name}", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
        command += ["--allow_mounted_write=1", "--randrepeat=0", "--group_reporting", "--eta=never", *options, *forever]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, f"--output={self._output}"],
                stdout=errors,
                stderr=errors,
                cwd=folder,  # fio leaves files for its verify state there
                start_new_session=True,
            )

    def __enter__(self) -> "Fio":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def assert_running(self) -> None:
        """A load that has ended by itself has seen an error."""
        if not self.running:
            self.wait()
            raise AssertionError("fio has ended by itself")

    def wait_served(self, volume: Volume, writes: int) -> None:
        """So many more writes have been served from now on."""
        goal = volume.writes() + writes
        wait_for(lambda: not self.running or volume.writes() >= goal, END_LIMIT_S, f"{writes} more writes")
        self.assert_running()

    def stop(self) -> dict[str, Any]:
        """Interrupt it; what it reports of its jobs together. Asserts that there was no error."""
        if self._result is None and self.running:
            self._process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self, limit_s: float = END_LIMIT_S) -> dict[str, Any]:
        """The same, without interrupting it."""
        if self._result is None:
            try:
                code = self._process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"fio did not end within {limit_s} s: {self._said()}") from None
            assert code in (0, INTERRUPTED_EXIT), f"fio: exit code {code}: {self._said()}"
            text = self._output.read_text()
            self._result = json.loads(text[text.index("{") :])["jobs"][0]
        assert self._result["error"] == 0, f"fio: error {self._result['error']}: {self._said()}"
        return self._result

    def kill(self) -> None:
        """End the whole group; for tests that fail."""
        if self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(END_LIMIT_S)

    def _said(self) -> str:
        files = [path for path in (self._errors, self._output) if path.exists()]
        return "\n".join(path.read_text(errors="replace")[:2000] for path in files)


def unaligned_pass(folder: Path, uri: str, offset: int, size: int) -> dict[str, Any]:
    """Once over these bytes, with reads and writes of any length from 512 bytes to 256 KiB, verified."""
    place = (f"--offset={offset}", f"--size={size}")
    with Fio(folder, uri, *UNALIGNED_PASS, *place, name="unaligned", timed=False) as fio:
        return fio.wait()


def longest_write_ms(job: dict[str, Any]) -> float:
    """The longest time that one of fio's writes took."""
    return float(job["write"]["lat_ns"]["max"]) / 1e6


BLOCK = 4 * KIB
_HEAD = struct.Struct("<QQ")
_RUN_BLOCKS_MAX = 16
_RETRY_LIMIT_S = 60.0
_RECONNECT_S = 0.01


class KeepingClient:
    """Threads that write, read and check blocks of their own, each over its own connection, until stop()."""

    def __init__(self, uri: str, size_bytes: int, *, seed: int, threads: int = 4, flush_every: int = 50) -> None:
        self.reconnects = 0
        self.acknowledged = 0
        self.longest_s = 0.0
        self._uri = uri
        self._flush_every = flush_every
        self._stopping = threading.Event()
        self._failures: list[str] = []
        share = size_bytes // BLOCK // threads
        self._versions: dict[int, int] = {}  # block -> number of the last acknowledged write
        self._threads = [
            threading.Thread(target=self._guard, args=(random.Random(f"{seed}/{i}"), i * share, share), daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def assert_working(self) -> None:
        assert not self._failures, self._failures

    def wait_acknowledged(self, more: int, limit_s: float = _RETRY_LIMIT_S) -> None:
        """So many more writes have been acknowledged."""
        goal = self.acknowledged + more
        wait_for(lambda: self.acknowledged >= goal or self._failures, limit_s, f"{more} more writes acknowledged")
        self.assert_working()

    def stop(self) -> None:
        """End the load; it raises what a thread has found."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(_RETRY_LIMIT_S + END_LIMIT_S)
            assert not thread.is_alive(), "a client's thread hangs"
        self.assert_working()

    def check_file(self, path: Path) -> None:
        """Every block of the file is as the last acknowledged write left it."""
        with path.open("rb") as file:
            for block, version in sorted(self._versions.items()):
                file.seek(block * BLOCK)
                self._check(file.read(BLOCK), block, version, str(path))

    # ---- one thread ----

    def _guard(self, chance: random.Random, first: int, count: int) -> None:
        try:
            self._work(chance, first, count)
        except Exception as error:
            self._failures.append(f"{type(error).__name__}: {error}")

    def _work(self, chance: random.Random, first: int, count: int) -> None:
        connection: nbd.NBD | None = None
        number = 0
        while not self._stopping.is_set():
            number += 1
            start = first + chance.randrange(count)
            blocks = range(start, min(start + chance.randint(1, _RUN_BLOCKS_MAX), first + count))
            data = b"".join(_content(block, number) for block in blocks)
            begun_s = time.monotonic()
            wants_flush = number % self._flush_every == 0
            connection = self._until_done(connection, lambda h, d=data, b=blocks: h.pwrite(d, b.start * BLOCK))
            for block in blocks:
                self._versions[block] = number
            if wants_flush:
                connection = self._until_done(connection, lambda h: h.flush())
            self.longest_s = max(self.longest_s, time.monotonic() - begun_s)
            self.acknowledged += 1
            if chance.random() < 0.3:
                connection = self._until_done(connection, lambda h, b=blocks: self._check_read(h, b))

    def _until_done(self, connection: nbd.NBD | None, work: Any) -> nbd.NBD:
        """Do it, over new connections as long as they are lost. An error that the server told is not survived."""
        deadline_s = time.monotonic() + _RETRY_LIMIT_S
        while True:
            try:
                if connection is None:
                    connection = nbd.NBD()
                    connection.connect_uri(self._uri)
                work(connection)
                return connection
            except nbd.Error:
                lost = connection is None or connection.aio_is_dead() or connection.aio_is_closed()
                lost = lost or (connection is not None and not connection.aio_is_ready())
                if not lost or time.monotonic() > deadline_s:
                    raise
                connection = None
                self.reconnects += 1
                self._stopping.wait(_RECONNECT_S)

    def _check_read(self, connection: nbd.NBD, blocks: range) -> None:
        data = bytes(connection.pread(len(blocks) * BLOCK, blocks.start * BLOCK))
        for index, block in enumerate(blocks):
            self._check(data[index * BLOCK : (index + 1) * BLOCK], block, self._versions[block], "read")

    def _check(self, data: bytes, block: int, version: int, where: str) -> None:
        if data != _content(block, version):
            found = _HEAD.unpack_from(data)
            raise AssertionError(f"{where}: block {block} holds {found}, acknowledged was version {version}")


def _content(block: int, version: int) -> bytes:
    return _HEAD.pack(block, version) * (BLOCK // _HEAD.size)


@contextmanager
def at_work(uri: str, size_bytes: int, *, seed: int) -> Iterator[KeepingClient]:
    """A KeepingClient with writes acknowledged before and after what is done beside it; stopped at the end."""
    load = KeepingClient(uri, size_bytes, seed=seed, threads=2)
    try:
        load.wait_acknowledged(20)
        yield load
        load.wait_acknowledged(20)
    finally:
        load.stop()
