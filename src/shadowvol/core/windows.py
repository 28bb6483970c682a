"""The window protocol: copying a batch of regions while they are written (DESIGN 7). Executed by the leader engine.

`window_steps` is the protocol, numbered as in the design; `done` is its step 7 and 8, run in the exclusive queue;
`picker` opens windows while it may. A window fails (its record is gone, a copy or flush failed, a hold could not
be kept) without consequence: its regions are just not ok, and are picked again after a back-off.

Difference to the design's step 5/6, and why (docs/decisions/0003): the touched blocks that remain at CLOSE are
held and copied in parts of at most Limits.part_bytes, one after the other. A block that was copied under a hold is
clean for good (later writes are mirrored, nothing old can follow), so the parts need not be held together, and the
longest hold of one write has a bound that does not depend on how fast the application writes. For the same reason a
round without a hold (step 4) that leaves as much as the one before is the last, and the copier does not flush between
step 4 and 5: the flush of step 7 is in no hold, so it need not be short, and each flush costs the copy time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shadowvol.core import changes, windowsize
from shadowvol.core.geometry import MIB, Run, merge_runs, overlaps, without
from shadowvol.core.legs import LEG_NAMES, S_OK, SOURCE, T_OK, TARGET, Phase, other
from shadowvol.core.messages import Close, Drop, Flush, Freeze, HoldBlocks, Open, ReleaseBlocks, SetState, Thaw, Touched
from shadowvol.core.records import WindowRecord, encode_window
from shadowvol.core.steps import AskAll, Copy, Exclusive, Persist, Probe, Steps, WaitFor, WindowVoid
from shadowvol.core.txn import Compare, Holds, Txn

if TYPE_CHECKING:
    from shadowvol.core.kernel import Task
    from shadowvol.core.leader import LeaderEngine


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of the protocol's batches; the simulator uses smaller ones."""

    window_bytes: int = 64 * MIB  # data to copy per window, at first and where the copy is slow
    window_bytes_max: int = 256 * MIB  # where it is fast: each window costs two records and a flush
    window_regions: int = 65536  # regions per window where most is holes: one chunk of the map
    window_bytes_paced: int = 4 * MIB  # where the copy is held back: so much at least
    windows_copying: int = 4  # at once, so that holds and messages of one overlap the copying of others
    windows_open: int = 64  # with those that wait for the flush that serves them together
    flush_delay_s: float = 10.0  # a window waits no longer for that flush, while the application is idle
    touched_small_bytes: int = 4 * MIB  # below this another round without a hold is not worth it
    part_bytes: int = 4 * MIB  # touched blocks held and copied at once: some 10 ms on a disk of 400 MiB/s


TOUCHED_ROUNDS_MAX = 3  # rounds without a hold before CLOSE
PARTS_RETRIED_MAX = 8  # broken holds per window before it gives up
BACKOFF_FIRST_S = 0.25
BACKOFF_LAST_S = 30.0
FLUSH_DELAY_FIRST_S = 0.1  # after a window that failed; each that succeeds doubles it


class WindowFailed(Exception):
    """The window ends without its bits."""

    def __init__(self, reason: str, leg: int | None = None) -> None:
        super().__init__(reason)
        self.leg = leg


@dataclass(slots=True)
class Window:
    """A window at the leader. `runs`: regions; all have `from_leg` as their only ok leg when it opens."""

    id: int
    runs: list[Run]
    from_leg: int
    to_leg: int
    step: str = "pick"
    void_reason: str = ""
    void_thrown: bool = False  # its protocol knows, or is ending anyway
    task: "Task | None" = None
    recorded: bool = False
    copier_session: int | None = None  # which start of the copier has copied into it
    flush_wanted_s: float | None = None  # since when it waits for a flush round
    flush_outcome: "FlushOutcome | None" = None

    def touches(self, runs: list[Run]) -> bool:
        return any(overlaps(runs, lo, hi) for lo, hi in self.runs)

    @property
    def subject(self) -> str:
        return f"w{self.id}"


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    """What a flush round has told a window; `error` is empty when its legs are flushed."""

    error: str = ""
    leg: int | None = None


@dataclass(slots=True)
class Backoff:
    """Waiting time after failed windows; doubles up to a limit, ends with the first success."""

    until_s: float = 0.0
    delay_s: float = 0.0
    reason: str = ""
    failures: int = 0

    def failed(self, now_s: float, reason: str) -> None:
        self.failures += 1
        self.delay_s = min(max(self.delay_s * 2, BACKOFF_FIRST_S), BACKOFF_LAST_S)
        self.until_s = now_s + self.delay_s
        self.reason = reason

    def clear(self) -> None:
        self.until_s = self.delay_s = 0.0
        self.reason = ""
        self.failures = 0


class FlushDelay:
    """How long a closed window waits for a flush (core/flushround.py): `longest_s`, but short after windows that
    failed, so that with a member or copier that is killed again and again some are finished all the same."""

    __slots__ = ("longest_s", "now_s")

    def __init__(self, longest_s: float) -> None:
        self.longest_s = self.now_s = longest_s

    def succeeded(self) -> None:
        self.now_s = min(self.now_s * 2, self.longest_s)

    def failed(self) -> None:
        self.now_s = min(FLUSH_DELAY_FIRST_S, self.longest_s)


# ---------------------------------------------------------------- picking


def may_copy(leader: "LeaderEngine") -> bool:
    """Copying is wanted and possible now."""
    state = leader.state
    return (
        state.phase is Phase.COPYING
        and not state.paused
        and leader.copy_turn
        and leader.copier_up
        and bool(leader.live)
        and not leader.sync_queued
        and not leader.unresolved
        and leader.now_s >= leader.backoff.until_s
    )


def _wanted_values(leader: "LeaderEngine") -> tuple[int, ...]:
    """Map bytes that are worth copying: on the way to an abort only the source is repaired."""
    return (T_OK,) if leader.state.goal == "abort" else (S_OK, T_OK)


def _taken(leader: "LeaderEngine") -> list[Run]:
    """Regions that no new window may have: those of open or ending windows, and quarantined ones."""
    taken = [run for window in leader.windows.values() for run in window.runs]
    if "quarantine" not in leader.omit:
        taken += [run for runs in leader.quarantine.values() for run in runs]
    return merge_runs(taken)


def _next_span(leader: "LeaderEngine") -> tuple[int, int, int] | None:
    """(lo, hi, map byte) of the next stretch to look at, from the cursor on, wrapping once; nothing taken is in it."""
    taken = _taken(leader)
    values = _wanted_values(leader)
    for start in (leader.cursor, 0):
        position = leader.map.next_one_legged(start, values)
        while position >= 0:
            inside = next((run for run in taken if run[0] <= position < run[1]), None)
            if inside is None:
                end = min((lo for lo, _ in taken if lo > position), default=len(leader.map))
                return position, min(end, position + leader.limits.window_regions), leader.map.bits[position]
            position = leader.map.next_one_legged(inside[1], values)
    return None


def may_open(leader: "LeaderEngine") -> bool:
    copying = sum(window.flush_wanted_s is None for window in leader.windows.values())
    room = copying < windowsize.windows_copying(leader) and len(leader.windows) < leader.limits.windows_open
    return room and may_copy(leader) and _next_span(leader) is not None


def picker(leader: "LeaderEngine") -> Steps:
    """For ever: open the next window when one may be opened."""
    while True:
        yield WaitFor(lambda: may_open(leader))
        span = _next_span(leader)
        assert span is not None
        lo, hi, value = span
        from_leg = SOURCE if value == S_OK else TARGET
        start, end = leader.geometry.region_extent(lo, hi)
        stop = yield Probe(from_leg, start, end, windowsize.next_window_bytes(leader))
        if stop is None and not leader.copier_up:
            continue
        if stop is None:
            leader.leg_failed(from_leg, "its extents cannot be read")
            leader.backoff.failed(leader.now_s, f"{LEG_NAMES[from_leg]}: extents cannot be read")
            continue
        hi = min(hi, max(lo + 1, -(-stop // leader.geometry.region_bytes)))
        runs = leader.map.runs_equal(value, lo, hi)
        if not may_copy(leader) or not runs or any(overlaps(_taken(leader), *run) for run in runs):
            continue
        leader.cursor = hi
        leader.state = leader.change_state(window_number=leader.state.window_number + 1)
        window = Window(leader.state.window_number, runs, from_leg, other(from_leg))
        leader.windows[window.id] = window
        leader.spawn(window_steps(leader, window), f"window {window.id}", window)


# ---------------------------------------------------------------- the protocol


def window_steps(leader: "LeaderEngine", window: Window) -> Steps:
    """One window from PICK to its end."""
    try:
        yield from _copy_window(leader, window)
    except WindowVoid as void:
        yield from _fail(leader, window, str(void), None)
    except WindowFailed as failure:
        yield from _fail(leader, window, str(failure), failure.leg)
    else:
        leader.backoff.clear()
        leader.flush_delay.succeeded()
        leader.leg_worked(window.to_leg)
    leader.windows.pop(window.id, None)


def _copy_window(leader: "LeaderEngine", window: Window) -> Steps:
    # 1. PICK: the window's record is durable before anyone acts on it.
    # Built when its turn comes: a verb that ended the copying may have been durable just before it.
    window.recorded = yield Persist(lambda: _record_txn(leader, window))
    if not window.recorded:
        raise WindowFailed("copying has ended")

    # 2. OPEN: from the last answer on every write there goes to both legs, and older ones are finished.
    window.step = "open"
    opening = Open(window.id, window.runs, window.from_leg, window.to_leg)
    everyone = "open-all-members" not in leader.omit
    answers = yield AskAll(opening, window.subject, timeout_s=None if everyone else 0.0)
    if everyone:
        _refused(answers)

    # 3. COPY everything, but what was overwritten whole on both legs already.
    window.step = "copy"
    todo = _without_fresh(leader, window, answers)
    began_s = leader.now_s
    yield from _copy(leader, window, [leader.geometry.region_extent(*run) for run in todo], recopy=False)
    windowsize.fit_next_window(leader, leader.now_s - began_s)

    # 4. TOUCHED: rounds without a hold, as long as each leaves much less than the one before.
    window.step = "touched"
    remaining: list[Run] = []
    before_bytes: int | None = None
    for _ in range(TOUCHED_ROUNDS_MAX):
        answers = yield AskAll(Touched(window.id), window.subject)
        remaining = _union(leader, window, answers)
        left_bytes = _bytes_of(leader, remaining)
        shrinks = before_bytes is None or left_bytes * 2 <= before_bytes
        if left_bytes <= leader.limits.touched_small_bytes or not shrinks:
            break
        yield from _copy(leader, window, _block_extents(leader, remaining), recopy=True)
        before_bytes, remaining = left_bytes, []

    # 5. CLOSE: the blocks that are left, of all members together; 6. hold, copy and release them part by part.
    window.step = "close"
    answers = yield AskAll(Close(window.id), window.subject)
    remaining = merge_runs(remaining + _union(leader, window, answers))
    if "recopy-touched" not in leader.omit:
        yield from _copy_held(leader, window, remaining)

    # 7. Both legs are flushed, by the copier and by every member; then the bits, if the record is still there.
    # 8. DONE.
    window.step = "flush"
    yield from _flush_copier(leader, window)
    if "flush-members" not in leader.omit:
        answers = yield AskAll(Flush(window.id), window.subject)
        _refused(answers)
        if any(answer["failed"] for answer in answers.values()):
            raise WindowFailed("a member's flush failed")
    window.step = "done"
    if "done-before-clear" in leader.omit:
        finished = yield from done(leader, window, window.subject)
    else:
        finished = yield Exclusive(done(leader, window))
    if not finished:
        raise WindowFailed(window.void_reason or "its record is gone")


def record_put(leader: "LeaderEngine", window: Window, *, void: bool = False) -> tuple[str, bytes]:
    record = WindowRecord(window.id, leader.epoch, window.from_leg, window.to_leg, tuple(window.runs), void)
    return leader.keys.window(window.id), encode_window(record)


def _record_txn(leader: "LeaderEngine", window: Window) -> Txn | None:
    copying = leader.state.phase is Phase.COPYING or "window-only-copying" in leader.omit
    if not copying or window.void_reason:
        return None
    # Relaxed: after a power failure nobody is left who acts on it, and its regions are just not ok.
    return leader.txn(state=leader.state, puts=(record_put(leader, window),), relaxed=True)


def _copy_held(leader: "LeaderEngine", window: Window, remaining: list[Run]) -> Steps:
    if not remaining:
        return
    # One window at a time: of the copier's urgent work, what a held write waits for is one part.
    yield WaitFor(lambda: all(each.step != "hold" for each in leader.windows.values()))
    window.step = "hold"
    part_blocks = max(1, leader.limits.part_bytes // leader.geometry.block_bytes)
    parts = _parts(remaining, part_blocks)
    broken = 0
    while parts:
        part = parts.pop(0)
        answers = yield AskAll(HoldBlocks(window.id, part), window.subject)
        _refused(answers)
        yield from _copy(leader, window, _block_extents(leader, part), recopy=True, urgent=True)
        answers = yield AskAll(ReleaseBlocks(window.id), window.subject)
        _refused(answers)
        if not all(answer["unbroken"] for answer in answers.values()):
            broken += 1
            if broken > PARTS_RETRIED_MAX:
                raise WindowFailed("holds could not be kept: the copy is too slow for the hold limit")
            part_blocks = max(1, part_blocks // 2)
            parts = _parts(part, part_blocks) + parts


def done(leader: "LeaderEngine", window: Window, subject: str = "x") -> Steps:
    """Steps 7 (persist) and 8 (DONE), in the exclusive queue. Outcome: the bits are set."""
    check = "window-record-compare" not in leader.omit
    changed = leader.map.copy()
    in_doubt = [] if "doubt-flips" in leader.omit else _common(window.runs, leader.state.doubtful[window.from_leg])
    certain = tuple(
        tuple(without(list(runs), in_doubt)) if leg == window.from_leg else runs
        for leg, runs in enumerate(leader.state.doubtful)
    )

    def build() -> Txn | None:
        if check and window.void_reason:
            return None
        changed.bits[:] = leader.map.bits
        changed.set_ok(window.to_leg, window.runs)
        changed.clear_ok(window.from_leg, in_doubt)
        key = leader.keys.window(window.id)
        compares = (Compare(key, Holds.VALUE, record_put(leader, window)[1]),) if check else ()
        state = leader.change_state(doubtful=certain)
        # Relaxed where it only adds bits: without them both legs hold all the same. "Synced" is never taken back.
        relaxed = not in_doubt and changed.count_both() < len(changed)
        return leader.txn(
            state=state, new_map=changed, chunks=window.runs, deletes=(key,), compares=compares, relaxed=relaxed
        )

    persisted = yield Persist(build, may_fail=False)
    if not persisted:
        return False
    leader.map.bits[:] = changed.bits
    leader.state = leader.change_state(doubtful=certain)
    window.recorded = False
    reads_move = window.to_leg == leader.state.preferred or bool(in_doubt)
    if reads_move:
        answers = yield AskAll(Freeze(window.runs, reads=bool(in_doubt), writes=True), subject)
        faults = [(leg, [(lo, hi) for lo, hi in runs]) for a in answers.values() for leg, runs in a["faults"]]
        if faults:
            # A failed write that is not settled yet: no member may read its leg there once another reads the other.
            yield AskAll(Freeze(window.runs, reads=True, writes=True), subject)
            yield from changes.persist_clear(leader, faults, window.runs)
    # What the map says now, for all of the window's regions, in one change.
    said = tuple((leg, True, runs) for leg in (SOURCE, TARGET) if (runs := _ok_runs(leader, window, leg)))
    unsaid = tuple((leg, False, runs) for leg in (SOURCE, TARGET) if (runs := _only_runs(leader, window, other(leg))))
    yield AskAll(SetState(changes=said + unsaid, close=(window.id,)), subject)
    if reads_move:
        yield AskAll(Thaw(), subject)
    return True


def _only_runs(leader: "LeaderEngine", window: Window, leg: int) -> list[Run]:
    """The window's regions where `leg` alone is ok."""
    return [run for lo, hi in window.runs for run in leader.map.runs_equal(1 << leg, lo, hi)]


def _ok_runs(leader: "LeaderEngine", window: Window, leg: int) -> list[Run]:
    both = [run for lo, hi in window.runs for run in leader.map.runs_equal(S_OK | T_OK, lo, hi)]
    return merge_runs(both + _only_runs(leader, window, leg))


def _fail(leader: "LeaderEngine", window: Window, reason: str, leg: int | None) -> Steps:
    """The window's regions are just not ok. Its copy jobs have ended when this runs (every Copy was resumed)."""
    window.void_thrown = True
    window.step = "end"
    key = leader.keys.window(window.id)
    yield Persist(lambda: leader.txn(deletes=(key,)) if window.recorded or window.void_reason else None)
    window.recorded = False
    yield AskAll(Drop(window.id, window.runs), window.subject)
    if leg is not None:
        leader.leg_failed(leg, reason)
    leader.flush_delay.failed()
    leader.backoff.failed(leader.now_s, reason)


# ---------------------------------------------------------------- pieces


def _refused(answers: dict[str, dict[str, Any]]) -> None:
    if not answers:
        raise WindowFailed("no member is left")
    for host, answer in answers.items():
        if "no" in answer:
            raise WindowFailed(f"{host}: {answer['no']}")


def _copy(leader: "LeaderEngine", window: Window, extents: list[Run], *, recopy: bool, urgent: bool = False) -> Steps:
    if not extents:
        return
    if window.copier_session is None:
        window.copier_session = leader.copier_session
    result = yield Copy(extents, window.from_leg, window.to_leg, urgent)
    if not result.ok:
        raise WindowFailed(result.error, result.leg)
    counter = "bytes_recopied" if recopy else "bytes_copied"
    leader.state = leader.change_state(**{counter: getattr(leader.state, counter) + result.bytes_read})


def _flush_copier(leader: "LeaderEngine", window: Window) -> Steps:
    """Wait for the round of core/flushround.py that serves this window."""
    if "flush-copier" in leader.omit:
        return
    window.flush_wanted_s = leader.now_s
    yield WaitFor(lambda: window.flush_outcome is not None)
    assert window.flush_outcome is not None
    if window.flush_outcome.error:
        raise WindowFailed(window.flush_outcome.error, window.flush_outcome.leg)


def _without_fresh(leader: "LeaderEngine", window: Window, answers: dict[str, dict[str, Any]]) -> list[Run]:
    """The window's runs less the regions that the only member has overwritten whole on both legs."""
    if not leader.single_member() and "fresh-one-member" not in leader.omit:
        return window.runs
    fresh = merge_runs([(lo, hi) for answer in answers.values() for lo, hi in answer.get("fresh", [])])
    return without(window.runs, fresh)


def _common(runs: list[Run], others: Sequence[Run]) -> list[Run]:
    return [(max(lo, a), min(hi, b)) for lo, hi in runs for a, b in others if a < hi and lo < b]


def _union(leader: "LeaderEngine", window: Window, answers: dict[str, dict[str, Any]]) -> list[Run]:
    """Touched blocks of all members, cut to the window's regions."""
    _refused(answers)
    if "hold-union" in leader.omit:
        answers = dict([next(iter(answers.items()))])
    blocks = merge_runs([(lo, hi) for answer in answers.values() for lo, hi in answer["blocks"]])
    per_region = leader.geometry.blocks_per_region
    inside: list[Run] = []
    for lo, hi in window.runs:
        first, last = lo * per_region, hi * per_region
        inside += [(max(a, first), min(b, last)) for a, b in blocks if a < last and first < b]
    return merge_runs(inside)


def _parts(blocks: list[Run], part_blocks: int) -> list[list[Run]]:
    """Lists of runs of at most `part_blocks` blocks together."""
    parts: list[list[Run]] = []
    room = 0
    for lo, hi in blocks:
        while lo < hi:
            if room == 0:
                parts.append([])
                room = part_blocks
            take = min(room, hi - lo)
            parts[-1].append((lo, lo + take))
            lo += take
            room -= take
    return parts


def _block_extents(leader: "LeaderEngine", blocks: list[Run]) -> list[Run]:
    return [leader.geometry.block_extent(*run) for run in blocks]


def _bytes_of(leader: "LeaderEngine", blocks: list[Run]) -> int:
    return sum(hi - lo for lo, hi in blocks) * leader.geometry.block_bytes
