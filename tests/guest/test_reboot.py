"""A whole host loses its power under load and is started again: its page cache is gone, as with real hardware.

Everything runs in the guest: agent, member, copier, the kernel's nbd driver, ext4 on it, SQLite there. Its disk is a
file of this host, so what the guest had not written to its disk is lost with QEMU. What a disk's own cache loses is the
simulator's business.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.guest import Guest
from tests.support.guestsystem import MOUNTPOINT, WRITER, system_image
from tests.support.loopdev import make_ext4
from tests.support.poll import wait_for
from tests.support.product import COMMAND

PROGRESS_LIMIT_S = 120.0
SIZE_BYTES = 32 << 20
DISK_BYTES = 256 << 20
TRANSACTIONS = 30
PYTHON = "/usr/bin/python3"
BASE = "/data/mnt/base"
CHECK = f"""
import sqlite3
database = sqlite3.connect({BASE!r})
print(*database.execute("PRAGMA integrity_check").fetchone())
print(*database.execute("SELECT count(*), max(number) FROM done").fetchone())
"""

pytestmark = [pytest.mark.xdist_group("guest"), pytest.mark.timeout(600)]


class Host:
    """The guest from one boot to its end, with the product in it and its agent started."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        guest.run("mkdir", MOUNTPOINT)
        guest.run("mount", "-t", "ext4", "-o", "ro", "/dev/vda", MOUNTPOINT)
        for name in ("proc", "sys", "dev", "tmp"):
            guest.run("mount", "--bind", f"/{name}", f"{MOUNTPOINT}/{name}")
        guest.run("mount", "-t", "ext4", "/dev/vdb", f"{MOUNTPOINT}/data")
        guest.run("mkdir", "-p", f"{MOUNTPOINT}/data/mnt")
        self.start(COMMAND, "--home", "/data/h", "agent", out="/tmp/agent.log")
        wait_for(lambda: "agent is ready" in guest.text("/tmp/agent.log"), PROGRESS_LIMIT_S, "the agent is ready")

    def run(self, *words: str) -> str:
        return self.guest.run("chroot", MOUNTPOINT, *words)

    def start(self, *words: str, out: str) -> int:
        return self.guest.start("chroot", MOUNTPOINT, *words, out=out)

    def shadowvol(self, *words: str) -> str:
        return self.run(COMMAND, "--home", "/data/h", *words)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.shadowvol("status", "v", "--json"))
        return status

    def transactions(self) -> int:
        return int(self.guest.run("wc", "-l", "/tmp/log").split()[0])


@contextmanager
def booted(disks: tuple[Path, Path], console: Path) -> Iterator[Host]:
    with Guest((), console, disks) as guest:
        yield Host(guest)


def test_a_host_that_loses_its_power_comes_back_with_everything_that_was_committed(tmp_path: Path) -> None:
    """The volume is up and attached again by itself; cut off while it was copying, it goes on to synced."""
    system, data = system_image(tmp_path), tmp_path / "data.img"
    data.touch()
    os.truncate(data, DISK_BYTES)
    make_ext4(data)
    with booted((system, data), tmp_path / "console.1") as host:
        host.run(PYTHON, "-c", f"open('/data/source', 'wb').truncate({SIZE_BYTES})")
        host.shadowvol("create", "v", "--source", "/data/source", "--target", "/data/target", "--provision")
        host.shadowvol("up", "v")
        device = host.shadowvol("attach", "v").strip()
        host.guest.run("mke2fs", "-q", "-t", "ext4", device)
        host.guest.run("mount", "-t", "ext4", device, f"{MOUNTPOINT}/data/mnt")
        host.guest.run("touch", "/tmp/log")
        host.shadowvol("throttle", "v", "--rate", "256KiB/s")
        host.shadowvol("start", "v")
        host.shadowvol("cutover", "v", "--early")
        host.start(PYTHON, str(WRITER), "sqlite", BASE, "/tmp/log", "7", out="/tmp/writer")
        wait_for(lambda: host.transactions() >= TRANSACTIONS, PROGRESS_LIMIT_S, "transactions")
        assert host.status()["phase"] == "copying"
        committed = host.transactions()
    with booted((system, data), tmp_path / "console.2") as host:
        wait_for(lambda: (host.status()["endpoint"] or {}).get("device") == device, PROGRESS_LIMIT_S, "it is attached")
        assert (host.status()["phase"], host.status()["preferred"]) == ("copying", "target")
        host.guest.run("mount", "-t", "ext4", device, f"{MOUNTPOINT}/data/mnt")
        verdict, count, newest = host.run(PYTHON, "-c", CHECK).split()
        assert verdict == "ok" and count == newest and int(count) >= committed
        host.shadowvol("throttle", "v", "--rate", "none")
        host.guest.run("umount", f"{MOUNTPOINT}/data/mnt")
        host.guest.run("e2fsck", "-f", "-n", device)
        host.shadowvol("wait", "v", "--for", "synced")
        host.shadowvol("detach", "v")
        host.shadowvol("down", "v")
        host.guest.run("cmp", f"{MOUNTPOINT}/data/source", f"{MOUNTPOINT}/data/target")
