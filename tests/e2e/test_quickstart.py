"""scripts/quickstart, smaller: what it claims is so, it can fail, and it leaves nothing behind, whatever ends it."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.poll import wait_for

QUICKSTART = Path(__file__).resolve().parents[2] / "scripts/quickstart"
SMALL = ("--size-mib", "48", "--rate", "20MiB/s")
RUN_LIMIT_S = 150
END_LIMIT_S = 60  # for what runs in the foreground to end, then for cleaning up
MIB = 1 << 20

pytestmark = pytest.mark.xdist_group("quickstart")


@pytest.fixture
def place() -> Iterator[Path]:
    """Where quickstart makes its directory; short, since sockets live below it."""
    with tempfile.TemporaryDirectory(prefix="sv") as directory:
        yield Path(directory)


@contextmanager
def quickstart(place: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Running, with a process group of its own; what it prints is in place/out."""
    environment = dict(os.environ, TMPDIR=str(place))
    with (
        (place / "out").open("w") as out,
        subprocess.Popen(
            [QUICKSTART, *SMALL, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(END_LIMIT_S)


def output(place: Path) -> str:
    return (place / "out").read_text(errors="replace")


def wait_output(place: Path, text: str) -> None:
    wait_for(lambda: text in output(place), RUN_LIMIT_S, f"quickstart prints {text!r}")


def processes_of(place: Path) -> list[str]:
    """Command lines that name a file below `place`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"{place}/" in line:
            found.append(line)
    return found


def nothing_is_left(place: Path) -> None:
    assert [path.name for path in place.iterdir()] == ["out"], output(place)
    assert processes_of(place) == []


def test_it_proves_what_it_says_and_leaves_nothing(place: Path) -> None:
    with quickstart(place) as process:
        code = process.wait(RUN_LIMIT_S)
    told = output(place)
    assert code == 0, told
    proofs = re.findall(r"^   (ok|FAILED) +(.*)$", told, flags=re.MULTILINE)
    assert len(proofs) == 8 and all(mark == "ok" for mark, _ in proofs), told
    claims = " / ".join(text for _, text in proofs)
    for claim in ("load saw no error", "e2fsck", "byte for byte", "the checksums they had", "there after the undo"):
        assert claim in claims, told
    assert "while copying, after the cutover, after the undo, after the commit" in claims, told
    verified = re.search(r"The load: (\d+) writes, (\d+) of them read back and checked, error 0", told)
    assert verified and int(verified[2]) > 0, told
    switches = re.findall(r"^     (cutover|undo) +[\d.]+ ms$", told, flags=re.MULTILINE)
    assert switches == ["cutover", "undo", "cutover"], told
    commands = re.findall(r"^\$ shadowvol (\w+)", told, flags=re.MULTILINE)
    verbs = ["create", "up", "throttle", "start", "status", "cutover", "undo", "cutover", "commit", "status", "down"]
    assert commands == verbs, told
    nothing_is_left(place)


def test_damage_on_the_new_storage_fails_the_proof(place: Path) -> None:
    with quickstart(place) as process:
        wait_output(place, "\n$ shadowvol cutover")
        (target,) = place.glob("quickstart.*/new.img")
        with target.open("r+b") as file:
            for offset in range(0, 48 * MIB, MIB):
                os.pwrite(file.fileno(), b"damage", offset + 4000)
        code = process.wait(RUN_LIMIT_S)
    told = output(place)
    assert code == 1 and "NOT everything held" in told, told
    assert "FAILED  the file system on the target is the one that was on the source" in told, told
    nothing_is_left(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_in_the_middle_it_leaves_nothing(place: Path, number: signal.Signals) -> None:
    """Ctrl-C signals the whole group, a service manager or `kill` the script alone."""
    with quickstart(place) as process:
        wait_output(place, "\n   copying")
        assert processes_of(place), output(place)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(END_LIMIT_S) == 128 + number, output(place)
    nothing_is_left(place)


def test_two_at_once_do_not_meet_and_keep_keeps(place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="sv") as other:
        with quickstart(place, "--keep") as first, quickstart(Path(other)) as second:
            codes = first.wait(RUN_LIMIT_S), second.wait(RUN_LIMIT_S)
        assert codes == (0, 0), output(place) + output(Path(other))
        nothing_is_left(Path(other))
    assert processes_of(place) == []
    (kept,) = place.glob("quickstart.*")
    assert {"old.img", "new.img", "home", "fio.json"} <= {path.name for path in kept.iterdir()}
    assert f"Kept: {kept} " in output(place)


@pytest.mark.parametrize("options", [("--size-mib", "8"), ("--size-mib", "x"), ("--colour",), ("--rate",)])
def test_bad_options_are_refused_before_anything_is_made(place: Path, options: tuple[str, ...]) -> None:
    with quickstart(place, *options) as process:
        assert process.wait(END_LIMIT_S) == 2, output(place)
    assert output(place).startswith("quickstart: ")
    nothing_is_left(place)
