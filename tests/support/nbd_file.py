"""A file whose every read and write goes to an nbdkit server (through nbdfuse): a medium with faults on order."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.poll import wait_for


@contextmanager
def nbd_file(directory: Path, *nbdkit_arguments: str) -> Iterator[Path]:
    """Yield the path of the file, which exists below `directory` while the context lasts."""
    mount_point = directory / "nbd"
    mount_point.mkdir()
    file = mount_point / "file"
    command = ["nbdfuse", str(file), "--command", "nbdkit", "-s", "--exit-with-parent", *nbdkit_arguments]
    server = subprocess.Popen(command)
    try:
        wait_for(lambda: server.poll() is not None or file.exists(), 30, "nbdfuse shows its file")
        yield file
    finally:
        # Lazily, and ended by hand: after a failed test the transfer process may still have the file open.
        subprocess.run(["fusermount3", "-u", "-z", str(mount_point)], check=True)
        server.terminate()
        server.wait(30)


@contextmanager
def paused(control: Path) -> Iterator[None]:
    """With nbdkit's pause filter, whose socket `control` is: requests that reach the server wait until the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(control))
        connection.sendall(b"p")
        assert connection.recv(1) == b"P"
        try:
            yield
        finally:
            connection.sendall(b"r")
            assert connection.recv(1) == b"R"
