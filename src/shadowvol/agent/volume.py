"""One volume that is up on this host: the leader engine with everything that performs its effects.

All of it runs in the agent's one trio thread, so the engine needs no lock: whoever calls it calls _pump() afterwards.
Nothing here decides about the state of a migration; what it looks like it decides (restart, retry) is about processes.

A leadership ends when its engine says Deposed (another leader, or a transaction with unknown outcome): the copier is
ended and awaited, the record read again, and a new engine starts from it. Members stay up meanwhile.
"""

import logging
import math
import time
from contextlib import suppress
from typing import Any

import trio

from shadowvol.agent.access import SocketAccess
from shadowvol.agent.attachment import Attachment
from shadowvol.agent.commands import Commands
from shadowvol.agent.copier import Copier
from shadowvol.agent.dataplane import DataPlane
from shadowvol.agent.errors import FAILED, UNREACHABLE, VerbError
from shadowvol.agent.iostatus import is_fresh
from shadowvol.agent.logkeeper import LogKeeper
from shadowvol.agent.pacing import Pacer
from shadowvol.agent.paths import Home
from shadowvol.agent.progress import Progress
from shadowvol.agent.status import iso_utc
from shadowvol.clustersync.coordinator import Coordinator, CoordinatorUnreachable
from shadowvol.core.leader import LeaderEngine
from shadowvol.core.legs import Phase
from shadowvol.core.messages import Answer, Ask, LogZones, UnlogZones
from shadowvol.core.records import (
    Keys,
    RecordError,
    VolumeConfig,
    VolumeRecord,
    decode_volume,
    leadership_txn,
)
from shadowvol.core.steps import (
    CommandDone,
    CopierFlush,
    Deposed,
    DoCancel,
    DoCopierFlush,
    DoCopy,
    DoPersist,
    DoProbe,
    Effect,
    SendTo,
)
from shadowvol.core.throttle import Pace
from shadowvol.nbd.serve import member_spec

TICK_S = 0.05
TICK_CALM_S = 0.2  # while it only copies: events bring that on, and each tick takes 0.1 ms from the application
TICK_AT_REST_S = 2.0  # while the engine says that time alone brings nothing on
LEAD_RETRY_S = 1.0  # between attempts to take the leadership while the coordinator cannot be reached
DOWN_LIMIT_S = 15.0  # for a member to drain, flush and empty its log
REPLACE_LIMIT_S = 10.0  # for another member to serve after one was killed
BUSY_S = 2.0  # the application counts as busy so long after a request

_logger = logging.getLogger("shadowvol.agent")


class Volume:
    """Call run() in a task. `engine` is None while no leadership is held. `listening`: clients can connect."""

    def __init__(
        self,
        home: Home,
        coordinator: Coordinator,
        config: VolumeConfig,
        host: str,
        access: SocketAccess,
        pacer: Pacer,
    ) -> None:
        self.name = config.name
        self.config = config
        self.host = host
        self.engine: LeaderEngine | None = None
        self.error: VerbError | None = None  # why no leadership is held, as a verb is told
        self.progress = Progress()
        self.allowed = Pace(None)  # to its copy, by the throttle of this host
        self.copies_ahead: list[str] = []  # whose copies it waits for
        self.longest = {"hold_longest_s": 0.0, "write_longest_s": 0.0, "read_longest_s": 0.0}  # since it is up here
        self.listening = trio.Event()
        self._home = home
        self._access = access
        self._coordinator = coordinator
        self._pacer = pacer
        self._changed = trio.Event()  # set, and replaced, whenever the engine may have changed
        self._copier_need_seen: object = None  # by the one task that minds the copier
        self._copier_need_changed = trio.Event()
        self._commands = Commands(self, self._pump, lambda: self._changed.wait())
        self._last_request_s = -BUSY_S  # when the application was last seen at work
        self._log = LogKeeper(config.name, coordinator, host)
        self._nursery: trio.Nursery | None = None
        self._copier_scope: trio.CancelScope | None = None
        self._copier_ended = trio.Event()
        self._copier_ended.set()
        self.copier = self._new_copier()
        self.plane: DataPlane | None = None
        self.attachment = Attachment(self.name, home, coordinator, host, self.wait_serving)
        self._scope = trio.CancelScope()
        self.ended = trio.Event()

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Until take_down() or cancellation. Cancelled (the agent ends), the member is left running."""
        try:
            with self._scope:
                record = await self._read_when_reachable()
                self._log.load(record)
                self.plane = DataPlane(
                    self.name,
                    self._home.volume_socket(self.name),
                    self._home.member_lock(self.name),
                    lambda incarnation: member_spec(self.config, self._home.link_socket, incarnation),
                    self._access,
                    listening=self.listening.set,
                    up=self._member_up,
                    gone=self._member_gone,
                    message=self._member_said,
                    statistics=self._member_counts,
                    newest_incarnation=record.members.get(self.host, 0),
                )
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._log.run, self.plane)
                    nursery.start_soon(self.plane.run)
                    self.attachment.restore(record.attached, self.host)
                    nursery.start_soon(self.attachment.run)
                    nursery.start_soon(self._tick)
                    nursery.start_soon(self._mind_copier)
                    await self._lead_for_ever()
        finally:
            engine, self.engine = self.engine, None
            self.listening.set()  # nobody waits for it any more
            self.ended.set()
            self._commands.leadership_ended(engine)
            self._wake()

    async def _lead_for_ever(self) -> None:
        """A new leadership whenever the last one has ended."""
        while True:
            try:
                record = await self._read()
                taken = await self._coordinator.commit(leadership_txn(self.name, record, self.host))
                if not taken.ok:
                    continue
                record = await self._read()
            except CoordinatorUnreachable as error:
                await self._is_unreachable(error)
                continue
            self.error = None
            self.config = record.config
            self._deposed = trio.Event()
            engine = LeaderEngine(record, self.host)
            engine.copy_turn = False  # until the pacer says so
            self.engine = engine
            self.progress.reset()
            _logger.info("%s: leading, epoch %d, phase %s", self.name, engine.epoch, engine.phase)
            assert self.plane is not None
            if self.plane.incarnation is not None:
                self._meet_member(engine, self.plane.incarnation)
            elif self.host in engine.unresolved and self.plane.proven_dead:
                engine.on_member_gone(self.host, self._log.runs(), trio.current_time())
            self._pump()
            await self._deposed.wait()
            self.engine = None
            self._commands.leadership_ended(engine)
            self._stop_copier()
            await self._copier_ended.wait()

    async def _is_unreachable(self, error: CoordinatorUnreachable) -> None:
        """Verbs are told, and it is time for another attempt when this returns."""
        self.error = VerbError(UNREACHABLE, f"the record of truth cannot be reached: {error}")
        _logger.error("%s: %s; trying again", self.name, self.error.text)
        self._wake()
        await trio.sleep(LEAD_RETRY_S)

    async def _read_when_reachable(self) -> VolumeRecord:
        while True:
            try:
                return await self._read()
            except CoordinatorUnreachable as error:
                await self._is_unreachable(error)

    async def _read(self) -> VolumeRecord:
        snapshot = await self._coordinator.read(Keys(self.name).prefix)
        if Keys(self.name).config not in snapshot.entries:
            raise RecordError(f"volume {self.name} is not recorded any more")
        return decode_volume(self.name, snapshot.entries)

    async def take_down(self, force: bool) -> tuple[int, str]:
        """Drain, flush, end the member. (exit code, text). Refused with clients connected unless `force`.

        A member that hangs is killed in any case: what it was asked it might do much later."""
        if self.plane is None:  # nothing was started yet
            return UNREACHABLE, f"{self.error.text if self.error else 'the record of truth does not answer'}; try again"
        if self.plane.incarnation is not None:
            self.plane.ask_down(force)
            with trio.move_on_after(DOWN_LIMIT_S) as waiting:
                await self.plane.down_ready.wait()
            if waiting.cancelled_caught and not is_fresh(self.plane.age_s()):  # else it is slow, and has no clients
                if not force:
                    return FAILED, await self._replace_silent_member(self.plane)
                self.plane.kill()
            if self.plane.down_clients:
                clients = self.plane.down_clients
                return 3, f"volume {self.name} has {clients} client connection(s); disconnect them, or use --force"
        code, text = await self.command("wishes", {"up": False})
        if code != 0:
            self.plane.kill()  # it serves nobody any more; its successor will
            return code, text
        await self.plane.stop()
        engine = self.engine
        with trio.move_on_after(DOWN_LIMIT_S):
            while engine is not None and (engine.exclusive or engine.gone) and not engine.deposed:
                await self._changed.wait()
        self._stop_copier()
        await self._copier_ended.wait()
        self._scope.cancel()
        await self.ended.wait()
        return 0, ""

    async def _replace_silent_member(self, plane: DataPlane) -> str:
        """What came of it, when another member serves or is late."""
        silent = plane.incarnation
        plane.kill()
        with trio.move_on_after(REPLACE_LIMIT_S) as waiting:
            while plane.incarnation in (silent, None) or not self.serving:
                await self._changed.wait()
        told = f"volume {self.name}: its member has not answered for {DOWN_LIMIT_S:g} s, and was"
        again = f"shadowvol down {self.name} tries again"
        if not waiting.cancelled_caught:
            return f"{told} replaced; the volume is up; {again}"
        late = f"{told} killed, but after {REPLACE_LIMIT_S:g} s no other serves (hanging storage keeps it from ending)"
        return f"{late}; requests wait until one does; {again}"

    # ------------------------------------------------------------ commands

    async def command(self, verb: str, options: dict[str, Any]) -> tuple[int, str]:
        """Hand a verb to the engine; (exit code, text) when it has ended."""
        outcome = await self._commands.perform(verb, options)
        self._pacer.pace()
        return outcome

    async def wait_serving(self, limit_s: float) -> bool:
        """True when the member has the state and admits I/O."""
        with trio.move_on_after(limit_s):
            while not self.serving and not self.ended.is_set():
                await self._changed.wait()
        return self.serving

    async def wait_phase(self, phase: str, limit_s: float) -> None:
        """Returns when the volume is in `phase`, has left for where a person has to decide, or after `limit_s`."""
        with trio.move_on_after(limit_s):
            while (engine := self.engine) is None or engine.phase != phase:
                await self._changed.wait()
                if engine is not None and (engine.state.paused or engine.state.phase is not Phase.COPYING):
                    return

    @property
    def serving(self) -> bool:
        engine = self.engine
        return engine is not None and self.host in engine.live and not engine.sync_queued

    def wall_clock(self, engine_s: float) -> str:
        """An engine's time as ISO 8601 in UTC, by the wall clock as it is now."""
        return iso_utc(engine_s - trio.current_time() + time.time())

    def use_config(self, config: VolumeConfig) -> None:
        """After a retarget: the record has been changed by the caller."""
        self.config = config
        if self.engine is not None:
            self.engine.config = config

    def pace(self, allowed: Pace, copies_ahead: list[str]) -> None:
        """What the throttle of this host allows now."""
        self.allowed, self.copies_ahead = allowed, copies_ahead
        self._apply_wishes()

    def _apply_wishes(self) -> None:
        if self.engine is not None:
            self.engine.copy_rate = self._copy_rate(self.engine)
            self.copier.throttle(self.engine.copy_rate)
            self.copier.pause(self.engine.state.paused or self.allowed.quiet)

    def _copy_rate(self, engine: LeaderEngine) -> int | None:
        """Bytes per second: the operator's limit and the throttle's, whichever is lower."""
        limits = [rate for rate in (engine.state.rate_bytes_per_s, self.allowed.rate) if rate is not None]
        return int(min(limits)) if limits else None

    # ------------------------------------------------------------ effects

    def _pump(self) -> None:
        engine = self.engine
        while engine is not None and (effects := engine.take_effects()):
            for effect in effects:
                self._perform(engine, effect)
        if engine is not None and not engine.at_rest:
            self._pacer.stir()
        self._wake()

    def _perform(self, engine: LeaderEngine, effect: Effect) -> None:
        assert self._nursery is not None and self.plane is not None
        if isinstance(effect, SendTo):
            if effect.host == self.host:
                self.plane.send(effect.message)
        elif isinstance(effect, DoPersist):
            self._nursery.start_soon(self._persist, engine, effect)
        elif isinstance(effect, DoCopy):
            self.copier.copy(effect.job, effect.step)
        elif isinstance(effect, DoCancel):
            self.copier.cancel(effect.job)
        elif isinstance(effect, DoCopierFlush):
            self.copier.flush(effect.job, CopierFlush(effect.legs))
        elif isinstance(effect, DoProbe):
            self.copier.probe(effect.job, effect.step)
        elif isinstance(effect, CommandDone):
            self._commands.done(effect)
        elif isinstance(effect, Deposed):
            _logger.warning("%s: leadership of epoch %d ended: %s", self.name, engine.epoch, effect.reason)
            self._deposed.set()

    async def _persist(self, engine: LeaderEngine, effect: DoPersist) -> None:
        try:
            committed = await self._coordinator.commit(effect.txn)
        except CoordinatorUnreachable as error:
            engine.on_unknown(f"the outcome of a transaction is unknown: {error}")
        else:
            engine.on_persisted(effect.token, committed.ok, trio.current_time())
        if engine is self.engine:
            self._pump()

    async def _tick(self) -> None:
        """Often while something is under way; an engine at rest needs no tick until something happens to it."""
        while True:
            if self.engine is None or self.engine.at_rest:
                with trio.move_on_after(TICK_AT_REST_S) as waited:
                    await self._changed.wait()
                if not waited.cancelled_caught:
                    continue
            else:
                await trio.sleep(TICK_CALM_S if self.engine.calm else TICK_S)
            if self.engine is not None:
                self.engine.application_busy = trio.current_time() - self._last_request_s < BUSY_S
                self.engine.tick(trio.current_time())
                self._pump()
                self.progress.sample(trio.current_time(), self.engine, self.copier)

    def _wake(self) -> None:
        """Who waits for a change looks again. To lose none: take `_changed`, look, and only then wait for it."""
        self._changed.set()
        self._changed = trio.Event()
        if self._copier_need() != self._copier_need_seen:
            self._copier_need_changed.set()

    # ------------------------------------------------------------ member

    def _member_up(self, incarnation: int) -> None:
        self.attachment.member_up()
        if self.engine is not None:
            self._meet_member(self.engine, incarnation)
            self._pump()

    def _meet_member(self, engine: LeaderEngine, incarnation: int) -> None:
        """A member's link is up. It holds NAME.lock, so one that is recorded with another incarnation is dead: it may
        have died before this leadership began, when nobody could be told."""
        if engine.unresolved.get(self.host, incarnation) != incarnation:
            engine.on_member_gone(self.host, self._log.runs(), trio.current_time())
        engine.on_member_up(self.host, incarnation, trio.current_time())

    def _member_gone(self) -> None:
        """Its lock was in our hands: nothing of it can still land."""
        self._log.forget_asks()
        engine = self.engine
        if engine is not None and (self.host in {**engine.live, **engine.joining, **engine.unresolved}):
            engine.on_member_gone(self.host, self._log.runs(), trio.current_time())
            self._pump()

    def _member_counts(self, statistics: dict[str, Any]) -> None:
        for name, value in self.longest.items():
            self.longest[name] = max(value, statistics.get(name) or 0.0)
        if any(statistics[name] for name in ("reads", "writes", "flushes")):
            self._last_request_s = trio.current_time()
        self._pacer.heard(self, statistics)

    def _member_said(self, message: Answer | Ask) -> None:
        if isinstance(message, Ask) and isinstance(message.want, LogZones | UnlogZones):
            self._log.take(message)
        elif self.engine is not None:
            self.engine.on_member_message(self.host, message, trio.current_time())
            self._pump()

    # ------------------------------------------------------------ copier

    def _new_copier(self) -> Copier:
        return Copier(
            self.name,
            self._home.transfer_lock(self.name),
            started=self._copier_started,
            stopped=self._copier_stopped,
            job_done=self._job_done,
        )

    async def _mind_copier(self) -> None:
        """A transfer process runs while there is something to copy, or could be again."""
        while True:
            engine, wanted, quarantine = self._see_copier_need()
            again_s = math.inf
            if wanted and self._copier_scope is None:
                await self._run_copier()
                await trio.lowlevel.checkpoint()  # who ended it may be about to end the volume
                continue
            if not wanted and engine is not None and quarantine:
                await self._end_quarantine()
                again_s = TICK_S  # nobody tells when the lock is free
            with trio.move_on_after(again_s):
                await self._copier_need_changed.wait()

    def _copier_need(self) -> tuple[LeaderEngine | None, bool, bool]:
        """What the life of the transfer process depends on. It is looked at after each event, and hardly ever changes,
        so who waits for a change is not woken by each event."""
        engine = self.engine
        wanted = engine is not None and not engine.deposed and self._needs_copier(engine)
        return engine, wanted, engine is not None and bool(engine.quarantine)

    def _see_copier_need(self) -> tuple[LeaderEngine | None, bool, bool]:
        """From here on a change sets `_copier_need_changed`."""
        self._copier_need_changed = trio.Event()
        self._copier_need_seen = need = self._copier_need()
        return need

    async def _run_copier(self) -> None:
        engine = self.engine
        assert engine is not None
        legs = self.config.leg_specs()
        self._copier_ended = trio.Event()
        try:
            with trio.CancelScope() as self._copier_scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._stop_copier_when_idle)
                    await self.copier.run(
                        legs,
                        verify=self.config.verify_copy,
                        rate=self._copy_rate(engine),
                        paused=engine.state.paused or self.allowed.quiet,
                    )
        finally:
            self._copier_scope = None
            self._copier_ended.set()

    async def _stop_copier_when_idle(self) -> None:
        """When the phase needs no copying any more (commit, abort), its process ends and its legs are closed."""
        while self._see_copier_need()[1]:
            await self._copier_need_changed.wait()
        self._stop_copier()

    def _needs_copier(self, engine: LeaderEngine) -> bool:
        """In a `start` already, so that its process is there when copying begins."""
        starting = engine.transition is not None and engine.transition["verb"] == "start"
        return starting or engine.state.phase is Phase.COPYING

    def _stop_copier(self) -> None:
        if self._copier_scope is not None:
            self._copier_scope.cancel()

    async def _end_quarantine(self) -> None:
        """No copier of ours runs; when none of an earlier agent holds the lock either, none can write any more."""
        with suppress(OSError):
            if self.copier.lock_is_free():
                assert self.engine is not None
                self.engine.on_old_copiers_stopped(trio.current_time())
                self._pump()

    def _copier_started(self) -> None:
        if self.engine is not None:
            self.engine.on_copier(True, trio.current_time())
            self.engine.on_old_copiers_stopped(trio.current_time())
            self._pump()

    def _copier_stopped(self) -> None:
        if self.engine is not None:
            self.engine.on_copier(False, trio.current_time())
            self._pump()

    def _job_done(self, job: int, outcome: Any) -> None:
        if self.engine is not None:
            self.engine.on_job_done(job, outcome, trio.current_time())
            self._pump()
