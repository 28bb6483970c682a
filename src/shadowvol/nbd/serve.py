"""Start a member: take its lock, hand the listening socket to nbdkit, and become nbdkit.

The order matters:
1. The lock is taken before anything else. Who holds it knows that no write of a predecessor can still land; nbdkit
   inherits the descriptor, so that the kernel gives the lock back only when nbdkit itself is gone.
2. With the lock in hand, the agent that started us must still live, or we give up. The next agent may have found the
   lock free just before, and listens at a socket of its own by now: a member that listens at the old one would be
   found by no client, and those at the new one would wait for ever. If the agent dies later than this, the next one
   finds the lock taken, makes no socket, and is given ours (Hello).
3. The socket becomes descriptor 3 with LISTEN_FDS and LISTEN_PID, nbdkit's socket activation: it never binds.
4. With --detach, a child goes on and its parent exits with 0 after printing the child's pid: nbdkit with socket
   activation asks the kernel for SIGTERM when the thread that started it ends (PR_SET_PDEATHSIG), and a member must
   outlive its agent. The lock is held throughout: it belongs to the open file, which the child shares.
5. exec, so that the process is nbdkit; with the C filter in front where it can be used (filter/usable.py), and
   otherwise with the reason, which the member tells its agent.

Exit codes: 3 the lock is held; 1 something else, one line on stderr. After exec they are nbdkit's.
"""

import argparse
import ctypes
import fcntl
import json
import logging
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import shadowvol
from shadowvol.link import logs
from shadowvol.nbd.filter.usable import usable_filter

if TYPE_CHECKING:
    from shadowvol.core.records import VolumeConfig

LISTEN_FD = 3  # what socket activation hands over, by its convention
THREADS_DEFAULT = 32  # more than a client has requests in flight: held writes must leave threads for reads
LOCK_HELD_EXIT = 3
_DESCRIPTOR_MIN = 10  # our own descriptors lie above the one that socket activation wants
_OOM_SCORE_ADJUST = -900  # among the last to go
_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14

_logger = logging.getLogger("shadowvol.member")


def member_spec(config: "VolumeConfig", link: Path, incarnation: int) -> dict[str, Any]:
    """What a member is told at its start (member.MemberSpec). `link`: the agent's socket."""
    return {
        "volume": config.name,
        "description": config.description or f"shadowvol volume {config.name}",
        "size_bytes": config.size_bytes,
        "region_bytes": config.region_bytes,
        "block_bytes": config.block_bytes,
        "zone_bytes": config.zone_bytes,
        "incarnation": incarnation,
        "link": str(link),
        "legs": config.leg_specs(),
    }


def member_argv(
    *, listen_fd: int, lock_path: str, spec: dict[str, Any], threads: int = THREADS_DEFAULT, detach: bool = False
) -> list[str]:
    """The command that starts a member, for a child of this process. The caller lets `listen_fd` be inherited, and
    nothing else."""
    command = [sys.executable, "-m", "shadowvol.nbd.serve"]
    options = ["--listen-fd", str(listen_fd), "--lock", lock_path, "--threads", str(threads)]
    options += ["--starter", str(os.getpid())]
    if detach:
        options.append("--detach")
    return [*command, *options, "--spec", json.dumps(spec, separators=(",", ":"))]


def python_path() -> str:
    """PYTHONPATH for the Python inside nbdkit: our package, and what is installed for the Python that runs now."""
    ours = Path(shadowvol.__file__).resolve().parent.parent
    paths = sysconfig.get_paths()
    return os.pathsep.join(dict.fromkeys([str(ours), paths["purelib"], paths["platlib"]]))


def protect_process() -> None:
    """Writing back must not wait for memory that only we can free; the kernel should end others first. Best effort."""
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{_OOM_SCORE_ADJUST}\n", encoding="ascii")
    except OSError:
        pass


def lock_memory() -> None:
    """Keep in memory what is there and what comes. Not inherited over exec. Best effort.

    Only with the capability: under a limit, the lock on future memory would make later allocations fail.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    effective = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    if effective & (1 << _CAP_IPC_LOCK):
        ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def _take_lock(path: str) -> None:
    low = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    descriptor = fcntl.fcntl(low, fcntl.F_DUPFD, _DESCRIPTOR_MIN)  # inheritable
    os.close(low)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _give_up(path, f"{path} is held: this member, or its predecessor, is still running", LOCK_HELD_EXIT)
    if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        _give_up(path, f"{path} was removed meanwhile: the volume is deleted", LOCK_HELD_EXIT)


def _give_up(lock_path: str, reason: str, code: int = 1) -> NoReturn:
    _logger.error("%s: %s", Path(lock_path).stem, reason)  # NAME.lock
    raise SystemExit(code)


def _detach() -> None:
    """The parent prints the child's pid and ends; the child, in a session of its own, goes on."""
    child = os.fork()
    if child:
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        os._exit(0)
    os.setsid()
    os.dup2(2, 1)  # the pipe that the pid went through ends here


def serve(listen_fd: int, lock_path: str, spec: str, threads: int, detach: bool, starter: int) -> NoReturn:
    """Becomes nbdkit, or exits."""
    _take_lock(lock_path)
    if os.getppid() != starter:
        _give_up(lock_path, "the agent that started this member has ended meanwhile; the next agent starts one")
    if detach:
        _detach()
    if listen_fd == LISTEN_FD:
        os.set_inheritable(listen_fd, True)
    else:
        os.dup2(listen_fd, LISTEN_FD)
        os.close(listen_fd)
    protect_process()
    plugin = str(Path(__file__).resolve().with_name("plugin.py"))
    filter_ = usable_filter()
    command = ["nbdkit", "--foreground", "--threads", str(threads)]
    if filter_.path is not None:
        command.append(f"--filter={filter_.path}")
    command += ["python", plugin, f"spec={spec}"]
    if filter_.why_not is not None:
        command.append(f"no_filter={filter_.why_not}")
    environment = dict(os.environ, PYTHONPATH=python_path(), LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
    os.execvpe(command[0], command, environment)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="shadowvol.nbd.serve", description="Start the data plane of a volume.")
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--lock", required=True)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--threads", type=int, default=THREADS_DEFAULT)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--starter", type=int, required=True, help="the process that has started this one")
    options = parser.parse_args()
    logs.configure()
    try:
        serve(options.listen_fd, options.lock, options.spec, options.threads, options.detach, options.starter)
    except OSError as error:
        _give_up(options.lock, f"cannot start the member: {error}")


if __name__ == "__main__":
    main()
