"""Unix sockets to listen at. A new one is for its owner only, whatever the umask; others may be let in later."""

import os
import socket
from pathlib import Path


def listen_private(path: Path, backlog: int) -> socket.socket:
    """Only where nobody can be listening at `path` any more: what is there is stale, and removed. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    listener.listen(backlog)
    return listener
