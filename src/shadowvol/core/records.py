"""The record of truth as data: keys, values, and a volume's state read from or written to them.

Key layout (docs/data_format.md), below `volumes/NAME/`:
  config              what was created: size, region size, legs with their identity      (create, retarget)
  state               phase, preferred, goal, wishes, counters                           (leader)
  leader              {"epoch", "host"}: whose transactions count                        (who takes leadership)
  map/000000…         chunks of the region map                                           (leader)
  windows/ID          open windows; a window without its record is void                  (leader)
  transition          the transition in progress                                         (leader)
  members/HOST        registered member incarnations                                     (leader)
  activity/HOST/000…  each member's durable activity log, a bitmap of zones per chunk    (that host's agent)
  attached/HOST       it is to be a kernel block device there, and which one was asked for (that host's agent)

Every value is JSON (config … members) or the packed bytes described here. Unknown or damaged values raise ValueError.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shadowvol.core.geometry import Geometry, Run, runs_of
from shadowvol.core.legs import LEG_NAMES, SOURCE, TARGET, Phase
from shadowvol.core.regionmap import RegionMap
from shadowvol.core.throttle import NORMAL
from shadowvol.core.txn import Compare, Entry, Holds, Txn

DATA_FORMAT = 1
ZONES_PER_CHUNK = 32768  # zones per activity record: a bitmap of 4 KiB


class RecordError(ValueError):
    """A record that does not check out; the volume is not served from it."""


@dataclass(frozen=True, slots=True)
class LegRecord:
    """A leg as recorded at creation. `identity` as in endpoints/identity.py; `cache` is none or host."""

    uri: str
    identity: str
    size_bytes: int
    cache: str = "host"


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """What `create` recorded. Sizes in bytes; units as in core/geometry.py, recorded so that they never change."""

    name: str
    kind: str
    size_bytes: int
    region_bytes: int
    source: LegRecord
    target: LegRecord
    block_bytes: int
    zone_bytes: int
    verify_copy: bool = False
    description: str = ""
    data_format: int = DATA_FORMAT

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size_bytes, self.region_bytes, self.block_bytes, self.zone_bytes)

    def leg(self, leg: int) -> LegRecord:
        return self.source if leg == SOURCE else self.target

    def leg_specs(self, legs: Iterable[int] = (SOURCE, TARGET)) -> dict[str, dict[str, Any]]:
        """By name: what a member or a copier needs to open each."""
        records = {LEG_NAMES[leg]: self.leg(leg) for leg in legs}
        return {
            name: {"path": record.uri, "identity": record.identity, "cache": record.cache}
            for name, record in records.items()
        }


@dataclass(frozen=True, slots=True)
class VolumeState:
    """What changes. `goal`: null, "abort" (resync the source, then let the target go) or "undo" (after commit)."""

    phase: Phase = Phase.SETUP
    preferred: int = SOURCE
    keep_undo: bool = False
    goal: str | None = None
    up: bool = False
    paused: bool = False
    rate_bytes_per_s: int | None = None
    impact: str = NORMAL
    min_rate_bytes_per_s: int | None = None
    finish_by_s: float | None = None  # wall clock, seconds since 1970
    bytes_copied: int = 0
    bytes_recopied: int = 0
    last_error: str | None = None
    last_switch_pause_ms: float | None = None
    window_number: int = 0  # the last window id given out; ids never repeat
    doubtful: tuple[tuple[Run, ...], ...] = ((), ())  # per leg, regions: see changes.py


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """`void`: it will not set its bits any more, but its copier may still write, so a successor leaves it alone."""

    id: int
    epoch: int
    from_leg: int
    to_leg: int
    runs: tuple[Run, ...]
    void: bool = False


@dataclass(slots=True)
class VolumeRecord:
    """Everything below one volume's prefix, decoded."""

    config: VolumeConfig
    state: VolumeState
    map: RegionMap
    epoch: int = 0
    leader_host: str = ""
    windows: dict[int, WindowRecord] = field(default_factory=dict)
    transition: dict[str, Any] | None = None
    members: dict[str, int] = field(default_factory=dict)  # host -> incarnation
    activity: dict[str, set[int]] = field(default_factory=dict)  # host -> logged zones
    attached: dict[str, str | None] = field(default_factory=dict)  # host -> the device that was asked for, if any


class Keys:
    """Key names of one volume."""

    def __init__(self, name: str) -> None:
        self.prefix = f"volumes/{name}/"
        self.config = self.prefix + "config"
        self.state = self.prefix + "state"
        self.leader = self.prefix + "leader"
        self.windows = self.prefix + "windows/"
        self.transition = self.prefix + "transition"
        self.map = self.prefix + "map/"

    def window(self, number: int) -> str:
        return f"{self.windows}{number}"

    def chunk(self, index: int) -> str:
        return f"{self.map}{index:06d}"

    def member(self, host: str) -> str:
        return f"{self.prefix}members/{host}"

    def activity(self, host: str) -> str:
        return f"{self.prefix}activity/{host}/"

    def attached(self, host: str) -> str:
        return f"{self.prefix}attached/{host}"


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def dumps(value: Any) -> bytes:
    return _encode(value).encode()


def _shallow(record: VolumeState | WindowRecord) -> dict[str, Any]:
    """As asdict, whose copies of what is in the fields cost more than all the rest of a record."""
    return {name: getattr(record, name) for name in record.__slots__}


def encode_config(config: VolumeConfig) -> bytes:
    return dumps(asdict(config))


def encode_state(state: VolumeState) -> bytes:
    return dumps(_shallow(state))


def encode_leader(epoch: int, host: str) -> bytes:
    return dumps({"epoch": epoch, "host": host})


def encode_window(window: WindowRecord) -> bytes:
    return dumps(_shallow(window))


def encode_member(incarnation: int) -> bytes:
    return dumps({"incarnation": incarnation})


def encode_attached(device: str | None) -> bytes:
    return dumps({"device": device})


def encode_zones(zones: set[int], chunk: int) -> bytes:
    """The bitmap of one activity chunk."""
    base = chunk * ZONES_PER_CHUNK
    bitmap = bytearray(ZONES_PER_CHUNK // 8)
    for zone in zones:
        if base <= zone < base + ZONES_PER_CHUNK:
            bitmap[(zone - base) >> 3] |= 1 << ((zone - base) & 7)
    return bytes(bitmap).rstrip(b"\0")


def decode_zones(bitmap: bytes, chunk: int) -> set[int]:
    base = chunk * ZONES_PER_CHUNK
    return {
        base + index * 8 + bit_index
        for index, byte in enumerate(bitmap)
        if byte
        for bit_index in range(8)
        if byte >> bit_index & 1
    }


def creation_txn(config: VolumeConfig) -> Txn:
    """The transaction that creates a volume; it fails where the name is taken."""
    keys = Keys(config.name)
    region_map = RegionMap(config.geometry.region_count)
    puts = [(keys.config, encode_config(config)), (keys.state, encode_state(VolumeState()))]
    puts += [(keys.chunk(index), region_map.chunk(index)) for index in range(region_map.chunk_count())]
    return Txn((Compare(keys.config, Holds.ABSENT),), tuple(puts))


def leadership_txn(name: str, record: VolumeRecord, host: str) -> Txn:
    """Take the leadership over: epoch + 1, if nobody else did in the meantime."""
    keys = Keys(name)
    if record.epoch:
        compare = Compare(keys.leader, Holds.VALUE, encode_leader(record.epoch, record.leader_host))
    else:
        compare = Compare(keys.leader, Holds.ABSENT)
    return Txn(
        (compare, Compare(keys.config, Holds.PRESENT)),
        ((keys.leader, encode_leader(record.epoch + 1, host)),),
    )


def volume_names(entries: dict[str, Entry]) -> list[str]:
    """Names of the volumes among entries read with the prefix "volumes/"."""
    return sorted({key.split("/")[1] for key in entries if key.endswith("/config")})


def decode_config(value: bytes) -> VolumeConfig:
    fields = json.loads(value)
    if fields.get("data_format") != DATA_FORMAT:
        raise RecordError(f"data format {fields.get('data_format')} (this shadowvol reads {DATA_FORMAT})")
    fields["source"] = LegRecord(**fields["source"])
    fields["target"] = LegRecord(**fields["target"])
    return VolumeConfig(**fields)


def decode_state(value: bytes) -> VolumeState:
    fields = json.loads(value)
    doubtful = tuple(tuple((lo, hi) for lo, hi in runs) for runs in fields.pop("doubtful", ((), ())))
    return replace(VolumeState(**fields), phase=Phase(fields["phase"]), doubtful=doubtful)


def _decode_window(value: bytes) -> WindowRecord:
    fields = json.loads(value)
    fields["runs"] = tuple((lo, hi) for lo, hi in fields["runs"])
    return WindowRecord(**fields)


def decode_volume(name: str, entries: dict[str, Entry]) -> VolumeRecord:
    """The record of one volume from the entries below its prefix. RecordError (or KeyError: no such volume)."""
    keys = Keys(name)
    config_entry = entries[keys.config]
    try:
        config = decode_config(config_entry.value)
        chunks = [entry.value for key, entry in sorted(entries.items()) if key.startswith(keys.map)]
        record = VolumeRecord(
            config,
            decode_state(entries[keys.state].value),
            RegionMap.from_chunks(config.geometry.region_count, chunks),
        )
        for key, entry in entries.items():
            _decode_entry(keys, record, key, entry.value)
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(f"the record of volume {name} does not check out: {error}") from error
    return record


def _decode_entry(keys: Keys, record: VolumeRecord, key: str, value: bytes) -> None:
    rest = key.removeprefix(keys.prefix)
    if rest == "leader":
        leader = json.loads(value)
        record.epoch, record.leader_host = leader["epoch"], leader["host"]
    elif rest == "transition":
        record.transition = json.loads(value)
    elif rest.startswith("windows/"):
        window = _decode_window(value)
        record.windows[window.id] = window
    elif rest.startswith("members/"):
        record.members[rest.split("/")[1]] = json.loads(value)["incarnation"]
    elif rest.startswith("attached/"):
        record.attached[rest.split("/")[1]] = json.loads(value)["device"]
    elif rest.startswith("activity/"):
        _, host, chunk = rest.split("/")
        record.activity.setdefault(host, set()).update(decode_zones(value, int(chunk)))


class ActivityLog:
    """The agent's side of one member's activity log: builds the transactions that add and remove zones.

    Transactions compare the member's registration, so that nothing is added for a member that was recovered.
    They are built and committed one after the other (the caller's duty): each chunk is written whole.
    """

    def __init__(self, name: str, host: str, zones: set[int]) -> None:
        self._keys = Keys(name)
        self._host = host
        self.zones = set(zones)

    def txn(self, add: list[Run], remove: list[Run], incarnation: int) -> Txn:
        """Adds first take effect in `zones` here (so a failed commit leaves more, never less); removals too."""
        changed: set[int] = set()
        for lo, hi in add:
            self.zones.update(range(lo, hi))
            changed.update(range(lo // ZONES_PER_CHUNK, (hi - 1) // ZONES_PER_CHUNK + 1))
        for lo, hi in remove:
            self.zones.difference_update(range(lo, hi))
            changed.update(range(lo // ZONES_PER_CHUNK, (hi - 1) // ZONES_PER_CHUNK + 1))
        prefix = self._keys.activity(self._host)
        puts = tuple((f"{prefix}{chunk:04d}", encode_zones(self.zones, chunk)) for chunk in sorted(changed))
        return Txn((Compare(self._keys.member(self._host), Holds.VALUE, encode_member(incarnation)),), puts)

    def runs(self) -> list[Run]:
        return runs_of(self.zones)
