"""The handshake that ends with a socket for the kernel: what real servers say, and what others do."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from shadowvol.nbd.handshake import Handshake, HandshakeError, look
from shadowvol.nbd.netlink import NbdNetlink, NoNbdDriver, attribute, attributes, sockets, u32, u64
from tests.support.poll import wait_for

MIB = 1 << 20
LIMIT_S = 10.0


@contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[str]:
    path = folder / "socket"
    with subprocess.Popen(["nbdkit", "-f", "-U", str(path), *arguments]) as server:
        try:
            wait_for(path.exists, LIMIT_S, "the server listens")
            yield str(path)
        finally:
            server.kill()


@contextmanager
def saying(folder: Path, answer: bytes) -> Iterator[str]:
    """A server that says this to each client, and nothing more."""
    path = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client, suppress(OSError):  # the client may hang up first
                client.sendall(answer)
                client.recv(1000)
                client.recv(1000)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path


def test_it_learns_size_flags_and_smallest_request(tmp_path: Path) -> None:
    blocks = ("--filter=blocksize-policy", "memory", "3M", "blocksize-minimum=4096", "blocksize-preferred=4096")
    with nbdkit(tmp_path, *blocks) as path:
        told = look(path, "any", LIMIT_S)
    assert (told.size_bytes, told.block_bytes) == (3 * MIB, 4096)
    assert told.flags & 1 and told.flags & 1 << 2 and told.flags & 1 << 6  # has flags, flush, write zeroes


def test_the_socket_can_be_used_afterwards(tmp_path: Path) -> None:
    """A read, as the kernel would send it."""
    with nbdkit(tmp_path, "pattern", "1M") as path:
        connection, _ = Handshake(path).open("", LIMIT_S)
        with connection:
            request = bytes.fromhex("25609513000000000000000000000007") + (4096).to_bytes(8, "big")
            connection.sendall(request + (8).to_bytes(4, "big"))
            answer = connection.recv(24, socket.MSG_WAITALL)
    assert answer == bytes.fromhex("67446698000000000000000000000007") + (4096).to_bytes(8, "big")


def test_a_refused_export_is_named(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=exportname", "memory", "1M", "exportname-strict=true", "exportname=a") as path:
        with pytest.raises(HandshakeError, match="'b'"):
            look(path, "b", LIMIT_S)


def test_what_is_no_nbd_server_is_refused(tmp_path: Path) -> None:
    with saying(tmp_path, b"HTTP/1.1 400 Bad Request\r\n\r\n") as path, pytest.raises(HandshakeError):
        look(path, "", LIMIT_S)


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with saying(tmp_path, b"") as path, pytest.raises(TimeoutError):
        look(path, "", 0.2)


def test_an_attempt_can_be_abandoned(tmp_path: Path) -> None:
    with saying(tmp_path, b"") as path:
        attempt = Handshake(path)
        failed: list[OSError] = []

        def work() -> None:
            try:
                attempt.open("", LIMIT_S)
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        wait_for(lambda: attempt.connected, LIMIT_S, "it is connected")
        attempt.abandon()
        thread.join(LIMIT_S)
        assert failed


def test_netlink_attributes_are_padded_and_nested() -> None:
    packed = u32(1, 7) + attribute(10, b"abcde") + u64(4, 1 << 40) + sockets(9)
    assert len(packed) % 4 == 0
    found = dict(attributes(packed))
    assert (found[1], found[10], found[4]) == (b"\x07\0\0\0", b"abcde", (1 << 40).to_bytes(8, "little"))
    assert dict(attributes(dict(attributes(found[7]))[1])) == {1: b"\x09\0\0\0"}


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has the driver")
def test_a_kernel_without_the_driver_says_so() -> None:
    with pytest.raises(NoNbdDriver):
        NbdNetlink()
