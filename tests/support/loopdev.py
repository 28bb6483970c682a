"""Loop devices and mounts for tests: real block devices over files, small file systems that can be full or read-only.

Each one made is taken down by the context that made it.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    """Bind `file` and yield the device's node. `options` go to losetup, as in "--sector-size", "4096"."""
    command = ["losetup", "--find", "--show", *options, str(file)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(what: str | Path, place: Path, *options: str) -> Iterator[Path]:
    """Mount a device, or with "-t tmpfs" a file system, at a new folder. `options` go to mount."""
    place.mkdir()
    subprocess.run(["mount", *options, str(what), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


@contextmanager
def small_disk(place: Path, size_bytes: int, *options: str) -> Iterator[Path]:
    """A file system in memory that has room for `size_bytes`."""
    with mounted("tmpfs", place, "-t", "tmpfs", "-o", ",".join((f"size={size_bytes}", "mode=755", *options))):
        yield place


def make_ext4(path: Path | str) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)
