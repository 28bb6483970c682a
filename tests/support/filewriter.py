"""A process that writes to a file, and knows what must be in it. Standard library only: it runs in the guest as well.

    python -m tests.support.filewriter blocks FILE LOG SEED    numbered blocks, written and read past the page cache
    python -m tests.support.filewriter sqlite FILE LOG SEED    transactions; a loss of power costs none of them

Each write that was acknowledged adds a line to LOG, which lies elsewhere: its number, and how long it took. SIGTERM
ends it: `blocks` then reads all that it wrote. An error or a wrong byte is exit code 1 with a line on stderr.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time

BLOCK = 4096
BLOCKS = 4096  # 16 MiB
RUN_BLOCKS_MAX = 32
SYNC_EVERY = 20
_HEAD = struct.Struct("<QQ")


_stopping = False


def _stop(*unused: object) -> None:
    global _stopping
    _stopping = True


def _content(block: int, version: int) -> bytes:
    return _HEAD.pack(block, version) * (BLOCK // _HEAD.size)


def _blocks(file: str, log: int, chance: random.Random) -> None:
    versions = [0] * BLOCKS
    buffer = mmap.mmap(-1, RUN_BLOCKS_MAX * BLOCK)  # aligned, for O_DIRECT
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(descriptor, 0, BLOCKS * BLOCK)

    def check(start: int, count: int) -> None:
        view = memoryview(buffer)[: count * BLOCK]
        assert os.preadv(descriptor, [view], start * BLOCK) == count * BLOCK
        for index in range(count):
            block, found = start + index, bytes(view[index * BLOCK : (index + 1) * BLOCK])
            wanted = _content(block, versions[block]) if versions[block] else bytes(BLOCK)
            assert found == wanted, f"block {block}: {_HEAD.unpack_from(found)}, not version {versions[block]}"

    number = 0
    while not _stopping:
        number += 1
        count = chance.randint(1, RUN_BLOCKS_MAX)
        start = chance.randrange(BLOCKS - count)
        buffer[: count * BLOCK] = b"".join(_content(start + index, number) for index in range(count))
        begun_s = time.monotonic()
        assert os.pwritev(descriptor, [memoryview(buffer)[: count * BLOCK]], start * BLOCK) == count * BLOCK
        if number % SYNC_EVERY == 0:
            os.fsync(descriptor)
        os.write(log, f"{number} {time.monotonic() - begun_s:.3f}\n".encode())
        versions[start : start + count] = [number] * count
        check(chance.randrange(BLOCKS - 8), 8)
    os.fsync(descriptor)
    for start in range(0, BLOCKS, RUN_BLOCKS_MAX):
        check(start, RUN_BLOCKS_MAX)


def _sqlite(file: str, log: int, chance: random.Random) -> None:
    import sqlite3  # not in the guest

    database = sqlite3.connect(file, isolation_level=None)
    # A commit is the unlink of the journal. FULL leaves that to the file system's next flush: after a loss of power the
    # journal may be there again, and the transaction is rolled back, on any disk. EXTRA flushes the directory.
    database.execute("PRAGMA synchronous=EXTRA")
    database.execute("CREATE TABLE IF NOT EXISTS done (number INTEGER PRIMARY KEY, content BLOB)")
    number = 0
    while not _stopping:
        number += 1
        begun_s = time.monotonic()
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO done VALUES (?, ?)", (number, chance.randbytes(chance.randint(10, 9000))))
        if number > 50:  # pages are freed and used again
            database.execute("UPDATE done SET content = ? WHERE number = ?", (b"", chance.randint(1, number - 1)))
        database.execute("COMMIT")
        os.write(log, f"{number} {time.monotonic() - begun_s:.3f}\n".encode())
    database.close()


def main() -> int:
    kind, file, log, seed = sys.argv[1:]
    signal.signal(signal.SIGTERM, _stop)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    try:
        {"blocks": _blocks, "sqlite": _sqlite}[kind](file, descriptor, random.Random(int(seed)))
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
