"""The operator's verbs: what each needs (one table, `refusal`), and how a transition is taken (DESIGN 8, steps 1-5).

"Prepared by all, or not begun": nothing is changed before every member has said yes, everything that was promised
is finished after the record says committed, by this leader or by the next (which gives everyone the whole state).
"""

from typing import TYPE_CHECKING, Any

from shadowvol.core import changes
from shadowvol.core.geometry import Run
from shadowvol.core.legs import LEG_NAMES, SOURCE, TARGET, Phase
from shadowvol.core.messages import Freeze, Prepare, SetState, Thaw
from shadowvol.core.records import VolumeState, dumps
from shadowvol.core.steps import AskAll, Command, Persist, Steps, WaitFor
from shadowvol.core.txn import Compare, Holds, Txn

if TYPE_CHECKING:
    from shadowvol.core.leader import LeaderEngine
    from shadowvol.core.windows import Window

PREPARE_LIMIT_S = 10.0  # opening legs may take a while; nothing is held meanwhile
HOLD_LIMIT_S = 2.0  # new writes are held for at most this long before the transition is given up
FAULT_RETRIES_MAX = 3  # open faults found while preparing are settled first, then it is tried again

WISHES = ("pause", "resume", "throttle", "wishes")  # verbs that members need not know of
REFUSED = 3
FAILED = 1


class Refusal(Exception):
    """A verb that is not allowed now: exit code and text. `held`: members may still hold writes for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.held = False

    def become(self, code: int, text: str) -> None:
        """What is known later."""
        self.code, self.args = code, (text,)


class MemberWent(Exception):
    """A member went while the verb was prepared. Nothing has changed; the verb may begin again when it is back."""


def refusal(leader: "LeaderEngine", verb: str, options: dict[str, Any]) -> str | None:
    """Why the verb is not allowed in this state, saying what is needed; None: it is."""
    state, phase = leader.state, leader.phase
    name = leader.config.name
    preferred = LEG_NAMES[state.preferred]
    all_source = leader.map.is_ok(SOURCE, 0, len(leader.map))
    all_target = leader.map.is_ok(TARGET, 0, len(leader.map))
    if verb in WISHES:
        return None
    if state.goal is not None:
        wait = f"shadowvol wait {name} --for {'setup' if state.goal == 'abort' else 'synced'}"
        paused = f"; copying is paused, so shadowvol resume {name} first" if state.paused else ""
        return f"the {state.goal} of volume {name} is under way: {wait}{paused}"
    if verb == "start":
        return None if phase is Phase.SETUP else f"start needs phase setup; {_stands(leader)}"
    if verb == "cutover":
        if phase not in (Phase.COPYING, Phase.SYNCED):
            return f"cutover needs phase synced (or copying with --early); {_stands(leader)}"
        if state.preferred == TARGET:
            return f"volume {name} already reads from the target; shadowvol undo {name} switches back"
        if phase is Phase.COPYING and not options.get("early"):
            return (
                f"cutover needs phase synced; volume {name} is still copying "
                f"({leader.map.count_both()} of {len(leader.map)} regions); wait, or use --early"
            )
        return None
    if verb == "undo":
        if phase in (Phase.COPYING, Phase.SYNCED):
            already = f"volume {name} already reads from the source; nothing to undo"
            return None if state.preferred == TARGET else already
        if phase is Phase.COMMITTED:
            return None if state.keep_undo else f"volume {name} was committed without --keep-undo; it cannot be undone"
        return f"undo needs a cutover before it; {_stands(leader)}"
    if verb == "commit":
        if phase is Phase.COMMITTED:
            return None if state.keep_undo else f"volume {name} is committed already; nothing is left to do"
        if phase not in (Phase.COPYING, Phase.SYNCED):
            return f"commit needs phase synced; {_stands(leader)}"
        if state.preferred != TARGET:
            return f"commit needs preferred target, {name} reads from the {preferred}: shadowvol cutover {name} first"
        if not all_target:
            return f"commit needs the target complete; {_stands(leader)}"
        if not all_source and not options.get("force"):
            return f"the source of volume {name} is not complete (a leg fault?); wait for its resync, or commit --force"
        return None
    if verb == "abort":
        started = phase in (Phase.COPYING, Phase.SYNCED)
        return None if started else f"abort needs a started migration; {_stands(leader)}"
    return f"{verb} is not a transition"


def _stands(leader: "LeaderEngine") -> str:
    """Where the volume stands, and which verb leads on from there."""
    name, phase, state = leader.config.name, leader.phase, leader.state
    copying = f"shadowvol resume {name}" if state.paused else f"shadowvol wait {name} --for synced"
    onward = {
        Phase.SETUP: f"shadowvol start {name} begins",
        Phase.COPYING: f"{copying} leads on",
        Phase.SYNCED: f"shadowvol {'commit' if state.preferred == TARGET else 'cutover'} {name} is next",
        Phase.COMMITTED: f"shadowvol undo {name} leads back" if state.keep_undo else "its migration is over",
    }[phase]
    return f"volume {name} is in phase {phase}; {onward}"


def perform(leader: "LeaderEngine", command: Command) -> Steps:
    """One command from its check to its answer. Raises MemberWent."""
    verb = command.verb
    why = refusal(leader, verb, command.options)
    if why is not None:
        leader.done(command, REFUSED, why)
        return
    try:
        if verb in WISHES:
            yield from _wish(leader, command)
        elif verb == "abort":
            yield from _abort(leader, command.options)
        else:
            yield from transition(leader, verb, command.options)
    except Refusal as refused:
        leader.done(command, refused.code, f"{refused}; nothing changed" if refused.code == REFUSED else str(refused))
        yield from _let_go_on(refused)
    else:
        leader.done(command, 0)


def _wish(leader: "LeaderEngine", command: Command) -> Steps:
    """Durable wishes that change no phase: paused, rate, impact, up."""
    changed = {"pause": {"paused": True}, "resume": {"paused": False}}.get(command.verb, command.options)
    done = yield Persist(lambda: leader.txn(state=leader.change_state(**changed)))
    if done:
        leader.state = leader.change_state(**changed)
    if command.verb == "resume":
        leader.backoff.clear()


def _abort(leader: "LeaderEngine", options: dict[str, Any]) -> Steps:
    """Let the target go: at once where the source is complete, else when its resync is done (then: goal)."""
    if not leader.map.is_ok(SOURCE, 0, len(leader.map)):
        yield Persist(lambda: leader.txn(state=leader.change_state(goal="abort")))
        leader.state = leader.change_state(goal="abort")
        return
    switches = leader.state.preferred == TARGET
    if switches:
        yield from transition(leader, "undo", options)
    try:
        yield from transition(leader, "abort", options)
    except Refusal as refused:
        if switches:
            name = leader.config.name
            refused.become(FAILED, f"{refused}; volume {name} reads from the source again, and is not aborted")
        raise


def advance_goal(leader: "LeaderEngine") -> None:
    """Called at each tick: an abort or an undo-after-commit whose resync is complete is finished."""
    goal = leader.state.goal
    if goal is None or leader.exclusive or not leader.live:
        return
    complete = leader.map.is_ok(SOURCE, 0, len(leader.map))
    if complete and leader.now_s >= leader.goal_retry_s:
        leader.queue_exclusive(_finish_goal(leader, goal), goal)


def _finish_goal(leader: "LeaderEngine", goal: str) -> Steps:
    try:
        if leader.state.preferred == TARGET:
            yield from transition(leader, "undo", {})
        if goal == "abort":
            yield from transition(leader, "abort", {})
        else:
            yield Persist(lambda: leader.txn(state=leader.change_state(goal=None)))
            leader.state = leader.change_state(goal=None)
    except MemberWent:
        pass  # when it is back
    except Refusal as refused:
        leader.state = leader.change_state(last_error=f"{goal}: {refused}")
        leader.goal_retry_s = leader.now_s + 5.0
        yield from _let_go_on(refused)


def _let_go_on(refused: Refusal) -> Steps:
    """Nothing else is begun before every member has let its writes go; nobody waits for that with the answer."""
    if refused.held:
        yield AskAll(Thaw(), "x")


# ---------------------------------------------------------------- the transition itself


def _outcome(state: VolumeState, verb: str, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of the state that the verb changes."""
    if verb == "start":
        counters = {"bytes_copied": 0, "bytes_recopied": 0, "last_switch_pause_ms": None, "last_error": None}
        return {"phase": Phase.COPYING, "preferred": SOURCE, "paused": False, **counters}
    if verb == "cutover":
        return {"preferred": TARGET}
    if verb == "undo" and state.phase is Phase.COMMITTED:
        early = bool(options.get("early"))
        goal = None if early else "undo"
        return {"phase": Phase.COPYING, "preferred": SOURCE if early else TARGET, "keep_undo": False, "goal": goal}
    if verb == "undo":
        return {"preferred": SOURCE}
    if verb == "commit":
        keep = bool(options.get("keep_undo")) and state.phase is not Phase.COMMITTED
        return {"phase": Phase.COMMITTED, "keep_undo": keep}
    return {"phase": Phase.SETUP, "preferred": SOURCE, "goal": None, "keep_undo": False}


def _let_go(state: VolumeState, verb: str, options: dict[str, Any]) -> int | None:
    """The leg whose bits the verb gives up, if any."""
    if verb == "abort":
        return TARGET
    return SOURCE if verb == "commit" and not _outcome(state, verb, options)["keep_undo"] else None


def transition(leader: "LeaderEngine", verb: str, options: dict[str, Any]) -> Steps:
    """Steps 1-5. Raises Refusal and MemberWent with nothing changed."""
    outcome = _outcome(leader.state, verb, options)
    number = leader.next_transition()
    preparing = dumps({"verb": verb, "id": number, "epoch": leader.epoch, "state": "preparing"})
    committed = dumps({"verb": verb, "id": number, "epoch": leader.epoch, "state": "committed"})

    # 1. The record says that we prepare.
    yield Persist(lambda: leader.txn(puts=((leader.keys.transition, preparing),)))
    leader.transition = {"verb": verb, "id": number, "state": "preparing"}

    # 2. PREPARE: every member checks what the verb needs; then new writes are held, those in flight finish.
    try:
        yield from _prepare(leader, verb)
    except (Refusal, MemberWent) as error:
        # A silent member is not waited for here: that the verb is refused is said first, then it gets its Thaw.
        answers = yield AskAll(Thaw(), "x", timeout_s=HOLD_LIMIT_S if isinstance(error, Refusal) else None)
        if isinstance(error, Refusal):
            error.held = not leader.live.keys() <= answers.keys()
        yield Persist(lambda: leader.txn(deletes=(leader.keys.transition,)))
        leader.transition = None
        raise

    # 3. One transaction: the new state, and that it is committed.
    let_go = _let_go(leader.state, verb, options)
    changed = leader.map  # of 4 MiB in a large volume; writes are held: not to be copied for nothing
    everything: list[Run] = [(0, len(changed))]
    if let_go is not None:
        changed = leader.map.copy()
        changed.clear_ok(let_go, everything)
    void: list[Window] = []

    def build() -> Txn:
        if let_go is not None or verb == "commit":
            void[:] = leader.void_windows(verb)
        void_puts, void_deletes = leader.void_records(void)
        return leader.txn(
            state=leader.change_state(**outcome),
            new_map=changed,
            chunks=everything if let_go is not None else None,
            puts=((leader.keys.transition, committed), *void_puts),
            deletes=void_deletes,
            compares=(Compare(leader.keys.transition, Holds.VALUE, preparing),),
        )

    persisted = yield Persist(build)
    if not persisted:
        return
    leader.state = leader.change_state(**outcome)
    leader.map = changed
    for window in void:
        leader.void(window, f"{verb}")
    leader.transition = {"verb": verb, "id": number, "state": "committed"}

    # 4. APPLY: every member switches and keeps holding; when all have, that is recorded.
    gone: tuple[tuple[int, bool, list[Run]], ...] = () if let_go is None else ((let_go, False, everything),)
    apply = SetState(
        phase=leader.state.phase.value,
        preferred=leader.state.preferred,
        changes=gone,
        close=tuple(window.id for window in void),
    )
    if "switch-set-then-release" in leader.omit:
        for host in list(leader.live):
            yield AskAll(apply, "x", hosts=[host])
            yield AskAll(Thaw(), "x", hosts=[host])
    yield AskAll(apply, "x")
    yield Persist(lambda: leader.txn(state=leader.state, deletes=(leader.keys.transition,)))
    leader.transition = None

    # 5. RELEASE. A verb that lets a leg go returns when the copier writes to it no more.
    yield AskAll(Thaw(), "x")
    yield WaitFor(lambda: not any(leader.is_copying(window) for window in void))
    if verb in ("cutover", "undo"):
        pause_ms = round((leader.now_s - leader.freeze_began_s) * 1000, 3)
        leader.state = leader.change_state(last_switch_pause_ms=pause_ms)
    if verb == "start":
        leader.backoff.clear()
        leader.cursor = 0


def _prepare(leader: "LeaderEngine", verb: str) -> Steps:
    members = dict(leader.live)
    if not members or leader.sync_queued or leader.unresolved:
        raise MemberWent
    legs = {"start": (SOURCE, TARGET), "cutover": (TARGET,), "undo": (SOURCE,), "commit": (TARGET,)}.get(verb, ())
    records = leader.config.leg_specs(legs)
    answers = yield AskAll(Prepare(verb, records), "x", timeout_s=PREPARE_LIMIT_S)
    _all_said_yes(leader, verb, members, answers, f"its member did not answer within {PREPARE_LIMIT_S:g} s")
    for _ in range(FAULT_RETRIES_MAX):
        leader.freeze_began_s = leader.now_s
        answers = yield AskAll(Freeze(None, reads=False, writes=True), "x", timeout_s=HOLD_LIMIT_S)
        _all_said_yes(leader, verb, members, answers, f"writes in flight did not end within {HOLD_LIMIT_S:g} s")
        faults = [(leg, [(lo, hi) for lo, hi in runs]) for a in answers.values() for leg, runs in a["faults"]]
        if not faults:
            break
        yield AskAll(Thaw(), "x")
        yield from changes.clear_bits(leader, faults)
        yield from changes.clear(leader)
    else:
        raise Refusal(REFUSED, f"{verb}: a leg keeps failing: {leader.last_leg_error() or 'unknown'}")
    why = refusal(leader, verb, {"early": True, "force": True})
    if why is not None and leader.state.goal is None:
        raise Refusal(REFUSED, why)
    if verb == "abort" and not leader.map.is_ok(SOURCE, 0, len(leader.map)):
        raise Refusal(REFUSED, "abort: the source is not complete any more")


def _all_said_yes(
    leader: "LeaderEngine", verb: str, members: dict[str, int], answers: dict[str, dict[str, Any]], too_late: str
) -> None:
    if leader.live != members:
        raise MemberWent
    for host in members:
        if host not in answers:
            raise Refusal(REFUSED, f"{verb}: host {host} did not prepare in time ({too_late})")
        if "no" in answers[host]:
            raise Refusal(REFUSED, f"{verb}: host {host} is not prepared: {answers[host]['no']}")
