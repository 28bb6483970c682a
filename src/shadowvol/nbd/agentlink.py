"""The member's end of the link: connected to the agent whenever there is one, and never in the way of an I/O.

- `post` only queues. One thread sends, so that an agent that is stopped blocks that thread and nothing else.
- One thread connects (for ever, every 100 ms), says hello with the listening socket attached, and receives.
- What is queued while there is no agent is thrown away: the member asks again after each hello, and a leader repeats
  its requests until they are answered.
"""

import socket
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from shadowvol.core.messages import Answer, Ask, to_wire
from shadowvol.link.framing import Frame, receive_frame, send_frame

RECONNECT_S = 0.1
UNSENT_MAX = 64  # above this, an agent is not reading: what may be dropped (statistics) is

Message = Answer | Ask | dict[str, Any]


class AgentLink:
    """`hello` gives the first frame and descriptors; `connected` the asks to repeat; `received` obeys a frame.

    All three are called on the link's own thread, `connected` after the hello has been sent.
    """

    def __init__(
        self,
        path: str,
        hello: Callable[[], tuple[dict[str, Any], tuple[int, ...]]],
        connected: Callable[[], Iterable[Message]],
        received: Callable[[Frame], None],
        log: Callable[[str], None],
    ) -> None:
        self._path = path
        self._hello = hello
        self._connected = connected
        self._received = received
        self._log = log
        self._socket: socket.socket | None = None  # None: nothing is sent
        self._sending = threading.Lock()  # held while sending; a socket is closed only after that
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._stopping = threading.Event()

    def start(self) -> None:
        for run, name in ((self._receive_for_ever, "link"), (self._send_for_ever, "link-send")):
            threading.Thread(target=run, name=name, daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._outbox.put(None)
        _hang_up(self._socket)

    def post(self, message: Message) -> None:
        self._outbox.put(message)

    def post_if_read(self, message: Message) -> bool:
        """For what a slow agent need not get. False: it was dropped."""
        if self._socket is None or self._outbox.qsize() > UNSENT_MAX:
            return False
        self._outbox.put(message)
        return True

    # ------------------------------------------------------------------ the two threads

    def _send_for_ever(self) -> None:
        while (message := self._outbox.get()) is not None:
            with self._sending:
                connection = self._socket
                if connection is None:
                    continue
                try:
                    wire, blob = (message, b"") if isinstance(message, dict) else to_wire(message)
                    send_frame(connection, wire, blob)
                except Exception as error:
                    if not isinstance(error, OSError):
                        self._log(f"cannot send {message!r}: {error!r}")
                    _hang_up(connection)  # the receiving thread notices, and connects again

    def _receive_for_ever(self) -> None:
        while not self._stopping.is_set():
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.connect(self._path)
                    self._serve(connection)
            except (OSError, EOFError):
                pass  # no agent at the moment; it is the agent that reports that
            except Exception as error:
                self._log(f"link to the agent: {error!r}")
            self._stopping.wait(RECONNECT_S)

    def _serve(self, connection: socket.socket) -> None:
        message, descriptors = self._hello()
        send_frame(connection, message, b"", descriptors)
        self._socket = connection
        try:
            for ask in self._connected():
                self.post(ask)
            while True:
                frame, received = receive_frame(connection)
                for descriptor in received:
                    socket.close(descriptor)
                self._received(frame)
        finally:
            self._socket = None
            _hang_up(connection)  # a sender that blocks returns
            with self._sending:  # ... and has: the descriptor's number may be used again
                pass


def _hang_up(connection: socket.socket | None) -> None:
    """Wake whoever blocks on it; closing alone would not."""
    try:
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
