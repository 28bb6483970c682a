"""An operator's verb from its arrival to its answer, around what transitions.py decides.

Invariants
- A verb begins only when every member has the state (`_members_missing` is empty): one that died a moment ago is being
  started again, and its recovery comes before any change. Until then the verb waits outside the exclusive queue, where
  the recovery runs.
- A member that goes while a verb is being prepared ends the attempt, with nothing changed; the verb begins again.
- Every verb is answered in bounded time: one that could not begin within TURN_LIMIT_S of its arrival is withdrawn, and
  says what it waited for; one that has not ended within RUN_LIMIT_S of its beginning says so, and goes on.
"""

from typing import TYPE_CHECKING

from shadowvol.core import transitions
from shadowvol.core.steps import Command, CommandDone, Exclusive, Steps, WaitFor

if TYPE_CHECKING:
    from shadowvol.core.leader import LeaderEngine

TURN_LIMIT_S = 15.0  # a member starts in about a second, and again after at most three while it dies at once
RUN_LIMIT_S = 30.0  # above PREPARE_LIMIT_S and HOLD_LIMIT_S together, with their retries
SILENT_S = 2.0  # a member that has left a request unanswered for so long is named

REFUSED = 3
GOES_ON = 5
_WITHDRAWN = f"after {TURN_LIMIT_S:g} s it was not begun, and nothing changed"


def steps(leader: "LeaderEngine", command: Command) -> Steps:
    """The whole of one verb."""
    while command in leader.commands:
        yield WaitFor(lambda: command not in leader.commands or _may_begin(leader, command))
        yield Exclusive(_turn(leader, command))


def _turn(leader: "LeaderEngine", command: Command) -> Steps:
    """Its turn in the exclusive queue. While it waited there it may have been withdrawn, or a member may have gone."""
    if command not in leader.commands or not _may_begin(leader, command):
        return
    command.begun_s = leader.now_s
    try:
        yield from transitions.perform(leader, command)
    except transitions.MemberWent:
        command.begun_s = None


def _may_begin(leader: "LeaderEngine", command: Command) -> bool:
    """Also what will be refused: that needs no member."""
    return (
        command.verb in transitions.WISHES
        or not _members_missing(leader)
        or transitions.refusal(leader, command.verb, command.options) is not None
    )


def _members_missing(leader: "LeaderEngine") -> str:
    """Why not every member has the state, as a clause; empty: all have."""
    volume = leader.config.name
    if leader.unresolved:
        return f"volume {volume}: the member on {_hosts(leader.unresolved)} lives, but has not reached its agent"
    if leader.sync_queued:
        return f"volume {volume}: a member is joining or being recovered"
    if not leader.live:
        return f"volume {volume}: its member has ended and is being started again"
    return ""


def answer_overdue(leader: "LeaderEngine") -> None:
    """Called at each tick."""
    for command in [command for command in leader.commands if not command.answered]:
        if command.begun_s is None:
            if leader.now_s - command.asked_s >= TURN_LIMIT_S:
                why = f"{_what_is_waited_for(leader)}; {_WITHDRAWN}"
                leader.done(command, REFUSED, f"{_word(command)}: {why}\n{_what_to_do(leader)}")
        elif leader.now_s - command.begun_s >= RUN_LIMIT_S:
            why = f"{_what_is_waited_for(leader)}; it goes on, and ends when that does"
            leader.answer(command, GOES_ON, f"{_word(command)}: {why}\n{_what_to_do(leader)}")


def _word(command: Command) -> str:
    """What the operator has typed."""
    if command.verb == "wishes":
        return "up" if command.options.get("up") else "down"
    return command.verb


def is_overdue(answer: CommandDone) -> bool:
    """Whether the verb was answered because its time was over."""
    return answer.code == GOES_ON or _WITHDRAWN in answer.text


def _what_is_waited_for(leader: "LeaderEngine") -> str:
    """A clause."""
    volume = leader.config.name
    if silent := leader.silent_hosts(SILENT_S):
        return f"volume {volume}: the member on {_hosts(silent)} does not answer"
    if missing := _members_missing(leader):
        return missing
    under_way = leader.exclusive[0].name if leader.exclusive else "nothing"
    return f"volume {volume} is busy ({under_way} is under way)"


def _what_to_do(leader: "LeaderEngine") -> str:
    name = leader.config.name
    return f"shadowvol status {name} shows how it stands; a member that hangs may be killed (-9), it is started again"


def _hosts(hosts: dict[str, int] | list[str]) -> str:
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(sorted(hosts))}"
