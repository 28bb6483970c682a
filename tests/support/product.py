"""shadowvol as its operator runs it: the real command, a home of the test's own, and everything ended at the end."""

import json
import os
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from tests.support.poll import wait_for

COMMAND = str(Path(sysconfig.get_paths()["scripts"]) / "shadowvol")
VERB_LIMIT_S = 60


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

    def result(self, *arguments: str, limit_s: float = VERB_LIMIT_S) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [COMMAND, "--home", str(self.home), *arguments],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.run("status", name, "--json"))
        return status

    def uri(self, name: str) -> str:
        endpoint = self.status(name)["endpoint"]
        assert endpoint is not None, self.status(name)
        uri: str = endpoint["nbd_uri"]
        return uri

    def wait_phase(self, name: str, phase: str, limit_s: float = 120) -> dict[str, Any]:
        """Wait as a script would; the last status."""
        self.run("wait", name, "--for", phase, "--timeout", str(limit_s), limit_s=limit_s + 10)
        return self.status(name)

    def pid(self, name: str, process: str) -> int:
        """Of agent, member or transfer; waits until there is one."""
        return int(wait_for(lambda: self.status(name)["processes"][process], 20, f"{name} has a {process}"))

    def log(self) -> str:
        """The end of the agent's log."""
        path = self.home / "agent.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def end(self) -> None:
        """Kill everything that holds a file of this home: agent, members, copiers. Nothing else."""
        for _ in range(3):
            pids = [pid for pid in _processes() if _belongs(pid, self.home)]
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if not pids:
                return
            wait_for(lambda pids=pids: not any(Path(f"/proc/{pid}/fd").exists() and _alive(pid) for pid in pids), 10, "ended")


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _belongs(pid: int, home: Path) -> bool:
    """Its command line names the home (agent: --home; member: lock path; copier: lock path)."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return _alive(pid) and any(str(home) in word for word in words) and any(
        "shadowvol" in word or "nbdkit" in word for word in words
    )



