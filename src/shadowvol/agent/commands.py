"""The verbs that one volume's engine works at, from their arrival at the agent to their answer.

An engine is one leadership, and a verb may arrive between two: while the agent has only just started, or after the
record could not be written. It waits for the next one, as long as the record of truth is not known to be out of reach.
A verb that an engine had not begun when its leadership ended is handed to the next; for one it had begun nobody knows
whether it took effect.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from shadowvol.agent.errors import FAILED, REFUSED, UNREACHABLE, VerbError
from shadowvol.core.steps import CommandDone

if TYPE_CHECKING:
    from shadowvol.agent.volume import Volume
    from shadowvol.core.leader import LeaderEngine

LEADERSHIP_LIMIT_S = 15.0  # SQLite's own patience with a record that is locked is a third of it

_Given = tuple[int, str] | None  # exit code and text; None: the engine gave it back, and has done nothing for it


class Commands:
    """Of one volume. `handed` is called after an engine was given something; `change` returns when the volume may have
    another engine."""

    def __init__(self, volume: "Volume", handed: Callable[[], None], change: Callable[[], Awaitable[None]]) -> None:
        self._volume = volume
        self._handed = handed
        self._change = change
        self._number = 0
        self._open: dict[int, Callable[[_Given], None]] = {}

    async def perform(self, verb: str, options: dict[str, Any]) -> tuple[int, str]:
        """(exit code, text) when the engine says that it has ended, or cannot be begun."""
        while True:
            try:
                engine = await self._engine(verb)
            except VerbError as error:
                return error.code, error.text
            answer = await self._hand(engine, verb, options)
            if answer is not None:
                return answer

    def done(self, effect: CommandDone) -> None:
        """The engine's answer."""
        answered = self._open.pop(effect.number, None)
        if answered is not None:
            answered((effect.code, effect.text))

    def leadership_ended(self, engine: "LeaderEngine | None") -> None:
        """What it had not begun goes to the next one."""
        untouched = set() if engine is None else {each.number for each in engine.commands if each.begun_s is None}
        name = self._volume.name
        lost = f"the leadership of volume {name} was lost meanwhile; shadowvol status {name} shows whether it was done"
        pending, self._open = self._open, {}
        for number, answered in pending.items():
            answered(None if number in untouched else (FAILED, lost))

    # ------------------------------------------------------------ inside

    async def _engine(self, verb: str) -> "LeaderEngine":
        """Raises VerbError: there is none, and why."""
        volume = self._volume
        with trio.move_on_after(LEADERSHIP_LIMIT_S):
            while (engine := volume.engine) is None or engine.deposed:
                if volume.error is not None:
                    raise VerbError(volume.error.code, f"{volume.error.text}; nothing changed")
                if volume.ended.is_set():
                    raise VerbError(
                        REFUSED, f"volume {volume.name} is down; bring it up first: shadowvol up {volume.name}"
                    )
                await self._change()
            return engine
        waited = f"the record of truth of volume {volume.name} has not answered for {LEADERSHIP_LIMIT_S:g} s"
        raise VerbError(UNREACHABLE, f"{verb}: {waited}; nothing changed")

    async def _hand(self, engine: "LeaderEngine", verb: str, options: dict[str, Any]) -> _Given:
        self._number += 1
        done = trio.Event()
        outcome: list[_Given] = []

        def answered(given: _Given) -> None:
            outcome.append(given)
            done.set()

        self._open[self._number] = answered
        engine.command(self._number, verb, options, trio.current_time())
        self._handed()
        await done.wait()
        return outcome[0]
