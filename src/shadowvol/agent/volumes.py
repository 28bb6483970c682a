"""Creating, retargeting and deleting the record of a volume, with every check that stands before it (DESIGN 8).

The order, the same for both kinds of new legs:
1. Names and sizes are judged, nothing is touched.
2. `provision` makes the target's file, which is removed again if anything below refuses.
3. Each leg is looked at: size, mounted, used by another device; then the two against each other.
4. The record is read, and the leg compared with those of every volume in it.
5. Each leg is claimed, as a member would, until the end: of two commands that want the same storage one is refused.
6. As 4, now that nobody else can record these legs; and the change is committed with compares.
Data on a leg is never changed or deleted, in no case.

Steps 2 to 6 block (a probe of a slow disk takes seconds), so they run in a thread.
"""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from shadowvol.agent.errors import (
    BAD_INPUT,
    FAILED,
    REFUSED,
    UNREACHABLE,
    VerbError,
    check_name,
    no_such_volume,
)
from shadowvol.clustersync.coordinator import Coordinator, CoordinatorUnreachable, RecordDamaged
from shadowvol.core.geometry import KIB, REGIONS_MAX_DEFAULT, Geometry, region_bytes_for
from shadowvol.core.legs import TARGET, Phase
from shadowvol.core.records import (
    Keys,
    LegRecord,
    RecordError,
    VolumeConfig,
    VolumeRecord,
    creation_txn,
    decode_config,
    decode_volume,
    encode_config,
    encode_state,
    volume_names,
)
from shadowvol.core.txn import Compare, Entry, Holds, Txn
from shadowvol.endpoints import blockdev
from shadowvol.endpoints.identity import LegFacts, LegRefused, LegSpec, identity_of, medium_of, probe, same_storage
from shadowvol.endpoints.local import claim_local

REGION_BYTES_MIN = 64 * KIB
REGION_BYTES_MAX = 1 << 30  # one region is copied as a whole: beyond this a touched one is never done
VOLUMES = "volumes/"

T = TypeVar("T")


# ---------------------------------------------------------------- verbs


async def create_volume(
    coordinator: Coordinator | None,
    *,
    name: str,
    source: str,
    target: str,
    kind: str = "block",
    region_size: int | None = None,
    provision: bool = False,
    source_cache: str = "host",
    target_cache: str = "host",
    verify_copy: bool = False,
    force: bool = False,
    directory: str | None = None,
    description: str = "",
    dry_run: bool = False,
) -> VolumeConfig:
    """Record a new volume. Relative legs start at `directory` (default: the current one). Raises VerbError.

    With `dry_run` everything is checked and nothing recorded or made; only then may `coordinator` be None (there is no
    record yet), and the identity of a target that is still to be made is empty.
    """
    check_name(name)
    if kind != "block":
        raise VerbError(BAD_INPUT, f"volumes of kind {kind} are not in this version of shadowvol; there is block")
    _check_region_size(region_size)
    source_path, target_path = _parse("source", source, directory), _parse("target", target, directory)
    entries = await _read(coordinator, VOLUMES)
    if Keys(name).config in entries:
        raise VerbError(BAD_INPUT, f"there is a volume {name} already")
    with ExitStack() as undo:
        await _in_thread(partial(_check_not_the_same, source_path, target_path))
        facts = await _in_thread(partial(_look, "source", source_path))
        region_bytes = region_size or region_bytes_for(facts.size_bytes)
        _check_region_count(facts.size_bytes, region_bytes)
        make = partial(_check_can_be_made if dry_run else _provision, target_path, facts.size_bytes)
        made = await _in_thread(make) if provision else None
        undo_made = undo.enter_context(_Removal(made))
        legs = {"source": facts}
        if not (dry_run and provision):
            legs["target"] = await _in_thread(partial(_look_at_target, target_path, facts.size_bytes, force))
        await _in_thread(partial(_check_other_volumes, entries, legs, None))  # one that is up has claimed them
        for role, leg in legs.items():
            undo.enter_context(await _in_thread(partial(_Claim, role, leg.path)))
        entries = await _read(coordinator, VOLUMES)  # again, now that nobody else can record these legs
        await _in_thread(partial(_check_other_volumes, entries, legs, None))
        geometry = Geometry.of(facts.size_bytes, region_bytes)
        config = VolumeConfig(
            name,
            kind,
            facts.size_bytes,
            region_bytes,
            _record(facts, source_cache),
            _record(legs["target"], target_cache)
            if "target" in legs
            else LegRecord(target_path, "", facts.size_bytes, target_cache),
            geometry.block_bytes,
            geometry.zone_bytes,
            verify_copy,
            description,
        )
        if dry_run:
            return config
        assert coordinator is not None
        if not await _commit(coordinator, creation_txn(config), undo_made):
            raise VerbError(BAD_INPUT, f"there is a volume {name} already")
        undo_made.keep()
    return config


async def retarget_volume(
    coordinator: Coordinator,
    name: str,
    target: str,
    *,
    provision: bool = False,
    target_cache: str = "host",
    force: bool = False,
    directory: str | None = None,
) -> VolumeConfig:
    """Give a volume in phase setup another target; returns the new record. Raises VerbError."""
    target_path = _parse("target", target, directory)
    entries = await _read(coordinator, VOLUMES)
    record = record_of(name, entries)
    if record.state.phase is not Phase.SETUP:
        raise VerbError(REFUSED, f"retarget needs phase setup; {_stands(record)}")
    config = record.config
    with ExitStack() as undo:
        made = await _in_thread(partial(_provision, target_path, config.size_bytes)) if provision else None
        undo_made = undo.enter_context(_Removal(made))
        await _in_thread(partial(_check_not_the_same, config.source.uri, target_path))
        facts = await _in_thread(partial(_look_at_target, target_path, config.size_bytes, force))
        if facts.identity == config.target.identity and facts.path == config.target.uri:
            return config
        await _in_thread(partial(_check_other_volumes, entries, {"target": facts}, name))
        if facts.identity != config.target.identity:  # else its own member may hold the claim
            undo.enter_context(await _in_thread(partial(_Claim, "target", facts.path)))
        entries = await _read(coordinator, VOLUMES)
        await _in_thread(partial(_check_other_volumes, entries, {"target": facts}, name))
        changed = replace(config, target=_record(facts, target_cache))
        keys = Keys(name)
        compares = (
            Compare(keys.config, Holds.VALUE, encode_config(config)),
            Compare(keys.state, Holds.VALUE, entries[keys.state].value if keys.state in entries else b""),
        )
        if record_of(name, entries).state.phase is not Phase.SETUP or not await _commit(
            coordinator, Txn(compares, ((keys.config, encode_config(changed)),)), undo_made
        ):
            raise VerbError(REFUSED, f"volume {name} was changed at the same time; nothing was retargeted, try again")
        undo_made.keep()
    return changed


async def record_up(coordinator: Coordinator, name: str) -> VolumeRecord:
    """The volume is to be up; for an agent, while no member of it lives. Returns the record. Raises VerbError."""
    keys = Keys(check_name(name))
    while True:
        entries = await _read(coordinator, keys.prefix)
        record = record_of(name, entries)
        if record.state.up:
            return record
        is_up = replace(record.state, up=True)
        compares = (Compare(keys.state, Holds.VALUE, entries[keys.state].value),)
        if await _commit(coordinator, Txn(compares, ((keys.state, encode_state(is_up)),))):
            return replace(record, state=is_up)


async def delete_volume(coordinator: Coordinator, name: str, force: bool = False) -> None:
    """Forget a volume; its legs stay as they are. Raises VerbError.

    `force` does not override being up: who may end clients brings the volume down first (`down --force`).
    """
    entries = await _read(coordinator, Keys(check_name(name)).prefix)
    record = record_of(name, entries)
    if record.state.phase not in (Phase.SETUP, Phase.COMMITTED):
        raise VerbError(
            REFUSED,
            f"delete needs phase setup or committed; {_stands(record)}",
        )
    if record.state.up:
        down = f"shadowvol down {'--force ' if force else ''}{name}"
        raise VerbError(REFUSED, f"volume {name} is up; {down} first")
    keys = Keys(name)
    txn = Txn((Compare(keys.state, Holds.VALUE, entries[keys.state].value),), deletes=(keys.prefix,))
    if not await _commit(coordinator, txn):
        raise VerbError(REFUSED, f"volume {name} was changed at the same time; it was not deleted, try again")


# ---------------------------------------------------------------- the record


async def read_volume(coordinator: Coordinator, name: str) -> VolumeRecord:
    """Raises VerbError: a bad name, no such volume, a damaged record, no coordinator."""
    return record_of(name, await _read(coordinator, Keys(check_name(name)).prefix))


async def read_volumes(coordinator: Coordinator) -> tuple[dict[str, VolumeRecord], dict[str, str]]:
    """All volumes in order of their names; and by name, why a record does not check out. Raises VerbError."""
    entries = await _read(coordinator, VOLUMES)
    sound: dict[str, VolumeRecord] = {}
    damaged: dict[str, str] = {}
    for name in volume_names(entries):
        try:
            sound[name] = record_of(name, entries)
        except VerbError as error:
            damaged[name] = error.text
    return sound, damaged


def record_of(name: str, entries: dict[str, Entry]) -> VolumeRecord:
    """One volume among the entries of one or all volumes. Raises VerbError."""
    keys = Keys(check_name(name))
    if keys.config not in entries:
        raise no_such_volume(name)
    try:
        return decode_volume(name, {key: entry for key, entry in entries.items() if key.startswith(keys.prefix)})
    except RecordError as error:
        raise VerbError(FAILED, str(error)) from error


def shown_phase(record: VolumeRecord) -> Phase:
    """The phase that an operator sees: copying with both bits everywhere is synced (as LeaderEngine.phase)."""
    state = record.state
    if state.phase is Phase.COPYING and state.goal is None and record.map.count_both() == len(record.map):
        return Phase.SYNCED
    return state.phase


def _stands(record: VolumeRecord) -> str:
    """Where a volume stands that is not in setup, and how it gets out of there."""
    name, phase, state = record.config.name, shown_phase(record), record.state
    if state.goal is not None:
        reached = "setup" if state.goal == "abort" else "synced"
        onward = f"its {state.goal} is under way: shadowvol wait {name} --for {reached}"
    elif state.phase is Phase.COMMITTED:
        onward = "its migration is over"
    else:
        onward = f"shadowvol abort {name}{f' or shadowvol commit {name}' if state.preferred == TARGET else ''} first"
    return f"volume {name} is in phase {phase}; {onward}"


async def _read(coordinator: Coordinator | None, prefix: str) -> dict[str, Entry]:
    if coordinator is None:
        return {}
    try:
        return (await coordinator.read(prefix)).entries
    except CoordinatorUnreachable as error:
        raise VerbError(UNREACHABLE, str(error)) from error
    except RecordDamaged as error:
        raise VerbError(FAILED, str(error)) from error


async def _commit(coordinator: Coordinator, txn: Txn, made: "_Removal | None" = None) -> bool:
    """Whether the compares held. With an unknown outcome the record may name the file that was made: it stays."""
    try:
        return (await coordinator.commit(txn)).ok
    except CoordinatorUnreachable as error:
        if error.nothing_changed:
            raise VerbError(UNREACHABLE, f"{error}; nothing changed") from error
        if made is not None:
            made.keep()
        raise VerbError(UNREACHABLE, f"{error}\nwhether it took effect is not known: shadowvol status") from error
    except RecordDamaged as error:
        raise VerbError(FAILED, str(error)) from error


# ---------------------------------------------------------------- checks


def _check_region_size(region_bytes: int | None) -> None:
    if region_bytes is None:
        return
    is_power = region_bytes > 0 and region_bytes & (region_bytes - 1) == 0
    if not is_power or not REGION_BYTES_MIN <= region_bytes <= REGION_BYTES_MAX:
        raise VerbError(BAD_INPUT, f"a region size is a power of two from 64KiB to 1GiB, not {region_bytes} bytes")


def _check_region_count(size_bytes: int, region_bytes: int) -> None:
    count = -(-size_bytes // region_bytes)
    if count > REGIONS_MAX_DEFAULT:
        smallest = region_bytes_for(size_bytes)
        raise VerbError(
            BAD_INPUT,
            f"regions of {region_bytes} bytes would be {count}, at most {REGIONS_MAX_DEFAULT} are possible; "
            f"--region-size {smallest >> 20}MiB is the default here",
        )


def _parse(role: str, argument: str, directory: str | None) -> str:
    try:
        return LegSpec.parse(argument, directory).path
    except LegRefused as refused:
        raise VerbError(BAD_INPUT, f"{role} {refused}") from None


def _look(role: str, path: str) -> LegFacts:
    """A leg on its own."""
    try:
        facts = probe(path)
    except LegRefused as refused:
        raise VerbError(BAD_INPUT, f"{role} {refused}") from None
    except OSError as error:
        raise VerbError(BAD_INPUT, f"{role} {path}: {error.strerror or error}") from None
    if facts.mounted_at == "[swap]":
        raise VerbError(BAD_INPUT, f"{role} {path} is in use as swap")
    if facts.mounted_at is not None:
        raise VerbError(BAD_INPUT, f"{role} {path} is mounted at {facts.mounted_at}; unmount it first")
    if facts.holders:
        raise VerbError(BAD_INPUT, f"{role} {path} is in use by /dev/{facts.holders[0]}")
    if facts.kind == "disk" and blockdev.sys_number(blockdev.sys_directory(os.stat(path).st_rdev) / "ro"):
        raise VerbError(BAD_INPUT, f"{role} {path} is read-only")  # the kernel lets it be opened for writing
    return facts


def _check_not_the_same(source_path: str, target_path: str) -> None:
    """What is not there, perhaps not yet, is no other name of anything."""
    try:
        both_there = os.path.exists(source_path) and os.path.exists(target_path)
        same = both_there and same_storage(source_path, target_path)
    except OSError as error:
        raise VerbError(BAD_INPUT, f"source {source_path}: {error.strerror}") from None
    if same:
        raise VerbError(BAD_INPUT, f"source {source_path} and target {target_path} are the same storage")


def _look_at_target(path: str, size_bytes: int, force: bool) -> LegFacts:
    try:
        os.lstat(path)
    except FileNotFoundError:
        raise VerbError(BAD_INPUT, f"target {path}: does not exist; --provision makes it") from None
    except OSError as error:
        raise VerbError(BAD_INPUT, f"target {path}: {error.strerror}") from None
    facts = _look("target", path)
    if facts.size_bytes < size_bytes:
        raise VerbError(BAD_INPUT, f"target {path} is too small: {facts.size_bytes} bytes, the source has {size_bytes}")
    if facts.signature is not None and not force:
        raise VerbError(BAD_INPUT, f"target {path} carries data ({facts.signature}); --force if it may be overwritten")
    return facts


def _check_other_volumes(entries: dict[str, Entry], legs: dict[str, LegFacts], but: str | None) -> None:
    """No leg is, or shares storage with, a leg of a recorded volume other than `but`."""
    for name in volume_names(entries):
        if name == but:
            continue
        try:
            config = decode_config(entries[Keys(name).config].value)
        except (ValueError, TypeError, KeyError) as error:
            raise VerbError(FAILED, f"the record of volume {name} does not check out: {error}") from error
        for role, facts in legs.items():
            for their_role, recorded in (("source", config.source), ("target", config.target)):
                if _is_same_leg(facts, recorded):
                    raise VerbError(
                        BAD_INPUT,
                        f"{role} {facts.path} is the {their_role} of volume {name}; "
                        f"a leg is free again when its volume is deleted",
                    )


def _is_same_leg(facts: LegFacts, recorded: LegRecord) -> bool:
    """By identity, of which the size may have changed; and by place, where the recorded leg is still at its path."""
    if medium_of(facts.identity) == medium_of(recorded.identity):
        return True
    try:
        still_there = medium_of(identity_of(recorded.uri)) == medium_of(recorded.identity)
        return still_there and same_storage(facts.path, recorded.uri)
    except (OSError, LegRefused):
        return False


def _record(facts: LegFacts, cache: str) -> LegRecord:
    return LegRecord(facts.path, facts.identity, facts.size_bytes, cache)


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)


# ---------------------------------------------------------------- what is held or made for the time of a verb


class _Claim:
    """A leg opened as a member would open it: writable, and claimed against every other opener of ours."""

    def __init__(self, role: str, path: str) -> None:
        try:
            self._fd = claim_local(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise VerbError(BAD_INPUT, f"{role} {path} is in use by another process or device") from None
            raise VerbError(BAD_INPUT, f"{role} {path} cannot be opened for writing: {error.strerror}") from None

    def __enter__(self) -> "_Claim":
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class _Removal:
    """Removes a file that was made, unless keep() was called."""

    path: str | None

    def keep(self) -> None:
        self.path = None

    def __enter__(self) -> "_Removal":
        return self

    def __exit__(self, *unused: object) -> None:
        if self.path is not None and os.path.lexists(self.path):
            os.unlink(self.path)


def _check_can_be_made(path: str, size_bytes: int) -> None:
    """Whether _provision would make the target, as far as that can be told without making it. It is sparse, so room
    for `size_bytes` is no condition."""
    _check_is_no_device(path)
    folder = os.path.dirname(path)
    if os.path.lexists(path):
        raise VerbError(BAD_INPUT, f"target {path} exists already; leave out --provision to use it")
    if not os.path.isdir(folder):
        raise VerbError(BAD_INPUT, f"target {path} cannot be made: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VerbError(BAD_INPUT, f"target {path} cannot be made: no permission to write in {folder}, or read-only")


def _check_is_no_device(path: str) -> None:
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
        raise VerbError(BAD_INPUT, f"target {path}: --provision makes files, not devices")


def _provision(path: str, size_bytes: int) -> str:
    """Make the target: a sparse file, durable before it is recorded. Returns its path."""
    _check_is_no_device(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise VerbError(BAD_INPUT, f"target {path} exists already; leave out --provision to use it") from None
    except OSError as error:
        raise VerbError(BAD_INPUT, f"target {path} cannot be made: {error.strerror}") from None
    try:
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        os.unlink(path)
        raise VerbError(FAILED, f"target {path} cannot be made: {error.strerror}") from None
    finally:
        os.close(fd)
    return path
