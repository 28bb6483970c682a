"""Other NBD servers that the bench scripts measure beside ours."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd

from tests.support.poll import wait_for

START_LIMIT_S = 20
NBDKIT_FILE = ("nbdkit", "-f", "-U", "{socket}", "--threads", "32", "file", "{image}")


@contextmanager
def peer(folder: Path, name: str, command: tuple[str, ...] | list[str], image: Path) -> Iterator[str]:
    """A server of `image` that listens at folder/name.socket; its URI. `command` has {socket} and {image} in it."""
    socket = folder / f"{name}.socket"
    words = [word.format(socket=socket, image=image) for word in command]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder)
    uri = f"nbd+unix:///v?socket={socket}"
    try:
        wait_for(lambda: _answers(uri), START_LIMIT_S, f"{command[0]} answers")
        yield uri
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)  # nbdkit leaves it, and refuses to listen where one is


def _answers(uri: str) -> bool:
    client = nbd.NBD()
    client.connect_uri(uri)
    client.shutdown()
    return True
