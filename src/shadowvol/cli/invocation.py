"""What every verb needs: the settings in force, the record of truth, the agent. All errors leave as VerbError.

A verb that the agent performs asks the agent at once: what reads the record itself (SQLite, trio, the codecs) is
imported only where it is used, since it takes longer to load than most verbs take.
"""

import os
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shadowvol.agent import client
from shadowvol.agent.errors import (
    BAD_INPUT,
    FAILED,
    NO_SUCH_VOLUME,
    TIMED_OUT,
    UNREACHABLE,
    VerbError,
    check_name,
    no_such_volume,
)
from shadowvol.agent.paths import Settings, SettingsError, resolve

if TYPE_CHECKING:
    from shadowvol.agent.settings import AgentSettings
    from shadowvol.clustersync.coordinator import Coordinator
    from shadowvol.core.records import VolumeRecord

T = TypeVar("T")

VERB_LIMIT_S = 120.0  # a transition's own limits are far below; past this something is wrong with the agent
STATUS_LIMIT_S = 10.0


@dataclass
class Invocation:
    """The global options as they were given; what they mean is found out when a verb first needs it."""

    home_flag: str | None
    state_flag: str | None
    host_flag: str | None

    @cached_property
    def settings(self) -> Settings:
        try:
            self.unchecked_settings.home.check()
        except SettingsError as error:
            raise VerbError(BAD_INPUT, str(error)) from None
        return self.unchecked_settings

    @cached_property
    def unchecked_settings(self) -> Settings:
        """Also where the home cannot be used; for who finds out what is wrong."""
        try:
            return resolve(self.home_flag, self.state_flag, self.host_flag)
        except SettingsError as error:
            raise VerbError(BAD_INPUT, str(error)) from None

    def agent_settings(self, flags: "dict[str, str | None]") -> "AgentSettings":
        """Those in force for an agent that is started now."""
        from shadowvol.agent.settings import resolve_agent

        try:
            return resolve_agent(flags)
        except SettingsError as error:
            raise VerbError(BAD_INPUT, str(error)) from None

    def check_volume_name(self, name: str) -> None:
        """Whether a volume may be called so, and its socket fits into this home."""
        check_name(name)
        try:
            self.settings.home.check(name)
        except SettingsError as error:
            raise VerbError(BAD_INPUT, str(error)) from None

    def prepare(self) -> None:
        try:
            self.settings.home.prepare()
        except SettingsError as error:
            raise VerbError(BAD_INPUT, str(error)) from None

    def command(self, *words: str) -> str:
        """A command line for the operator, with the global options of this one."""
        flags = (("--home", self.home_flag), ("--state", self.state_flag), ("--host", self.host_flag))
        given = [part for flag, value in flags if value for part in (flag, value)]
        return shlex.join(["shadowvol", *given, *words])

    # ------------------------------------------------------------ the record of truth

    def on_record(self, work: "Callable[[Coordinator], Awaitable[T]]") -> T:
        """Run `work` on the opened record."""
        import trio

        from shadowvol.clustersync.coordinator import CoordinatorUnreachable, RecordDamaged
        from shadowvol.clustersync.open import open_coordinator

        try:
            coordinator = open_coordinator(self.settings.state_url)
        except ValueError as error:
            raise VerbError(BAD_INPUT, str(error)) from None
        except CoordinatorUnreachable as error:
            raise VerbError(UNREACHABLE, str(error)) from None
        except RecordDamaged as error:
            raise VerbError(FAILED, str(error)) from None

        async def run() -> T:
            try:
                return await work(coordinator)
            finally:
                with trio.CancelScope(shield=True):
                    await coordinator.aclose()

        return trio.run(run)

    def on_record_if_any(self, work: "Callable[[Coordinator | None], Awaitable[T]]") -> T:
        """The same, with None where there is no record yet; none is made."""
        import trio

        return trio.run(work, None) if self._nothing_recorded() else self.on_record(work)

    def _nothing_recorded(self) -> bool:
        """There is no record yet: looking must not make one."""
        scheme, _, path = self.settings.state_url.partition(":")
        if scheme != "sqlite" or not path or os.path.exists(path) or os.path.exists(f"{path}-wal"):
            return False
        return os.path.isdir(os.path.dirname(path)) or self.settings.state_url == self.settings.home.state_url

    def records(self) -> "dict[str, VolumeRecord]":
        """All that check out; one that does not is named on stderr and stops no other."""
        from shadowvol.agent.volumes import read_volumes

        if self._nothing_recorded():
            return {}
        sound, damaged = self.on_record(read_volumes)
        for text in damaged.values():
            click.echo(f"shadowvol: {text}", err=True)
        return sound

    def recorded_names(self) -> list[str]:
        """Of all volumes, also of those that do not check out."""
        from shadowvol.agent.volumes import read_volumes

        if self._nothing_recorded():
            return []
        sound, damaged = self.on_record(read_volumes)
        return sorted({*sound, *damaged})

    def record(self, name: str) -> "VolumeRecord":
        from shadowvol.agent.volumes import read_volume

        check_name(name)
        if self._nothing_recorded():
            raise no_such_volume(name)
        return self.on_record(lambda coordinator: read_volume(coordinator, name))

    # ------------------------------------------------------------ the agent

    def call(
        self,
        verb: str,
        name: str | None = None,
        options: dict[str, Any] | None = None,
        timeout_s: float = VERB_LIMIT_S,
    ) -> client.Result:
        """The agent's answer, if it is a good one. An unknown volume is said before a missing agent."""
        if name is not None:
            check_name(name)
        result = self._ask(verb, name, options, timeout_s)
        if result is None:
            if name is not None:
                self.record(name)
            raise self.no_agent(name)
        if result.code:
            raise VerbError(result.code, result.text or f"{verb} failed")
        return result

    def _ask(
        self, verb: str, name: str | None, options: dict[str, Any] | None, timeout_s: float
    ) -> client.Result | None:
        """None: there is no agent."""
        try:
            chosen = self.settings.state_url
            state_url = None if chosen == self.settings.home.state_url else chosen
            return client.call(self.settings.home, verb, name, options, timeout_s, state_url=state_url)
        except client.AgentNotRunning:
            return None
        except client.AgentFailed as error:
            raise VerbError(TIMED_OUT if error.timed_out else FAILED, str(error)) from None

    def no_agent(self, name: str | None) -> VerbError:
        up = self.command("up", name) if name else self.command("up")
        return VerbError(FAILED, f"no agent is running on this host; start it: {up} (or: {self.command('agent')})")

    def status(self, name: str, until: tuple[str, float] | None = None) -> tuple[dict[str, Any], bool]:
        """Status of one volume, and whether an agent told it. `until`: the agent's answer may wait for this phase, for
        so many seconds."""
        check_name(name)
        options = None if until is None else {"until": until[0], "limit_s": until[1]}
        answer = self._ask("status", name, options, STATUS_LIMIT_S + (until[1] if until else 0.0))
        if answer is None:
            from shadowvol.agent.status import status_of

            return status_of(self.record(name), None, host=self.settings.host), False
        if answer.code == NO_SUCH_VOLUME:
            raise no_such_volume(name)
        if answer.code:
            raise VerbError(answer.code, answer.text)
        return answer.data, True

    def statuses(self) -> tuple[list[dict[str, Any]], bool]:
        """Status of all volumes, by name."""
        answer = self._ask("status", None, None, STATUS_LIMIT_S)
        if answer is None:
            from shadowvol.agent.status import status_of

            return [status_of(record, None, host=self.settings.host) for record in self.records().values()], False
        if answer.code:
            raise VerbError(answer.code, answer.text)
        return answer.data, True


pass_invocation = click.make_pass_decorator(Invocation)
