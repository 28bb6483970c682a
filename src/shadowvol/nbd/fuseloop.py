"""A volume as a loop device, for kernels without the nbd driver: `bridge` shows it as one file through FUSE, and a loop
device with direct I/O lies on that file.

Order, up: lock, bridge, loop device. Down: loop device, FUSE mount, bridge, and with it the lock.

- The bridge holds NAME.attach (flock) for its life; who gets that lock knows that it is dead. It has a session of its
  own, so it outlives the agent, and it connects again when the member is restarted: requests wait meanwhile.
- When the bridge dies (nothing of ours ends it but a detach), its loop device is dead: it cannot be given another file
  that is written. What is mounted there gets errors; all that is left to do is to make a new device.
- Direct I/O is not for speed: with it nothing is cached between the device and the volume, and an fsync of the device
  reaches NBD's flush.

Not qemu-storage-daemon's FUSE export, which would do the same without code of ours: that of QEMU 7.2 (Debian 12) mixes
up the data of writes that are in flight side by side (docs/attach.md has the measurement).
"""

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shadowvol.endpoints import blockdev
from shadowvol.link import locks
from shadowvol.nbd import bridge, handshake
from shadowvol.nbd.kernelnbd import DeviceLost

LOOK_LIMIT_S = 20.0  # for the volume to answer at all
START_LIMIT_S = 40  # for the bridge to be ready
END_LIMIT_S = 10.0  # for the bridge to end, when its file is unmounted, and when it is killed
UNBIND_LIMIT_S = 10.0
POLL_S = 0.02
SUFFIX = ".disk"  # of the file
_LOOP_CLR_FD = 0x4C01
_COMMAND_LIMIT_S = 30
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


class FuseLoopError(Exception):
    """It could not be made, with the reason; nothing of it is left."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one volume's file and lock are, and the socket and export that it shows."""

    file: Path
    lock: Path
    socket: Path
    export: str


class LoopDevice:
    """One that is there. `supervise` returns after stop(), or raises DeviceLost."""

    def __init__(self, place: Place, device: str, pid: int) -> None:
        self.device = device
        self._place = place
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._process = _open_process(pid, place)

    def supervise(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._process is not None:
            poll.register(self._process, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake in ready:
                return
        raise DeviceLost(f"the process behind {self.device} (shadowvol.nbd.bridge) has ended, the device is dead")

    def poke(self) -> None:
        """The bridge connects again by itself."""

    def stop(self) -> None:
        os.eventfd_write(self._wake, 1)

    def __del__(self) -> None:
        os.close(self._wake)
        if self._process is not None:
            os.close(self._process)

    def let_go(self, claim: int) -> None:
        """`claim`: the device, opened for ourselves alone; it stays the caller's to close."""
        fcntl.ioctl(claim, _LOOP_CLR_FD)

    def wait_gone(self) -> bool:
        """After let_go() and after the claim was closed: the rest of it, in order."""
        if not _wait(lambda: _is_free(self.device), UNBIND_LIMIT_S):
            return False
        clear(self._place)
        return True


# ---------------------------------------------------------------- making


def find(place: Place) -> LoopDevice | None:
    """The one that is there and alive, made by whom ever. An unfinished one is no device: see make()."""
    if locks.is_free(place.lock):
        return None
    devices = _devices_on(place.file)
    pid = _recorded_pid(place)
    return LoopDevice(place, devices[0], pid) if devices and pid else None


def make(place: Place, device: str | None) -> LoopDevice:
    """A new one; what an earlier one left is removed. Raises FuseLoopError, OSError."""
    clear(place)
    told = handshake.look(str(place.socket), place.export, LOOK_LIMIT_S)
    place.file.touch(mode=0o600)
    try:
        _start(place)
        bound = _bind(place, device, told.block_bytes)
        pid = _recorded_pid(place)
        if pid is None:
            raise FuseLoopError("the bridge left no pid")
        return LoopDevice(place, bound, pid)
    except BaseException:
        clear(place)
        raise


def _start(place: Place) -> None:
    command = [sys.executable, "-m", "shadowvol.nbd.bridge", "--file", str(place.file), "--lock", str(place.lock)]
    done = _run([*command, "--socket", str(place.socket), "--export", place.export], "the bridge", START_LIMIT_S)
    if done.returncode:
        raise FuseLoopError(f"the volume cannot be shown as a file: {_last_line(done.stderr)}")


def _bind(place: Place, device: str | None, block_bytes: int) -> str:
    options = ["--direct-io=on", f"--sector-size={block_bytes}"]
    where = ["--find", "--show"] if device is None else [device]
    done = _run(["losetup", *options, *where, str(place.file)], "losetup")
    if done.returncode:
        raise FuseLoopError(f"losetup: {_last_line(done.stderr)}")
    bound = device or done.stdout.strip()
    if blockdev.sys_value(_sys(bound) / "loop" / "dio") != "1":
        raise FuseLoopError(f"the kernel does no direct I/O on {bound}")
    return bound


def clear(place: Place) -> None:
    """No loop device, no mount, no bridge of this place is left. For what nobody uses, or what is dead."""
    for device in _devices_on(place.file):
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _LOOP_CLR_FD)  # in use: when its last user closes it
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        finally:
            os.close(descriptor)
    while _is_mounted(place.file):
        done = _run(["umount", "--lazy", str(place.file)], "umount")
        if done.returncode:
            raise FuseLoopError(f"umount: {_last_line(done.stderr)}")
    _end_bridge(place)
    place.file.unlink(missing_ok=True)
    place.lock.unlink(missing_ok=True)  # only this agent starts bridges here, one at a time


def _end_bridge(place: Place) -> None:
    """Returns when its lock has fallen. It ends when its file is unmounted, unless it waits for a member just then."""
    if _wait(lambda: locks.is_free(place.lock), END_LIMIT_S if _recorded_pid(place) else 0.0):
        return
    process = _open_process(_recorded_pid(place), place)
    if process is not None:
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)
    if not _wait(lambda: locks.is_free(place.lock), END_LIMIT_S):
        raise FuseLoopError(f"a process that holds {place.lock} does not end")


# ---------------------------------------------------------------- looking


def _open_process(pid: int | None, place: Place) -> int | None:
    """A descriptor of the bridge, if this pid is it: the lock was still held when it had been opened."""
    if pid is None:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if blockdev.sys_value(Path(f"/proc/{pid}/comm")) == bridge.PROCESS_NAME and not locks.is_free(place.lock):
        return descriptor
    os.close(descriptor)
    return None


def _recorded_pid(place: Place) -> int | None:
    try:
        return int(place.lock.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _devices_on(file: Path) -> list[str]:
    return [device for device, backing in backings() if backing == str(file)]


def backings() -> Iterator[tuple[str, str]]:
    """Each loop device, and the file it lies on. One that goes away when its last user closes it does not count."""
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        if blockdev.sys_value(backing.with_name("autoclear")) != "1":
            file = (blockdev.sys_value(backing) or "").removesuffix(" (deleted)")
            yield f"/dev/{backing.parent.parent.name}", file


def _is_free(device: str) -> bool:
    return not (_sys(device) / "loop" / "backing_file").exists()


def _sys(device: str) -> Path:
    return Path("/sys/block") / os.path.basename(device)


def _is_mounted(file: Path) -> bool:
    return any(mount.mount_point == str(file) for mount in blockdev.mounts())


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def _run(command: list[str], what: str, limit_s: float = _COMMAND_LIMIT_S) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ, PATH=_PATH)
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env=environment,
            cwd="/",
            check=False,
        )
    except FileNotFoundError:
        raise FuseLoopError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise FuseLoopError(f"{what} did not end within {limit_s} s") from None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("shadowvol: ") if lines else "it did not say why"
