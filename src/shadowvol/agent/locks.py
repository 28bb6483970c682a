"""flock as proof of death: a process holds its lock until the kernel has closed its files (DESIGN 5)."""

import fcntl
import os
from pathlib import Path

import trio

_WAITING = trio.CapacityLimiter(10_000)  # a thread each; the default limit would cap the volumes at 40


def open_lock(path: Path) -> int:
    """The lock file's descriptor, created if need be; OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def is_free(path: Path) -> bool:
    """Nobody holds it at this moment: whoever did is dead, and nothing of it can still land. Makes no file."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


async def wait_until_free(path: Path) -> None:
    """Returns once the lock has been ours for an instant."""
    lock = open_lock(path)
    try:
        await trio.to_thread.run_sync(fcntl.flock, lock, fcntl.LOCK_EX, abandon_on_cancel=True, limiter=_WAITING)
    finally:
        os.close(lock)


def take(path: Path) -> int | None:
    """Hold the lock for the rest of this process's life; None: another process has it."""
    lock = open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
