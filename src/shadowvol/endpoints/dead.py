"""A leg that could not be opened. It lets a volume come up on the other leg: every use fails like a broken disk.

Invariant: no operation but close() ever succeeds, and each says why the leg is not there.
"""

import errno
from typing import NoReturn

from shadowvol.endpoints.base import Extent


class DeadEndpoint:
    """Implements Endpoint. `size_bytes`: the leg's recorded size; `error_number`: what each operation raises."""

    def __init__(self, size_bytes: int, reason: str, error_number: int = errno.EIO) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = 512
        self.can_punch = False
        self.reason = reason
        self.error_number = error_number

    def _fail(self) -> NoReturn:
        raise OSError(self.error_number, self.reason)

    def pread_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        self._fail()

    def pwrite(self, data: bytes | memoryview | bytearray, offset: int) -> None:
        self._fail()

    def zero(self, offset: int, length: int, may_punch: bool) -> None:
        self._fail()

    def punch(self, offset: int, length: int) -> None:
        self._fail()

    def flush(self) -> None:
        self._fail()

    def extents(self, offset: int, length: int) -> list[Extent]:
        self._fail()

    def close(self) -> None:
        """Nothing is open."""
