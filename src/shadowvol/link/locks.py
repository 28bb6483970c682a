"""flock as proof of death: a process holds its lock until the kernel has closed its files (DESIGN 5).

What each process of ours uses, whether it holds a lock or looks for one; agent/dataplane.py also waits for one to fall.
"""

import fcntl
import os
from pathlib import Path


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


def take(path: Path) -> int | None:
    """Hold the lock for the rest of this process's life; None: another process has it."""
    lock = open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
