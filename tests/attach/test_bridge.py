"""The bridge: a file whose content is an NBD export, whatever happens to the server."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowvol.endpoints.kernelcalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
from tests.support.poll import wait_for

MIB = 1 << 20
SIZE_BYTES = 8 * MIB
LIMIT_S = 20.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


class Served:
    """An nbdkit over a file, and the bridge that shows it as `file`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.backing = folder / "backing"
        self.backing.write_bytes(bytes(SIZE_BYTES))
        self.fail, self.file, self.lock = folder / "fail", folder / "file", folder / "lock"
        self.server: subprocess.Popen[bytes] | None = None
        self.serve()
        self.file.touch()
        assert self.bridge().returncode == 0

    def serve(self, *delays: str) -> None:
        """The listening socket is new each time: a client meets nobody in between."""
        (self._folder / "socket").unlink(missing_ok=True)
        filters = [f"error-file={self.fail}", "error-pread=EIO", "error-pwrite=ENOSPC", "error-rate=100%"]
        command = ["nbdkit", "-f", "-U", str(self._folder / "socket"), "--filter=delay", "--filter=error", "file"]
        self.server = subprocess.Popen([*command, str(self.backing), *filters, *delays])
        wait_for((self._folder / "socket").exists, LIMIT_S, "the server listens")

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait(LIMIT_S)

    def bridge(self) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "shadowvol.nbd.bridge", "--file", str(self.file), "--lock", str(self.lock)]
        command += ["--socket", str(self._folder / "socket"), "--export", ""]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    def lock_is_free(self) -> bool:
        with self.lock.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def end(self) -> None:
        if not self.lock_is_free():
            os.kill(int(self.lock.read_text()), signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(self.file)], check=False, stderr=subprocess.DEVNULL)
        self.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.end()


@pytest.fixture
def opened(served: Served) -> Iterator[int]:
    descriptor = os.open(served.file, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def test_it_reads_and_writes_what_the_export_holds(served: Served, opened: int) -> None:
    """At any offset and length, up to its end and not past it."""
    data = os.urandom(3 * MIB + 17)
    assert os.pwrite(opened, data, 1000) == len(data)
    os.fsync(opened)
    assert os.pread(opened, len(data), 1000) == data == served.backing.read_bytes()[1000 : 1000 + len(data)]
    assert os.fstat(opened).st_size == os.stat(served.file).st_size == SIZE_BYTES
    assert os.pread(opened, 100, SIZE_BYTES - 10) == bytes(10)
    assert os.pread(opened, 100, SIZE_BYTES) == b""
    with pytest.raises(OSError) as too_far:
        os.pwrite(opened, b"x", SIZE_BYTES)
    assert too_far.value.errno == errno.EFBIG
    with pytest.raises(PermissionError):
        os.ftruncate(opened, MIB)


def test_a_hole_that_is_punched_reads_as_zeroes(served: Served, opened: int) -> None:
    os.pwrite(opened, b"x" * MIB, 0)
    fallocate(opened, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, 4096, 8192)
    assert os.pread(opened, MIB, 0) == b"x" * 4096 + bytes(8192) + b"x" * (MIB - 12288)


def test_an_error_of_the_server_is_the_application_s_and_no_more(served: Served, opened: int) -> None:
    """It is told at once, not tried again; afterwards all is well."""
    served.fail.touch()
    actions = ((lambda: os.pread(opened, 512, 0), errno.EIO), (lambda: os.pwrite(opened, b"x", 0), errno.ENOSPC))
    for action, code in actions:
        with pytest.raises(OSError) as told:
            action()
        assert told.value.errno == code
    served.fail.unlink()
    os.pwrite(opened, b"y", 0)
    assert os.pread(opened, 1, 0) == b"y"


def test_what_was_under_way_is_asked_again_when_the_server_died(served: Served) -> None:
    """Many requests at once, no answer to any; each ends well with the next server."""
    served.kill()
    served.serve("wdelay=60", "rdelay=60")
    descriptor = os.open(served.file, os.O_RDWR)
    done: list[int] = []

    def work(number: int) -> None:
        assert os.pwrite(descriptor, bytes([number]) * 65536, number * 65536) == 65536
        os.fsync(descriptor)
        assert os.pread(descriptor, 65536, number * 65536) == bytes([number]) * 65536
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 20)]
    for thread in threads:
        thread.start()
    served.kill()
    assert not done
    served.serve()
    for thread in threads:
        thread.join(LIMIT_S)
    os.close(descriptor)
    assert sorted(done) == list(range(1, 20))


def test_only_one_bridge_holds_the_lock_and_it_falls_with_the_mount(served: Served) -> None:
    second = served.bridge()
    assert second.returncode == 3 and "is held" in second.stderr
    assert not served.lock_is_free()
    subprocess.run(["umount", str(served.file)], check=True)
    wait_for(served.lock_is_free, LIMIT_S, "the bridge has ended")


def test_a_bridge_that_was_killed_leaves_errors_not_hanging(served: Served, opened: int) -> None:
    os.kill(int(served.lock.read_text()), signal.SIGKILL)
    wait_for(served.lock_is_free, LIMIT_S, "the bridge has ended")
    with pytest.raises(OSError):
        os.pread(opened, 512, 0)
