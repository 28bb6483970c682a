"""scripts/migrate: from nothing, or from wherever a volume stands, to synced, while applications use the volume."""

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.endings import Keep, picture
from tests.support.load import KeepingClient
from tests.support.product import MIB, Product, Volume, make_source
from tests.support.script import Script, run_script

SIZE_BYTES = 32 * MIB
SEED = 1006


@pytest.fixture
def words(legs: Path) -> list[str]:
    """A new volume, from a source with data to a target that is to be made."""
    make_source(legs / "source", SIZE_BYTES)
    return ["v", "--source", str(legs / "source"), "--target", str(legs / "target"), "--provision"]


@pytest.fixture
def started(product: Product, tmp_path: Path) -> Iterator[list[Script]]:
    """Scripts to be ended with the test."""
    scripts: list[Script] = []
    yield scripts
    for script in scripts:
        script.end()


def the_volume(product: Product, legs: Path) -> Volume:
    return Volume(product, "v", legs / "source", legs / "target")


def commands_in(text: str) -> list[str]:
    """The commands that a journal or a dry run names, without the options that every one has."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line[line.index("shadowvol --home") :]) if "shadowvol --home" in line else []
        if words:
            found.append(shlex.join(words[3:]))
    return found


def test_a_new_volume_is_synced_under_load_by_the_commands_that_a_dry_run_shows(
    product: Product, legs: Path, tmp_path: Path, words: list[str], started: list[Script]
) -> None:
    """The dry run makes nothing, not even the home; the journal is in the log as well."""
    rates = ("--rate", "8MiB/s", "--min-rate", "1MiB/s", "--finish-by", "2h", "--impact", "low")
    options = (*rates, "--region-size", "64KiB")
    before = picture([product], legs)
    dry = run_script(product, tmp_path, "migrate", *words, *options, "--dry-run").ends(0, "nothing was")
    assert picture([product], legs) == before and not product.home.exists()

    script = Script(product, tmp_path, "migrate", *words, *options, "--log", str(tmp_path / "log"))
    started.append(script)
    script.wait_output("wait v --for synced")
    volume = the_volume(product, legs)
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    try:
        load.wait_acknowledged(20)
        journal = script.ends(0, "synced: both legs", "reads come from source")
        load.wait_acknowledged(20)
    finally:
        load.stop()
    assert commands_in(journal) == commands_in(dry) and len(commands_in(dry)) == 5
    assert f"applications use {volume.uri}" in journal
    throttle = volume.status()["copy"]["throttle"]
    assert (throttle["rate_bytes_per_s"], throttle["min_rate_bytes_per_s"], throttle["impact"]) == (8 * MIB, MIB, "low")
    assert throttle["finish_by"] is not None
    assert (tmp_path / "log").read_text() == journal
    volume.wait_synced()
    load.check_file(volume.source)
    load.check_file(volume.target)
    volume.assert_legs_equal()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_it_says_how_things_stand_and_run_again_it_goes_on(
    product: Product, legs: Path, tmp_path: Path, words: list[str], started: list[Script], number: signal.Signals
) -> None:
    """Copying goes on meanwhile. After SIGKILL all of the host's processes are killed as well, as by a reboot."""
    script = Script(product, tmp_path, "migrate", *words, "--rate", "1MiB/s")
    started.append(script)
    script.wait_output("wait v --for synced")
    volume = the_volume(product, legs)
    script.send(number)
    if number == signal.SIGKILL:
        script.ends(-signal.SIGKILL)
        product.end()
    else:
        script.ends(7, f"interrupted ({number.name})", "in phase copying", "run the same command again", "pause v")
        assert volume.status()["copy"]["state"] == "running"
    journal = run_script(product, tmp_path, "migrate", *words, "--rate", "none").ends(0, "synced: both legs")
    assert "volume v exists, in phase copying" in journal and "going on from there" in journal
    assert not any(command.startswith(("create", "start")) for command in commands_in(journal))
    volume.assert_legs_equal()


def test_what_is_wrong_is_refused_before_anything_is_changed(
    product: Product, legs: Path, tmp_path: Path, words: list[str], keep: Keep
) -> None:
    """Each also by --dry-run."""
    make_source(legs / "small", MIB)
    new = words[:-1]
    cases: list[tuple[str, list[str], int, str]] = [
        ("a bad name", ["V!", *words[1:]], 2, "is not a volume name"),
        ("a bad rate", [*words, "--rate", "fast"], 2, "is not a rate"),
        ("a time that is none", [*words, "--finish-by", "soon"], 2, "is not a time"),
        ("a time that is over", [*words, "--finish-by", "2001-01-01T00:00"], 2, "is over already"),
        ("a rate of 0", [*words, "--rate", "0MiB/s"], 2, "is not a rate"),
        ("a bad region size", [*words, "--region-size", "3MiB"], 2, "power of two"),
        ("no target", ["v", "--source", str(legs / "source")], 2, "go together"),
        ("a target that is not there", new, 2, "does not exist"),
        ("a target too small", [*new[:4], str(legs / "small")], 2, "too small"),
        ("half an option", [*words, "--prov"], 2, "unrecognized arguments"),
        ("a log that cannot be", [*words, "--log", str(legs)], 2, "Is a directory"),
        ("no such volume", ["v"], 4, "there is no volume v"),
    ]
    for name, line, code, said in cases:
        before = picture([product], legs)
        for dry in ([], ["--dry-run"]):
            if dry and "--log" in line:
                continue  # a dry run writes no log
            run = run_script(product, tmp_path, "migrate", *line, *dry)
            output = run.ends(code)
            assert said in output and "nothing changed" in output, output
            assert picture([product], legs) == before, (name, dry)
        keep(name, "scripts/migrate", code, output.splitlines()[0].partition(": ")[2].replace(f"{legs}/", ""))


def stands(volume: Volume) -> list[object]:
    status = volume.status()
    return [status[key] for key in ("phase", "preferred", "paused", "goal")]


def test_it_goes_on_only_from_where_it_may(
    product: Product, legs: Path, tmp_path: Path, words: list[str], keep: Keep
) -> None:
    """Other legs, paused by somebody, a time limit, committed; each with its code, and the volume stays as it was."""

    def refused(code: int, said: str, *options: str) -> None:
        before = stands(volume)
        output = run_script(product, tmp_path, "migrate", *options).ends(code, said)
        assert stands(volume) == before
        keep(said, "scripts/migrate", code, output.splitlines()[-1].partition(": ")[2].replace(f"{legs}/", ""))

    product.run("create", *words)
    volume = the_volume(product, legs)
    refused(3, "has another target", *words[:4], str(legs / "other"))
    os.rename(legs / "target", legs / "aside")
    refused(3, "is not there", "v")
    os.rename(legs / "aside", legs / "target")
    volume.run("up")
    volume.run("throttle", "--rate", "1MiB/s")
    volume.run("start")
    refused(5, "run the same command again", "v", "--rate", "1MiB/s", "--timeout", "0.5")
    volume.run("pause")
    refused(3, "copying was paused by somebody", "v")
    volume.run("resume")
    run_script(product, tmp_path, "migrate", "v", "--rate", "none").ends(0)
    volume.run("cutover")
    run_script(product, tmp_path, "migrate", "v").ends(0, "reads come from target", "commit v")
    volume.run("commit")
    refused(3, "its migration is over", "v")


def test_a_pause_while_it_waits_ends_it_and_says_so(
    product: Product, legs: Path, tmp_path: Path, words: list[str], started: list[Script]
) -> None:
    script = Script(product, tmp_path, "migrate", *words, "--rate", "1MiB/s")
    started.append(script)
    script.wait_output("wait v --for synced")
    the_volume(product, legs).run("pause")
    script.ends(1, "copying is paused", "in phase copying")
