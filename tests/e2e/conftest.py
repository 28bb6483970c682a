"""What every end-to-end test gets: a host of its own, and a folder for legs that is emptied afterwards.

And, at the session's end, the table of how commands ended that were refused, or that met a bad moment.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowvol.nbd.filter.usable import SWITCH
from tests.support.endings import PROPERTY, Keep, table
from tests.support.product import Product

# Modules whose tests run with and without the filter.
BOTH_DATA_PATHS = ("test_bad_storage", "test_kill", "test_load", "test_statistics")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_DATA_PATHS:
        metafunc.parametrize("data_path", ["filter", "python"], indirect=True)


@pytest.fixture(autouse=True)
def data_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C filter in front, as it is by default, or all in Python. SHADOWVOL_FILTER=off: Python everywhere."""
    in_python = getattr(request, "param", "filter") == "python"
    monkeypatch.setenv(SWITCH, "off" if in_python else os.environ.get(SWITCH, "on"))


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


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """Keep an ending for the table: keep(name, command, exit code, line)."""

    def kept(name: str, command: str, code: int, line: str) -> None:
        request.node.user_properties.append((PROPERTY, (name, command, code, line)))

    return kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    endings = [value for report in reports for name, value in report.user_properties if name == PROPERTY]
    if endings:
        terminalreporter.section("exit codes")
        for row in table(list(dict.fromkeys(map(tuple, endings)))):
            terminalreporter.write_line(row)
