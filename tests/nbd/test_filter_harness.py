"""The C filter alone under thousands of flips, with an exact checker (filter_harness.c), also under the sanitizers.

Each rule that the harness checks is found when what holds it up is left out.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.filter_build import HARNESS, compile_c

FLIPS = 20_000  # about a second
FLIPS_OMITTED = 200_000  # it ends at the first offence, long before
LIMIT_S = 200
PLAIN = ("-O2",)
# The harness does not use all of the filter.
FLAGS = ("-Wno-unused", "-g")
THREAD = ("-O1", "-fsanitize=thread")
ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(params=["harness"])
def data_path(request: pytest.FixtureRequest) -> str:
    """No member here."""
    return str(request.param)


def run(folder: Path, flags: tuple[str, ...], seed: int, flips: int, *omit: str) -> "subprocess.CompletedProcess[str]":
    program = compile_c(HARNESS, folder / "harness", *flags, *FLAGS)
    command = [str(program), str(folder), str(seed), str(flips), *omit]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize("flags", [PLAIN, THREAD, ADDRESS], ids=["plain", "thread", "address"])
@pytest.mark.parametrize("seed", [1, 2])
def test_flips_under_load_keep_every_rule(tmp_path: Path, flags: tuple[str, ...], seed: int) -> None:
    done = run(tmp_path, flags, seed, FLIPS)
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(done.stdout)
    assert counted["fast"] > 1000
    assert counted["handed_over"] > 10
    assert counted["taken"] > 0, "some flip met I/O in flight"


@pytest.mark.parametrize(
    ("flags", "omit"),
    [(PLAIN, ("drain",)), (PLAIN, ("take",)), (PLAIN, ("notes",)), ((*PLAIN, "-DOMIT_OVERLAP"), ())],
    ids=["drain", "take", "notes", "overlap"],
)
def test_what_is_left_out_is_found(tmp_path: Path, flags: tuple[str, ...], omit: tuple[str, ...]) -> None:
    done = run(tmp_path, flags, 1, FLIPS_OMITTED, *omit)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("broken: "), done.stderr
