"""Load on a mounted file system, in a process of its own: it may hang in the kernel, and the test must not."""

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.support.poll import wait_for

ROOT = Path(__file__).resolve().parents[2]
END_LIMIT_S = 60.0


class DeviceLoad:
    """A running load. As a context manager it is stopped and judged at the end, or killed after an exception."""

    def __init__(self, kind: str, file: Path, log: Path, seed: int = 1) -> None:
        self.file = file
        self._log = log
        log.touch()
        command = [sys.executable, "-m", "tests.support.filewriter", kind, str(file), str(log), str(seed)]
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self._ended = False

    def __enter__(self) -> "DeviceLoad":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        elif not self._ended:
            self._process.kill()

    def acknowledged(self) -> list[int]:
        return [int(line.split()[0]) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def longest_s(self) -> float:
        """The longest time that one acknowledged write took."""
        return max(float(line.split()[1]) for line in self._log.read_text().splitlines(keepends=True))

    def wait_acknowledged(self, more: int, limit_s: float = END_LIMIT_S) -> None:
        """So many more from now on."""
        goal = len(self.acknowledged()) + more
        wait_for(lambda: self._process.poll() is not None or len(self.acknowledged()) >= goal, limit_s, f"{more} more")
        if self._process.poll() is not None:
            self.stop()
            raise AssertionError("the load has ended by itself")

    def stop(self) -> None:
        if self._ended:
            return
        if self._process.poll() is None:
            self._process.terminate()
        _, said = self._process.communicate(timeout=END_LIMIT_S)
        self._ended = True
        assert self._process.returncode == 0, said
