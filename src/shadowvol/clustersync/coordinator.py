"""The coordinator's protocol: where the one record of truth lives, as seen by agents and the CLI.

Modelled on etcd's key-value API (revisions, transactions with compares, watches), narrowed to what shadowvol uses,
so that SQLite on one host and etcd on a cluster are the same to everything above.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from shadowvol.core.txn import Entry, Txn


class CoordinatorUnreachable(Exception):
    """The record of truth cannot be reached; whether a transaction under way took effect is unknown, but where
    `nothing_changed` says that it did not."""

    nothing_changed = False


class RecordDamaged(Exception):
    """The record does not check out (damaged file, foreign or newer data format). Nothing is guessed."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Entries by key, in key order, as of one revision."""

    revision: int
    entries: dict[str, Entry]


@dataclass(frozen=True, slots=True)
class Committed:
    """Outcome of a transaction: whether its compares held, and the store's revision afterwards."""

    ok: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """One key's newest state after a change; `entry` is None when the key was deleted."""

    key: str
    entry: Entry | None
    revision: int


class Coordinator(Protocol):
    """All methods raise CoordinatorUnreachable; reads are linearizable; a returned commit is durable,
    if it was not relaxed."""

    async def read(self, prefix: str) -> Snapshot:
        """All entries whose key starts with `prefix` (the exact key counts too)."""
        ...

    async def commit(self, txn: Txn) -> Committed:
        """Judge and apply `txn` atomically. When this returns with ok, it is durable (power loss), and so is every
        one before it; a relaxed one may wait for the next that is not (core/txn.py)."""
        ...

    def watch(self, prefix: str, after_revision: int) -> AsyncGenerator[list[Change], None]:
        """Batches of changes to keys under `prefix` above `after_revision`: of each key its last state at least.

        Close it when done (contextlib.aclosing)."""
        ...

    async def aclose(self) -> None: ...
