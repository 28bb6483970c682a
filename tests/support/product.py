"""shadowvol as its operator runs it: the real command, a home of the test's own, and everything ended at the end.

`Product` is one host; `Volume` one of its volumes, with the legs that the test made for it. Every verb goes through
the command line and its exit code is checked, so a test that uses a volume tests the command as well.
"""

import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowvol.agent import client
from shadowvol.agent.paths import Home
from tests.support.interruption import ended_by_signals
from tests.support.poll import wait_for

COMMAND = str(Path(sysconfig.get_paths()["scripts"]) / "shadowvol")
VERB_LIMIT_S = 60
DEADLINE_S = 60.0
MIB = 1 << 20
_DATA_STEP = 1 << 20


class Product:
    """One host's shadowvol. `run` asserts the exit code; `home` is short, since sockets live below it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str, code: int = 0, limit_s: float = VERB_LIMIT_S) -> str:
        """The verb's standard output."""
        done = self.result(*arguments, limit_s=limit_s)
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def refused(self, *arguments: str, code: int = 3) -> str:
        """What the verb says on standard error, while it ends with `code`."""
        done = self.result(*arguments)
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}"
        assert done.stderr.startswith("shadowvol: ") and done.stderr.count("\n") <= 2, done.stderr
        return done.stderr

    def result(self, *arguments: str, limit_s: float = VERB_LIMIT_S) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [COMMAND, "--home", str(self.home), *arguments],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def status(self, name: str) -> dict[str, Any]:
        """What `status --json` prints. Asked of the agent itself while there is one: tests poll, a command is slow."""
        try:
            answer = client.call(Home(self.home), "status", name, timeout_s=VERB_LIMIT_S)
        except (client.AgentNotRunning, client.AgentFailed):
            return self.printed_status(name)
        assert answer.code == 0, answer
        status: dict[str, Any] = answer.data
        return status

    def printed_status(self, name: str) -> dict[str, Any]:
        """From the command; works without an agent."""
        status: dict[str, Any] = json.loads(self.run("status", name, "--json"))
        return status

    def uri(self, name: str) -> str:
        endpoint = self.status(name)["endpoint"]
        assert endpoint is not None, self.status(name)
        uri: str = endpoint["nbd_uri"]
        return uri

    def wait_phase(self, name: str, phase: str, limit_s: float = 120) -> dict[str, Any]:
        """Wait as a script would; the last status."""
        self.run("wait", name, "--for", phase, "--timeout", str(limit_s), limit_s=limit_s + 20)
        return self.status(name)

    def pid(self, name: str, process: str) -> int:
        """Of agent, member or transfer; waits until there is one."""
        return int(wait_for(lambda: self.status(name)["processes"][process], 20, f"{name} has a {process}"))

    def kill(self, name: str, process: str) -> None:
        """SIGKILL agent, member or transfer; returns when it has ended."""
        pid = self.pid(name, process)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not _alive(pid), DEADLINE_S, f"process {pid} has ended")

    def log(self) -> str:
        """The end of the agent's log."""
        path = self.home / "agent.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def end(self) -> None:
        """Kill everything that holds a file of this home: agent, members, copiers. Nothing else."""
        _end_processes(lambda words: _belongs(words, self.home))


@dataclass
class Volume:
    """One volume of `product`. Verbs are methods' names on the command line: volume.run("cutover")."""

    product: Product
    name: str
    source: Path
    target: Path

    @classmethod
    def make(cls, product: Product, source: Path, target: Path, *options: str, name: str = "v") -> "Volume":
        """Create it and bring it up. Its copy does not yield to the test's load: that is for tests of the throttle."""
        provision = () if target.exists() else ("--provision",)
        legs = ("--source", str(source), "--target", str(target))
        product.run("create", name, *legs, *provision, *options)
        volume = cls(product, name, source, target)
        assert volume.run("up").strip() == volume.uri
        volume.order("throttle", {"impact": "max"})
        return volume

    def run(self, verb: str, *arguments: str, code: int = 0) -> str:
        return self.product.run(verb, self.name, *arguments, code=code)

    def order(self, verb: str, options: dict[str, Any]) -> client.Result:
        """The agent itself is asked: a command takes a tenth of a second."""
        answer = client.call(Home(self.product.home), verb, self.name, options, VERB_LIMIT_S)
        assert answer.code == 0, answer
        return answer

    def refused(self, verb: str, *arguments: str, code: int = 3) -> str:
        return self.product.refused(verb, self.name, *arguments, code=code)

    def status(self) -> dict[str, Any]:
        return self.product.status(self.name)

    @property
    def uri(self) -> str:
        return self.product.uri(self.name)

    @property
    def phase(self) -> tuple[str, str]:
        """(phase, preferred)"""
        status = self.status()
        return status["phase"], status["preferred"]

    def wait_synced(self, limit_s: float = 120) -> dict[str, Any]:
        return self.product.wait_phase(self.name, "synced", limit_s)

    def start_and_hold(self, fraction: float, rate: str = "64MiB/s") -> dict[str, Any]:
        """Start, and slow the copy down when `fraction` is on both legs; the status at that point. The last order goes
        to the agent directly: a command may be too slow for a small volume."""
        self.run("throttle", "--rate", rate)
        self.run("start")
        wait_for(lambda: self.status()["fraction_both_ok"] >= fraction, DEADLINE_S, f"{fraction} is copied")
        self.order("throttle", {"rate_bytes_per_s": MIB})
        return self.status()

    def writes(self) -> int:
        """How many the member has served; a new one counts from zero."""
        return int(self.status()["io"]["writes"] or 0)

    def wait_setup(self, limit_s: float = 120) -> None:
        """After an abort; then the old copy is made worthless, so that the next one must be complete by itself."""
        self.product.wait_phase(self.name, "setup", limit_s)
        size_bytes = self.target.stat().st_size
        os.truncate(self.target, 0)
        os.truncate(self.target, size_bytes)

    def switches_ms(self, rounds: int) -> list[float]:
        """The pauses of `rounds` times cutover and undo."""
        pauses = []
        for _ in range(rounds):
            for verb in ("cutover", "undo"):
                self.run(verb)
                pauses.append(float(self.status()["last_switch_pause_ms"]))
        return pauses

    def assert_legs_equal(self) -> None:
        """When synced, with nobody writing. A larger target counts as far as the volume goes."""
        size_bytes = self.status()["size_bytes"]
        assert_same_bytes(self.source, self.target, size_bytes, self)


def assert_same_bytes(one: Path, other: Path, size_bytes: int, volume: Volume | None = None) -> None:
    """Byte for byte; says where the first difference is."""
    command = ["cmp", f"--bytes={size_bytes}", str(one), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    more = f"\n{volume.status()}\n{volume.product.log()}" if done.returncode and volume is not None else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{more}"


@contextmanager
def private_product(prefix: str, directory: Path | None = None) -> Iterator[tuple[Product, Path]]:
    """For scripts: a host of its own and a folder for its legs; both are gone at the end, of which kind it may be."""
    with ended_by_signals():
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
        product = Product(folder / "h")
        try:
            yield product, folder
        finally:
            product.end()
            _end_processes(lambda words: any(str(folder) in word for word in words))  # a fio that was just starting
            shutil.rmtree(folder)


def make_source(path: Path, size_bytes: int, data_bytes: int | None = None) -> Path:
    """A file whose first `data_bytes` (default: all) neither compress nor repeat; the rest is a hole."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset in range(0, size_bytes if data_bytes is None else data_bytes, _DATA_STEP):
            file.write(os.urandom(min(_DATA_STEP, size_bytes - offset)))
        file.flush()
        os.fsync(file.fileno())  # else the first flush of the leg has all of it to write
    return path


def written_size(path: Path) -> int:
    """Bytes for which the file has space."""
    return path.stat().st_blocks * 512


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _alive(pid: int) -> bool:
    """Any of its threads: the first may be a zombie while others are still in a system call, with their files open."""
    try:
        states = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return Path(f"/proc/{pid}/task").exists() and _alive(pid)  # a thread ended while we looked
    return any(state.rsplit(")", 1)[1].split()[0] not in "ZX" for state in states)


def _belongs(words: list[str], home: Path) -> bool:
    """The command line names the home (agent: --home; member and copier: the path of their lock)."""
    return any(str(home) in word for word in words) and any("shadowvol" in w or "nbdkit" in w for w in words)


def _end_processes(is_ours: Callable[[list[str]], bool]) -> None:
    """Kill those whose command line is ours, and what they started meanwhile."""
    for _ in range(3):
        pids = [pid for pid in _processes() if is_ours(_command_line(pid)) and _alive(pid)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not pids:
            return
        wait_for(lambda pids=pids: not any(map(_alive, pids)), DEADLINE_S, "all processes have ended")


def _command_line(pid: int) -> list[str]:
    """Its words; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
