"""The pure and small parts of the transfer process: framing, rate limit, comparing memory, planning."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shadowvol.endpoints.local import open_local
from shadowvol.transfer.legs import Leg, LegError
from shadowvol.transfer.memory import BLOCK_BYTES, Buffer, differing_runs, zero_runs
from shadowvol.transfer.pagecache import CHUNK_BYTES, CachedBefore
from shadowvol.transfer.plan import PieceKind, Planner, probe_end
from shadowvol.transfer.throttle import PIECE_BYTES_MAX, PIECE_BYTES_MIN, RateLimit
from shadowvol.transfer.wire import LINE_BYTES_MAX, LineBuffer, WireError, encode

MIB = 1 << 20
TIB = 1 << 40


# --- wire ------------------------------------------------------------------------------------------------------------


def test_messages_survive_any_cut_of_the_stream() -> None:
    """Byte by byte or all at once, the same messages come out, in order."""
    messages: list[dict[str, Any]] = [{"cmd": "copy", "ranges": [[0, 1], [5, 6]]}, {"text": "zwölf\nzeilen"}, {}]
    stream = b"".join(encode(message) for message in messages)
    for step in (1, 2, 7, len(stream)):
        buffer = LineBuffer()
        got = [out for start in range(0, len(stream), step) for out in buffer.feed(stream[start : start + step])]
        assert got == messages


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"\xff\n", b"x" * (LINE_BYTES_MAX + 1)])
def test_a_broken_stream_is_an_error(line: bytes) -> None:
    """Not JSON, not an object, not UTF-8, or without an end."""
    with pytest.raises(WireError):
        LineBuffer().feed(line)


def test_a_message_too_long_for_the_other_end_is_not_sent() -> None:
    """The sender notices, not the receiver."""
    with pytest.raises(WireError):
        encode({"x": "y" * LINE_BYTES_MAX})


# --- rate limit ------------------------------------------------------------------------------------------------------


def test_the_rate_holds_over_time() -> None:
    """Ten simulated seconds: never more than rate x time + one piece, never less than that minus one piece."""
    for rate in (100_000, 10 * MIB, 500 * MIB):
        limit, now, sent = RateLimit(0.0), 0.0, 0
        limit.set_rate(rate, now)
        while now < 10:
            delay = limit.delay_s(now)
            now += delay
            if delay == 0:
                sent += limit.piece_bytes()
                limit.charge(limit.piece_bytes())
            assert sent <= rate * now + PIECE_BYTES_MAX + rate * 0.05
        assert sent >= rate * 10 - PIECE_BYTES_MAX


def test_no_rate_is_no_limit_and_low_rates_have_small_pieces() -> None:
    """Smoothness: a piece is at most 50 ms worth of the rate, within its bounds."""
    limit = RateLimit(0.0)
    limit.charge(1 << 50)
    assert (limit.delay_s(0.0), limit.piece_bytes()) == (0.0, PIECE_BYTES_MAX)
    limit.set_rate(10 * MIB, 0.0)
    assert limit.piece_bytes() == 512 * 1024
    limit.set_rate(1000, 0.0)
    assert limit.piece_bytes() == PIECE_BYTES_MIN


def test_a_new_rate_does_not_wait_for_an_old_debt() -> None:
    """From 1 KB/s to 100 MB/s takes effect at once."""
    limit = RateLimit(0.0)
    limit.set_rate(1000, 0.0)
    limit.charge(PIECE_BYTES_MAX)
    assert limit.delay_s(0.0) > 1000
    limit.set_rate(100 * MIB, 0.0)
    assert limit.delay_s(0.0) == 0


def test_a_rate_of_nothing_is_refused() -> None:
    """Stopping is what pause is for."""
    for rate in (0, -1):
        with pytest.raises(ValueError):
            RateLimit(0.0).set_rate(rate, 0.0)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_zero_and_differing_runs_are_found_by_block() -> None:
    """Also in a short last block; one byte is enough to make a block data, or different."""
    one, other, length = Buffer(), Buffer(), 5 * BLOCK_BYTES + 100
    assert zero_runs(one, length) == [(0, length)]
    assert differing_runs(one, other, length) == []
    one.view[BLOCK_BYTES - 1] = 1
    one.view[4 * BLOCK_BYTES] = 1
    assert zero_runs(one, length) == [(BLOCK_BYTES, 4 * BLOCK_BYTES), (5 * BLOCK_BYTES, length)]
    assert differing_runs(one, other, length) == [(0, BLOCK_BYTES), (4 * BLOCK_BYTES, 5 * BLOCK_BYTES)]
    one.view[length - 1] = 1
    assert differing_runs(one, other, length)[-1] == (4 * BLOCK_BYTES, length)
    one.view[length] = 1
    assert differing_runs(one, other, length)[-1] == (4 * BLOCK_BYTES, length), "beyond the piece nothing counts"


# --- the page cache --------------------------------------------------------------------------------------------------


def test_pages_that_were_not_there_are_told_across_chunks() -> None:
    """As they were when the job began, or a chunk before the reading: what is brought in since does not count."""
    page, end = mmap.PAGESIZE, 2 * CHUNK_BYTES + 100
    there = {0, 1, CHUNK_BYTES // page}
    looked: list[int] = []

    def resident(offset: int, length: int) -> bytes:
        looked.append(offset)
        return bytes(number in there for number in range(offset // page, -(-(offset + length) // page)))

    before = CachedBefore(resident, 0, end)
    assert looked == [0], "the first chunk before anything is read"
    assert before.absent(0, 4 * page) == [(2 * page, 2 * page)]
    assert looked == [0, CHUNK_BYTES], "one ahead"
    there.update(range(2 * CHUNK_BYTES // page))
    edge = CHUNK_BYTES - page
    assert before.absent(edge, 3 * page) == [(edge, page), (CHUNK_BYTES + page, page)]
    assert before.absent(2 * CHUNK_BYTES, 100) == [(2 * CHUNK_BYTES, page)], "the last page, in part"
    assert looked == [0, CHUNK_BYTES, 2 * CHUNK_BYTES], "each chunk once, none beyond the end"


def test_where_the_page_cache_cannot_be_seen_nothing_is_dropped() -> None:
    def refuses(offset: int, length: int) -> bytes:
        raise OSError(errno.ENODEV, "no mmap here")

    assert CachedBefore(refuses, 0, MIB).absent(0, MIB) == []


# --- planning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def legs(tmp_path: Path) -> Iterator[tuple[Leg, Leg]]:
    """Two sparse files of 1 TiB."""
    opened = []
    for name in ("source", "target"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, TIB)
        endpoint = open_local(str(tmp_path / name), cache="host", writable=True, claim=False)
        opened.append(Leg(name, endpoint, None))
    yield opened[0], opened[1]
    for leg in opened:
        leg.close()


def pieces(
    source: Leg, target: Leg, ranges: list[tuple[int, int]], piece_bytes: int = MIB
) -> list[tuple[str, int, int]]:
    planner = Planner(source, target, ranges)
    found: list[tuple[str, int, int]] = []
    while (piece := planner.next_piece(lambda: piece_bytes, may_zero_far=True)) is not None:
        assert piece.index == len(found)
        found.append((piece.kind.value, piece.offset, piece.length))
    return found


def test_a_terabyte_of_hole_is_a_few_pieces(legs: tuple[Leg, Leg]) -> None:
    """Steps get longer while there is nothing to see."""
    found = pieces(*legs, [(0, TIB)])
    assert {kind for kind, _, _ in found} == {"skip"} and len(found) < 50
    assert sum(length for _, _, length in found) == TIB


def test_data_holes_and_data_under_holes_are_told_apart(legs: tuple[Leg, Leg]) -> None:
    """In the order of the ranges, exactly covering them; data cut to size."""
    source, target = legs
    source.endpoint.pwrite(b"x" * (2 * MIB), 10 * MIB)
    target.endpoint.pwrite(b"y" * MIB, 20 * MIB)
    assert pieces(source, target, [(9 * MIB, 2 * MIB), (20 * MIB, 2 * MIB), (10 * MIB + 512, MIB), (0, 0)]) == [
        ("skip", 9 * MIB, MIB),
        ("data", 10 * MIB, MIB),
        ("zero", 20 * MIB, MIB),
        ("skip", 21 * MIB, MIB),
        ("data", 10 * MIB + 512, MIB),
    ]


def test_a_failed_step_can_be_taken_again(legs: tuple[Leg, Leg], tmp_path: Path) -> None:
    """A range beyond the end fails, naming the leg, and the plan stands where it stood."""
    source, target = legs
    planner = Planner(source, target, [(TIB - MIB, 2 * MIB)])
    for _ in range(2):
        with pytest.raises(LegError) as caught:
            planner.next_piece(lambda: MIB, may_zero_far=True)
        assert caught.value.leg == "source"
    assert PieceKind("data") is PieceKind.DATA


def test_probe_counts_data_and_takes_holes_along(legs: tuple[Leg, Leg]) -> None:
    """It stops after `budget` bytes of data; a hole that follows comes along; with no data it goes to the end."""
    source, _ = legs
    assert probe_end(source, 0, TIB, 64 * MIB) == TIB
    for gib in (100, 500, 900):
        source.endpoint.pwrite(b"x" * MIB, gib << 30)
    assert probe_end(source, 0, TIB, 64 * MIB) == TIB
    assert probe_end(source, 0, TIB, 2 * MIB) == 900 << 30
    assert probe_end(source, 0, TIB, MIB + MIB // 2) == (500 << 30) + MIB // 2
    assert probe_end(source, 0, 50 << 30, MIB) == 50 << 30
    assert probe_end(source, 100 << 30, MIB, 10 * MIB) == (100 << 30) + MIB
