"""A member's start, death and link: clients wait for it, the lock proves its death, a lost agent loses nothing."""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from shadowvol.core.geometry import MIB, Geometry
from shadowvol.core.messages import LogZones, UnlogZones
from shadowvol.nbd.serve import LOCK_HELD_EXIT, member_argv
from tests.support.nbd_member import NbdMember, leg_record, nbd_member, sparse_file
from tests.support.poll import wait_for

SIZE = 64 * MIB


@pytest.fixture
def legs(tmp_path: Path) -> tuple[Path, Path]:
    return sparse_file(tmp_path / "source", SIZE), sparse_file(tmp_path / "target", SIZE)


def test_a_client_that_came_too_early_waits(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    member = NbdMember(tmp_path, leg_record(legs[0]), None, Geometry.of(SIZE, MIB))
    try:
        early = subprocess.Popen(["nbdinfo", "--size", member.uri], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            early.wait(0.3)
        member.start()
        output, _ = early.communicate(timeout=20)
        assert output.strip() == str(SIZE)
    finally:
        member.close()


def test_after_kill_9_the_next_incarnation_serves_on_the_same_socket(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"k" * 4096, 0)
        member.kill()
        with pytest.raises(nbd.Error):
            client.read(4096, 0)
        member.start()
        member.leader.join("copying")
        again = member.client()
        assert again.read(4096, 0) == b"k" * 4096
        again.write(b"l" * 4096, 0)
        assert [hello["incarnation"] for hello in member.leader.hellos] == [1, 2]
        assert legs[0].read_bytes()[:4096] == legs[1].read_bytes()[:4096] == b"l" * 4096
        again.close()


def test_a_second_member_is_refused_while_the_first_lives(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0])) as member:
        listen_fd = member.listener.fileno()
        argv = member_argv(listen_fd=listen_fd, lock_path=str(member.lock_path), spec=member.spec())
        second = subprocess.run(argv, pass_fds=(listen_fd,), capture_output=True, text=True, timeout=20, check=False)
        assert second.returncode == LOCK_HELD_EXIT
        assert len(second.stderr.splitlines()) == 1
        assert "held" in second.stderr


def test_a_member_is_not_started_for_an_agent_that_has_ended(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    """The next agent may listen at another socket by now, whose clients would wait for ever."""
    member = NbdMember(tmp_path, leg_record(legs[0]), None, Geometry.of(SIZE, MIB))
    try:
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        listen_fd = member.listener.fileno()
        argv = member_argv(listen_fd=listen_fd, lock_path=str(member.lock_path), spec=member.spec())
        argv[argv.index("--starter") + 1] = str(ended.pid)
        late = subprocess.run(argv, pass_fds=(listen_fd,), capture_output=True, text=True, timeout=20, check=False)
        assert late.returncode == 1 and len(late.stderr.splitlines()) == 1
        assert "the agent that started this member has ended" in late.stderr
        member.start()
        assert member.client().nbd.get_size() == SIZE
    finally:
        member.close()


def test_hello_hands_over_the_listening_socket(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    """A new agent gets the socket back from the living member, and clients can still come through it."""
    with nbd_member(tmp_path, leg_record(legs[0])) as member:
        assert member.process is not None
        assert member.leader.hellos[0]["pid"] == member.process.pid
        (descriptor,) = member.leader.listening_fds
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            assert listener.getsockname() == str(member.socket_path)
        member.leader.vanish()
        member.leader.listen()
        wait_for(lambda: len(member.leader.listening_fds) == 2, 10, "the second hello")


def test_settled_io_needs_no_agent(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"1" * 4096, 0)  # the zone is in the log from here on
        member.leader.vanish()
        client.write(b"2" * 4096, 0)
        assert client.read(4096, 0) == b"2" * 4096
        client.nbd.flush()
        client.close()


def test_asks_are_repeated_to_the_next_agent(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        leader = member.leader
        client = member.client()
        leader.reply_to.discard(LogZones)
        cookie = client.start_write(b"z" * 4096, 0)
        wait_for(lambda: leader.asked(LogZones), 10, "the ask")
        leader.vanish()
        leader.reply_to.add(LogZones)
        leader.listen()
        client.wait(cookie)
        first, second = (ask for ask in leader.asks if isinstance(ask.want, LogZones))
        assert first == second, "the same ask, not another one"
        client.close()


def test_an_ask_made_without_an_agent_is_sent_to_the_next_one(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        client = member.client()
        member.leader.vanish()
        cookie = client.start_write(b"z" * 4096, 0)
        assert client.read(4096, 0) == bytes(4096)
        assert not client.done(cookie)
        member.leader.listen()
        client.wait(cookie)
        client.close()


def test_nonsense_from_the_agent_costs_the_link_only(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0])) as member:
        client = member.client()
        for nonsense in ({"type": "Request"}, {"type": "Answer"}, {"type": "Gibberish"}, {}):
            hellos = len(member.leader.hellos)

            def said_hello(before: int = hellos) -> bool:
                return len(member.leader.hellos) > before

            with suppress(BrokenPipeError):  # the member may have hung up before send_frame returns
                member.leader.send_frame(nonsense)
            wait_for(said_hello, 10, "the next hello")
        client.write(b"x" * 512, 0)
        assert client.read(512, 0) == b"x" * 512
        assert member.process is not None and member.process.poll() is None
        client.close()


def test_down_flushes_empties_the_log_and_refuses_new_clients(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0]), leg_record(legs[1]), phase="copying", target_ok=True) as member:
        client = member.client()
        client.write(b"d" * 4096, 0)
        client.close()
        member.leader.latest_stats(lambda stats: stats["clients"] == 0 and stats["engine"]["zones_logged"] == 1)
        member.leader.send_frame({"type": "Down"})
        wait_for(lambda: member.leader.downs, 2.5, "DownReady, sooner than a zone gets idle by itself")
        assert member.leader.downs == [{"type": "DownReady", "clean": True}]
        assert member.leader.asked(UnlogZones)[0].zones == [(0, 1)]
        with pytest.raises(nbd.Error):
            member.client()


def test_down_in_setup_is_ready_at_once(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    with nbd_member(tmp_path, leg_record(legs[0])) as member:
        member.leader.send_frame({"type": "Down"})
        wait_for(lambda: member.leader.downs == [{"type": "DownReady", "clean": True}], 5, "DownReady")


def test_a_bad_spec_ends_the_start_with_a_reason(tmp_path: Path, legs: tuple[Path, Path]) -> None:
    member = NbdMember(tmp_path, leg_record(legs[0]), None, Geometry.of(SIZE, MIB))
    try:
        argv = member_argv(listen_fd=member.listener.fileno(), lock_path=str(member.lock_path), spec={"volume": "v"})
        done = subprocess.run(
            argv, pass_fds=(member.listener.fileno(),), capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode not in (0, LOCK_HELD_EXIT)
        assert "spec" in done.stderr
    finally:
        member.close()
