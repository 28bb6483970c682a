"""The metrics endpoint: HTTP on threads of its own, so that no scraper can hold up the agent's loop.

- A scrape asks the loop for a reading (a few milliseconds of it, with other tasks between two volumes), and makes text
  from it on its own thread, one scrape at a time; the loop gets Python's lock back from it within SWITCH_S. A reading
  younger than READING_S is used again, and so is its text: members tell some times a second, and who scrapes in a loop
  shall cost the agent no more than that.
- A scraper that is slow, or hangs, has a thread and nothing else. There are at most CONNECTIONS_MAX; one more is closed
  at once. A connection older than CONNECTION_LIMIT_S is shut down, whatever it does.
- An address that cannot be used stops nothing: volumes are served, the log and `doctor` say why there are no metrics,
  and it is tried again every RETRY_S.
"""

import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import trio
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import Metric

from shadowvol.agent.metrics.address import MetricsAddress
from shadowvol.agent.metrics.families import families_of
from shadowvol.agent.metrics.reading import AgentReading

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CONNECTIONS_MAX = 8
CONNECTION_LIMIT_S = 10.0  # Prometheus itself gives up after 10 s
LOOK_S = 0.1  # how often the age of connections is looked at; an agent that ends waits as long
READING_S = 0.5
SWITCH_S = 0.0005  # for which the loop waits at most until a scrape's thread lets it go on; Python's own is 5 ms
RETRY_S = 5.0

_logger = logging.getLogger("shadowvol.agent")


class MetricsEndpoint:
    """Call run() in a task. `read` is called in the loop. `error`: why it is not being served, or None."""

    def __init__(self, address: MetricsAddress, read: Callable[[], Awaitable[AgentReading]]) -> None:
        self.address = address
        self.error: str | None = "it is starting"
        self._read = read

    def snapshot(self) -> dict[str, Any]:
        return {"url": self.address.url, "error": self.error}

    async def run(self) -> None:
        """Until cancelled."""
        sys.setswitchinterval(SWITCH_S)
        application = _Application(self._read, trio.lowlevel.current_trio_token())
        server = await self._bind(application)
        thread = threading.Thread(target=server.serve_forever, args=(LOOK_S,), name="metrics", daemon=True)
        thread.start()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):  # at most LOOK_S
                await trio.to_thread.run_sync(server.shutdown)
            server.server_close()
            server.shut_down_all()

    async def _bind(self, application: "WSGIApplication") -> "_Server":
        while True:
            try:
                server = _Server(self.address, application)
            except OSError as error:
                why = _reason(error)
                if why != self.error:
                    text = "metrics: %s cannot be used: %s; volumes are served all the same; trying again"
                    _logger.error(text, self.address.url, why)
                self.error = why
                await trio.sleep(RETRY_S)
            else:
                self.error = None
                _logger.info("metrics: %s", self.address.url)
                return server


def _reason(error: OSError) -> str:
    known = {
        errno.EADDRINUSE: "another process listens there",
        errno.EADDRNOTAVAIL: "this host has no such address",
        errno.EACCES: "no permission for this port",
    }
    return known.get(error.errno or 0) or os.strerror(error.errno or errno.EIO)


class _Readings:
    """The registry's collector: what the loop has read last, and again where that is old. One call at a time."""

    def __init__(self, read: Callable[[], Awaitable[AgentReading]], token: trio.lowlevel.TrioToken) -> None:
        self._read = read
        self._token = token
        self._reading: AgentReading | None = None
        self._read_at_s = 0.0

    def newest(self) -> AgentReading:
        if self._reading is None or time.monotonic() - self._read_at_s > READING_S:
            self._reading = trio.from_thread.run(self._read, trio_token=self._token)
            self._read_at_s = time.monotonic()
        return self._reading

    def collect(self) -> Iterable[Metric]:
        return families_of(self.newest())


class _Application:
    """prometheus_client's, below /metrics only, with an answer instead of a traceback, and with each answer used again
    while its reading is. Called on the threads of scrapes."""

    def __init__(self, read: Callable[[], Awaitable[AgentReading]], token: trio.lowlevel.TrioToken) -> None:
        self._readings = _Readings(read, token)
        registry = CollectorRegistry()
        registry.register(self._readings)
        self._metrics = make_wsgi_app(registry)
        self._one_at_a_time = threading.Lock()
        self._asked: tuple[AgentReading, str | None, str | None, str] | None = None
        self._answer: tuple[str, list[tuple[str, str]], list[bytes]] = ("", [], [])

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            return _plain(start_response, "404 Not Found", "metrics are at /metrics\n")
        try:
            with self._one_at_a_time:
                status, headers, body = self._answered(environ)
        except (trio.Cancelled, trio.RunFinishedError):
            return _plain(start_response, "503 Service Unavailable", "the agent ends\n")
        except Exception:
            _logger.exception("metrics: a scrape failed")
            return _plain(start_response, "500 Internal Server Error", "the agent failed at it; its log has more\n")
        start_response(status, list(headers))
        return body

    def _answered(self, environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]], list[bytes]]:
        """With the lock."""
        environ["QUERY_STRING"] = ""  # a choice by name[] would find nothing: our names are not known beforehand
        accept, encoding = environ.get("HTTP_ACCEPT"), environ.get("HTTP_ACCEPT_ENCODING")
        asked = (self._readings.newest(), accept, encoding, environ["REQUEST_METHOD"])
        if asked != self._asked:
            begun: list[Any] = []
            body = list(self._metrics(environ, lambda *status_and_headers: begun.extend(status_and_headers)))
            self._asked, self._answer = asked, (begun[0], begun[1], body)
        return self._answer


def _plain(start_response: "StartResponse", status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class _Server(ThreadingMixIn, WSGIServer):
    """Bound and listening once made; OSError if that fails. See the module for its limits."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: MetricsAddress, application: "WSGIApplication") -> None:
        self.address_family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        self._connections: dict[socket.socket, float] = {}  # since when
        self._connections_lock = threading.Lock()
        super().__init__((address.address, address.port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Without the look-up of our own name, which may take as long as a name server does. A restarted agent need not
        wait for the end of old connections."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            is_one_too_many = len(self._connections) >= CONNECTIONS_MAX
            if not is_one_too_many:
                self._connections[request] = time.monotonic()
        if is_one_too_many:
            self.close_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Called on the request's thread, at its end in any case."""
        super().shutdown_request(request)
        with self._connections_lock:
            self._connections.pop(request, None)

    def service_actions(self) -> None:
        """Called every LOOK_S."""
        self._shut_down(time.monotonic() - CONNECTION_LIMIT_S)

    def shut_down_all(self) -> None:
        self._shut_down(time.monotonic())

    def _shut_down(self, since_s: float) -> None:
        """Whoever reads from or writes to such a connection is woken, and ends."""
        with self._connections_lock:
            old = [connection for connection, begun_s in self._connections.items() if begun_s <= since_s]
        for connection in old:
            with suppress(OSError):  # it has just been closed
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away."""
        _logger.debug("metrics: a connection from %s ended", client_address, exc_info=True)
