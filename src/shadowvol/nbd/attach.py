"""A volume as a block device of the kernel that outlives its member: which way, who uses it, and taking it down.

Two ways, one shape: `kernelnbd` where the kernel has the nbd driver, else `fuseloop`. What is attached is found again
by what the kernel and a lock say, never by a file of ours that could be stale.

Taking down: 1. nobody may use the device, and it is opened for ourselves alone, so that nobody can begin to; 2. what is
cached above is flushed to the volume; 3. the device is let go; 4. so is the claim; 5. the rest goes.
"""

import errno
import io
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shadowvol.endpoints import blockdev
from shadowvol.nbd import fuseloop, kernelnbd
from shadowvol.nbd.fuseloop import FuseLoopError
from shadowvol.nbd.kernelnbd import DeviceLost, KernelDevice

__all__ = ["AttachFailed", "BadDevice", "Device", "DeviceInUse", "DeviceLost", "Site"]

_NBD, _LOOP = re.compile(r"/dev/nbd\d+"), re.compile(r"/dev/loop\d+")
_MARK = "shadowvol"
_OPENERS_MAX = 3  # named in a refusal
OPENERS_LIMIT_S, OPENERS_POLL_S = 1.0, 0.1  # udev and its like open a device for a moment
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


class AttachFailed(Exception):
    """It could not be done here, with the reason and what helps; nothing of it is left."""


class BadDevice(Exception):
    """The device that was asked for cannot be had."""


class DeviceInUse(Exception):
    """By whom, as the end of a sentence that begins with the device."""


class Device(Protocol):
    """An attached device. `supervise` blocks until stop(), or raises DeviceLost; `poke` has it look at its link."""

    device: str

    def supervise(self) -> None: ...
    def poke(self) -> None: ...
    def stop(self) -> None: ...
    def let_go(self, claim: int) -> None: ...
    def wait_gone(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Site:
    """One volume of one home: where its socket is, where we may keep a file, and how its devices are marked."""

    volume: str
    socket: Path
    run: Path
    mark: str
    request_limit_s: int = kernelnbd.REQUEST_LIMIT_S

    @property
    def _loop_place(self) -> fuseloop.Place:
        """No volume's socket or lock has such a name: those end with .sock and .lock."""
        base = str(self.run / self.volume)
        return fuseloop.Place(Path(f"{base}{fuseloop.SUFFIX}"), Path(f"{base}.attach"), self.socket, self.volume)

    def find(self) -> Device | None:
        """What is attached and alive, whoever made it."""
        device = kernelnbd.find(self.mark)
        if device is not None:
            return KernelDevice(device, str(self.socket), self.volume, self.mark)
        return fuseloop.find(self._loop_place)

    def make(self, asked: str | None) -> Device:
        """A new one. Raises BadDevice (nothing was tried), AttachFailed."""
        _check_root()
        if asked is not None:
            check_device(asked)
        try:
            if (asked is None or _NBD.fullmatch(asked)) and kernelnbd.available():
                return KernelDevice.connect(str(self.socket), self.volume, self.mark, asked, self.request_limit_s)
            if asked is not None and _NBD.fullmatch(asked):
                raise BadDevice("the kernel here has no nbd driver; leave out --device, or give /dev/loopN")
            _check_tools()
            return fuseloop.make(self._loop_place, asked)
        except TimeoutError:
            raise AttachFailed("its member does not answer; see shadowvol status, and try again when it does") from None
        except OSError as error:
            if error.errno == errno.EBUSY and asked is not None:
                raise BadDevice(f"{asked} is in use") from None
            raise AttachFailed(str(error)) from None
        except FuseLoopError as error:
            raise AttachFailed(str(error)) from None

    def remove(self, device: Device, claim: io.FileIO) -> None:
        """Steps 3 to 5, with the claim of claim(). Raises AttachFailed."""
        try:
            with claim:
                device.let_go(claim.fileno())
            gone = device.wait_gone()
        except (FuseLoopError, OSError) as error:
            raise AttachFailed(str(error)) from None
        if not gone:
            raise AttachFailed(f"{device.device} is opened by somebody since, and goes when that is closed")

    def remove_remains(self) -> None:
        """After a device was lost: what is left of it. Raises AttachFailed."""
        try:
            fuseloop.clear(self._loop_place)
        except (FuseLoopError, OSError) as error:
            raise AttachFailed(str(error)) from None


def mark_of(home: Path, volume: str) -> str:
    """What a device of this volume carries; no volume's name has a blank in it."""
    return f"{_MARK} {home} {volume}"


def attached_devices(home: Path, run: Path) -> list[str]:
    """Those of all volumes of this home, by what the kernel says; no agent is needed."""
    by_mark = [device for device, mark in kernelnbd.marks() if mark.rpartition(" ")[0] == f"{_MARK} {home}"]
    by_file = [
        device for device, file in fuseloop.backings() if Path(file).parent == run and file.endswith(fuseloop.SUFFIX)
    ]
    return by_mark + by_file


def check_device(asked: str) -> None:
    """That a name is one of a device that could be ours. Raises BadDevice."""
    if not _NBD.fullmatch(asked) and not _LOOP.fullmatch(asked):
        raise BadDevice(f"{asked} is neither /dev/nbdN nor /dev/loopN")
    if not os.path.exists(asked):
        if _NBD.fullmatch(asked) and not kernelnbd.available():
            raise BadDevice("the kernel here has no nbd driver; leave out --device, or give /dev/loopN")
        if not os.path.exists(asked):
            raise BadDevice(f"{asked} does not exist")
    sys_directory = Path("/sys/block") / os.path.basename(asked)
    if kernelnbd.is_connected(asked) or (sys_directory / "loop" / "backing_file").exists():
        raise BadDevice(f"{asked} is in use")


def _check_root() -> None:
    if os.geteuid() != 0:
        raise AttachFailed("only root may attach block devices; the agent has to run as root")


def _check_tools() -> None:
    lacking = []
    if not _is_character_device("/dev/fuse"):
        lacking.append("/dev/fuse (modprobe fuse)")
    if shutil.which("losetup", path=_PATH) is None:
        lacking.append("losetup (apt-get install mount)")
    if lacking:
        raise AttachFailed(f"the kernel has no nbd driver (modprobe nbd), and the other way lacks {', '.join(lacking)}")


def _is_character_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


# ---------------------------------------------------------------- who uses it


def claim(device: str) -> io.FileIO:
    """Steps 1 and 2: the device, for ourselves alone and flushed. Raises DeviceInUse, OSError."""
    where = blockdev.mounted_at(device)
    if where == "[swap]":
        raise DeviceInUse("is in use as swap; swapoff it first")
    if where is not None:
        raise DeviceInUse(f"is mounted at {where}; unmount it first")
    holders = blockdev.holders_of(device)
    if holders:
        raise DeviceInUse(f"is in use by /dev/{holders[0]}; let that go first")
    deadline_s = time.monotonic() + OPENERS_LIMIT_S
    while (openers := _openers(device)) and time.monotonic() < deadline_s:
        time.sleep(OPENERS_POLL_S)
    if openers:
        raise DeviceInUse(f"is open in {', '.join(openers[:_OPENERS_MAX])}; end that first")
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceInUse("is in use, perhaps mounted in another mount namespace (lsns -t mnt)") from None
        raise
    file = io.FileIO(descriptor, "r+")
    try:
        os.fsync(descriptor)
    except BaseException:
        file.close()
        raise
    return file


def _openers(device: str) -> list[str]:
    """Processes with an open descriptor of the device or one of its partitions, as "process 7 (dd)"."""
    numbers = _numbers(device)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:
            continue  # it has ended
        if any(_is_device(descriptor, numbers) for descriptor in descriptors):
            found.append(f"process {process.name} ({blockdev.sys_value(process / 'comm') or '?'})")
    return found


def _numbers(device: str) -> set[int]:
    directory = blockdev.sys_directory(os.stat(device).st_rdev)
    parts = [part.parent for part in directory.glob("*/partition")]
    return {blockdev.device_number(each) for each in (directory, *parts)}


def _is_device(descriptor: Path, numbers: set[int]) -> bool:
    try:
        if not os.readlink(descriptor).startswith("/dev/"):
            return False  # not looked at: it may hang, as a file of a dead network file system
        info = os.stat(descriptor)
    except OSError:
        return False
    return stat.S_ISBLK(info.st_mode) and info.st_rdev in numbers
