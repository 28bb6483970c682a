"""The member engine by hand: small histories that fix what a fault, a flush and an overtaken request mean."""

from typing import Any

from shadowvol.core.geometry import Geometry
from shadowvol.core.legs import BOTH_OK, S_OK, SOURCE, TARGET
from shadowvol.core.member import DoFlush, MemberEngine, Send
from shadowvol.core.messages import (
    Answer,
    Ask,
    Body,
    Drop,
    Fault,
    Flush,
    Freeze,
    LogZones,
    Open,
    Reply,
    Request,
    SetState,
)

INCARNATION = 7


class Leader:
    """Speaks to one engine and hears what it says."""

    def __init__(self, bits: bytes, preferred: int = SOURCE) -> None:
        self.member = MemberEngine(Geometry(len(bits) * 2, 2, 1, 4), INCARNATION, align_bytes=1)
        self.seq = 0
        self.heard: list[Any] = []
        self.say("x", SetState(phase="copying", preferred=preferred, bits=bits, fresh_allowed=True))

    def say(self, subject: str, body: Body) -> int:
        self.seq += 1
        self.member.receive(Request(1, INCARNATION, self.seq, subject, body), 0.0)
        return self.seq

    def answers(self) -> dict[int, dict[str, Any]]:
        """By seq, what was answered so far; asks of the activity log are replied to."""
        self._hear()
        return {message.seq: message.body for message in self.heard if isinstance(message, Answer)}

    def asks(self, kind: type) -> list[Ask]:
        self._hear()
        return [message for message in self.heard if isinstance(message, Ask) and isinstance(message.want, kind)]

    def reply(self, ask: Ask) -> None:
        self.member.receive(Reply(INCARNATION, ask.number), 0.0)

    def flush_tokens(self) -> list[int]:
        self._hear()
        return [effect.token for effect in self.heard if isinstance(effect, DoFlush)]

    def _hear(self) -> None:
        while effects := self.member.take_effects():
            for effect in effects:
                message = effect.message if isinstance(effect, Send) else effect
                self.heard.append(message)
                if isinstance(message, Ask) and isinstance(message.want, LogZones):
                    self.reply(message)


def write(leader: Leader, start: int, end: int) -> Any:
    """An admitted write; its zone is logged first where it needs to be."""
    ticket = leader.member.admit_write(start, end)
    if ticket is None:
        leader.answers()
        ticket = leader.member.admit_write(start, end)
    assert ticket is not None
    return ticket


def test_a_failed_read_that_waits_for_its_reply_is_not_drained() -> None:
    """Else the hold that clears the leg's bit waits for the read, and the read for the clear."""
    leader = Leader(bytes([BOTH_OK]))
    read = leader.member.admit_read(0, 1)
    assert read is not None
    before = leader.say("x", Freeze([(0, 1)], reads=True, writes=False))
    assert before not in leader.answers()
    leader.member.finish_read(read, [(SOURCE, 0, 1)], "EIO")
    assert before in leader.answers()
    after = leader.say("x", Freeze([(0, 1)], reads=True, writes=False))
    assert after in leader.answers()
    leader.say("x", SetState(changes=((SOURCE, False, [(0, 1)]),)))
    leader.reply(leader.asks(Fault)[0])
    assert read.settled
    assert read.retry


def test_the_late_answer_of_an_overtaken_request_does_not_replace_the_newer_one() -> None:
    """A repeated Drop is answered although the flush before it ended only then."""
    leader = Leader(bytes([S_OK]))
    leader.say("w1", Open(1, [(0, 1)], SOURCE, TARGET))
    flush = leader.say("w1", Flush(1))
    drop = leader.say("w1", Drop(1, [(0, 1)]))
    ticket = leader.member.begin_flush(leader.flush_tokens()[0])
    assert ticket is not None
    leader.member.finish_flush(ticket, {})
    assert flush not in leader.answers()
    leader.heard.clear()
    leader.member.receive(Request(1, INCARNATION, drop, "w1", Drop(1, [(0, 1)])), 0.0)
    assert leader.answers() == {drop: {}}


def test_a_flush_ends_after_those_in_flight_at_its_end_and_fails_with_them() -> None:
    """The error of two overlapping flushes is told to one of them only, and that one may end last."""
    leader = Leader(bytes([S_OK]))
    leader.member.finish_write(write(leader, 0, 1), 0, 1, [])
    first, second = leader.member.begin_flush(), leader.member.begin_flush()
    assert first is not None
    assert second is not None
    leader.member.finish_flush(second, {})
    early = second.settled
    leader.member.finish_flush(first, {SOURCE: "EIO"})
    for fault in leader.asks(Fault):
        leader.reply(fault)
    assert (early, first.settled, second.settled) == (False, True, True)
    assert first.error
    assert second.error


def test_one_flush_error_is_told_once() -> None:
    """A flush that begins after the failure was seen is not drawn in: the error does not go on for ever."""
    leader = Leader(bytes([S_OK]))
    leader.member.finish_write(write(leader, 0, 1), 0, 1, [])
    first = leader.member.begin_flush()
    assert first is not None
    leader.member.finish_flush(first, {SOURCE: "EIO"})
    second = leader.member.begin_flush()
    assert second is not None
    for fault in leader.asks(Fault):
        leader.reply(fault)
    assert first.error
    leader.member.finish_flush(second, {})
    assert second.settled
    assert second.error is None


def test_open_is_refused_while_a_failed_write_is_not_settled() -> None:
    leader = Leader(bytes([BOTH_OK]))
    ticket = write(leader, 0, 1)
    leader.member.finish_write(ticket, 0, 1, [(TARGET, 0, 1)], "EIO")
    seq = leader.say("w1", Open(1, [(0, 1)], SOURCE, TARGET))
    assert "no" in leader.answers()[seq]
    leader.say("x", SetState(changes=((TARGET, False, [(0, 1)]),)))
    leader.reply(leader.asks(Fault)[0])
    assert ticket.error is None
    seq = leader.say("w2", Open(2, [(0, 1)], SOURCE, TARGET))
    assert "no" not in leader.answers()[seq]


def test_a_switch_is_confirmed_when_the_reads_of_the_old_leg_have_ended() -> None:
    leader = Leader(bytes([BOTH_OK]))
    read = leader.member.admit_read(0, 1)
    assert read is not None
    leader.say("x", Freeze(None, reads=False, writes=True))
    switch = leader.say("x", SetState(preferred=TARGET))
    assert switch not in leader.answers()
    leader.member.finish_read(read, [])
    assert switch in leader.answers()


def test_a_drop_ends_the_fresh_mark_that_a_write_in_flight_would_make() -> None:
    """The copier of the dropped window could still write while the write was in flight."""
    leader = Leader(bytes([S_OK]))
    ticket = write(leader, 0, 2)
    leader.say("w1", Drop(1, [(0, 1)]))
    leader.member.finish_write(ticket, 0, 2, [])
    seq = leader.say("w2", Open(2, [(0, 1)], SOURCE, TARGET))
    assert leader.answers()[seq]["fresh"] == []
