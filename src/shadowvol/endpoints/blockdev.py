"""What the kernel says about block devices and mounts: /sys, /proc, loop devices. Only looks, changes nothing.

The one idea: storage as *areas*. An area is a byte range of something that holds bytes (a whole disk, an inode). A
partition is a range of its disk, a loop device a range of its backing file. A path's *footing* is the areas that it is,
and the areas that it lies on. Two paths are the same storage exactly when one lies on the other.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shadowvol.endpoints import kernelcalls

SECTOR_BYTES = 512  # the unit of sizes and starts in /sys, whatever the device's logical block
NESTING_MAX = 16  # loop on a file on a loop…: deeper than this is a cycle or a mistake
_WHOLE = 1 << 63


@dataclass(frozen=True, slots=True)
class Area:
    """Bytes [start, end) of the holder `key`: "disk:MAJ:MIN" or "file:DEV:INODE"."""

    key: str
    start: int
    end: int

    def overlaps(self, other: "Area") -> bool:
        return self.key == other.key and self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mount_id: int
    device: int  # st_dev of the mounted file system
    mount_point: str
    fstype: str
    origin: str  # a device node, "host:/export", or any word


def sys_directory(rdev: int) -> Path:
    """The directory of a block device below /sys/devices."""
    return Path(os.path.realpath(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}"))


def sys_value(path: Path) -> str | None:
    """A one-line file of /sys; None where it is missing, empty or unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def sys_number(path: Path) -> int:
    return int(sys_value(path) or 0)


def whole_disk_directory(rdev: int) -> Path:
    """As sys_directory, but of the disk when the device is a partition (queue, serial, dm, md are there)."""
    directory = sys_directory(rdev)
    return directory.parent if (directory / "partition").exists() else directory


def device_node(directory: Path) -> str:
    """/dev/NAME of a device's directory in /sys."""
    return "/dev/" + directory.name.replace("!", "/")


def writes_zeroes(rdev: int) -> bool:
    """Whether the disk zeroes a range by itself, so that a punch is a promise and not a fall-back to writing."""
    return sys_number(whole_disk_directory(rdev) / "queue" / "write_zeroes_max_bytes") > 0


def device_number(directory: Path) -> int:
    major, minor = (sys_value(directory / "dev") or "0:0").split(":")
    return os.makedev(int(major), int(minor))


# --- areas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Footing:
    """Where a path's bytes are.

    `own`: areas whose bytes are exactly its own (a loop device, and its range of the backing file). `below`: what that
    lies on, where the path's own bytes are some unknown part (the disk under a file system).
    """

    own: tuple[Area, ...]
    below: tuple[Area, ...]

    def lies_on(self, other: "Footing") -> bool:
        """Whether writing here changes bytes of `other`."""
        return any(mine.overlaps(theirs) for mine in self.own + self.below for theirs in other.own)


def footing_of(path: str) -> Footing:
    """Raises OSError when the path cannot be looked at."""
    info = os.stat(path)
    if stat.S_ISBLK(info.st_mode):
        return disk_footing(info.st_rdev)
    return _file_footing(info.st_dev, info.st_ino, 0, _WHOLE, 0)


def disk_footing(rdev: int) -> Footing:
    return _disk_footing(rdev, 0, _WHOLE, 0)


def _file_footing(device: int, inode: int, start: int, end: int, depth: int) -> Footing:
    own = (Area(f"file:{device}:{inode}", start, end),)
    if depth >= NESTING_MAX or not sys_directory(device).is_dir():  # no disk below: tmpfs, NFS, btrfs
        return Footing(own, ())
    disk = _disk_footing(device, 0, _WHOLE, depth + 1)
    return Footing(own, disk.own + disk.below)


def _disk_footing(rdev: int, start: int, end: int, depth: int) -> Footing:
    directory = sys_directory(rdev)
    if (directory / "partition").exists():
        first = sys_number(directory / "start") * SECTOR_BYTES
        size = sys_number(directory / "size") * SECTOR_BYTES
        last = min(first + end, first + size)
        return _disk_footing(device_number(directory.parent), first + start, last, depth)
    own: tuple[Area, ...] = (Area(f"disk:{os.major(rdev)}:{os.minor(rdev)}", start, end),)
    below: tuple[Area, ...] = ()
    if depth >= NESTING_MAX:
        return Footing(own, below)
    backing = _backing_of(directory)
    if backing is not None:
        first = backing.offset_bytes + start
        last = min(backing.offset_bytes + end, _WHOLE)
        if backing.limit_bytes:
            last = min(last, backing.offset_bytes + backing.limit_bytes)
        if backing.rdev:
            under = _disk_footing(backing.rdev, first, last, depth + 1)
        else:
            under = _file_footing(backing.device, backing.inode, first, last, depth + 1)
        own, below = own + under.own, below + under.below
    for slave in _names(directory / "slaves"):  # device mapper, md: which part of the slave is theirs is not told
        under = _disk_footing(device_number(directory / "slaves" / slave), 0, _WHOLE, depth + 1)
        below += under.own + under.below
    return Footing(own, below)


def _backing_of(directory: Path) -> kernelcalls.LoopBacking | None:
    """What a loop device lies on, by the driver's own word; by the path in /sys where we may not open the device."""
    if not (directory / "loop" / "backing_file").exists():
        return None
    try:
        fd = os.open(device_node(directory), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return kernelcalls.loop_backing(fd)
        finally:
            os.close(fd)
    except OSError:
        return _backing_by_path(directory)


def _backing_by_path(directory: Path) -> kernelcalls.LoopBacking | None:
    path = sys_value(directory / "loop" / "backing_file")
    if path is None:
        return None
    try:
        info = os.stat(path)
    except OSError:
        return None
    offset, limit = sys_number(directory / "loop" / "offset"), sys_number(directory / "loop" / "sizelimit")
    return kernelcalls.LoopBacking(info.st_dev, info.st_ino, info.st_rdev, offset, limit)


def loop_origin(rdev: int) -> tuple[str, int] | None:
    """Path of a loop device's backing file and the offset in it; None when the device is not a bound loop device."""
    directory = whole_disk_directory(rdev)
    path = sys_value(directory / "loop" / "backing_file")
    if path is None:
        return None
    return path, sys_number(directory / "loop" / "offset")


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


# --- who uses it ---------------------------------------------------------------------------------------------------


def mounts() -> list[Mount]:
    """The mounts of this process's namespace."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        tail = fields.index("-")
        major, minor = fields[2].split(":")
        point, origin = _unescape(fields[4]), _unescape(fields[tail + 2])
        device = os.makedev(int(major), int(minor))
        found.append(Mount(int(fields[0]), device, point, fields[tail + 1], origin))
    return found


def mount_of(path: str) -> Mount | None:
    """The mount that `path` is on, exactly (by the mount id of an open file, not by comparing names)."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    finally:
        os.close(fd)
    match = re.search(r"^mnt_id:\s*(\d+)", text, re.MULTILINE)
    mount_id = int(match.group(1)) if match else -1
    return next((mount for mount in mounts() if mount.mount_id == mount_id), None)


def _unescape(text: str) -> str:
    """/proc writes blanks and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def _swaps() -> Iterator[str]:
    """Paths of what is in use as swap."""
    try:
        lines = Path("/proc/swaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        yield _unescape(line.split()[0])


def mounted_at(path: str) -> str | None:
    """Where the storage at `path`, or anything that lies on it (loop device, partition, LVM), is mounted; "[swap]"."""
    leg = footing_of(path)
    return next(_mounts_on(leg), None) or ("[swap]" if any(_swaps_on(leg)) else None)


def uses_of(path: str) -> tuple[list[str], list[str]]:
    """All mount points of what mounted_at() looks at, the oldest mount first, and all swap files and devices."""
    leg = footing_of(path)
    return list(_mounts_on(leg)), list(_swaps_on(leg))


def _mounts_on(leg: Footing) -> Iterator[str]:
    for mount in mounts():
        mounted = _mount_footing(mount)
        if mounted is not None and mounted.lies_on(leg):
            yield mount.mount_point


def _swaps_on(leg: Footing) -> Iterator[str]:
    for swap in _swaps():
        try:
            if footing_of(swap).lies_on(leg):
                yield swap
        except OSError:
            continue


def _mount_footing(mount: Mount) -> Footing | None:
    """The disk below a mount. A btrfs mount has a device number of its own, so its origin is looked at."""
    if sys_directory(mount.device).is_dir():
        return disk_footing(mount.device)
    try:
        info = os.stat(mount.origin)
    except (OSError, ValueError):
        return None
    return disk_footing(info.st_rdev) if stat.S_ISBLK(info.st_mode) else None


def holders_of(path: str) -> tuple[str, ...]:
    """Kernel names of the other block devices that lie on this storage: loop devices, LVM, RAID.

    A disk's own partitions are part of it and not listed; whether one is in use is what mounted_at() and their own
    holders tell. What merely lies on the same disk below (a file system that the leg is a file of) is not a holder.
    """
    info = os.stat(path)
    leg = footing_of(path)
    family = whole_disk_directory(info.st_rdev) if stat.S_ISBLK(info.st_mode) else None
    found = []
    for name in _names(Path("/sys/dev/block")):
        directory = Path(os.path.realpath(f"/sys/dev/block/{name}"))
        if family is not None and family in (directory, directory.parent):
            continue
        if disk_footing(device_number(directory)).lies_on(leg):
            found.append(directory.name)
    return tuple(sorted(found))
