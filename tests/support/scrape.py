"""Metrics as Prometheus gets them: fetched over HTTP and read by prometheus_client's own parser."""

import socket
import urllib.request
from contextlib import closing

from prometheus_client.parser import text_string_to_metric_families

SCRAPE_LIMIT_S = 10

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]


def free_port() -> int:
    """Of loopback; nobody listens there now."""
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=SCRAPE_LIMIT_S) as answer:
        return str(answer.read().decode())


def samples_of(text: str) -> Samples:
    """Value by (name, labels); every series is there once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def scrape(port: int) -> Samples:
    return samples_of(fetch(port))


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Of the one series with these labels; None: there is none."""
    return samples.get((f"shadowvol_{name}", frozenset(labels.items())))


def state(samples: Samples, name: str, label: str, **labels: str) -> str | None:
    """Which of a set of states it is."""
    wanted = set(labels.items())
    found = [
        dict(key)[label]
        for (each, key), is_so in samples.items()
        if each == f"shadowvol_{name}" and is_so and wanted <= key
    ]
    assert len(found) <= 1, found
    return found[0] if found else None


def hanging_connection(port: int) -> socket.socket:
    """A scraper that asks for half a request and waits."""
    connection = socket.create_connection(("127.0.0.1", port), SCRAPE_LIMIT_S)
    connection.sendall(b"GET /metrics HT")
    return connection
