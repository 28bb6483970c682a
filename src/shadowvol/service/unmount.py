"""python -m shadowvol.service.unmount --home DIR [--limit SECONDS]: unmount everything that is on attached devices.

For the shutdown of a host (shadowvol-unmount.service), not for operators. Why it is needed: a file system that somebody
mounted by hand belongs to local-fs.target, and systemd unmounts those after it has stopped the agent. Without the agent
an unmount may wait for ever, since a write to a zone that was not in use is logged there first.

Order: this, then the agent, then all other units. Members live until systemd kills what is left, with nothing mounted.
What is in use is tried again until `limit`: the services that use it are being stopped at the same time. Nothing is
unmounted lazily or by force, and no wish to be attached is forgotten: after the next boot it is attached again.

Exit codes: 0 nothing is mounted there any more · 1 something still is, and is named on standard error.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from shadowvol.agent.paths import Home
from shadowvol.endpoints import blockdev
from shadowvol.link import logs
from shadowvol.nbd.attach import attached_devices

LIMIT_DEFAULT_S = 75.0
RETRY_S = 0.5
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))
_ENVIRONMENT = dict(os.environ, PATH=_PATH, LC_ALL="C")

_logger = logging.getLogger("shadowvol.service")


def unmount_all(home: Home, limit_s: float) -> list[str]:
    """What is left after `limit_s`, each with the reason."""
    deadline_s = time.monotonic() + limit_s
    while uses := _uses(home):
        left = {use: why for use in uses if (why := _release(use, deadline_s)) is not None}
        if time.monotonic() >= deadline_s:
            return [f"{use[-1]}: {left.get(use, 'used again')}" for use in _uses(home)]
        if left:
            time.sleep(RETRY_S)
    return []


def _uses(home: Home) -> list[tuple[str, ...]]:
    """Commands that end each use of an attached device. The newest mount comes first: it may lie in an older one."""
    found: dict[tuple[str, ...], None] = {}
    for device in attached_devices(home.directory, home.run):
        try:
            mount_points, swaps = blockdev.uses_of(device)
        except OSError:
            continue  # it has gone meanwhile
        found |= dict.fromkeys(("swapoff", "--", swap) for swap in swaps)
        found |= dict.fromkeys(("umount", "--recursive", "--", point) for point in reversed(mount_points))
    return list(found)


def _release(command: tuple[str, ...], deadline_s: float) -> str | None:
    """None when it is done; else why not."""
    limit_s = max(RETRY_S, deadline_s - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, env=_ENVIRONMENT)
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not end within {limit_s:.0f} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode:
        return " ".join(done.stderr.split()) or f"{command[0]}: exit code {done.returncode}"
    _logger.info("agent: %s %s", command[0], command[-1])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="shadowvol.service.unmount", description=__doc__.partition("\n")[0])
    parser.add_argument("--home", required=True, metavar="DIR")
    parser.add_argument("--limit", type=float, default=LIMIT_DEFAULT_S, metavar="SECONDS")
    options = parser.parse_args()
    logs.configure()
    left = unmount_all(Home(Path(options.home)), options.limit)
    for text in left:
        _logger.error("agent: still in use at the end: %s", text)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
