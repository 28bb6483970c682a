"""A volume as a device of the kernel's nbd driver, kept alive over restarts of the member.

The kernel gets a socket that has been through the handshake. When that link dies the driver tells so (LINK_DEAD), and
holds the device's requests for HOLD_S; a new socket handed over by RECONFIGURE lets them go on. What the rules are:

1. Listen to LINK_DEAD first, then hand a socket over once without having been asked: a link that died while nobody
   listened is mended by that. The driver takes a socket only in the place of a dead one, so one too many does no harm.
2. A request that was in flight on the dead link is sent again only when it is REQUEST_LIMIT_S old (the driver's time
   limit per request; without one it would never be). So that is the longest stall; and a leg that takes longer for one
   request makes the driver drop the link and ask again, which is slow but loses nothing: the member does overlapping
   writes one after the other, and one that died has written its last before the next one serves.
3. The device is marked as ours (its `backend` in /sys), so that the next agent finds it again. The driver refuses to
   hand such a device to anybody who does not name the mark.

Blocking, and nothing but the standard library: it also runs alone (`python -m shadowvol.nbd.kernelnbd`), where no
agent can be, as in the small guest of tests/guest, or to keep a device of nbd-client's alive.
"""

import argparse
import errno
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shadowvol.nbd import handshake, netlink
from shadowvol.nbd.handshake import Export, Handshake, Place
from shadowvol.nbd.netlink import NbdNetlink

REQUEST_LIMIT_S = 10  # see rule 2: as short as slow disks and long flushes allow
HOLD_S = 86_400  # for which the driver holds I/O without a link; then the device is dead
HANDSHAKE_LIMIT_S = 20.0  # a connection waits at the agent's socket while the member is being started
RETRY_S = 0.2
GONE_LIMIT_S = 10.0  # for a disconnected device to be free again
GONE_POLL_S = 0.02
_MODPROBE_LIMIT_S = 20
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

_logger = logging.getLogger("shadowvol.attach")


class DeviceLost(Exception):
    """The device is not what it was: what was open or mounted on it gets errors."""


def available() -> bool:
    """Whether the kernel has the driver; loads it where it is a module."""
    if os.path.isdir("/sys/module/nbd"):
        return True
    try:
        done = subprocess.run(
            ["modprobe", "nbd"], capture_output=True, timeout=_MODPROBE_LIMIT_S, env=dict(os.environ, PATH=_PATH)
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and os.path.isdir("/sys/module/nbd")


def is_connected(device: str) -> bool:
    return os.path.exists(f"/sys/block/{os.path.basename(device)}/pid")


def find(mark: str) -> str | None:
    """The connected device that carries this mark."""
    return next((device for device, marked in marks() if marked == mark), None)


def marks() -> Iterator[tuple[str, str]]:
    """Each connected device that carries a mark, and the mark."""
    for file in sorted(Path("/sys/block").glob("nbd*/backend")):
        try:
            marked = file.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError:
            continue
        if is_connected(file.parent.name):
            yield f"/dev/{file.parent.name}", marked


class KernelDevice:
    """One device. `supervise` keeps it alive until `stop`; one thread may do the one, any the other."""

    def __init__(self, device: str, place: Place, export: str, mark: str | None) -> None:
        self.device = device
        self._index = int(os.path.basename(device).removeprefix("nbd"))
        self._place = place
        self._export = export
        self._mark = mark  # None: somebody else connected it, and it carries none
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._attempt: Handshake | None = None

    # ------------------------------------------------------------ life

    @classmethod
    def connect(
        cls, place: Place, export: str, mark: str, device: str | None = None, request_limit_s: int = REQUEST_LIMIT_S
    ) -> "KernelDevice":
        """A new device, or this one. OSError: EBUSY where it is in use."""
        connection, told = Handshake(place).open(export, HANDSHAKE_LIMIT_S)
        with connection, NbdNetlink() as driver:
            wanted = [] if device is None else [netlink.u32(netlink.INDEX, _index_of(device))]
            answer = driver.ask(netlink.CONNECT, *wanted, *_attributes(told, connection, mark, request_limit_s))
        index = struct.unpack("=I", answer[netlink.INDEX])[0]
        found = cls(f"/dev/nbd{index}", place, export, mark)
        if find(mark) is None:
            found.let_go()
            raise OSError(errno.EOPNOTSUPP, "the kernel's nbd driver keeps no backend identifier (Linux 5.14 does)")
        return found

    def supervise(self) -> None:
        """Until stop(). Raises DeviceLost when the device has been disconnected."""
        with NbdNetlink(watch=True) as watch:
            self._renew()
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while not self._stopping.is_set():
                ready = {descriptor for descriptor, _ in poll.poll()}
                poked = self._wake in ready
                if poked:
                    os.eventfd_read(self._wake)
                dead = watch.dead_links() if watch.fileno() in ready else set()
                died = dead is None or self._index in dead
                if died:
                    _logger.warning("%s: the link of %s died", self._export, self.device)
                if poked or died:
                    self._renew()

    def poke(self) -> None:
        """Hand a new socket over, in case the old one is dead and nobody was told."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """supervise() returns soon; the device stays as it is."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        with self._lock:
            if self._attempt is not None:
                self._attempt.abandon()

    def let_go(self, claim: int = -1) -> None:
        """The end of the device. Whoever has it open keeps a dead one, until it closes it."""
        with NbdNetlink() as driver:
            driver.ask(netlink.DISCONNECT, netlink.u32(netlink.INDEX, self._index))

    def wait_gone(self) -> bool:
        deadline_s = time.monotonic() + GONE_LIMIT_S
        while is_connected(self.device) and time.monotonic() < deadline_s:
            time.sleep(GONE_POLL_S)
        return not is_connected(self.device)

    def __del__(self) -> None:
        os.close(self._wake)

    # ------------------------------------------------------------ links

    def _renew(self) -> None:
        """Hand a socket over; tried until it succeeds, since the member may be just starting."""
        while not self._stopping.is_set():
            try:
                self._hand_over()
                return
            except DeviceLost:
                raise
            except OSError as error:
                if self._stopping.is_set():
                    return
                _logger.warning("%s: no new link for %s yet: %s", self._export, self.device, error)
            if not is_connected(self.device):
                raise DeviceLost(f"{self.device} has been disconnected")
            select.select([self._wake], [], [], RETRY_S)

    def _hand_over(self) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            attempt = self._attempt = Handshake(self._place)
        try:
            connection, told = attempt.open(self._export, HANDSHAKE_LIMIT_S)
        finally:
            with self._lock:
                self._attempt = None
        with connection, NbdNetlink() as driver:
            if self._stopping.is_set():
                return
            size = Path(f"/sys/block/{os.path.basename(self.device)}/size")
            sectors = int(size.read_text(encoding="ascii")) if size.exists() else 0
            if sectors and sectors != told.size_bytes // handshake.SECTOR_BYTES:
                raise DeviceLost(f"{self.device} and the volume have different sizes")
            marked = [] if self._mark is None else [_mark_attribute(self._mark)]
            limits = netlink.u64(netlink.DEAD_CONN_TIMEOUT, HOLD_S)
            index = netlink.u32(netlink.INDEX, self._index)
            try:
                driver.ask(netlink.RECONFIGURE, index, *marked, limits, netlink.sockets(connection.fileno()))
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise DeviceLost(f"{self.device} has been disconnected, or is somebody else's now") from None
                raise


def _attributes(told: Export, connection: socket.socket, mark: str, request_limit_s: int) -> list[bytes]:
    return [
        netlink.u64(netlink.SIZE_BYTES, told.size_bytes),
        netlink.u64(netlink.BLOCK_SIZE_BYTES, told.block_bytes),
        netlink.u64(netlink.TIMEOUT, request_limit_s),
        netlink.u64(netlink.DEAD_CONN_TIMEOUT, HOLD_S),
        netlink.u64(netlink.SERVER_FLAGS, told.flags),
        netlink.sockets(connection.fileno()),
        _mark_attribute(mark),
    ]


def _mark_attribute(mark: str) -> bytes:
    return netlink.attribute(netlink.BACKEND_IDENTIFIER, mark.encode() + b"\0")


def _index_of(device: str) -> int:
    return int(os.path.basename(device).removeprefix("nbd"))


# ---------------------------------------------------------------- alone


def _place(text: str) -> Place:
    host, colon, port = text.rpartition(":")
    return (host, int(port)) if colon and "/" not in text else text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="shadowvol.nbd.kernelnbd", description="Keep a kernel nbd device alive, in the foreground."
    )
    parser.add_argument("place", type=_place, help="a unix socket, or HOST:PORT")
    parser.add_argument("export")
    parser.add_argument("--device", metavar="/dev/nbdN")
    parser.add_argument("--adopt", action="store_true", help="one that nbd-client -t has connected by netlink")
    parser.add_argument("--request-limit", type=int, default=REQUEST_LIMIT_S, metavar="SECONDS")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not available():
        sys.stderr.write("shadowvol: the kernel has no nbd driver\n")
        return 1
    if options.adopt and options.device is None:
        parser.error("--adopt needs --device")
    mark = f"shadowvol.nbd.kernelnbd {options.export}"
    there = find(mark)
    if options.adopt:
        device = KernelDevice(options.device, options.place, options.export, None)
    elif there is not None:
        device = KernelDevice(there, options.place, options.export, mark)
    else:
        place, limit_s = options.place, options.request_limit
        device = KernelDevice.connect(place, options.export, mark, options.device, limit_s)
    sys.stdout.write(f"{device.device}\n")
    sys.stdout.flush()
    try:
        device.supervise()
    except DeviceLost as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
