"""scripts/switch: cutover, a soak with watched health, then kept, committed or undone; no lost write, a stated end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.endings import Keep, picture
from tests.support.load import KeepingClient, at_work
from tests.support.loopdev import small_disk
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source
from tests.support.script import SCRIPTS, Script, run_script

SIZE_BYTES = 16 * MIB
SEED = 1005


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """Synced."""
    return synced(product, make_source(legs / "source", SIZE_BYTES), legs / "target")


def synced(product: Product, source: Path, target: Path) -> Volume:
    volume = Volume.make(product, source, target)
    volume.run("start")
    volume.wait_synced()
    return volume


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Script]]:
    """Scripts to be ended with the test."""
    scripts: list[Script] = []
    yield scripts
    for script in scripts:
        script.end()


@contextmanager
def loaded(volume: Volume) -> Iterator[KeepingClient]:
    """A load that reconnects. In the end every write that was acknowledged is on the leg that is read from."""
    with at_work(volume.uri, SIZE_BYTES, seed=SEED) as load:
        yield load
    load.check_file(volume.target if volume.phase[1] == "target" else volume.source)


def test_a_good_soak_is_committed_under_load(volume: Volume, tmp_path: Path) -> None:
    """The user's check runs meanwhile; each event is in the log, too."""
    runs = tmp_path / "runs"
    check = f"echo run >> {runs}"
    options = ("--soak", "2", "--check", check, "--check-every", "0.5", "--then", "commit", "--keep-undo")
    with loaded(volume):
        script = run_script(volume.product, tmp_path, "switch", "v", *options, "--log", str(tmp_path / "log"))
        journal = script.ends(0, "committed", "undo v is possible still")
    assert "cut over: reads come from the target; writes were held for" in journal
    assert (tmp_path / "log").read_text() == journal
    assert len(runs.read_text().splitlines()) >= 2  # before the cutover, and in the soak
    assert volume.phase == ("committed", "target")


def test_without_a_word_it_is_kept_and_run_again_it_watches_on(volume: Volume, tmp_path: Path) -> None:
    run_script(volume.product, tmp_path, "switch", "v", "--soak", "1").ends(0, "kept", "reads from the target")
    journal = run_script(volume.product, tmp_path, "switch", "v", "--soak", "0", "--then", "commit").ends(
        0, "committed"
    )
    assert "reads come from the target already: no cutover" in journal


def test_a_dry_run_checks_and_changes_nothing(volume: Volume, legs: Path, tmp_path: Path) -> None:
    before = picture([volume.product], legs)
    dry = ("--dry-run", "--then", "commit", "--undo-on-failure", "--log", str(tmp_path / "log"))
    output = run_script(volume.product, tmp_path, "switch", "v", "--check", "true", *dry).ends(0, "nothing was changed")
    for verb in ("cutover v", "status v --json", "undo v", "commit v"):
        assert f"{volume.product.home} {verb}\n" in output, output
    run_script(volume.product, tmp_path, "switch", "v", "--check", "exit 9", *dry).ends(3, "the check ended with 9")
    assert picture([volume.product], legs) == before
    assert volume.phase == ("synced", "source") and not (tmp_path / "log").exists()


def test_a_target_that_fails_in_the_soak_is_left_and_nothing_is_lost(
    product: Product, legs: Path, tmp_path: Path
) -> None:
    """Its disk is full: writes into holes of the target fail there, and only there."""
    with small_disk(legs / "d", 8 * MIB) as disk:
        source = make_source(legs / "source", SIZE_BYTES, data_bytes=MIB)
        volume = synced(product, source, disk / "target")
        script = Script(product, tmp_path, "switch", "v", "--soak", "60", "--undo-on-failure")
        try:
            script.wait_output("soak for")
            with loaded(volume):
                script.ends(8, "undone because: target", "No space left on device", "reads from the source")
                assert volume.phase == ("copying", "source")
        finally:
            script.end()
            product.end()


@pytest.mark.parametrize(
    ("options", "code", "said", "preferred"),
    [
        ((), 1, "not undone without --undo-on-failure", "target"),
        (("--undo-on-failure",), 8, "undone because: the check ended with 1: too slow", "source"),
        (("--undo-on-failure", "--check-failures", "3"), 8, "(3 times in a row)", "source"),
        (("--undo-on-failure", "--check-timeout", "0.3"), 8, "the check has not ended within 0.3 s", "source"),
    ],
)
def test_a_check_that_fails_in_the_soak_ends_as_was_chosen(
    volume: Volume, tmp_path: Path, options: tuple[str, ...], code: int, said: str, preferred: str
) -> None:
    """It succeeds before the cutover; what a check leaves running is ended."""
    slow = "--check-timeout" in options
    bad = "sleep 1000" if slow else "echo too slow; exit 1"
    check = f"if [ -e {tmp_path}/before ]; then {bad}; else touch {tmp_path}/before; fi"
    with loaded(volume):
        script = run_script(
            volume.product, tmp_path, "switch", "v", "--soak", "30", "--check", check, "--check-every", "0.2", *options
        )
        script.ends(code, said, f"reads from the {preferred}")
    assert volume.phase == ("synced", preferred)


def test_a_member_that_is_killed_in_the_soak_is_waited_for(
    volume: Volume, tmp_path: Path, started: list[Script]
) -> None:
    """It is back within the grace, its recovery makes the legs equal, and the soak is a good one."""
    with loaded(volume):
        script = Script(volume.product, tmp_path, "switch", "v", "--soak", "4", "--undo-on-failure")
        started.append(script)
        script.wait_output("soak for")
        volume.product.kill("v", "member")
        script.ends(0, "kept", "reads from the target")
    assert volume.phase == ("synced", "target")


def test_an_agent_that_stays_away_is_started_for_the_undo(
    volume: Volume, tmp_path: Path, started: list[Script]
) -> None:
    with loaded(volume):
        script = Script(volume.product, tmp_path, "switch", "v", "--soak", "60", "--grace", "1", "--undo-on-failure")
        started.append(script)
        script.wait_output("soak for")
        volume.product.kill("v", "agent")
        journal = script.ends(8, "undone because: no agent is running", "reads from the source")
    assert "waiting up to 1 s" in journal and " up v" in journal
    assert volume.phase == ("synced", "source")


def test_an_undo_that_does_not_succeed_says_what_to_do(volume: Volume, tmp_path: Path, started: list[Script]) -> None:
    """The member is stopped and answers nobody. When it goes on, the undo that the agent has begun is done."""
    member = volume.product.pid("v", "member")
    bad = tmp_path / "bad"
    check = ("--check", f"test ! -e {bad}", "--check-every", "0.2", "--undo-on-failure", "--undo-timeout", "1")
    script = Script(volume.product, tmp_path, "switch", "v", "--soak", "60", *check)
    started.append(script)
    script.wait_output("soak for")
    os.kill(member, signal.SIGSTOP)
    try:
        bad.touch()
        script.ends(9, "not undone", "reads from the target, and its undo is under way", "by hand: shadowvol --home")
    finally:
        os.kill(member, signal.SIGCONT)
    wait_for(lambda: volume.phase == ("synced", "source"), 60, "the undo is done")


@pytest.mark.parametrize("place", [">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_no_place_for_its_output_changes_nothing_about_what_it_does(volume: Volume, tmp_path: Path, place: str) -> None:
    log = tmp_path / "log"
    command = f"{SCRIPTS}/switch --home {volume.product.home} v --soak 1 --log {log} {place}"
    assert subprocess.run(["/bin/sh", "-c", command], timeout=60, check=False).returncode == 0
    assert log.read_text().splitlines()[-1].endswith("(exit code 0)")
    assert volume.phase == ("synced", "target")


def test_a_source_that_is_not_healthy_is_no_place_to_go_back_to(volume: Volume, tmp_path: Path) -> None:
    """Its file is gone when the volume comes up again: it stays on the target, and says why."""
    volume.run("cutover")
    volume.run("down")
    os.rename(volume.source, volume.source.with_suffix(".aside"))
    volume.run("up")
    script = run_script(volume.product, tmp_path, "switch", "v", "--soak", "30", "--grace", "1", "--undo-on-failure")
    script.ends(1, "source is failed", "not undone, as the source is not healthy", "reads from the target")
    assert volume.phase[1] == "target"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("undo", [False, True])
def test_interrupted_in_the_soak_it_says_where_reads_come_from(
    volume: Volume, tmp_path: Path, started: list[Script], number: signal.Signals, undo: bool
) -> None:
    options = ("--undo-on-interrupt",) if undo else ()
    script = Script(volume.product, tmp_path, "switch", "v", "--soak", "60", *options)
    started.append(script)
    script.wait_output("soak for")
    script.send(number)
    preferred = "source" if undo else "target"
    script.ends(8 if undo else 7, f"interrupted ({number.name})", f"reads from the {preferred}")
    assert volume.phase == ("synced", preferred)


def test_interrupted_in_the_cutover_it_is_a_whole_one(volume: Volume, tmp_path: Path, started: list[Script]) -> None:
    """The member is stopped, so the verb takes its time; Ctrl-C does not cut it in two."""
    member = volume.product.pid("v", "member")
    script = Script(volume.product, tmp_path, "switch", "v", "--soak", "60", terminal=True)
    started.append(script)
    os.kill(member, signal.SIGSTOP)
    try:
        script.wait_output("cutover v")
        script.types("\x03")
    finally:
        os.kill(member, signal.SIGCONT)
    script.ends(7, "interrupted (SIGINT)", "reads from the target")
    assert volume.phase == ("synced", "target")


BEING_STARTED = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import changewindow
changewindow.Interrupts()
print("#", end="", flush=True)
shadowvol = changewindow.Shadowvol(changewindow.parser("switch", "").parse_args(["v"]))
print({{shadowvol.run("--version").code for _ in range(20)}})
"""


def test_a_verb_that_is_being_started_is_not_interrupted() -> None:
    """Ctrl-C again and again, at every moment of a start: the verbs of a script all end by themselves."""
    command = [sys.executable, "-c", BEING_STARTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as script:
        assert script.stdout is not None
        assert os.read(script.stdout.fileno(), 1) == b"#"

        def has_ended() -> bool:
            os.killpg(script.pid, signal.SIGINT)
            return script.poll() is not None

        wait_for(has_ended, 60, "the script has ended", every_s=0.0005)
        assert script.stdout.read() == b"{0}\n"


@pytest.mark.parametrize(
    ("keys", "code", "said", "stands"),
    [
        ("commit\r", 0, "committed", ("committed", "target")),
        ("what\rc\rk\r", 0, "kept", ("synced", "target")),
        ("undo\r", 8, "undone because: asked for", ("synced", "source")),
        ("\x04", 7, "interrupted (end of the terminal's input)", ("synced", "target")),
        ("\x03", 7, "interrupted (SIGINT)", ("synced", "target")),
    ],
)
def test_on_a_terminal_it_asks_after_the_soak(
    volume: Volume, tmp_path: Path, started: list[Script], keys: str, code: int, said: str, stands: tuple[str, str]
) -> None:
    """Keys that were typed before it asked are no answer, and "c" is no commit."""
    script = Script(volume.product, tmp_path, "switch", "v", "--soak", "1", terminal=True)
    started.append(script)
    script.wait_output("soak for")
    script.types("commit\r")
    script.wait_output("commit, keep or undo?")
    script.types(keys)
    script.ends(code, said)
    assert volume.phase == stands


def test_on_a_terminal_it_asks_when_health_is_bad(volume: Volume, tmp_path: Path, started: list[Script]) -> None:
    gone = tmp_path / "gone"
    words = ("v", "--soak", "60", "--check", f"test ! -e {gone}", "--check-every", "0.2")
    script = Script(volume.product, tmp_path, "switch", *words, terminal=True)
    started.append(script)
    script.wait_output("left, reads come from the target")
    gone.touch()
    script.wait_output("undo or keep?")
    script.types("u\r")
    script.ends(8, "undone because: the check ended with 1")
    assert volume.phase == ("synced", "source")


def test_the_loss_of_the_terminal_is_an_interrupt_and_is_in_the_log(
    volume: Volume, tmp_path: Path, started: list[Script]
) -> None:
    log = tmp_path / "log"
    script = Script(volume.product, tmp_path, "switch", "v", "--soak", "60", "--log", str(log), terminal=True)
    started.append(script)
    script.wait_output("left, reads come from the target")
    script.lose_terminal()
    script.ends(7)
    last = log.read_text().splitlines()[-1]
    assert "interrupted (SIGHUP): volume v reads from the target" in last and last.endswith("(exit code 7)")
    assert volume.phase == ("synced", "target")


def test_what_it_refuses_is_as_it_was(product: Product, legs: Path, tmp_path: Path, keep: Keep) -> None:
    """In order of a volume's life, each with its exit code."""

    def refused(code: int, said: str, *options: str) -> None:
        before = stands()
        output = run_script(product, tmp_path, "switch", "v", *options).ends(code)
        assert said in output and "nothing changed" in output, output
        assert stands() == before
        keep(said, "scripts/switch", code, output.splitlines()[0].partition(": ")[2])

    def stands() -> tuple[str, str] | None:
        return volume.phase if product.home.exists() else None

    volume = Volume(product, "v", legs / "source", legs / "target")
    refused(2, "is not a duration", "--soak", "soon")
    refused(2, "is not a number from 1 to 1000", "--check-failures", "0")
    refused(2, "is empty", "--check", "")
    refused(2, "Is a directory", "--log", str(legs))
    refused(4, "there is no volume v")
    Volume.make(product, make_source(volume.source, SIZE_BYTES), volume.target)
    refused(3, "it is in phase setup; scripts/migrate v leads to synced")
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    refused(3, "it is still copying")
    volume.run("throttle", "--rate", "none")
    volume.wait_synced()
    product.kill("v", "agent")
    refused(3, "no agent is running")
    volume.run("up")
    refused(3, "before the cutover, the check ended with 7: ill", "--check", "echo ill; exit 7")
    volume.run("cutover")
    volume.run("commit")
    refused(3, "its migration is over")
