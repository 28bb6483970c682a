"""Settings of the agent alone: flags, environment, the file of paths.py, defaults, in this order."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shadowvol.agent.access import SocketAccess
from shadowvol.agent.metrics.address import MetricsAddress, parse_metrics_address
from shadowvol.agent.paths import AGENT_KEYS, CONFIG_FILE, SettingsError, choose
from shadowvol.link.logs import LEVEL_DEFAULT, LEVELS


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How an agent logs, who may connect to its volumes, and where it serves metrics (None: nowhere)."""

    log_level: str = LEVEL_DEFAULT
    access: SocketAccess = field(default_factory=SocketAccess)
    metrics: MetricsAddress | None = None


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
    metrics = chosen["metrics"]
    return AgentSettings(level, access, None if metrics is None else parse_metrics_address(metrics))
