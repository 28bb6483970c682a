"""Tests of the source text itself: house rules that a reader would otherwise have to remember.

Each rule is a function from text to a list of offences, applied to the whole repository by one test and to a planted
offence by another, so that a rule which can no longer find anything fails as well. Layers and the modules forbidden in
core are read from pyproject.toml: import-linter and these tests judge by the same lists.
"""

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "shadowvol"

# Ratchets: they may be lowered, never raised. The house rules ask for about 70 and 400.
FUNCTION_LINES_MAX = 90
MODULE_LINES_MAX = 500

# Made by tools; skipped where git cannot say what belongs to the source.
GENERATED = re.compile(r"\.(?!ci$|gitignore$).*|__pycache__|build|dist|.*\.egg-info")
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(?:work|root|farm|tmp/bash_jobs)(?:/|(?=[\"'`]))")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
DOCS_WITH_NAMES = ("docs/architecture.md", "docs/concurrency.md", "docs/failures.md", "docs/service.md")
SOURCE_SUFFIXES = (".py", ".c", ".h", ".md", ".toml", ".sh", ".txt", ".lock", ".html")


# ---- what belongs to the source ----


@cache
def source_files() -> tuple[Path, ...]:
    """Every file of the repository that git tracks or would add; without git, every file outside generated folders."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60).stdout
        names = sorted(name for name in os.fsdecode(listing).split("\0") if name)
        return tuple(path for path in (ROOT / name for name in names) if path.is_file())
    files = (path for path in sorted(ROOT.rglob("*")) if path.is_file())
    return tuple(path for path in files if not any(map(GENERATED.fullmatch, path.relative_to(ROOT).parts)))


def text_of(path: Path) -> str:
    """The file's text; empty for binary files."""
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode(errors="replace")


def python_files(folder: Path) -> list[Path]:
    return [path for path in source_files() if path.suffix == ".py" and path.is_relative_to(folder)]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def offences_in(files: list[Path], rule: Callable[[str], list[str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{offence}" for path in files for offence in rule(text_of(path))]


def none_of(offences: list[str]) -> None:
    """Fail with every offence on a line of its own."""
    if offences:
        pytest.fail("\n".join(offences), pytrace=False)


# ---- the rules: text in, offences ("line: what") out ----


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> the dotted name that it stands for, for every import in the module."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def timed_waits(text: str) -> list[str]:
    tree = ast.parse(text)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{names.get(node.value.id, '')}.{node.attr}"
        elif isinstance(node, ast.Name):
            called = names.get(node.id, "")
        else:
            continue
        if called in ("time.sleep", "trio.sleep", "trio.sleep_until", "asyncio.sleep"):
            found.append(f"{node.lineno}: {called}; use tests/support/poll.py")
    return found


WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.datetime.now", "datetime.datetime.utcnow", "time.localtime")


def wall_clocks(text: str) -> list[str]:
    tree = ast.parse(text)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = ast.unparse(node).partition(".")
            if f"{names.get(first, '')}{'.' if rest else ''}{rest}" in WALL_CLOCKS:
                found.append(f"{node.lineno}: the time of day can be set back; use time.monotonic")
    return found


def prints(text: str) -> list[str]:
    return [
        f"{node.lineno}: print() outside the command line; use logging"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def swallowed_exceptions(text: str) -> list[str]:
    broad = ("Exception", "BaseException")
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in broad)
            silent = all(
                isinstance(line, ast.Pass) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            if caught and silent:
                found.append(f"{node.lineno}: every exception is caught and forgotten")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
            if any(isinstance(arg, ast.Name) and arg.id in broad for arg in node.args):
                found.append(f"{node.lineno}: every exception is suppressed")
    return found


def excessive_lengths(text: str) -> list[str]:
    found = []
    line_count = len(text.splitlines())
    if line_count > MODULE_LINES_MAX:
        found.append(f"1: module of {line_count} lines; at most {MODULE_LINES_MAX}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            line_count = node.end_lineno - node.lineno + 1
            if line_count > FUNCTION_LINES_MAX:
                found.append(f"{node.lineno}: {node.name} has {line_count} lines; at most {FUNCTION_LINES_MAX}")
    return found


def matches(pattern: re.Pattern[str], what: str) -> Callable[[str], list[str]]:
    def rule(text: str) -> list[str]:
        return [
            f"{number}: {what}: {match.group()}"
            for number, line in enumerate(text.splitlines(), 1)
            for match in pattern.finditer(line)
        ]

    return rule


machine_paths = matches(MACHINE_PATH, "absolute path of one machine")
unfinished_marks = matches(UNFINISHED, "unfinished")


# ---- imports ----


def imports_of(text: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module of `package` imports, relative imports resolved."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(parents + ([base] if base else []))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layers() -> list[set[str]]:
    """The layers of pyproject.toml, highest first; each a set of folder names."""
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    return [{name.strip(" ()") for name in layer.split("|")} for layer in contract["layers"]]


def forbidden_in_core() -> set[str]:
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "forbidden")
    return set(contract["forbidden_modules"])


def layer_offences(text: str, folder: str, package: str) -> list[str]:
    """Imports of a sibling or of a higher layer, in a module of shadowvol/<folder>."""
    ranks = {name: rank for rank, layer in enumerate(layers()) for name in layer}
    found = []
    for line, name in imports_of(text, package):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "shadowvol" and other in ranks and other != folder and ranks[other] <= ranks[folder]:
            found.append(f"{line}: {folder} may not import {name}")
    return found


def impure_imports(text: str, package: str) -> list[str]:
    forbidden = forbidden_in_core()
    return [
        f"{line}: core may not import {name.partition('.')[0]}"
        for line, name in imports_of(text, package)
        if name.partition(".")[0] in forbidden
    ]


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(SRC.parent).parts)


# ---- names in documents ----


@cache
def names_in_tests() -> frozenset[str]:
    """Every function, method, class and module-level name defined under tests/."""
    names = set()
    for path in python_files(ROOT / "tests"):
        tree = ast.parse(text_of(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
        for node in tree.body:
            if isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return frozenset(names)


def path_exists(name: str) -> bool:
    """Relative to the repository or to the package; with wildcards, at least one match; a bare file name, anywhere."""
    if "/" not in name.rstrip("/"):
        return any(path.name == name for path in source_files()) or (ROOT / name).is_dir() or (SRC / name).is_dir()
    return any(base.joinpath(name).exists() or any(base.glob(name)) for base in (ROOT, SRC))


def looks_like_path(name: str) -> bool:
    if not re.fullmatch(r"[\w.*-]+(?:/[\w.*-]+)*/?", name):
        return False
    if "/" not in name:
        return name.endswith((".py", ".c", ".md"))  # bare names like `agent.lock` are files of a running volume
    first = name.partition("/")[0]
    return name.endswith(SOURCE_SUFFIXES) or (ROOT / first).is_dir() or (SRC / first).is_dir()


def missing_names(text: str) -> list[str]:
    """Files and tests named in backticks that do not exist. Fenced blocks are drawings: not read."""
    text = re.sub(r"^```.*?^```", lambda fence: "\n" * fence.group().count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for token in re.findall(r"`([^`]+)`", line):
            name, _, inside = token.partition("::")
            if looks_like_path(name) and not path_exists(name):
                found.append(f"{number}: no such file: {name}")
            test = inside.rpartition("::")[2] if inside else token
            test = test.partition("[")[0]
            if (inside or re.fullmatch(r"test_\w+", test)) and test not in names_in_tests():
                found.append(f"{number}: no such test: {test}")
    return found


def documented_packages(heading: str) -> list[str]:
    """First column of the table under one heading of docs/dependencies.md; every row must give a reason."""
    section = (ROOT / "docs/dependencies.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| \S.* \|$", section, flags=re.MULTILINE)


def requirement_names(requirements: list[str]) -> list[str]:
    return [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]


# ---- the tests ----


def test_tests_wait_only_in_the_poll_helper() -> None:
    poll = ROOT / "tests/support/poll.py"
    files = [path for path in python_files(ROOT / "tests") if path != poll]
    none_of(offences_in(files, timed_waits))


def test_few_places_read_the_time_of_day() -> None:
    """It may be set back by hours: it makes incarnations, besides a count that only grows; times that are shown; and
    deadlines of an operator, which are times of the day."""
    found = [offence.partition(":")[0] for offence in offences_in(python_files(SRC), wall_clocks)]
    agent, deadlines = ["dataplane.py", "pacing.py", "volume.py"], ["src/shadowvol/cli/units.py"]
    assert sorted(found) == [f"src/shadowvol/agent/{name}" for name in agent] + deadlines


def test_only_the_command_line_prints() -> None:
    files = [path for path in python_files(SRC) if not path.is_relative_to(SRC / "cli")]
    none_of(offences_in(files, prints))


def test_no_file_names_a_path_of_one_machine() -> None:
    none_of(offences_in(list(source_files()), machine_paths))


def test_source_has_no_unfinished_marks() -> None:
    none_of(offences_in([path for path in source_files() if path.is_relative_to(SRC)], unfinished_marks))


def test_no_exception_is_swallowed_unseen() -> None:
    none_of(offences_in(python_files(SRC), swallowed_exceptions))


def test_functions_and_modules_stay_short() -> None:
    none_of(offences_in(python_files(SRC), excessive_lengths))


def test_every_module_belongs_to_a_layer() -> None:
    known = set().union(*layers())
    strays = [
        str(path.relative_to(ROOT))
        for path in python_files(SRC)
        if path.relative_to(SRC).parts[0] not in known | {"__init__.py", "__main__.py"}
    ]
    none_of(strays)


def test_imports_point_one_way() -> None:
    """core <- endpoints link clustersync <- transfer nbd fuse <- agent <- cli; siblings do not know each other."""
    known = set().union(*layers())
    found = []
    for path in python_files(SRC):
        folder = path.relative_to(SRC).parts[0]
        if folder in known:
            found += offences_in([path], partial(layer_offences, folder=folder, package=package_of(path)))
    none_of(found)


def test_core_imports_nothing_impure() -> None:
    agreed = {"os", "io", "socket", "time", "random", "threading", "trio", "logging", "subprocess", "sqlite3"}
    assert agreed <= forbidden_in_core()
    found = []
    for path in python_files(SRC / "core"):
        found += offences_in([path], partial(impure_imports, package=package_of(path)))
    none_of(found)


def test_documents_name_only_files_and_tests_that_exist() -> None:
    documents = [ROOT / name for name in DOCS_WITH_NAMES]
    none_of(offences_in([path for path in documents if path.exists()], missing_names))


def test_every_dependency_has_its_reason() -> None:
    project = pyproject()["project"]
    assert documented_packages("Python, at run time") == requirement_names(project["dependencies"])
    development = requirement_names(project["optional-dependencies"]["dev"])
    assert documented_packages("Python, for development and tests") == development
    debian = re.findall(r'^    "([a-z0-9.+-]+)\|', (ROOT / "scripts/setup").read_text(), flags=re.MULTILINE)
    assert debian and documented_packages("Debian 12 packages") == debian


def test_every_python_dependency_is_pinned() -> None:
    project = pyproject()["project"]
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    wanted = set(requirement_names(project["dependencies"] + project["optional-dependencies"]["dev"]))
    assert wanted - locked == set()


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX
LONG_MODULE = "x = 1\n" * (MODULE_LINES_MAX + 1)


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (timed_waits, "import time\ntime.sleep(1)"),
        (timed_waits, "import time as t\nt.sleep(1)"),
        (timed_waits, "from time import sleep as nap\nnap(1)"),
        (timed_waits, "import trio\nasync def f():\n    await trio.sleep(1)"),
        (wall_clocks, "import time\ntime.time_ns()"),
        (wall_clocks, "from datetime import datetime\ndatetime.now()"),
        (prints, "print('x')"),
        (machine_paths, "HOME = '/" + "work/main/x'"),
        (machine_paths, "cwd = '/" + "root'"),
        (unfinished_marks, "# TO" + "DO: later"),
        (swallowed_exceptions, "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_exceptions, "try:\n    f()\nexcept:\n    ..."),
        (swallowed_exceptions, "with contextlib.suppress(Exception):\n    f()"),
        (excessive_lengths, LONG_FUNCTION),
        (excessive_lengths, LONG_MODULE),
        (lambda text: layer_offences(text, "core", "shadowvol.core"), "from shadowvol.link import frames"),
        (lambda text: layer_offences(text, "core", "shadowvol.core"), "from ..link import frames"),
        (lambda text: layer_offences(text, "nbd", "shadowvol.nbd"), "import shadowvol.transfer.copy"),
        (lambda text: layer_offences(text, "agent", "shadowvol.agent"), "from shadowvol import cli"),
        (lambda text: impure_imports(text, "shadowvol.core"), "def f():\n    from time import monotonic"),
        (lambda text: impure_imports(text, "shadowvol.core"), "import os.path"),
        (missing_names, "see `src/shadowvol/core/never_was.py`"),
        (missing_names, "see `core/never_was*`"),
        (missing_names, "see `never_was.py`"),
        (missing_names, "held up by `test_that_never_was`"),
        (missing_names, "held up by `tests/source/test_source.py::test_that_never_was`"),
    ],
)
def test_each_rule_finds_a_planted_offence(rule: Callable[[str], list[str]], planted: str) -> None:
    assert len(rule(planted)) == 1


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        (timed_waits, "clock.sleep(1)\nimport trio\nasync def f():\n    await trio.sleep_forever()"),
        (machine_paths, "https://example.org/work/x, $HOME/root/x, scripts/work/"),
        (swallowed_exceptions, "try:\n    f()\nexcept OSError:\n    pass"),
        (lambda text: layer_offences(text, "agent", "shadowvol.agent"), "import trio\nimport shadowvol.core"),
        (lambda text: impure_imports(text, "shadowvol.core"), "from . import time_marks\nimport enum"),
        (missing_names, "`tests/source/test_source.py::test_imports_point_one_way`"),
        (missing_names, "`scripts/set*`, `core/`, `core/route.py`, `route.py`, `agent.lock`"),
        (missing_names, "`test_imports_point_one_way`, `/dev/nbdN`, `nbd+unix://x`, `a/b`\n```\n`gone.py`\n```"),
    ],
)
def test_no_rule_objects_to_what_is_allowed(rule: Callable[[str], list[str]], allowed: str) -> None:
    assert rule(allowed) == []
