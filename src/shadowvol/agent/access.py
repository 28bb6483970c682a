"""Who else than its owner may connect to volumes' sockets: one group, or everybody, as hypervisors need it.

Invariants
- Only volumes' NBD sockets are given away, never the control socket or the one that members use.
- Others may pass through home and run directory (0711: no listing, no writing) exactly while some of them may connect.
- What lies in them is for the owner only; what is found otherwise (a record that was restored) is taken back first.
"""

import grp
import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from shadowvol.agent.paths import Home, SettingsError

OWNER_ONLY, OWNER_AND_GROUP = 0o600, 0o660
_GROUP, _OTHERS = 0o060, 0o006
_MODE = re.compile(r"0?6[06][06]")
_GID_MAX = (1 << 32) - 2  # the kernel keeps the last one for "none"
_OTHERS_SEARCH = 0o011  # of a directory

_logger = logging.getLogger("shadowvol.agent")


@dataclass(frozen=True, slots=True)
class SocketAccess:
    """The mode of volumes' sockets, and their group (None: the agent's own)."""

    mode: int = OWNER_ONLY
    gid: int | None = None

    @classmethod
    def parse(cls, group: str | None, mode: str | None) -> "SocketAccess":
        """From the settings socket_group and socket_mode. Raises SettingsError."""
        if mode is not None and not _MODE.fullmatch(mode):
            raise SettingsError(
                f"{mode!r} is not a socket mode: three octal digits, the first 6 (the owner), the others "
                "6 (may connect) or 0 (may not), as 0660"
            )
        if group is None:
            return cls(OWNER_ONLY if mode is None else int(mode, 8))
        bits = OWNER_AND_GROUP if mode is None else int(mode, 8)
        gid = _gid(group)
        if not bits & _GROUP:
            raise SettingsError(f"socket mode {mode} lets no group connect, but the socket group is {group}")
        if os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
            raise SettingsError(
                f"the user of the agent is not in the socket group {group}, and may not give it sockets"
            )
        return cls(bits, gid)

    @property
    def is_for_others(self) -> bool:
        return self.mode != OWNER_ONLY

    @property
    def is_for_everybody(self) -> bool:
        return bool(self.mode & _OTHERS)

    def give(self, path: Path) -> None:
        """Make a volume's socket, new or found, what the settings say. Raises OSError."""
        gid = os.getegid() if self.gid is None else self.gid
        info = path.stat()
        if info.st_gid != gid:
            path.chmod(OWNER_ONLY)  # in between it is not for the wrong group
            os.chown(path, -1, gid)
        path.chmod(self.mode)


def _gid(group: str) -> int:
    """Of a name, or a number that needs no name here (containers)."""
    if group.isascii() and group.isdigit() and int(group) <= _GID_MAX:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise SettingsError(f"there is no group {group} on this host (getent group lists them)") from None


def apply_to_directories(access: SocketAccess, home: Home) -> None:
    """Open or close the way to volumes' sockets; only the holder of agent.lock does. Raises SettingsError."""
    try:
        if access.is_for_others:
            _take_back(home)
            for place in (home.directory, home.run):
                _change_mode(place, _mode(place) | _OTHERS_SEARCH)
            _warn(access, home)
        else:
            _change_mode(home.run, _mode(home.run) & ~_OTHERS_SEARCH)
            if _mode(home.directory) == 0o711:  # as above; what the operator has made otherwise stays
                _change_mode(home.directory, 0o700)
    except OSError as error:
        text = f"the home directory {home.directory} cannot be used: {error.filename}: {error.strerror}"
        raise SettingsError(f"{text}; it has to belong to the user of the agent") from None


def _take_back(home: Home) -> None:
    for path in (home.agent_log, *home.directory.glob(f"{home.state_file.name}*"), *home.run.glob("*.lock")):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(info.st_mode) and info.st_mode & 0o077:
            path.chmod(stat.S_IMODE(info.st_mode) & 0o700)
            _logger.warning(
                "agent: %s could be read by others (mode %04o); it is for its owner now", path, info.st_mode & 0o7777
            )


def _warn(access: SocketAccess, home: Home) -> None:
    if access.is_for_everybody:
        mode = f"{access.mode:04o}"
        _logger.warning("agent: socket mode %s: every user of this host can read and write every volume", mode)
    for parent in home.directory.parents:
        if not _mode(parent) & 0o001:
            _logger.warning(
                "agent: %s does not let everybody pass: clients of sockets below it may not reach them", parent
            )


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _change_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:
        path.chmod(mode)
