"""Step 7's first half (DESIGN 7): one flush of the copier for all windows that are closed and wait for one.

A flush makes the medium empty its cache, and on many it stops everything else meanwhile. So it is put off: until
nothing is left to copy, or a window has waited for some seconds (windows.FlushDelay). While the application is at work
it is put off for a short time only: many short stops are less to it than one long one.
"""

from typing import TYPE_CHECKING

from shadowvol.core import changes, windows
from shadowvol.core.steps import CopierFlush, Steps, WaitFor

if TYPE_CHECKING:
    from shadowvol.core.leader import LeaderEngine

BUSY_DELAY_S = 0.2


def flusher(leader: "LeaderEngine") -> Steps:
    """For ever: the next round when it is due."""
    while True:
        yield WaitFor(lambda: _due(leader))
        yield from _round(leader)


def _waiting(leader: "LeaderEngine") -> list["windows.Window"]:
    return [
        window
        for window in leader.windows.values()
        if window.flush_wanted_s is not None and window.flush_outcome is None and not window.void_thrown
    ]


def _due(leader: "LeaderEngine") -> bool:
    waiting = _waiting(leader)
    if not waiting:
        return False
    delay_s = leader.flush_delay.now_s
    if leader.application_busy:
        delay_s = min(delay_s, BUSY_DELAY_S)
    oldest_s = min(window.flush_wanted_s or 0.0 for window in waiting)
    if leader.now_s - oldest_s >= delay_s:
        return True
    copying = any(window.flush_wanted_s is None for window in leader.windows.values())
    return not copying and not windows.may_open(leader)


def _round(leader: "LeaderEngine") -> Steps:
    """A window that joins while the flush is under way waits for the next one: this one may have begun before its
    last byte was written."""
    session = leader.copier_session
    served = []
    for window in _waiting(leader):
        if window.copier_session not in (None, session) and "flush-copier-session" not in leader.omit:
            text = "the copier was restarted: the flush of another one proves nothing"
            window.flush_outcome = windows.FlushOutcome(text)
        else:
            served.append(window)
    if not served:
        return
    both = "flush-both-legs" not in leader.omit
    legs = {leg for window in served for leg in ((window.from_leg, window.to_leg) if both else (window.to_leg,))}
    failed_legs = yield CopierFlush(tuple(sorted(legs)))
    outcome = windows.FlushOutcome()
    if failed_legs is None:
        outcome = windows.FlushOutcome("the copier stopped")
    elif failed_legs:
        leg, error = next(iter(failed_legs.items()))
        leader.queue_exclusive(changes.copier_flush_failed(leader, sorted(failed_legs), error), "copier flush failed")
        outcome = windows.FlushOutcome(f"flush: {error}", leg)
    for window in served:
        window.flush_outcome = outcome
