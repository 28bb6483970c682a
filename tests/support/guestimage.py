"""The small guest's kernel and first file system: Debian's cloud kernel with its nbd driver, busybox, nbd-client, the
tools of ext4, and Debian's Python with the part of its library that the tests' programs use. Built once, kept in
.cache.

`image()` builds it where it is missing; what is tested is not in it, but packed by each boot (tests/support/guest.py).
Needs what scripts/setup installs, and the network once, for the kernel's package (about 30 MB).
"""

import fcntl
import gzip
import hashlib
import os
import py_compile
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "guest"
KERNEL = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "ext4", "crc32c_generic")  # those that are not built in
PROGRAMS = ("nbd-client", "mke2fs", "e2fsck")
PYTHON = Path("/usr/bin/python3.11")
LIBRARY = (
    "argparse ctypes dataclasses encodings.ascii encodings.idna encodings.latin_1 encodings.utf_8 errno fcntl glob io "
    "json logging mmap os pathlib random re runpy select shutil signal socket struct subprocess sys sysconfig "
    "threading time typing"
)
APT_LIMIT_S = 300


def image() -> Path:
    """The folder with `vmlinuz` and `base.cpio.gz`."""
    folder = CACHE / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests at once: one builds
        if not (folder / "base.cpio.gz").exists():
            for old in CACHE.glob("*/"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                _build(Path(work))
                (Path(work) / "image").rename(folder)
    return folder


class Archive:
    """A cpio archive as the kernel unpacks it (newc)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def file(self, name: str, content: bytes, mode: int = 0o755, mtime_s: int = 0) -> None:
        self._add(name, stat.S_IFREG | mode, content, mtime_s=mtime_s)

    def folder(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def character_device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, b"", major, minor)

    def copy(self, path: Path, name: str | None = None) -> None:
        """The file that is there, under the name given or its own. Python compiles again what has another time."""
        info = path.stat()
        self.file(name or str(path).lstrip("/"), path.read_bytes(), info.st_mode & 0o777, int(info.st_mtime))

    def python(self, path: Path, name: str) -> None:
        """A source file with its compiled form: the guest is slow."""
        self.copy(path, name)
        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / "compiled"
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(path), cfile=str(compiled), invalidation_mode=mode, doraise=True)
            place, stem = os.path.split(name.removesuffix(".py"))
            self.file(f"{place}/__pycache__/{stem}.cpython-311.pyc", compiled.read_bytes())

    def packed(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return gzip.compress(b"".join(self._parts), 1)

    def _add(self, name: str, mode: int, content: bytes, major: int = 0, minor: int = 0, mtime_s: int = 0) -> None:
        if name in self._names:
            return
        parent = os.path.dirname(name)
        if parent and parent not in self._names:
            self.folder(parent)
        self._names.add(name)
        text = name.encode() + b"\0"
        fields = (len(self._names), mode, 0, 0, 1, mtime_s, len(content), 0, 0, major, minor, len(text), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + text
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]


def _build(work: Path) -> None:
    target = work / "image"
    target.mkdir()
    tree = _kernel(work)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, target / "vmlinuz")
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    for folder in ("proc", "sys", "mnt", "tmp", "etc", "bin"):
        archive.folder(folder)
    archive.copy(Path(which("busybox")), "bin/busybox")
    order = _with_dependencies(tree)
    for module in order:
        archive.copy(module, f"modules/{module.name}")
    archive.file("modules/order", "\n".join(module.name for module in order).encode())
    for program in PROGRAMS:
        _program(archive, Path(which(program)), f"usr/bin/{program}")
    _program(archive, PYTHON, str(PYTHON).lstrip("/"))
    for source in _library():
        archive.copy(source)
        if source.suffix == ".so":
            _libraries(archive, source)
    (target / "base.cpio.gz").write_bytes(archive.packed())


def _kernel(work: Path) -> Path:
    """The unpacked package of the newest cloud kernel."""
    try:
        _download_kernel(work)
    except subprocess.CalledProcessError:  # no lists, or lists older than the archive
        _run("apt-get", "-q", "update")
        _download_kernel(work)
    (package,) = work.glob("*.deb")
    _run("dpkg-deb", "-x", str(package), str(work / "kernel"))
    return work / "kernel"


def _download_kernel(work: Path) -> None:
    depends = _run("apt-cache", "depends", KERNEL)
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    assert package is not None, depends
    _run("apt-get", "-q", "download", package.group(1), cwd=work)


def _with_dependencies(tree: Path) -> list[Path]:
    """The modules in an order in which they can be loaded."""
    there = {_module_name(path): path for path in tree.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = there.get(name)
        if path is None or path in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for each in depends.group(1).decode().split(",") if depends else ():
            add(each.replace("-", "_"))
        order.append(path)

    for name in MODULES:
        add(name)
    assert "nbd" in map(_module_name, order), f"{KERNEL} has no nbd"
    return order


def _module_name(path: Path) -> str:
    return path.stem.replace("-", "_")


def _library() -> list[Path]:
    """The files of Python's library that importing these modules takes."""
    script = f"import sys; [__import__(name) for name in {LIBRARY!r}.split()]; "
    script += "print(*sorted({m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)}), sep='\\n')"
    files = [Path(line) for line in _run(str(PYTHON), "-I", "-S", "-c", script).splitlines()]
    compiled = [path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc" for path in files if path.suffix == ".py"]
    return files + [path for path in compiled if path.exists()]


def _program(archive: Archive, path: Path, name: str) -> None:
    archive.copy(path, name)
    _libraries(archive, path)


def _libraries(archive: Archive, path: Path) -> None:
    for library in libraries_of(path):
        archive.file(str(library).lstrip("/"), library.read_bytes())


def libraries_of(binary: Path) -> list[Path]:
    """The shared libraries that the loader takes for it, its own included."""
    done = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    return [Path(library) for library in re.findall(r"(/\S+) \(0x", done.stdout)]


def which(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found is not None, f"{program} is missing: scripts/setup"
    return found


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(
        command, cwd=cwd, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=APT_LIMIT_S
    ).stdout
