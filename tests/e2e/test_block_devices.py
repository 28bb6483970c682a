"""Block devices as legs: loop devices, also with sectors of 4 KiB."""

import os
from pathlib import Path

import pytest

from tests.support.load import VERIFIED, Fio
from tests.support.loopdev import loop_device
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 64 * MIB
SECTORS = ("--sector-size", "4096")
LOAD = (*VERIFIED, "--bsrange=4k-256k")


def test_disks_of_4_kib_sectors_go_the_whole_way_under_load(product: Product, legs: Path) -> None:
    file = make_source(legs / "source", SIZE_BYTES)
    target_file = make_source(legs / "target", SIZE_BYTES + MIB, 0)
    with loop_device(file, *SECTORS) as source, loop_device(target_file, *SECTORS) as target:
        volume = Volume.make(product, Path(source), Path(target))
        with Fio(legs, volume.uri, *LOAD, "--blockalign=4k") as fio:
            fio.wait_served(volume, 50)
            volume.run("start")
            volume.wait_synced()
            volume.switches_ms(2)
            fio.wait_served(volume, 50)
        fio.stop()
        volume.wait_synced()
        volume.assert_legs_equal()
        with pytest.raises(OSError):  # while the volume is up nobody else can take a leg for itself
            os.close(os.open(source, os.O_RDWR | os.O_EXCL))
        volume.run("cutover")
        volume.run("commit")
        volume.run("down")
        product.end()


def test_a_disk_of_512_byte_sectors_goes_to_one_of_4_kib(product: Product, legs: Path) -> None:
    """The application's sectors stay small: the target's are read, modified and written."""
    file = make_source(legs / "source", SIZE_BYTES)
    target_file = make_source(legs / "target", SIZE_BYTES, 0)
    with loop_device(file) as source, loop_device(target_file, *SECTORS) as target:
        volume = Volume.make(product, Path(source), Path(target))
        small = (*VERIFIED, "--bssplit=512/30:1536/20:4k/20:64k/30", "--blockalign=512")
        with Fio(legs, volume.uri, *small) as fio:
            fio.wait_served(volume, 50)
            volume.run("start")
            volume.wait_synced()
            volume.run("cutover")
            fio.wait_served(volume, 50)
            volume.run("undo")
            volume.run("cutover")
            volume.run("commit", "--keep-undo")
            fio.wait_served(volume, 50)
            volume.run("undo")
            volume.wait_synced()
        fio.stop()
        volume.wait_synced()
        volume.assert_legs_equal()
        volume.run("down")
        product.end()
