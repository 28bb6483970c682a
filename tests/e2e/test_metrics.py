"""The metrics endpoint of a real agent: over a whole migration, with scrapers that hang, with its port taken."""

import os
import signal
import socket
import threading
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import nbd
import pytest

from shadowvol.agent.metrics.endpoint import CONNECTIONS_MAX
from tests.support.load import KIB, MIB, Fio
from tests.support.poll import wait_for
from tests.support.product import Product, Volume, make_source
from tests.support.scrape import Samples, free_port, hanging_connection, scrape, state, value

SIZE = 96 * MIB
SCRAPE_EVERY_S = 0.05
ANSWER_LIMIT_MS = 1000.0
READS = 100
OF_THE_COPY = ("shadowvol_copied_bytes_total", "shadowvol_recopied_bytes_total")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the agent that `up` starts will serve metrics."""
    chosen = free_port()
    monkeypatch.setenv("SHADOWVOL_METRICS", str(chosen))
    return chosen


def is_down(samples: Samples) -> Samples | None:
    return samples if value(samples, "member_up", volume="v") == 0 else None


class Scraper:
    """Scrapes until stop(); keeps all that it got."""

    def __init__(self, port: int) -> None:
        self.seen: list[Samples] = []
        self._port = port
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(SCRAPE_EVERY_S):
                self.seen.append(scrape(self._port))
        except Exception as error:
            self._failure = error

    def wait_more(self) -> Samples:
        """The newest of what was scraped from now on, with numbers that the member told from now on."""
        goal = len(self.seen) + 30
        wait_for(lambda: len(self.seen) >= goal or self._failure, 60, "more scrapes")
        assert self._failure is None, self._failure
        return self.seen[-1]

    def stop(self) -> list[Samples]:
        self._stopping.set()
        self._thread.join(30)
        assert self._failure is None, self._failure
        return self.seen


def counters(samples: Samples) -> Samples:
    """What must never go down while the member lives."""
    ends = ("_total", "_bucket", "_count", "_sum")
    return {
        key: found
        for key, found in samples.items()
        if key[0].startswith("shadowvol_") and key[0].endswith(ends) and key[0] not in OF_THE_COPY
    }


def test_over_a_whole_migration(port: int, product: Product, legs: Path, tmp_path: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", SIZE), legs / "target")
    member = product.pid("v", "member")
    scraper = Scraper(port)
    with Fio(tmp_path, volume.uri, "--rw=randrw", "--bs=4k", "--iodepth=4", f"--size={SIZE}", "--rate_iops=400,400"):
        before = scraper.wait_more()
        assert state(before, "phase", "phase", volume="v") == "setup"
        assert value(before, "regions_ok", volume="v", leg="target") == 0
        assert state(before, "leg_health", "health", volume="v", leg="source") == "ok"
        volume.run("throttle", "--rate", "1MiB/s")
        volume.run("start")
        copying = scraper.wait_more()
        assert state(copying, "phase", "phase", volume="v") == "copying"
        assert value(copying, "throttle_rate_bytes_per_second", volume="v") == MIB
        wait_for(lambda: value(scraper.seen[-1], "windows_open", volume="v"), 20, "a window is open")
        wait_for(lambda: value(scraper.seen[-1], "copy_rate_bytes_per_second", volume="v"), 20, "there is a rate")
        volume.run("pause")
        paused = scraper.wait_more()
        assert value(paused, "copy_paused", volume="v") == 1
        assert state(paused, "copy_state", "state", volume="v") == "paused"
        volume.run("throttle", "--rate", "none")
        volume.run("resume")
        volume.wait_synced()
        volume.run("cutover")
        synced = scraper.wait_more()
        assert state(synced, "phase", "phase", volume="v") == "synced"
        assert state(synced, "preferred_leg", "leg", volume="v") == "target"
        assert value(synced, "copy_paused", volume="v") == 0
        assert value(synced, "regions_both_ok", volume="v") == value(synced, "regions", volume="v")
        assert (value(synced, "copied_bytes_total", volume="v") or 0) >= SIZE // 2
        assert 0 < (value(synced, "last_switch_pause_seconds", volume="v") or 0) < 5
        assert value(synced, "undo_available", volume="v") == 1
        volume.run("undo")
        volume.run("cutover")
        volume.run("commit")
        committed = scraper.wait_more()
        assert state(committed, "phase", "phase", volume="v") == "committed"
        assert state(committed, "leg_health", "health", volume="v", leg="source") == "released"
    seen = scraper.stop()
    assert product.pid("v", "member") == member
    for earlier, later in pairwise(seen):
        for key, found in counters(earlier).items():
            assert counters(later).get(key, found) >= found, key
    for operation in ("read", "write"):
        labels = {"volume": "v", "operation": operation}

        def is_last(operation: str = operation, labels: dict[str, str] = labels) -> bool:
            return value(scrape(port), "operations_total", **labels) == volume.status()["io"][f"{operation}s"]

        wait_for(is_last, 10, "both show the last statistics")
        io, last = volume.status()["io"], scrape(port)
        assert (value(last, "operations_total", **labels) or 0) > 1000
        assert value(last, "latency_seconds_count", **labels) == io[f"{operation}s"]
        assert (value(last, "latency_seconds_sum", **labels) or 0) > 0
        assert value(last, "transferred_bytes_total", **labels) == io[f"{operation}s"] * 4 * KIB


def test_scrapers_that_hang_do_not_disturb_the_agent(port: int, product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 16 * MIB), legs / "target")
    wait_for(lambda: scrape(port), 20, "metrics are served")
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            stack.enter_context(closing(hanging_connection(port)))
        with closing(socket.create_connection(("127.0.0.1", port), 20)) as another:
            assert another.recv(1) == b""
        volume.run("start")
        volume.wait_synced()
        assert max(volume.switches_ms(2)) < ANSWER_LIMIT_MS
        wait_for(lambda: scrape(port), 30, "the hanging ones have been shut down, and a scrape is served")


def test_a_port_in_use_stops_no_volume_and_doctor_says_so(port: int, product: Product, legs: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", port))):
        volume = Volume.make(product, make_source(legs / "source", 16 * MIB), legs / "target")
        volume.run("start")
        volume.wait_synced()
        said = product.run("doctor")
        assert f"missing  metrics at http://127.0.0.1:{port}/metrics (optional): another process listens there" in said
        assert product.log().count("cannot be used") == 1
    wait_for(lambda: scrape(port), 30, "metrics are served when the port is free")
    assert f"ok       metrics at http://127.0.0.1:{port}/metrics" in product.run("doctor")


def test_numbers_of_a_member_that_was_killed_or_stopped_are_gone(port: int, product: Product, legs: Path) -> None:
    volume = Volume.make(product, make_source(legs / "source", 16 * MIB), legs / "target")
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    for _ in range(READS):
        client.pread(512, 0)

    def reads(samples: Samples) -> float | None:
        return value(samples, "operations_total", volume="v", operation="read")

    wait_for(lambda: reads(scrape(port)) == READS, 20, "the reads are counted")
    scraper = Scraper(port)
    product.kill("v", "member")
    wait_for(lambda: scraper.seen and reads(scraper.seen[-1]) == 0, 20, "the next one counts from zero")
    seen = [reads(samples) for samples in scraper.stop()]
    last_old = max((index for index, found in enumerate(seen) if found == READS), default=-1)
    assert set(seen[: last_old + 1]) <= {READS} and set(seen[last_old + 1 :]) <= {None, 0}, seen

    pid = product.pid("v", "member")
    os.kill(pid, signal.SIGSTOP)
    try:
        stopped = wait_for(lambda: is_down(scrape(port)), 20, "it is seen not to tell")
        assert stopped and reads(stopped) is None and state(stopped, "phase", "phase", volume="v") == "setup"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: reads(scrape(port)) == 0, 20, "it tells again")
    volume.run("down")
    wait_for(lambda: value(scrape(port), "member_up", volume="v") is None, 20, "a volume that is down is not told of")


def test_without_the_option_nobody_listens(product: Product, legs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHADOWVOL_METRICS", raising=False)
    Volume.make(product, make_source(legs / "source", 16 * MIB), legs / "target")
    assert "metrics" not in product.run("doctor").replace("prometheus", "") and "metrics" not in product.log()


@pytest.mark.parametrize("given", ["flag", "environment of agent", "environment of up"])
def test_a_bad_address_is_refused_before_anything_starts(
    given: str, product: Product, legs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("agent", "--metrics", "nowhere:1") if given == "flag" else (given.rpartition(" ")[2],)
    if given != "flag":
        monkeypatch.setenv("SHADOWVOL_METRICS", "nowhere:1")
    source, target = str(make_source(legs / "source", MIB)), str(legs / "target")
    product.run("create", "v", "--source", source, "--target", target, "--provision")
    said = product.refused(*words, code=2)
    assert "'nowhere' is not an IP address" in said
    assert not (product.home / "run" / "agent.lock").exists()
