"""One member: the engine, its legs, its data path, the link to the agent, and the threads between them.

Threads (all daemons; the application's requests come on nbdkit's own):
- link: connects, receives, gives each frame to the engine. Opens what a new state needs before the engine has it.
- link-send: sends. See agentlink.py.
- tick: the engine's clock, and the statistics.
- flush: performs DoFlush. It may take as long as the slowest leg; nothing else waits for it.
- legs: performs DoPrepare, opens dead legs again, closes legs that have been let go.

Lock order: the data path's lock is the only one that is held while another thing is called, and under it queues are
filled and nothing blocks. A leg is let go under it, when no I/O uses the leg, and closed after it.
"""

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import Any

from shadowvol.core.activity import IDLE_S
from shadowvol.core.geometry import Geometry
from shadowvol.core.legs import BOTH_OK, LEG_NAMES, S_OK, SOURCE, T_OK, TARGET, Phase, leg_number
from shadowvol.core.member import HOLD_LIMIT_S, DoFlush, DoPrepare, Effect, MemberEngine, Send
from shadowvol.core.messages import Ask, Reply, Request, SetState, from_wire
from shadowvol.link.framing import Frame
from shadowvol.nbd.agentlink import AgentLink
from shadowvol.nbd.counters import Recent, Totals
from shadowvol.nbd.datapath import DataPath
from shadowvol.nbd.filter.cgate import gate_for
from shadowvol.nbd.gate import Gate
from shadowvol.nbd.openlegs import LegRecord, OpenLegs

TICK_S = 0.05
TICK_CALM_S = HOLD_LIMIT_S  # no longer, or a hold that begins meanwhile outlives its limit. Each takes 0.3 ms
# of a processor from the application
NOTED_CALM = 1000  # notes of the executor between two ticks; above, ticks are short, and its list does not fill
TICK_AT_REST_S = 0.5  # while the engine's clock has nothing to do and no request waits
STATS_S = 0.25  # between two statistics frames
STATS_IDLE_S = 1.0  # and while nothing is done
LEG_RETRY_S = 3.0  # a dead leg is tried again this often
TRACE_FRAMES = 20
LEG_POLL_S = 0.25  # a leg to be let go is looked at this often until its last I/O has ended
CLIENT_LEAVES_S = 1.0  # a client that has hung up is gone for nbdkit, too, well before this
DOWN_LIMIT_S = 10.0  # `down` is answered after this long even if the activity log could not be emptied
_DOWN_SKIP_S = 2 * IDLE_S  # the clock jumps by this when nobody is connected any more: every zone is idle at once

_UNITS = ("size_bytes", "region_bytes", "block_bytes", "zone_bytes")  # as recorded at creation

_logger = logging.getLogger("shadowvol.member")

# What must be open before a state takes effect. (The source that is kept for an undo after commit is open already.)
_LEGS_OF_PHASE = {Phase.SETUP: S_OK, Phase.COPYING: BOTH_OK, Phase.SYNCED: BOTH_OK, Phase.COMMITTED: T_OK}


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """What the agent gives a member at its start. `source` and `target` are None where no such leg is known."""

    volume: str
    description: str
    geometry: Geometry
    incarnation: int
    link: str
    source: LegRecord | None
    target: LegRecord | None

    @classmethod
    def parse(cls, text: str) -> "MemberSpec":
        """ValueError when it is not whole."""
        try:
            plain = json.loads(text)
            legs = [plain["legs"][name] for name in LEG_NAMES]
            source, target = (None if leg is None else LegRecord.parse(leg) for leg in legs)
            return cls(
                str(plain["volume"]),
                str(plain["description"]),
                Geometry(*(int(plain[unit]) for unit in _UNITS)),
                int(plain["incarnation"]),
                str(plain["link"]),
                source,
                target,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"spec= is not whole: {error!r}") from None


class GoingDown(Exception):
    """The volume is being taken down here: nobody new is served."""


class Member:
    """See the module. `listen_fd` is the socket clients connect to; it is handed to each agent that says hello.
    `no_filter`: why nbdkit was started without the C filter."""

    def __init__(self, spec: MemberSpec, listen_fd: int | None, no_filter: str | None) -> None:
        self.spec = spec
        self.geometry = spec.geometry
        self.engine = MemberEngine(self.geometry, spec.incarnation, align_bytes=1)
        self.legs = OpenLegs(spec.geometry.size_bytes, self.log)
        self.legs.records = [spec.source, spec.target]
        self.gate: Gate = gate_for(self.engine, no_filter)
        self.data = DataPath(self.engine, self.gate, self.legs, self._queue, self.log)
        self._listen_fd = listen_fd
        self._link = AgentLink(spec.link, self._hello, self._asks, self._received, self.log)
        self._flushes: SimpleQueue[int | None] = SimpleQueue()  # None: the member stops
        self._leg_jobs: SimpleQueue[DoPrepare | None] = SimpleQueue()  # None: look what is to be let go
        self._stopping = threading.Event()
        self._clients = 0
        self._going_down = False
        self._clock_skip_s = 0.0
        self._noted = 0  # of what the executor has told, seen when the last tick had passed
        self._stats_at_s = self._stats_sent_s = 0.0
        self._recent = Recent()
        self._numbers_sent: dict[str, int] = self._totals().numbers()

    def start(self) -> None:
        """Open the source and start the threads. The member serves when the leader has told it the state."""
        self._open(SOURCE, None)
        self._link.start()
        for run, name in ((self._tick, "tick"), (self._flush, "flush"), (self._mind_legs, "legs")):
            threading.Thread(target=self._for_ever, args=(run,), name=name, daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        self._flushes.put(None)
        self._link.stop()
        self.data.stop()

    def client_came(self) -> None:
        """Raises GoingDown."""
        with self.data.lock:
            if self._going_down:
                raise GoingDown(f"{self.spec.volume} is going down")
            self._clients += 1

    def client_left(self) -> None:
        with self.data.lock:
            self._clients -= 1
            self.data.stirred.notify()

    def log(self, text: str) -> None:
        _logger.warning("%s: %s", self.spec.volume, text)

    def _for_ever(self, run: Callable[[], None]) -> None:
        """A thread of a member does not end by an exception."""
        while not self._stopping.is_set():
            try:
                run()
            except Exception:
                if not self._stopping.is_set():
                    self.log(traceback.format_exc(limit=-TRACE_FRAMES))
                self._stopping.wait(TICK_S)

    def _now_s(self) -> float:
        return time.monotonic() + self._clock_skip_s

    # ------------------------------------------------------------------ effects

    def _queue(self, effects: list[Effect]) -> None:
        """With the lock: only fills queues."""
        for effect in effects:
            if isinstance(effect, Send):
                self._link.post(effect.message)
            elif isinstance(effect, DoFlush):
                self._flushes.put(effect.token)
            else:
                self._leg_jobs.put(effect)

    def _flush(self) -> None:
        token = self._flushes.get()
        if token is not None:
            self.data.flush_legs(token)

    # ------------------------------------------------------------------ link

    def _hello(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        message = {
            "type": "Hello",
            "volume": self.spec.volume,
            "incarnation": self.spec.incarnation,
            "pid": os.getpid(),
            "no_filter": self.gate.why_not,
        }
        return message, () if self._listen_fd is None else (self._listen_fd,)

    def _asks(self) -> list[Ask]:
        with self.data.lock:
            return self.engine.outstanding()

    def _received(self, frame: Frame) -> None:
        if frame.message["type"] == "Down":
            force = bool(frame.message.get("force", True))
            threading.Thread(target=self._asked_down, args=(force,), name="down", daemon=True).start()
            return
        message = from_wire(frame.message, frame.blob)
        if not isinstance(message, Request | Reply):
            raise ValueError(f"a member does not take {type(message).__name__}")
        if isinstance(message, Request) and isinstance(message.body, SetState):
            self._open_for(message, message.body)
        with self.data.lock:
            legs = self.engine.open_legs()
            self.gate.collect(self._now_s())
            self.engine.receive(message, self._now_s())
            if self.engine.open_legs() != legs:
                self._keep_only_open_legs()
            self.data.perform()
            self.data.changed.notify_all()
            self.data.stirred.notify()

    # ------------------------------------------------------------------ clock and statistics

    def _tick(self) -> None:
        with self.data.lock:
            at_rest = self.engine.at_rest and not self.data.waiting and not self._going_down
            stirred = at_rest and self.data.stirred.wait(TICK_AT_REST_S)
        if stirred and time.monotonic() < self._stats_sent_s + STATS_IDLE_S:
            return  # and look whether all is still at rest; but clients that come and go must not keep statistics away
        if not at_rest:
            self._stopping.wait(self._until_tick_s())
        with self.data.lock:
            if self._going_down and not self._clients and not self._clock_skip_s:
                self._clock_skip_s = _DOWN_SKIP_S
            self._tick_engine(self._now_s())
            self.data.perform()
            self.data.changed.notify_all()
        now_s = time.monotonic()
        if now_s >= self._stats_at_s:
            self._stats_at_s = now_s + STATS_S
            if self._has_worked() or now_s >= self._stats_sent_s + STATS_IDLE_S:
                self._stats_sent_s = now_s
                self._send_stats()

    def _tick_engine(self, now_s: float) -> None:
        """With the lock. A zone leaves the log only when the executor has let go of it: nbd/gate.py, 4."""
        activity = self.engine.activity
        self.gate.collect(now_s)
        leaving = activity.idle_zones(now_s)
        if leaving:
            self.gate.log_zones(leaving, False)
            self.gate.collect(now_s)
        self.engine.tick(now_s)
        if leaving:
            self.gate.log_zones([zone for zone in leaving if zone in activity.logged], True)

    def _until_tick_s(self) -> float:
        """To the next tick, or to the limit of a hold if that comes first."""
        with self.data.lock:
            noted, self._noted = self.gate.noted - self._noted, self.gate.noted
            hurried = self.data.waiting or self._going_down or noted > NOTED_CALM
            tick_s = TICK_S if hurried else TICK_CALM_S
            held = [window.held_since_s for window in self.engine.windows.values() if window.held_since_s is not None]
            if not held:
                return tick_s
            return min(tick_s, max(0.0, min(held) + HOLD_LIMIT_S - self._now_s()) + 0.001)

    def _send_stats(self) -> None:
        message = self.statistics()
        if self._link.post_if_read(message):
            self._numbers_sent = message["totals"]

    def _has_worked(self) -> bool:
        """Since the last frame, or is at work."""
        with self.data.lock:
            return self._totals().numbers() != self._numbers_sent or self.gate.in_flight() > 0

    def _totals(self) -> Totals:
        return self.gate.totals(self.data.counters)

    def statistics(self) -> dict[str, Any]:
        """The Stats frame: counts since the last one sent, totals, longest times since the last call; `recent`: rates
        and latencies of the last seconds; `latencies`, `holds`: since the start (counters.py). Of all requests, whoever
        executed them."""
        with self.data.lock:
            totals = self._totals()
            longest = self.gate.take_longest(self.data.counters)
            filtered = self.gate.statistics()
            snapshot = asdict(self.engine.snapshot())
            in_flight = snapshot["writes_in_flight"] + snapshot["reads_in_flight"] + self.gate.in_flight()
            clients = self._clients
        numbers = totals.numbers()
        return {
            "type": "Stats",
            "incarnation": self.spec.incarnation,
            **{name: total - self._numbers_sent[name] for name, total in numbers.items()},
            **longest,
            "totals": numbers,
            "recent": self._recent.note(time.monotonic(), totals, longest),
            "latencies": totals.latencies(),
            "holds": {"count": totals.holds, "sum_s": totals.held_s},
            "in_flight": in_flight,
            "filter": filtered,
            "clients": clients,
            "legs": self.legs.statistics(),
            "engine": snapshot,
        }

    # ------------------------------------------------------------------ legs

    def _open(self, leg: int, record: LegRecord | None) -> str | None:
        """Open a leg and keep it open; why it cannot be, or None."""
        with self.data.lock:
            self.legs.kept[leg] = True
        reason = self.legs.open_leg(leg, record)
        with self.data.lock:
            # Only ever more: what was admitted with less does not touch the leg that has just been opened.
            inflight = self.engine.inflight
            inflight.align_bytes = max(inflight.align_bytes, self.legs.block_bytes())
            self.gate.align(inflight.align_bytes)
            if reason is None:
                self.gate.leg_opened(leg, self.legs.endpoints[leg])
        return reason

    def _open_for(self, request: Request, state: SetState) -> None:
        """What the phase after this request writes is open (or dead, and says so) before the engine has it."""
        if request.incarnation != self.spec.incarnation or request.epoch < self.engine.epoch:
            return
        phase = self.engine.phase if state.phase is None else Phase(state.phase)
        for leg in (SOURCE, TARGET):
            if _LEGS_OF_PHASE[phase] & (1 << leg) and not self.legs.kept[leg]:  # else: open, or tried again elsewhere
                self._open(leg, None)

    def _keep_only_open_legs(self) -> None:
        """With the lock, when the legs that the state needs have changed."""
        for leg in (SOURCE, TARGET):
            self.legs.kept[leg] = bool(self.engine.open_legs() & (1 << leg))
        self._leg_jobs.put(None)

    def _mind_legs(self) -> None:
        retry_at_s = time.monotonic() + LEG_RETRY_S
        while not self._stopping.is_set():
            closing = any(self.legs.is_open(leg) and not self.legs.kept[leg] for leg in (SOURCE, TARGET))
            try:
                job = self._leg_jobs.get(timeout=LEG_POLL_S if closing else LEG_RETRY_S)
            except Empty:
                job = None
            if job is not None:
                self._prepare(job)
            for leg in (SOURCE, TARGET):
                self._let_go(leg)
            if time.monotonic() >= retry_at_s:
                retry_at_s = time.monotonic() + LEG_RETRY_S
                for leg in (SOURCE, TARGET):
                    if self.legs.kept[leg] and not self.legs.is_open(leg) and self._open(leg, None) is None:
                        self.log(f"the {LEG_NAMES[leg]} is open again")

    def _let_go(self, leg: int) -> None:
        with self.data.lock:
            if self.legs.kept[leg] or not self.legs.is_open(leg) or self.data.uses(leg):
                return
            if not self.gate.leg_closes(leg):
                return
            endpoint = self.legs.take_out(leg)
        endpoint.close()

    def _prepare(self, job: DoPrepare) -> None:
        try:
            reason = self._prepare_legs(job.legs)
        except Exception as error:
            self.log(traceback.format_exc(limit=-TRACE_FRAMES))
            reason = f"prepare {job.verb}: {error!r}"
        with self.data.lock:
            self.engine.prepared(job.token, reason)
            self.data.perform()

    def _prepare_legs(self, plain_records: dict[str, Any]) -> str | None:
        """Each of these legs is open and answers; or the first reason why not."""
        for name, plain in plain_records.items():
            leg, record = leg_number(name), LegRecord.parse(plain)
            with self.data.lock:
                in_use = bool(self.engine.open_legs() & (1 << leg))
            if not in_use and record != self.legs.records[leg]:  # another one was prepared before, and not used
                with self.data.lock:
                    self.legs.kept[leg] = False
                self._let_go(leg)
            reason = self._open(leg, record) or self.legs.answers(leg)
            if reason is not None:
                with self.data.lock:
                    self.legs.kept[leg] = bool(self.engine.open_legs() & (1 << leg))
                return reason
        return None

    # ------------------------------------------------------------------ going down

    def _asked_down(self, force: bool) -> None:
        """Without `force`, only when no client is connected; one that is just leaving is waited for."""
        until_s = time.monotonic() + CLIENT_LEAVES_S
        while True:
            with self.data.lock:
                clients = self._clients
                if force or not clients:
                    first, self._going_down = not self._going_down, True
                    self.data.stirred.notify()
                    break
            if time.monotonic() >= until_s:
                self._link.post({"type": "DownRefused", "clients": clients})
                return
            self._stopping.wait(TICK_S)
        if first:
            self._go_down()

    def _go_down(self) -> None:
        """Flush, let the activity log empty, say DownReady. `clean`: nothing is in flight, and nothing is logged."""
        until_s = time.monotonic() + DOWN_LIMIT_S
        try:
            if self.engine.joined:
                self.data.flush()
        except OSError as error:
            self.log(f"flush before going down: {error.strerror}")
        while not (clean := self._is_clean()) and time.monotonic() < until_s:
            self._stopping.wait(TICK_S)
        self._link.post({"type": "DownReady", "clean": clean})

    def _is_clean(self) -> bool:
        with self.data.lock:
            activity = self.engine.activity
            logged = activity.logged or activity.leaving or activity.asked or activity.wanted
            return not logged and not self.data.in_flight()
