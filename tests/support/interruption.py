"""How a script is interrupted: SIGINT, SIGTERM and SIGHUP end it as an exception would, and what it started goes too.

By default SIGTERM and SIGHUP end Python without its `finally`: agents, members and fio would go on, and a second Ctrl-C
would end the first one's cleaning up.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_BASE = 128  # the exit code is this and the signal's number, as of a shell


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """For the main thread. The first signal raises SystemExit; those that come later are ignored. One that was ignored
    before (nohup, a job in the background) stays so. May be nested."""

    def interrupted(number: int, frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(EXIT_BASE + number)

    before = {each: signal.getsignal(each) for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, interrupted)
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is interrupted:
                signal.signal(each, handler)
