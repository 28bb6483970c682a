"""How commands end that cannot do what they are told: run one, see its code and its line, and that nothing has changed.

Each ending is kept with the test's report; tests/e2e/conftest.py prints all of them as a table at the session's end.
"""

import os
import shlex
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tests.support.product import COMMAND, Product

PROPERTY = "ending"  # of a test report: (name, command, exit code, line)
LIMIT_S = 60
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
_COMMAND_WIDTH, _LINE_WIDTH = 60, 150

Keep = Callable[[str, str, int, str], None]  # name, command, exit code, line


@dataclass(frozen=True, slots=True)
class Ended:
    """`shown`: the command as a person would write it, with the test's own folders left out."""

    code: int
    out: str
    err: str
    shown: str

    @property
    def line(self) -> str:
        return self.err.splitlines()[0].removeprefix("shadowvol: ") if self.err else ""

    def assert_refused(self, code: int, words: Sequence[str]) -> None:
        """Ended with this code and one or two lines of error that have all of `words` in them; never a traceback."""
        lines = self.err.splitlines()
        assert self.code == code, self
        assert 1 <= len(lines) <= 2 and all(line.startswith("shadowvol: ") for line in lines), self
        assert "Traceback" not in self.err and "SHADOWVOL_DEBUG" not in self.err and self.out == "", self
        for word in words:
            assert word in self.err, (word, self)


def run(home: Path, words: Sequence[str], *, nobody: bool = False, hide: Sequence[Path] = ()) -> Ended:
    """One command line with its home in the environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SHADOWVOL_")}
    command = [*(AS_NOBODY if nobody else ()), COMMAND, *words]
    done = subprocess.run(
        command, env=clean | {"SHADOWVOL_HOME": str(home)}, capture_output=True, timeout=LIMIT_S, check=False, cwd="/"
    )
    shown = shlex.join(word.encode(errors="replace").decode().replace("\n", "\\n") for word in words)
    for folder in hide:
        shown = shown.replace(f"{folder}/", "").replace(str(folder), ".")
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return Ended(done.returncode, out, err, shown)


# ---------------------------------------------------------------- what must not change


def picture(products: Sequence[Product], legs: Path) -> dict[str, Any]:
    """Everything that a refused verb leaves alone: the records, key by key; each leg's bytes and times; which files are
    there, in the homes and beside the legs."""
    return {
        "records": [recorded(product.home) for product in products],
        "legs": {str(path.relative_to(legs)): _fingerprint(path) for path in sorted(legs.rglob("*"))},
        "homes": [sorted(str(path) for path in product.home.rglob("*")) for product in products],
    }


def recorded(home: Path) -> dict[str, bytes]:
    """The record, read without our own code."""
    file = home / "state.sqlite"
    if not file.exists():
        return {}
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT key, value FROM kv ORDER BY key"))


def _fingerprint(path: Path) -> tuple[object, ...]:
    info = path.lstat()
    if not path.is_file() or path.is_symlink():
        return (info.st_mode,)
    with path.open("rb") as file:
        return info.st_mode, info.st_size, info.st_mtime_ns, xxhash.xxh3_128_hexdigest(file.read())


# ---------------------------------------------------------------- the table


def table(endings: Sequence[tuple[str, str, int, str]]) -> list[str]:
    """One row each: what, exit code, command, line."""
    name_width = max(len(name) for name, *_ in endings)
    return [
        f"{name:{name_width}}  {code}  {_cut(command, _COMMAND_WIDTH):{_COMMAND_WIDTH}}  {_cut(line, _LINE_WIDTH)}"
        for name, command, code, line in endings
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[len(text) - width // 2 :]}"
