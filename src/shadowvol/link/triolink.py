"""The agent's end of the link, in trio. Apart from link/framing.py, so that a member does not have to load trio."""

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import trio

from shadowvol.link.framing import (
    ANCILLARY_BYTES,
    READ_BYTES_MAX,
    Decoder,
    Frame,
    close_all,
    encode,
    end_of_stream,
    rights,
    take_rights,
)
from shadowvol.link.outbox import Outbox

READ_BYTES = 64 << 10  # of one read: several small frames


class TrioLink:
    """One end of the link, in trio. Any number of tasks may put, one receives, one runs `send_rest`.

    It reads beyond the current frame, which the blocking end does not: the kernel ends a read with the bytes that
    descriptors were sent with (unix(7), "barrier"), so these belong to the frame in which the read ends.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = socket.socket(fileno=sock.detach())
        self._outbox = Outbox(self._sock)
        self._receive_guard = trio.Lock()
        self._decoder = Decoder()
        self._frames: deque[tuple[Frame, list[int]]] = deque()  # received, not yet delivered
        self._fds: list[int] = []  # received with the current frame

    def put(self, message: dict[str, Any], blob: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send, or queue for `send_rest`. Raises FramingError and trio.WouldBlock: nothing was sent. `fds` stay open
        until they are sent."""
        self._outbox.put(encode(message, blob), rights(fds))

    async def send_rest(self) -> None:
        """What the kernel does not take at once. Raises ClosedResourceError."""
        await self._outbox.send_rest()

    async def receive(self) -> tuple[Frame, list[int]]:
        """The next frame and its descriptors (close-on-exec; the caller's now). May be cancelled and called again.

        Raises EOFError where the peer closed between frames; FramingError, OSError, ClosedResourceError else.
        """
        try:
            self._receive_guard.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError("another task is receiving from this link") from None
        try:
            while not self._frames:
                if self._sock.fileno() < 0:
                    raise trio.ClosedResourceError("the link was closed")
                await trio.lowlevel.wait_readable(self._sock)
                self._read()
            return self._frames.popleft()
        finally:
            self._receive_guard.release()

    def _read(self) -> None:
        """What has come. Each of its frames is given the descriptors that belong to it."""
        read_bytes = max(READ_BYTES, min(self._decoder.wanted_bytes, READ_BYTES_MAX))
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(read_bytes, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        if not data:
            raise end_of_stream(self._decoder)
        held = len(self._fds)
        take_rights(ancillary, flags, self._fds)
        frames = self._decoder.feed(data)
        if frames:
            fds, new = self._fds[:held], self._fds[held:]
            self._frames.extend((frame, []) for frame in frames)
            self._frames[0][1].extend(fds)
            self._fds = new if self._decoder.inside_frame else []
            if not self._decoder.inside_frame:
                self._frames[-1][1].extend(new)

    def __aiter__(self) -> "TrioLink":
        return self

    async def __anext__(self) -> tuple[Frame, list[int]]:
        """Frames until the peer closes between two of them."""
        try:
            return await self.receive()
        except EOFError:
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Tasks that send or receive get ClosedResourceError."""
        close_all(self._fds)
        for _, fds in self._frames:
            close_all(fds)
        self._frames.clear()
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
