"""`shadowvol doctor`: what this host lacks, and the command that installs it. Looks only."""

import importlib.util
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from shadowvol.agent import client
from shadowvol.agent.errors import FAILED, VerbError
from shadowvol.cli.invocation import Invocation, pass_invocation
from shadowvol.nbd.filter.usable import usable_filter

COMMAND_LIMIT_S = 20
MEMLOCK_BYTES_WANTED = 64 << 20  # a member, its buffers and the map of a large volume
ADMIN_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


@dataclass(frozen=True, slots=True)
class Check:
    """`there` answers whether it is; `remedy` is the command that brings it."""

    what: str
    required: bool
    there: Callable[[], bool]
    remedy: str


def _debian(package: str) -> str:
    return f"apt-get install {package}"


def _command(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name, path=ADMIN_PATH) is not None


def _module(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


def _succeeds(*command: str) -> Callable[[], bool]:
    def run() -> bool:
        environment = dict(os.environ, PATH=ADMIN_PATH)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_LIMIT_S, env=environment
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    return run


def _kernel_has_nbd() -> bool:
    """Loaded or built in, or a module that can be loaded."""
    return Path("/sys/module/nbd").is_dir() or Path("/sys/block/nbd0").is_dir() or _succeeds("modprobe", "-n", "nbd")()


def _may_attach() -> bool:
    """One of the two ways of docs/attach.md."""
    by_loop = _is_character_device("/dev/fuse")() and _command("losetup")()
    return os.geteuid() == 0 and (by_loop or _kernel_has_nbd())


def _is_character_device(path: str) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return stat.S_ISCHR(os.stat(path).st_mode)
        except OSError:
            return False

    return look


def _may_lock_memory() -> bool:
    if os.geteuid() == 0:
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return soft in (resource.RLIM_INFINITY,) or soft >= MEMLOCK_BYTES_WANTED


def _usable_directory(path: Path) -> Callable[[], bool]:
    """It, or the nearest directory above it that exists, can be written by us."""

    def look() -> bool:
        nearest = next(place for place in (path, *path.parents) if place.exists())
        return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)

    return look


def _metrics_check(invocation: Invocation) -> list[Check]:
    """Of the agent that runs, where it is to serve metrics."""
    answer = client.ping(invocation.unchecked_settings.home)
    metrics = answer.data.get("metrics") if answer is not None and isinstance(answer.data, dict) else None
    if not metrics:
        return []
    remedy = f"{metrics['error']}; volumes are served all the same"
    return [Check(f"metrics at {metrics['url']}", False, lambda: metrics["error"] is None, remedy)]


def _checks(invocation: Invocation) -> list[Check]:
    run = invocation.unchecked_settings.home.run
    python = [
        Check(f"python package {name}", True, _module(name), f"{sys.executable} -m pip install {name}")
        for name in ("click", "prometheus_client", "rich", "trio", "xxhash")
    ]
    plugin = _succeeds("nbdkit", "python", "--version")
    filter_ = usable_filter()
    filter_remedy = f"{filter_.why_not}; I/O goes through Python (scripts/setup builds it)"
    return [
        Check("nbdkit", True, _command("nbdkit"), _debian("nbdkit")),
        Check("nbdkit python plugin", True, plugin, _debian("nbdkit-plugin-python")),
        Check("blkid", True, _command("blkid"), _debian("util-linux")),
        *python,
        Check("run directory", True, _usable_directory(run), f"mkdir -p -m 700 {run}"),
        Check("C fast path of the data plane", False, lambda: filter_.path is not None, filter_remedy),
        Check("libnbd for python", False, _module("nbd"), _debian("python3-libnbd")),
        Check("nbdinfo, nbdcopy", False, _command("nbdcopy"), _debian("libnbd-bin")),
        Check("attach", False, _may_attach, "be root, and: modprobe nbd; or modprobe fuse; apt-get install mount"),
        Check("losetup", False, _command("losetup"), _debian("mount")),
        Check("nbd-client", False, _command("nbd-client"), _debian("nbd-client")),
        Check("kernel module nbd", False, _kernel_has_nbd, "modprobe nbd (a kernel that has it)"),
        Check("fuse device", False, _is_character_device("/dev/fuse"), "modprobe fuse"),
        Check("fusermount3", False, _command("fusermount3"), _debian("fuse3")),
        Check("qemu-img, qemu-io", False, _command("qemu-img"), _debian("qemu-utils")),
        Check("qemu-storage-daemon", False, _command("qemu-storage-daemon"), _debian("qemu-system-common")),
        *_metrics_check(invocation),
        Check("locked memory", False, _may_lock_memory, "ulimit -l unlimited (LimitMEMLOCK=infinity in a service)"),
    ]


@click.command()
@pass_invocation
def doctor(invocation: Invocation) -> None:
    """What this host lacks, and the command that installs it."""
    lacking = 0
    for check in _checks(invocation):
        if check.there():
            click.echo(f"ok       {check.what}")
            continue
        lacking += check.required
        note = "" if check.required else " (optional)"
        click.echo(f"missing  {check.what}{note}: {check.remedy}")
    if lacking:
        raise VerbError(FAILED, f"{lacking} things that shadowvol needs are missing")
