"""Storage that is full, missing, shrunk, replaced or taken: what verbs say of it, and that applications do not notice.

Each test keeps how its commands ended for the table of exit codes (tests/e2e/conftest.py).
"""

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import nbd
import pytest

from shadowvol.endpoints.local import open_local
from tests.support.endings import Ended, Keep, run
from tests.support.load import KeepingClient
from tests.support.loopdev import small_disk
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 32 * MIB
SMALL_BYTES = 4 * MIB
ZONE_BYTES = 16 * MIB
SEED = 815


def command(product: Product, words: str) -> Ended:
    return run(product.home, words.split())


# ---------------------------------------------------------------- full disks


def test_a_full_disk_under_the_home_stops_no_io_and_no_verb(tmp_path: Path, legs: Path, keep: Keep) -> None:
    """Space was set aside: writes to new zones, the copy, switches, restarts of member and agent all work."""
    with small_disk(tmp_path / "d", 48 * MIB) as disk:
        product = Product(disk / "h")
        try:
            volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
            _fill(disk / "filler")
            load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
            try:
                load.wait_acknowledged(20)
                for line in ("start v", "wait v --for synced --timeout 60", "cutover v", "pause v", "resume v"):
                    ended = command(product, line)
                    keep("full home", line, ended.code, ended.line)
                    assert ended.code == 0, (ended, product.log())
                    load.wait_acknowledged(5)
                product.kill("v", "member")
                load.wait_acknowledged(20)
                product.kill("v", "agent")
                ended = command(product, "up v")
                keep("full home, agent killed", "up v", ended.code, ended.line)
                assert ended.code == 0, (ended, product.log())
                load.wait_acknowledged(20)
                make_source(legs / "a", MIB)
                ended = command(product, f"create n --source {legs / 'a'} --target {legs / 'b'} --provision")
                keep("full home", "create n --source a --target b --provision", ended.code, ended.line)
                assert ended.code in (0, 6), ended
                assert (legs / "b").exists() is (ended.code == 0)
            finally:
                load.stop()
            volume.wait_synced()
            load.check_file(volume.source)
            load.check_file(volume.target)
        finally:
            product.end()


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for step in (MIB, 4096):
            try:
                while True:
                    file.write(b"f" * step)
            except OSError:
                continue


def test_a_full_target_is_a_leg_fault(product: Product, legs: Path, keep: Keep) -> None:
    """Copying backs off and says which leg and why; the application writes on; room, or an abort, ends it."""
    with small_disk(legs / "d", 8 * MIB) as disk:
        volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), disk / "target")
        load = KeepingClient(volume.uri, SIZE_BYTES, seed=SEED, threads=2)
        try:
            volume.run("start")
            reason = wait_for(lambda: _backing_off(volume), 30, "copying backs off")
            keep("full target", "status v", 0, f"copying: backoff ({reason})")
            assert "target: " in reason and "No space left on device" in reason
            leg = wait_for(lambda: _degraded(volume), 30, "the target is degraded")
            assert "No space left on device" in leg["last_error"] and leg["since"]
            load.wait_acknowledged(50)
            for line, code, words in (
                ("cutover v", 3, "still copying"),
                ("wait v --for synced --timeout 0.2", 5, "still copying"),
                ("abort v", 0, ""),
                ("wait v --for setup --timeout 30", 0, ""),
                ("start v", 0, ""),
            ):
                ended = command(product, line)
                keep("full target", line, ended.code, ended.line)
                assert ended.code == code and words in ended.line, (ended, product.log())
                load.wait_acknowledged(5)
            subprocess.run(["mount", "-o", f"remount,size={2 * SIZE_BYTES}", str(disk)], check=True)
            volume.run("resume")
            status = volume.wait_synced()
        finally:
            load.stop()
        assert status["legs"]["target"]["health"] == "ok"
        assert "No space left on device" in status["legs"]["target"]["last_error"]
        assert f"target: ok since {status['legs']['target']['since']}; before that: " in volume.run("status")
        volume.wait_synced()
        load.check_file(volume.source)
        load.check_file(volume.target)
        volume.assert_legs_equal()
        volume.run("down")
        product.end()


def _backing_off(volume: Volume) -> str:
    copy = volume.status()["copy"]
    return str(copy["reason"]) if copy["state"] == "backoff" else ""


def _degraded(volume: Volume) -> dict[str, str]:
    leg: dict[str, str] = volume.status()["legs"]["target"]
    return leg if leg["health"] == "degraded" else {}


# ---------------------------------------------------------------- the record


def test_a_record_that_cannot_be_written_stops_no_settled_io(product: Product, legs: Path, keep: Keep) -> None:
    """Another program holds it locked. A write to a zone that was not in use waits, verbs say why; then all goes on."""
    volume = Volume.make(product, make_source(legs / "source", 2 * ZONE_BYTES), legs / "target")
    volume.run("start")
    volume.wait_synced()
    load = KeepingClient(volume.uri, ZONE_BYTES, seed=SEED, threads=2)
    elsewhere = nbd.NBD()
    elsewhere.connect_uri(volume.uri)
    try:
        load.wait_acknowledged(50)
        with closing(sqlite3.connect(product.home / "state.sqlite", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            waiting = threading.Thread(target=elsewhere.pwrite, args=(b"\x66" * 4096, ZONE_BYTES), daemon=True)
            waiting.start()
            ended = command(product, "pause v")  # it is under way when this is noticed
            keep("record locked", "pause v", ended.code, ended.line)
            assert ended.code in (1, 6) and ended.line, (ended, product.log())
            told = command(product, "cutover v")  # it waits until it is known that no leadership can begin
            told.assert_refused(6, ("the record of truth cannot be reached", "nothing changed"))
            keep("record locked", "cutover v", told.code, told.line.replace(f"{product.home}/", ""))
            load.wait_acknowledged(50)
            assert waiting.is_alive() and volume.phase == ("synced", "source")
            holder.execute("ROLLBACK")
        waiting.join(30)
        assert not waiting.is_alive()
        wait_for(lambda: command(product, "cutover v").code == 0, 30, "verbs are done again")
        load.wait_acknowledged(50)
    finally:
        load.stop()
    elsewhere.shutdown()
    volume.run("resume")  # whether the pause was recorded is not told
    volume.wait_synced()
    for leg in (volume.source, volume.target):
        load.check_file(leg)
        assert leg.read_bytes()[ZONE_BYTES : ZONE_BYTES + 4096] == b"\x66" * 4096


# ---------------------------------------------------------------- legs that have changed between two starts


def missing(path: Path) -> Callable[[], None]:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    return lambda: os.replace(aside, path)


def replaced(path: Path) -> Callable[[], None]:
    back = missing(path)
    make_source(path, SMALL_BYTES)
    content = path.read_bytes()

    def undo() -> None:
        assert path.read_bytes() == content  # it is nobody's leg, and nobody has written to it
        back()

    return undo


def shrunk(path: Path) -> Callable[[], None]:
    content = path.read_bytes()
    os.truncate(path, SMALL_BYTES - 512)

    def undo() -> None:
        path.write_bytes(content)

    return undo


def grown(path: Path) -> Callable[[], None]:
    os.truncate(path, SMALL_BYTES + MIB)
    return lambda: os.truncate(path, SMALL_BYTES)


def a_directory(path: Path) -> Callable[[], None]:
    back = missing(path)
    path.mkdir()

    def undo() -> None:
        path.rmdir()
        back()

    return undo


def taken(path: Path) -> Callable[[], None]:
    return open_local(str(path), cache="host", writable=True, claim=True).close


CHANGES: list[tuple[Callable[[Path], Callable[[], None]], str]] = [
    (missing, "does not exist"),
    (replaced, "is another medium than before"),
    (shrunk, f"its size has changed: {SMALL_BYTES - 512} bytes, {SMALL_BYTES} were recorded"),
    (grown, f"its size has changed: {SMALL_BYTES + MIB} bytes, {SMALL_BYTES} were recorded"),
    (a_directory, "is a directory"),
    (taken, "claimed by another process"),
]
WAYS = pytest.mark.parametrize(("change", "words"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])


@pytest.fixture
def volume(product: Product, legs: Path) -> Volume:
    """In setup, and down."""
    volume = Volume.make(product, make_source(legs / "source", SMALL_BYTES), legs / "target")
    volume.run("down")
    return volume


@WAYS
def test_a_volume_whose_only_leg_has_changed_is_not_brought_up(
    volume: Volume, change: Callable[[Path], Callable[[], None]], words: str, keep: Keep
) -> None:
    """Exit 3, which leg and why; and it comes up when the leg is what it was."""
    undo = change(volume.source)
    ended = command(volume.product, "up v")
    keep(f"source {change.__name__}", "up v", ended.code, ended.line.replace(f"{volume.source.parent}/", ""))
    ended.assert_refused(3, ("volume v cannot be served: source ", words, "nothing changed"))
    status = volume.status()
    assert status["endpoint"] is None and not status["up"] and status["processes"]["member"] is None
    undo()
    volume.run("up")
    assert volume.status()["legs"]["source"]["health"] == "ok"


@WAYS
def test_a_changed_target_is_not_copied_to(
    volume: Volume, change: Callable[[Path], Callable[[], None]], words: str, keep: Keep
) -> None:
    """In setup it is not in use, so the volume comes up; start is refused until it is what it was."""
    undo = change(volume.target)
    assert command(volume.product, "up v").code == 0
    ended = command(volume.product, "start v")
    keep(f"target {change.__name__}", "start v", ended.code, ended.line.replace(f"{volume.target.parent}/", ""))
    ended.assert_refused(3, ("is not prepared: target: ", words, "nothing changed"))
    assert volume.phase == ("setup", "source")
    undo()
    volume.run("start")
    volume.wait_synced()
    volume.assert_legs_equal()


@pytest.mark.parametrize("leg", ["source", "target"])
def test_a_synced_volume_is_served_without_one_leg_and_not_without_both(volume: Volume, leg: str, keep: Keep) -> None:
    """`up` says what is missing. When the leg is back, it gets what it has missed, and the volume is synced again."""
    product = volume.product
    volume.run("up")
    volume.run("start")
    volume.wait_synced()
    volume.run("down")
    other = volume.source if leg == "target" else volume.target
    undo = missing(getattr(volume, leg))
    undo_other = missing(other)
    ended = command(product, "up v")
    keep("both legs missing", "up v", ended.code, ended.line.replace(f"{volume.source.parent}/", ""))
    ended.assert_refused(3, ("volume v cannot be served: ", "does not exist"))
    undo_other()
    ended = command(product, "up v")
    keep(f"synced, {leg} missing", "up v", ended.code, ended.line.replace(f"{volume.source.parent}/", ""))
    assert ended.code == 0 and f"note: volume v is served without its {leg} " in ended.err, ended
    connection = nbd.NBD()
    connection.connect_uri(volume.uri)
    connection.pwrite(b"\x77" * 4096, MIB)
    assert connection.pread(4096, MIB) == b"\x77" * 4096
    connection.shutdown()
    wait_for(lambda: volume.status()["legs"][leg]["health"] == "failed", 20, f"the {leg} is shown as failed")
    undo()
    wait_for(lambda: volume.phase == ("synced", "source"), 60, "it is synced again")
    volume.assert_legs_equal()
    assert getattr(volume, leg).read_bytes()[MIB : MIB + 4096] == b"\x77" * 4096


def test_up_of_a_volume_that_is_up_and_has_lost_its_leg_says_so(volume: Volume, keep: Keep) -> None:
    """As after a reboot at which the agent was there before the disk; it serves when the leg is back."""
    product = volume.product
    volume.run("up")
    product.end()
    undo = missing(volume.source)
    ended = command(product, "up v")
    keep("source missing at the agent's start", "up v", ended.code, ended.line.replace(f"{volume.source.parent}/", ""))
    ended.assert_refused(1, ("volume v is up, but I/O fails until its leg is back: source: ", "does not exist"))
    undo()
    wait_for(lambda: command(product, "up v").code == 0, 20, "the source is open again")
