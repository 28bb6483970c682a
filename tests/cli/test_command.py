"""The command's contract without an agent: exit codes, one-line errors, status, delete (DESIGN 12)."""

import json
import os
import pty
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowvol import __version__
from tests.cli.conftest import COMMAND, MIB, Shell

Leg = Callable[..., Path]

FIELDS = {
    "": "name kind phase preferred size_bytes region_bytes regions_total regions_source_ok regions_target_ok "
    "regions_both_ok fraction_both_ok copy legs endpoint processes host leader epoch members transition "
    "last_switch_pause_ms undo_available last_error",
    "copy": "state reason rate_bytes_per_s eta_s bytes_copied bytes_recopied throttle",
    "copy.throttle": "rate_bytes_per_s impact min_rate_bytes_per_s finish_by allowed_bytes_per_s",
    "legs": "source target",
    "legs.source": "uri cache health errors last_error since",
    "legs.target": "uri cache health errors last_error since",
    "processes": "agent member transfer",
}
AGENT_VERBS = [
    ["start", "v"],
    ["pause", "v"],
    ["resume", "v"],
    ["cutover", "v"],
    ["cutover", "v", "--early"],
    ["undo", "v", "--early"],
    ["commit", "v", "--keep-undo", "--force"],
    ["abort", "v"],
    ["retarget", "v", "--target", "elsewhere"],
    ["throttle", "v", "--rate", "200MiB/s", "--impact", "low"],
    ["throttle", "v", "--rate", "none"],
    ["down", "v", "--force"],
]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A home with the volume v, shared: no test here changes it."""
    folder = tmp_path_factory.mktemp("volume")
    for name in ("a", "b"):
        with (folder / name).open("xb") as file:
            file.truncate(8 * MIB)
    shell = Shell(folder, folder / "home")
    shell.good("create", "v", "--source", "a", "--target", "b")
    return shell


def test_status_without_an_agent_has_every_field(volume: Shell) -> None:
    found = volume.status("v")
    for path, fields in FIELDS.items():
        part = found
        for step in filter(None, path.split(".")):
            part = part[step]
        assert set(fields.split()) <= set(part), path
    assert found["host"] and found["endpoint"] is None and found["members"] == []
    assert found["processes"] == {"agent": None, "member": None, "transfer": None}
    assert found["copy"]["state"] == "idle" and found["undo_available"] is False
    assert json.loads(volume.good("status", "--json")) == [found]


def test_status_as_a_table(volume: Shell) -> None:
    out = volume.good("status")
    assert out.splitlines()[0].split()[:2] == ["NAME", "PHASE"]
    assert "v" in out and "setup" in out and "8 MiB" in out and "no agent is running" in out
    assert volume.good("status", "v").splitlines()[1] == out.splitlines()[1]


def test_looking_at_a_home_that_is_not_there_makes_none(shadowvol: Shell) -> None:
    assert json.loads(shadowvol.good("status", "--json")) == []
    assert shadowvol.good("status").strip() == "no volumes"
    shadowvol("status", "v").refused(4)
    assert not shadowvol.home.exists()


@pytest.mark.parametrize("words", [*AGENT_VERBS, ["up", "v"], ["delete", "v"], ["wait", "v", "--for", "synced"]])
def test_an_unknown_volume_is_4_and_a_bad_name_2(volume: Shell, words: list[str]) -> None:
    volume.inside(*["other" if word == "v" else word for word in words]).refused(4, "no volume other")
    volume.inside(*["Bad" if word == "v" else word for word in words]).refused(2, "'Bad' is not a volume name")


@pytest.mark.parametrize("words", AGENT_VERBS)
def test_without_an_agent_a_verb_says_how_to_start_it(volume: Shell, words: list[str]) -> None:
    volume.inside(*words).refused(1, " up v", " agent")
    assert volume.status("v")["phase"] == "setup"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nope"],
        ["--nope"],
        ["start"],
        ["start", "v", "w"],
        ["create", "w"],
        ["create", "w", "--source", "a", "--target", "b", "--kind", "tape"],
        ["throttle", "v"],
        ["throttle", "v", "--rate", "fast"],
        ["throttle", "v", "--rate", "0"],
        ["throttle", "v", "--impact", "some"],
        ["wait", "v"],
        ["wait", "v", "--for", "never"],
        ["wait", "v", "--for", "synced", "--timeout", "soon"],
        ["status", "v", "--watch", "--json"],
        ["--host", "a/b", "status"],
        ["--state", "etcd://127.0.0.1:1", "status"],
        ["--state", "nonsense", "status"],
    ],
)
def test_bad_usage_is_2(volume: Shell, words: list[str]) -> None:
    volume.inside(*words).refused(2)


def test_the_console_script_ends_with_the_same_codes(volume: Shell) -> None:
    """What the other tests see inside this process is what a shell sees."""
    volume("start", "v").refused(1, "shadowvol up v (or: shadowvol agent)")
    volume().refused(2, "Missing command")
    volume("start", "other").refused(4, "no volume other")
    volume("--state", f"sqlite:{volume.folder}/no/place", "status").refused(6)
    volume("delete", "v", environment={"SHADOWVOL_HOST": "a/b"}).refused(2, "not a host name")


@pytest.mark.parametrize("verb", ["verify", "mount", "members", "fence", "report"])
def test_verbs_of_later_versions_are_not_there(shadowvol: Shell, verb: str) -> None:
    shadowvol.inside(verb, "v").refused(2, f"No such command '{verb}'")
    assert f"\n  {verb} " not in shadowvol.inside("--help").out


def test_an_unreachable_record_is_6(volume: Shell) -> None:
    gone = f"sqlite:{volume.folder}/no/such/place.sqlite"
    for words in (["status"], ["start", "v"], ["delete", "v"], ["up"]):
        volume.inside("--state", gone, *words).refused(6)
    volume.inside("--state", gone, "create", "w", "--source", "a", "--target", "b").refused(6)


def test_a_foreign_record_is_1(volume: Shell) -> None:
    foreign = volume.folder / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    volume("--state", f"sqlite:{foreign}", "status").refused(1, "not a record of shadowvol")


def test_delete_forgets_the_volume_and_leaves_the_legs(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    shadowvol.good("create", "v", "--source", source, "--target", target)
    shadowvol.good("delete", "v")
    assert shadowvol.names() == []
    assert source.stat().st_size == target.stat().st_size == 8 * MIB
    shadowvol("delete", "v").refused(4)


def test_waiting_for_what_is_already_so_needs_no_agent(volume: Shell) -> None:
    volume.good("wait", "v", "--for", "setup")
    volume("wait", "v", "--for", "synced", "--timeout", "30").refused(1, "shadowvol start v")
    volume("wait", "v", "--for", "committed").refused(1, "shadowvol commit v")


def test_up_without_any_volume_does_nothing(shadowvol: Shell) -> None:
    ended = shadowvol("up")
    assert (ended.code, ended.out) == (0, "") and "no volume" in ended.err
    assert not shadowvol.home.exists()


def test_version_and_help(shadowvol: Shell) -> None:
    assert __version__ in shadowvol.good("--version")
    overview = shadowvol.good("--help")
    for verb in ("create", "up", "start", "cutover", "undo", "commit", "wait", "status", "doctor", "agent"):
        assert f"\n  {verb} " in overview
    assert "--keep-undo" in shadowvol.good("commit", "--help")


def test_doctor_names_what_is_there(shadowvol: Shell) -> None:
    out = shadowvol.good("doctor")
    assert "ok       nbdkit python plugin" in out
    for line in out.splitlines():
        assert line.startswith("ok ") or (line.startswith("missing ") and ": " in line)


def test_doctor_ends_with_1_when_something_needed_is_missing(shadowvol: Shell) -> None:
    (shadowvol.folder / "file").touch()
    ended = shadowvol("--home", shadowvol.folder / "file" / "home", "doctor")
    assert ended.code == 1 and "missing  run directory" in ended.out


def test_flags_come_before_the_environment(shadowvol: Shell, leg: Leg) -> None:
    other = shadowvol.folder / "other"
    shadowvol.good("--home", other, "create", "v", "--source", leg("a"), "--target", leg("b"))
    assert shadowvol.names() == []
    ended = shadowvol("status", "v", "--json", environment={"SHADOWVOL_HOME": str(other), "SHADOWVOL_HOST": "one"})
    assert json.loads(ended.out)["host"] == "one"
    url = f"sqlite:{os.path.relpath(other / 'state.sqlite', shadowvol.folder)}"
    assert shadowvol("--state", url, "--host", "two", "status", "v").code == 0


def test_the_live_view_ends_with_0_on_interrupt(volume: Shell) -> None:
    """On a terminal, as a user sees it; Ctrl-C once the table is there."""
    ours, theirs = pty.openpty()
    environment = dict(os.environ, SHADOWVOL_HOME=str(volume.home), TERM="xterm")
    process = subprocess.Popen([COMMAND, "status", "--watch"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as screen:
        seen = b""
        while b"setup" not in seen:
            seen += screen.read(1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert b"Traceback" not in seen
