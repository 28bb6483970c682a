"""Every test of a member runs twice: all in Python, and with the C filter in front."""

import pytest

from shadowvol.nbd.filter.usable import SWITCH
from tests.support.filter_build import build_disturbed_filter, build_filter

BUILDS = {"filter": "built_filter", "disturbed": "disturbed_filter"}  # disturbed: some of its own I/O fails


@pytest.fixture(scope="session")
def built_filter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_filter(tmp_path_factory.mktemp("filter")))


@pytest.fixture(scope="session")
def disturbed_filter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_disturbed_filter(tmp_path_factory.mktemp("disturbed")))


@pytest.fixture(params=["python", "filter"], autouse=True)
def data_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which one a member that is started now has."""
    name = str(request.param)
    monkeypatch.setenv(SWITCH, "off" if name == "python" else request.getfixturevalue(BUILDS[name]))
    return name
