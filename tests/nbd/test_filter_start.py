"""A member starts with the C filter where nbdkit takes it, and without it, saying why, where it does not."""

import json
from pathlib import Path

import pytest

from shadowvol.core.geometry import MIB
from shadowvol.nbd.filter.usable import SWITCH, usable_filter
from tests.support.filter_build import build_filter, build_for_another_nbdkit
from tests.support.loopdev import mounted
from tests.support.nbd_member import NbdMember, leg_record, nbd_member, sparse_file

SIZE = 64 * MIB


@pytest.fixture(params=["as set"])
def data_path(request: pytest.FixtureRequest) -> str:
    """Each test says itself what is there."""
    return str(request.param)


def serve_and_ask(folder: Path) -> tuple[str | None, dict[str, int] | None]:
    """A member writes and reads; (why it has no filter, what the filter did)."""
    with nbd_member(folder, leg_record(sparse_file(folder / "source", SIZE))) as member:
        exercise(member)
        return member.leader.hellos[0]["no_filter"], member.leader.latest_stats()["filter"]


def exercise(member: NbdMember) -> None:
    client = member.client()
    client.write(b"f" * 4096, MIB)
    assert client.read(4096, MIB) == b"f" * 4096
    client.close()


def test_with_the_filter_settled_requests_do_not_reach_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(build_filter(tmp_path)))
    why_not, done = serve_and_ask(tmp_path)
    assert why_not is None
    assert done is not None
    assert (done["reads_ended"], done["writes_ended"], done["writes_let_through"]) == (1, 1, 0)


def test_a_filter_for_another_nbdkit_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, str(build_for_another_nbdkit(tmp_path)))
    why_not, done = serve_and_ask(tmp_path)
    assert why_not is not None and "incompatible" in why_not
    assert done is None


def test_a_filter_that_is_not_there_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, str(tmp_path / "nowhere.so"))
    why_not, done = serve_and_ask(tmp_path)
    assert why_not == "it has not been built: scripts/setup does that"
    assert done is None


def test_the_dry_start_is_done_once_for_each_build(tmp_path: Path) -> None:
    built = build_filter(tmp_path)
    environment = {SWITCH: str(built)}
    assert usable_filter(environment).path == built
    kept = built.with_name(f"{built.name}.tried")
    outcome = json.loads(kept.read_text())
    kept.write_text(json.dumps({**outcome, "why_not": "as it was kept"}))
    assert usable_filter(environment).why_not == "as it was kept"
    assert build_for_another_nbdkit(tmp_path) == built
    assert "incompatible" in (usable_filter(environment).why_not or "")


def test_a_filter_on_a_read_only_file_system_is_used(tmp_path: Path) -> None:
    """It is tried at each start, since nothing can be kept there. As with a read-only /usr."""
    built, place = build_filter(tmp_path), tmp_path / "mnt"
    with mounted(built.parent, place, "--bind", "-o", "ro"):
        read_only = place / built.name
        assert usable_filter({SWITCH: str(read_only)}).path == read_only
        assert usable_filter({SWITCH: str(read_only)}).path == read_only


def test_the_switch_switches_it_off(tmp_path: Path) -> None:
    assert usable_filter({SWITCH: "off"}).path is None
