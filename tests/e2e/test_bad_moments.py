"""Good commands at bad moments: two at once, killed, after a crash, in quick succession, with a clock that is set back.

Each test keeps how its commands ended for the table of exit codes (tests/e2e/conftest.py).
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbd
import pytest

from shadowvol.agent import client
from shadowvol.agent.paths import Home
from tests.support.endings import Ended, Keep, run
from tests.support.load import VERIFIED_MIX, Fio, KeepingClient
from tests.support.poll import wait_for
from tests.support.product import COMMAND, MIB, Product, Volume, make_source

SIZE_BYTES = 32 * MIB
SEED = 4711
ROUNDS = 3  # of two commands at once, each
RAPID_ORDERS = 1000
SWITCHES = 60
HOUR_S = 3600


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """Up, in setup."""
    return Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")


def command(product: Product, words: str) -> Ended:
    return run(product.home, words.split())


def order(product: Product, verb: str, name: str = "v", **options: Any) -> client.Result:
    """What the command line asks of the agent, without its start-up time."""
    return client.call(Home(product.home), verb, name, options, 60)


def write(uri: str, offset: int, data: bytes) -> None:
    connection = nbd.NBD()
    connection.connect_uri(uri)
    connection.pwrite(data, offset)
    connection.flush()
    connection.shutdown()


# ---------------------------------------------------------------- two at once


def at_once(product: Product, *lines: str) -> list[Ended]:
    """All of them at the same time."""
    ended: list[Ended | None] = [None] * len(lines)

    def one(index: int) -> None:
        ended[index] = command(product, lines[index])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for each in ended if each is not None]


def kept(keep: Keep, name: str, endings: Sequence[Ended]) -> list[int]:
    """The exit codes, in order of the commands; each refusal has its line."""
    for each in endings:
        keep(name, each.shown, each.code, each.line)
        if each.code:
            each.assert_refused(each.code, ())
    return [each.code for each in endings]


def test_two_creates_at_once(product: Product, legs: Path, keep: Keep) -> None:
    """One of them: by name, and by leg. What the other one provisioned is gone."""
    source, other = make_source(legs / "source", MIB), make_source(legs / "other", MIB)
    for number in range(ROUNDS):
        same_name = (f"--source {source} --target {legs}/t1", f"--source {other} --target {legs}/t2")
        codes = kept(keep, "two creates, one name", at_once(product, *(f"create v {o} --provision" for o in same_name)))
        assert sorted(codes) == [0, 2], codes
        assert (legs / "t1").exists() is (codes[0] == 0) and (legs / "t2").exists() is (codes[1] == 0)
        product.run("delete", "v")
        for target in legs.glob("t?"):
            target.unlink()
        one_leg = [f"create {name}{number} --source {source} --target {legs}/{name} --provision" for name in "xy"]
        codes = kept(keep, "two creates, one source", at_once(product, *one_leg))
        assert sorted(codes) == [0, 2], codes
        product.run("delete", f"{'xy'[codes.index(0)]}{number}")
        (legs / "xy"[codes.index(0)]).unlink()
        assert sorted(path.name for path in legs.iterdir()) == ["other", "source"]


def test_two_ups_at_once_start_one_agent(product: Product, legs: Path, keep: Keep) -> None:
    volume = Volume.make(product, make_source(legs / "source", MIB), legs / "target")
    for _ in range(ROUNDS):
        product.end()
        both = at_once(product, "up v", "up v", "up")
        assert kept(keep, "up, up, up", both) == [0, 0, 0]
        assert {each.out.strip() for each in both} == {volume.uri}
    log = (product.home / "agent.log").read_text()
    assert log.count("agent is ready") == 1 + ROUNDS


PAIRS: list[tuple[str, tuple[str, ...], tuple[str, str], set[tuple[int, int]]]] = [
    # name, to get there, at once, allowed exit codes
    ("start, start", (), ("start v", "start v"), {(0, 3), (3, 0)}),
    ("cutover, cutover", ("wait v --for synced",), ("cutover v", "cutover v"), {(0, 3), (3, 0)}),
    ("undo, undo", (), ("undo v", "undo v"), {(0, 3), (3, 0)}),
    ("cutover, undo", (), ("cutover v", "undo v"), {(0, 0), (0, 3)}),
    ("up, down", (), ("up v", "down v"), {(0, 0)}),
    ("pause, resume", ("up v",), ("pause v", "resume v"), {(0, 0)}),
    ("abort, cutover", ("resume v",), ("abort v", "cutover v --early"), {(0, 0), (0, 3)}),
    ("retarget, start", ("wait v --for setup",), ("retarget v --target {other}", "start v"), {(0, 0), (3, 0)}),
    ("down, cutover", ("wait v --for synced",), ("down v", "cutover v"), {(0, 0), (0, 3), (0, 1)}),
    ("commit, abort", ("up v", "cutover v --or-is-done"), ("commit v", "abort v"), {(0, 3), (3, 0)}),
]


def test_two_verbs_at_once(volume: Volume, legs: Path, keep: Keep) -> None:
    """One after the other, in some order: whoever comes second is done or refused by what the first has made of it."""
    product = volume.product
    make_source(legs / "other", SIZE_BYTES, 0)
    for _ in range(ROUNDS):
        for name, before, lines, allowed in PAIRS:
            for verb in before:
                if verb.endswith(" --or-is-done"):
                    command(product, verb.removesuffix(" --or-is-done"))
                else:
                    product.run(*verb.split())
            codes = kept(keep, name, at_once(product, *(line.format(other=legs / "other") for line in lines)))
            assert tuple(codes) in allowed, (name, codes, product.log())
        # From committed or setup, back to setup.
        if volume.phase[0] == "committed":
            product.run("down", "v")
            product.run("delete", "v")
            target = volume.target
            product.run("create", "v", "--source", str(volume.source), "--target", str(target))
            product.run("up", "v")
        assert volume.phase == ("setup", "source")


def test_up_and_delete_at_once(product: Product, legs: Path, keep: Keep) -> None:
    """Either it is up, or it is gone, with its processes and its files in the run directory."""
    make_source(legs / "source", MIB)
    make_source(legs / "target", MIB, 0)
    create = ("create", "v", "--source", str(legs / "source"), "--target", str(legs / "target"))
    product.run(*create)
    product.run("up", "v")
    product.run("down", "v")
    for _ in range(ROUNDS):
        codes = kept(keep, "up, delete", at_once(product, "up v", "delete v"))
        assert tuple(codes) in {(0, 3), (4, 0)}, (codes, product.log())
        if codes[1] == 0:
            run_files = {path.name for path in (product.home / "run").iterdir()}
            assert run_files == {"agent.lock", "agent.sock", "link.sock"}, (codes, run_files)
            product.run(*create)
        product.run("up", "v")
        write(product.uri("v"), 0, b"x" * 512)
        wait_for(lambda: product.status("v")["io"]["clients"] == 0, 20, "the client has left")
        product.run("down", "v")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_line_leaves_no_half_of_a_verb(volume: Volume, keep: Keep, number: signal.Signals) -> None:
    """Its verb is done or refused all the same."""
    product = volume.product
    volume.run("start")
    volume.wait_synced()
    for step in range(12):
        verb = ("cutover", "undo")[step % 2]
        # The verb of the command that was killed last may still be under way.
        wait_for(lambda: product.status("v")["io"]["change"] is None, 20, "the agent is done with the last verb")
        before = volume.phase
        process = subprocess.Popen([COMMAND, "--home", str(product.home), verb, "v"], stderr=subprocess.PIPE)
        try:
            process.wait(step * 0.02)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        assert process.wait(20) in (0, 1, 3, -number)
        assert process.stderr is not None
        process.stderr.close()
        assert volume.phase in (before, ("synced", "target" if verb == "cutover" else "source"))
    wanted = {"source": "cutover", "target": "undo"}[volume.phase[1]]
    volume.run(wanted)
    assert volume.phase[1] != {"cutover": "source", "undo": "target"}[wanted]


def test_ctrl_c_in_wait_says_that_things_go_on(volume: Volume, keep: Keep) -> None:
    volume.run("throttle", "--rate", "64KiB/s")
    volume.run("start")
    words = [COMMAND, "--home", str(volume.product.home), "wait", "v", "--for", "synced"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: _is_waiting(process.pid), 20, "the command waits")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    keep("Ctrl-C", "wait v --for synced", process.returncode, err.strip().removeprefix("shadowvol: "))
    assert (process.returncode, "Traceback" in err) == (1, False)
    assert err.startswith("shadowvol: interrupted") and "goes on" in err
    assert volume.phase == ("copying", "source")


def _is_waiting(pid: int) -> bool:
    """It is connected to the agent: one of its descriptors is a socket."""
    folder = Path(f"/proc/{pid}/fd")
    return any(os.readlink(entry).startswith("socket:") for entry in folder.iterdir())


# ---------------------------------------------------------------- after a crash


def test_stale_sockets_and_locks_are_in_nobodys_way(volume: Volume, keep: Keep) -> None:
    """As after a power failure: all that is left of agent and member are their files."""
    product = volume.product
    write(volume.uri, 0, b"before" + bytes(506))
    uri = volume.uri
    product.end()
    left = {path.name for path in (product.home / "run").iterdir()}
    assert {"agent.sock", "link.sock", "v.sock", "agent.lock", "v.lock"} <= left
    for line, code, words in (
        ("status v", 0, ""),
        ("start v", 1, "no agent is running on this host; start it: shadowvol up v"),
        ("delete v", 3, "volume v is up; shadowvol down v first"),
        ("up v", 0, ""),
    ):
        ended = command(product, line)
        keep("after a crash", line, ended.code, ended.line)
        assert ended.code == code and words in ended.line, ended
    assert volume.uri == uri
    write(uri, 512, b"after" + bytes(507))
    assert volume.source.read_bytes()[:517] == b"before" + bytes(506) + b"after"
    product.run("down", "v")
    product.run("delete", "v")
    assert {path.name for path in (product.home / "run").iterdir()} == {"agent.lock", "agent.sock", "link.sock"}


PROCESSES = ("agent", "member", "transfer")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_any_process_costs_no_acknowledged_write(
    product: Product, legs: Path, number: signal.Signals, keep: Keep
) -> None:
    """While copying and when synced, under clients that connect again: none of them is told an error."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    try:
        load.wait_acknowledged(20)
        volume.run("throttle", "--rate", "1MiB/s")
        volume.run("start")
        for process in PROCESSES:
            _signal(volume, process, number, keep)
            load.wait_acknowledged(20)
        assert volume.phase == ("copying", "source")
        volume.run("throttle", "--rate", "none")
        volume.wait_synced()
        for process in PROCESSES:
            _signal(volume, process, number, keep)
            load.wait_acknowledged(20)
    finally:
        load.stop()
    volume.wait_synced()
    assert load.reconnects > 0
    load.check_file(volume.source)
    load.check_file(volume.target)
    volume.assert_legs_equal()


def _signal(volume: Volume, process: str, number: signal.Signals, keep: Keep) -> None:
    pid = volume.product.pid(volume.name, process)
    os.kill(pid, number)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 20, f"{process} has ended")
    if process == "agent":
        ended = command(volume.product, "start v")
        keep(f"after {number.name}", "start v", ended.code, ended.line)
        ended.assert_refused(1, ("no agent is running",))
        volume.run("up")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# ---------------------------------------------------------------- in quick succession


def test_a_thousand_orders_in_quick_succession(volume: Volume, keep: Keep) -> None:
    """pause, resume and throttle from four sides while copying under load; the last word holds."""
    product = volume.product
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    orders: list[tuple[str, dict[str, Any]]] = [
        ("pause", {}),
        ("resume", {}),
        ("throttle", {"rate_bytes_per_s": MIB}),
        ("throttle", {"rate_bytes_per_s": 64 * MIB, "impact": "low"}),
        ("throttle", {"rate_bytes_per_s": None}),
    ]
    bad: list[client.Result] = []

    def give(start: int) -> None:
        for number in range(RAPID_ORDERS // 4):
            verb, options = orders[(start + number) % len(orders)]
            answer = order(product, verb, **options)
            if answer.code:
                bad.append(answer)

    try:
        volume.run("throttle", "--rate", "1MiB/s")
        volume.run("start")
        givers = [threading.Thread(target=give, args=(start,)) for start in range(4)]
        for giver in givers:
            giver.start()
        for giver in givers:
            giver.join()
        assert not bad, bad[:3]
        load.wait_acknowledged(20)
        volume.run("pause")
        assert volume.status()["paused"]
        volume.run("throttle", "--rate", "none", "--impact", "max")
        volume.run("resume")
        status = volume.wait_synced()
    finally:
        load.stop()
    keep(f"{RAPID_ORDERS} orders", "pause, resume, throttle", 0, f"then synced, {status['epoch']} leadership(s)")
    assert status["copy"]["throttle"].items() >= {"rate_bytes_per_s": None, "impact": "max"}.items()
    assert status["epoch"] == 1
    volume.wait_synced()
    load.check_file(volume.source)
    load.check_file(volume.target)
    volume.assert_legs_equal()


def test_cutover_and_undo_in_a_tight_loop_under_load(volume: Volume, legs: Path, keep: Keep) -> None:
    """Every switch is done, and fio, which verifies what it has written, sees nothing of them."""
    product = volume.product
    volume.run("start")
    volume.wait_synced()
    with Fio(legs, volume.uri, *VERIFIED_MIX) as fio:
        fio.wait_served(volume, 50)
        pauses = []
        for number in range(SWITCHES):
            answer = order(product, ("cutover", "undo")[number % 2])
            assert answer.code == 0, (number, answer)
            pauses.append(volume.status()["last_switch_pause_ms"])
            fio.assert_running()
        fio.wait_served(volume, 50)
    keep(f"{SWITCHES} switches under load", "cutover, undo", 0, f"longest pause {max(pauses):.1f} ms")
    volume.wait_synced()
    volume.assert_legs_equal()


# ---------------------------------------------------------------- the clock


def test_a_clock_set_back_by_hours_changes_nothing(product: Product, legs: Path, keep: Keep) -> None:
    """The time of day makes incarnations, and is shown; nothing else reads it (test_two_places_read_the_time_of_day).

    It goes 5 hours forward, 10 hours back while the agent runs, and with the next agent forward again to what it is.
    A member that starts afterwards still has a higher incarnation than the one whose place it takes.
    """
    source = make_source(legs / "source", SIZE_BYTES)
    product.run("create", "v", "--source", str(source), "--target", str(legs / "target"), "--provision")
    offset = legs / "offset"
    offset.write_text(str(5 * HOUR_S))
    volume = Volume(product, "v", source, legs / "target")
    agent = _agent_at(product, offset)
    try:
        wait_for(lambda: client.ping(Home(product.home)), 20, "the agent answers")
        volume.run("up")
        load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
        try:
            incarnations = [_incarnation(volume)]
            load.wait_acknowledged(20)
            volume.run("throttle", "--rate", "8MiB/s")
            volume.run("start")
            offset.write_text(str(-5 * HOUR_S))
            load.wait_acknowledged(20)
            product.kill("v", "member")
            load.wait_acknowledged(20)
            incarnations.append(_incarnation(volume))
            ended = command(product, "wait v --for synced --timeout 0.1")
            keep("clock 10 hours back", ended.shown, ended.code, ended.line)
            assert ended.code in (0, 5), ended
            volume.run("throttle", "--rate", "none")
            volume.wait_synced()
            for verb in ("cutover", "undo"):
                ended = command(product, f"{verb} v")
                keep("clock 10 hours back", ended.shown, ended.code, ended.line)
                assert ended.code == 0 and 0 <= volume.status()["last_switch_pause_ms"] < 5000, ended
            product.kill("v", "agent")
            volume.run("up")
            product.kill("v", "member")
            load.wait_acknowledged(20)
            incarnations.append(_incarnation(volume))
        finally:
            load.stop()
        assert incarnations == sorted(set(incarnations)), incarnations
        volume.wait_synced()
        load.check_file(volume.source)
        load.check_file(volume.target)
        volume.run("down")
        volume.run("up")
        assert _incarnation(volume) not in incarnations
    finally:
        product.end()
        agent.wait(20)


def _agent_at(product: Product, offset: Path) -> "subprocess.Popen[bytes]":
    """An agent whose time of day is off by so many seconds as the file says."""
    words = [sys.executable, "-m", "tests.support.shadowvol_at", str(offset), "--home", str(product.home)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _incarnation(volume: Volume) -> int:
    (member,) = volume.status()["members"]
    return int(member["incarnation"])
