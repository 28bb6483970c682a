"""The kernel's own nbd client, in a small virtual machine: ext4 on it goes on over everything that a migration brings.

Members and agents run on the host. In the guest run the kernel's driver and the code that an agent uses to attach and
to supervise (`shadowvol.nbd.attach`); the guest reaches the volumes' sockets through a TCP port each.
"""

import hashlib
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.guest import HOST, Forward, Guest
from tests.support.guestimage import ROOT
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 32 * MIB
REQUEST_LIMIT_S = 2  # the kernel's time limit for a request; short, to be quick
PROGRESS_LIMIT_S = 90.0
FILES = (
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "src/shadowvol").rglob("*.py"))),
    "tests/support/filewriter.py",
    "tests/support/guestattach.py",
)

pytestmark = [pytest.mark.xdist_group("guest"), pytest.mark.timeout(600)]


class Disk:
    """One volume, its device in the guest, and a writer on the file system there."""

    def __init__(self, guest: Guest, volume: Volume, port: int) -> None:
        self.guest, self.volume, self.port = guest, volume, port
        self.device = ""
        self.supervisor = 0
        self._writer = 0

    @property
    def name(self) -> str:
        return self.volume.name

    def attach(self) -> None:
        """As an agent does, also one that comes after another."""
        program = ("tests.support.guestattach", HOST, str(self.port), self.name, str(REQUEST_LIMIT_S))
        self._supervise(*program)

    def adopt(self, device: str) -> None:
        """What nbd-client has connected."""
        self._supervise("shadowvol.nbd.kernelnbd", f"{HOST}:{self.port}", self.name, "--adopt", "--device", device)

    def _supervise(self, *program: str) -> None:
        self.supervisor = self.guest.start("python3", "-m", *program, out=self.said)
        told = wait_for(lambda: self.guest.text(self.said).split(), PROGRESS_LIMIT_S, "a device")
        assert told[0].startswith("/dev/nbd"), " ".join(told)
        self.device = told[0]

    @property
    def said(self) -> str:
        return f"/tmp/{self.name}.out"

    def begin(self) -> None:
        self.guest.run("mke2fs", "-q", "-t", "ext4", self.device)
        self.guest.run("mkdir", "/mnt/" + self.name)
        self.guest.run("mount", "-t", "ext4", self.device, "/mnt/" + self.name)
        self.guest.run("touch", self._log)
        writer = ("python3", "-m", "tests.support.filewriter", "blocks", f"/mnt/{self.name}/file", self._log, "7")
        self._writer = self.guest.start(*writer, out=f"/tmp/{self.name}.writer")

    @property
    def _log(self) -> str:
        return f"/tmp/{self.name}.log"

    def written(self) -> int:
        return int(self.guest.run("wc", "-l", self._log).split()[0])

    def wait_written(self, more: int) -> None:
        goal = self.written() + more
        wait_for(lambda: self.written() >= goal, PROGRESS_LIMIT_S, f"{more} more writes", every_s=0.2)

    def end(self) -> None:
        """Every block as it was written, no error in the file system, and the device has the bytes of the legs."""
        assert self.guest.end(self._writer, signal.SIGTERM) == 0, self.guest.text(f"/tmp/{self.name}.writer")
        self.guest.run("umount", "/mnt/" + self.name)
        self.guest.run("e2fsck", "-f", "-n", self.device)
        there = self.guest.run("sha256sum", self.device).split()[0]
        assert there == hashlib.sha256(self.volume.target.read_bytes()).hexdigest()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Disk, Disk]]:
    """Two volumes that are up, and a guest that reaches them."""
    product, legs = Product(tmp_path / "h"), tmp_path
    with ExitStack() as stack:
        stack.callback(product.end)
        volumes = [
            Volume.make(
                product, make_source(legs / f"{name}.source", SIZE_BYTES, 0), legs / f"{name}.target", name=name
            )
            for name in ("ours", "theirs")
        ]
        ports = [stack.enter_context(Forward(product.home / "run" / f"{volume.name}.sock")).port for volume in volumes]
        guest = stack.enter_context(Guest(FILES, tmp_path / "console"))
        ours, theirs = (Disk(guest, volume, port) for volume, port in zip(volumes, ports, strict=True))
        yield ours, theirs


def test_ext4_on_the_kernel_s_client_goes_on_over_kills_and_the_whole_migration(disks: tuple[Disk, Disk]) -> None:
    """Five kills of each member, cutover, undo, commit. One device is connected by us, one by nbd-client."""
    ours, theirs = disks
    guest = ours.guest
    ours.attach()
    client = ("nbd-client", HOST, str(theirs.port), "/dev/nbd7", "-N", theirs.name, "-t", str(REQUEST_LIMIT_S))
    guest.run(*client)
    theirs.adopt("/dev/nbd7")
    for disk in disks:
        disk.begin()

    def kill_members() -> None:
        for disk in disks:
            disk.volume.product.kill(disk.name, "member")
        for disk in disks:
            disk.wait_written(20)

    def all_do(verb: str, *arguments: str) -> None:
        for disk in disks:
            disk.volume.run(verb, *arguments)

    assert guest.end(ours.supervisor, signal.SIGTERM) == 3  # detach is refused while it is mounted
    assert f"{ours.device} is mounted at /mnt/ours" in guest.text(ours.said)
    ours.attach()
    all_do("throttle", "--rate", "8MiB/s")
    all_do("start")
    kill_members()
    guest.end(ours.supervisor, signal.SIGKILL)  # as an agent that dies; the member dies before the next one comes
    ours.volume.product.kill(ours.name, "member")
    ours.attach()
    kill_members()
    all_do("throttle", "--rate", "none")
    for disk in disks:
        disk.volume.wait_synced()
    for verb in ("cutover", "undo", "cutover"):
        all_do(verb)
        kill_members()
    for disk in disks:
        disk.volume.wait_synced()
    all_do("commit")
    for disk in disks:
        disk.wait_written(20)
        disk.end()
    kernel_log = guest.run("dmesg")
    assert "I/O error" not in kernel_log and "EXT4-fs error" not in kernel_log, kernel_log
    assert guest.end(ours.supervisor, signal.SIGTERM) == 0, guest.text(ours.said)
    assert "gone, found: None" in guest.text(ours.said)
