"""Completion while an agent runs, or hangs: names at once, or silence soon."""

import os
import signal
import subprocess
import time
from pathlib import Path

from shadowvol.cli.completion import ANSWER_LIMIT_S, VARIABLE
from tests.support.product import COMMAND, MIB, Product, Volume, make_source

SLOW_MACHINE_S = 4.0


def completed(product: Product) -> str:
    """The answer to `shadowvol cutover m` and Tab."""
    asked = {"SHADOWVOL_HOME": str(product.home), VARIABLE: "bash_complete"}
    asked |= {"COMP_WORDS": "shadowvol\ncutover\nm", "COMP_CWORD": "2"}
    done = subprocess.run([COMMAND], env=os.environ | asked, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_an_agent_tells_the_names_and_one_that_hangs_is_not_waited_for(product: Product, legs: Path) -> None:
    Volume.make(product, make_source(legs / "source", MIB), legs / "target", name="mail")
    assert completed(product) == "plain,mail"
    agent = product.pid("mail", "agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        begun_s = time.monotonic()
        assert completed(product) == ""
        assert time.monotonic() - begun_s < ANSWER_LIMIT_S + SLOW_MACHINE_S
    finally:
        os.kill(agent, signal.SIGCONT)
