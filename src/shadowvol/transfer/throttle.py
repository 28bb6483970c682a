"""The rate limit of ordinary copies: a token bucket that may go into debt by one piece.

A piece is charged when it begins; while the bucket is in debt nothing else begins. Pieces get smaller at low rates, so
that the stream is smooth: neither burst nor debt is worth more than about 50 ms. Pure; time is an argument.
"""

# One read, one write. Below 2 MiB, pages that the kernel reads in one go cross from one piece to the next, are dropped
# with the first and read again: an eighth of all reads (measured). Larger ones delay an urgent copy.
PIECE_BYTES_MAX = 2 << 20
PIECE_BYTES_MIN = 64 << 10  # smaller would cost more in system calls than smoothness is worth
SMOOTH_S = 0.05  # time that one piece may take at the given rate


class RateLimit:
    """Not thread-safe: the pool's lock guards it. `rate` is bytes per second, None is no limit."""

    def __init__(self, now_s: float) -> None:
        self.rate: int | None = None
        self._tokens = 0.0
        self._filled_s = now_s

    def set_rate(self, rate: int | None, now_s: float) -> None:
        """Takes effect at once: an old debt is forgotten, so that a new higher rate does not wait for a lower one.

        Raises ValueError for a rate that would never let anything begin.
        """
        if rate is not None and rate <= 0:
            raise ValueError("a rate is above 0, or None")
        self.rate = rate
        self._tokens = 0.0
        self._filled_s = now_s

    def piece_bytes(self) -> int:
        """How much one piece should be at most."""
        if self.rate is None:
            return PIECE_BYTES_MAX
        wanted = int(self.rate * SMOOTH_S)
        return max(PIECE_BYTES_MIN, min(PIECE_BYTES_MAX, wanted - wanted % PIECE_BYTES_MIN))

    def delay_s(self, now_s: float) -> float:
        """Seconds until a piece may begin; 0 when one may begin now."""
        if self.rate is None:
            return 0.0
        burst = min(float(PIECE_BYTES_MAX), self.rate * SMOOTH_S)
        self._tokens = min(burst, self._tokens + max(0.0, now_s - self._filled_s) * self.rate)
        self._filled_s = now_s
        # A debt below one byte is none: rounding would leave one that is shorter than the clock can tell.
        return -self._tokens / self.rate if self._tokens <= -1 else 0.0

    def charge(self, byte_count: int) -> None:
        """Account for a piece; a negative count gives back what was charged in advance and not used."""
        if self.rate is not None:
            self._tokens -= byte_count
