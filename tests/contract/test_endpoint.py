"""The contract of Endpoint (src/shadowvol/endpoints/base.py), passed by each kind of local leg through each cache mode.

The randomised test checks against a bytearray; its failure prints the seed, and SHADOWVOL_TEST_SEED replays it.
"""

import errno
import fcntl
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from shadowvol.endpoints.base import Endpoint
from shadowvol.endpoints.dead import DeadEndpoint
from shadowvol.endpoints.identity import LegRefused, LegSpec, identity_of, probe, same_storage, signature
from shadowvol.endpoints.local import Cache, LocalEndpoint, open_local
from tests.support.loopdev import loop_device

SIZE = 8 << 20
MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One row of the suite: how the medium is made, and how it is opened."""

    name: str
    cache: Cache
    size: int = SIZE
    prefilled: bool = False
    sector: int = 0  # 0: a file; else a loop device with sectors of this size

    def make(self, directory: Path, stack: ExitStack) -> str:
        file = directory / "medium"
        file.write_bytes(os.urandom(self.size) if self.prefilled else b"")
        os.truncate(file, self.size)
        if not self.sector:
            return str(file)
        return stack.enter_context(loop_device(file, "--sector-size", str(self.sector)))


KINDS = [
    Kind("file-host", "host", prefilled=True),
    Kind("file-none", "none", prefilled=True),
    Kind("sparse-host", "host"),
    Kind("sparse-none", "none"),
    Kind("ragged-host", "host", size=SIZE + 700),
    Kind("ragged-none", "none", size=SIZE + 700),
    Kind("loop512-host", "host", sector=512),
    Kind("loop512-none", "none", sector=512),
    Kind("loop4096-host", "host", sector=4096),
    Kind("loop4096-none", "none", sector=4096, prefilled=True),
]


@dataclass
class Leg:
    """An open endpoint with a second, independent view of the same medium and what must be in it."""

    kind: Kind
    path: str
    endpoint: LocalEndpoint
    expected: bytearray

    def write(self, data: bytes, offset: int) -> None:
        self.endpoint.pwrite(data, offset)
        self.expected[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_punch: bool) -> None:
        self.endpoint.zero(offset, length, may_punch)
        self.expected[offset : offset + length] = bytes(length)

    def assert_equal(self) -> None:
        """Both through the endpoint and, after a flush, through a fresh buffered open."""
        assert read(self.endpoint, 0, self.kind.size) == self.expected
        self.endpoint.flush()
        with open(self.path, "rb") as file:
            assert file.read() == self.expected


def read(endpoint: Endpoint, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    endpoint.pread_into(buffer, offset)
    return bytes(buffer)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def leg(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Leg]:
    kind: Kind = request.param
    with ExitStack() as stack:
        path = kind.make(tmp_path, stack)
        endpoint = open_local(path, cache=kind.cache, writable=True, claim=False)
        stack.callback(endpoint.close)
        yield Leg(kind, path, endpoint, bytearray(Path(path).read_bytes()))


# --- what an endpoint says of itself ---------------------------------------------------------------------------------


def test_size_block_and_cache_mode_are_told(leg: Leg) -> None:
    """Size in bytes; the smallest unit of the medium; the cache mode that is in effect."""
    assert leg.endpoint.size_bytes == leg.kind.size
    assert (leg.endpoint.cache, leg.endpoint.cache_reason) == (leg.kind.cache, None)
    if leg.kind.sector:
        assert leg.endpoint.block_bytes == leg.kind.sector
    else:
        assert leg.endpoint.block_bytes in ((1,) if leg.kind.cache == "host" else (512, 1024, 2048, 4096))


def test_probing_for_punch_harms_nothing(leg: Leg) -> None:
    """Opening a leg decides can_punch without a change of content, size or allocation."""
    assert leg.endpoint.can_punch is True
    assert read(leg.endpoint, 0, leg.kind.size) == leg.expected
    assert os.path.getsize(leg.path) == (0 if leg.kind.sector else leg.kind.size)


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_any_offset_and_length_can_be_written_and_read(leg: Leg) -> None:
    """Alignment is the endpoint's business; neighbours of the range stay as they were."""
    for offset in (0, 1, 511, 512, 4095, 4096, 70_001, MIB - 1, MIB):
        for length in (1, 512, 513, 4096, 10_000, MIB, 3 * MIB + 5):
            leg.write(os.urandom(length), offset)
            margin = max(0, offset - 5000)
            assert read(leg.endpoint, margin, length + 10_000) == leg.expected[margin : margin + length + 10_000]
            assert read(leg.endpoint, offset, length) == leg.expected[offset : offset + length]


def test_page_aligned_buffers_are_used_directly(leg: Leg) -> None:
    """The copier's buffers: aligned memory, aligned range; the same outcome as through a bounce buffer."""
    with mmap.mmap(-1, 2 * MIB) as memory, memoryview(memory) as view:
        view[:] = os.urandom(2 * MIB)
        leg.endpoint.pwrite(view, MIB)
        leg.expected[MIB : 3 * MIB] = view
        view[:] = bytes(2 * MIB)
        leg.endpoint.pread_into(view, MIB)
        assert view == leg.expected[MIB : 3 * MIB]
    leg.assert_equal()


def test_the_last_bytes_can_be_written_and_the_size_stays(leg: Leg) -> None:
    """Also where the size is no multiple of anything."""
    for length in (1, 188, 700, 701, 5000):
        leg.write(os.urandom(length), leg.kind.size - length)
        leg.assert_equal()
    assert leg.kind.sector or os.stat(leg.path).st_size == leg.kind.size


def test_memoryviews_and_readonly_bytes_are_accepted(leg: Leg) -> None:
    """nbdkit's buffers are read-only and not aligned."""
    data = os.urandom(8192)
    leg.write(data, 3)
    leg.endpoint.pwrite(memoryview(data)[1:4097], 100_001)
    assert read(leg.endpoint, 100_001, 4096) == data[1:4097]


def test_reading_beyond_the_end_is_eio(leg: Leg) -> None:
    """A medium shorter than expected must never look like zeroes."""
    with pytest.raises(OSError) as caught:
        read(leg.endpoint, leg.kind.size - 100, 200)
    assert caught.value.errno == errno.EIO


def test_writing_beyond_the_end_is_refused(leg: Leg) -> None:
    """A file would grow silently."""
    for action in (
        lambda: leg.endpoint.pwrite(b"x" * 200, leg.kind.size - 100),
        lambda: leg.endpoint.zero(leg.kind.size - 100, 200, True),
        lambda: leg.endpoint.punch(leg.kind.size, 512),
    ):
        with pytest.raises(OSError) as caught:
            action()
        assert caught.value.errno == errno.ENOSPC
    leg.assert_equal()


def test_random_operations_match_a_bytearray(leg: Leg) -> None:
    """A few hundred writes, zeroes, punches and reads of any alignment."""
    seed = int(os.environ.get("SHADOWVOL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"replay: SHADOWVOL_TEST_SEED={seed} .venv/bin/pytest {__file__} -k random_operations")
    chance = random.Random(seed)
    for _ in range(250):
        offset = chance.randrange(leg.kind.size)
        length = min(chance.choice([1, 300, 512, 4096, 5000, 65_536, 200_001]), leg.kind.size - offset)
        if chance.random() < 0.4:
            offset -= offset % 4096
        action = chance.choice(["write", "write", "zero", "punch", "read"])
        if action == "write":
            leg.write(chance.randbytes(length), offset)
        elif action == "zero":
            leg.zero(offset, length, chance.random() < 0.5)
        elif action == "punch":
            leg.endpoint.punch(offset, length)
            leg.expected[offset : offset + length] = bytes(length)
        else:
            assert read(leg.endpoint, offset, length) == leg.expected[offset : offset + length]
    leg.assert_equal()


def test_threads_do_not_disturb_each_other(leg: Leg) -> None:
    """Four threads in blocks of their own, all at once, each block rewritten and read back."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            chance = random.Random(number)
            for turn in range(30):
                block = number * MIB + turn * 8192
                data = chance.randbytes(8192)
                leg.write(data, block)
                assert read(leg.endpoint, block, 8192) == data
                leg.zero(block + 4096, 4096, True)
                assert read(leg.endpoint, block, 8192) == data[:4096] + bytes(4096)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    leg.assert_equal()


# --- zeroes, holes, extents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("may_punch", [True, False])
def test_zeroed_ranges_read_as_zeroes_and_neighbours_stay(leg: Leg, may_punch: bool) -> None:
    """Whatever the alignment, punched or not."""
    for offset, length in ((0, MIB), (1, 10), (100, 5000), (4096, 4096), (65_000, 2 * MIB + 3)):
        leg.write(os.urandom(4 * MIB), 0)
        leg.zero(offset, length, may_punch)
        leg.assert_equal()


def test_punching_gives_space_back(leg: Leg) -> None:
    """Seen by the blocks of the file (of the file behind the loop device)."""
    file = Path(leg.path) if not leg.kind.sector else next(Path(request_directory(leg)).glob("medium"))
    leg.write(os.urandom(4 * MIB), 0)
    leg.endpoint.flush()
    before = file.stat().st_blocks
    leg.endpoint.punch(MIB, 2 * MIB)
    leg.expected[MIB : 3 * MIB] = bytes(2 * MIB)
    leg.endpoint.flush()
    assert before - file.stat().st_blocks >= 2 * MIB // 512
    leg.assert_equal()


def request_directory(leg: Leg) -> Path:
    """Where the file behind a loop device is."""
    name = leg.path.removeprefix("/dev/")
    return Path(Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()).parent


def test_extents_cover_the_range_exactly_and_holes_are_zero(leg: Leg) -> None:
    """No gap, no overlap, nothing outside; what is called a hole reads as zeroes."""
    leg.zero(0, leg.kind.size, True)
    leg.write(os.urandom(65_536), MIB)
    leg.write(os.urandom(65_536), 5 * MIB)
    for offset, length in ((0, leg.kind.size), (MIB + 100, 4 * MIB), (MIB + 10, 20), (3 * MIB, MIB), (7, 0)):
        position = offset
        for run in leg.endpoint.extents(offset, length):
            assert run.offset == position and run.length > 0
            if run.hole:
                assert not any(read(leg.endpoint, run.offset, run.length))
            position += run.length
        assert position == offset + length


def test_holes_of_files_are_seen(tmp_path: Path) -> None:
    """A sparse file stays sparse on its way through shadowvol."""
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 1 << 40)
    endpoint = open_local(str(file), cache="host", writable=True, claim=False)
    try:
        endpoint.pwrite(b"x" * 65_536, 1 << 39)
        runs = endpoint.extents(0, 1 << 40)
        assert [run.hole for run in runs] == [True, False, True]
        assert (runs[1].offset, runs[1].length) == (1 << 39, 65_536)
    finally:
        endpoint.close()


def test_a_file_that_got_shorter_is_an_error_not_a_hole(tmp_path: Path) -> None:
    """What was cut off must not be taken for zeroes."""
    file = tmp_path / "cut"
    file.write_bytes(os.urandom(4 * MIB))
    endpoint = open_local(str(file), cache="host", writable=True, claim=False)
    try:
        os.truncate(file, 2 * MIB + 100)
        assert endpoint.extents(0, MIB)[0].hole is False
        with pytest.raises(OSError) as caught:
            endpoint.extents(MIB, 3 * MIB)
        assert caught.value.errno == errno.EIO
    finally:
        endpoint.close()


# --- claims, access, fall-backs --------------------------------------------------------------------------------------


def test_only_one_opener_can_claim(leg: Leg) -> None:
    """A second claim is EBUSY, an open without a claim works beside it, and closing gives the claim back."""
    first = open_local(leg.path, cache=leg.kind.cache, writable=True, claim=True)
    with pytest.raises(OSError) as caught:
        open_local(leg.path, cache=leg.kind.cache, writable=True, claim=True)
    assert caught.value.errno == errno.EBUSY
    leg.write(b"beside the claim", 1000)
    leg.zero(MIB, MIB, True)
    leg.assert_equal()
    first.close()
    open_local(leg.path, cache=leg.kind.cache, writable=True, claim=True).close()


def test_a_claimed_disk_with_a_dirty_cache_is_still_zeroed(leg: Leg) -> None:
    """Where the kernel refuses fallocate because another opener has claimed the disk, zeroes are written."""
    first = open_local(leg.path, cache=leg.kind.cache, writable=True, claim=True)
    try:
        leg.write(os.urandom(2 * MIB), 0)
        leg.endpoint.punch(4096, MIB)
        leg.expected[4096 : 4096 + MIB] = bytes(MIB)
        leg.write(os.urandom(2 * MIB), 2 * MIB)
        leg.zero(2 * MIB + 4096, MIB, False)
        leg.assert_equal()
    finally:
        first.close()


def test_a_claim_ends_with_its_process(leg: Leg) -> None:
    """SIGKILL included: the kernel closes the files."""
    code = (
        "import sys; from shadowvol.endpoints.local import open_local\n"
        "leg = open_local(sys.argv[1], cache='host', writable=True, claim=True)\n"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, leg.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdin is not None
    with child.stdout, child.stdin:
        assert child.stdout.readline() == "claimed\n"
        with pytest.raises(OSError, match="Errno 16"):
            open_local(leg.path, cache="host", writable=True, claim=True)
        child.kill()
        child.wait()
    open_local(leg.path, cache="host", writable=True, claim=True).close()


def test_a_read_only_open_cannot_write(leg: Leg) -> None:
    """And never says that it can punch."""
    endpoint = open_local(leg.path, cache=leg.kind.cache, writable=False, claim=False)
    try:
        assert endpoint.can_punch is False
        assert read(endpoint, 0, 8192) == leg.expected[:8192]
        endpoint.flush()
        for action in (
            lambda: endpoint.pwrite(b"x" * 512, 0),
            lambda: endpoint.zero(0, 512, True),
            lambda: endpoint.punch(0, 512),
        ):
            with pytest.raises(OSError):
                action()
    finally:
        endpoint.close()
    leg.assert_equal()


def test_a_closed_endpoint_fails_every_use(leg: Leg) -> None:
    """close() may be called again; any other use is an OSError, never another file's data."""
    endpoint = open_local(leg.path, cache=leg.kind.cache, writable=True, claim=True)
    endpoint.close()
    endpoint.close()
    for action in (
        lambda: read(endpoint, 0, 512),
        lambda: endpoint.pwrite(b"x" * 512, 0),
        lambda: endpoint.zero(0, 4096, True),
        lambda: endpoint.flush(),
    ):
        with pytest.raises(OSError):
            action()
    leg.assert_equal()


def test_o_direct_refused_falls_back_and_says_why() -> None:
    """/proc has regular files that know no O_DIRECT."""
    endpoint = open_local("/proc/self/environ", cache="none", writable=False, claim=False)
    try:
        assert endpoint.cache == "host"
        assert endpoint.cache_reason is not None and endpoint.cache_reason.startswith("O_DIRECT refused")
    finally:
        endpoint.close()


def test_what_is_neither_file_nor_disk_cannot_be_opened(tmp_path: Path) -> None:
    """A directory, a FIFO (which would block), nothing at all."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing"):
        with pytest.raises(OSError):
            open_local(str(path), cache="host", writable=False, claim=False)


def test_a_dead_endpoint_fails_every_operation_with_its_reason() -> None:
    """Each use raises the errno and the reason; close() works; the size is the recorded one."""
    dead = DeadEndpoint(1 << 30, "target is not there", errno.ENODEV)
    endpoint: Endpoint = dead
    assert (endpoint.size_bytes, endpoint.can_punch) == (1 << 30, False)
    for action in (
        lambda: endpoint.pread_into(bytearray(512), 0),
        lambda: endpoint.pwrite(b"", 0),
        lambda: endpoint.zero(0, 512, True),
        lambda: endpoint.punch(0, 512),
        lambda: endpoint.flush(),
        lambda: endpoint.extents(0, 512),
    ):
        with pytest.raises(OSError, match="target is not there") as caught:
            action()
        assert caught.value.errno == errno.ENODEV
    endpoint.close()


# --- identity: what a LEG argument means -----------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image"
    file.touch()
    os.truncate(file, 64 * MIB)
    return file


def test_leg_arguments_become_absolute_real_paths(image: Path, tmp_path: Path) -> None:
    """Relative paths and symlinks are resolved; names below /dev, which are the stable ones, are kept."""
    (tmp_path / "link").symlink_to(image)
    real = os.path.realpath(image)
    assert LegSpec.parse("image", str(tmp_path)).path == real
    assert LegSpec.parse(str(tmp_path / "." / "link")).path == real
    assert LegSpec.parse("/dev/disk/by-id/x").path == "/dev/disk/by-id/x"


@pytest.mark.parametrize("argument", ["nbd://host/x", "nbd+unix:///x?socket=/s", "nbds://host"])
def test_nbd_legs_are_refused_for_now(argument: str) -> None:
    """Recognised, and refused with a clear word, instead of taken for a file name."""
    with pytest.raises(LegRefused, match="not supported yet"):
        LegSpec.parse(argument)


@pytest.mark.parametrize("argument", ["", "ftp://x/y", "a\0b"])
def test_nonsense_legs_are_refused(argument: str) -> None:
    """An empty argument, another scheme, a NUL byte."""
    with pytest.raises(LegRefused):
        LegSpec.parse(argument)


def test_unfit_legs_are_refused_with_a_reason(tmp_path: Path) -> None:
    """Missing, directory, special file, empty, odd size: each has its own sentence."""
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    os.mkfifo(tmp_path / "fifo")
    reasons = {"missing": "does not exist", ".": "is a directory", "fifo": "neither", "empty": "is empty", "odd": "512"}
    for name, reason in reasons.items():
        with pytest.raises(LegRefused, match=reason):
            probe(str(tmp_path / name))


def test_a_file_is_recognised_by_what_it_is(image: Path, tmp_path: Path) -> None:
    """Same identity by another name and after a rewrite; another one for a copy, and for another size."""
    facts = probe(str(image))
    assert (facts.kind, facts.size_bytes, facts.logical_block_bytes) == ("file", 64 * MIB, 512)
    assert (facts.signature, facts.mounted_at, facts.holders) == (None, None, ())
    os.link(image, tmp_path / "hard")
    with open(image, "r+b") as file:
        file.write(b"new content")
    assert probe(str(tmp_path / "hard")).identity == facts.identity
    copy = tmp_path / "copy"
    copy.write_bytes(image.read_bytes())
    assert probe(str(copy)).identity != facts.identity
    os.truncate(image, 32 * MIB)
    assert probe(str(image)).identity != facts.identity


def test_a_loop_device_is_recognised_by_its_backing_file(image: Path) -> None:
    """Whichever number the device has; the offset is part of it."""
    with loop_device(image) as one:
        facts = probe(one)
        assert facts.kind == "disk" and facts.identity.startswith("loop:file:")
        assert identity_of(str(image)) in facts.identity
        with loop_device(image) as other:
            assert other != one
            assert probe(other).identity == facts.identity
        with loop_device(image, "--offset", str(MIB)) as shifted:
            assert probe(shifted).identity != facts.identity
    with loop_device(image, "--sector-size", "4096") as big:
        assert probe(big).logical_block_bytes == 4096


def test_same_storage_is_seen_through_every_name(image: Path, tmp_path: Path) -> None:
    """Hard link, symlink, loop device, loop on loop; another file on the same file system is other storage."""
    os.link(image, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(image)
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB))
    with loop_device(image) as one, loop_device(image) as two, loop_device(Path(one)) as nested:
        for path in (tmp_path / "hard", tmp_path / "soft", one, two, nested):
            assert same_storage(str(image), str(path)) and same_storage(str(path), str(image))
            assert not same_storage(str(path), str(other)) and not same_storage(str(other), str(path))
        assert same_storage(two, nested)


def test_parts_of_one_file_are_the_same_storage_only_where_they_overlap(image: Path) -> None:
    """Two loop devices on different halves share nothing; each shares with the file and with one across both."""
    half = str(32 * MIB)
    with (
        loop_device(image, "--sizelimit", half) as low,
        loop_device(image, "--offset", half) as high,
        loop_device(image, "--offset", str(16 * MIB), "--sizelimit", half) as across,
    ):
        assert not same_storage(low, high)
        assert same_storage(low, across) and same_storage(across, high)
        assert same_storage(str(image), high) and same_storage(low, str(image))


def write_partition_table(file: Path, parts: list[tuple[int, int]]) -> None:
    """A master boot record with Linux partitions, given as (first sector, sectors)."""
    entries = b"".join(struct.pack("<8B2I", 0, 0, 2, 0, 0x83, 255, 255, 255, first, count) for first, count in parts)
    record = bytes(440) + struct.pack("<IH", 0x5AD0_4011, 0) + entries.ljust(64, b"\0") + b"\x55\xaa"
    with open(file, "r+b") as image_file:
        image_file.write(record)


def test_partitions_are_told_apart(image: Path) -> None:
    """A partition is the same storage as its disk, not as its sibling, and has an identity of its own."""
    write_partition_table(image, [(2048, 32768), (34816, 32768)])
    with loop_device(image) as disk:
        subprocess.run(["partx", "--add", disk], check=True)  # works where the kernel itself reads no tables
        try:
            first, second = f"{disk}p1", f"{disk}p2"
            assert same_storage(disk, first) and same_storage(second, disk) and same_storage(str(image), second)
            assert not same_storage(first, second)
            assert len({probe(path).identity for path in (disk, first, second)}) == 3
            assert probe(disk).signature == "dos"
            assert probe(first).size_bytes == 32768 * 512
        finally:
            subprocess.run(["partx", "--delete", disk], check=True)


def test_signatures_are_found_on_files_and_disks(image: Path) -> None:
    """What a target would lose by being overwritten."""
    assert signature(str(image)) is None
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    assert signature(str(image)) == "ext4"
    with loop_device(image) as device:
        assert signature(device) == "ext4"


def test_a_mounted_leg_is_noticed_by_each_of_its_names(image: Path, tmp_path: Path) -> None:
    """The device, the file behind it, another device on that file; and no longer after the umount."""
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    point = tmp_path / "mount point"
    point.mkdir()
    with loop_device(image) as device, loop_device(image) as other:
        subprocess.run(["mount", device, str(point)], check=True)
        try:
            inside = point / "inside"
            inside.write_bytes(bytes(MIB))
            for path in (device, str(image), other):
                assert probe(path).mounted_at == os.path.realpath(point)
            assert probe(str(inside)).mounted_at is None
            assert same_storage(str(inside), device)
            assert "fs=" in probe(str(inside)).identity
        finally:
            subprocess.run(["umount", str(point)], check=True)
        assert probe(device).mounted_at is None
        assert set(probe(str(image)).holders) == {Path(device).name, Path(other).name}


def test_swap_counts_as_mounted(image: Path) -> None:
    """A leg that is swapped to must not be overwritten."""
    os.truncate(image, 0)
    with open(image, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MIB)
        file.write(bytes(4 * MIB))
    os.chmod(image, 0o600)
    subprocess.run(["mkswap", "--quiet", str(image)], check=True, capture_output=True)
    with loop_device(image) as device:
        subprocess.run(["swapon", device], check=True)
        try:
            assert probe(device).mounted_at == "[swap]"
            assert probe(str(image)).mounted_at == "[swap]"
        finally:
            subprocess.run(["swapoff", device], check=True)
        assert probe(device).mounted_at is None


def test_claims_do_not_lock_out_other_kinds_of_locks(image: Path) -> None:
    """POSIX record locks, as databases take them on their own files, live beside the claim."""
    endpoint = open_local(str(image), cache="host", writable=True, claim=True)
    try:
        with open(image, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        endpoint.close()
