"""python -m shadowvol.transfer --control-fd N --lock PATH

Exit codes: 0 the control connection closed, or `quit` · 2 bad usage, or the other end broke the protocol · 3 another
transfer process holds the lock · 70 a bug of ours. The lock is held until the kernel has closed this process's files.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from shadowvol.link import locks
from shadowvol.transfer.hardening import harden
from shadowvol.transfer.process import TransferProcess
from shadowvol.transfer.wire import Channel, WireError

EXIT_DONE, EXIT_USAGE, EXIT_LOCKED, EXIT_BUG = 0, 2, 3, 70


def _die_of_a_bug(failed: threading.ExceptHookArgs) -> None:
    """A thread ended by an exception leaves orders unanswered: better to end, and be started anew by the agent."""
    traceback.print_exception(failed.exc_type, failed.exc_value, failed.exc_traceback)
    os._exit(EXIT_BUG)


def _complain(text: str) -> None:
    """The one line on stderr that goes with an exit code."""
    sys.stderr.write(f"shadowvol.transfer: {text}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="shadowvol.transfer", description="copies between the legs of one volume")
    parser.add_argument("--control-fd", type=int, required=True, help="a connected stream socket")
    parser.add_argument("--lock", required=True, help="file that is locked while this process lives")
    arguments = parser.parse_args()
    # Ctrl-C at the agent's terminal is for the agent; this process ends when the agent closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection = socket.socket(fileno=arguments.control_fd)
        lock = locks.take(Path(arguments.lock))
    except OSError as error:
        _complain(str(error))
        return EXIT_USAGE
    with connection:
        if lock is None:
            _complain(f"{arguments.lock} is held by another transfer process")
            return EXIT_LOCKED
        harden()
        threading.excepthook = _die_of_a_bug
        try:
            TransferProcess(Channel(connection)).run()
        except WireError as error:
            _complain(str(error))
            return EXIT_USAGE
    return EXIT_DONE  # `lock` stays open: only the end of the process gives it back


if __name__ == "__main__":
    sys.exit(main())
