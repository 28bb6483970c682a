"""Where everything of one host lives, and which settings hold: flags, environment, file, defaults, in this order.

Invariants
- All paths are absolute: the agent that `up` starts has another current directory than who started it.
- Home and run directory are for their owner only, but for the way to volumes' sockets where the agent was told to let
  others connect (access.py); who can reach the other sockets may do everything with every volume.
- A path too long for a unix socket is found out before anything is started or recorded, not when it is bound.
"""

import os
import pwd
import re
import socket
import stat
import tomllib
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = Path("/etc/shadowvol/shadowvol.toml")
SYSTEM_HOME = Path("/var/lib/shadowvol")
SOCKET_PATH_BYTES_MAX = 107  # sun_path has 108 bytes and ends with a NUL
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")  # a part of keys, so without "/"
_KEYS = ("home", "state", "host")
AGENT_KEYS = ("log_level", "socket_group", "socket_mode", "metrics", "copies_max")  # settings.py


class SettingsError(ValueError):
    """A setting that cannot be used; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Home:
    """The directory of one agent. Two homes know nothing of each other."""

    directory: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(os.path.abspath(self.directory)))

    @property
    def state_file(self) -> Path:
        return self.directory / "state.sqlite"

    @property
    def state_url(self) -> str:
        """The default record of truth."""
        return f"sqlite:{self.state_file}"

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def agent_socket(self) -> Path:
        """The control socket: the command line talks to the agent here. No volume is called agent.sock: see check()."""
        return self.run / "agent.sock"

    @property
    def link_socket(self) -> Path:
        """Members and the transfer utility talk to the agent here."""
        return self.run / "link.sock"

    @property
    def agent_lock(self) -> Path:
        return self.run / "agent.lock"

    @property
    def agent_log(self) -> Path:
        return self.directory / "agent.log"

    def volume_socket(self, name: str) -> Path:
        """Where NBD clients of a volume connect."""
        return self.run / f"{name}.sock"

    def member_lock(self, name: str) -> Path:
        return self.run / f"{name}.lock"

    def transfer_lock(self, name: str) -> Path:
        return self.run / f"{name}.transfer.lock"

    def nbd_uri(self, name: str) -> str:
        """The URI that an NBD client on this host opens a volume with."""
        return f"nbd+unix:///{urllib.parse.quote(name)}?socket={urllib.parse.quote(str(self.volume_socket(name)))}"

    def prepare(self) -> None:
        """Make what is missing, for the owner only. Raises SettingsError.

        Whether others may pass through what is there is left as it is: the agent decides that, who calls this may be
        a command beside it.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.run.mkdir(mode=0o700, exist_ok=True)
            mode = self.run.stat().st_mode
            if mode & 0o066:
                self.run.chmod(stat.S_IMODE(mode) & 0o711)
        except OSError as error:
            raise self._unusable(error.strerror) from None
        for place in (self.directory, self.run):
            if not os.access(place, os.W_OK | os.X_OK):
                raise self._unusable(f"{place} cannot be written (read-only file system, or no permission)")

    def _unusable(self, why: str | None) -> SettingsError:
        return SettingsError(f"the home directory {self.directory} cannot be used: {why}")

    def _check_directory(self) -> None:
        """What is there, if anything, is a directory that we may look into."""
        try:
            os.fsencode(self.directory).decode()
        except UnicodeDecodeError:
            raise self._unusable("its name is not UTF-8") from None
        try:
            info = os.stat(self.directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error.strerror) from None
        if not stat.S_ISDIR(info.st_mode):
            raise self._unusable("it is not a directory")
        if not os.access(self.directory, os.X_OK):
            raise self._unusable(f"no permission; it belongs to user {_user_name(info.st_uid)}")

    def check(self, name: str | None = None) -> None:
        """Refuse a home that is no directory of ours or whose sockets (one volume's, or the agent's) cannot be bound,
        and a name that would hide another file of the run directory. Raises SettingsError."""
        if name in ("agent", "link") or (name is not None and name.endswith(".transfer")):
            raise SettingsError(f"the name {name} is taken by shadowvol itself")
        path = self.agent_socket if name is None else self.volume_socket(name)
        length = len(os.fsencode(path))
        if length > SOCKET_PATH_BYTES_MAX:
            raise SettingsError(
                f"the socket path {path} has {length} bytes, the kernel allows {SOCKET_PATH_BYTES_MAX}; "
                "choose a shorter --home"
            )
        self._check_directory()


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command or an agent works with."""

    home: Home
    state_url: str
    host: str


def default_home(environment: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return SYSTEM_HOME
    state = environment.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~/.local/state"))
    return base / "shadowvol"


def resolve(
    home: str | None = None,
    state: str | None = None,
    host: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    config_file: Path = CONFIG_FILE,
) -> Settings:
    """The settings in force; arguments are the flags. Raises SettingsError."""
    found = os.environ if environment is None else environment
    chosen = choose({"home": home, "state": state, "host": host}, found, config_file)
    place = Home(Path(chosen["home"] or default_home(found)))
    host_name = chosen["host"] or socket.gethostname()
    if not _HOST.fullmatch(host_name):
        raise SettingsError(f"{host_name!r} is not a host name: letters, digits, dots, dashes, underscores")
    return Settings(place, _absolute_state(chosen["state"] or place.state_url), host_name)


def choose(flags: Mapping[str, str | None], environment: Mapping[str, str], config_file: Path) -> dict[str, str | None]:
    """For each key of `flags` the first of flag, SHADOWVOL_KEY, and line of the file. Raises SettingsError."""
    file = _read_config(config_file)
    for key, flag in flags.items():
        if flag is not None and not flag.strip():  # as from --home "$UNSET": no way to the default home
            raise SettingsError(f"--{key.replace('_', '-')} is empty")
    return {key: flag or environment.get(f"SHADOWVOL_{key.upper()}") or file.get(key) for key, flag in flags.items()}


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _absolute_state(url: str) -> str:
    scheme, colon, path = url.partition(":")
    if scheme == "sqlite" and colon and path and not path.endswith("/"):
        return f"sqlite:{os.path.abspath(path)}"
    return url


def _read_config(path: Path) -> dict[str, str]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    for key, value in content.items():
        if key not in _KEYS + AGENT_KEYS or not isinstance(value, str):
            there = ", ".join(_KEYS + AGENT_KEYS)
            raise SettingsError(f"{path}: {key!r} is not a setting; there are {there}, each a string")
    return content
