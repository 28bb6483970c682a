"""An agent with a wrong wall clock: `python -m tests.support.shadowvol_at FILE [the agent's options]`.

FILE holds an offset in seconds, which may change at any time: what a clock that is set back or forward looks like. Only
what Python reads as the time of day is changed, in the agent and nowhere else; monotonic clocks cannot be set.
"""

import sys
import time
from pathlib import Path

_offset_file = Path(sys.argv.pop(1))
_time_ns = time.time_ns


def _shifted_ns() -> int:
    return _time_ns() + int(float(_offset_file.read_text()) * 1e9)


time.time_ns = _shifted_ns
time.time = lambda: _shifted_ns() / 1e9

if __name__ == "__main__":
    from shadowvol.agent.__main__ import main

    sys.exit(main())
