"""Verbs while a member is dead, stopped or not back yet, or an agent has only just started: done, or told in time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from shadowvol.agent.volume import DOWN_LIMIT_S
from shadowvol.core.commands import TURN_LIMIT_S
from shadowvol.core.transitions import HOLD_LIMIT_S, PREPARE_LIMIT_S
from tests.support.endings import Ended, Keep, run
from tests.support.load import KeepingClient, at_work
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 32 * MIB
SEED = 1010
KILLS = 6
SLACK_S = 10.0  # a busy machine


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """Synced."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    volume.run("start")
    volume.wait_synced()
    return volume


@contextmanager
def loaded(volume: Volume) -> Iterator[KeepingClient]:
    """A load that reconnects; in the end both legs hold every write that was acknowledged."""
    with at_work(volume.uri, SIZE_BYTES, seed=SEED) as load:
        yield load
    volume.wait_synced()
    load.check_file(volume.source)
    load.check_file(volume.target)


def signal_member(volume: Volume, number: signal.Signals) -> None:
    """Without waiting until it has an effect."""
    os.kill(volume.product.pid(volume.name, "member"), number)


@contextmanager
def stopped_member(volume: Volume) -> Iterator[int]:
    pid = volume.product.pid(volume.name, "member")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def timed(volume: Volume, words: str) -> tuple[Ended, float]:
    """How a command ended, and after how many seconds."""
    began_s = time.monotonic()
    ended = run(volume.product.home, words.split())
    return ended, time.monotonic() - began_s


def test_verbs_right_after_a_kill_of_the_member_are_done(volume: Volume) -> None:
    """At once, before the agent knows; each time the other way round."""
    with loaded(volume) as load:
        for _ in range(KILLS):
            for verb, preferred in (("cutover", "target"), ("undo", "source")):
                signal_member(volume, signal.SIGKILL)
                volume.order(verb, {"early": True})
                assert volume.phase[1] == preferred
                load.wait_acknowledged(5)


def test_every_verb_waits_for_a_member_that_was_killed(volume: Volume) -> None:
    """From the command line, in order of a volume's life."""
    for words in ("cutover --early", "undo", "abort", "start", "pause", "resume", "throttle --rate=none"):
        signal_member(volume, signal.SIGKILL)
        volume.run(*words.split())
    volume.wait_synced()
    volume.run("cutover")
    signal_member(volume, signal.SIGKILL)
    wait_for(lambda: volume.run("commit", "--keep-undo") == "", 30, "committed, when its recovery is done")
    signal_member(volume, signal.SIGKILL)
    volume.run("undo", "--early")
    assert volume.wait_synced()["preferred"] == "source"
    volume.assert_legs_equal()


def test_a_verb_right_after_the_start_of_an_agent_is_done(volume: Volume) -> None:
    """Alone, and with its member killed as well."""
    with loaded(volume):
        for verb, kills in (("cutover", ("agent",)), ("undo", ("agent", "member"))):
            member = volume.product.pid(volume.name, "member")
            volume.product.kill(volume.name, "agent")
            if "member" in kills:
                os.kill(member, signal.SIGKILL)
            starting = threading.Thread(target=volume.run, args=("up",))
            starting.start()
            code = wait_for(lambda verb=verb: agent_answers(volume, verb), 30, "an agent answers")
            starting.join()
            assert code == "0"


def agent_answers(volume: Volume, verb: str) -> str:
    """The exit code; "" while there is no agent."""
    ended = run(volume.product.home, [verb, volume.name, "--early"])
    return "" if "no agent is running" in ended.line else str(ended.code)


def test_a_stopped_member_is_named_in_time_and_nothing_has_changed(volume: Volume, keep: Keep) -> None:
    """The first verb is not prepared, the others get no turn; status answers; when it goes on all is as it was."""
    volume.run("cutover")
    with loaded(volume):
        with stopped_member(volume):
            ended, took_s = timed(volume, "undo v")
            keep("member stopped", "undo v", ended.code, ended.line)
            ended.assert_refused(3, ("undo: host ", "its member did not answer", "nothing changed"))
            assert took_s < PREPARE_LIMIT_S + HOLD_LIMIT_S + SLACK_S
            for words in ("pause v", "undo v"):
                ended, took_s = timed(volume, words)
                keep("member stopped, the next one", words, ended.code, ended.line)
                ended.assert_refused(3, ("the member on host ", "does not answer", "nothing changed"))
                assert took_s < TURN_LIMIT_S + SLACK_S
            assert volume.phase[1] == "target" and volume.status()["transition"] is None
        volume.run("undo")
    assert volume.phase[1] == "source" and not volume.status()["paused"]


@pytest.mark.parametrize("options", ["", " --force"])
def test_down_with_a_stopped_member_ends_it(volume: Volume, options: str, keep: Keep) -> None:
    """With --force the volume goes down; without, a new member serves it, since nobody can say who is connected."""
    with stopped_member(volume) as pid:
        ended, took_s = timed(volume, f"down v{options}")
    keep("member stopped", f"down v{options}", ended.code, ended.line)
    assert took_s < 2 * DOWN_LIMIT_S + SLACK_S
    if options:
        assert ended.code == 0 and not volume.status()["up"], ended
        volume.run("up")
    else:
        ended.assert_refused(1, ("its member has not answered", "was replaced", "the volume is up"))
    assert volume.product.pid("v", "member") not in (None, pid)
    volume.run("cutover")
    volume.run("down")
    volume.run("up")
    volume.assert_legs_equal()


def test_attach_with_a_stopped_member_says_so(volume: Volume, keep: Keep) -> None:
    """And leaves no device, and no wish for one."""
    with stopped_member(volume):
        ended, _ = timed(volume, "attach v")
    keep("member stopped", "attach v", ended.code, ended.line)
    ended.assert_refused(1, ("volume v was not attached", "its member does not answer"))
    assert volume.status()["endpoint"]["device"] is None
    volume.run("down")


def test_a_stopped_member_that_is_killed_makes_way_for_the_verb(volume: Volume) -> None:
    """The verb that was being prepared begins again with the next member."""
    with loaded(volume):
        with stopped_member(volume) as pid:
            ended: list[Ended] = []
            undo = threading.Thread(target=lambda: ended.append(timed(volume, "cutover v --early")[0]))
            undo.start()
            wait_for(lambda: volume.status()["transition"] is not None, 20, "the cutover is being prepared")
            os.kill(pid, signal.SIGKILL)
            undo.join()
        assert ended[0].code == 0, ended
    assert volume.phase[1] == "target"
