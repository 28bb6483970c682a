"""Settings of the agent alone: flags, environment, the file of paths.py, defaults, in this order."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shadowvol.agent.access import SocketAccess
from shadowvol.agent.metrics.address import MetricsAddress, parse_metrics_address
from shadowvol.agent.paths import AGENT_KEYS, CONFIG_FILE, SettingsError, choose
from shadowvol.link.logs import LEVEL_DEFAULT, LEVELS

COPIES_MAX_DEFAULT = 2
COPIES_MAX_LARGEST = 64  # each has a process, and windows that are open at once


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How an agent logs, who may connect to its volumes, where it serves metrics (None: nowhere), and how many of its
    volumes copy at once."""

    log_level: str = LEVEL_DEFAULT
    access: SocketAccess = field(default_factory=SocketAccess)
    metrics: MetricsAddress | None = None
    copies_max: int = COPIES_MAX_DEFAULT


def resolve_agent(
    flags: Mapping[str, str | None] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    config_file: Path = CONFIG_FILE,
) -> AgentSettings:
    """The settings in force; `flags` by the keys of AGENT_KEYS. Looks only. Raises SettingsError."""
    given = dict.fromkeys(AGENT_KEYS) | dict(flags or {})
    chosen = choose(given, os.environ if environment is None else environment, config_file)
    level = (chosen["log_level"] or LEVEL_DEFAULT).lower()
    if level not in LEVELS:
        raise SettingsError(f"{chosen['log_level']!r} is not a log level; there are {', '.join(LEVELS)}")
    access = SocketAccess.parse(chosen["socket_group"], chosen["socket_mode"])
    metrics = None if chosen["metrics"] is None else parse_metrics_address(chosen["metrics"])
    return AgentSettings(level, access, metrics, _copies_max(chosen["copies_max"]))


def _copies_max(text: str | None) -> int:
    if text is None:
        return COPIES_MAX_DEFAULT
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= COPIES_MAX_LARGEST:
        raise SettingsError(f"{text!r} is not a number of copies at once; there may be 1 to {COPIES_MAX_LARGEST}")
    return int(text)
