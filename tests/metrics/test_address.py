"""Where metrics are served: what is understood, and what is refused before anything starts."""

from pathlib import Path

import pytest

from shadowvol.agent.metrics.address import MetricsAddress, parse_metrics_address
from shadowvol.agent.paths import SettingsError
from shadowvol.agent.settings import resolve_agent


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("9464", "http://127.0.0.1:9464/metrics"),
        (" 9464 ", "http://127.0.0.1:9464/metrics"),
        ("localhost:1", "http://127.0.0.1:1/metrics"),
        ("0.0.0.0:65535", "http://0.0.0.0:65535/metrics"),
        ("[::1]:9464", "http://[::1]:9464/metrics"),
    ],
)
def test_an_address_and_a_port(text: str, url: str) -> None:
    assert parse_metrics_address(text).url == url


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the port is a number"),
        ("0", "from 1 to 65535"),
        ("65536", "from 1 to 65535"),
        ("-1", "the port is a number"),
        ("94 64", "the port is a number"),
        ("٣٤", "the port is a number"),
        ("127.0.0.1", "the port is a number"),
        ("127.0.0.1:", "the port is a number"),
        ("127.0.0.1:http", "the port is a number"),
        (":9464", "0.0.0.0:9464 for every address"),
        ("1.2.3:9464", "is not an IP address"),
        ("storage.example:9464", "is not an IP address"),
        ("::1:9464", "in brackets"),
        ("[127.0.0.1]:9464", "in brackets"),
        ("224.0.0.1:9464", "multicast"),
        ("http://127.0.0.1:9464", "is not an IP address"),
    ],
)
def test_what_is_no_place_is_refused(text: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        parse_metrics_address(text)


def test_the_flag_comes_before_the_environment_and_none_is_off(tmp_path: Path) -> None:
    def chosen(flag: str | None, **environment: str) -> MetricsAddress | None:
        return resolve_agent({"metrics": flag}, environment=environment, config_file=tmp_path / "none").metrics

    assert chosen("1", SHADOWVOL_METRICS="2") == MetricsAddress("127.0.0.1", 1)
    assert chosen(None, SHADOWVOL_METRICS="2") == MetricsAddress("127.0.0.1", 2)
    assert chosen(None) is None
    assert chosen(None, SHADOWVOL_METRICS="") is None
    with pytest.raises(SettingsError, match="'x' is no place for metrics"):
        chosen(None, SHADOWVOL_METRICS="x")
    with pytest.raises(SettingsError):
        chosen("", SHADOWVOL_METRICS="2")  # as from --metrics "$UNSET"
