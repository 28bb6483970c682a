"""Whether nbdkit can be started with the C filter here: found where scripts/setup builds it, and tried by a dry start.

nbdkit refuses a filter that was built for any other version of it, and then does not start at all. So nothing is
started with a filter that has not been tried. The outcome is kept beside the filter, for as long as both files are the
same: a start of a member costs two `stat`s, not a dry start.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SWITCH = "SHADOWVOL_FILTER"  # environment: "off", "on", or the path of another build
FILTER_NAME = "nbdkit-shadowvol-filter.so"
DRY_START_LIMIT_S = 20.0
BUILT = Path(__file__).resolve().with_name(FILTER_NAME)


@dataclass(frozen=True, slots=True)
class Usable:
    """`path`: start nbdkit with it. None: do not, and `why_not` says why."""

    path: Path | None
    why_not: str | None


def usable_filter(environment: Mapping[str, str] = os.environ) -> Usable:
    switch = environment.get(SWITCH, "on")
    if switch == "off":
        return Usable(None, f"{SWITCH}=off")
    path = BUILT if switch == "on" else Path(switch)
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        return Usable(None, "there is no nbdkit")
    try:
        key = [_stamp(path), _stamp(Path(nbdkit))]
    except OSError:
        return Usable(None, "it has not been built: scripts/setup does that")
    kept = path.with_name(f"{path.name}.tried")
    found, why_not = _read(kept, key)
    if not found:
        why_not, final = _dry_start(nbdkit, path)
        if final:
            _keep(kept, key, why_not)
    return Usable(path, None) if why_not is None else Usable(None, why_not)


def _stamp(path: Path) -> list[str | int]:
    info = path.stat()
    return [str(path), info.st_ino, info.st_size, info.st_mtime_ns]


def _dry_start(nbdkit: str, path: Path) -> tuple[str | None, bool]:
    """(why it does not start, or None; whether that will be the same the next time)."""
    command = [nbdkit, f"--filter={path}", "null", "--run", "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DRY_START_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nbdkit could not be tried with it: {error}", False
    if done.returncode == 0:
        return None, True
    lines = done.stderr.strip().splitlines()
    return lines[0] if lines else f"nbdkit ends with code {done.returncode} when it is loaded", True


def _read(kept: Path, key: list[list[str | int]]) -> tuple[bool, str | None]:
    try:
        plain = json.loads(kept.read_text(encoding="utf-8"))
        return plain["key"] == key, plain["why_not"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, None


def _keep(kept: Path, key: list[list[str | int]], why_not: str | None) -> None:
    """Where we may not write, it is tried at each start."""
    new = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"key": key, "why_not": why_not}), encoding="utf-8")
        new.replace(kept)
    except OSError:
        with suppress(OSError):  # on a read-only file system a file that is not there cannot be removed either
            new.unlink()
