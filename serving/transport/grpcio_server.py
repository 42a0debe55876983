"""gRPC's own server, grpc.aio, with the same method table, for users who trust only gRPC's C core."""

import asyncio
import errno
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc import aio

from serving.transport import headers
from serving.transport.call import INTERNAL_TEXT
from serving.transport.counts import MEMORY, Figures
from serving.transport.grpcio_messages import MessageInflater
from serving.transport.handshakes import HANDSHAKE_SECONDS, TlsContexts
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Memory
from serving.transport.messages import MessageError
from serving.transport.methods import (
    UNDECIDED,
    UNDECIDED_TEXT,
    UNIX_ADDRESS,
    Abort,
    CallbackMethod,
    Method,
    Peer,
    StreamMethod,
    Table,
    TransportLimits,
    UnaryMethod,
    common_name,
)
from serving.transport.sockets import UnixSocket, listen_tcp

_MAX_RPCS = 16_384  # of all connections together
_LAST_SECONDS = 0.2  # time after the grace for the last statuses to leave
_HANDOVER_SECONDS = 0.02  # in this time the calls that gRPC has given to Python reach their handlers
_READ_BYTES = 2**16  # at once from a connection; by default it may be 4 MiB, whatever the message takes
_END_SECONDS = 0.005  # in this time gRPC mostly reports that the end of the requests was the end of the call
_STOPPED = Status(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
_NO_MESSAGE = Status(grpc.StatusCode.UNIMPLEMENTED, "no message; expected one")
_OK = Status(grpc.StatusCode.OK)
_INTERNAL = Status(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

# In the form of RFC 2253, without what _ESCAPED finds.
_COMMON_NAME = re.compile(rb"(?:\A|[,+])CN=")
_ESCAPED = re.compile(rb"\\.", re.DOTALL)

Outcome = TypeVar("Outcome")

_logger = logging.getLogger(__name__)


class GrpcioServer:
    """A TransportServer on grpc.aio. Make and use it in a running event loop.

    tls: the certificates for the ports, None for no encryption. A Unix socket is never encrypted. connection_age:
    seconds after which a client's connection is renewed; 0 for never. grace: seconds that the calls of such a
    connection get to finish. memory: of all requests, which other servers may share; None for one of its own.
    """

    def __init__(
        self,
        limits: TransportLimits,
        connection_age: float = 0.0,
        grace: float = 0.0,
        tls: TlsContexts | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._tls = tls
        self._handlers = _Handlers(limits, memory or Memory(limits.bytes_under_way))
        self._started = False
        self._draining: asyncio.Task[None] | None = None
        options: list[tuple[str, int]] = [
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.per_message_decompression", 0),  # see MessageInflater
            ("grpc.max_concurrent_streams", limits.calls_per_connection),
            ("grpc.max_metadata_size", headers.MAX_BYTES),
            ("grpc.absolute_max_metadata_size", headers.MAX_BYTES),
            ("grpc.server_handshake_timeout_ms", round(1000 * HANDSHAKE_SECONDS)),
            ("grpc.experimental.tcp_max_read_chunk_size", _READ_BYTES),
            ("grpc.http2.bdp_probe", 0),  # otherwise a fast client may send any number of bytes that nobody reads
            ("grpc.so_reuseport", 0),  # otherwise a second server would silently take half of the connections
        ]
        if limits.connections:
            options.append(("grpc.max_allowed_incoming_connections", limits.connections))
        if limits.idle_seconds:
            options.append(("grpc.max_connection_idle_ms", max(1, round(1000 * limits.idle_seconds))))
        if connection_age:
            options.append(("grpc.max_connection_age_ms", max(1, round(1000 * connection_age))))
            options.append(("grpc.max_connection_age_grace_ms", round(1000 * grace)))
        self._server = aio.server(options=options, maximum_concurrent_rpcs=_MAX_RPCS)
        self._server.add_generic_rpc_handlers((self._handlers,))

    @property
    def figures(self) -> Figures:
        """Return the server's figures, as far as gRPC tells them."""
        return self._handlers.figures

    def add_methods(self, methods: Table) -> None:
        """Add methods. Call it before ``start``."""
        self._handlers.add(methods)

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError."""
        if port:  # gRPC does not report the reason of a failure
            for probe in listen_tcp(host, port):
                probe.close()
        address = f"[{host}]" if ":" in host else host or "[::]"
        try:
            bound: int = (
                self._server.add_secure_port(f"{address}:{port}", _credentials(self._tls))
                if self._tls
                else self._server.add_insecure_port(f"{address}:{port}")
            )
        except RuntimeError as error:
            raise OSError(errno.EADDRINUSE, "the port is taken") from error
        return bound

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, and replace a file on which no server listens. Raises OSError."""
        probe = UnixSocket(path)  # gRPC would silently take it from another server
        probe.unlink()
        probe.socket.close()
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(errno.EADDRINUSE, "the socket cannot be opened") from error

    async def start(self) -> None:
        """Start to accept connections."""
        self._started = True
        await self._server.start()

    async def drain(self, grace: float) -> None:
        """Refuse new connections and calls. Calls in flight go on for at most ``grace`` seconds.

        gRPC's core cancels calls that have no handler yet. When this returns, all others are in their handlers.
        """
        if not self._started:  # gRPC stops and closes the ports of a started server only
            await self.start()
        if self._draining is None:
            self._draining = asyncio.create_task(self._server.stop(grace + _LAST_SECONDS))
            await asyncio.sleep(_HANDOVER_SECONDS if grace else 0)

    async def stop(self, grace: float) -> None:
        """Drain, wait at most ``grace`` seconds for the calls in flight, and then end them."""
        await self.drain(grace)
        assert self._draining
        if grace:
            await asyncio.wait((self._draining,), timeout=grace)
        if not self._draining.done():
            self._handlers.cut_off()
            await asyncio.wait((self._draining,), timeout=_LAST_SECONDS)
            await self._server.stop(0)
        await self._draining
        self._handlers.close()


class _Context:
    """The context of a handler (see serving.transport.methods.Context)."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.read: Callable[[], Awaitable[Any]] = context.read
        #: The seconds that are left until the deadline.
        self.timeout: float | None = context.time_remaining()
        self.deadline = None if self.timeout is None else time.monotonic() + self.timeout
        self.given_up: Callable[[], object] | None = None
        self.undecided = False
        self.metadata: Metadata = tuple(context.invocation_metadata() or ())
        self.outcome: asyncio.Future[bytes | Status] = asyncio.get_running_loop().create_future()

    @property
    def gone(self) -> bool:
        """Return True if the client has ended the call."""
        return bool(self._context.cancelled())

    @property
    def expired(self) -> bool:
        """Return True if the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def over(self) -> bool:
        """Return True if nobody waits for the handler."""
        return self.outcome.done()

    @property
    def peer(self) -> Peer:
        """Return the client of the connection."""
        kind, _, address = str(self._context.peer()).partition(":")
        if kind not in ("ipv4", "ipv6"):
            return Peer(UNIX_ADDRESS, connection=UNIX_ADDRESS)
        host = address.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
        return Peer(host, _subject(self._context.auth_context()), connection=address)

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self.metadata

    def answer(self, data: bytes) -> None:
        """Send the only answer of a unary call, and the status OK."""
        self._end(data)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status."""
        self._end(Status(code, text, metadata))

    def give_up(self) -> None:
        """Tell the handler that nobody waits for its answer."""
        self.outcome.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def _end(self, outcome: bytes | Status) -> None:
        self.given_up = None
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class _Handlers(grpc.GenericRpcHandler):
    """The method table for grpc.aio, and the calls in flight."""

    def __init__(self, limits: TransportLimits, memory: Memory) -> None:
        self._limits = limits
        self._memory = memory
        self._handlers: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._inflater = MessageInflater(limits.message_bytes, limits.message_text)
        self._cut_off = False
        self._bytes = 0  # of the requests in flight
        self.figures = Figures(lambda: len(self._tasks), lambda: self._bytes, limits.bytes_under_way)

    def add(self, methods: Table) -> None:
        """Add the methods of a table."""
        self._handlers |= {path: self._handler(method) for path, method in methods.items()}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call, or None."""
        handler = self._handlers.get(details.method)
        if handler is None:
            metadata = tuple(details.invocation_metadata)
            self._limits.refused(details.method, Peer(""), metadata, grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return handler

    def cut_off(self) -> None:
        """End the calls in flight."""
        self._cut_off = True
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """End the threads."""
        self._inflater.close()

    def _handler(self, method: Method) -> Any:
        if isinstance(method, StreamMethod):

            async def stream(_: object, context: Any) -> None:
                await self._end(context, await self._streamed(method, context))

            return grpc.stream_stream_rpc_method_handler(stream)

        async def unary(_: object, context: Any) -> bytes:
            outcome = await self._answered(method, _Context(context))
            if isinstance(outcome, Status):
                await self._end(context, outcome)
                return b""
            return outcome

        # As a stream of requests, the only one is read after the door, and grpc.aio does not keep it until the answer.
        return grpc.stream_unary_rpc_method_handler(unary)

    async def _answered(self, method: UnaryMethod | CallbackMethod, call: _Context) -> bytes | Status:
        """Return the answer of a unary method, or the status with which its call ends."""
        status = method.door(call.timeout, call.metadata, 0, call.peer) if method.door else None
        if status and status is not UNDECIDED:
            return status
        call.undecided = status is UNDECIDED
        messages = _Messages(call, self._inflater, self._hold)

        async def answer() -> bytes | Status:
            message = await messages.next()
            if message is None:
                return _NO_MESSAGE
            answering = _answer(method, message, call)
            del message  # which the method may free once it is parsed
            return await answering

        try:
            return await self._guarded(answer(), call)
        finally:
            messages.close()

    def _hold(self, holder: "_Messages", more: int, undecided: bool) -> None:
        """Count more bytes of requests as held, or a negative number as released. Raises MessageError."""
        held = self._memory.used + more
        if more > 0 and held > self._memory.max_bytes:
            self.figures.evicted[MEMORY] += 1
            text = self._limits.no_room(held, self._memory.max_bytes)
            raise MessageError(grpc.StatusCode.RESOURCE_EXHAUSTED, UNDECIDED_TEXT if undecided else text)
        self._memory.hold(holder, more)
        self._bytes += more

    async def _streamed(self, method: StreamMethod, context: Any) -> Status:
        """Send the answers of a stream method, and return the status with which its call ends."""
        call = _Context(context)
        messages = _Messages(call, self._inflater, self._hold)

        async def answer() -> Status:
            async with aclosing(method.answers(messages, call)) as answers:  # type: ignore[type-var]
                async for answer in answers:
                    try:
                        await context.write(answer)
                    except aio.InternalError:  # the client has gone
                        return Status(grpc.StatusCode.CANCELLED)
                    del answer  # while the next one is waited for, which may never come
            outcome = call.outcome.result() if call.outcome.done() else None
            return outcome if isinstance(outcome, Status) else _OK

        try:
            return await self._guarded(answer(), call)
        finally:
            messages.close()

    async def _guarded(self, work: Awaitable[Outcome], call: _Context) -> Outcome | Status:
        """Return the result of a handler, or a status for any exception, unless grpc.aio itself has ended the call."""
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            return await work
        except Abort as abort:
            return abort.status
        except MessageError as error:
            return Status(error.code, str(error))
        except asyncio.CancelledError:
            call.give_up()
            if self._cut_off:
                task.uncancel()
                return _STOPPED
            if (
                not task.cancelling() and not call.gone
            ):  # raised by the handler; grpc.aio would leave the client without a status
                return Status(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            if not call.gone:
                _logger.error("a handler failed", exc_info=error)
            return _INTERNAL
        finally:
            self._tasks.discard(task)

    async def _end(self, context: Any, status: Status) -> None:
        """End a call with a status; raises what ends its handler."""
        if status.code is grpc.StatusCode.OK:
            return
        try:
            await context.abort(status.code, status.text, status.metadata)
        except aio.AbortError:
            raise
        except Exception:  # the client has gone, or its deadline has passed, and gRPC has not reported it yet
            raise asyncio.CancelledError from None


def _subject(properties: Mapping[str, Iterable[bytes]]) -> str:
    """Return the common name in a client's certificate, from gRPC's properties, which hold the first one of several."""
    subject = b"".join(properties.get("x509_subject", ()))  # in the form of RFC 2253
    names = [one.decode(errors="replace") for one in properties.get("x509_common_name", ())]
    return common_name(names) if len(_COMMON_NAME.findall(_ESCAPED.sub(b"", subject))) == 1 else ""


def _credentials(tls: TlsContexts) -> grpc.ServerCredentials:
    """Return the credentials of a port. gRPC asks for newer certificates at each handshake."""
    given = tls.pem()

    def configuration() -> Any:
        chain, key, authorities = given
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities or None)

    def newer() -> Any:
        nonlocal given
        newest = tls.pem()
        if newest == given:
            return None  # otherwise gRPC would read the certificates again for each handshake
        given = newest
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), newer, tls.mutual)


async def _answer(method: UnaryMethod | CallbackMethod, data: bytes, call: _Context) -> bytes | Status:
    """Return the outcome of a unary call. Raises any exception of its handler."""
    if isinstance(method, CallbackMethod):
        returned: object = method.begin(data, call)  # type: ignore[func-returns-value]
        del data  # which the method may free once it is parsed
        if returned is not None:  # a coroutine would never run
            raise TypeError(f"a handler has returned {type(returned).__name__}; expected nothing")
        return await call.outcome
    answering = method.answer(data, call)
    del data
    answer = await answering
    if answer is not None:
        return answer
    if not call.over:
        raise TypeError("a handler has ended without an answer")
    return call.outcome.result()


class _Owner:
    """The owner of a call's bytes (see serving.transport.memory.Owner). The call is not evicted."""

    held = 0
    holders = ()


class _Messages:
    """The requests of a call, as they were before compression, and the holder of the latest one's bytes.

    hold: counts these bytes, as _Handlers._hold does, until the next one is asked for.
    """

    held = 0
    waits = False

    def __init__(
        self, call: _Context, inflater: MessageInflater, hold: Callable[["_Messages", int, bool], None]
    ) -> None:
        self.owner = _Owner()
        self._call = call
        self._inflater = inflater
        self._hold = hold

    def evict(self, _: bool) -> None:
        """Do nothing: what gRPC has read cannot be taken back."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the next request. Raises CancelledError if there is none because the client has ended the call."""
        message = await self.next()
        if message is not None:
            return message
        await asyncio.sleep(_END_SECONDS)
        if self._call.gone or self._call.expired:
            raise asyncio.CancelledError
        raise StopAsyncIteration

    async def next(self) -> bytes | None:
        """Return the next request, or None. Raises MessageError."""
        self._count(0)
        message = await self._call.read()
        if message is aio.EOF:
            return None
        self._count(len(message))
        inflated = await self._inflater.inflated(message, self._call.peer.connection)
        del message
        self._count(len(inflated))
        return inflated

    def close(self) -> None:
        """Note that the call has ended."""
        self._count(0)

    def _count(self, size: int) -> None:
        self._hold(self, size - self.held, self._call.undecided)
