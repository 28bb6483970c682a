"""Where the metrics endpoint listens: parsed before anything is started."""

import ipaddress
import re
from dataclasses import dataclass

from shadowvol.agent.paths import SettingsError

LOOPBACK = "127.0.0.1"
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """An IP address of this host and a TCP port."""

    address: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.address

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if self.is_ipv6 else self.address
        return f"http://{host}:{self.port}/metrics"


def parse_metrics_address(text: str) -> MetricsAddress:
    """`9464` (loopback), `0.0.0.0:9464`, `[::1]:9464`, `localhost:9464`. Raises SettingsError.

    Names are not looked up: that may take long, and change. A port alone after a colon means all addresses elsewhere,
    and would mean loopback here, so it is refused."""
    address, colon, port = text.strip().rpartition(":")
    if colon and not address:
        raise _wrong(text, f"write {port or 'PORT'} for loopback, or 0.0.0.0:{port or 'PORT'} for every address")
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise _wrong(text, "the port is a number from 1 to 65535")
    if not colon or address == "localhost":
        return MetricsAddress(LOOPBACK, int(port))
    bracketed = address.startswith("[") and address.endswith("]")
    try:
        parsed = ipaddress.ip_address(address[1:-1] if bracketed else address)
    except ValueError:
        raise _wrong(text, f"{address!r} is not an IP address") from None
    if (parsed.version == 6) != bracketed:
        raise _wrong(text, "an IPv6 address is in brackets, and no other")
    if parsed.is_multicast:
        raise _wrong(text, f"{parsed} is a multicast address")
    return MetricsAddress(str(parsed), int(port))


def _wrong(text: str, why: str) -> SettingsError:
    return SettingsError(f"{text!r} is no place for metrics: {why} (ADDRESS:PORT, or PORT for loopback)")
