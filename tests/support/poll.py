"""Waiting for something to become true: the only place in the tests that sleeps.

A condition is "not yet" while it returns something false or raises an Exception, so it may ask a server that is still
starting. It is always asked once more after the deadline has passed, so a stalled machine cannot fail a wait whose
condition became true meanwhile. The clock is the monotonic one.
"""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class _Wait:
    """One wait's deadline and what was seen last, for the message of its failure."""

    def __init__(self, deadline_s: float, what: str) -> None:
        self._what = what
        self._started_s = time.monotonic()
        self._deadline_s = deadline_s
        self._asked = 0
        self._last_value: object = "(never returned)"
        self._last_exception: Exception | None = None

    def expired(self) -> bool:
        return time.monotonic() - self._started_s >= self._deadline_s

    def saw(self, value: object) -> None:
        self._asked += 1
        self._last_value = value

    def failed(self, exception: Exception) -> None:
        self._asked += 1
        self._last_exception = exception

    def give_up(self) -> AssertionError:
        error = AssertionError(
            f"not within {self._deadline_s:g} s: {self._what} (asked {self._asked} times, "
            f"last value {self._last_value!r}, last exception {self._last_exception!r})"
        )
        error.__cause__ = self._last_exception
        return error


def wait_for(condition: Callable[[], T], deadline_s: float, what: str, every_s: float = 0.02) -> T:
    """Ask `condition` every `every_s` until it returns something true, and return that.

    Raises AssertionError with `what`, the last value and the last exception after `deadline_s`.
    """
    wait = _Wait(deadline_s, what)
    while True:
        last_time = wait.expired()
        try:
            value = condition()
        except Exception as exception:
            wait.failed(exception)
        else:
            if value:
                return value
            wait.saw(value)
        if last_time:
            raise wait.give_up()
        time.sleep(every_s)


async def wait_for_async(
    condition: Callable[[], Awaitable[T]], deadline_s: float, what: str, every_s: float = 0.02
) -> T:
    """The same inside a trio test: `condition` is an async function, other tasks run meanwhile."""
    wait = _Wait(deadline_s, what)
    while True:
        last_time = wait.expired()
        try:
            value = await condition()
        except Exception as exception:
            wait.failed(exception)
        else:
            if value:
                return value
            wait.saw(value)
        if last_time:
            raise wait.give_up()
        await trio.sleep(every_s)
