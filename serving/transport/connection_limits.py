"""The limits of connections: of all clients together, and of one client."""

from collections import Counter
from collections.abc import Iterable, Sized
from typing import Protocol, TypeVar

from serving.transport.methods import UNIX_ADDRESS, Peer, TransportLimits, client_of, is_loopback

#: The limits that refuse or end a connection: of all connections; of one client; of all connections, which ends an idle
#: one for the sake of a new one; of time without calls; of frames that advance no call, of headers without end and
#: of what comes while there is no room; and of answers that are not read.
FULL, CLIENT, REPLACED, IDLE, FLOOD, UNREAD = CONNECTION_LIMITS = (
    "full", "client", "replaced", "idle", "flood", "unread",
)  # fmt: skip
#: The texts for the log, of the limits that have no other one there.
TEXTS = {
    FULL: "a connection is refused: all places are taken (max_connections)",
    CLIENT: "a connection is refused: its client has too many (max_connections_per_client)",
    REPLACED: "a connection without calls is closed: a new one gets its place (max_connections)",
    UNREAD: "a connection is closed: its client does not read the answers",
    FLOOD: "a connection is closed: its TLS records hold hardly any bytes, or too many bytes wait to be read",
}
#: Seconds without calls before a connection may be replaced, unless its client has more than its share. Clients that
#: connect again at once would otherwise replace each other without end.
MIN_REPLACED_SECONDS = 10.0
_MAX_REPLACED_SHARE = 1 / 16  # of all connections; so many may be ending while others already have their places
_SEARCH_PAUSE_SECONDS = 0.1  # after a search that found none: it looks at every connection


def note_limit(limit: str, limits: TransportLimits, client: Peer) -> None:
    """Count and log that a limit refuses or ends a client's connection. limit: one of TEXTS."""
    limits.limited(limit)
    limits.dropped(TEXTS[limit], client)


class Calling(Protocol):
    """The part of a connection that shows if its client makes calls. last_stream: the stream of the last one."""

    last_stream: int

    @property
    def calls(self) -> Sized:
        """Return the open calls."""


class Idleness:
    """The time in which a client has made no calls. now: of the event loop, as in all methods."""

    def __init__(self, calling: Calling, now: float) -> None:
        self._calling = calling
        self._since, self._last_stream = now, 0

    def look(self, now: float) -> float:
        """Note the calls since the last look. Return the seconds without any."""
        if not self.seconds(now):
            self._since, self._last_stream = now, self._calling.last_stream
        return now - self._since

    def seconds(self, now: float) -> float:
        """Return the seconds without calls, as far as ``look`` has seen; 0 if there are any."""
        calling = self._calling
        return 0.0 if calling.calls or calling.last_stream != self._last_stream else now - self._since


class Idle(Protocol):
    """The part of a connection that shows if another one may take its place."""

    client: str

    def idle_seconds(self, now: float, /) -> float:
        """Return the seconds without calls; 0 if there are calls, or if the connection is ending."""


Candidate = TypeVar("Candidate", bound=Idle)


class ConnectionLimits:
    """The number of open connections, in all and by client (see ``client_of``). Pure."""

    def __init__(self, limits: TransportLimits) -> None:
        self._limits = limits
        self._by_client: Counter[str] = Counter()
        self._all = 0
        #: The connections that end for the sake of new ones. They do not count.
        self.replaced = 0
        self._search_at = 0.0

    def refusal(self, address: str) -> str:
        """Return the limit that one more connection of an address would exceed, or "".

        The limit of one client holds for other machines only. A proxy on this machine, or clients of a Unix socket,
        may use all connections.
        """
        limits = self._limits
        if 0 < limits.connections_per_client <= self._by_client[client_of(address)] and not _is_local(address):
            return CLIENT
        if 0 < limits.connections <= self._all:
            return FULL
        return ""

    def replaceable(self, address: str, connections: Iterable[Candidate], now: float) -> Candidate | None:
        """Return the connection that should end for the sake of a new one, when there is no room; or None.

        It is the one that has been idle for the longest time: among those of clients with more than their share of all
        connections if there are any, so that a crowd of idle connections goes before an honest client's only one. A
        client with more than its share gets nobody's place, and one with just its share only the place of its own.
        """
        client = client_of(address)
        share = max(1, self._limits.connections // len(self._by_client.keys() | {client}))
        own = self._by_client[client]
        too_many = self.replaced >= self._limits.connections * _MAX_REPLACED_SHARE
        if too_many or own > share or now < self._search_at:
            return None
        best, rank = None, (False, 0.0)
        for connection in connections:
            if (own < share or connection.client == client) and (seconds := connection.idle_seconds(now)) > 0:
                greedy = self._by_client[connection.client] > share
                if (greedy or seconds >= MIN_REPLACED_SECONDS) and (greedy, seconds) > rank:
                    best, rank = connection, (greedy, seconds)
        if best is None:
            self._search_at = now + _SEARCH_PAUSE_SECONDS
        return best

    def enter(self, address: str) -> None:
        """Count a connection."""
        self._all += 1
        self._by_client[client_of(address)] += 1

    def leave(self, address: str) -> None:
        """Note that a counted connection has ended, or ends for the sake of a new one."""
        client = client_of(address)
        self._all -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def most_frequent(clients: Iterable[str]) -> str:
    """Return the client that comes most often, the first of several. A crowd gives way before an honest client does."""
    return Counter(clients).most_common(1)[0][0]


def _is_local(address: str) -> bool:
    return address == UNIX_ADDRESS or is_loopback(address)
