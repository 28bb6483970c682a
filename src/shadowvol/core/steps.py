"""What the leader's protocols are made of: the steps they yield and the effects the shell performs. Data only."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from shadowvol.core.geometry import Run
from shadowvol.core.messages import Body, Reply, Request
from shadowvol.core.txn import Txn


@dataclass(slots=True)
class Persist:
    """Commit what `build` returns when its turn comes (None: nothing to do, outcome False). Outcome: bool."""

    build: Callable[[], Txn | None]
    may_fail: bool = False  # a compare beyond the epoch's is meant to be able to fail


@dataclass(slots=True)
class AskAll:
    """Send `body` to all live members (or `hosts`). Outcome: {host: answer}. A member that goes is left out."""

    body: Body
    subject: str
    timeout_s: float | None = None  # then the outcome lacks those that did not answer
    hosts: list[str] | None = None


@dataclass(slots=True)
class Copy:
    """Copy extents (bytes) from leg to leg. Outcome: CopyResult."""

    extents: list[Run]
    from_leg: int
    to_leg: int
    urgent: bool = False
    compare_first: bool = False


@dataclass(slots=True)
class CopierFlush:
    """Flush legs on the copier's own connections. Outcome: {leg: error}, or None: the copier has stopped."""

    legs: tuple[int, ...]


@dataclass(slots=True)
class Probe:
    """How far from `start` (bytes, up to `end`) until `budget` data bytes are met. Outcome: end offset, or None."""

    leg: int
    start: int
    end: int
    budget: int


@dataclass(slots=True)
class WaitFor:
    """Resume when `ready()`; looked at after every event."""

    ready: Callable[[], bool]


@dataclass(slots=True)
class Exclusive:
    """Run another protocol in the exclusive queue. Outcome: its return value."""

    steps: "Steps"


Step = Persist | AskAll | Copy | CopierFlush | Probe | WaitFor | Exclusive
Steps = Generator[Step, Any, Any]


@dataclass(frozen=True, slots=True)
class CopyResult:
    ok: bool
    bytes_read: int = 0
    bytes_written: int = 0
    leg: int | None = None  # the leg that failed; None: the copier went or was told to stop
    error: str = ""


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class SendTo:
    host: str
    message: Request | Reply


@dataclass(frozen=True, slots=True)
class DoPersist:
    token: int
    txn: Txn


@dataclass(frozen=True, slots=True)
class DoCopy:
    job: int
    step: Copy


@dataclass(frozen=True, slots=True)
class DoCancel:
    job: int


@dataclass(frozen=True, slots=True)
class DoCopierFlush:
    job: int
    legs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DoProbe:
    job: int
    step: Probe


@dataclass(frozen=True, slots=True)
class CommandDone:
    """`code` as the CLI's exit codes (DESIGN 12)."""

    number: int
    code: int
    text: str


@dataclass(frozen=True, slots=True)
class Deposed:
    """This engine has lost its leadership (or does not know); throw it away."""

    reason: str


Effect = SendTo | DoPersist | DoCopy | DoCancel | DoCopierFlush | DoProbe | CommandDone | Deposed



class WindowVoid(Exception):
    """Thrown into a window's protocol when its record is gone."""


@dataclass(slots=True, eq=False)
class Command:
    """An operator's verb on its way (core/commands.py)."""

    number: int
    verb: str
    options: dict[str, Any]
    asked_s: float = 0.0
    begun_s: float | None = None  # None: nothing has been done for it
    answered: bool = False  # although it may still go on
