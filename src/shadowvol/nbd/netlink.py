"""The kernel's nbd driver over generic netlink: connect, reconfigure, disconnect, and being told of dead links.

Only what `kernelnbd` needs, against a raw socket (linux/nbd-netlink.h, linux/genetlink.h). A request is answered
before `ask` returns, and the kernel looks at the descriptors that a request names while it handles it, so they may be
closed afterwards: it holds its own references. Needs CAP_SYS_ADMIN in the first network namespace.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

CONNECT, DISCONNECT, RECONFIGURE, LINK_DEAD = 1, 2, 3, 4
INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, TIMEOUT, SERVER_FLAGS = 1, 2, 3, 4, 5
SOCKETS, DEAD_CONN_TIMEOUT, BACKEND_IDENTIFIER = 7, 8, 10
_SOCK_ITEM, _SOCK_FD = 1, 1

_NETLINK_GENERIC, _SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 16, 270, 1
_NLMSG_ERROR, _F_REQUEST, _F_ACK = 2, 1, 4
_GENL_CTRL, _CTRL_GETFAMILY = 16, 3
_CTRL_FAMILY_ID, _CTRL_FAMILY_NAME, _CTRL_MCAST_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2
_FAMILY, _GROUP = b"nbd\0", "nbd_mc_group"
_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr and genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # without the flags for "nested" and "in network order"
_RECEIVE_BYTES = 64 << 10
_ANSWER_LIMIT_S = 30.0  # a connect may wait for the disconnect of another
_MESSAGES_MAX = 100  # of foreign ones between a request and its answer


class NoNbdDriver(OSError):
    """The kernel has no nbd driver, or it is not loaded."""


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def attribute(kind: int, content: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(content)
    return _ATTRIBUTE.pack(length, kind) + content + bytes(-length % 4)


def sockets(descriptor: int) -> bytes:
    return attribute(SOCKETS, attribute(_SOCK_ITEM, u32(_SOCK_FD, descriptor)))


def attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    while len(content) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(content)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, content[_ATTRIBUTE.size : length]
        content = content[length + (-length % 4) :]


class NbdNetlink:
    """One netlink socket. With `watch`, it receives the messages about dead links, and sends nothing more."""

    def __init__(self, *, watch: bool = False) -> None:
        self._number = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        try:
            self._socket.settimeout(_ANSWER_LIMIT_S)
            self._socket.bind((0, 0))
            self._family, group = self._find_family()
            if watch:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "NbdNetlink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, command: int, *parts: bytes) -> dict[int, bytes]:
        """Have the driver do it; the attributes of its answer. OSError as the driver said."""
        return self._transact(self._family, command, b"".join(parts))

    def dead_links(self) -> set[int] | None:
        """Wait for messages; the devices whose link died. None: messages were lost, so it may be any."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise
        found = set()
        for family, _, command, content in _messages(data):
            if family == self._family and command == LINK_DEAD:
                found |= {struct.unpack("=I", value)[0] for kind, value in attributes(content) if kind == INDEX}
        return found

    def _find_family(self) -> tuple[int, int]:
        try:
            told = self._transact(_GENL_CTRL, _CTRL_GETFAMILY, attribute(_CTRL_FAMILY_NAME, _FAMILY))
        except FileNotFoundError:
            raise NoNbdDriver(errno.ENODEV, "the kernel has no nbd driver loaded") from None
        group = 0
        for _, one in attributes(told.get(_CTRL_MCAST_GROUPS, b"")):
            parts = dict(attributes(one))
            if parts[_GROUP_NAME].rstrip(b"\0").decode() == _GROUP:
                group = struct.unpack("=I", parts[_GROUP_ID])[0]
        return struct.unpack("=H", told[_CTRL_FAMILY_ID])[0], group

    def _transact(self, family: int, command: int, content: bytes) -> dict[int, bytes]:
        self._number += 1
        length = _HEADER.size + len(content)
        header = _HEADER.pack(length, family, _F_REQUEST | _F_ACK, self._number, 0, command, 1, 0)
        self._socket.send(header + content)
        told: dict[int, bytes] = {}
        for _ in range(_MESSAGES_MAX):
            for kind, number, _, answer in _messages(self._socket.recv(_RECEIVE_BYTES)):
                if number != self._number:
                    continue
                if kind != _NLMSG_ERROR:
                    told.update(attributes(answer))
                    continue
                code = -struct.unpack_from("=i", answer)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return told
        raise OSError(errno.EPROTO, "the nbd driver's answer does not come")


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, number, command, what follows the headers). An error message has no command: its code follows at once."""
    while len(data) >= 16:
        length, kind, _, number, _ = struct.unpack_from("=IHHII", data)
        if length < 16:
            return
        if kind == _NLMSG_ERROR:
            yield kind, number, 0, data[16:length]
        else:
            yield kind, number, data[16] if length > 16 else 0, data[_HEADER.size : length]
        data = data[length + (-length % 4) :]
