"""Settings and paths; sizes, rates and durations; the client where no agent answers."""

import os
import socket
import threading
from pathlib import Path

import pytest

from shadowvol.agent.access import SocketAccess
from shadowvol.agent.client import AgentFailed, AgentNotRunning, Result, call, ensure_agent
from shadowvol.agent.paths import Home, SettingsError, resolve
from shadowvol.agent.settings import AgentSettings, resolve_agent
from shadowvol.cli.units import format_bytes, format_eta, parse_duration_s, parse_rate, parse_size

# ---- settings ----


def test_flags_then_environment_then_file_then_defaults(tmp_path: Path) -> None:
    file = tmp_path / "shadowvol.toml"
    file.write_text('home = "/from/file"\nhost = "file-host"\n')
    environment = {"SHADOWVOL_HOME": "/from/environment"}
    settings = resolve(environment=environment, config_file=file)
    assert (settings.home.directory, settings.host) == (Path("/from/environment"), "file-host")
    assert settings.state_url == "sqlite:/from/environment/state.sqlite"
    settings = resolve("/from/flag", "sqlite:s", environment=environment, config_file=file)
    assert settings.home.directory == Path("/from/flag")
    assert settings.state_url == f"sqlite:{os.path.abspath('s')}"
    assert resolve(environment={}, config_file=file).home.directory == Path("/from/file")
    assert resolve("/h", environment={}, config_file=tmp_path / "none").host == socket.gethostname()


def test_settings_of_the_agent_are_found_in_the_same_order(tmp_path: Path) -> None:
    file = tmp_path / "shadowvol.toml"
    file.write_text(
        f'home = "/h"\nlog_level = "error"\nsocket_group = "{os.getegid()}"\nsocket_mode = "0666"\ncopies_max = "5"\n'
    )
    found = resolve_agent(environment={}, config_file=file)
    assert found == AgentSettings("error", SocketAccess(0o666, os.getegid()), copies_max=5)
    environment = {"SHADOWVOL_LOG_LEVEL": "DEBUG", "SHADOWVOL_SOCKET_MODE": "660", "SHADOWVOL_COPIES_MAX": "1"}
    found = resolve_agent(environment=environment, config_file=file)
    assert found == AgentSettings("debug", SocketAccess(0o660, os.getegid()), copies_max=1)
    flags = {"log_level": "info", "copies_max": "64"}
    found = resolve_agent(flags, environment=environment, config_file=tmp_path / "none")
    assert found == AgentSettings("info", SocketAccess(0o660, None), copies_max=64)
    found = resolve_agent(environment={}, config_file=tmp_path / "none")
    assert found.access == SocketAccess(0o600, None) and found.copies_max == 2


@pytest.mark.parametrize("text", ["0", "65", "two", "1.5", "-1", "\u0663"])
def test_a_number_of_copies_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="1 to 64"):
        resolve_agent({"copies_max": text}, environment={}, config_file=tmp_path / "none")


@pytest.mark.parametrize("content", ["home = 1", "socket_mode = 0o660", 'hom = "x"', "home", '[home]\nx = "y"'])
def test_a_file_that_is_not_understood_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "shadowvol.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"shadowvol\.toml"):
        resolve(environment={}, config_file=file)


def test_the_run_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b")
    home.prepare()
    assert home.run.stat().st_mode & 0o777 == home.directory.stat().st_mode & 0o777 == 0o700
    home.run.chmod(0o777)
    home.prepare()
    assert home.run.stat().st_mode & 0o777 == 0o711  # whether others may pass through is the agent's to say


def test_uris_are_quoted() -> None:
    assert Home(Path("/x y/ä&b")).nbd_uri("v.1") == "nbd+unix:///v.1?socket=/x%20y/%C3%A4%26b/run/v.1.sock"


def test_the_longest_socket_path_can_be_bound_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    """107 bytes, counted in bytes of the file name, not in characters."""
    room = 107 - len(os.fsencode(tmp_path)) - len("/" + "/run/agent.sock")
    fits, too_long = Home(tmp_path / ("ä" + "x" * (room - 2))), Home(tmp_path / ("ä" + "x" * (room - 1)))
    fits.check()
    fits.prepare()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(fits.agent_socket))
    with pytest.raises(SettingsError, match="socket path"):
        too_long.check()


# ---- units ----


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("4MiB", 4 << 20), ("1GiB", 1 << 30), ("1.5 KiB", 1536), ("64kib", 65536)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "4MB", "4M", "-1", "0.3KiB", "1e6", "٣MiB4", "1" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_size(text)


def test_rates_and_durations() -> None:
    assert (parse_rate("200MiB/s"), parse_rate("1GiB"), parse_rate("none")) == (200 << 20, 1 << 30, None)
    assert (parse_duration_s("30"), parse_duration_s("0.5s"), parse_duration_s("2min")) == (30, 0.5, 120)
    for text in ("0", "0MiB/s", "none/s", "x"):
        with pytest.raises(ValueError, match="rate"):
            parse_rate(text)
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s("1 week")


def test_how_numbers_are_shown() -> None:
    assert [format_bytes(n) for n in (0, 999, 1536, 8 << 20, 999 << 20, 3 << 40)] == [
        "0 B",
        "999 B",
        "1.5 KiB",
        "8 MiB",
        "999 MiB",
        "3 TiB",
    ]
    assert [format_eta(s) for s in (0.2, 59, 61, 7322)] == ["1 s", "59 s", "1 min 01 s", "2 h 02 min"]


# ---- the client ----


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.prepare()
    return found


def test_no_socket_or_a_stale_one_means_no_agent(home: Home) -> None:
    with pytest.raises(AgentNotRunning):
        call(home, "ping")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.agent_socket))
    with pytest.raises(AgentNotRunning):
        call(home, "ping")


def test_an_agent_that_does_not_answer_times_out(home: Home) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.agent_socket))
        listener.listen()
        with pytest.raises(AgentFailed) as caught:
            call(home, "start", "v", timeout_s=0.05)
    assert caught.value.timed_out


def _answer(listener: socket.socket, pieces: list[bytes]) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        for piece in pieces:
            connection.sendall(piece)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b'{"code": 3, "text": "no", ', b'"data": [1]}\n'], Result(3, "no", [1])),
        ([b'{"code": 0}\n'], Result(0, "", None)),
        ([], None),
        ([b'{"code": 0, "te'], None),
        ([b"what?\n"], None),
    ],
)
def test_an_answer_is_whole_or_the_agent_went_away(home: Home, pieces: list[bytes], expected: Result | None) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.agent_socket))
        listener.listen()
        peer = threading.Thread(target=_answer, args=(listener, pieces))
        peer.start()
        try:
            if expected is not None:
                assert call(home, "start", "v", {"x": 1}, timeout_s=10) == expected
            else:
                with pytest.raises(AgentFailed, match="went away"):
                    call(home, "start", "v", timeout_s=10)
        finally:
            peer.join()


def test_an_agent_that_cannot_start_says_why(home: Home) -> None:
    with pytest.raises(AgentFailed, match=r"exit code 2.*is not a state URL"):
        ensure_agent(home, "nonsense", "h1")
