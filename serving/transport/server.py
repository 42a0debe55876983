"""The native server: a method table, listening sockets, and a stop that loses no call."""

import asyncio
from contextlib import suppress

from serving.transport.connection import Connection
from serving.transport.connection_limits import FLOOD, FULL, ConnectionLimits, note_limit
from serving.transport.counts import ConnectionFigures, Figures
from serving.transport.frame_reader import HEADER_SECONDS
from serving.transport.handshakes import TlsContexts, TlsListener
from serving.transport.listener import Listener
from serving.transport.memory import Memory
from serving.transport.methods import Method, Peer, Table, TransportLimits
from serving.transport.sockets import UnixSocket, listen_tcp
from serving.transport.terms import Terms
from serving.transport.unpacking import Unpacker

_LAST_SECONDS = 0.2  # time after the grace for the last bytes to leave
_CHECKS_PER_LIMIT = 4  # looks at calls and connections within the shortest time after which one of them is ended


class GrpcServer:
    """A TransportServer for gRPC over HTTP/2.

    tls: the certificates for the ports, None for no encryption. A Unix socket is never encrypted. connection_age:
    seconds after which a client's connection is renewed; 0 for never. grace: seconds that the calls of such a
    connection get to finish. memory: of all calls, which other servers may share; None for one of its own.
    """

    def __init__(
        self,
        limits: TransportLimits,
        connection_age: float = 0.0,
        grace: float = 0.0,
        tls: TlsContexts | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._methods: dict[str, Method] = {}
        self._connections: set[Connection] = set()
        self._listening: list[Listener] = []
        self._unix_sockets: list[UnixSocket] = []
        self._empty = asyncio.Event()
        self._looking: asyncio.TimerHandle | None = None
        #: The bytes that each call holds.
        self.memory = memory or Memory(limits.bytes_under_way, limits.stall_seconds)
        self._unpacker = Unpacker()
        self._terms = Terms(
            limits,
            self.memory,
            self._unpacker,
            self._methods.get,
            self._opened,
            self._lost,
            connection_age,
            grace,
        )
        self._tls = tls
        self._numbers = ConnectionLimits(limits)
        times = (limits.stall_seconds, limits.idle_seconds or HEADER_SECONDS, HEADER_SECONDS)
        self._check_seconds = min(times) / _CHECKS_PER_LIMIT

    def add_methods(self, methods: Table) -> None:
        """Add methods. Call it before ``start``."""
        self._methods |= methods

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError.

        The port belongs to this server at once. Connections that come before ``start`` wait.
        """
        opened = listen_tcp(host, port)
        bound: int = opened[0].getsockname()[1]
        for one in opened:
            self._listening.append(
                TlsListener(one, self._tls.grpc_context, self._connection, self._terms.limits, self._refuses)
                if self._tls
                else Listener(one, self._connection, self._refuses)
            )
        return bound

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, and replace a file on which no server listens. Raises OSError."""
        opened = UnixSocket(path)
        self._unix_sockets.append(opened)
        self._listening.append(Listener(opened.socket, self._connection, self._refuses))

    async def start(self) -> None:
        """Start to accept connections."""
        for listening in self._listening:
            listening.start_serving()
        self._look_around()

    async def drain(self, grace: float) -> None:
        """Refuse new connections and calls. Return when the clients know, or have gone.

        Calls on their way are accepted, and calls in flight go on, for at most ``grace`` seconds. gRPC's clients send
        later calls elsewhere by themselves.
        """
        for listening in self._listening:
            listening.close()
        while self._unix_sockets:
            self._unix_sockets.pop().unlink()
        connections = list(self._connections)
        for connection in connections:
            connection.drain(grace)
        await asyncio.gather(*(connection.told for connection in connections))

    async def stop(self, grace: float) -> None:
        """Drain, wait at most ``grace`` seconds for the calls in flight, and then end them."""
        draining = asyncio.create_task(self.drain(grace))
        await asyncio.sleep(0)  # let it close the listening sockets, so that no connection is added
        if self._connections:
            self._empty.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for connection in list(self._connections):
            connection.cut_off()
        if self._connections:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), _LAST_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        if self._looking:
            self._looking.cancel()
        await draining
        self._unpacker.close()

    @property
    def figures(self) -> Figures:
        """Return the server's figures."""
        counts, limits = self._terms.counts, self._terms.limits
        connections = ConnectionFigures(lambda: len(self._connections), counts)
        return Figures(self._open_calls, self._held_bytes, limits.bytes_under_way, counts.evicted, connections)

    def _open_calls(self) -> int:
        """Return the number of open calls. Any thread may call it."""
        return sum(len(one.calls) for one in tuple(self._connections))

    def _held_bytes(self) -> int:
        """Return the bytes that the calls of this server hold. Any thread may call it."""
        return sum(one.owner.held for one in tuple(self._connections) if one.owner)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _connection(self) -> Connection:
        return Connection(self._terms, self._loop)

    def _refuses(self, address: str) -> bool:
        """Return True if one more connection of an address would exceed a limit. An idle one may end for its sake."""
        limit = self._numbers.refusal(address)
        if limit == FULL:
            idle = self._numbers.replaceable(address, self._connections, self._loop.time())
            if idle:
                self._numbers.leave(idle.address)
                self._numbers.replaced += 1
                idle.replace()
                return False
        if limit:
            note_limit(limit, self._terms.limits, Peer(address))
        return bool(limit)

    def _opened(self, connection: Connection, address: str) -> bool:
        if self._refuses(address):
            return False
        self._numbers.enter(address)
        self._terms.counts.accepted += 1
        self._connections.add(connection)
        return True

    def _lost(self, connection: Connection) -> None:
        if connection.replaced:
            self._numbers.replaced -= 1
        else:
            self._numbers.leave(connection.address)
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _look_around(self) -> None:
        """End what its clients do not bring further: calls and connections. Schedule the next look, whatever comes."""
        self._looking = self._loop.call_later(self._check_seconds, self._look_around)
        now = self._loop.time()
        self.memory.evict_stalled(now)
        for connection in list(self._connections):
            if connection.records and connection.records.are_empty():
                note_limit(FLOOD, self._terms.limits, Peer(connection.address))
                connection.abort()
            else:
                connection.check(now)
