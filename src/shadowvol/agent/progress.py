"""How fast a copy goes and when it will be done, from samples of the map and of the copier. Never guesses backwards.

The rate is of bytes that became ok on both legs over the last RATE_WINDOW_S; holes count, since they need no time. The
ETA divides what is left by it; unknown (None) while nothing moved in that time.
"""

from collections import deque

from shadowvol.agent.copier import Copier
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import Phase

RATE_WINDOW_S = 10.0
SAMPLE_S = 0.5


class Progress:
    """One volume's samples: (seconds, bytes ok on both legs, bytes read by the copier)."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()

    def reset(self) -> None:
        self._samples.clear()

    def sample(self, now_s: float, engine: LeaderEngine, copier: Copier) -> None:
        """Take a sample if one is due."""
        if self._samples and now_s - self._samples[-1][0] < SAMPLE_S:
            return
        if engine.state.phase is not Phase.COPYING:
            self._samples.clear()
            return
        both = engine.map.count_both() * engine.geometry.region_bytes
        if self._samples and copier.bytes_read < self._samples[-1][2]:
            self._samples.clear()  # a new transfer process counts from zero
        self._samples.append((now_s, both, copier.bytes_read))
        while now_s - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def rate_bytes_per_s(self) -> float:
        """What the copier reads per second."""
        if len(self._samples) < 2:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return max(0.0, (last[2] - first[2]) / (last[0] - first[0]))

    def eta_s(self, bytes_left: int) -> float | None:
        """Seconds until the rest is on both legs, or None."""
        if bytes_left <= 0:
            return 0.0
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        gained = last[1] - first[1]
        return None if gained <= 0 else bytes_left * (last[0] - first[0]) / gained
