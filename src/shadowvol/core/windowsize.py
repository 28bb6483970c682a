"""How much one window of a copy holds, and how many are copied at once: the leader's choice, outside the protocol."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shadowvol.core.leader import LeaderEngine

PACED_S = 4.0  # of copying per window where it is held back: each costs messages, records and flushes
WINDOWS_PACED = 2  # are enough then: one is copied, the other opens or closes
COPY_SHORT_S, COPY_LONG_S = 1.0, 4.0  # a window copied sooner than this doubles the next one, later halves it


def _is_paced(leader: "LeaderEngine") -> bool:
    """The copy is held back so much that a large window would be open for long."""
    return leader.copy_rate is not None and leader.copy_rate * PACED_S < leader.limits.window_bytes_max


def windows_copying(leader: "LeaderEngine") -> int:
    """How many windows may be copied at once."""
    most = leader.limits.windows_copying
    return min(most, WINDOWS_PACED) if _is_paced(leader) else most


def next_window_bytes(leader: "LeaderEngine") -> int:
    """Data to copy in the next window."""
    if leader.copy_rate is None or not _is_paced(leader):
        return leader.window_bytes
    return min(leader.window_bytes, max(leader.limits.window_bytes_paced, int(leader.copy_rate * PACED_S)))


def fit_next_window(leader: "LeaderEngine", took_s: float) -> None:
    """Windows of about a second: large where that is much, so that records and flushes are few."""
    if took_s < COPY_SHORT_S:
        leader.window_bytes = min(leader.window_bytes * 2, leader.limits.window_bytes_max)
    elif took_s > COPY_LONG_S:
        leader.window_bytes = max(leader.window_bytes // 2, leader.limits.window_bytes)
