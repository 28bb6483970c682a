"""A leg's medium that may do what real ones do: be slow, tear, fail, forget what was not flushed.

Faults allowed (a correct system survives exactly these): each block of a request lands or is fetched at its own
instant between begin and end; a write or read may fail, having landed in part; a flush may fail, after which what
was written before may be lost at a power loss although later flushes succeed, and each opener is told once
(as Linux tells each open file); a power loss keeps, per block, the flushed value or any later one.

Two kinds, by `shared`. Shared: all openers have one cache (a local file or disk), so anyone's flush makes all of it
durable and a failed one loses all. Private: each cache owner has its own (an NBD server without multi-conn, hosts with
caches of their own): a flush covers its owner's writes only, and those of members that have died (the contract of an
endpoint asks for that). What a dead copier wrote, no other flush covers.

Not played, because it is a known limit (DESIGN 9): a failed flush loses nothing that was written by an opener which has
died since; nobody is left who could be told.
"""

import random

Unflushed = tuple[int, int, str, str]  # (order, value, owner, opener)


class Disk:
    def __init__(self, name: str, blocks: int, rng: random.Random, shared: bool) -> None:
        self.name = name
        self.rng = rng
        self.shared = shared
        self.cache = [0] * blocks  # what a read sees
        self.durable = [0] * blocks
        self.unflushed: dict[int, list[Unflushed]] = {}  # block -> values since it was last durable
        self.fail_read = 0.0
        self.fail_write = 0.0
        self.fail_flush = 0.0
        self.limbo: dict[int, list[Unflushed]] = {}  # values that a failed flush lost track of
        self._order = 0
        self._durable_order = [0] * blocks
        self._untold: set[str] = set()  # openers that a failed flush must still be told to
        self.openers: set[str] = set()
        self.faults = 0

    def put(self, block: int, value: int, owner: str, opener: str) -> None:
        self._order += 1
        self.cache[block] = value
        self.unflushed.setdefault(block, []).append((self._order, value, owner, opener))

    def flush(self, opener: str, owner: str) -> bool:
        """True: everything that the owner wrote before is durable. False: told that a flush failed."""
        if opener in self._untold:
            self._untold.discard(opener)
            return False
        if self.rng.random() < self.fail_flush:
            self.faults += 1
            self._untold = self.openers - {opener}
            for block, values in self._take(owner).items():
                lost = [entry for entry in values if entry[3] in self.openers]
                kept = [entry for entry in values if entry[3] not in self.openers]
                if lost:
                    self.limbo.setdefault(block, []).extend(lost)
                if kept:
                    self.unflushed[block] = sorted(self.unflushed.get(block, []) + kept)
            return False
        for block, values in self._take(owner).items():
            order, value, _, _ = values[-1]
            if order > self._durable_order[block]:
                self._durable_order[block] = order
                self.durable[block] = value
                self.limbo.pop(block, None)
        return True

    def orphan(self, owner: str) -> None:
        """The owner has died: anyone's flush covers what it wrote."""
        for block, values in self.unflushed.items():
            self.unflushed[block] = [
                (order, value, "" if who == owner else who, opener) for order, value, who, opener in values
            ]

    def must_tell(self, opener: str) -> bool:
        """A failed flush has lost writes, and this opener has not been told yet."""
        return opener in self._untold

    def _take(self, owner: str) -> dict[int, list[Unflushed]]:
        """Remove and return what a flush of this owner covers."""
        if self.shared:
            taken, self.unflushed = self.unflushed, {}
            return taken
        taken = {}
        for block, values in list(self.unflushed.items()):
            mine = [entry for entry in values if entry[2] in (owner, "")]
            if not mine:
                continue
            taken[block] = mine
            rest = [entry for entry in values if entry[2] not in (owner, "")]
            if rest:
                self.unflushed[block] = rest
            else:
                del self.unflushed[block]
        return taken

    def power_loss(self) -> None:
        for block in {**self.limbo, **self.unflushed}:
            values = self.limbo.get(block, []) + self.unflushed.get(block, [])
            later = [value for order, value, _, _ in values if order > self._durable_order[block]]
            self.durable[block] = self.rng.choice([self.durable[block], *later])
        self.limbo.clear()
        self.unflushed.clear()
        self._untold.clear()
        self.cache = list(self.durable)
