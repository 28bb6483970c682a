"""What every end-to-end test gets: a host of its own, and a folder for legs that is emptied afterwards."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.product import Product


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    """A host with nothing on it. Its agent, members and copiers are ended with the test."""
    product = Product(tmp_path / "h")
    yield product
    product.end()


@pytest.fixture
def legs(tmp_path: Path, product: Product) -> Iterator[Path]:
    """A folder for legs; removed when the host has been ended, since pytest keeps what a test leaves."""
    folder = tmp_path / "legs"
    folder.mkdir()
    yield folder
    product.end()
    shutil.rmtree(folder)
