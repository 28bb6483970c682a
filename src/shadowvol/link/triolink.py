"""The agent's end of the link, in trio. Apart from link/framing.py, so that a member does not have to load trio."""

import socket
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


class TrioLink:
    """One end of the link, in trio. Any number of tasks may send, one receives.

    A `send` that was cancelled in the middle of a frame breaks the link: later sends raise BrokenResourceError.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._send_lock = trio.StrictFIFOLock()
        self._send_broken = False
        self._receive_guard = trio.Lock()
        self._decoder = Decoder()
        self._fds: list[int] = []  # received with the current frame

    async def send(self, message: dict[str, Any], blob: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Raises FramingError (nothing was sent), OSError, BrokenResourceError, ClosedResourceError."""
        ancillary = rights(fds)
        data = memoryview(encode(message, blob))
        async with self._send_lock:
            if self._send_broken:
                raise trio.BrokenResourceError("an earlier frame was not sent to its end")
            sent_bytes = 0
            try:
                while sent_bytes < len(data):
                    sent_bytes += await self._sock.sendmsg([data[sent_bytes:]], ancillary if sent_bytes == 0 else [])
            except BaseException:
                self._send_broken = sent_bytes > 0
                raise

    async def receive(self) -> tuple[Frame, list[int]]:
        """The next frame and its descriptors (close-on-exec; the caller's now). May be cancelled and called again.

        Raises EOFError where the peer closed between frames; FramingError, OSError, ClosedResourceError else.
        """
        try:
            self._receive_guard.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError("another task is receiving from this link") from None
        try:
            while True:
                wanted_bytes = min(self._decoder.wanted_bytes, READ_BYTES_MAX)
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    wanted_bytes, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                take_rights(ancillary, flags, self._fds)
                if not data:
                    raise end_of_stream(self._decoder)
                frames = self._decoder.feed(data)
                if frames:
                    fds, self._fds = self._fds, []
                    return frames[0], fds
        finally:
            self._receive_guard.release()

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
        self._sock.close()
