"""A volume's block device on this host: attach and detach, and keeping it alive in between.

That a volume is to be attached here is a wish in the record of truth (`attached/HOST`), as being up is one: it is
restored after a reboot. Which device it is now, only the kernel knows; a new agent asks (nbd/attach.py).

Ordering: attach records the wish, then makes the device; detach takes the device down, then forgets the wish. An agent
that dies in between leaves a wish without a device, which the next one fulfils, never a device that nobody minds.
One verb or repair at a time (`_turn`). The thread that supervises is stopped before its device is taken down, but after
the last flush, which may need it.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from shadowvol.agent.errors import BAD_INPUT, FAILED, REFUSED, VerbError
from shadowvol.agent.paths import Home
from shadowvol.clustersync.coordinator import Coordinator
from shadowvol.core.records import Keys, encode_attached
from shadowvol.core.txn import Compare, Holds, Txn
from shadowvol.nbd.attach import (
    AttachFailed,
    BadDevice,
    Device,
    DeviceInUse,
    DeviceLost,
    Site,
    check_device,
    claim,
    mark_of,
)

REPAIR_FIRST_S, REPAIR_LAST_S = 0.5, 30.0  # between attempts to restore a device; doubled from the one to the other
FLUSH_LIMIT_S = 60.0  # for what is cached above the device to reach the volume
SERVE_LIMIT_S = 20.0  # for the volume to serve, before a device is made
STOP_LIMIT_S = 30.0  # for the supervising thread to notice; a handshake under way is broken off
_THREADS = trio.CapacityLimiter(10_000)  # one for each attached volume, all the time

T = TypeVar("T")
_logger = logging.getLogger("shadowvol.agent")


class Attachment:
    """Call run() in a task. `wanted`: it is to be attached here; `device` is the node once it is."""

    def __init__(
        self, volume: str, home: Home, coordinator: Coordinator, host: str, serves: Callable[[float], Awaitable[bool]]
    ) -> None:
        self.wanted = False
        self.closing = False  # the volume goes down: nothing is attached any more
        self.error: str | None = None  # why there is no device although one is wanted
        self._volume = volume
        self._coordinator = coordinator
        self._serves = serves
        self._keys = Keys(volume)
        self._key = self._keys.attached(host)
        self._site = Site(volume, home.volume_socket(volume), home.run, mark_of(home.directory, volume))
        self._asked: str | None = None  # the device that the operator named
        self._device: Device | None = None
        self._turn = trio.Lock()
        self._work = trio.Event()  # there is something to restore or to supervise
        self._supervising = trio.Event()
        self._supervising.set()  # set: no thread supervises

    @property
    def device(self) -> str | None:
        return None if self._device is None else self._device.device

    def restore(self, wishes: dict[str, str | None], host: str) -> None:
        """Before run(): what the record says."""
        if host in wishes:
            self.wanted, self._asked = True, wishes[host]
            self._work.set()

    async def run(self) -> None:
        """Until cancelled; then the device is left as it is, and the next agent finds it."""
        delay_s = REPAIR_FIRST_S
        while True:
            await self._work.wait()
            async with self._turn:
                if self.wanted and self._device is None:
                    await self._repair()
                device = self._device
                if not self.wanted:
                    self._work = trio.Event()
                    continue
            if device is None:
                await trio.sleep(delay_s)
                delay_s = min(delay_s * 2, REPAIR_LAST_S)
                continue
            delay_s = REPAIR_FIRST_S
            await self._supervise(device)
            if self.wanted and self._device is None:
                await trio.sleep(delay_s)

    def member_up(self) -> None:
        """A member serves: a link that died unseen can be mended."""
        if self._device is not None and not self._supervising.is_set():
            self._device.poke()

    # ------------------------------------------------------------ verbs

    async def attach(self, asked: str | None) -> str:
        """The device. Attached already, it is the one that is there. Raises VerbError."""
        async with self._turn:
            if self.wanted:
                return await self._attached_already(asked)
            if asked is not None:
                try:
                    await _in_thread(partial(check_device, asked))
                except BadDevice as error:
                    raise VerbError(BAD_INPUT, f"volume {self._volume} was not attached: {error}") from None
            if self.closing:
                raise VerbError(REFUSED, f"volume {self._volume} is going down; nothing was attached")
            self.wanted, self._asked = True, asked
            try:
                await self._record(encode_attached(asked))
                device = await self._find_or_make()
            except (AttachFailed, BadDevice, OSError) as error:
                self.wanted = False
                await self._record(None)
                code = BAD_INPUT if isinstance(error, BadDevice) else FAILED
                raise VerbError(code, f"volume {self._volume} was not attached: {error}") from None
            except BaseException:
                self.wanted = False
                raise
            self._work.set()
            return device.device

    async def _attached_already(self, asked: str | None) -> str:
        if self._device is None:
            await self._repair()
        if self._device is None:
            raise VerbError(FAILED, f"volume {self._volume} is to be attached, but cannot be now: {self.error}")
        if asked not in (None, self.device):
            again = f"shadowvol detach {self._volume} first"
            raise VerbError(REFUSED, f"volume {self._volume} is attached as {self.device}; {again}")
        return self._device.device

    async def detach(self) -> None:
        """Refused while somebody uses the device. Nothing is done where nothing is attached. Raises VerbError."""
        async with self._turn:
            if not self.wanted:
                return
            try:
                if self._device is None:  # lost, or this agent has not looked yet
                    self._device = await _in_thread(self._site.find)
                if self._device is None:
                    await _in_thread(self._site.remove_remains)
                else:
                    await self._take_down(self._device)
            except DeviceInUse as error:
                raise VerbError(REFUSED, f"volume {self._volume}: {self.device} {error}") from None
            except (AttachFailed, OSError) as error:
                raise VerbError(FAILED, f"volume {self._volume} was not detached wholly: {error}; try again") from None
            await self._record(None)
            self.wanted = False
            self.error = None

    async def _take_down(self, device: Device) -> None:
        claimed = None
        with trio.move_on_after(FLUSH_LIMIT_S):
            claimed = await _in_thread(partial(claim, device.device))
        if claimed is None:
            text = f"{device.device} does not answer within {FLUSH_LIMIT_S:g} s"
            raise VerbError(FAILED, f"volume {self._volume} was not detached: {text}; see shadowvol status")
        device.stop()
        with trio.move_on_after(STOP_LIMIT_S):
            await self._supervising.wait()
        self._device = None
        await _in_thread(partial(self._site.remove, device, claimed))

    # ------------------------------------------------------------ keeping it

    async def _repair(self) -> None:
        """With `_turn` held. Finds what lives, or makes a new one."""
        try:
            device = await self._find_or_make()
        except (AttachFailed, BadDevice, OSError) as error:
            self.error = f"not attached: {error}"
            _logger.error("%s: %s; trying again", self._volume, self.error)
        else:
            self.error = None
            self._work.set()
            _logger.info("%s: attached as %s", self._volume, device.device)

    async def _find_or_make(self) -> Device:
        device = await _in_thread(self._site.find)
        if device is None:
            if not await self._serves(SERVE_LIMIT_S):
                raise AttachFailed("the volume does not serve; see shadowvol status")
            device = await _in_thread(partial(self._site.make, self._asked))
        self._device = device
        return device

    async def _supervise(self, device: Device) -> None:
        self._supervising = trio.Event()
        try:
            await _in_thread(device.supervise)
        except (DeviceLost, OSError) as error:
            self.error = f"the attached device was lost: {error}"
            _logger.error("%s: %s; what is mounted there gets errors", self._volume, self.error)
            if self._device is device:
                self._device = None
        finally:
            device.stop()
            self._supervising.set()

    async def _record(self, value: bytes | None) -> None:
        if value is None:
            await self._coordinator.commit(Txn(deletes=(self._key,)))
            return
        exists = (Compare(self._keys.config, Holds.PRESENT),)
        if not (await self._coordinator.commit(Txn(exists, ((self._key, value),)))).ok:
            raise AttachFailed("the volume is not recorded any more")


async def _in_thread(work: Callable[[], T]) -> T:
    """Abandoned on cancellation: it may hang with the device."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=_THREADS)
