"""The method table: the typed contract between a transport and the handlers of methods.

A table maps a method's path, ``/service/method``, to one of three kinds of method. Both transports serve one table.
"""

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import grpc

from serving.transport.counts import Figures
from serving.transport.headers import Metadata, Status
from serving.transport.memory import STALL_SECONDS
from serving.transport.rounds import Result

#: The address of each client of a Unix socket.
UNIX_ADDRESS = "unix"
_MAX_COMMON_NAME_CHARACTERS = 64  # ub-common-name of RFC 5280, appendix A.1
_IPV6_NETWORK_BITS = 64  # of the network that one subscriber gets


class Abort(Exception):
    """An exception with which a handler ends its call with a status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.text)
        self.status = status


class Peer(NamedTuple):
    """The client of a connection.

    address: its IP address, or UNIX_ADDRESS. subject: the common name in its verified certificate (see
    ``common_name``), or "" without one.
    name: the name by which this server's list of clients knows it, or "" if it is not known, or not yet. connection: a
    key of the connection, which all connections to a Unix socket share.
    """

    address: str
    subject: str = ""
    name: str = ""
    connection: str = ""


def peer_of(address: object, certificate: Mapping[str, Iterable[Iterable[tuple[str, str]]]] | None) -> Peer:
    """Return the client of a connection.

    address: of asyncio's ``peername``. certificate: of its ``peercert``, or None.
    """
    host = connection = UNIX_ADDRESS
    if isinstance(address, tuple):
        host = str(address[0])
        connection = f"{host} {address[1]}"
    subject = certificate.get("subject", ()) if certificate else ()
    names = [value for part in subject for key, value in part if key == "commonName"]
    return Peer(host, common_name(names), connection=connection)


def common_name(names: Sequence[str]) -> str:
    """Return the common name of a certificate that has these, or "".

    Which of several names counts is not defined, so none does. Neither does one that is longer than RFC 5280 allows.
    """
    return names[0] if len(names) == 1 and len(names[0]) <= _MAX_COMMON_NAME_CHARACTERS else ""


def client_of(address: str) -> str:
    """Return the client that an address stands for: the IPv4 address itself, or the /64 network of IPv6.

    One subscriber has a whole network of IPv6. Other texts than addresses are returned as they are.
    """
    if ":" not in address:
        return address
    try:
        parsed = _parsed(address)
    except ValueError:
        return address
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))


def is_loopback(host: str) -> bool:
    """Return True if a host, perhaps an address in brackets, can be reached from this machine alone."""
    try:
        return host == "localhost" or _parsed(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address without its zone. An IPv4 address that is written as IPv6 becomes IPv4. Raises ValueError."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


class Context(Protocol):
    """The context of a handler. Only the event loop's thread may use it.

    given_up: called once if nobody waits for the answer before there is one. undecided: True until it is known if the
    client may call; the handler sets it to False.
    """

    given_up: Callable[[], object] | None
    undecided: bool

    @property
    def deadline(self) -> float | None:
        """Return the deadline as a time of ``time.monotonic``, or None."""

    @property
    def expired(self) -> bool:
        """Return True if the deadline has ended the call, and not the client."""

    @property
    def over(self) -> bool:
        """Return True if nobody waits for the handler."""

    @property
    def peer(self) -> Peer:
        """Return the client of the connection."""

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""

    def in_turns(self, work: Coroutine[object, None, Result], /) -> Coroutine[object, None, Result]:
        """Return what runs a part of the handler in a task of its own, in turns with the work of other clients."""

    def keep(self, size: int) -> None:
        """Count bytes that a stream's handler keeps, or a negative number of those that it keeps no longer.

        The call may end for want of room.
        """

    def answer(self, data: bytes) -> None:
        """Send the only answer of a unary call, and the status OK."""

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status, after all waiting data."""


#: The answer of a door that accepts a call and does not know yet if its client may call.
UNDECIDED = Status(grpc.StatusCode.OK)
#: The text with which the transport refuses such a call for its size. It tells a stranger no limit and no load.
UNDECIDED_TEXT = "request: too large for this server, or for what it has to do now"
#: A function that is called with the headers of a call: its timeout in seconds or None, its metadata, the number of
#: calls that were accepted before it but are not complete yet, and its client. It returns the status of a refusal,
#: None, or UNDECIDED.
Door = Callable[[float | None, Metadata, int, Peer], Status | None]


@dataclass(frozen=True, slots=True)
class UnaryMethod:
    """A method with one request and one answer, handled by a coroutine.

    answer: returns the answer's bytes, or None after it has called ``answer`` or ``finish`` of the context. It may
    raise Abort.
    """

    answer: Callable[[bytes, Context], Awaitable[bytes | None]]
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class CallbackMethod:
    """A method with one request and one answer, handled without an asyncio task.

    begin: takes the request and returns at once. It calls ``answer`` or ``finish`` of the context then or later. It may
    raise Abort.
    """

    begin: Callable[[bytes, Context], None]
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """A method with any number of requests and answers.

    answers: takes an iterator of the requests, and returns the answers as an asynchronous generator. It may raise
    Abort.
    """

    answers: Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]
    door: Door | None = None


#: The transports that serve a table: this package's server, and gRPC's own server.
TRANSPORTS = ("native", "grpcio")

Method = UnaryMethod | CallbackMethod | StreamMethod
Table = Mapping[str, Method]


def table(service: str, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return a method table of a service's methods. methods: by method name."""
    return {f"/{service}/{name}": method for name, method in methods.items()}


#: A function that is called for each refusal of the transport, with the call's path, client, metadata, code and text.
Refused = Callable[[str, Peer, Metadata, grpc.StatusCode, str], None]

#: The most calls that a client may have open on one connection, unless set otherwise.
DEFAULT_CALLS = 1024


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """The limits for clients.

    message_bytes: the largest message, in bytes.
    bytes_under_way: the most bytes of all requests in flight and of unread answers.
    message_text: the text for clients that exceed message_bytes. memory_setting: the name of the setting of
    bytes_under_way.
    stall_seconds: time without progress after which a call that waits for its client is ended.
    handshake: called with the result of each TLS handshake.
    connections: the most connections of all clients; 0 for any number.
    connections_per_client: the most connections of one client (see ``client_of``) of another machine; 0 for any number.
    calls_per_connection: the most calls that a client may have open on one connection.
    idle_seconds: time without calls after which a connection is closed; 0 for never.
    limited: called with each of CONNECTION_LIMITS (serving.transport.connection_limits) that has refused or ended a
    connection.
    dropped: called with a text for the log, and the client, for each connection that is refused, fails or ends for a
    limit, and for each answer that is not read.
    unread: called with the key of a connection (see Peer) and the rows, about, of each answer that begins to wait for
    its client, and with minus these rows once the client has let the server send all that waited.
    """

    message_bytes: int
    message_text: str
    bytes_under_way: int
    memory_setting: str
    refused: Refused = lambda *_: None
    stall_seconds: float = STALL_SECONDS
    handshake: Callable[[str], object] = lambda _: None
    connections: int = 0
    connections_per_client: int = 0
    calls_per_connection: int = DEFAULT_CALLS
    idle_seconds: float = 0.0
    limited: Callable[[str], object] = lambda _: None
    dropped: Callable[[str, Peer], object] = lambda *_: None
    unread: Callable[[str, int], object] = lambda *_: None

    def no_room(self, used: int, max_bytes: int) -> str:
        """Return the text for a client for whose request there is no memory. used: by all requests."""
        limit = f"the limit is {max_bytes} bytes ({self.memory_setting})"
        return f"requests of {used} bytes are under way; {limit}; try again later"


class TransportServer(Protocol):
    """A server of a method table, with any transport."""

    @property
    def figures(self) -> Figures:
        """Return the server's figures."""

    def add_methods(self, methods: Table) -> None:
        """Add methods. Call it before ``start``."""

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError."""

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, and replace a file on which no server listens. Raises OSError."""

    async def start(self) -> None:
        """Start to accept connections."""

    async def drain(self, grace: float) -> None:
        """Refuse new connections and calls. Calls in flight go on for at most ``grace`` seconds."""

    async def stop(self, grace: float) -> None:
        """Drain, wait at most ``grace`` seconds for the calls in flight, and then end them."""
