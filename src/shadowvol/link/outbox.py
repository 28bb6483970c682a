"""What a trio task says on a stream socket, without waiting for it and without a task switch for each message.

`put` gives the bytes to the kernel at once; nearly always it takes them all. What it does not take is sent, in order,
by `send_rest`, in a task of its own. (A channel and a task that sends all cost two switches and a turn of trio's
scheduler for each message.)

When the other end is gone nothing is raised here: who receives from the same socket notices that.
"""

import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import trio

UNSENT_MAX = 10_000  # messages for an end that does not read


class Outbox:
    """Belongs to one connected socket, which it makes non-blocking; the caller closes that one."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._unsent: deque[tuple[memoryview, Sequence[Any]]] = deque()
        self._waiting = trio.Event()  # set while something is unsent
        self._gone = False

    def put(self, data: bytes, ancillary: Sequence[Any] = ()) -> None:
        """Send or queue; `ancillary` as of socket.sendmsg. Raises trio.WouldBlock where UNSENT_MAX wait already."""
        if len(self._unsent) >= UNSENT_MAX:
            raise trio.WouldBlock
        self._unsent.append((memoryview(data), ancillary))
        if len(self._unsent) == 1:
            self._send()
        if self._unsent:
            self._waiting.set()

    async def send_rest(self) -> None:
        """Until cancelled, or the other end is gone. Cancelled and called again it goes on where it was."""
        while not self._gone:
            await self._waiting.wait()
            while self._unsent:
                await trio.lowlevel.wait_writable(self._connection)
                self._send()
            self._waiting = trio.Event()

    def _send(self) -> None:
        """As much as the kernel takes now."""
        try:
            while self._unsent:
                data, ancillary = self._unsent[0]
                sent_bytes = self._connection.sendmsg([data], ancillary)
                if sent_bytes < len(data):
                    self._unsent[0] = (data[sent_bytes:], ())
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._gone = True
            self._unsent.clear()
            self._waiting.set()
