"""A file system for the small guest that has the product in it: this checkout with its environment, nbdkit, Python.

Everything lies where it lies on this host, so that nothing has to be told another path. It is mounted read-only, and
programs run in it by chroot; homes and legs are on a disk of their own.
"""

import shutil
import subprocess
from pathlib import Path

from tests.support.guestimage import PYTHON, ROOT, libraries_of, which

MOUNTPOINT = "/system"
SIZE_MIB = 256
PROGRAMS = ("nbdkit", "blkid", "sh")
PLUGIN = Path("/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-python-plugin.so")
LIBRARY = Path("/usr/lib/python3.11")
WRITER = ROOT / "tests" / "support" / "filewriter.py"
FOLDERS = ("proc", "sys", "dev", "tmp", "data", "etc")
LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
# Of the environment what only tests and checks need, and of the library what no program of ours imports.
LEFT_OUT = ("mypy*", "*mypyc*", "ruff*", "pip*", "setuptools*", "hypothesis*", "grimp*", "pytest*", "_pytest*", "test")


def system_image(folder: Path) -> Path:
    """The image, made in `folder`."""
    tree, image = folder / "system", folder / "system.img"
    for name in FOLDERS:
        (tree / name).mkdir(parents=True)
    for name, to in LINKS.items():
        (tree / to).mkdir(parents=True)
        (tree / name).symlink_to(to)
    for place in (LIBRARY, ROOT / ".venv", ROOT / "src"):
        leave_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(place, _inside(tree, place), symlinks=True, ignore=leave_out)
    (tree / "usr/bin/python3").symlink_to(PYTHON.name)
    binaries = [PYTHON, PLUGIN, *(Path(which(name)) for name in PROGRAMS)]
    for path in (*binaries, WRITER):
        _copy(tree, path)
    for binary in (*binaries, *tree.rglob("*.so")):
        for library in libraries_of(binary):
            _copy(tree, library)
    command = [which("mke2fs"), "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(image), f"{SIZE_MIB}M"]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(tree)
    return image


def _inside(tree: Path, path: Path) -> Path:
    return tree / str(path).lstrip("/")


def _copy(tree: Path, path: Path) -> None:
    """What is there under this name, through links."""
    place = _inside(tree, path)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
