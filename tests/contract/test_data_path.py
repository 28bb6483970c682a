"""The data path's contract: the same requests by the same table end alike, in Python and through the C filter.

Alike: what each request returned or failed with, what is on both legs afterwards, what the leader was asked and told,
and what was counted. The requests come one after the other, so nothing is left to chance but the seed.
"""

import errno
import hashlib
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd
import pytest

from shadowvol.core.geometry import KIB, MIB, Run
from shadowvol.core.latency import bucket_end_ns
from shadowvol.core.messages import (
    Close,
    Fault,
    Freeze,
    HoldBlocks,
    LogZones,
    Open,
    ReleaseBlocks,
    SetState,
    Thaw,
    Touched,
)
from shadowvol.nbd.filter.usable import SWITCH
from tests.support.filter_build import build_disturbed_filter, build_filter
from tests.support.nbd_member import Client, NbdMember, leg_record, nbd_member, sparse_file

SIZE = 48 * MIB  # three zones
REQUESTS = 150
UNITS = (512, 4096, 4096, 4096, 64 * KIB, 64 * KIB, MIB, 3 * MIB)
SMALL_BYTES = 20 * MIB  # what the file system below a leg that fills up has room for


@dataclass
class Record:
    """What a run did, as far as the contract goes."""

    outcomes: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    logged: set[int] = field(default_factory=set)
    totals: dict[str, int] = field(default_factory=dict)
    legs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module", params=["plain", "disturbed"])
def filter_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`disturbed`: its own I/O fails and stops short now and then, which nobody must notice."""
    folder = tmp_path_factory.mktemp("filter")
    return str(build_filter(folder) if request.param == "plain" else build_disturbed_filter(folder))


def requests(client: Client, chance: random.Random, count: int, record: Record) -> None:
    for number in range(count):
        length = min(chance.choice(UNITS), SIZE)
        align = chance.choice((1, 512, 4096))
        offset = chance.randrange(SIZE - length + 1) // align * align
        fua = nbd.CMD_FLAG_FUA if chance.random() < 0.05 else 0
        operation = chance.choice(("read", "read", "write", "write", "write", "zero", "hole", "trim", "flush"))
        outcome = "ok"
        try:
            if operation == "read":
                outcome = hashlib.sha256(client.read(length, offset)).hexdigest()
            elif operation == "write":
                client.write(chance.randbytes(16) * (length // 16), offset, fua)
            elif operation == "zero":
                client.nbd.zero(length, offset, nbd.CMD_FLAG_NO_HOLE | fua)
            elif operation == "hole":
                client.nbd.zero(length, offset, fua)
            elif operation == "trim":
                client.nbd.trim(length, offset, fua)
            else:
                client.nbd.flush()
        except nbd.Error as error:
            outcome = errno.errorcode.get(error.errnum or 0, str(error.errnum))
        record.outcomes.append(f"{number} {operation} {offset}+{length}: {outcome}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finish(member: NbdMember, record: Record, *legs: Path) -> Record:
    wanted = sum("flush" not in outcome.split()[1] for outcome in record.outcomes)
    stats = member.leader.latest_stats(
        lambda stats: stats["totals"]["reads"] + stats["totals"]["writes"] == wanted and not stats["in_flight"]
    )
    record.totals = stats["totals"]
    for kind, latencies in stats["latencies"].items():  # both executors' together, each request once
        assert sum(count for _, count in latencies["buckets"]) == stats["totals"][f"{kind}s"]
        shortest_s = sum(count * (bucket_end_ns(bucket - 1) / 1e9) for bucket, count in latencies["buckets"])
        assert shortest_s <= latencies["sum_s"] <= shortest_s * 1.125 + 1e-6
    record.told = [(want.operation, want.legs) for want in member.leader.asked(Fault)]
    record.logged = {zone for want in member.leader.asked(LogZones) for lo, hi in want.zones for zone in range(lo, hi)}
    record.legs = [digest(leg) for leg in legs]
    if (filtered := stats["filter"]) is not None:
        assert filtered["reads_ended"] and filtered["writes_ended"], filtered
    return record


def touched(member: NbdMember, body: Touched | Close, window: list[Run]) -> set[int]:
    """Cut to the window's regions, as the leader does: a member may name blocks between them."""
    blocks = member.leader.request(f"w{body.window}", body)["blocks"]
    per_region = member.geometry.blocks_per_region
    inside = {region for lo, hi in window for region in range(lo, hi)}
    return {block for lo, hi in blocks for block in range(lo, hi) if block // per_region in inside}


def every_state(folder: Path, seed: int) -> Record:
    """Setup; a map of all kinds of regions with a window open; everything on both; frozen parts; cutover; commit."""
    chance = random.Random(seed)
    record = Record()
    source, target = sparse_file(folder / "source", SIZE), sparse_file(folder / "target", SIZE)
    with nbd_member(folder, leg_record(source), leg_record(target), size_bytes=SIZE) as member:
        leader, client = member.leader, member.client()
        requests(client, chance, REQUESTS // 3, record)
        assert leader.prepare("start", {"source": member.source, "target": member.target}) == {}
        source_only = [region for region in range(SIZE // MIB) if chance.random() < 0.5]
        both = [(region, region + 1) for region in range(SIZE // MIB) if region not in source_only]
        target.write_bytes(source.read_bytes())  # as after a copy
        leader.map.set_ok(1, both)
        leader.join("copying", fresh_allowed=True)
        requests(client, chance, REQUESTS, record)
        window = [(region, region + 1) for region in source_only[: len(source_only) // 2]]
        blocks_per_region = member.geometry.blocks_per_region
        record.answers.append(leader.request("w1", Open(1, window, 0, 1)))
        requests(client, chance, REQUESTS, record)
        record.answers.append(touched(member, Touched(1), window))
        requests(client, chance, REQUESTS // 3, record)
        record.answers.append(touched(member, Close(1), window))
        requests(client, chance, REQUESTS // 3, record)  # the window's writes are settled now
        held = [(region * blocks_per_region, region * blocks_per_region + 1) for region, _ in window[::2]]
        record.answers.append(leader.request("w1", HoldBlocks(1, held)))
        record.answers.append(leader.request("w1", ReleaseBlocks(1)))
        requests(client, chance, REQUESTS // 3, record)
        for leg in (source, target):  # all regions alike, the window's end
            record.legs.append(digest(leg))
        target.write_bytes(source.read_bytes())
        everywhere = [(0, SIZE // MIB)]
        leader.map.set_ok(1, everywhere)
        leader.request("x", SetState(changes=((1, True, everywhere),), close=(1,)))
        requests(client, chance, REQUESTS, record)
        record.answers.append(leader.request("x", Freeze([(0, 8)], False, False)))
        requests(client, chance, 20, record)
        leader.request("x", Thaw())
        for preferred in (1, 0, 1):
            record.answers.append(leader.request("x", Freeze(None, False, True)))
            leader.request("x", SetState(preferred=preferred))
            leader.request("x", Thaw())
            requests(client, chance, REQUESTS // 3, record)
        leader.map.clear_ok(0, everywhere)
        leader.join("committed", preferred=1)
        requests(client, chance, REQUESTS // 3, record)
        client.close()
        return finish(member, record, source, target)


def full_leg(folder: Path, seed: int) -> Record:
    """The target fills up in the middle; the application notices nothing, the leader does."""
    chance = random.Random(seed)
    record = Record()
    source = sparse_file(folder / "source", SIZE)
    with small_file_system(folder / "small") as small:
        target = sparse_file(small / "target", SIZE)
        with nbd_member(folder, leg_record(source), leg_record(target), size_bytes=SIZE) as member:
            member.leader.map.set_ok(1, [(0, SIZE // MIB)])
            member.leader.join("copying")
            client = member.client()
            requests(client, chance, 2 * REQUESTS, record)
            client.close()
            return finish(member, record, source)


def only_leg_full(folder: Path, seed: int) -> Record:
    """The only leg fills up, so the application gets its error; then the medium is cut short under our hands."""
    chance = random.Random(seed)
    record = Record()
    with small_file_system(folder / "small") as small:
        source = sparse_file(small / "source", SIZE)
        with nbd_member(folder, leg_record(source), size_bytes=SIZE) as member:
            client = member.client()
            requests(client, chance, 2 * REQUESTS, record)
            with source.open("r+b") as file:
                file.truncate(SIZE // 2)
            requests(client, chance, 30, record)
            client.close()
            return finish(member, record)


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("trace", [every_state, full_leg, only_leg_full], ids=lambda trace: trace.__name__)
def test_both_data_paths_do_the_same(
    trace: Any, seed: int, filter_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = []
    for name, switch in (("python", "off"), ("filter", filter_path)):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv(SWITCH, switch)
        records.append(trace(folder, seed))
    one, other = records
    assert one == other
    assert any(outcome.endswith("ok") for outcome in one.outcomes)
