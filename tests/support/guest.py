"""A small virtual machine whose kernel has the nbd driver, and programs run in it: `with Guest(files) as guest`.

QEMU without KVM: slow, so nothing is measured in it. In the guest the host's loopback is 10.0.2.2; over that the
guest's first program (guestinit.py) connects to us and does what it is told, one JSON line each way.
"""

import json
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.guestimage import ROOT, Archive, image

HOST = "10.0.2.2"
BOOT_LIMIT_S = 120.0
CALL_LIMIT_S = 120.0
MEMORY_MIB = 512
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin HOME=/ PYTHONPATH=/src/src:/src PYTHONDONTWRITEBYTECODE=1
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev; mount -t tmpfs t /tmp
hostname guest
ln -sf /proc/mounts /etc/mtab
ln -s /usr/bin/python3.11 /usr/bin/python3
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
echo guest is up
python3 /src/tests/support/guestinit.py {host} {port}
poweroff -f
"""


class Guest:
    """`files`: what of the repository is to be in it, below /src. `disks`: raw images, /dev/vda and so on. Boots at
    once; close() is its loss of power."""

    def __init__(self, files: tuple[str, ...], log: Path, disks: tuple[Path, ...] = ()) -> None:
        self._log = log
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connection: socket.socket | None = None
        initrd = log.with_suffix(".initrd")
        folder = image()
        initrd.write_bytes((folder / "base.cpio.gz").read_bytes() + self._own(files))
        command = ["qemu-system-x86_64", "-M", "q35,usb=off", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
        command += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none", "-serial", f"file:{log}"]
        command += ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]
        for number, disk in enumerate(disks):
            command += ["-drive", f"file={disk},format=raw,if=none,id=disk{number}"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        command += ["-kernel", str(folder / "vmlinuz"), "-initrd", str(initrd)]
        command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            self._listener.settimeout(BOOT_LIMIT_S)
            self._connection, _ = self._listener.accept()
        except TimeoutError:
            self.close()
            raise AssertionError(f"the guest does not boot: {self.console()}") from None
        self._lines = self._connection.makefile("r")

    def _own(self, files: tuple[str, ...]) -> bytes:
        archive = Archive()
        port = self._listener.getsockname()[1]
        archive.file("init", _INIT.format(host=HOST, port=port).encode())
        for name in ("tests/support/guestinit.py", *files):
            archive.python(ROOT / name, f"src/{name}")
        return archive.packed()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._lines.close()
            self._connection.close()
        self._listener.close()
        self._process.kill()
        self._process.communicate(timeout=CALL_LIMIT_S)

    def console(self) -> str:
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""

    # ------------------------------------------------------------ what it does

    def run(self, *command: str, code: int = 0) -> str:
        """A program in the guest; what it prints."""
        done = self._call({"run": command})
        assert done["code"] == code, f"{command}: {done}\n{self.console()}"
        return str(done["out"])

    def start(self, *command: str, out: str = "/dev/null") -> int:
        """In its background; the pid. `out` is a file in the guest for all that it says."""
        return int(self._call({"start": command, "out": out})["pid"])

    def end(self, pid: int, signal_number: int) -> int:
        """Send a signal to what start() started; its exit code."""
        return int(self._call({"end": pid, "signal": signal_number})["code"])

    def text(self, path: str) -> str:
        return self.run("cat", path)

    def _call(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._connection is not None
        self._connection.settimeout(CALL_LIMIT_S)
        self._connection.sendall(json.dumps(order).encode() + b"\n")
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise AssertionError(f"the guest does not answer to {order}: {self.console()}") from None
        assert line, f"the guest has gone at {order}: {self.console()}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer


class Forward:
    """A TCP port on the host's loopback for a unix socket; each end's close is told to the other."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Forward":
        return self

    def __exit__(self, *unused: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                outside, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(outside,), daemon=True).start()

    def _connect(self, outside: socket.socket) -> None:
        with outside, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inside, suppress(OSError):
            inside.connect(self._path)
            back = threading.Thread(target=_pump, args=(inside, outside), daemon=True)
            back.start()
            _pump(outside, inside)
            back.join()


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Until one of the two has ended; then both have."""
    with suppress(OSError):
        while data := one.recv(1 << 18):
            other.sendall(data)
    for each in (one, other):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
