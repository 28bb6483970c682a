"""Compare-and-swap transactions on the record of truth: the only way any state is changed.

A transaction is data. The engines build it, a coordinator (SQLite, etcd, the simulator's) commits it.
All compares are judged at one instant; when every one holds, all puts and deletes take effect together
and durably, else nothing does. This is the common ground of etcd's Txn and of one SQLite transaction.
"""

from dataclasses import dataclass
from enum import Enum


class Holds(Enum):
    """What a compare asks of a key."""

    VALUE = "value"  # the key exists and its value equals the operand
    PRESENT = "present"
    ABSENT = "absent"
    MOD_REVISION = "mod"  # the key exists and was last changed in exactly this revision


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition. `value` is used by VALUE, `revision` by MOD_REVISION."""

    key: str
    holds: Holds
    value: bytes = b""
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Txn:
    """Conditions and changes. A delete whose key ends with "/" deletes every key below it.

    Deletes take effect before puts, so that a prefix can be replaced in one transaction. A key is put once.

    `relaxed`: a power failure of the coordinator's whole host may undo it, with all relaxed ones after the last that is
    not; the death of a process never does. Only for what may as well not have happened when every process on that host
    is gone. A coordinator may treat it like any other.
    """

    compares: tuple[Compare, ...] = ()
    puts: tuple[tuple[str, bytes], ...] = ()
    deletes: tuple[str, ...] = ()
    relaxed: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored value with the revisions (of the whole store) that created and last changed its key."""

    value: bytes
    create_revision: int
    mod_revision: int
