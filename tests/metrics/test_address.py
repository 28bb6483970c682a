"""Where metrics are served: what is understood, and what is refused before anything starts."""

import pytest

from shadowvol.agent.metrics.address import METRICS_VARIABLE, chosen_metrics_address, parse_metrics_address
from shadowvol.agent.paths import SettingsError


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


def test_the_flag_comes_before_the_environment_and_none_is_off() -> None:
    chosen = chosen_metrics_address("1", {METRICS_VARIABLE: "2"})
    assert chosen is not None and chosen.port == 1
    chosen = chosen_metrics_address(None, {METRICS_VARIABLE: "2"})
    assert chosen is not None and chosen.port == 2
    assert chosen_metrics_address(None, {}) is None
    assert chosen_metrics_address(None, {METRICS_VARIABLE: ""}) is None
    with pytest.raises(SettingsError, match=METRICS_VARIABLE):
        chosen_metrics_address(None, {METRICS_VARIABLE: "x"})
    with pytest.raises(SettingsError):
        chosen_metrics_address("", {METRICS_VARIABLE: "2"})  # as from --metrics "$UNSET"
