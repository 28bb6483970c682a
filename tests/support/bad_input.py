"""A host on which bad input is tried, and what must be there for it: odd files, other names of a leg, mounts, homes.

`v` is up, `w` is recorded and down, `a` and `b` are free files. A second home, `idle`, has the volume `i` and no agent.
Each set-up is a context that yields names for the command line, and leaves nothing behind.
"""

import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbd

from shadowvol.endpoints.local import open_local
from tests.support.endings import recorded
from tests.support.loopdev import loop_device, make_ext4, mounted, small_disk
from tests.support.poll import wait_for
from tests.support.product import MIB, Product

SIZE_BYTES = 4 * MIB
NEWER_FORMAT = 99
NOBODY_ID = 65534


@dataclass(frozen=True, slots=True)
class World:
    """`legs` has the legs of v and w, and the free files a and b."""

    product: Product
    idle: Product
    folder: Path
    legs: Path

    @property
    def home(self) -> Path:
        return self.product.home


Names = dict[str, str]
Setup = Callable[[World], AbstractContextManager[Names]]


@contextmanager
def bad_input_world() -> Iterator[World]:
    """Near the root and open to everybody, as some cases are another user's."""
    folder = Path(tempfile.mkdtemp(prefix="svr"))
    folder.chmod(0o755)
    legs = folder / "legs"
    legs.mkdir()
    for name in ("vs", "vt", "ws", "wt", "is", "it", "a", "b"):
        make_file(legs / name)
    made = World(Product(folder / "h"), Product(folder / "idle"), folder, legs)
    try:
        for product, name in ((made.product, "v"), (made.product, "w"), (made.idle, "i")):
            product.run("create", name, "--source", str(legs / f"{name}s"), "--target", str(legs / f"{name}t"))
        made.product.run("up", "v")
        yield made
    finally:
        made.product.end()
        shutil.rmtree(folder)


def make_file(path: Path, size_bytes: int = SIZE_BYTES) -> Path:
    with path.open("xb") as file:
        file.truncate(size_bytes)
    return path


# ---------------------------------------------------------------- set-ups


@contextmanager
def place(world: World) -> Iterator[Path]:
    """A folder of the case's own."""
    folder = world.folder / "case"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def files(**sizes: int) -> Setup:
    @contextmanager
    def setup(world: World) -> Iterator[Names]:
        with place(world) as folder:
            yield {name: str(make_file(folder / name, size)) for name, size in sizes.items()}

    return setup


def other_names_of(leg: str) -> Setup:
    """hard, soft, folder (a symbolic link to where it is), bind (a second mount of that folder), dots."""

    @contextmanager
    def setup(world: World) -> Iterator[Names]:
        path = world.legs / leg
        with place(world) as folder, mounted(world.legs, folder / "bind", "--bind") as bind:
            os.link(path, folder / "hard")
            (folder / "soft").symlink_to(path)
            (folder / "folder").symlink_to(world.legs)
            yield {
                "hard": str(folder / "hard"),
                "soft": str(folder / "soft"),
                "folder": str(folder / "folder" / leg),
                "dots": f"{world.legs}/../legs/./{leg}",
                "bind": str(bind / leg),
            }

    return setup


def a_loop_device_on(leg: str) -> Setup:
    @contextmanager
    def setup(world: World) -> Iterator[Names]:
        with loop_device(world.legs / leg) as device:
            yield {"loop": device}

    return setup


@contextmanager
def unfit(world: World) -> Iterator[Names]:
    """What is no file of a size."""
    with place(world) as folder:
        (folder / "folder").mkdir()
        (folder / "dangling").symlink_to("nowhere")
        os.mkfifo(folder / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
        make_file(folder / "empty", 0)
        make_file(folder / "odd", SIZE_BYTES + 1)
        names = ("folder", "dangling", "fifo", "socket", "empty", "odd", "missing")
        yield {name: str(folder / name) for name in names}


@contextmanager
def signed(world: World) -> Iterator[Names]:
    """Targets on which something is."""
    with place(world) as folder:
        ext4, swap, partitions = (make_file(folder / name) for name in ("ext4", "swap", "partitions"))
        make_ext4(ext4)
        subprocess.run(["mkswap", str(swap)], check=True, capture_output=True)
        with partitions.open("r+b") as file:
            file.write(bytes(446) + b"\0\0\2\0\x83\0\0\0" + b"\0\x08\0\0" * 2 + bytes(48) + b"\x55\xaa")
        yield {"ext4": str(ext4), "swap": str(swap), "partitions": str(partitions)}


@contextmanager
def in_use(world: World) -> Iterator[Names]:
    """A device that is mounted, and its file; a file that somebody has claimed."""
    with place(world) as folder, ExitStack() as stack:
        file = make_file(folder / "file")
        make_ext4(file)
        device = stack.enter_context(loop_device(file))
        mount = stack.enter_context(mounted(device, folder / "mount"))
        claimed = make_file(folder / "claimed")
        endpoint = open_local(str(claimed), cache="host", writable=True, claim=True)
        stack.callback(endpoint.close)
        yield {"file": str(file), "device": device, "mount": str(mount), "claimed": str(claimed)}


@contextmanager
def read_only(world: World) -> Iterator[Names]:
    """A read-only file system with a leg on it, and a read-only disk."""
    with place(world) as folder, ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk", 2 * SIZE_BYTES))
        make_file(disk / "leg")
        (disk / "h").mkdir(mode=0o700)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        device = stack.enter_context(loop_device(make_file(folder / "file"), "--read-only"))
        yield {"ro": str(disk), "device": device}


@contextmanager
def long_names(world: World) -> Iterator[Names]:
    with place(world) as folder:
        component = str(folder / ("x" * 256))
        yield {"component": component, "path": "/x" * 2500, "home": str(folder / ("h" * 90))}


@contextmanager
def odd_homes(world: World) -> Iterator[Names]:
    with place(world) as folder:
        file = make_file(folder / "file")
        yield {"file": str(file), "below": str(file / "h"), "missing": str(folder / "no" / "state.sqlite")}


@contextmanager
def newer_home(world: World) -> Iterator[Names]:
    """The record of a shadowvol to come."""
    with place(world) as folder:
        newer = Product(folder / "h")
        newer.run("status")
        newer.home.mkdir(mode=0o700)
        shutil.copy(world.idle.home / "state.sqlite", newer.home / "state.sqlite")
        with closing(sqlite3.connect(newer.home / "state.sqlite")) as connection:
            connection.execute(f"PRAGMA user_version = {NEWER_FORMAT}")
        before = recorded(newer.home)
        yield {"newer": str(newer.home)}
        assert recorded(newer.home) == before


@contextmanager
def a_client(world: World) -> Iterator[Names]:
    client = nbd.NBD()
    client.connect_uri(world.product.uri("v"))
    wait_for(lambda: world.product.status("v")["io"]["clients"] == 1, 20, "the client is counted")
    yield {}
    client.shutdown()
    wait_for(lambda: world.product.status("v")["io"]["clients"] == 0, 20, "the client has left")


@contextmanager
def unreadable(world: World) -> Iterator[Names]:
    """Files of root, and a home for nobody."""
    with place(world) as folder:
        secret = make_file(folder / "secret")
        secret.chmod(0o600)
        visible = make_file(folder / "visible")
        visible.chmod(0o644)
        home = folder / "h"
        home.mkdir(mode=0o700)
        os.chown(home, NOBODY_ID, NOBODY_ID)
        mine = make_file(folder / "mine")
        os.chown(mine, NOBODY_ID, NOBODY_ID)
        yield {"secret": str(secret), "visible": str(visible), "nobody": str(home), "mine": str(mine)}
