"""Builds the C filter, and what is made of it for tests. From the source as it is, whatever scripts/setup built."""

import subprocess
from pathlib import Path

import shadowvol

SOURCE = Path(shadowvol.__file__).resolve().parent / "nbd" / "filter" / "filter.c"
DISTURBED = Path(__file__).resolve().parents[1] / "nbd" / "filter_disturbed.c"
HARNESS = Path(__file__).resolve().parents[1] / "nbd" / "filter_harness.c"
BUILD_LIMIT_S = 120
_SHARED = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden")


def compile_c(source: Path, built: Path, *flags: str) -> Path:
    """`source`, which may include filter.c, becomes `built`; every warning is an error."""
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
    command = ["gcc", *flags, *warnings, "-pthread", f"-I{SOURCE.parent}", str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return built


def build_filter(folder: Path) -> Path:
    return compile_c(SOURCE, folder / "nbdkit-plain-filter.so", *_SHARED)


def build_disturbed_filter(folder: Path) -> Path:
    return compile_c(DISTURBED, folder / "nbdkit-disturbed-filter.so", *_SHARED)


def build_for_another_nbdkit(folder: Path) -> Path:
    """Built for another version of nbdkit, as far as nbdkit can see."""
    built = build_filter(folder)
    version = subprocess.run(["nbdkit", "--version"], capture_output=True, check=True).stdout.split()[1]
    data = built.read_bytes()
    assert data.count(version) == 1, "the version that nbdkit compares"
    built.write_bytes(data.replace(version, b"9" * len(version)))
    return built
