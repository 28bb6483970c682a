"""In the guest: attach a volume as the agent does, by nbd/attach.py, and keep it; SIGTERM asks for a detach.

    python3 -m tests.support.guestattach HOST PORT VOLUME SECONDS

What the agent has, a unix socket of the volume, is made here out of the host's TCP port. Found again or new, the device
is printed. After SIGTERM: exit code 0 when it is gone, 3 with the reason when it is in use. Standard library only.
"""

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from shadowvol.nbd.attach import DeviceInUse, Site, claim

FOLDER = Path("/tmp")


def _forward(listener: socket.socket, place: tuple[str, int]) -> None:
    while True:
        inside, _ = listener.accept()
        threading.Thread(target=_connect, args=(inside, place), daemon=True).start()


def _connect(inside: socket.socket, place: tuple[str, int]) -> None:
    with inside, suppress(OSError), socket.create_connection(place) as outside:
        threading.Thread(target=_pump, args=(outside, inside), daemon=True).start()
        _pump(inside, outside)


def _pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(1 << 18):
            other.sendall(data)
    for each in (one, other):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def main() -> int:
    host, port, volume, limit_s = sys.argv[1:]
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it is waited for below
    path = FOLDER / f"{volume}.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    threading.Thread(target=_forward, args=(listener, (host, int(port))), daemon=True).start()
    site = Site(volume, path, FOLDER, f"guest {volume}", int(limit_s))
    device = site.find() or site.make(None)
    sys.stdout.write(f"{device.device}\n")
    sys.stdout.flush()
    supervising = threading.Thread(target=device.supervise)
    supervising.start()
    signal.sigwait({signal.SIGTERM})
    try:
        claimed = claim(device.device)  # flushed while the link is still minded
    except DeviceInUse as error:
        sys.stdout.write(f"refused: {device.device} {error}\n")
        sys.stdout.flush()
        os._exit(3)
    device.stop()
    supervising.join()
    site.remove(device, claimed)
    sys.stdout.write(f"gone, found: {site.find()}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
