"""The agent: one per host and home. Supervises members and copiers, leads volumes, answers the CLI.

Ordering: agent.lock first (one agent), then the record of truth, then the sockets, then the volumes that were up.
Ending it (SIGTERM, SIGINT, kill -9) stops no application's I/O: members go on, and the next agent finds them again.
"""

import json
import logging
import os
import signal
import socket
import struct
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.agent import verbs
from shadowvol.agent.client import AGENT_LOCK_HELD_EXIT
from shadowvol.agent.metrics.address import MetricsAddress
from shadowvol.agent.metrics.reading import read_agent
from shadowvol.agent.pacing import Pacer
from shadowvol.agent.paths import Home
from shadowvol.agent.volume import Volume
from shadowvol.clustersync.coordinator import Coordinator, CoordinatorUnreachable, RecordDamaged
from shadowvol.clustersync.open import open_coordinator
from shadowvol.core.records import RecordError, VolumeConfig, decode_config, decode_state, volume_names
from shadowvol.link import locks
from shadowvol.link.framing import FramingError, close_all
from shadowvol.link.triolink import TrioLink

if TYPE_CHECKING:
    from shadowvol.agent.metrics.endpoint import MetricsEndpoint

REQUEST_BYTES_MAX = 1 << 20
BACKLOG = 64
VOLUME_RESTART_S = 2.0
DOWN_FINISH_LIMIT_S = 20.0

_logger = logging.getLogger("shadowvol.agent")


class Agent:
    """`volumes`: those that are up here, by name. `metrics`: the endpoint, where one is wanted."""

    def __init__(
        self,
        home: Home,
        coordinator: Coordinator,
        state_url: str,
        host: str,
        metrics_address: MetricsAddress | None = None,
    ) -> None:
        self.home = home
        self.state_url = state_url
        self.coordinator = coordinator
        self.host = host
        self.volumes: dict[str, Volume] = {}
        self.broken: dict[str, str] = {}  # volumes whose record does not check out
        self.pacer = Pacer(self.volumes)
        self.coming_and_going: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)  # one up or down at a time
        self.metrics: MetricsEndpoint | None = None
        self._metrics_address = metrics_address
        self._nursery: trio.Nursery | None = None

    async def run(self, control: trio.socket.SocketType, links: trio.socket.SocketType) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._accept, links, self._serve_link)
            if self._metrics_address is not None:
                nursery.start_soon(self._serve_metrics, self._metrics_address)
            nursery.start_soon(self.pacer.run)
            await self._restore()
            nursery.start_soon(self._accept, control, self._serve_control)
            _logger.info("%s: agent is ready, home %s", self.host, self.home.directory)

    async def _serve_metrics(self, address: MetricsAddress) -> None:
        """Whatever happens to it, volumes are served. Its library is loaded only here."""
        try:
            from shadowvol.agent.metrics.endpoint import MetricsEndpoint

            self.metrics = MetricsEndpoint(address, partial(read_agent, self))
            await self.metrics.run()
        except ImportError as error:
            _logger.error("metrics: not served, volumes are: %s; scripts/setup installs it", error)
        except Exception:
            _logger.exception("metrics: not served any more, volumes are")
            if self.metrics is not None:
                self.metrics.error = "it failed; the agent's log has more"

    async def _restore(self) -> None:
        """Bring up what was up."""
        snapshot = await self.coordinator.read("volumes/")
        for name in volume_names(snapshot.entries):
            try:
                config = decode_config(snapshot.entries[f"volumes/{name}/config"].value)
                state = decode_state(snapshot.entries[f"volumes/{name}/state"].value)
            except (ValueError, KeyError, TypeError) as error:
                self.broken[name] = f"the record of volume {name} does not check out: {error}"
                _logger.error("%s", self.broken[name])
                continue
            if state.up:
                self.bring_up(config)
            elif not locks.is_free(self.home.member_lock(name)):
                assert self._nursery is not None
                self._nursery.start_soon(self._finish_down, config)

    async def _finish_down(self, config: VolumeConfig) -> None:
        """An agent ended in the middle of `down`: the member it left serves nobody, and must not outlive the volume."""
        _logger.warning("%s: finishing a down that was under way", config.name)
        volume = self.bring_up(config)
        await volume.wait_serving(DOWN_FINISH_LIMIT_S)
        await volume.take_down(force=True)

    def bring_up(self, config: VolumeConfig) -> Volume:
        """Start serving the volume on this host, if it is not being served already."""
        assert self._nursery is not None
        volume = self.volumes.get(config.name)
        if volume is None or volume.ended.is_set():
            volume = Volume(self.home, self.coordinator, config, self.host, self.pacer)
            self.volumes[config.name] = volume
            self._nursery.start_soon(self._keep, volume)
        return volume

    async def _keep(self, volume: Volume) -> None:
        """A fault in one volume's supervision must not end the agent; its member goes on meanwhile."""
        try:
            await volume.run()
        except Exception as error:
            volume.error = f"supervision failed: {error!r}"
            _logger.exception("%s: supervision failed; starting it again", volume.name)
            await trio.sleep(VOLUME_RESTART_S)
            if self.volumes.get(volume.name) is volume and not isinstance(error, RecordError):
                del self.volumes[volume.name]
                self.bring_up(volume.config)
            elif isinstance(error, RecordError):
                self.broken[volume.name] = str(error)
        else:
            if self.volumes.get(volume.name) is volume:
                del self.volumes[volume.name]

    # ------------------------------------------------------------ sockets

    async def _accept(self, listener: trio.socket.SocketType, serve: Any) -> None:
        assert self._nursery is not None
        while True:
            connection, _ = await listener.accept()
            if not _is_us(connection):
                connection.close()
                continue
            self._nursery.start_soon(serve, connection)

    async def _serve_link(self, connection: trio.socket.SocketType) -> None:
        """A member's link: the first frame says whose."""
        link = TrioLink(connection)
        try:
            with trio.fail_after(10):
                frame, fds = await link.receive()
            volume = self.volumes.get(frame.message.get("volume", ""))
            if frame.message.get("type") != "Hello" or volume is None or volume.plane is None:
                close_all(fds)
                link.close()
                return
            await volume.plane.serve_link(link, frame.message, fds)
        except (OSError, EOFError, FramingError, trio.TooSlowError, trio.ClosedResourceError) as error:
            _logger.warning("a member's link ended: %s", error)
            link.close()
        except Exception:
            _logger.exception("a member's link failed")
            link.close()

    async def _serve_control(self, connection: trio.socket.SocketType) -> None:
        """One request line, one answer line."""
        stream = trio.SocketStream(connection)
        try:
            line = b""
            while not line.endswith(b"\n") and len(line) < REQUEST_BYTES_MAX:
                data = await stream.receive_some()
                if not data:
                    return
                line += data
            answer = await self._answer(line)
            await stream.send_all(json.dumps(answer).encode() + b"\n")
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the CLI went away; what it asked for is done or refused all the same
        finally:
            await stream.aclose()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if request.get("state_url") not in (None, self.state_url):
                other = f"the agent of {self.home.directory} works on the state {self.state_url}"
                return {"code": 2, "text": f"{other}, not on {request['state_url']}", "data": None}
            code, text, data = await verbs.perform(
                self, request["verb"], request.get("volume"), request.get("options") or {}
            )
        except CoordinatorUnreachable as error:
            code, text, data = 6, f"the record of truth cannot be reached: {error}", None
        except (RecordDamaged, RecordError) as error:
            code, text, data = 1, str(error), None
        except Exception as error:
            _logger.exception("a request failed: %r", line[:200])
            code, text, data = 1, f"the agent failed at it: {error!r} (its log has more)", None
        return {"code": code, "text": text, "data": data}


def _is_us(connection: trio.socket.SocketType) -> bool:
    """Only the user that runs the agent, or root, may speak to it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    assert isinstance(credentials, bytes)
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def _listen(path: Path) -> trio.socket.SocketType:
    """Only the holder of agent.lock calls this, so a socket that is there is stale."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old_mask)
    listener.listen(BACKLOG)
    return trio.socket.from_stdlib_socket(listener)


async def _until_signal(agent: Agent, control: trio.socket.SocketType, links: trio.socket.SocketType) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run, control, links)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                _logger.info("%s: agent ends (%s); members go on", agent.host, signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                return


async def _main(
    home: Home, coordinator: Coordinator, state_url: str, host: str, metrics: MetricsAddress | None
) -> None:
    control, links = _listen(home.agent_socket), _listen(home.link_socket)
    try:
        await _until_signal(Agent(home, coordinator, state_url, host, metrics), control, links)
    finally:
        home.agent_socket.unlink(missing_ok=True)
        with trio.CancelScope(shield=True):
            await coordinator.aclose()


def run_agent(home: Home, state_url: str, host: str, metrics: MetricsAddress | None = None) -> int:
    """The agent in the foreground, until SIGTERM. Exit code as in DESIGN 12. `metrics`: where to serve them."""
    logging.basicConfig(
        level=os.environ.get("SHADOWVOL_LOG_LEVEL", "INFO").upper(),
        format=f"%(asctime)s %(levelname)s {host} %(message)s",
        stream=sys.stderr,
    )
    home.prepare()
    lock = locks.take(home.agent_lock)
    if lock is None:
        sys.stderr.write(f"shadowvol: an agent is running already with home {home.directory}\n")
        return AGENT_LOCK_HELD_EXIT
    try:
        coordinator = open_coordinator(state_url)
    except ValueError as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        return 2
    except (RecordDamaged, CoordinatorUnreachable) as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        return 6 if isinstance(error, CoordinatorUnreachable) else 1
    trio.run(_main, home, coordinator, state_url, host, metrics)
    return 0
