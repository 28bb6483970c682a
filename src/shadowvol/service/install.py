"""scripts/install-service: writes the two units for this checkout and one home. Starts, stops and enables nothing.

Order: everything is judged first; then each unit is replaced whole (a rename), and systemd told to read them again.
Exit codes: 0 done · 1 failed · 2 bad usage or settings, nothing changed · 3 refused, nothing changed.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import shadowvol
from shadowvol.agent import client
from shadowvol.agent.errors import BAD_INPUT, FAILED, REFUSED
from shadowvol.agent.paths import CONFIG_FILE, SYSTEM_HOME, Home, SettingsError, choose
from shadowvol.agent.settings import resolve_agent
from shadowvol.endpoints import blockdev

UNITS = ("shadowvol.service", "shadowvol-unmount.service")
UNIT_DIRECTORY = Path("/etc/systemd/system")
SYSTEMCTL_LIMIT_S = 60
_TEMPLATES = Path(__file__).with_name("units")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/._+:@-]*")  # means itself in a unit
_NETWORK = re.compile(r"(nfs|cifs|smb|ceph|glusterfs|fuse\.(ceph|glusterfs|sshfs)|9p|afs|ocfs2|gfs2)")


class InstallError(Exception):
    """With its exit code; the message is for the operator."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def unit_texts(home: Home) -> dict[str, str]:
    """By name. Raises InstallError."""
    values = {
        "HOME": str(home.directory),
        "COMMAND": str(Path(sysconfig.get_path("scripts")) / "shadowvol"),
        "PYTHON": sys.executable,
        "DOCUMENTATION": str(Path(shadowvol.__file__).resolve().parents[2] / "docs" / "shadowvol.1.md"),
    }
    for path in values.values():
        if not _PLAIN_PATH.fullmatch(path):
            text = f"{path} cannot be written into a unit: a path there has letters, digits and /._+:@- only"
            raise InstallError(BAD_INPUT, text)
    return {name: _filled((_TEMPLATES / name).read_text(encoding="utf-8"), values) for name in UNITS}


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"@([A-Z]+)@", lambda found: values[found.group(1)], template)


def _chosen_home(flag: str | None) -> Home:
    """The flag, else what the file says, else the usual one; never a home from the environment of one shell."""
    try:
        home = Home(Path(choose({"home": flag}, {}, CONFIG_FILE)["home"] or SYSTEM_HOME))
        home.check()
        resolve_agent(environment={})
    except SettingsError as error:
        raise InstallError(BAD_INPUT, str(error)) from None
    nearest = next(place for place in (home.directory, *home.directory.parents) if place.exists())
    mount = blockdev.mount_of(str(nearest))
    if mount is not None and _NETWORK.match(mount.fstype):
        text = f"the home {home.directory} lies on a network file system ({mount.fstype} at {mount.mount_point})"
        raise InstallError(BAD_INPUT, f"{text}; the agent is started before those are mounted")
    return home


def _systemctl(*words: str) -> int:
    done = subprocess.run(["systemctl", *words], timeout=SYSTEMCTL_LIMIT_S, check=False)
    return done.returncode


def _booted() -> bool:
    """Whether systemd runs this host (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.rename(path)


def _install(directory: Path, home: Home, texts: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = directory / name
        same = path.exists() and path.read_text(encoding="utf-8", errors="replace") == text
        if not same:
            _write(path, text)
        _say(f"{'unchanged' if same else 'written'}: {path}")
    _reload(directory)
    answer = client.ping(home)
    running = answer.data.get("pid") if answer is not None and isinstance(answer.data, dict) else None
    replace = f"kill {running} && " if running else ""  # a unit's own agent as well: then it is started anew
    if not _booted() or _systemctl("is-active", "--quiet", UNITS[0]):
        _say(f"next: {replace}systemctl enable --now {UNITS[0]}")
    else:
        _say(f"next: systemctl restart {UNITS[0]} (volumes that are up go on)")


def _remove(directory: Path) -> None:
    if _booted() and _systemctl("is-active", "--quiet", UNITS[0]) == 0:
        text = f"{UNITS[0]} runs; first: systemctl disable --now {UNITS[0]} (volumes that are up go on)"
        raise InstallError(REFUSED, text)
    for name in UNITS:
        path = directory / name
        if path.exists():
            path.unlink()
            _say(f"removed: {path}")
    _reload(directory)


def _reload(directory: Path) -> None:
    if directory != UNIT_DIRECTORY or not _booted():
        _say("systemd was not told: it does not run here, or reads no units there")
    elif _systemctl("daemon-reload"):
        raise InstallError(FAILED, "the units are there, but systemctl daemon-reload failed (see above)")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _perform(options: argparse.Namespace) -> None:
    directory = Path(os.path.abspath(options.unit_directory))
    home = _chosen_home(options.home)
    texts = unit_texts(home)
    if options.dry_run:
        for name, text in texts.items():
            _say(f"{'would remove' if options.remove else 'would write'}: {directory / name}")
            if not options.remove:
                _say(text)
    elif os.geteuid() != 0 and not os.access(directory, os.W_OK):
        raise InstallError(FAILED, f"{directory} cannot be written; units are installed by root. Nothing was changed")
    elif options.remove:
        _remove(directory)
    else:
        _install(directory, home, texts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/install-service", description="Installs shadowvol's systemd units for this checkout."
    )
    parser.add_argument("--home", metavar="DIR", help=f"the agent's home (default: {CONFIG_FILE}, {SYSTEM_HOME})")
    parser.add_argument("--unit-directory", default=str(UNIT_DIRECTORY), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--remove", action="store_true", help="take the units away again")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, change nothing")
    try:
        _perform(parser.parse_args())
    except InstallError as error:
        sys.stderr.write(f"install-service: {error}\n")
        return error.code
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"install-service: {error}\n")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
