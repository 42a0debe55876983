"""The HTTP server: its listening sockets, its connections, and a stop that loses no request."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from uvicorn.config import Config
from uvicorn.server import ServerState

from serving.metrics.registry import Metrics
from serving.settings import Settings
from serving.transport.connection_limits import FULL, TEXTS, ConnectionLimits
from serving.transport.counts import EVICTIONS, MEMORY, Figures
from serving.transport.handshakes import TlsListener
from serving.transport.listener import Listener
from serving.transport.memory import Memory
from serving.transport.methods import Peer, Table, TransportLimits, is_loopback
from serving.transport.rounds import Rounds
from serving.transport.sockets import listen_tcp
from serving.web.application import Application, Terms
from serving.web.connection import KEEP_ALIVE_SECONDS, MAX_HEAD_BYTES, WebConnection
from serving.web.documents import page_files
from serving.web.incoming import BodyLimits

_CHECK_SECONDS = 2.5  # between looks at the connections
_LAST_SECONDS = 0.5  # time after the grace for the last answers to leave
_PROTOCOLS = ("http/1.1", None)  # clients need not choose
# A message in JSON may be larger than the message: its bytes are in base64, and its names are there.
_MAX_BODY_RATIO = 4 / 3
_MORE_BODY_BYTES = 65536


class _Place:
    """A connection that may have to make room (see serving.transport.connection_limits.Idle)."""

    def __init__(self, connection: WebConnection) -> None:
        self.connection = connection
        self.client = connection.client_key

    def idle_seconds(self, now: float) -> float:
        return self.connection.idle_seconds(now)


class WebServer:
    """An HTTP/1.1 server of an application, in the running event loop.

    limits: those of connections, and what is told of them. malformed: called with the status of each request that is no
    HTTP. tls: returns the context of a new connection; None for no encryption.
    """

    def __init__(
        self,
        application: Application,
        limits: TransportLimits,
        malformed: Callable[[int], None],
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._application = application
        self.memory = application.memory
        self.rounds = Rounds()
        self._limits = limits
        self._malformed = malformed
        self._tls = tls
        self._config = Config(
            application, lifespan="off", ws="none", http="h11", log_config=None, log_level=logging.ERROR,
            access_log=False, proxy_headers=False, server_header=False, date_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=round(min(KEEP_ALIVE_SECONDS, limits.idle_seconds or KEEP_ALIVE_SECONDS)) or 1,
        )  # fmt: skip
        # It warns of each form that it cannot read; the answer to the client says the same.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        self._state = ServerState()
        self._numbers = ConnectionLimits(limits)
        self._connections: set[WebConnection] = set()
        self._listening: list[Listener] = []
        self._looking: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        #: The connections that were accepted.
        self.accepted = 0

    @property
    def connections(self) -> int:
        """Return the number of open connections. Any thread may call it."""
        return len(self._connections)

    @property
    def held_bytes(self) -> int:
        """Return the bytes that the requests and answers hold. Any thread may call it."""
        return sum(one.held for one in tuple(self._connections))

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError.

        Connections that come before ``start`` wait.
        """
        opened = listen_tcp(host, port)
        bound: int = opened[0].getsockname()[1]
        for one in opened:
            self._listening.append(
                TlsListener(one, self._tls, self._connect, self._limits, self._refuses, _PROTOCOLS)
                if self._tls
                else Listener(one, self._connect, self._refuses)
            )
        return bound

    async def start(self) -> None:
        """Start to accept connections."""
        for listening in self._listening:
            listening.start_serving()
        self._look_around()

    def drain(self) -> None:
        """Refuse new connections and requests. Requests under way go on, and then their connections end."""
        self._application.draining = True
        for listening in self._listening:
            listening.close()
        for connection in list(self._connections):
            connection.shutdown()

    async def stop(self, grace: float) -> None:
        """Drain, wait at most ``grace`` seconds for the requests under way, and then end them."""
        self.drain()
        await self._wait(grace)
        for connection in list(self._connections):
            connection.abort()
        await self._wait(_LAST_SECONDS)
        if tasks := set(self._state.tasks):
            await asyncio.wait(tasks, timeout=_LAST_SECONDS)
        for task in set(self._state.tasks):
            task.cancel()
        if self._looking:
            self._looking.cancel()
        self._application.close()

    def opened(self, connection: WebConnection) -> bool:
        """Count a connection. Return False if a limit refuses it."""
        address = connection.peer.address
        if self._refuses(address):
            return False
        self._numbers.enter(address)
        self.accepted += 1
        self._connections.add(connection)
        return True

    def lost(self, connection: WebConnection) -> None:
        """Note the end of a counted connection."""
        if connection.replaced:
            self._numbers.replaced -= 1
        else:
            self._numbers.leave(connection.peer.address)
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def malformed(self, status: int, peer: Peer) -> None:
        """Count and log a request that is no HTTP/1.1."""
        self._malformed(status)
        self._limits.dropped("a connection is closed: its request is no HTTP/1.1", peer)

    def limited(self, limit: str, peer: Peer) -> None:
        """Count and log that a limit has ended a connection."""
        self._limits.limited(limit)
        self._limits.dropped(TEXTS.get(limit, "a connection is closed: its request does not come"), peer)

    async def _wait(self, seconds: float) -> None:
        """Wait until there are no connections, or for some seconds."""
        self._empty.clear()
        if self._connections and seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    def _connect(self) -> WebConnection:
        return WebConnection(self._config, self._state, self)

    def _refuses(self, address: str) -> bool:
        """Return True if one more connection of an address would exceed a limit. An idle one may end for its sake."""
        limit = self._numbers.refusal(address)
        if limit == FULL:
            places = map(_Place, self._connections)
            if place := self._numbers.replaceable(address, places, asyncio.get_running_loop().time()):
                self._numbers.leave(place.connection.peer.address)
                self._numbers.replaced += 1
                place.connection.replace()
                return False
        if limit:
            self.limited(limit, Peer(address))
        return bool(limit)

    def _look_around(self) -> None:
        """End the connections whose clients do not bring them further. Schedule the next look, whatever comes."""
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(_CHECK_SECONDS, self._look_around)
        now = loop.time()
        for connection in list(self._connections):
            connection.check(now)


def web_server(
    settings: Settings,
    metrics: Metrics,
    table: Table,
    limits: TransportLimits,
    unready: Callable[[], str],
    tls: Callable[[], ssl.SSLContext] | None,
    admit: Callable[[str | None, Peer], Awaitable[None]],
    memory: Memory,
) -> WebServer:
    """Return the HTTP server of a method table, with its metrics.

    unready: returns the reason why no request is taken now, or "". tls: returns the context of a new connection; None
    for no encryption. admit, memory: see Terms.
    """
    evicted = dict.fromkeys(EVICTIONS, 0)

    def note_eviction() -> None:
        evicted[MEMORY] += 1

    max_body_bytes = round(_MAX_BODY_RATIO * settings.max_request_bytes) + _MORE_BODY_BYTES
    terms = Terms(
        table,
        BodyLimits(settings.max_images_per_request, settings.max_image_bytes),
        max_body_bytes,
        f"the limit is {max_body_bytes} bytes (max_request_bytes, in base64)",
        memory,
        note_eviction,
        local_names=is_loopback(settings.host) and not (settings.tokens or settings.tls_cert),
        unready=unready,
        counted=lambda route, status: metrics.http_requests.labels(route, str(status)).inc(),
        refused=limits.refused,
        admit=admit,
    )
    application = Application(terms, page_files())
    malformed = partial(terms.counted, "")
    server = WebServer(application, limits, malformed, tls)
    figures = Figures(lambda: application.under_way, lambda: server.held_bytes, settings.max_bytes_under_way, evicted)
    metrics.show_transport(figures, "http")
    metrics.connections.labels("http").read(lambda: server.connections)
    metrics.connections_accepted.labels("http").read(lambda: server.accepted)
    return server
