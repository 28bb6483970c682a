"""The real console script in a home of its own, and files to be legs."""

import io
import json
import os
import sqlite3
import subprocess
import sysconfig
from collections.abc import Callable
from contextlib import chdir, closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shadowvol.cli.main import main

COMMAND = str(Path(sysconfig.get_path("scripts")) / "shadowvol")
MIB = 1 << 20
RUN_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> None:
        """Ended with this code, one or two lines of error that name `words`, and nothing else."""
        lines = self.err.splitlines()
        assert self.code == code, self
        assert 1 <= len(lines) <= 2 and all(line.startswith("shadowvol: ") for line in lines), self
        assert "Traceback" not in self.err and self.out == "", self
        for word in words:
            assert word in self.err, self


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `shadowvol` in `folder`, with its home below it."""

    folder: Path
    home: Path

    def __call__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> Ended:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SHADOWVOL_")}
        clean |= {"SHADOWVOL_HOME": str(self.home)} | (environment or {})
        command = [COMMAND, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def inside(self, *arguments: str | Path) -> Ended:
        """The same in this process, for tests that ask for many refusals."""
        out, err = io.StringIO(), io.StringIO()
        with chdir(self.folder), redirect_stdout(out), redirect_stderr(err):
            code = main(["--home", str(self.home), *map(str, arguments)])
        return Ended(code, out.getvalue(), err.getvalue())

    def recorded(self) -> list[str]:
        """Keys of all volumes in the record, read without our own code."""
        if not (self.home / "state.sqlite").exists():
            return []
        with closing(sqlite3.connect(self.home / "state.sqlite")) as connection:
            return [key for (key,) in connection.execute("SELECT key FROM kv ORDER BY key")]

    def good(self, *arguments: str | Path) -> str:
        ended = self(*arguments)
        assert ended.code == 0 and ended.err == "", ended
        return ended.out

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.good("status", name, "--json"))
        return found

    def names(self) -> list[str]:
        return [one["name"] for one in json.loads(self.good("status", "--json"))]


@pytest.fixture
def shadowvol(tmp_path: Path) -> Shell:
    return Shell(tmp_path, tmp_path / "home")


@pytest.fixture
def leg(tmp_path: Path) -> Callable[..., Path]:
    """Make a sparse file to be a leg."""

    def make(name: str, size_bytes: int = 8 * MIB) -> Path:
        path = tmp_path / name
        with path.open("xb") as file:
            file.truncate(size_bytes)
        return path

    return make
