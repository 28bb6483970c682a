"""An attached volume with a file system on it, and its removal whatever happened: a test must leave no dead device."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowvol.agent.paths import Home
from tests.support.product import Product, Volume


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_file_system(device: str | Path) -> None:
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(device))


def check_file_system(device: str | Path) -> None:
    """fsck finds nothing to do; on a file as well."""
    run("e2fsck", "-f", "-n", str(device))


@contextmanager
def mounted(device: str, where: Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", device, str(where))
    try:
        yield where
    except BaseException:
        subprocess.run(["umount", "--lazy", str(where)], check=False)
        raise
    run("umount", str(where))


def remove_remains(product: Product) -> None:
    """End what attached the volumes of this host, so that nothing hangs, then the mounts and loop devices."""
    product.end()
    run_directory = str(Home(product.home).run)
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if _text(backing).startswith(run_directory):
            subprocess.run(["losetup", "--detach", f"/dev/{backing.parent.parent.name}"], check=False)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ")[4]
        if point.startswith(run_directory):
            subprocess.run(["umount", "--lazy", point], check=False)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def attach(volume: Volume, *options: str) -> str:
    device = volume.run("attach", *options).strip()
    assert os.path.exists(device), device
    assert volume.status()["endpoint"]["device"] == device
    return device
