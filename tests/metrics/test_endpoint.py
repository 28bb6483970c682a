"""The endpoint over real sockets: whatever scrapers do, the loop goes on, and the next scrape is served."""

import logging
import socket
import time
import urllib.error
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress

import pytest
import trio

from shadowvol.agent.metrics import endpoint
from shadowvol.agent.metrics.address import MetricsAddress
from shadowvol.agent.metrics.endpoint import CONNECTIONS_MAX, MetricsEndpoint
from shadowvol.agent.metrics.reading import AgentReading, VolumeReading
from tests.support.poll import wait_for_async
from tests.support.scrape import fetch, free_port, hanging_connection, samples_of, value

DEADLINE_S = 20
VOLUMES = tuple(VolumeReading(f"v{number}", None, False) for number in range(50))


async def read() -> AgentReading:
    return AgentReading("h", 0, VOLUMES)


async def served(
    nursery: trio.Nursery, read: Callable[[], Awaitable[AgentReading]] = read, port: int | None = None
) -> MetricsEndpoint:
    one = MetricsEndpoint(MetricsAddress("127.0.0.1", port or free_port()), read)
    nursery.start_soon(one.run)

    async def is_served() -> bool:
        return one.error is None

    await wait_for_async(is_served, DEADLINE_S, "metrics are served")
    return one


async def fetched(one: MetricsEndpoint, path: str = "/metrics") -> str:
    return await trio.to_thread.run_sync(fetch, one.address.port, path)


async def refused(one: MetricsEndpoint, path: str = "/metrics") -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        await fetched(one, path)
    with caught.value as answer:
        return answer.code, answer.read().decode()


async def test_a_scrape_gets_what_was_read_in_the_loop() -> None:
    async with trio.open_nursery() as nursery:
        one = await served(nursery)
        assert one.snapshot() == {"url": f"http://127.0.0.1:{one.address.port}/metrics", "error": None}
        samples = samples_of(await fetched(one))
        assert value(samples, "volume_led", volume="v49") == 0
        assert samples_of(await fetched(one, "/metrics?name[]=shadowvol_phase")) == samples, "a choice is not offered"
        assert (await refused(one, "/"))[0] == 404
        nursery.cancel_scope.cancel()


async def test_scrapers_that_hang_are_few_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with trio.open_nursery() as nursery:
        one = await served(nursery)
        hanging = [hanging_connection(one.address.port) for _ in range(CONNECTIONS_MAX)]
        with closing(socket.create_connection(("127.0.0.1", one.address.port), DEADLINE_S)) as another:
            assert await trio.to_thread.run_sync(another.recv, 1) == b"", "one too many is closed at once"
        monkeypatch.setattr(endpoint, "CONNECTION_LIMIT_S", 0.1)
        for connection in hanging:
            with closing(connection):
                assert await trio.to_thread.run_sync(connection.recv, 1) == b"", "an old one is shut down"

        async def is_served_again() -> bool:
            return "shadowvol_agent_info" in await fetched(one)

        await wait_for_async(is_served_again, DEADLINE_S, "the next scrape is served")
        nursery.cancel_scope.cancel()


async def test_a_scraper_that_does_not_read_holds_up_nobody() -> None:
    """Its answer is larger than what the kernel keeps for it."""
    many = tuple(VolumeReading(f"v{number}", None, False) for number in range(60_000))

    async def read_many() -> AgentReading:
        return AgentReading("h", 0, many)

    async with trio.open_nursery() as nursery:
        one = await served(nursery, read_many)
        with closing(socket.socket()) as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", one.address.port))
            lazy.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            first = await trio.to_thread.run_sync(lazy.recv, 100)
            assert first.startswith(b"HTTP/1.0 200 OK")
            assert 'volume="v59999"' in await fetched(one)
        nursery.cancel_scope.cancel()


async def test_whoever_scrapes_in_a_loop_costs_the_agent_no_more_than_its_members_tell() -> None:
    count = 0

    async def counted() -> AgentReading:
        nonlocal count
        count += 1
        return await read()

    async with trio.open_nursery() as nursery:
        one = await served(nursery, counted)
        begun_s = time.monotonic()
        for _ in range(50):
            await fetched(one)
        assert 1 <= count <= 2 + (time.monotonic() - begun_s) / endpoint.READING_S
        nursery.cancel_scope.cancel()


async def test_a_port_in_use_is_said_once_and_taken_when_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoint, "RETRY_S", 0.05)
    caplog.set_level(logging.INFO, "shadowvol.agent")
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        one = MetricsEndpoint(MetricsAddress("127.0.0.1", port), read)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)

            async def says_why() -> bool:
                return one.error == "another process listens there"

            await wait_for_async(says_why, DEADLINE_S, "it says why not")
            retried_s = time.monotonic() + 4 * endpoint.RETRY_S

            async def has_tried_again() -> bool:
                return time.monotonic() > retried_s

            await wait_for_async(has_tried_again, DEADLINE_S, "some more attempts have failed")
            other.close()

            async def is_served() -> bool:
                return "shadowvol_agent_info" in await fetched(one)

            await wait_for_async(is_served, DEADLINE_S, "metrics are served at last")
            nursery.cancel_scope.cancel()
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and f":{port}/metrics cannot be used: another process listens there" in errors[0]


async def test_a_reading_that_fails_is_an_error_of_the_scrape_only(caplog: pytest.LogCaptureFixture) -> None:
    fails = True

    async def failing() -> AgentReading:
        if fails:
            raise KeyError("planted")
        return await read()

    async with trio.open_nursery() as nursery:
        one = await served(nursery, failing)
        code, text = await refused(one)
        assert code == 500 and "Traceback" not in text and "planted" not in text
        assert "a scrape failed" in caplog.text
        fails = False
        assert "shadowvol_agent_info" in await fetched(one)
        nursery.cancel_scope.cancel()


async def test_it_ends_at_once_whatever_scrapers_do() -> None:
    async def never() -> AgentReading:
        await trio.sleep_forever()
        raise AssertionError

    async with trio.open_nursery() as nursery:
        one = await served(nursery, never)
        port = one.address.port
        hanging = hanging_connection(port)
        waiting = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        waiting.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        nursery.cancel_scope.cancel()
    with closing(hanging), closing(waiting):
        with suppress(ConnectionResetError):  # where it had not been accepted yet
            assert hanging.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    again = MetricsEndpoint(MetricsAddress("127.0.0.1", port), read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)

        async def is_served() -> bool:
            return again.error is None

        await wait_for_async(is_served, DEADLINE_S, "the next one has the port at once")
        nursery.cancel_scope.cancel()
