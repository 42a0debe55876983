"""HTTP for Prometheus and for health probes: ``/metrics``, ``/livez`` and ``/readyz``, on a separate thread.

The event loop that serves requests must not wait while the metrics are written. The thread has an event loop of its
own, so a client that is slow or silent holds up nobody. Each connection gets one answer.
"""

import asyncio
import gzip
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import grpc
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from serving.errors import DENIALS, ServingError
from serving.logs import RefusalLog
from serving.transport.connection_limits import most_frequent
from serving.transport.methods import Peer, client_of, peer_of

_OPEN = ("/livez", "/readyz")  # the paths for everyone; any other one is for clients that are admitted
_MAX_CONNECTIONS = 32
_BACKLOG = 128  # connections that wait to be accepted
_MAX_HEAD_BYTES = 8192
_CONNECTION_SECONDS = 10.0
#: The event loop that serves requests must show within this time that it runs. Overload delays it far less.
_ALIVE_SECONDS = 5.0
_BACK_OFF_SECONDS = 0.1
_RESERVED_FILES = 3
_RECEIVE_BYTES = 4096
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
}  # fmt: skip
# A header (RFC 9110, section 5): a token, and a value without control characters other than tabs.
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
# The target of a request (RFC 9112, section 3.2): a path, or a whole URL. No character is dropped, as urlsplit would do
# with a tab: a proxy that forbids a path would not know it again.
_TARGET = re.compile(r"(/|https?://)[!-~]*\Z|\*\Z")
_EMPTY_LINE = re.compile(rb"\r?\n\r?\n")
# gRPC's codes of denied requests, as HTTP's.
_DENIED = {
    grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}  # fmt: skip
_TEXT = {"Content-Type": "text/plain; charset=utf-8"}

#: A function that lets a request for metrics pass by its header Authorization, or None, and its client, or raises a
#: ServingError.
Admit = Callable[[str | None, Peer], Awaitable[None]]

_logger = logging.getLogger(__name__)


class _Response(NamedTuple):
    """An answer: status, further headers, and body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = _TEXT

    def encode(self, with_body: bool) -> bytes:
        fields = {**self.headers, "Content-Length": str(len(self.body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {self.status} {_REASONS[self.status]}", *(f"{name}: {fields[name]}" for name in fields)]
        return "\r\n".join((*lines, "", "")).encode() + (self.body if with_body else b"")


class _Refusal(Exception):
    """The request is answered with an error at once."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.response = _Response(status, f"{text}\n".encode(), {**_TEXT, **headers})


class _Request(NamedTuple):
    """The head of a request. fields: by name in lower case."""

    method: str
    path: str
    query: str
    fields: Mapping[str, str]

    @classmethod
    def parse(cls, head: bytes) -> "_Request":
        """Read a head without its empty line (RFC 9112, sections 3 and 5). Raises _Refusal."""
        if len(head) > _MAX_HEAD_BYTES:
            raise _Refusal(431, f"expected at most {_MAX_HEAD_BYTES} bytes before the empty line")
        first, *lines = (line.removesuffix("\r") for line in head.decode("latin-1").split("\n"))
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            raise _Refusal(400, "this is no request of HTTP/1.1")
        method, target, version = words
        if not version.startswith("HTTP/1."):
            raise _Refusal(505, "this port speaks HTTP/1.1, for metrics and health; gRPC has a port of its own")
        if not _TARGET.match(target):
            raise _Refusal(400, "this is no target of a request")
        try:
            url = urlsplit(target)
        except ValueError:
            raise _Refusal(400, "this is no target of a request") from None
        fields: dict[str, str] = {}
        for line in lines:
            if not _FIELD.fullmatch(line):
                raise _Refusal(400, "a header is not NAME: VALUE on one line without control characters")
            name, _, value = line.partition(":")
            name = name.lower()
            fields[name] = f"{fields[name]},{value.strip()}" if name in fields else value.strip()
        return cls(method, url.path, url.query, fields)


class Page:
    """The metrics of a registry and the health of the server, on an HTTP port.

    unready: returns the reason why the server takes no requests now, or "" if it does. admit: see Admit; health is told
    to everyone. tls: returns the context of a new connection; None for no encryption. The page's thread calls them.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        unready: Callable[[], str],
        admit: Admit | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._registry = registry
        self._unready = unready
        self._admit = admit
        self._tls = tls
        self._routes: Mapping[str, Callable[[_Request], Awaitable[_Response]]] = {
            "/metrics": self._metrics,
            "/livez": self._liveness,
            "/readyz": self._readiness,
        }
        self._log = RefusalLog(events="requests for metrics were denied")
        #: The denied requests by reason.
        self.denied = dict.fromkeys(DENIALS, 0)

    def open(self, host: str, port: int) -> int:
        """Listen, answer from a separate thread, and return the port. Call it on the event loop that serves requests.

        host: a name or an address; an IPv6 address may have brackets. Raises OSError.
        """
        self._serving = asyncio.get_running_loop()
        family, *_, address = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(_Acceptor(listener, self._answer, self._tls).run())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()
        number: int = listener.getsockname()[1]
        return number

    def close(self) -> None:
        """Close the port and every connection. Any thread except the page's own may call it."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._accepting)
        self._loop.close()

    async def _answer(self, head: bytes, peer: Peer) -> bytes:
        """Return the whole answer to a request. head: its bytes before the empty line."""
        try:
            response = await self._respond(_Request.parse(head), peer)
        except ServingError as error:
            self.denied[error.reason] += 1
            self._log.write(logging.INFO, f"metrics: {error}", [{"code": error.code.name, "peer": peer.address}], 1)
            headers = {**_TEXT, "WWW-Authenticate": "Bearer"}
            response = _Response(_DENIED[error.code], f"{error}\n".encode(), headers)
        except _Refusal as refusal:
            response = refusal.response
        except Exception:
            _logger.exception("the metrics page could not be written")
            response = _Response(500, b"internal error; see the server's log\n")
        return response.encode(with_body=not head.startswith(b"HEAD "))

    async def _respond(self, request: _Request, peer: Peer) -> _Response:
        if request.method not in ("GET", "HEAD"):
            raise _Refusal(405, f"{request.method[:20]}: expected GET or HEAD", Allow="GET, HEAD")
        answer = self._routes.get(request.path)
        if answer is None:
            raise _Refusal(404, f"not here; there is: {', '.join(self._routes)}")
        if self._admit and request.path not in _OPEN:
            await self._admit(request.fields.get("authorization"), peer)
        return await answer(request)

    async def _readiness(self, _: _Request) -> _Response:
        if reason := self._unready():
            raise _Refusal(503, f"not ready: {reason}")
        return _Response(200, b"ready\n")

    async def _metrics(self, request: _Request) -> _Response:
        try:
            encode, content_type = choose_encoder(request.fields.get("accept", ""))
        except (TypeError, ValueError):  # too many digits, or other characters
            encode, content_type = choose_encoder("")
        names = parse_qs(request.query).get("name[]")
        body = encode(self._registry.restricted_registry(names) if names else self._registry)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.fields.get("accept-encoding", "")):
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        return _Response(200, body, headers)

    async def _liveness(self, _: _Request) -> _Response:
        dead = _Refusal(503, f"not alive: the server has done nothing for {_ALIVE_SECONDS:g} seconds")
        turn = asyncio.sleep(0)
        try:
            answer = asyncio.run_coroutine_threadsafe(turn, self._serving)
        except RuntimeError:  # it is closed
            turn.close()
            raise dead from None
        try:
            await asyncio.wait_for(asyncio.wrap_future(answer), _ALIVE_SECONDS)
        except TimeoutError:
            raise dead from None
        return _Response(200, b"alive\n")


class _Acceptor:
    """The acceptor of connections. It limits their number and time, and works even without free file descriptors.

    answer: returns the whole answer for the bytes before the empty line, and the client. tls: see Page.
    """

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[bytes, Peer], Awaitable[bytes]],
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._listener = listener
        self._answer = answer
        self._tls = tls
        self._connections: dict[asyncio.Task[None], tuple[socket.socket, str]] = {}  # with their clients, oldest first
        self._reserve: list[int] = []

    async def run(self) -> None:
        """Accept until cancelled, then close everything."""
        self._refill_reserve()
        try:
            while True:
                connection, address = await self._accept()
                task = asyncio.create_task(self._serve(connection))
                self._connections[task] = connection, client_of(str(address[0]))
                task.add_done_callback(self._close)
                await asyncio.sleep(0)  # sock_accept does not yield while connections wait
                while len(self._connections) > _MAX_CONNECTIONS:
                    self._end_one()
                    await asyncio.sleep(0)
        finally:
            self._listener.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self._empty_reserve()

    async def _accept(self) -> tuple[socket.socket, tuple[object, ...]]:
        """Return the next connection, and its address.

        If the process cannot open another file, the connection gets a reserved descriptor, or that of another
        connection. A port that cannot accept stays readable, so the next attempt comes after a pause.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.sock_accept(self._listener)
            except OSError:
                self._empty_reserve()
            try:
                connection, address = self._listener.accept()
                connection.setblocking(False)
                return connection, address
            except OSError:
                self._end_one()
                await asyncio.sleep(_BACK_OFF_SECONDS)

    async def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CONNECTION_SECONDS):
                reader, writer = await self._open(connection)
                try:
                    if head := await _head(reader):
                        writer.write(await self._answer(head, _client(writer)))
                        await writer.drain()
                        await _finish(reader, writer)
                finally:
                    writer.transport.abort()

    async def _open(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the streams of an accepted connection, after its TLS handshake if there is TLS. Raises OSError."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=self._tls() if self._tls else None
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _close(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task)[0].close()
        if not self._connections:  # otherwise an answer that is being written may need a file
            self._refill_reserve()

    def _end_one(self) -> None:
        """End the oldest connection of the client with the most."""
        if self._connections:
            crowd = most_frequent(client for _, client in self._connections.values())
            next(task for task, (_, client) in self._connections.items() if client == crowd).cancel()

    def _refill_reserve(self) -> None:
        with suppress(OSError):
            while len(self._reserve) < _RESERVED_FILES:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _empty_reserve(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes before the empty line, or too many bytes, or b"" if the client ends early."""
    head = b""
    while len(head) <= _MAX_HEAD_BYTES:
        received = await reader.read(_RECEIVE_BYTES)
        if not received:
            return b""
        head += received
        if end := _EMPTY_LINE.search(head):
            return head[: end.start()]
    return head


async def _finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the writing side, and read until the client closes.

    A close with unread bytes would reset the connection, and the answer could be lost.
    """
    if not writer.can_write_eof():  # TLS has no half-closed connections
        writer.close()
        await writer.wait_closed()
        return
    writer.write_eof()
    while await reader.read(_RECEIVE_BYTES):
        pass


def _client(writer: asyncio.StreamWriter) -> Peer:
    """Return the client of a connection, from its address and its verified certificate."""
    return peer_of(writer.get_extra_info("peername"), writer.get_extra_info("peercert"))
