"""What the transfer process's threads leave to others: who waits for the rate limit, and how a flush begins."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shadowvol.endpoints.local import open_local
from shadowvol.transfer.flushlane import STEPS, STEPS_MAX, begin_writeback
from shadowvol.transfer.jobs import CopyJob, CopyOrder
from shadowvol.transfer.legs import Leg
from shadowvol.transfer.pagecache import CachedBefore
from shadowvol.transfer.pool import CopyPool
from shadowvol.transfer.throttle import RateLimit
from tests.support.poll import wait_for

MIB = 1 << 20
RATE = 32 * MIB
_CACHESTAT = 451


class LegWithASlowSpot(Leg):
    """A read at offset 0 ends only when `go_on` is set."""

    go_on = threading.Event()

    def pread_once(self, buffer: memoryview, offset: int, before: CachedBefore | None) -> None:
        if offset == 0:
            self.go_on.wait(60)
        super().pread_once(buffer, offset, before)


class LegThatCounts(Leg):
    """Each step of write-back takes `work_s` of the processor."""

    steps = 0
    work_s = 0.0

    def start_writeback(self, offset: int, length: int) -> None:
        self.steps += 1
        end_s = time.thread_time() + self.work_s
        while time.thread_time() < end_s:
            pass
        super().start_writeback(offset, length)


class LegWrittenMeanwhile(LegThatCounts):
    """An application dirties its first page when the first pass of write-back has gone past it."""

    written = False

    def start_writeback(self, offset: int, length: int) -> None:
        super().start_writeback(offset, length)
        if offset > 0 and not self.written:
            self.written = True
            self.endpoint.pwrite(b"x", 0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Data, and an empty file of its size."""
    data, empty = tmp_path / "data", tmp_path / "empty"
    data.write_bytes(os.urandom(8 * MIB))
    empty.touch()
    os.truncate(empty, 8 * MIB)
    return data, empty


@pytest.fixture
def pool() -> Iterator[tuple[CopyPool, list[CopyJob]]]:
    done: list[CopyJob] = []
    pool = CopyPool(done.append)
    yield pool, done
    pool.stop()


@pytest.mark.parametrize("urgent", [False, True])
def test_a_piece_that_takes_long_holds_up_no_other(
    files: tuple[Path, Path], pool: tuple[CopyPool, list[CopyJob]], urgent: bool
) -> None:
    """Who minded the clock of the rate limit has gone to work: another worker minds it. The rate is kept meanwhile."""
    copies, done = pool
    copies.throttle(RATE)
    source, target = (open_local(str(path), cache="host", writable=True, claim=False) for path in files)
    with closing(source), closing(target):
        leg, other = LegWithASlowSpot("source", source, None), Leg("target", target, None)
        leg.go_on.set()
        copies.submit(CopyJob.start(CopyOrder(1, "source", "target", ((0, 1),), urgent, False, False), leg, other))
        wait_for(lambda: done, 30, "a first job, after which every worker sleeps")
        done.clear()
        leg.go_on.clear()
        order = CopyOrder(2, "source", "target", ((0, 8 * MIB),), urgent, False, False)
        began_s = time.monotonic()
        copies.submit(CopyJob.start(order, leg, other))
        limit = RateLimit(0.0)
        limit.set_rate(None if urgent else RATE, 0.0)
        others = 8 * MIB - limit.piece_bytes()
        wait_for(lambda: copies.statistics().bytes_read >= others, 30, "the other pieces")
        assert urgent or time.monotonic() - began_s > others / RATE * 0.7
        assert not done
        leg.go_on.set()
        wait_for(lambda: done, 30, "the end of the job")
    assert files[0].read_bytes() == files[1].read_bytes()


def dirty_pages(file: int) -> int:
    """Of an open file: not on the medium, and not on their way. cachestat(2)."""
    everything, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_CACHESTAT, file, everything, counts, 0) != 0:
        pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    return counts[1]


@pytest.mark.parametrize("size", [100 * MIB + 4096, 12345], ids=["many steps", "one step"])
def test_write_back_is_begun_everywhere(tmp_path: Path, size: int) -> None:
    """From the first page to the short last one: what fdatasync finds is on its way to the medium."""
    path = tmp_path / "leg"
    with path.open("wb") as out:
        out.truncate(size)
        os.fsync(out.fileno())
        for offset in {0, size // 3, size // 2, size - 1}:
            os.pwrite(out.fileno(), b"x", offset)
        assert dirty_pages(out.fileno()) > 0
        with closing(open_local(str(path), cache="host", writable=True, claim=False)) as endpoint:
            begin_writeback(Leg("source", endpoint, None))
            assert dirty_pages(out.fileno()) == 0


def test_write_back_is_begun_of_what_an_application_writes_meanwhile(tmp_path: Path) -> None:
    """Where the first pass was so long that much can have been written."""
    path = tmp_path / "leg"
    path.touch()
    os.truncate(path, 100 * MIB)
    with closing(open_local(str(path), cache="host", writable=True, claim=False)) as endpoint:
        leg = LegWrittenMeanwhile("source", endpoint, None)
        leg.work_s = 0.001
        begin_writeback(leg)
        assert leg.written and dirty_pages(endpoint.medium().fd) == 0


@pytest.mark.parametrize(("work_s", "steps_max"), [(0.0, STEPS), (0.001, STEPS_MAX)], ids=["idle", "busy"])
def test_write_back_is_begun_in_few_steps(tmp_path: Path, work_s: float, steps_max: int) -> None:
    """However large the leg, and however much of it is dirty."""
    path = tmp_path / "leg"
    path.touch()
    os.truncate(path, 1 << 40)
    with closing(open_local(str(path), cache="host", writable=True, claim=False)) as endpoint:
        leg = LegThatCounts("source", endpoint, None)
        leg.work_s = work_s
        begin_writeback(leg)
    assert 1 < leg.steps <= steps_max
