"""python -m shadowvol.transfer --volume NAME --control-fd N --lock PATH

Exit codes: 0 the control connection closed, or `quit` · 2 bad usage, or the other end broke the protocol · 3 another
transfer process holds the lock · 70 a bug of ours. The lock is held until the kernel has closed this process's files.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path

from shadowvol.link import locks, logs
from shadowvol.transfer.hardening import harden
from shadowvol.transfer.process import TransferProcess
from shadowvol.transfer.wire import Channel, WireError

EXIT_DONE, EXIT_USAGE, EXIT_LOCKED, EXIT_BUG = 0, 2, 3, 70


_logger = logging.getLogger("shadowvol.transfer")


def _die_of_a_bug(volume: str, failed: threading.ExceptHookArgs) -> None:
    """A thread ended by an exception leaves orders unanswered: better to end, and be started anew by the agent."""
    if failed.exc_value is not None:
        _logger.error("%s: a thread failed", volume, exc_info=failed.exc_value)
    os._exit(EXIT_BUG)


def main() -> int:
    parser = argparse.ArgumentParser(prog="shadowvol.transfer", description="copies between the legs of one volume")
    parser.add_argument("--volume", required=True, help="its name, for the log")
    parser.add_argument("--control-fd", type=int, required=True, help="a connected stream socket")
    parser.add_argument("--lock", required=True, help="file that is locked while this process lives")
    arguments = parser.parse_args()
    logs.configure()
    # Ctrl-C at the agent's terminal is for the agent; this process ends when the agent closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection = socket.socket(fileno=arguments.control_fd)
        lock = locks.take(Path(arguments.lock))
    except OSError as error:
        _logger.error("%s: %s", arguments.volume, error)
        return EXIT_USAGE
    with connection:
        if lock is None:
            _logger.error("%s: %s is held by another transfer process", arguments.volume, arguments.lock)
            return EXIT_LOCKED
        harden()
        threading.excepthook = partial(_die_of_a_bug, arguments.volume)
        try:
            TransferProcess(Channel(connection)).run()
        except WireError as error:
            _logger.error("%s: %s", arguments.volume, error)
            return EXIT_USAGE
    return EXIT_DONE  # `lock` stays open: only the end of the process gives it back


if __name__ == "__main__":
    sys.exit(main())
