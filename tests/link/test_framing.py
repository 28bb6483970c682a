"""Frames on the link: what is encoded is decoded, however the bytes are cut; descriptors stay with their frame."""

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from shadowvol.link.framing import (
    BLOB_BYTES_MAX,
    FDS_MAX,
    JSON_BYTES_MAX,
    Decoder,
    Frame,
    FramingError,
    close_all,
    encode,
    receive_frame,
    send_frame,
)
from shadowvol.link.outbox import UNSENT_MAX
from shadowvol.link.triolink import TrioLink

DEADLINE_S = 20

messages = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)
frames = st.builds(Frame, messages, st.binary(max_size=40))


def raw(text: bytes, blob: bytes = b"") -> bytes:
    return struct.pack(">II", len(text), len(blob)) + text + blob


# ---- without I/O ----


@given(st.lists(frames, max_size=5), st.data())
def test_frames_survive_any_cut_of_the_stream(sent: list[Frame], data: st.DataObject) -> None:
    """Fed in pieces of any size, the decoder gives the frames that were encoded, in order, each as early as it can."""
    stream = b"".join(encode(frame.message, frame.blob) for frame in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10).map(sorted))
    decoder = Decoder()
    received: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:end])
        complete = 0
        while complete < len(sent) and sum(len(encode(f.message, f.blob)) for f in sent[: complete + 1]) <= end:
            complete += 1
        assert received == sent[:complete]
    assert received == sent
    assert not decoder.inside_frame


@given(frames)
def test_wanted_bytes_never_reach_beyond_the_frame(frame: Frame) -> None:
    """Feeding exactly what is wanted consumes exactly one frame, in at most two steps."""
    stream = encode(frame.message, frame.blob) + encode({"next": 1})
    decoder = Decoder()
    position, received = 0, []
    for _ in range(2):
        piece = stream[position : position + decoder.wanted_bytes]
        position += len(piece)
        received += decoder.feed(piece)
    assert received == [frame]
    assert stream[position:] == encode({"next": 1})


def test_the_wire_format() -> None:
    """Both ends may be of different versions for a moment during an upgrade, so the bytes are fixed."""
    assert encode({"verb": "ö"}, b"\x00\xff") == bytes.fromhex("0000000d 00000002") + b'{"verb":"\xc3\xb6"}\x00\xff'


def test_the_largest_frame_is_decoded_in_pieces() -> None:
    blob = os.urandom(1 << 20) * (BLOB_BYTES_MAX >> 20)
    message = {"padding": "x" * (JSON_BYTES_MAX - len('{"padding":""}'))}
    stream = memoryview(encode(message, blob))
    decoder = Decoder()
    received = [frame for at in range(0, len(stream), 1 << 20) for frame in decoder.feed(stream[at : at + (1 << 20)])]
    assert received == [Frame(message, blob)]


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (struct.pack(">II", JSON_BYTES_MAX + 1, 0), "message of 16777217 bytes; at most 16777216"),
        (struct.pack(">II", 2, BLOB_BYTES_MAX + 1), "blob of 67108865 bytes; at most 67108864"),
        (raw(b""), "message is not JSON"),
        (raw(b"{'a': 1}"), "message is not JSON"),
        (raw(b'{"a": "\xff"}'), "message is not JSON"),
        (raw(b"[" * 100_000), "message is not JSON"),
        (raw(b"[1]"), "message is a list, not an object"),
        (raw(b"null"), "message is a NoneType, not an object"),
        (b"GET / HTTP/1.1\r\n\r\n", "message of 1195725856 bytes"),
    ],
)
def test_what_is_no_frame_breaks_the_decoder(stream: bytes, complaint: str) -> None:
    """At the first byte that shows it (a header that is too large: before any of its content), and for good."""
    decoder = Decoder()
    with pytest.raises(FramingError, match=complaint):
        decoder.feed(stream)
    with pytest.raises(FramingError, match=complaint):
        decoder.feed(encode({}))


@pytest.mark.parametrize(
    ("message", "blob", "complaint"),
    [
        ({"a": "x" * JSON_BYTES_MAX}, b"", "message of 16777224 bytes"),
        ({}, bytes(BLOB_BYTES_MAX + 1), "blob of 67108865 bytes"),
        ({"a": float("nan")}, b"", "cannot be sent as JSON"),
        ({"a": b"bytes"}, b"", "cannot be sent as JSON"),
        ({"a": "\ud800"}, b"", "cannot be sent as JSON"),
        ([1], b"", "message is a list, not an object"),
    ],
    ids=["large-json", "large-blob", "nan", "bytes", "surrogate", "list"],
)
def test_what_cannot_be_a_frame_is_not_encoded(message: Any, blob: bytes, complaint: str) -> None:
    with pytest.raises(FramingError, match=complaint):
        encode(message, blob)


# ---- over sockets ----


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(DEADLINE_S)
    theirs.settimeout(DEADLINE_S)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


class Files:
    """Open files to be sent; each can be recognised when it arrives."""

    def __init__(self, count: int) -> None:
        self.fds = [os.memfd_create(f"file {index}") for index in range(count)]

    @staticmethod
    def identity(fd: int) -> tuple[int, int]:
        return os.fstat(fd).st_dev, os.fstat(fd).st_ino

    def indices(self, received: list[int]) -> list[int]:
        """Which of ours arrived; closes them."""
        ours = [self.identity(fd) for fd in self.fds]
        found = [ours.index(self.identity(fd)) for fd in received]
        close_all(received)
        return found


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files(FDS_MAX)
    open_before = open_fd_count()
    yield files
    assert open_fd_count() <= open_before, "descriptors were left open"
    close_all(files.fds)


def open_fd_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_blocking_ends_exchange_frames(pair: Pair) -> None:
    send_frame(pair[0], {"verb": "open"}, b"blob")
    send_frame(pair[1], {"answer": [1, 2]})
    assert receive_frame(pair[1]) == (Frame({"verb": "open"}, b"blob"), [])
    assert receive_frame(pair[0]) == (Frame({"answer": [1, 2]}), [])


def test_a_frame_larger_than_the_socket_buffer(pair: Pair, files: Files) -> None:
    """The kernel takes it in many pieces; the descriptors come once."""
    blob = os.urandom(8 << 20)
    sender = in_thread(lambda: send_frame(pair[0], {"large": True}, blob, files.fds[:2]))
    frame, fds = receive_frame(pair[1])
    sender.join()
    assert frame == Frame({"large": True}, blob)
    assert files.indices(fds) == [0, 1]


def test_descriptors_stay_with_their_frame(pair: Pair, files: Files) -> None:
    """Frames that wait in the socket together, with and without descriptors, are received one by one."""
    counts = [0, 2, 0, 0, 1, 3, 0, FDS_MAX, 1, 0]
    for index, count in enumerate(counts):
        send_frame(pair[0], {"index": index}, bytes(index * 7), files.fds[:count])
    for index, count in enumerate(counts):
        frame, fds = receive_frame(pair[1])
        assert frame == Frame({"index": index}, bytes(index * 7))
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
        assert files.indices(fds) == list(range(count))


def test_descriptors_arrive_with_a_frame_that_trickles_in(pair: Pair, files: Files) -> None:
    """The first byte carries them, wherever the sender's kernel cuts the rest."""
    stream = encode({"slow": 1}, b"blob")
    frames: list[tuple[Frame, list[int]]] = []
    receiver = in_thread(lambda: frames.append(receive_frame(pair[1])))
    socket.send_fds(pair[0], [stream[:1]], files.fds[:2])
    for byte in stream[1:]:
        pair[0].send(bytes([byte]))
    receiver.join()
    assert frames[0][0] == Frame({"slow": 1}, b"blob")
    assert files.indices(frames[0][1]) == [0, 1]


def test_the_end_of_the_stream(pair: Pair, files: Files) -> None:
    """Between frames it is the end; inside a frame it is an error, and descriptors that came are closed."""
    send_frame(pair[0], {})
    socket.send_fds(pair[0], [encode({"cut": 1})[:-1]], files.fds[:2])
    pair[0].shutdown(socket.SHUT_WR)
    assert receive_frame(pair[1]) == (Frame({}), [])
    with pytest.raises(FramingError, match="in the middle of a frame"):
        receive_frame(pair[1])
    with pytest.raises(EOFError):
        receive_frame(pair[1])


def test_descriptors_of_a_bad_frame_are_closed(pair: Pair, files: Files) -> None:
    socket.send_fds(pair[0], [raw(b"[]")], files.fds)
    with pytest.raises(FramingError, match="not an object"):
        receive_frame(pair[1])


def test_too_many_descriptors_are_refused_at_both_ends(pair: Pair, files: Files) -> None:
    too_many = files.fds + files.fds[:1]
    with pytest.raises(FramingError, match="17 descriptors; at most 16"):
        send_frame(pair[0], {}, fds=too_many)
    socket.send_fds(pair[0], [encode({})], too_many)
    with pytest.raises(FramingError, match="more than 16 descriptors"):
        receive_frame(pair[1])


def test_too_many_descriptors_in_pieces_are_refused(pair: Pair, files: Files) -> None:
    """Also when each piece of the frame brings only some."""
    stream = encode({})
    for index in range(3):
        socket.send_fds(pair[0], [stream[index : index + 1]], files.fds[:7])
    with pytest.raises(FramingError, match="more than 16 descriptors"):
        receive_frame(pair[1])


# ---- the trio end ----


def links(pair: Pair) -> tuple[TrioLink, TrioLink]:
    return TrioLink(trio.socket.from_stdlib_socket(pair[0])), TrioLink(trio.socket.from_stdlib_socket(pair[1]))


async def test_trio_link_talks_to_a_blocking_end(files: Files) -> None:
    """As the agent (trio) and the member (threads) do, descriptors in both directions."""
    ours, theirs = socket.socketpair()
    link = TrioLink(trio.socket.from_stdlib_socket(ours))

    def member() -> None:
        frame, fds = receive_frame(theirs)
        send_frame(theirs, {"back": frame.message}, frame.blob, fds)
        close_all(fds)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, member)
            nursery.start_soon(link.send_rest)
            blob = os.urandom(4 << 20)
            link.put({"there": 1}, blob, files.fds[:3])
            frame, fds = await link.receive()
            nursery.cancel_scope.cancel()
    assert frame == Frame({"back": {"there": 1}}, blob)
    assert files.indices(fds) == [0, 1, 2]
    link.close()
    theirs.close()


@pytest.mark.parametrize("piece_bytes", [7, 1 << 16], ids=["in pieces", "whole"])
async def test_trio_link_keeps_descriptors_with_coalesced_frames(
    files: Files, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read may end in the middle of a frame, and begin there: each frame has its own descriptors all the same."""
    monkeypatch.setattr("shadowvol.link.triolink.READ_BYTES", piece_bytes)
    sender, receiver = links(socket.socketpair())
    counts = [0, 2, 0, 0, 1, 3, 0]
    for index, count in enumerate(counts):
        sender.put({"index": index}, fds=files.fds[:count])
    sender.close()
    seen = []
    with trio.fail_after(DEADLINE_S):
        async for frame, fds in receiver:
            seen.append((frame.message["index"], files.indices(fds)))
    assert seen == [(index, list(range(count))) for index, count in enumerate(counts)]
    receiver.close()


async def test_frames_that_the_kernel_does_not_take_at_once_follow_in_order(files: Files) -> None:
    """Also when the task that sends them is cancelled in the middle of one, and another goes on."""
    sender, receiver = links(socket.socketpair())
    blobs = [os.urandom(500_000 + index) for index in range(8)]
    for index, blob in enumerate(blobs):
        sender.put({"index": index}, blob, files.fds[:index])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send_rest)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send_rest)
            for index, blob in enumerate(blobs):
                frame, fds = await receiver.receive()
                assert frame == Frame({"index": index}, blob)
                assert files.indices(fds) == list(range(index))
            nursery.cancel_scope.cancel()
    sender.close()
    receiver.close()


async def test_an_end_that_does_not_read_is_noticed() -> None:
    """There is a limit to what is queued for it; what was queued before arrives whole."""
    sender, receiver = links(socket.socketpair())
    sender.put({"index": 0}, bytes(1 << 20))  # more than the socket holds
    with pytest.raises(trio.WouldBlock):
        for _ in range(UNSENT_MAX + 1):
            sender.put({"small": 1})
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send_rest)
            frames = [(await receiver.receive())[0] for _ in range(UNSENT_MAX)]
            nursery.cancel_scope.cancel()
    assert frames[0] == Frame({"index": 0}, bytes(1 << 20))
    assert frames[1:] == [Frame({"small": 1})] * (UNSENT_MAX - 1)
    sender.close()
    receiver.close()


async def test_sending_to_an_end_that_is_gone_ends_quietly() -> None:
    """Who receives is told."""
    sender, receiver = links(socket.socketpair())
    receiver.close()
    sender.put({"nobody": 1})
    with trio.fail_after(DEADLINE_S):
        await sender.send_rest()
        with pytest.raises(EOFError):
            await sender.receive()
    sender.close()
    with pytest.raises(trio.ClosedResourceError):
        await sender.receive()


async def test_a_cancelled_receive_loses_nothing(files: Files) -> None:
    """Cancelled after part of a frame and its descriptors have come, it goes on with the rest."""
    ours, theirs = socket.socketpair()
    link = TrioLink(trio.socket.from_stdlib_socket(theirs))
    stream = encode({"slow": 1}, b"blob")
    with ours:
        first = stream[:3]
        for piece in (first, stream[3:12], stream[12:-1]):
            socket.send_fds(ours, [piece], files.fds[:1] if piece is first else [])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.receive)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
        ours.send(stream[-1:])
        frame, fds = await link.receive()
    assert frame == Frame({"slow": 1}, b"blob")
    assert files.indices(fds) == [0]
    link.close()


async def test_a_refused_frame_leaves_the_link_whole() -> None:
    sender, receiver = links(socket.socketpair())
    with pytest.raises(FramingError):
        sender.put({"a": float("inf")})
    with pytest.raises(FramingError):
        sender.put({}, fds=[0] * (FDS_MAX + 1))
    sender.put({"fine": 1})
    assert (await receiver.receive())[0] == Frame({"fine": 1})
    sender.close()
    receiver.close()


async def test_only_one_task_receives_and_close_wakes_it() -> None:
    sender, receiver = links(socket.socketpair())
    closed = trio.Event()

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await receiver.receive()
        closed.set()

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await receiver.receive()
            receiver.close()
            await closed.wait()
    sender.close()


async def test_closing_a_link_closes_descriptors_not_yet_delivered(files: Files) -> None:
    ours, theirs = socket.socketpair()
    link = TrioLink(trio.socket.from_stdlib_socket(theirs))
    socket.send_fds(ours, [encode({"cut": 1})[:5]], files.fds[:3])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.receive)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    link.close()
    ours.close()
