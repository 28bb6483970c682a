"""The agent as a service: what the service manager and its journal are told, and what lives on without the agent."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shadowvol.agent import client
from shadowvol.agent.paths import Home
from shadowvol.link.logs import HOST_VARIABLE, LEVEL_VARIABLE
from tests.support.foreground import foreground_agent, log_file, starting_agent
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

LIMIT_S = 60.0
HOST = "host-1"
LINE = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} (ERROR|WARNING|INFO|DEBUG) {HOST} (agent|v): .+")
JOURNAL_LINE = re.compile(rf"<(\d)>(ERROR|WARNING|INFO|DEBUG) {HOST} (agent|v): .+")
PRIORITIES = {"ERROR": "3", "WARNING": "4", "INFO": "6", "DEBUG": "7"}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST_VARIABLE, HOST)


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """Up, served by a member whose agent has been killed."""
    volume = Volume.make(product, make_source(legs / "source", 8 * MIB), legs / "target")
    product.kill("v", "agent")
    return volume


# ---- what the service manager is told ----


@contextmanager
def service_manager(address: str) -> Iterator[socket.socket]:
    """The receiving end of NOTIFY_SOCKET; "@" begins an address without a file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        receiver.settimeout(LIMIT_S)
        yield receiver


def told(receiver: socket.socket) -> list[str]:
    return receiver.recv(1 << 16).decode().splitlines()


@pytest.mark.parametrize("address", ["file", "@abstract"])
def test_ready_is_said_when_verbs_are_taken_and_clients_can_connect(
    product: Product, volume: Volume, tmp_path: Path, address: str
) -> None:
    """The member is dead, too, as after a boot. What the service manager starts next connects at once; it may have to
    wait, but it meets no missing or dead socket."""
    product.end()
    place = str(tmp_path / "notify") if address == "file" else f"@shadowvol-test-{os.getpid()}"
    with service_manager(place) as manager, starting_agent(product, environment={"NOTIFY_SOCKET": place}) as agent:
        assert told(manager) == ["READY=1", f"STATUS=1 volumes up, home {product.home}"]
        assert client.ping(Home(product.home)) is not None
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(Home(product.home).volume_socket("v")))
        member = product.pid("v", "member")
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{member}/environ").read_bytes()
        agent.send_signal(signal.SIGTERM)
        assert told(manager) == ["STOPPING=1", "STATUS=members go on"]
        assert agent.wait(LIMIT_S) == 0
        assert os.path.exists(f"/proc/{member}")


def test_an_agent_that_cannot_start_is_never_ready(product: Product, volume: Volume, tmp_path: Path) -> None:
    """Another one runs: exit code 3, and the line says how to replace it."""
    with service_manager(str(tmp_path / "notify")) as manager, foreground_agent(product) as running:
        ended = subprocess.run(
            [sys.executable, "-m", "shadowvol", "--home", str(product.home), "agent"],
            env=dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify")),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert ended.returncode == 3
        assert ended.stderr == (
            f"shadowvol: an agent is running already with home {product.home}; "
            f"to replace it: kill {running.pid} (its volumes go on)\n"
        )
        manager.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.recv(1)


def test_a_service_manager_that_hears_nothing_stops_no_agent(product: Product, volume: Volume, tmp_path: Path) -> None:
    nobody = str(tmp_path / "nobody")
    with foreground_agent(product, environment={"NOTIFY_SOCKET": nobody}):
        assert volume.run("up").strip() == volume.uri
        wait_for(lambda: "cannot be told READY=1" in product.log(), LIMIT_S, "the log says so")


# ---- the log ----


def own_lines(product: Product, start: int) -> list[str]:
    """From character `start`; nbdkit's own lines begin with its name."""
    lines = log_file(product).read_text()[start:].splitlines()
    return [line for line in lines if not re.match(r"nbdkit: ", line)]


def live_through_faults(volume: Volume) -> None:
    """Something to log for each process: a member, a copier and an agent are killed, a copy is made."""
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    for process in ("member", "transfer"):
        volume.product.kill("v", process)
        volume.product.pid("v", process)
    volume.run("throttle", "--rate", "none")
    volume.wait_synced()


def test_each_line_has_time_level_host_and_volume(product: Product, volume: Volume) -> None:
    start = len(log_file(product).read_text())
    with foreground_agent(product):
        live_through_faults(volume)
    lines = own_lines(product, start)
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert any(f"WARNING {HOST} v: the member is gone" in line for line in lines)
    assert any(f"INFO {HOST} agent: agent is ready" in line for line in lines)


def test_for_the_journal_each_line_has_its_priority_instead_of_the_time(product: Product, volume: Volume) -> None:
    start = len(log_file(product).read_text())
    stream = log_file(product).stat()
    environment = {"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"}
    with foreground_agent(product, "--log-level", "debug", environment=environment):
        live_through_faults(volume)
    matched = [(line, JOURNAL_LINE.fullmatch(line)) for line in own_lines(product, start)]
    assert [line for line, match in matched if match is None] == []
    levels = {(match.group(2), match.group(1)) for _, match in matched if match is not None}
    assert {("WARNING", "4"), ("INFO", "6"), ("DEBUG", "7")} <= levels <= set(PRIORITIES.items())


@pytest.mark.parametrize(("stream", "prefix"), [("{dev}:{ino}", "<3>"), ("{dev}:1{ino}", ""), ("junk", "")])
def test_a_traceback_and_a_refusal_are_errors_in_the_journal_line_by_line(
    tmp_path: Path, stream: str, prefix: str
) -> None:
    """Only where standard error is what JOURNAL_STREAM says."""
    file = tmp_path / "stderr"
    script = (
        "import logging; from shadowvol.link import logs; from shadowvol.cli.main import main; logs.configure()\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('x').exception('v: failed')\n"
        "main(['agent', '--log-level', 'loud'])\n"
    )
    with file.open("wb") as stderr:
        info = os.fstat(stderr.fileno())
        variable = stream.format(dev=info.st_dev, ino=info.st_ino)
        environment = dict(os.environ, JOURNAL_STREAM=variable, SHADOWVOL_HOME=str(tmp_path / "h"))
        command = [sys.executable, "-c", script]
        subprocess.run(command, stderr=stderr, env=environment, timeout=LIMIT_S, check=True)
    lines = file.read_text().splitlines()
    assert any("ZeroDivisionError" in line for line in lines) and any("not a log level" in line for line in lines)
    assert len(lines) >= 5 and {line[:3] == "<3>" for line in lines} == {bool(prefix)}


def test_the_level_is_passed_on_to_members_and_copiers(product: Product, volume: Volume) -> None:
    """At `error` nobody tells of a killed member, and what is started meanwhile knows the level."""
    start = len(log_file(product).read_text())
    with foreground_agent(product, "--log-level", "error", environment={LEVEL_VARIABLE: "debug"}):
        live_through_faults(volume)
        volume.run("throttle", "--rate", "1MiB/s")
        for process in ("member", "agent"):
            variables = Path(f"/proc/{product.pid('v', process)}/environ").read_bytes().split(b"\0")
            wanted = "error" if process == "member" else "debug"  # the agent's flag comes before its environment
            assert f"{LEVEL_VARIABLE}={wanted}".encode() in variables
    assert [line for line in own_lines(product, start) if " ERROR " not in line] == []


@pytest.mark.parametrize(("level", "logged"), [("warning", True), ("error", False)])
def test_a_member_logs_at_the_level_that_it_was_given(
    product: Product, volume: Volume, level: str, logged: bool
) -> None:
    """A leg that cannot be opened is a warning of the member's own."""
    product.run("up", "v")
    volume.run("start")
    volume.wait_synced()
    product.end()
    volume.target.rename(volume.target.with_name("elsewhere"))
    start = len(log_file(product).read_text())
    with foreground_agent(product, "--log-level", level):
        wait_for(lambda: volume.status()["legs"]["target"]["health"] == "failed", LIMIT_S, "the target has failed")
    lines = own_lines(product, start)
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert any(f"WARNING {HOST} v: cannot open the target" in line for line in lines) is logged
