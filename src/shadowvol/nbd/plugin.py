"""nbdkit's callbacks, and nothing else: each hands its request to the member of this process.

nbdkit runs this file as its plugin script (`nbdkit python plugin.py spec=JSON`, see serve.py), in Debian's Python, with
several threads at once. A callback that raises gives the client the errno of set_error(); nbdkit prints the exception.
Nothing that is raised here ends the process.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

import nbdkit

from shadowvol.link import logs
from shadowvol.nbd.member import TRACE_FRAMES, GoingDown, Member, MemberSpec
from shadowvol.nbd.serve import LISTEN_FD, lock_memory

API_VERSION = 2

BLOCK_BYTES_PREFERRED = 4096
REQUEST_BYTES_MAX = 32 << 20

FLAG_FUA = nbdkit.FLAG_FUA
FLAG_MAY_TRIM = nbdkit.FLAG_MAY_TRIM
FLAG_FAST_ZERO = nbdkit.FLAG_FAST_ZERO
EXTENT_HOLE = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

# nbdkit prints each exception with its trace; for a failed I/O the one line that says what failed is enough.
# What is not an OSError is our own mistake: _fail prints all of it.
sys.tracebacklimit = 0

_spec: MemberSpec | None = None
_no_filter: str | None = None  # why nbdkit was started without the C filter
_listen_fd: int | None = None
member: Member
data: Any  # member.data, one look-up nearer


def _fail(error: BaseException) -> NoReturn:
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    if not isinstance(error, OSError):
        member.log("".join(traceback.format_exception(error, limit=-TRACE_FRAMES)))
    nbdkit.set_error(number)
    raise OSError(number, getattr(error, "strerror", None) or str(error)) from None


# ---------------------------------------------------------------------- start and stop


def config(key: str, value: str) -> None:
    global _spec, _no_filter
    if key == "spec":
        _spec = MemberSpec.parse(value)
    elif key == "no_filter":
        _no_filter = value
    else:
        raise ValueError(f"unknown parameter {key!r}")


def config_complete() -> None:
    if _spec is None:
        raise ValueError("the parameter spec= is missing")


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    global _listen_fd
    try:
        _listen_fd = os.dup(LISTEN_FD)  # for the agents to come; nbdkit keeps its own
    except OSError:
        _listen_fd = None  # started by hand, without a socket handed over


def after_fork() -> None:
    global member, data
    assert _spec is not None
    lock_memory()
    _die_at_once()
    logs.configure()
    member = Member(_spec, _listen_fd, _no_filter)
    data = member.data
    member.start()


def _die_at_once() -> None:
    """Asked to end, nbdkit would answer its clients with ESHUTDOWN, which the kernel's client takes for an I/O error. A
    member that is just gone is connected to again; what was acknowledged is safe, as after SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def cleanup() -> None:
    if "member" in globals():
        member.stop()


# ---------------------------------------------------------------------- what is offered


def list_exports(readonly: bool, is_tls: bool) -> Iterable[tuple[str, str]]:
    return [(member.spec.volume, member.spec.description)]


def default_export(readonly: bool, is_tls: bool) -> str:
    return member.spec.volume


def preconnect(readonly: bool) -> None:
    """Anybody may connect; `open` refuses while the volume goes down."""


def open(readonly: bool) -> object:
    name = nbdkit.export_name()
    if name not in ("", member.spec.volume):
        nbdkit.set_error(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, f"no export {name!r} here, only {member.spec.volume!r}")
    try:
        member.client_came()
    except GoingDown as error:
        _fail(OSError(errno.ESHUTDOWN, str(error)))
    return "client"


def close(handle: object) -> None:
    member.client_left()


def export_description(handle: object) -> str:
    return member.spec.description


def get_size(handle: object) -> int:
    return member.geometry.size_bytes


def block_size(handle: object) -> tuple[int, int, int]:
    smallest = member.legs.smallest_request_bytes()
    return smallest, max(smallest, BLOCK_BYTES_PREFERRED), REQUEST_BYTES_MAX


def is_rotational(handle: object) -> bool:
    try:
        return member.legs.is_rotational()
    except OSError:
        return False


def can_write(handle: object) -> bool:
    return True


def can_flush(handle: object) -> bool:
    return True


def can_trim(handle: object) -> bool:
    return True


def can_zero(handle: object) -> bool:
    return True


def can_fast_zero(handle: object) -> bool:
    return True


def can_multi_conn(handle: object) -> bool:
    """A flush on one connection is good for the writes of all: it is the member that flushes."""
    return True


def can_extents(handle: object) -> bool:
    return True


def can_fua(handle: object) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_cache(handle: object) -> int:
    return int(nbdkit.CACHE_EMULATE)


# ---------------------------------------------------------------------- I/O


def pread(handle: object, buffer: Any, offset: int, flags: int) -> None:
    try:
        data.pread_into(buffer, offset)
    except BaseException as error:
        _fail(error)


def pwrite(handle: object, buffer: Any, offset: int, flags: int) -> None:
    try:
        data.pwrite(buffer, offset, flags & FLAG_FUA)
    except BaseException as error:
        _fail(error)


def flush(handle: object, flags: int) -> None:
    try:
        data.flush()
    except BaseException as error:
        _fail(error)


def trim(handle: object, count: int, offset: int, flags: int) -> None:
    try:
        data.trim(offset, count, bool(flags & FLAG_FUA))
    except BaseException as error:
        _fail(error)


def zero(handle: object, count: int, offset: int, flags: int) -> None:
    try:
        fua, fast = bool(flags & FLAG_FUA), bool(flags & FLAG_FAST_ZERO)
        data.zero(offset, count, bool(flags & FLAG_MAY_TRIM), fua, fast)
    except BaseException as error:
        _fail(error)


def extents(handle: object, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    try:
        runs = data.extents(count, offset)
    except BaseException as error:
        _fail(error)
    return [(start, length, EXTENT_HOLE if hole else 0) for start, length, hole in runs]
