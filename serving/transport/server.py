"""The native server: a method table, listening sockets, and a stop that loses no call."""

import asyncio
from contextlib import suppress

from serving.transport.connection import Connection
from serving.transport.memory import Memory
from serving.transport.methods import Method, Table, TransportLimits
from serving.transport.sockets import BACKLOG, UnixSocket, listen_tcp
from serving.transport.terms import Terms

_LAST_SECONDS = 0.2  # after the grace, for the last bytes to leave
_LOOKS_A_STALL = 4  # at who makes no progress, in the time after which it is given up


class GrpcServer:
    """Serves a method table by gRPC over HTTP/2 without encryption (a TransportServer).

    connection_age: seconds after which a client's connection is renewed, 0 for never; grace: seconds that its calls
    then get to finish.
    """

    def __init__(self, limits: TransportLimits, connection_age: float = 0.0, grace: float = 0.0) -> None:
        self._methods: dict[str, Method] = {}
        self._connections: set[Connection] = set()
        self._listening: list[asyncio.AbstractServer] = []
        self._unix_sockets: list[UnixSocket] = []
        self._empty = asyncio.Event()
        self._looking: asyncio.TimerHandle | None = None
        #: Who holds how many bytes.
        self.memory = Memory(limits.bytes_under_way, limits.stall_seconds)
        self._terms = Terms(self._methods.get, limits, self.memory, self._opened, self._lost, connection_age, grace)

    def add_methods(self, methods: Table) -> None:
        """Serve these methods too; before ``start``."""
        self._methods |= methods

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError.

        It is this server's at once; connections that come before ``start`` wait for it.
        """
        opened = listen_tcp(host, port)
        bound: int = opened[0].getsockname()[1]
        for one in opened:
            self._listening.append(
                await self._loop.create_server(self._connection, sock=one, backlog=BACKLOG, start_serving=False)
            )
        return bound

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, in the place of one that nobody listens on. Raises OSError."""
        opened = UnixSocket(path)
        self._unix_sockets.append(opened)
        self._listening.append(
            await self._loop.create_unix_server(
                self._connection, sock=opened.socket, backlog=BACKLOG, start_serving=False
            )
        )

    async def start(self) -> None:
        """Take connections."""
        for listening in self._listening:
            await listening.start_serving()
        self._look_for_stalled()

    async def drain(self, grace: float) -> None:
        """Take no further connection or call; return once the clients know, or have gone.

        Calls that were on their way are taken, and those under way go on, for ``grace`` seconds at most. Later calls a
        client may send elsewhere, which gRPC's clients do by themselves.
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
        """Drain, and wait for the calls under way, for at most ``grace`` seconds; then end them."""
        draining = asyncio.create_task(self.drain(grace))
        await asyncio.sleep(0)  # it closes what listens, so that no connection is added
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

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _connection(self) -> Connection:
        return Connection(self._terms, self._loop)

    def _opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _look_for_stalled(self) -> None:
        """Give up calls whose clients make no progress, now and again and again."""
        self.memory.evict_stalled(self._loop.time())
        self._looking = self._loop.call_later(self.memory.stall_seconds / _LOOKS_A_STALL, self._look_for_stalled)
