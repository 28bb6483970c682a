"""attach and detach through FUSE and a loop device: a mounted file system does not notice what happens to shadowvol."""

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.attached import attach, check_file_system, make_file_system, mounted, remove_remains, run
from tests.support.deviceload import DeviceLoad
from tests.support.load import VERIFY
from tests.support.loopdev import loop_device
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 96 * MIB
RECOVERY_S = 30.0  # for what the agent repairs by itself

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root attaches block devices")


@pytest.fixture
def volume(product: Product, legs: Path) -> Iterator[Volume]:
    """Up, in phase setup, with an empty source."""
    yield Volume.make(product, make_source(legs / "source", SIZE_BYTES, 0), legs / "target")
    remove_remains(product)


def kill(volume: Volume, *processes: str) -> None:
    """A killed agent is started by the next `up`, as a service manager would."""
    for process in processes:
        volume.product.kill(volume.name, process)
    if "agent" in processes:
        volume.run("up")


def reads_from(volume: Volume) -> Path:
    return volume.target if volume.status()["preferred"] == "target" else volume.source


def test_a_mounted_file_system_goes_on_over_kills_and_the_whole_migration(volume: Volume, tmp_path: Path) -> None:
    """No I/O error, every read is right, fsck finds nothing on the device nor on the target by itself."""
    device = attach(volume)
    make_file_system(device)
    with mounted(device, tmp_path / "mnt") as mnt, DeviceLoad("blocks", mnt / "file", tmp_path / "log") as load:
        load.wait_acknowledged(50)
        volume.run("throttle", "--rate", "8MiB/s")
        volume.run("start")
        for processes in (("member",), ("agent",), ("member", "transfer"), ("member", "agent")):
            kill(volume, *processes)
            load.wait_acknowledged(50)
        volume.run("throttle", "--rate", "none")
        volume.wait_synced()
        for verb in ("cutover", "undo", "cutover"):
            volume.run(verb)
            kill(volume, "member")
            load.wait_acknowledged(50)
        volume.wait_synced()
        volume.run("commit")
        kill(volume, "member")
        load.wait_acknowledged(50)
        assert volume.status()["endpoint"]["device"] == device
        load.stop()
    check_file_system(device)
    volume.run("detach")
    assert volume.status()["endpoint"]["device"] is None
    volume.run("down")
    check_file_system(volume.target)


def test_sqlite_keeps_every_acknowledged_transaction(volume: Volume, tmp_path: Path) -> None:
    """A loop of transactions over start, copy, cutover, undo, ten kills of the member and commit."""
    device = attach(volume)
    make_file_system(device)
    log = tmp_path / "log"
    with mounted(device, tmp_path / "mnt") as mnt:
        with DeviceLoad("sqlite", mnt / "database", log) as load:
            load.wait_acknowledged(30)
            volume.run("throttle", "--rate", "8MiB/s")
            volume.run("start")
            for _ in range(4):
                kill(volume, "member")
                load.wait_acknowledged(10)
            volume.run("throttle", "--rate", "none")
            volume.wait_synced()
            for verb in ("cutover", "undo", "cutover"):
                volume.run(verb)
                for _ in range(2):
                    kill(volume, "member")
                    load.wait_acknowledged(10)
            volume.wait_synced()
            volume.run("commit")
            load.wait_acknowledged(30)
    with mounted(device, tmp_path / "mnt") as mnt, closing(sqlite3.connect(mnt / "database")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        there = {number for (number,) in database.execute("SELECT number FROM done")}
    assert set(load.acknowledged()) <= there
    check_file_system(device)
    volume.run("detach")


def test_many_requests_in_flight_are_not_mixed_up(volume: Volume, tmp_path: Path) -> None:
    """Writes, reads and trims side by side, straight on the device; the member dies meanwhile."""
    device = attach(volume)
    common = ["fio", f"--filename={device}", "--ioengine=libaio", "--direct=1", "--eta=never", "--randrepeat=0"]
    load = ["--name=load", "--rw=randrw", "--iodepth=32", "--bsrange=4k-1m", "--size=48m", "--loops=2"]
    trims = ["--name=trims", "--rw=randtrim", "--iodepth=4", "--bs=64k", "--offset=56m", "--size=32m", "--loops=4"]
    command = [*common, *load, *VERIFY, *trims]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as fio:
        goal = volume.writes() + 20
        wait_for(lambda: volume.writes() > goal, RECOVERY_S, "fio writes")
        kill(volume, "member")
        said, _ = fio.communicate(timeout=120)
    assert fio.returncode == 0, said
    volume.run("detach")


def test_an_fsync_of_the_device_reaches_the_volume(volume: Volume, tmp_path: Path) -> None:
    device = attach(volume)
    descriptor = os.open(device, os.O_RDWR)
    try:
        before = volume.status()["io"]["flushes"]
        for number in range(5):
            os.pwrite(descriptor, os.urandom(4096), number * 4096)
            os.fsync(descriptor)
        wait_for(lambda: volume.status()["io"]["flushes"] >= before + 5, RECOVERY_S, "five more flushes")
    finally:
        os.close(descriptor)
    volume.run("detach")


def test_what_is_attached_is_attached_again_after_a_reboot(volume: Volume, tmp_path: Path) -> None:
    """Everything of shadowvol is gone, then one `up`."""
    device = attach(volume)
    make_file_system(device)
    with mounted(device, tmp_path / "mnt") as mnt:
        (mnt / "file").write_text("here")
    remove_remains(volume.product)
    volume.run("up")
    device = wait_for(lambda: volume.status()["endpoint"]["device"], RECOVERY_S, "it is attached")
    assert volume.run("attach").strip() == device
    with mounted(device, tmp_path / "mnt") as mnt:
        assert (mnt / "file").read_text() == "here"
    volume.run("detach")
    kill(volume, "agent")
    assert volume.status()["endpoint"]["device"] is None


def test_a_device_whose_server_was_killed_is_replaced(volume: Volume) -> None:
    """The old one gives errors, status says so, and there is a new one."""
    attach(volume)
    pid = int((volume.product.home / "run/v.attach").read_text())
    os.kill(pid, 9)
    wait_for(lambda: "lost" in (volume.status()["last_error"] or ""), RECOVERY_S, "status tells")
    wait_for(lambda: volume.status()["last_error"] is None, RECOVERY_S, "it is attached again")
    device = volume.status()["endpoint"]["device"]
    make_file_system(device)
    check_file_system(device)
    volume.run("detach")
    check_file_system(volume.source)


def test_attach_says_what_it_cannot_do(volume: Volume, legs: Path) -> None:
    volume.run("down")
    assert "is down" in volume.refused("attach")
    volume.run("up")
    assert "no volume" in volume.product.refused("attach", "nothing", code=4)
    assert "neither" in volume.refused("attach", "--device", "/dev/sda", code=2)
    assert "not exist" in volume.refused("attach", "--device", "/dev/loop9999", code=2)
    if not os.path.isdir("/sys/module/nbd"):
        assert "no nbd driver" in volume.refused("attach", "--device", "/dev/nbd0", code=2)
    with loop_device(make_source(legs / "other", MIB, 0)) as used:
        assert f"{used} is in use" in volume.refused("attach", "--device", used, code=2)
        assert volume.status()["endpoint"]["device"] is None
        device = attach(volume)
        assert volume.run("attach").strip() == volume.run("attach", "--device", device).strip() == device
        assert f"attached as {device}" in volume.refused("attach", "--device", used)
    volume.run("detach")


def test_detach_and_down_are_refused_while_they_would_hurt(volume: Volume, tmp_path: Path) -> None:
    volume.run("detach")  # nothing attached, nothing to be done
    device = attach(volume)
    for force in ((), ("--force",)):
        assert f"attached as {device}" in volume.refused("down", *force)
    assert "attached" in volume.refused("delete", "--force")
    make_file_system(device)
    with mounted(device, tmp_path / "mnt") as mnt:
        assert f"{device} is mounted at {mnt}" in volume.refused("detach")
        assert f"attached as {device}" in volume.refused("down", "--force")
        (mnt / "file").write_text("still there")
    descriptor = os.open(device, os.O_RDONLY)
    try:
        assert f"process {os.getpid()}" in volume.refused("detach")
    finally:
        os.close(descriptor)
    with loop_device(Path(device)) as above:
        assert f"in use by {above}" in volume.refused("detach")
    with mounted(device, tmp_path / "mnt") as mnt:
        assert (mnt / "file").read_text() == "still there"
    run("mkswap", device)
    run("swapon", device)
    try:
        assert "swap" in volume.refused("detach")
    finally:
        run("swapoff", device)
    volume.run("detach")
    volume.run("down")


def test_an_agent_that_was_killed_leaves_a_device_that_can_be_detached(volume: Volume, tmp_path: Path) -> None:
    device = attach(volume)
    make_file_system(device)
    with mounted(device, tmp_path / "mnt") as mnt:
        kill(volume, "agent")
        assert f"is mounted at {mnt}" in volume.refused("detach")  # at once, whether it has looked already or not
        (mnt / "file").write_text("still there")
    assert wait_for(lambda: volume.status()["endpoint"]["device"], RECOVERY_S, "found again") == device
    volume.run("detach")
    assert not list(Path("/sys/block").glob(f"{os.path.basename(device)}/loop"))
    assert not {"v.disk", "v.attach"} & set(os.listdir(volume.product.home / "run"))
    volume.run("down")
