"""Who may connect: a hypervisor's user reaches the volumes' sockets, and nothing else of the home.

Other users are real: the clients run with another user id. The host's home lies where all of them may pass, as
/var/lib/shadowvol does.
"""

import grp
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowvol.agent.paths import Home
from tests.support.foreground import foreground_agent, log_file
from tests.support.product import MIB, Product, Volume, make_source

USER_ID = 65534
GROUP, OTHER_GROUP = "users", "games"  # of every Debian
REACH = ("--socket-group", GROUP)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may run clients as somebody else")


@pytest.fixture
def product() -> Iterator[Product]:
    folder = Path(tempfile.mkdtemp(prefix="sv-access-", dir="/var/tmp"))
    folder.chmod(0o755)
    product = Product(folder / "h")
    yield product
    product.end()
    shutil.rmtree(folder)


def as_user(group: str, *command: str) -> "subprocess.CompletedProcess[bytes]":
    """The command as a user without privileges whose only other group is `group`."""
    return subprocess.run(
        command,
        user=USER_ID,
        group=USER_ID,
        extra_groups=[grp.getgrnam(group).gr_gid],
        capture_output=True,
        timeout=60,
        check=False,
        cwd="/",
    )


def content_for(group: str, volume: Volume) -> bytes | None:
    """What a user of this group reads from the volume; None if it may not connect. Where a member is still to come the
    connection waits for it."""
    uri = Home(volume.product.home).nbd_uri(volume.name)
    size = as_user(group, "nbdinfo", "--size", uri)
    read = as_user(group, "nbdcopy", uri, "-")
    assert (size.returncode == 0) is (read.returncode == 0), (size, read)
    if read.returncode:
        assert b"Permission denied" in size.stderr and b"Permission denied" in read.stderr, (size, read)
        return None
    return read.stdout


def modes(*paths: Path) -> list[str]:
    return [f"{stat.S_IMODE(path.stat().st_mode):04o}" for path in paths]


def make_volume(product: Product, name: str = "v") -> Volume:
    folder = product.home.parent
    return Volume.make(product, make_source(folder / f"{name}.old", MIB), folder / f"{name}.new", name=name)


def for_others(place: Path) -> list[str]:
    """Everything below that somebody else than its owner has any right to, with its mode."""
    found = [path for path in sorted(place.rglob("*")) if path.lstat().st_mode & 0o077]
    return [f"{path.relative_to(place)} {mode}" for path, mode in zip(found, modes(*found), strict=True)]


def test_a_user_of_the_group_reads_the_volume_and_nothing_else(product: Product) -> None:
    """And a user of another group not even that."""
    home = Home(product.home)
    with foreground_agent(product, *REACH):
        volume = make_volume(product)
        assert content_for(GROUP, volume) == volume.source.read_bytes()
        assert content_for(OTHER_GROUP, volume) is None
        assert modes(home.directory, home.run, home.volume_socket("v")) == ["0711", "0711", "0660"]
        files = [home.state_file, *home.directory.glob("state.sqlite-*"), home.agent_log, *home.run.glob("*.lock")]
        assert len(files) >= 6, files
        for path in files:
            assert b"Permission denied" in as_user(GROUP, "cat", str(path)).stderr, path
        for place in (home.directory, home.run):
            assert b"Permission denied" in as_user(GROUP, "ls", str(place)).stderr, place
            assert b"Permission denied" in as_user(GROUP, "touch", str(place / "new")).stderr, place
        for path in (home.agent_socket, home.link_socket):
            assert b"Permission denied" in as_user(GROUP, "nbdinfo", f"nbd+unix:///v?socket={path}").stderr, path


def test_others_reach_no_file_whatever_the_umask(product: Product) -> None:
    with foreground_agent(product, *REACH, umask=0):
        volume = make_volume(product)
        volume.run("start")
        volume.wait_synced()
        assert for_others(product.home) == ["run 0711", "run/v.sock 0660"]


def test_a_new_agent_gives_or_takes_back_the_socket_that_a_living_member_serves(product: Product) -> None:
    """Three agents, one after the other, and one member that notices nothing."""
    home = Home(product.home)
    volume = make_volume(product)  # starts an agent without the option
    member = product.pid("v", "member")
    assert content_for(GROUP, volume) is None
    product.kill("v", "agent")
    with foreground_agent(product, *REACH):
        assert product.pid("v", "member") == member
        assert content_for(GROUP, volume) == volume.source.read_bytes()
    with foreground_agent(product, "--socket-group", OTHER_GROUP, "--socket-mode", "0660"):
        assert product.pid("v", "member") == member
        assert content_for(GROUP, volume) is None
        assert content_for(OTHER_GROUP, volume) == volume.source.read_bytes()
    with foreground_agent(product):
        assert product.pid("v", "member") == member
        assert content_for(OTHER_GROUP, volume) is None
        assert modes(home.directory, home.run, home.volume_socket("v")) == ["0700", "0700", "0600"]


def test_a_socket_is_given_again_after_down_and_up_and_the_death_of_its_member(product: Product) -> None:
    with foreground_agent(product, environment={"SHADOWVOL_SOCKET_GROUP": GROUP}):
        volume = make_volume(product)
        product.kill("v", "member")
        assert content_for(GROUP, volume) == volume.source.read_bytes()
        volume.run("down")
        volume.run("up")
        assert content_for(GROUP, volume) == volume.source.read_bytes()


def test_commands_beside_the_agent_leave_the_way_open(product: Product) -> None:
    """They make the home where there is none, but whether others may pass is the agent's to say."""
    with foreground_agent(product, *REACH):
        volume = make_volume(product)
        make_volume(product, "w")
        product.run("up", "v", "w")
        assert content_for(GROUP, volume) == volume.source.read_bytes()


def test_a_record_that_was_restored_for_everybody_to_read_is_taken_back_first(product: Product) -> None:
    home = Home(product.home)
    make_volume(product)
    product.run("down", "v")
    product.end()
    home.state_file.chmod(0o644)
    with foreground_agent(product, *REACH):
        assert modes(home.state_file) == ["0600"]
    assert f"{home.state_file} could be read by others (mode 0644)" in log_file(product).read_text()


def test_everybody_may_connect_only_with_a_warning(product: Product) -> None:
    with foreground_agent(product, "--socket-mode", "0666"):
        volume = make_volume(product)
        assert content_for(OTHER_GROUP, volume) == volume.source.read_bytes()
    assert "every user of this host can read and write every volume" in log_file(product).read_text()


def test_a_home_below_a_private_directory_is_warned_about(product: Product) -> None:
    product.home.parent.chmod(0o700)
    with foreground_agent(product, *REACH):
        pass
    assert f"{product.home.parent} does not let everybody pass" in log_file(product).read_text()


BAD: list[tuple[tuple[str, ...], str]] = [
    (("--socket-group", "no-such-group"), "there is no group no-such-group"),
    (("--socket-group", "99999999999"), "there is no group 99999999999"),
    (("--socket-group", ""), "--socket-group is empty"),
    (("--socket-mode", ""), "--socket-mode is empty"),
    (("--socket-mode", "0770"), "'0770' is not a socket mode"),
    (("--socket-mode", "0640"), "'0640' is not a socket mode"),
    (("--socket-mode", "0060"), "'0060' is not a socket mode"),
    (("--socket-mode", "4660"), "'4660' is not a socket mode"),
    (("--socket-mode", "0o660"), "'0o660' is not a socket mode"),
    (("--socket-mode", "rw-rw----"), "'rw-rw----' is not a socket mode"),
    (("--socket-group", GROUP, "--socket-mode", "0600"), "lets no group connect"),
    (("--socket-mode", "0660", "--socket-mode", "0600"), "--socket-mode is given more than once"),
    (("--log-level", "loud"), "'loud' is not a log level; there are error, warning, info, debug"),
    (("--log-level", ""), "--log-level is empty"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_settings_that_cannot_be_used_are_refused_before_anything_is_made(
    product: Product, options: tuple[str, ...], words: str
) -> None:
    assert words in product.refused("agent", *options, code=2)
    assert not product.home.exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SOCKET_GROUP", "no-such-group"), ("SOCKET_MODE", "0777"), ("LOG_LEVEL", "loud")],
)
def test_the_agent_that_up_would_start_is_not_started_with_such_settings(
    product: Product, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    volume = make_volume(product)
    volume.run("down")
    product.end()
    monkeypatch.setenv(f"SHADOWVOL_{variable}", value)
    assert value in volume.refused("up", code=2)
    assert product.status("v")["processes"]["agent"] is None
