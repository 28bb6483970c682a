"""What leader and members say to each other, as data, and its form on the wire.

A leader's Request carries (epoch, incarnation, seq, subject). A member obeys only the newest epoch and its own
incarnation; within a subject ("x" for exclusive changes, "f" for flushes, "w<id>" for a window) it executes each
seq once, repeats its answer when the request is repeated, and ignores what is older. So lost, repeated and
overtaken messages are harmless. A member's Ask is repeated by the member until it is replied to.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from shadowvol.core.geometry import Run

Runs = list[Run]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Check what `verb` needs; open the legs in `legs` (name -> leg record). Answer {"no": reason} or {}."""

    verb: str
    legs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Freeze:
    """Hold new reads/writes in `runs` of regions (None: everywhere), finish those in flight.

    Answer {"faults": [[leg, zone runs]…]}: faults not yet replied to."""

    runs: Runs | None
    reads: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class SetState:
    """Change the member's picture at once; None: unchanged.

    `bits`: the whole map (then windows and fresh marks are dropped). `changes`: (leg, ok, runs). `close`: windows."""

    phase: str | None = None
    preferred: int | None = None
    bits: bytes | None = None
    changes: tuple[tuple[int, bool, Runs], ...] = ()
    close: tuple[int, ...] = ()
    fresh_allowed: bool | None = None


@dataclass(frozen=True, slots=True)
class Thaw:
    """Let the frozen I/O go."""


@dataclass(frozen=True, slots=True)
class Open:
    """Step 2: write `runs` to both legs, remember touched blocks. Answer {"fresh": runs} after the drain."""

    window: int
    runs: Runs
    from_leg: int
    to_leg: int


@dataclass(frozen=True, slots=True)
class Touched:
    """Step 4: answer {"blocks": runs} and forget those without a write in flight."""

    window: int


@dataclass(frozen=True, slots=True)
class Close:
    """Step 5: answer {"blocks": runs}; nothing is forgotten."""

    window: int


@dataclass(frozen=True, slots=True)
class HoldBlocks:
    """Step 5: hold new writes to these runs of blocks, finish those in flight, answer {}."""

    window: int
    blocks: Runs


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """Step 6: let them go; answer {"unbroken": bool}."""

    window: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The window (`runs`) has ended without its bits and its copier writes no more: forget it, and fresh marks there.

    Also for a window that the member never knew: fresh marks made while its copier could still write prove nothing."""

    window: int
    runs: Runs = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flush:
    """Step 7: flush both legs on the member's own connections; answer {"failed": [leg…]}."""

    window: int


@dataclass(frozen=True, slots=True)
class LegLost:
    """The copier's flush of this leg failed: tell a flush fault for everything unflushed on it. Answer {}."""

    leg: int
    error: str


Body = LegLost | Prepare | Freeze | SetState | Thaw | Open | Touched | Close | HoldBlocks | ReleaseBlocks | Drop | Flush


@dataclass(frozen=True, slots=True)
class Request:
    epoch: int
    incarnation: int
    seq: int
    subject: str
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    epoch: int
    incarnation: int
    seq: int
    body: dict[str, Any]


# ---- what a member asks for ----


@dataclass(frozen=True, slots=True)
class LogZones:
    """Make these zones durable in this member's activity log."""

    zones: Runs


@dataclass(frozen=True, slots=True)
class UnlogZones:
    """Remove these zones from it."""

    zones: Runs


@dataclass(frozen=True, slots=True)
class Fault:
    """Legs that failed an operation: ((leg, zone runs), …). Replied to when the consequence is durable everywhere."""

    legs: tuple[tuple[int, Runs], ...]
    operation: str  # "read" | "write" | "flush" | "open"
    error: str


@dataclass(frozen=True, slots=True)
class ClearUndo:
    """A write is about to make the source stale in these zones (after commit --keep-undo)."""

    zones: Runs


Want = LogZones | UnlogZones | Fault | ClearUndo


@dataclass(frozen=True, slots=True)
class Ask:
    incarnation: int
    number: int
    want: Want


@dataclass(frozen=True, slots=True)
class Reply:
    incarnation: int
    number: int


BODIES: dict[str, type] = {
    kind.__name__: kind
    for kind in (LegLost, Prepare, Freeze, SetState, Thaw, Open, Touched, Close, HoldBlocks, ReleaseBlocks, Drop, Flush)
}
WANTS: dict[str, type] = {kind.__name__: kind for kind in (LogZones, UnlogZones, Fault, ClearUndo)}


def _plain(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in fields(thing)}


def to_wire(message: Request | Answer | Ask | Reply) -> tuple[dict[str, Any], bytes]:
    """(JSON object, binary blob). The blob holds the map of a SetState, else it is empty."""
    wire = _plain(message)
    wire["type"] = type(message).__name__
    blob = b""
    if isinstance(message, Request):
        wire["kind"] = type(message.body).__name__
        wire["body"] = _plain(message.body)
        if isinstance(message.body, SetState) and message.body.bits is not None:
            blob = message.body.bits
            wire["body"]["bits"] = True
    elif isinstance(message, Ask):
        wire["kind"] = type(message.want).__name__
        wire["want"] = _plain(message.want)
    return wire, blob


def _runs(value: Any) -> Any:
    return None if value is None else [(lo, hi) for lo, hi in value]


def from_wire(wire: dict[str, Any], blob: bytes) -> Request | Answer | Ask | Reply:
    """The inverse of to_wire; KeyError, TypeError or ValueError on anything else."""
    kind = wire["type"]
    if kind == "Answer":
        return Answer(wire["epoch"], wire["incarnation"], wire["seq"], wire["body"])
    if kind == "Reply":
        return Reply(wire["incarnation"], wire["number"])
    if kind == "Ask":
        want = dict(wire["want"])
        if "zones" in want:
            want["zones"] = _runs(want["zones"])
        if "legs" in want:
            want["legs"] = tuple((leg, _runs(runs)) for leg, runs in want["legs"])
        return Ask(wire["incarnation"], wire["number"], WANTS[wire["kind"]](**want))
    if kind != "Request":
        raise ValueError(f"unknown message type {kind!r}")
    body = dict(wire["body"])
    if "runs" in body:
        body["runs"] = _runs(body["runs"])
    if "blocks" in body:
        body["blocks"] = _runs(body["blocks"])
    if wire["kind"] == "SetState":
        body["bits"] = blob if body["bits"] else None
        body["changes"] = tuple((leg, on, _runs(runs)) for leg, on, runs in body["changes"])
        body["close"] = tuple(body["close"])
    return Request(wire["epoch"], wire["incarnation"], wire["seq"], wire["subject"], BODIES[wire["kind"]](**body))
