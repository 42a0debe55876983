"""The limits of connections: of all clients together, and of one address."""

import ipaddress
from collections import Counter

from serving.transport.methods import TransportLimits

#: The limits that refuse or end a connection: of all connections; of one address; of time without calls; of frames
#: that advance no call and of headers without end; and of answers that are not read.
FULL, CLIENT, IDLE, FLOOD, UNREAD = CONNECTION_LIMITS = ("full", "client", "idle", "flood", "unread")


class ConnectionLimits:
    """The number of open connections, in all and by address. Pure."""

    def __init__(self, limits: TransportLimits) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._all = 0

    def refusal(self, address: str) -> str:
        """Return the limit that one more connection of an address would exceed, or "".

        The limit of one address holds for other machines only. A proxy on this machine, or clients of a Unix socket,
        may use all connections.
        """
        limits = self._limits
        if 0 < limits.connections <= self._all:
            return FULL
        if 0 < limits.connections_per_client <= self._by_address[address] and not _is_local(address):
            return CLIENT
        return ""

    def enter(self, address: str) -> None:
        """Count a connection."""
        self._all += 1
        self._by_address[address] += 1

    def leave(self, address: str) -> None:
        """Note that a counted connection has ended."""
        self._all -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


def _is_local(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:  # a Unix socket
        return True
