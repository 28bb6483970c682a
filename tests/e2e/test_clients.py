"""Every client that an operator may use works against the export, in every phase."""

import json
import subprocess
from pathlib import Path

from tests.support.load import unaligned_pass
from tests.support.product import MIB, Product, Volume, assert_same_bytes, make_source

SIZE_BYTES = 24 * MIB
CLIENT_LIMIT_S = 60


def tool(*command: str) -> str:
    """Its standard output; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_LIMIT_S, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def nbdinfo_tells_what_is_offered(volume: Volume) -> None:
    export = json.loads(tool("nbdinfo", "--json", volume.uri))["exports"][0]
    assert export["export-size"] == SIZE_BYTES
    assert not export["is_read_only"]
    for flag in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_cache"):
        assert export[flag], flag


def nbdcopy_moves_both_ways(volume: Volume, leg: Path, folder: Path) -> None:
    """Out: the same bytes as on the leg that must have everything. In: the leg gets the new bytes."""
    copy, new = folder / "copy", make_source(folder / "new", SIZE_BYTES, SIZE_BYTES * 3 // 4)
    tool("nbdcopy", "--connections=4", volume.uri, str(copy))
    assert_same_bytes(copy, leg, SIZE_BYTES)
    tool("nbdcopy", "--connections=4", "--flush", str(new), volume.uri)
    assert_same_bytes(new, leg, SIZE_BYTES)
    copy.unlink()


def qemu_img_sees_no_difference(volume: Volume, leg: Path) -> None:
    told = tool("qemu-img", "compare", "-f", "raw", "-F", "raw", str(leg), volume.uri)
    assert "identical" in told


def qemu_io_does_each_operation(volume: Volume) -> None:
    commands = [
        "write -P 0x5a 1M 64k",
        "read -P 0x5a 1M 64k",
        "write -f -P 0x5b 1049600 512",  # FUA
        "read -P 0x5b 1049600 512",
        "write -z 2M 128k",  # must be allocated
        "read -P 0 2M 128k",
        "write -z -u 3M 1M",  # may be a hole
        "read -P 0 3M 1M",
        "discard 4M 1M",
        "flush",
        "read 5M 1M",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    told = tool("qemu-io", "-t", "none", "-f", "raw", volume.uri, *arguments)
    assert "failed" not in told and "Pattern verification" not in told, told


def fio_verifies(volume: Volume, folder: Path) -> None:
    done = unaligned_pass(folder, volume.uri, 6 * MIB, 16 * MIB)
    assert done["write"]["total_ios"] > 20 and done["read"]["total_ios"] > 20


def every_client(volume: Volume, leg: Path, folder: Path) -> None:
    """`leg`: the one that holds everything in this phase."""
    nbdinfo_tells_what_is_offered(volume)
    nbdcopy_moves_both_ways(volume, leg, folder)
    qemu_img_sees_no_difference(volume, leg)
    fio_verifies(volume, folder)
    qemu_io_does_each_operation(volume)
    qemu_img_sees_no_difference(volume, leg)


def test_every_client_works_in_every_phase(product: Product, legs: Path) -> None:
    source = make_source(legs / "source", SIZE_BYTES, SIZE_BYTES * 3 // 4)
    volume = Volume.make(product, source, legs / "target")
    assert volume.phase == ("setup", "source")
    every_client(volume, volume.source, legs)

    volume.run("throttle", "--rate", "100KiB/s")
    volume.run("start")
    every_client(volume, volume.source, legs)
    assert volume.phase == ("copying", "source")
    volume.run("pause")
    every_client(volume, volume.source, legs)
    assert volume.phase == ("copying", "source")
    volume.run("cutover", "--early")
    every_client(volume, volume.source, legs)
    assert volume.phase == ("copying", "target")

    volume.run("throttle", "--rate", "none")
    volume.run("resume")
    volume.wait_synced()
    for leg in (volume.source, volume.target):
        every_client(volume, leg, legs)
    volume.assert_legs_equal()
    assert volume.phase == ("synced", "target")
    volume.run("undo")
    for leg in (volume.source, volume.target):
        every_client(volume, leg, legs)
    volume.assert_legs_equal()
    assert volume.phase == ("synced", "source")

    volume.run("cutover")
    volume.run("commit")
    before = subprocess.run(["sha256sum", str(volume.source)], capture_output=True, check=True).stdout
    every_client(volume, volume.target, legs)
    assert volume.phase == ("committed", "target")
    assert subprocess.run(["sha256sum", str(volume.source)], capture_output=True, check=True).stdout == before
