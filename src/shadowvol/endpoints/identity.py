"""Which storage a LEG argument means, and whether it is fit to be a leg. Looks only; decides nothing about a migration.

- A leg is recognised again by what it *is*, never by device numbers, which change at a reboot: a file by file system
  and inode, a disk by its WWN, serial or partition UUID, a loop device by its backing file. Nothing that a copy
  overwrites (file-system UUID of the leg itself, its partition table) is part of an identity.
- Every refusal is a LegRefused with a sentence for the operator.
"""

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shadowvol.endpoints import blockdev, kernelcalls

VOLUME_UNIT_BYTES = 512  # volumes are multiples of this
PATH_BYTES_MAX = 4095  # PATH_MAX counts the NUL
BLKID_TIMEOUT_S = 30  # a probe of a hanging disk must end
_BLKID_NOTHING_FOUND, _BLKID_AMBIVALENT = 2, 8

_SIZE_PART = re.compile(r":size=\d+")
_NOT_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # the last: bytes that are not UTF-8, as Python shows them


class LegRefused(Exception):
    """This cannot be a leg; the message says why, for the operator."""


@dataclass(frozen=True, slots=True)
class LegSpec:
    """A LEG argument understood. `path` is absolute and resolved, except that names below /dev are kept as given:
    /dev/disk/by-id/… and /dev/mapper/… are the names that stay the same over a reboot."""

    argument: str
    path: str

    @staticmethod
    def parse(argument: str, directory: str | None = None) -> "LegSpec":
        """`directory` is where relative paths start (default: the current one). Raises LegRefused."""
        if not argument.strip():
            raise LegRefused("is empty; give a path")
        scheme, separator, _ = argument.partition("://")
        if separator and "/" not in scheme:
            if scheme in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
                raise LegRefused(f"{argument}: NBD legs are not supported yet")
            raise LegRefused(f"{argument}: unknown kind of leg, give a path")
        if "\0" in argument:
            raise LegRefused(f"{argument!a}: a path has no NUL byte")
        joined = os.path.join(directory or os.getcwd(), argument)
        absolute = os.path.normpath(joined)
        path = absolute if absolute.startswith("/dev/") else os.path.realpath(joined)
        if _NOT_TEXT.search(argument + path):
            raise LegRefused(f"{path!a}: a leg's path is UTF-8 without control characters; give it another name")
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise LegRefused(f"has a path of {len(os.fsencode(path))} bytes, the kernel allows {PATH_BYTES_MAX}")
        return LegSpec(argument, path)


@dataclass(frozen=True, slots=True)
class LegFacts:
    """What was found at a path."""

    path: str
    kind: Literal["file", "disk"]
    size_bytes: int
    logical_block_bytes: int
    identity: str
    signature: str | None  # what is on it: "ext4", "LVM2_member", "gpt"…
    mounted_at: str | None  # a mount point, or "[swap]"
    holders: tuple[str, ...]  # other block devices that lie on it


def probe(path: str) -> LegFacts:
    """Look at a leg. Raises LegRefused: missing, directory, unreadable, empty, odd size.

    Being mounted or held is only reported.
    """
    info = _stat_leg(path)
    is_disk = stat.S_ISBLK(info.st_mode)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LegRefused(f"{path}: cannot be read: {error.strerror}") from None
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        block_bytes = kernelcalls.logical_block_bytes(fd) if is_disk else VOLUME_UNIT_BYTES
    except OSError as error:
        raise LegRefused(f"{path}: cannot be examined: {error.strerror}") from None
    finally:
        os.close(fd)
    if size_bytes == 0:
        raise LegRefused(f"{path}: is empty (0 bytes)")
    if size_bytes % VOLUME_UNIT_BYTES:
        raise LegRefused(f"{path}: its size, {size_bytes} bytes, is not a multiple of {VOLUME_UNIT_BYTES}")
    return LegFacts(
        path=path,
        kind="disk" if is_disk else "file",
        size_bytes=size_bytes,
        logical_block_bytes=block_bytes,
        identity=identity_of(path),
        signature=signature(path),
        mounted_at=blockdev.mounted_at(path),
        holders=blockdev.holders_of(path),
    )


def _stat_leg(path: str) -> os.stat_result:
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise LegRefused(f"{path}: does not exist") from None
    except OSError as error:
        raise LegRefused(f"{path}: cannot be looked at: {error.strerror}") from None
    if stat.S_ISDIR(info.st_mode):
        raise LegRefused(f"{path}: is a directory")
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        raise LegRefused(f"{path}: is neither a file nor a block device")
    return info


def identity_of(path: str) -> str:
    """The identity string of DESIGN 8. Raises LegRefused or OSError when the path cannot be looked at."""
    info = _stat_leg(path)
    if stat.S_ISREG(info.st_mode):
        return f"file:{_file_system_identity(path, info)}:inode={info.st_ino}:size={info.st_size}"
    size_bytes = blockdev.sys_number(blockdev.sys_directory(info.st_rdev) / "size") * blockdev.SECTOR_BYTES
    directory = blockdev.sys_directory(info.st_rdev)
    partition = blockdev.sys_value(directory / "partition")
    suffix = f":partition={partition}" if partition else ""
    origin = blockdev.loop_origin(info.st_rdev)
    if origin is not None:
        backing, offset = origin
        if os.path.exists(backing):
            return f"loop:{identity_of(backing)}:offset={offset}{suffix}:size={size_bytes}"
        return f"loop:deleted={backing}:offset={offset}{suffix}:size={size_bytes}"
    return f"disk:{_disk_identity(info.st_rdev, path, partition)}:size={size_bytes}"


def other_medium(found: str, recorded: str) -> str | None:
    """Why what was found is not the leg that was recorded, or None: both are identities as identity_of() gives them."""
    if found == recorded:
        return None
    if medium_of(found) == medium_of(recorded):
        now, before = (identity.rpartition(":size=")[2] for identity in (found, recorded))
        return f"its size has changed: {now} bytes, {before} were recorded"
    return f"is another medium than before ({medium_of(found)}, not {medium_of(recorded)})"


def medium_of(identity: str) -> str:
    """An identity without its sizes."""
    return _SIZE_PART.sub("", identity)


def _file_system_identity(path: str, info: os.stat_result) -> str:
    """fs=UUID where the file system is on a disk that can be asked, else its statfs id, else what was mounted."""
    mount = blockdev.mount_of(path)
    file_system_id = os.statvfs(path).f_fsid
    if mount is not None:
        uuid = _uuid_of_device(info.st_dev, mount)
        if uuid and os.major(info.st_dev):
            return f"fs={uuid}"
        if uuid:  # btrfs: inode numbers repeat from subvolume to subvolume, which the statfs id tells apart
            return f"fs={uuid}/{file_system_id:x}"
        if file_system_id == 0:
            return f"fs={mount.fstype}/{mount.origin}"
    return f"fs=id-{file_system_id:x}"


def _uuid_of_device(device: int, mount: blockdev.Mount) -> str | None:
    """UUID of the file system on a mounted device: udev's links, else the device itself."""
    if os.major(device) == 0 and not mount.origin.startswith("/dev/"):
        return None
    node = blockdev.device_node(blockdev.sys_directory(device)) if os.major(device) else mount.origin
    try:
        number = os.stat(node).st_rdev
    except OSError:
        return None
    linked = _link_name("/dev/disk/by-uuid", number)
    return linked or _blkid(node).get("UUID")


def _link_name(folder: str, rdev: int) -> str | None:
    """The name in a folder of udev's links that points to this device."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    for name in names:
        try:
            if os.stat(os.path.join(folder, name)).st_rdev == rdev:
                return name
        except OSError:
            continue
    return None


def _disk_identity(rdev: int, path: str, partition: str | None) -> str:
    """The best name that a disk has for itself; its place in the machine when it has none."""
    if partition:
        uuid = _link_name("/dev/disk/by-partuuid", rdev) or _blkid(path).get("PART_ENTRY_UUID")
        if uuid:
            return f"partuuid={uuid}"
    directory = blockdev.whole_disk_directory(rdev)
    suffix = f":partition={partition}" if partition else ""
    sources = (
        ("wwn", "wwid"),  # NVMe
        ("wwn", "device/wwid"),  # SCSI
        ("dm", "dm/uuid"),
        ("md", "md/uuid"),
        ("serial", "serial"),  # virtio
        ("serial", "device/serial"),  # NVMe, MMC
    )
    for label, name in sources:
        value = blockdev.sys_value(directory / name)
        if value:
            return f"{label}={'_'.join(value.split())}{suffix}"
    place = Path(os.path.realpath(directory / "device"))
    if place.is_dir():
        return f"place={place.relative_to('/sys/devices')}{suffix}"
    return f"name={directory.name}{suffix}"


def signature(path: str) -> str | None:
    """What a low-level probe finds on a leg: a file system, LVM or RAID member, partition table; None when nothing.

    Raises LegRefused when it cannot be found out, so that a signature is never overlooked.
    """
    found = _blkid(path, strict=True)
    return found.get("TYPE") or found.get("PTTYPE")


def _blkid(path: str, strict: bool = False) -> dict[str, str]:
    """`blkid -p` as a dictionary. Not `strict`: nothing where it cannot probe."""
    command = shutil.which("blkid", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if command is None:
        if strict:
            raise LegRefused("the command blkid (package util-linux) is missing")
        return {}
    try:
        done = subprocess.run(
            [command, "-p", "-o", "export", "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BLKID_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        if strict:
            raise LegRefused(f"{path}: does not answer (blkid ran for {BLKID_TIMEOUT_S} s)") from None
        return {}
    if done.returncode == _BLKID_AMBIVALENT:
        return {"TYPE": "ambiguous"}
    if done.returncode == _BLKID_NOTHING_FOUND and not done.stderr.strip():
        return {}
    if done.returncode != 0:
        if strict:
            raise LegRefused(f"{path}: cannot be probed: {done.stderr.strip() or f'blkid exit {done.returncode}'}")
        return {}
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {key: value.replace("\\ ", " ") for key, separator, value in pairs if separator}


def same_storage(a: str, b: str) -> bool:
    """Whether a write to one path can change the other: another name, hard link or symlink of it, a loop device on it,
    a disk and its partition, a disk and a file on its file system. Raises OSError when either cannot be looked at."""
    one, other = blockdev.footing_of(a), blockdev.footing_of(b)
    return one.lies_on(other) or other.lies_on(one)
