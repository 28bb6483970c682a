"""A leg's medium that may do what real ones do: be slow, tear, fail, forget what was not flushed.

Faults allowed (a correct system survives exactly these): each block of a request lands or is fetched at its own
instant between begin and end; a write or read may fail, having landed in part; a flush may fail, after which what
was written before may be lost at a power loss although later flushes succeed, and each opener is told once
(as Linux tells each open file); a power loss keeps, per block, the flushed value or any later one.
"""

import random


class Disk:
    def __init__(self, name: str, blocks: int, rng: random.Random) -> None:
        self.name = name
        self.rng = rng
        self.cache = [0] * blocks  # what a read sees
        self.durable = [0] * blocks
        self.unflushed: dict[int, list[int]] = {}  # block -> values since it was last durable
        self.fail_read = 0.0
        self.fail_write = 0.0
        self.fail_flush = 0.0
        self.limbo: dict[int, list[int]] = {}  # values that a failed flush lost track of
        self._untold: set[str] = set()  # openers that a failed flush must still be told to
        self.openers: set[str] = set()
        self.faults = 0

    def put(self, block: int, value: int) -> None:
        self.cache[block] = value
        self.unflushed.setdefault(block, []).append(value)

    def flush(self, opener: str) -> bool:
        """True: everything written before is durable. False: told that a flush failed."""
        if opener in self._untold:
            self._untold.discard(opener)
            return False
        if self.rng.random() < self.fail_flush:
            self.faults += 1
            self._untold = self.openers - {opener}
            self._lose_track()
            return False
        for block in list(self.unflushed):
            self.durable[block] = self.cache[block]
            del self.unflushed[block]
            self.limbo.pop(block, None)
        return True

    def _lose_track(self) -> None:
        """Pages are marked clean although they did not land: only a power loss shows it."""
        for block, values in self.unflushed.items():
            self.limbo.setdefault(block, []).extend(values)
        self.unflushed.clear()

    def power_loss(self) -> None:
        for block in {**self.limbo, **self.unflushed}:
            values = self.limbo.get(block, []) + self.unflushed.get(block, [])
            self.durable[block] = self.rng.choice([self.durable[block], *values])
        self.limbo.clear()
        self.unflushed.clear()
        self._untold.clear()
        self.cache = list(self.durable)
