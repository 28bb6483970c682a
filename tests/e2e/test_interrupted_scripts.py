"""A bench or soak that is interrupted leaves nothing: no agent, member, copier or fio, and no files."""

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.poll import wait_for

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
START_LIMIT_S, END_LIMIT_S = 60, 60


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """The scripts put sockets in it, whose paths must be short: pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="sv-") as folder:
        yield Path(folder)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def is_at_work(folder: Path, load: str) -> bool:
    running = processes_of(folder)
    return all(any(what in words for words in running) for what in ("nbdkit", "shadowvol.agent", load))


@pytest.mark.parametrize(
    ("command", "load"),
    [
        (["bench_switch", "--size", "64MiB"], "fio "),
        (["bench_growth", "--sizes", "128MiB", "--counts", "", "--seconds", "3"], "fio "),
        (["soak_kill", "--size", "64MiB", "--hot", "16MiB"], "shadowvol.transfer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_interrupted_script_leaves_no_process_and_no_file(
    short_folder: Path, command: list[str], load: str, number: signal.Signals
) -> None:
    """Interrupted under load, and a second time while it cleans up."""
    name, *options = command
    words = [str(SCRIPTS / name), *options, "--dir", str(short_folder)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as script:
        try:
            wait_for(lambda: is_at_work(short_folder, load) or script.poll() is not None, START_LIMIT_S, "its work")
            if script.poll() is not None:
                raise AssertionError(f"it ended by itself: {script.communicate()[1].decode()}")
            script.send_signal(number)
            script.send_signal(number)
            _, errors = script.communicate(timeout=END_LIMIT_S)
        finally:
            script.kill()
    assert script.returncode == 128 + number and b"Traceback" not in errors, (script.returncode, errors.decode())
    assert processes_of(short_folder) == []
    assert list(short_folder.iterdir()) == []
