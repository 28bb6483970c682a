"""A volume as a file: the process that takes FUSE requests from the kernel and asks the member, over NBD, to do them.

    python -m shadowvol.nbd.bridge --file F --lock L --socket S --export NAME

One thread. A request is remembered until the member has answered it, so when the connection ends (the member was
killed), all that are open are sent again over the next one, and the kernel sees nothing but a delay, however long. An
error that the member tells is the application's. To repeat a write is harmless: whoever waits for it cannot have
written there again, and of the member that died nothing can still land (its lock was free before the next one served).

The order: 1. the lock, which it holds for its life; 2. look at the volume; 3. mount the file; 4. into the background,
in a session of its own: neither the agent's end nor a terminal's ends it. It ends when the file is unmounted. Killed,
it leaves a file, and so a block device, that gives errors.

Exit codes: 3 the lock is held; 1 something else, one line on stderr.
"""

import argparse
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shadowvol.nbd.fusefile import FALLOCATE, FSYNC, READ, FuseFile, Request
from shadowvol.nbd.handshake import Handshake
from shadowvol.nbd.serve import LOCK_HELD_EXIT, lock_memory, protect_process

PROCESS_NAME = "shadowvol-disk"
HANDSHAKE_LIMIT_S = 20.0  # a connection waits at the agent's socket while the member is being started
RETRY_FIRST_S, RETRY_LAST_S = 0.02, 0.5  # between attempts while nobody listens: the agent is dead as well
OUTBOX_BYTES_MAX = 4 << 20  # past it no request is taken, so that a slow member is felt above
ZERO_BYTES_MAX = 1 << 30  # in one NBD request, whose length has 32 bits

_READ, _WRITE, _FLUSH, _WRITE_ZEROES = 0, 1, 3, 6
_NO_HOLE = 1 << 1
_HAS_FLUSH, _HAS_WRITE_ZEROES = 1 << 2, 1 << 6
_REQUEST, _REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_RECEIVE_BYTES = 1 << 16
_PR_SET_NAME = 15
_DESCRIPTOR_MIN = 10  # the lock's, above those of stdin and its like


class LinkDied(Exception):
    """The connection to the member has ended, or makes no sense any more."""


@dataclass(slots=True)
class Part:
    """One NBD request, of one FUSE request."""

    request: Request
    kind: int
    flags: int
    offset: int
    length: int


class Link:
    """One connection: what is to be sent, and what has come of the answer that is being received."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._outbox: deque[memoryview] = deque()
        self.outbox_bytes = 0
        self._head = bytearray(_REPLY.size)
        self._wanted = memoryview(self._head)  # what is still to be filled
        self._cookie = 0
        self._data: bytearray | None = None  # of a read, once its head is there

    def queue(self, cookie: int, part: Part) -> None:
        head = _REQUEST.pack(_REQUEST_MAGIC, part.flags, part.kind, cookie, part.offset, part.length)
        for piece in (head, part.request.data) if part.kind == _WRITE else (head,):
            self._outbox.append(memoryview(piece))
            self.outbox_bytes += len(piece)

    def send(self) -> None:
        """As much as goes."""
        try:
            while self._outbox:
                sent = self.socket.send(self._outbox[0])
                self.outbox_bytes -= sent
                if sent < len(self._outbox[0]):
                    self._outbox[0] = self._outbox[0][sent:]
                else:
                    self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkDied(str(error)) from None

    def receive(self, parts: dict[int, Part]) -> tuple[int, int, bytearray] | None:
        """(cookie, error, data read) of one answer, or None: not wholly there yet."""
        while True:
            while self._wanted:
                try:
                    count = self.socket.recv_into(self._wanted)
                except BlockingIOError:
                    return None
                except OSError as error:
                    raise LinkDied(str(error)) from None
                if not count:
                    raise LinkDied("the member hung up")
                self._wanted = self._wanted[count:]
            if self._data is not None:
                return self._complete(0, self._data)
            magic, code, self._cookie = _REPLY.unpack(self._head)
            part = parts.get(self._cookie)
            if magic != _REPLY_MAGIC or part is None:
                raise LinkDied("its answer makes no sense")
            if code == errno.ESHUTDOWN:  # one that ends says so; what it did not do, the next one does
                raise LinkDied("the member ends")
            if code or part.kind != _READ:
                return self._complete(code, bytearray())
            self._data = bytearray(part.length)
            self._wanted = memoryview(self._data)

    def _complete(self, error: int, data: bytearray) -> tuple[int, int, bytearray]:
        self._data, self._wanted = None, memoryview(self._head)
        return self._cookie, error, data


class Bridge:
    """Call run(): it returns when the file is unmounted."""

    def __init__(self, file: FuseFile, place: str, export: str) -> None:
        self._file = file
        self._place = place
        self._export = export
        self._parts: dict[int, Part] = {}  # in the order in which they came
        self._open: dict[int, int] = {}  # parts that a request still waits for, by its `unique`
        self._errors: dict[int, int] = {}
        self._cookie = 0
        self._flags = 0

    def run(self) -> None:
        while True:
            link = self._connect()
            try:
                self._serve(link)
            except LinkDied:
                continue
            except EOFError:
                return
            finally:
                link.socket.close()

    def _connect(self) -> Link:
        """A connection on which everything that is open has been asked again."""
        delay_s = RETRY_FIRST_S
        while True:
            try:
                connection, told = Handshake(self._place).open(self._export, HANDSHAKE_LIMIT_S)
            except OSError:
                time.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_LAST_S)
                continue
            self._flags = told.flags
            link = Link(connection)
            for cookie, part in self._parts.items():
                link.queue(cookie, part)
            return link

    def _serve(self, link: Link) -> None:
        poll = select.poll()
        poll.register(link.socket, select.POLLIN)
        poll.register(self._file, select.POLLIN)
        while True:
            link.send()
            poll.modify(link.socket, select.POLLIN | (select.POLLOUT if link.outbox_bytes else 0))
            takes = link.outbox_bytes < OUTBOX_BYTES_MAX
            poll.modify(self._file, select.POLLIN if takes else 0)
            ready = {descriptor for descriptor, _ in poll.poll()}
            if link.socket.fileno() in ready:
                while (answer := link.receive(self._parts)) is not None:
                    self._answered(*answer)
            if takes and self._file.fileno() in ready:
                request = self._file.next()
                if request is not None:
                    self._ask(link, request)

    def _ask(self, link: Link, request: Request) -> None:
        parts = self._split(request)
        if not parts:
            return
        self._open[request.unique] = len(parts)
        for part in parts:
            self._cookie += 1
            self._parts[self._cookie] = part
            link.queue(self._cookie, part)

    def _split(self, request: Request) -> list[Part]:
        if request.kind == FSYNC:
            if self._flags & _HAS_FLUSH:
                return [Part(request, _FLUSH, 0, 0, 0)]
            self._file.done(request)
        elif request.kind == FALLOCATE:
            if self._flags & _HAS_WRITE_ZEROES:
                flags = 0 if request.may_punch else _NO_HOLE
                end = request.offset + request.length
                starts = range(request.offset, end, ZERO_BYTES_MAX)
                return [Part(request, _WRITE_ZEROES, flags, at, min(ZERO_BYTES_MAX, end - at)) for at in starts]
            self._file.failed(request, errno.EOPNOTSUPP)
        else:
            kind = _READ if request.kind == READ else _WRITE
            return [Part(request, kind, 0, request.offset, request.length)]
        return []

    def _answered(self, cookie: int, error: int, data: bytearray) -> None:
        request = self._parts.pop(cookie).request
        unique = request.unique
        if error:
            self._errors.setdefault(unique, error)
        self._open[unique] -= 1
        if self._open[unique]:
            return
        del self._open[unique]
        failed = self._errors.pop(unique, 0)
        if failed:
            self._file.failed(request, failed)
        else:
            self._file.done(request, data)


def _take_lock(path: str) -> int:
    low = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    lock = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _DESCRIPTOR_MIN)
    os.close(low)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"shadowvol: {path} is held\n")
        raise SystemExit(LOCK_HELD_EXIT) from None
    return lock


def _into_background(lock: int) -> None:
    """The parent ends; the child writes its pid into the lock, where it is true as long as the lock is held."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os._exit(0 if os.read(reading, 1) else 1)
    os.close(reading)
    os.setsid()
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(writing, b"1")
    os.close(writing)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="shadowvol.nbd.bridge", description="Show a volume as a file.")
    for name in ("--file", "--lock", "--socket", "--export"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    lock = _take_lock(options.lock)
    try:
        connection, told = Handshake(options.socket).open(options.export, HANDSHAKE_LIMIT_S)
        connection.close()
        file = FuseFile(Path(options.file), told.size_bytes)
    except OSError as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        raise SystemExit(1) from None
    _into_background(lock)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, PROCESS_NAME.encode(), 0, 0, 0)
    protect_process()
    lock_memory()
    Bridge(file, options.socket, options.export).run()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
