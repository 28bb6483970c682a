"""Loop devices for tests: real block devices over files. Each one made is taken down by the context that made it."""

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
