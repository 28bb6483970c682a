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
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.agent import client, verbs
from shadowvol.agent.access import apply_to_directories
from shadowvol.agent.client import AGENT_LOCK_HELD_EXIT
from shadowvol.agent.errors import FAILED, VerbError
from shadowvol.agent.metrics.address import MetricsAddress
from shadowvol.agent.metrics.reading import read_agent
from shadowvol.agent.notify import Notifier
from shadowvol.agent.pacing import Pacer
from shadowvol.agent.paths import Home, Settings, SettingsError
from shadowvol.agent.settings import AgentSettings
from shadowvol.agent.volume import Volume
from shadowvol.clustersync.coordinator import Coordinator, CoordinatorUnreachable, RecordDamaged
from shadowvol.clustersync.open import open_coordinator
from shadowvol.core.records import RecordError, VolumeConfig, decode_config, decode_state, volume_names
from shadowvol.link import journal, locks, logs
from shadowvol.link.framing import FramingError, close_all
from shadowvol.link.listening import listen_private
from shadowvol.link.triolink import TrioLink

if TYPE_CHECKING:
    from shadowvol.agent.metrics.endpoint import MetricsEndpoint

REQUEST_BYTES_MAX = 1 << 20
BACKLOG = 64
VOLUME_RESTART_S = 2.0
DOWN_FINISH_LIMIT_S = 20.0
LISTEN_LIMIT_S = 10.0  # for the sockets of what was up to be there, before the service manager starts what uses them

_logger = logging.getLogger("shadowvol.agent")


class Agent:
    """`volumes`: those that are up here, by name. `metrics`: the endpoint, where one is wanted."""

    def __init__(
        self, settings: Settings, agent_settings: AgentSettings, coordinator: Coordinator, notifier: Notifier
    ) -> None:
        self.home = settings.home
        self.state_url = settings.state_url
        self.coordinator = coordinator
        self.host = settings.host
        self._access = agent_settings.access
        self._notifier = notifier
        self.volumes: dict[str, Volume] = {}
        self.broken: dict[str, str] = {}  # volumes whose record does not check out
        self.pacer = Pacer(self.volumes, agent_settings.copies_max)
        self.coming_and_going: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)  # one up or down at a time
        self.metrics: MetricsEndpoint | None = None
        self._metrics_address = agent_settings.metrics
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
            _logger.info("agent: agent is ready, home %s", self.home.directory)
            await self._listening()
            self._notifier.ready(f"{len(self.volumes)} volumes up, home {self.home.directory}")

    async def _listening(self) -> None:
        """The clients of what was up can connect, and wait for the member; or it takes too long."""
        with trio.move_on_after(LISTEN_LIMIT_S):
            for volume in list(self.volumes.values()):
                await volume.listening.wait()

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
                _logger.error("%s: %s", name, self.broken[name])
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
            volume = Volume(self.home, self.coordinator, config, self.host, self._access, self.pacer)
            self.volumes[config.name] = volume
            self._nursery.start_soon(self._keep, volume)
        return volume

    async def _keep(self, volume: Volume) -> None:
        """A fault in one volume's supervision must not end the agent; its member goes on meanwhile."""
        try:
            await volume.run()
        except Exception as error:
            volume.error = VerbError(FAILED, str(error) if isinstance(error, RecordError) else _failed(volume, error))
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
            _logger.warning("agent: a member's link ended: %s", error)
            link.close()
        except Exception:
            _logger.exception("agent: a member's link failed")
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
            _logger.exception("agent: a request failed: %r", line[:200])
            code, text, data = 1, f"the agent failed at it: {error!r} (its log has more)", None
        _logger.debug("agent: answered %r with code %d %s", line[:200], code, text)
        return {"code": code, "text": text, "data": data}


def _failed(volume: Volume, error: Exception) -> str:
    return f"the supervision of volume {volume.name} failed ({error!r}), it is started again; the agent's log has more"


def _is_us(connection: trio.socket.SocketType) -> bool:
    """Only the user that runs the agent, or root, may speak to it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    assert isinstance(credentials, bytes)
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


async def _until_signal(agent: Agent, notifier: Notifier, control: socket.socket, links: socket.socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run, trio.socket.from_stdlib_socket(control), trio.socket.from_stdlib_socket(links))
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                _logger.info("agent: agent ends (%s); members go on", signal.Signals(number).name)
                notifier.stopping("members go on")
                nursery.cancel_scope.cancel()
                return


async def _main(
    settings: Settings, agent_settings: AgentSettings, coordinator: Coordinator, notifier: Notifier
) -> None:
    home = settings.home
    control, links = listen_private(home.agent_socket, BACKLOG), listen_private(home.link_socket, BACKLOG)
    try:
        agent = Agent(settings, agent_settings, coordinator, notifier)
        await _until_signal(agent, notifier, control, links)
    finally:
        home.agent_socket.unlink(missing_ok=True)
        with trio.CancelScope(shield=True):
            await coordinator.aclose()


def run_agent(settings: Settings, agent_settings: AgentSettings) -> int:
    """The agent in the foreground, until SIGTERM. Exit code as in DESIGN 12."""
    home = settings.home
    notifier = Notifier()
    logs.pass_on(agent_settings.log_level, settings.host)
    logs.configure()
    try:
        home.prepare()
        lock = locks.take(home.agent_lock)
        if lock is None:
            return _end(f"an agent is running already with home {home.directory}{_its_end(home)}", AGENT_LOCK_HELD_EXIT)
        apply_to_directories(agent_settings.access, home)
        coordinator = open_coordinator(settings.state_url)
    except (SettingsError, ValueError) as error:
        return _end(str(error), 2)
    except RecordDamaged as error:
        return _end(str(error), 1)
    except CoordinatorUnreachable as error:
        return _end(str(error), 6)
    trio.run(_main, settings, agent_settings, coordinator, notifier)
    return 0


def _its_end(home: Home) -> str:
    """How to end the agent that runs, as the rest of a sentence."""
    answer = client.ping(home)
    pid = answer.data.get("pid") if answer is not None and isinstance(answer.data, dict) else None
    return f"; to replace it: kill {pid} (its volumes go on)" if pid else ""


def _end(text: str, code: int) -> int:
    sys.stderr.write(f"{journal.prefix(journal.ERROR)}shadowvol: {text}\n")
    return code
