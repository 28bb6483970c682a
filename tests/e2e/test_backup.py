"""The record is backed up in use, put back, or lost: what docs/shadowvol.1.md says to do, done.

The shell commands here are those of its section "Backup of the record, and its loss".
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.load import KeepingClient
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 16 * MIB
SEED = 2009
BACKUPS = 6
MARK, UNMARK = "PRAGMA application_id = 0x53564255", "PRAGMA application_id = 0x53565243"


def sqlite3(*words: str | Path) -> str:
    return subprocess.run(["sqlite3", *map(str, words)], check=True, capture_output=True, text=True).stdout


def back_up(product: Product, backup: Path) -> None:
    sqlite3("-readonly", product.home / "state.sqlite", f"VACUUM INTO '{backup}'")
    sqlite3(backup, MARK)


def put_back(backup: Path, product: Product) -> None:
    product.home.mkdir(mode=0o700)
    shutil.copy(backup, product.home / "state.sqlite")
    sqlite3(product.home / "state.sqlite", UNMARK)


def told_by(backup: Path, key: str) -> dict[str, object]:
    """One of volume v's values in a backup."""
    found = sqlite3("-readonly", backup, f"SELECT CAST(value AS TEXT) FROM kv WHERE key = 'volumes/v/{key}'")
    told: dict[str, object] = json.loads(found)
    return told


def test_a_backup_in_use_is_whole_and_is_not_taken_for_the_record(product: Product, legs: Path, tmp_path: Path) -> None:
    """Under load and switches. Marked it is refused; without the mark every value in it checks out."""
    elsewhere = Product(tmp_path / "o")  # no agent there
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    try:
        volume.run("start")
        for number in range(BACKUPS):
            if number >= BACKUPS // 2:
                volume.wait_synced()
                volume.run("undo" if volume.phase[1] == "target" else "cutover")
            load.wait_acknowledged(5)
            backup = tmp_path / f"{number}.sqlite"
            back_up(product, backup)
            assert sqlite3("-readonly", backup, "PRAGMA integrity_check").strip() == "ok"
            assert told_by(backup, "state")["phase"] == "copying"  # synced is copying with nothing left to copy
            said = elsewhere.refused("--state", f"sqlite:{backup}", "status", "v", code=1)
            assert "is a backup" in said and "docs/shadowvol.1.md" in said
            sqlite3(backup, UNMARK)
            read = json.loads(elsewhere.run("--state", f"sqlite:{backup}", "status", "v", "--json"))
            assert read["legs"]["source"]["uri"] == str(volume.source)
    finally:
        load.stop()


def test_a_record_that_is_put_back_goes_on_where_no_volume_was_up_since(
    product: Product, legs: Path, tmp_path: Path
) -> None:
    """Nothing is copied again, and the switches work."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    volume.run("start")
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    load.wait_acknowledged(20)
    load.stop()
    volume.wait_synced()
    volume.run("cutover")
    volume.run("down")
    copied = volume.status()["copy"]["bytes_copied"]
    product.end()
    back_up(product, tmp_path / "backup.sqlite")
    shutil.rmtree(product.home)
    put_back(tmp_path / "backup.sqlite", product)
    volume.run("up")
    assert volume.phase == ("synced", "target") and volume.status()["copy"]["bytes_copied"] == copied
    volume.run("undo")
    load.check_file(volume.source)
    volume.assert_legs_equal()


@pytest.mark.parametrize("lost", ["setup", "copying", "synced", "cut over", "committed"])
def test_a_lost_record_is_made_anew_from_the_leg_that_has_everything(
    product: Product, legs: Path, tmp_path: Path, lost: str
) -> None:
    """The backup is older than many writes, so it only names the legs. The home goes while all processes run."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    back_up(product, tmp_path / "backup.sqlite")
    load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
    try:
        _lead_to(volume, lost)
        load.wait_acknowledged(50)
        shutil.rmtree(product.home)
        load.wait_acknowledged(50)  # settled I/O goes on
    finally:
        load.stop()
    product.end()  # every process whose command line names the home

    config = told_by(tmp_path / "backup.sqlite", "config")
    paths = {leg: str(config[leg]["uri"]) for leg in ("source", "target")}  # type: ignore[index]
    truth, other = ("target", "source") if lost == "committed" else ("source", "target")
    product.run("create", "v", "--source", paths[truth], "--target", paths[other], "--force")
    volume.run("up")
    load.check_file(getattr(volume, truth))
    volume.run("start")
    volume.wait_synced()
    load.check_file(getattr(volume, other))
    volume.assert_legs_equal()


def _lead_to(volume: Volume, place: str) -> None:
    if place == "setup":
        return
    if place == "copying":
        volume.run("throttle", "--rate", "1MiB/s")
        volume.run("start")
        return
    volume.run("start")
    volume.wait_synced()
    for verb, places in (("cutover", ("cut over", "committed")), ("commit", ("committed",))):
        if place in places:
            volume.run(verb)
