"""What leader and members say survives the wire unchanged."""

import json

import pytest

from shadowvol.core import messages as m

BODIES = [
    m.Prepare("start", {"target": {"path": "/x", "identity": "i", "cache": "host"}}),
    m.Freeze(None, True, False),
    m.Freeze([(0, 3), (5, 6)], False, True),
    m.SetState(phase="copying", preferred=1, bits=b"\1\2\3", fresh_allowed=True),
    m.SetState(changes=((1, True, [(0, 2)]), (0, False, [(4, 5)])), close=(7, 8)),
    m.Thaw(),
    m.Open(3, [(0, 4)], 0, 1),
    m.Touched(3),
    m.Close(3),
    m.HoldBlocks(3, [(1, 2)]),
    m.ReleaseBlocks(3),
    m.Drop(3, [(0, 2)]),
    m.Flush(3),
    m.LegLost(1, "flush failed"),
]
WANTS = [
    m.LogZones([(0, 1), (4, 9)]),
    m.UnlogZones([(2, 3)]),
    m.Fault(((0, [(1, 2)]), (1, [(1, 3)])), "write", "Input/output error"),
    m.ClearUndo([(0, 1)]),
]


def over_the_wire(message: object) -> object:
    wire, blob = m.to_wire(message)  # type: ignore[arg-type]
    return m.from_wire(json.loads(json.dumps(wire)), blob)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_requests_survive_the_wire(body: m.Body) -> None:
    request = m.Request(4, 1700000000000, 9, "x", body)
    assert over_the_wire(request) == request


@pytest.mark.parametrize("want", WANTS, ids=lambda want: type(want).__name__)
def test_asks_survive_the_wire(want: m.Want) -> None:
    ask = m.Ask(1700000000000, 3, want)
    assert over_the_wire(ask) == ask


def test_answers_and_replies_survive_the_wire() -> None:
    for message in (m.Answer(1, 2, 3, {"blocks": [[0, 1]]}), m.Reply(2, 3)):
        assert over_the_wire(message) == message


def test_every_body_and_want_has_an_example_here() -> None:
    assert {type(body) for body in BODIES} == set(m.BODIES.values())
    assert {type(want) for want in WANTS} == set(m.WANTS.values())


def test_an_unknown_message_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown message type"):
        m.from_wire({"type": "Gossip"}, b"")
