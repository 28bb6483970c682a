"""Making a process that storage depends on hard to stall or to kill. Each step is best effort: without the right the
kernel says no, and the process works as any other does."""

import ctypes
from pathlib import Path

OOM_SCORE_ADJUST = -900  # killed only when hardly anything else is left
_PR_SET_IO_FLUSHER = 57  # memory allocation in this process never waits for file systems to write back (to us)


def harden() -> None:
    """For the calling process and the threads it starts afterwards."""
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUST), encoding="ascii")
    except OSError:
        pass
