"""The C filter is optional: without it, or with one that nbdkit refuses, a volume comes up all the same."""

from pathlib import Path

import pytest

from shadowvol.nbd.filter.usable import SWITCH
from tests.support.filter_build import build_filter, build_for_another_nbdkit
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SAID = "the C filter is not used"


@pytest.mark.parametrize("case", ["deleted", "of another nbdkit"])
def test_without_the_filter_the_volume_comes_up_and_says_so_once(
    case: str, product: Product, legs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_for_another_nbdkit(tmp_path)
    if case == "deleted":
        built.unlink()
    monkeypatch.setenv(SWITCH, str(built))
    volume = Volume.make(product, make_source(legs / "source", 8 * MIB), legs / "target")
    volume.run("start")
    volume.wait_synced()
    product.kill(volume.name, "member")
    wait_for(lambda: product.result("cutover", volume.name).returncode == 0, 20, "a cutover by the next member")
    assert product.log().count(SAID) == 1
    assert "missing  C fast path" in product.run("doctor")


def test_with_the_filter_nothing_is_said(
    product: Product, legs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, str(build_filter(tmp_path)))
    Volume.make(product, make_source(legs / "source", 8 * MIB), legs / "target")
    assert SAID not in product.log()
    assert "ok       C fast path" in product.run("doctor")
