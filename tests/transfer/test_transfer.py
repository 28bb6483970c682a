"""The transfer process, real, over its control socket (src/shadowvol/transfer/process.py)."""

import errno
import fcntl
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shadowvol.endpoints.identity import identity_of
from shadowvol.endpoints.kernelcalls import resident_pages
from shadowvol.transfer.throttle import PIECE_BYTES_MAX
from tests.support.loopdev import loop_device, small_disk
from tests.support.nbd_file import nbd_file
from tests.support.transfer_client import TransferClient

MIB = 1 << 20
SIZE = 32 * MIB
BLOCK = 64 << 10


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TransferClient]:
    with TransferClient(tmp_path / "lock") as client:
        yield client
        assert client.hang_up() == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data with a hole, a run of written zeroes, and zero blocks among data."""
    content = bytearray(os.urandom(SIZE))
    content[4 * MIB : 12 * MIB] = bytes(8 * MIB)  # made a hole below
    content[16 * MIB : 20 * MIB] = bytes(4 * MIB)  # zeroes that take space
    content[24 * MIB + BLOCK : 24 * MIB + 3 * BLOCK] = bytes(2 * BLOCK)
    file = tmp_path / "source"
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        subprocess.run(["fallocate", "-p", "-o", str(4 * MIB), "-l", str(8 * MIB), str(file)], check=True)
    return file


def empty_file(path: Path, size: int = SIZE) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return empty_file(tmp_path / "target")


def differences(one: Path | str, other: Path | str, length: int = SIZE) -> list[int]:
    """Numbers of the 64 KiB blocks in which two media differ."""
    with open(one, "rb") as a, open(other, "rb") as b:
        return [n for n in range(-(-length // BLOCK)) if a.read(BLOCK) != b.read(BLOCK)]


# --- copying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize("medium", ["file", "loop512", "loop4096"])
@pytest.mark.parametrize("dirty", [False, True], ids=["empty", "dirty"])
def test_a_copy_is_equal(
    client: TransferClient, source: Path, tmp_path: Path, cache: str, medium: str, dirty: bool
) -> None:
    """Whatever the target is and held before, through either cache mode; every byte is accounted for once."""
    file = empty_file(tmp_path / "target")
    if dirty:
        file.write_bytes(os.urandom(SIZE))
    with ExitStack() as stack:
        path: Path | str = file
        if medium != "file":
            path = stack.enter_context(loop_device(file, "--sector-size", medium.removeprefix("loop")))
        opened = client.open(source, path, cache)
        assert opened["source"]["ok"] and opened["target"] | {"size": SIZE, "cache": cache} == opened["target"]
        done = client.copy([(0, SIZE)])
        assert (done["ok"], done["leg"], done["errno"], done["error"]) == (True, None, None, None)
        assert done["bytes_read"] == 24 * MIB, "the hole was read"
        assert done["bytes_written"] + done["bytes_zeroed"] + done["bytes_skipped"] == SIZE
        assert client.flush("source", "target")["failed"] == {}
        assert differences(source, path) == []
        client.open(None, None)  # lets go of the loop device


def test_a_sparse_target_stays_sparse(client: TransferClient, source: Path, target: Path) -> None:
    """Neither holes nor zeroes of the source take space on a target that is a hole there."""
    client.open(source, target)
    done = client.copy([(0, SIZE)])
    assert done["bytes_zeroed"] == 0
    assert done["bytes_skipped"] == 12 * MIB + 2 * BLOCK
    assert client.flush("target")["failed"] == {}
    assert target.stat().st_blocks * 512 <= 21 * MIB
    assert differences(source, target) == []


def test_only_the_ranges_are_copied(client: TransferClient, source: Path, target: Path) -> None:
    """Unaligned ranges too, down to the byte."""
    client.open(source, target)
    ranges = [(100, 5000), (13 * MIB + 1, 3), (2 * MIB, MIB), (SIZE - 700, 700)]
    done = client.copy(ranges)
    assert done["ok"] and done["bytes_written"] == sum(length for _, length in ranges)
    expected = bytearray(SIZE)
    content = source.read_bytes()
    for offset, length in ranges:
        expected[offset : offset + length] = content[offset : offset + length]
    assert target.read_bytes() == expected


def test_the_other_direction_works_too(client: TransferClient, source: Path, target: Path) -> None:
    """A resync from target to source; "source" and "target" keep their meaning."""
    target.write_bytes(os.urandom(SIZE))
    client.open(source, target, "none")
    assert client.copy([(0, SIZE)], reverse=True)["ok"]
    assert differences(source, target) == []


def test_a_smaller_source_is_copied_to_its_last_byte(client: TransferClient, tmp_path: Path, target: Path) -> None:
    """The size is a multiple of 512 and of nothing else; the larger target keeps its rest."""
    size = 5 * MIB + 512
    small = tmp_path / "small"
    small.write_bytes(os.urandom(size))
    target.write_bytes(b"r" * SIZE)
    client.open(small, target, "none")
    assert client.copy([(0, size)])["ok"]
    assert target.read_bytes() == small.read_bytes() + b"r" * (SIZE - size)


@pytest.mark.parametrize("medium", ["file", "loop"])
def test_a_copy_leaves_the_page_cache_as_it_was(client: TransferClient, tmp_path: Path, medium: str) -> None:
    """What others had there of the source stays, what the copy brought in is dropped: by the kernel itself for a file
    (from 6.14 on), by us for a disk. Some of what the kernel read ahead may stay."""
    size, theirs = 160 * MIB, [(8 * MIB, 8 * MIB), (100 * MIB, 8 * MIB)]
    file = tmp_path / "source"
    with file.open("wb") as out:
        for _ in range(size // MIB):
            out.write(os.urandom(MIB))
    with ExitStack() as stack:
        source = stack.enter_context(loop_device(file)) if medium == "loop" else str(file)
        fd = os.open(source, os.O_RDONLY)
        stack.callback(os.close, fd)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into what is not theirs
        for offset, length in theirs:
            os.pread(fd, length, offset)
        before = resident_pages(fd, 0, size)
        assert before.count(1) == sum(length for _, length in theirs) // mmap.PAGESIZE

        client.open(source, empty_file(tmp_path / "target", size))
        assert client.copy([(0, size // 2), (size // 2, size // 2)])["ok"]

        after = resident_pages(fd, 0, size)
        assert differences(source, tmp_path / "target", size) == []
    assert all(now for was, now in zip(before, after, strict=True) if was)
    assert after.count(1) - before.count(1) < 0.1 * len(after)


def test_the_digest_tells_what_was_read(client: TransferClient, source: Path, target: Path) -> None:
    """The same data, the same digest; one changed bit, another one."""
    client.open(source, target)
    first = client.copy([(0, SIZE)])["digest"]
    assert client.copy([(0, SIZE)])["digest"] == first and len(first) == 32
    with source.open("r+b") as file:
        file.write(bytes([file.read(1)[0] ^ 1, 0])[:1])
        file.seek(0)
        file.write(b"changed")
    assert client.copy([(0, SIZE)])["digest"] != first


def test_compare_first_writes_only_what_differs(client: TransferClient, source: Path, target: Path) -> None:
    """In pieces of 64 KiB; what is equal is not written, nor are holes over zeroes."""
    target.write_bytes(source.read_bytes())
    with target.open("r+b") as file:
        for offset in (7, 3 * MIB + 5, SIZE - 1, 5 * MIB):  # the last one is in the source's hole
            file.seek(offset)
            file.write(b"!")
    client.open(source, target)
    done = client.copy([(0, SIZE)], compare_first=True)
    assert done["ok"] and done["bytes_written"] == 3 * BLOCK
    assert done["bytes_zeroed"] == PIECE_BYTES_MAX  # a hole is dealt with piece by piece
    assert differences(source, target) == []


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["host", "none"])
def test_a_verified_copy_of_a_good_medium_succeeds(
    client: TransferClient, source: Path, target: Path, cache: str
) -> None:
    """Data, zeroes and holes over old data are all read back."""
    target.write_bytes(os.urandom(SIZE))
    client.open(source, target, cache)
    assert client.copy([(0, SIZE)], verify=True)["ok"]
    assert differences(source, target) == []


def test_a_medium_that_loses_writes_is_found_by_verify(client: TransferClient, source: Path, tmp_path: Path) -> None:
    """nbdkit's null accepts everything and reads as zeroes. Without verify nobody notices; with it the target fails."""
    with nbd_file(tmp_path, "null", str(SIZE)) as liar:
        client.open(source, liar)
        assert client.copy([(0, MIB)])["ok"]
        done = client.copy([(0, MIB)], verify=True)
        assert (done["ok"], done["leg"], done["errno"]) == (False, "target", errno.EIO)
        assert "verify mismatch at 0" in done["error"]
        client.open(None, None)


def test_verify_bears_with_an_application_that_writes_meanwhile(
    client: TransferClient, source: Path, target: Path
) -> None:
    """Its mirrored writes make legs differ for an instant, or are overwritten by older data: not a fault of the leg."""
    seed = int(os.environ.get("SHADOWVOL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"replay: SHADOWVOL_TEST_SEED={seed} .venv/bin/pytest {__file__} -k application_that_writes")
    chance = random.Random(seed)
    blocks = chance.sample(range(SIZE // BLOCK), 200)

    def application() -> None:
        with source.open("r+b", buffering=0) as one, target.open("r+b", buffering=0) as other:
            for block in blocks:
                data = os.urandom(4096)
                os.pwrite(one.fileno(), data, block * BLOCK)
                os.pwrite(other.fileno(), data, block * BLOCK)

    client.open(source, target)
    job = client.begin([(0, SIZE)], verify=True)
    thread = threading.Thread(target=application)
    thread.start()
    done = client.wait("copied", job)
    thread.join()
    assert done["ok"], done


# --- order, pause, throttle, cancel ----------------------------------------------------------------------------------


def test_urgent_copies_go_on_while_others_are_paused(client: TransferClient, source: Path, target: Path) -> None:
    """Pause stops ordinary copies, not recopies under a hold, flushes or probes; resume finishes them."""
    client.open(source, target)
    client.send({"cmd": "pause", "on": True})
    waiting = client.begin([(0, 4 * MIB)])
    assert client.copy([(20 * MIB, MIB)], urgent=True)["ok"]
    assert client.flush("target")["failed"] == {}
    assert client.probe(0, SIZE, MIB)["ok"]
    assert not any(event["event"] == "copied" for event in client.events)
    changed = set(range(20 * MIB // BLOCK, 21 * MIB // BLOCK))
    assert changed.isdisjoint(differences(source, target))
    assert set(range(4 * MIB // BLOCK)) <= set(differences(source, target)), "a paused copy went on"
    client.send({"cmd": "pause", "on": False})
    assert client.wait("copied", waiting)["ok"]


def test_the_rate_limit_limits_and_urgent_copies_ignore_it(client: TransferClient, source: Path, target: Path) -> None:
    """At 100 bytes/s an ordinary copy would take a day while urgent ones pass; 12 MiB at 8 MiB/s take over a second."""
    client.open(source, target)
    client.send({"cmd": "throttle", "rate": 100})
    slow = client.begin([(20 * MIB, 12 * MIB)])
    assert client.copy([(0, 4 * MIB)], urgent=True)["ok"]
    assert not any(event["event"] == "copied" for event in client.events), "the limited copy was not limited"
    client.send({"cmd": "throttle", "rate": 8 * MIB})
    done = client.wait("copied", slow)
    assert done["ok"] and done["elapsed_s"] > 12 / 8 * 0.8
    progress = [event["bytes_read"] for event in client.events if event["event"] == "progress"]
    assert progress == sorted(progress) and progress


def test_holes_do_not_count_against_the_rate(client: TransferClient, tmp_path: Path) -> None:
    """A terabyte of hole at 64 KiB/s would take half a year."""
    client.open(empty_file(tmp_path / "a", 1 << 40), empty_file(tmp_path / "b", 1 << 40))
    client.send({"cmd": "throttle", "rate": BLOCK})
    done = client.copy([(0, 1 << 40)])
    assert done["ok"] and done["bytes_skipped"] == 1 << 40


def test_lifting_the_rate_takes_effect_at_once(client: TransferClient, source: Path, target: Path) -> None:
    """A copy that would take days ends."""
    client.open(source, target)
    client.send({"cmd": "throttle", "rate": 100})
    job = client.begin([(0, SIZE)])
    assert client.wait("progress")["in_flight"] == 1
    client.send({"cmd": "throttle", "rate": None})
    assert client.wait("copied", job)["ok"]
    assert differences(source, target) == []


def test_a_cancelled_copy_stops_and_says_so(client: TransferClient, source: Path, target: Path) -> None:
    """Running, waiting behind another, or unknown; afterwards nothing of it is written any more."""
    client.open(source, target)
    client.send({"cmd": "throttle", "rate": 4 * MIB})
    running, waiting = client.begin([(0, SIZE)]), client.begin([(0, SIZE)])
    client.wait("progress")
    for job in (waiting, running, 999):
        client.send({"cmd": "cancel", "job": job})
    for job in (waiting, running):
        done = client.wait("copied", job)
        assert (done["ok"], done["error"], done["leg"], done["digest"]) == (False, "cancelled", None, None)
        assert done["bytes_read"] < SIZE
    before = target.read_bytes()
    client.send({"cmd": "throttle", "rate": None})
    assert client.copy([(0, 0)])["ok"]
    assert target.read_bytes() == before


def test_a_paused_copy_can_be_cancelled(client: TransferClient, source: Path, target: Path) -> None:
    """It has nothing in flight, so the answer comes at once."""
    client.open(source, target)
    client.send({"cmd": "pause", "on": True})
    job = client.begin([(0, SIZE)])
    client.send({"cmd": "cancel", "job": job})
    assert client.wait("copied", job)["error"] == "cancelled"


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_target_too_small_fails_as_the_target(client: TransferClient, source: Path, tmp_path: Path) -> None:
    """Nothing is written beyond its end, and the file does not grow."""
    small = empty_file(tmp_path / "small", 8 * MIB)
    client.open(source, small)
    done = client.copy([(12 * MIB, MIB)])
    assert (done["ok"], done["leg"], done["errno"]) == (False, "target", errno.ENOSPC)
    assert small.stat().st_size == 8 * MIB


def test_a_source_that_got_shorter_fails_as_the_source(client: TransferClient, source: Path, target: Path) -> None:
    """Short reads are errors, never zeroes."""
    client.open(source, target)
    os.truncate(source, 14 * MIB + 100)
    done = client.copy([(14 * MIB, BLOCK)])
    assert (done["ok"], done["leg"], done["errno"]) == (False, "source", errno.EIO)
    assert target.stat().st_blocks == 0


def test_a_failing_target_is_named_and_works_again_when_healed(
    client: TransferClient, source: Path, tmp_path: Path
) -> None:
    """nbdkit's error filter, switched by a file."""
    trigger = tmp_path / "broken"
    faults = ["error-pwrite=EIO", "error-pwrite-rate=100%", f"error-pwrite-file={trigger}"]
    with nbd_file(tmp_path, "--filter=error", "memory", str(SIZE), *faults) as flaky:
        client.open(source, flaky)
        trigger.touch()
        done = client.copy([(0, MIB)])
        assert (done["ok"], done["leg"], done["errno"]) == (False, "target", errno.EIO)
        trigger.unlink()
        assert client.copy([(0, MIB)])["ok"]
        assert differences(source, flaky, MIB) == []
        client.open(None, None)


def test_a_medium_that_vanishes_fails_copies_but_not_the_process(
    client: TransferClient, source: Path, target: Path, tmp_path: Path
) -> None:
    """Even closing it reports an error then. Another target can be opened in its place."""
    with nbd_file(tmp_path, "memory", str(SIZE)) as vanishing:
        client.open(source, vanishing)
        assert client.copy([(0, MIB)])["ok"]
    done = client.copy([(0, MIB)])
    assert (done["ok"], done["leg"]) == (False, "target")
    assert set(client.flush("source", "target")["failed"]) <= {"target"}
    assert client.open(source, target)["target"]["ok"]
    assert client.copy([(0, MIB)])["ok"]


def test_a_passing_fault_is_tried_again(client: TransferClient, source: Path, tmp_path: Path) -> None:
    """The first write of this server fails, all later ones succeed: the copy succeeds."""
    mark = tmp_path / "failed once"
    server = [
        "eval",
        f"get_size=echo {SIZE}",
        "pread=head -c $3 /dev/zero",
        f"pwrite=cat >/dev/null; if mkdir '{mark}' 2>/dev/null; then echo EIO once >&2; exit 1; fi",
    ]
    with nbd_file(tmp_path, *server) as flaky:
        client.open(source, flaky)
        assert client.copy([(0, BLOCK)])["ok"]
        assert mark.exists()
        client.open(None, None)


def test_a_failed_flush_is_told_once_and_names_the_leg(client: TransferClient, source: Path, tmp_path: Path) -> None:
    """A disk over a full file system: written pages cannot go anywhere. The source's flush is fine."""
    with small_disk(tmp_path / "full", 4 * MIB) as full, loop_device(empty_file(full / "disk")) as device:
        client.open(source, device)
        done = client.copy([(20 * MIB, 12 * MIB)])
        failed = client.flush("source", "target")["failed"]
        assert set(failed) == {"target"} and failed["target"]
        assert done["ok"] or done["leg"] == "target"
        client.open(None, None)


def test_what_a_worker_waited_for_is_still_told_by_the_flush(client: TransferClient, tmp_path: Path) -> None:
    """Write-back fails, then there is room again; the workers meet the failure while waiting for what they wrote. Only
    the flush may use the error up: bits that were set after a flush that says nothing would be of lost data."""
    size, lost = 128 * MIB, 12 * MIB  # each worker writes far more than it may be behind
    source = tmp_path / "source"
    source.write_bytes(os.urandom(lost) + bytes([1]) * (size - lost))
    with small_disk(tmp_path / "full", 4 * MIB) as full, loop_device(empty_file(full / "disk", size)) as device:
        try:
            client.open(source, device)
            assert client.copy([(0, lost)])["ok"]
            subprocess.run(["blockdev", "--flushbufs", device], capture_output=True, check=False)  # waits for it
            subprocess.run(["mount", "-o", f"remount,size={2 * size}", str(full)], check=True)
            assert client.copy([(lost, size - lost)])["ok"]
            assert set(client.flush("source", "target")["failed"]) == {"target"}
        finally:
            client.open(None, None)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_leg_that_is_not_the_recorded_one_is_not_opened(client: TransferClient, source: Path, target: Path) -> None:
    """Every copy with it fails, naming it, until it is reopened rightly."""
    legs = {
        "source": {"path": str(source), "cache": "host", "identity": identity_of(str(source))},
        "target": {"path": str(target), "cache": "host", "identity": identity_of(str(source))},
    }
    client.send({"cmd": "open", "legs": legs})
    opened = client.wait("opened")
    assert opened["source"]["ok"] and opened["source"]["size"] == SIZE
    assert not opened["target"]["ok"] and "not the recorded leg" in opened["target"]["error"]
    done = client.copy([(0, MIB)])
    assert (done["ok"], done["leg"]) == (False, "target")
    assert set(client.flush("source", "target")["failed"]) == {"target"}
    legs["target"]["identity"] = identity_of(str(target))
    client.send({"cmd": "open", "legs": legs})
    assert client.wait("opened")["target"]["ok"]
    assert client.copy([(0, MIB)])["ok"]


def test_a_missing_leg_does_not_hinder_the_other(client: TransferClient, source: Path, tmp_path: Path) -> None:
    """The answer says for each leg what happened; null is a leg that is not wanted."""
    opened = client.open(source, tmp_path / "missing")
    assert opened["source"]["ok"] and not opened["target"]["ok"] and "missing" in opened["target"]["error"]
    assert client.probe(0, SIZE, 64 * MIB)["ok"]
    assert not client.open(source, None)["target"]["ok"]
    assert client.flush("source")["failed"] == {}
    assert not client.probe(0, SIZE, MIB, leg="target")["ok"]


def test_a_reopen_leaves_running_copies_their_legs(
    client: TransferClient, source: Path, target: Path, tmp_path: Path
) -> None:
    """A copy that was ordered before ends on the media it was ordered for; later ones use the new ones."""
    client.open(source, target)
    client.send({"cmd": "pause", "on": True})
    job = client.begin([(0, SIZE)])
    second = empty_file(tmp_path / "second")
    client.open(source, second)
    client.send({"cmd": "pause", "on": False})
    assert client.wait("copied", job)["ok"]
    assert client.copy([(0, MIB)])["ok"]
    assert differences(source, target) == []
    assert differences(source, second, MIB) == [] and differences(target, second) != []


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_probe_of_a_terabyte_is_quick(client: TransferClient, tmp_path: Path) -> None:
    """A thousand islands of data in 1 TiB: found without reading, in one answer."""
    big = empty_file(tmp_path / "big", 1 << 40)
    with big.open("r+b") as file:
        for gib in range(1000):
            os.pwrite(file.fileno(), b"x" * 4096, gib << 30)
    client.open(big, None)
    assert client.probe(0, 1 << 40, 4096 * 1001)["end"] == 1 << 40
    assert client.probe(0, 1 << 40, 4096 * 10)["end"] == 10 << 30
    assert client.probe(0, 1 << 40, 1 << 40) | {"ok": True, "end": 1 << 40, "error": None}


def test_only_one_process_holds_the_lock(client: TransferClient, tmp_path: Path) -> None:
    """The second one ends with 3 and says why; after the first one's end the lock is free."""
    client.open(None, None)  # it has the lock when it answers
    with TransferClient(tmp_path / "lock") as second:
        assert second.process.wait(60) == 3
        assert second.process.stderr is not None
        lines = second.process.stderr.read().splitlines()
        assert len(lines) == 1 and "is held by another transfer process" in lines[0]
    assert client.hang_up() == 0
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("state", ["idle", "copying", "paused", "throttled"])
def test_it_ends_when_the_connection_closes(source: Path, target: Path, tmp_path: Path, state: str) -> None:
    """Whatever it is doing; then nothing of it can write any more, and its lock is free."""
    with TransferClient(tmp_path / "lock") as client:
        client.open(source, target)
        if state == "paused":
            client.send({"cmd": "pause", "on": True})
        if state == "throttled":
            client.send({"cmd": "throttle", "rate": 1000})
        if state != "idle":
            client.begin([(0, SIZE)])
        assert client.hang_up() == 0
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_quit_ends_it_too(client: TransferClient) -> None:
    """Exit code 0."""
    client.send({"cmd": "quit"})
    assert client.process.wait(60) == 0


def test_malformed_orders_are_answered(client: TransferClient, source: Path, target: Path) -> None:
    """A copy is answered by `copied`, everything else by `refused`; the process goes on."""
    client.open(source, target)
    client.send({"cmd": "copy", "job": 70, "from": "source", "to": "source", "ranges": [[0, 1]]})
    client.send({"cmd": "copy", "job": 71, "from": "source", "to": "target", "ranges": [[0, -1]]})
    client.send({"cmd": "copy", "job": 72, "from": "source", "to": "target"})
    for job in (70, 71, 72):
        done = client.wait("copied", job)
        assert (done["ok"], done["leg"], done["errno"]) == (False, None, errno.EINVAL)
    for order in ({"cmd": "dance"}, {"cmd": "flush", "job": 1, "legs": ["x"]}, {"cmd": "probe", "job": 1}, {}):
        client.send(order)
        assert client.wait("refused")["cmd"] == order.get("cmd")
    client.send({"cmd": "throttle", "rate": 0})
    assert "above 0" in client.wait("refused")["error"]
    assert client.copy([(0, MIB)])["ok"]


def test_the_same_job_twice_is_refused(client: TransferClient, source: Path, target: Path) -> None:
    """The first one goes on."""
    client.open(source, target)
    client.send({"cmd": "pause", "on": True})
    job = client.begin([(0, MIB)])
    order = {"cmd": "copy", "job": job, "from": "source", "to": "target", "ranges": [[0, 1]]}
    client.send(order)
    assert "running already" in client.wait("copied", job)["error"]
    client.send({"cmd": "pause", "on": False})
    assert client.wait("copied", job)["ok"]


def test_a_broken_protocol_ends_it(client: TransferClient) -> None:
    """Exit code 2 and one line; the fixture's 0 is for those who keep to it."""
    client.send_bytes(b"this is not json\n")
    assert client.process.wait(60) == 2
    client.process.returncode = 0


def test_it_asks_to_be_spared_by_the_oom_killer(client: TransferClient) -> None:
    """Where a process may do that (CAP_SYS_RESOURCE); else it works as any other."""
    client.open(None, None)
    allowed = subprocess.run(["sh", "-c", "echo -900 >/proc/self/oom_score_adj"], stderr=subprocess.DEVNULL)
    score = int(Path(f"/proc/{client.process.pid}/oom_score_adj").read_text())
    assert (score == -900) == (allowed.returncode == 0)
