"""`shadowvol agent` in the foreground, as a service manager runs it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shadowvol.agent import client
from shadowvol.agent.paths import Home
from tests.support.poll import wait_for
from tests.support.product import COMMAND, Product

START_LIMIT_S = 30.0
END_LIMIT_S = 30.0


@contextmanager
def starting_agent(
    product: Product, *options: str, environment: Mapping[str, str] | None = None, umask: int = -1
) -> Iterator["subprocess.Popen[bytes]"]:
    """As it has just been started; killed at the end, if it still lives. It logs where `product.log` reads it."""
    product.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with log_file(product).open("ab") as log:
        process = subprocess.Popen(
            [COMMAND, "--home", str(product.home), "agent", *options],
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=dict(os.environ, **(environment or {})),
            umask=umask,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def foreground_agent(
    product: Product, *options: str, environment: Mapping[str, str] | None = None, umask: int = -1
) -> Iterator["subprocess.Popen[bytes]"]:
    """From when it takes verbs; ended by SIGTERM, with exit code 0."""
    with starting_agent(product, *options, environment=environment, umask=umask) as process:
        wait_for(lambda: client.ping(Home(product.home)), START_LIMIT_S, f"the agent answers: {product.log()}")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_LIMIT_S) == 0, product.log()


def log_file(product: Product) -> Path:
    """The agent's log, whoever started it."""
    return Home(product.home).agent_log
