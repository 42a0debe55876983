"""TLS for the native server: its listening socket, a limit on handshakes, and connections only after good ones."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from serving.transport.connection import Connection

#: Seconds within which a client must complete its handshake.
HANDSHAKE_SECONDS = 10.0
_SHUTDOWN_SECONDS = 2.0
_MAX_HANDSHAKES = 256  # under way; above this the oldest one ends
_MAX_ACCEPTED_A_TURN = 64  # after which other connections have their turn
_BACK_OFF_SECONDS = 0.1  # until the next attempt if no file can be opened
_ALPN = "h2"
#: The results of handshakes: good; failed, or not complete in time; of a client that does not speak HTTP/2; or the
#: oldest one when too many were under way.
OK, FAILED, NO_H2, CROWDED = HANDSHAKE_RESULTS = ("ok", "failed", "no_h2", "crowded")


class TlsContexts(Protocol):
    """The source of TLS contexts; see serving.access.certificates.Certificates."""

    @property
    def mutual(self) -> bool:
        """Return True if clients must have certificates."""

    def grpc_context(self) -> ssl.SSLContext:
        """Return the context of a new connection."""

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Return the chain, its private key, and the authorities of clients or b"", in PEM."""


class TlsListener:
    """A listening socket whose clients must complete a TLS handshake.

    connect: makes the Connection of a client. noted: called with each result, one of HANDSHAKE_RESULTS. refuses:
    called with each client's address; returns True if its connection is closed at once.
    """

    def __init__(
        self,
        listening: socket.socket,
        contexts: TlsContexts,
        connect: Callable[[], Connection],
        noted: Callable[[str], object],
        refuses: Callable[[str], bool],
    ) -> None:
        self._socket = listening
        self._contexts = contexts
        self._connect = connect
        self._noted = noted
        self._refuses = refuses
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._under_way: dict[asyncio.Task[None], None] = {}  # oldest first

    async def start_serving(self) -> None:
        """Start to accept connections."""
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Close the socket, and end the handshakes that are under way."""
        if self._pause:
            self._pause.cancel()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for task in list(self._under_way):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED_A_TURN):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no file can be opened; the socket would stay readable
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(_BACK_OFF_SECONDS, self._resume)
                return
            if self._refuses(str(address[0])):
                accepted.close()
                continue
            accepted.setblocking(False)
            self._begin(accepted)

    def _resume(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _begin(self, accepted: socket.socket) -> None:
        """Begin a handshake, and end the oldest one if there are too many."""
        if len(self._under_way) >= _MAX_HANDSHAKES:
            oldest = next(iter(self._under_way))
            del self._under_way[oldest]
            oldest.cancel()
            self._noted(CROWDED)
        task = self._loop.create_task(self._shake_hands(accepted))
        self._under_way[task] = None
        task.add_done_callback(partial(self._ended, accepted))

    def _ended(self, accepted: socket.socket, task: "asyncio.Task[None]") -> None:
        self._under_way.pop(task, None)
        if task.cancelled():  # perhaps before it could begin
            accepted.close()

    async def _shake_hands(self, accepted: socket.socket) -> None:
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                self._connect,
                accepted,
                ssl=self._contexts.grpc_context(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
            )
        except OSError:  # ssl.SSLError and TimeoutError are some
            self._noted(FAILED)
        else:
            secured = cast(ssl.SSLObject, transport.get_extra_info("ssl_object"))
            if secured.selected_alpn_protocol() == _ALPN:
                self._noted(OK)
                return
            self._noted(NO_H2)
            transport.abort()
