"""A real systemd that manages units of a test's own, beside whatever runs this host.

It is a user's instance, run by root in a cgroup and a mount namespace of its own: the system's would have to be process
1. With services it does what the system's does (Type=notify, KillMode, restarts, the order of stopping). It does not
mount or unmount, and does not kill what is left at its end, so that the test can see what lives on.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.poll import wait_for

SYSTEMD = Path("/lib/systemd/systemd")
LIMIT_S = 120.0
START_LIMIT_S = 30.0
_SCRIPT = """
for group in $GROUPS; do echo $$ >$group/cgroup.procs; done
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system  # systemd asks so whether it may run at all
exec "$SYSTEMD" --user --unit=basic.target --log-target=console
"""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """`units`: the folder that it reads units from; `log`: of itself and of what it starts."""

    units: Path
    log: Path
    runtime: Path
    pid: int

    def systemctl(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            ["systemctl", "--user", "--no-pager", *words],
            env=dict(os.environ, XDG_RUNTIME_DIR=str(self.runtime)),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.told()}"
        return done.stdout

    def value(self, unit: str, what: str) -> str:
        return self.systemctl("show", "--value", f"--property={what}", unit).strip()

    def run_inside(self, *command: str) -> str:
        """Where its services run: they see other mounts than the test does."""
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def shut_down(self) -> None:
        """Begin what a shutdown begins: all units are stopped in their order. systemd itself stays, to be asked."""
        unit = "[Unit]\nDefaultDependencies=no\nRequires=shutdown.target\nAfter=shutdown.target\n"
        (self.units / "off.target").write_text(unit)
        self.systemctl("start", "--no-block", "--job-mode=replace-irreversibly", "off.target")

    def told(self) -> str:
        return self.log.read_text(errors="replace")


def cgroups() -> list[Path]:
    """This process's cgroups in the hierarchies that systemd uses; empty where it may not make others below."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        places = {"name=systemd": ("systemd",), "": ("unified", "")}.get(controller, ())
        there = [Path("/sys/fs/cgroup", place, path.lstrip("/")) for place in places]
        found += [place for place in there if (place / "cgroup.procs").exists()][:1]
    return found if all(os.access(place, os.W_OK) for place in found) else []


def why_not() -> str | None:
    """What is missing here to run one."""
    if os.geteuid() != 0:
        return "a service manager of our own needs root"
    if not SYSTEMD.exists():
        return f"there is no {SYSTEMD}"
    return None if cgroups() else "no cgroup may be made here"


@contextmanager
def service_manager(folder: Path, environment: Mapping[str, str]) -> Iterator[ServiceManager]:
    """Until the end of the block; what its services have left alive is the caller's to end."""
    units, runtime = folder / "units", folder / "runtime"
    units.mkdir()
    runtime.mkdir(mode=0o700)
    log = folder / "systemd.log"
    (units / "service.d").mkdir()  # there is no journal
    (units / "service.d" / "log.conf").write_text(f"[Service]\nStandardOutput=null\nStandardError=append:{log}\n")
    groups = [place / f"shadowvol-test-{os.getpid()}" for place in cgroups()]
    for group in groups:
        group.mkdir()
    variables = {
        **os.environ,
        **environment,
        "GROUPS": " ".join(map(str, groups)),
        "SYSTEMD": str(SYSTEMD),
        "SYSTEMD_UNIT_PATH": f"{units}:",
        "XDG_RUNTIME_DIR": str(runtime),
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", _SCRIPT],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for((runtime / "systemd" / "private").exists, START_LIMIT_S, "systemd is there")
        yield ServiceManager(units, log, runtime, process.pid)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(runtime)


def remove_cgroups() -> None:
    """When nothing lives in them any more."""
    for place in cgroups():
        for directory in sorted(place.glob(f"shadowvol-test-{os.getpid()}/**"), reverse=True):
            if directory.is_dir():
                directory.rmdir()
