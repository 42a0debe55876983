"""gRPC's own server, grpc.aio, with the same method table, for users who trust only gRPC's C core."""

import asyncio
import errno
import logging
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc import aio

from serving.transport import headers
from serving.transport.call import INTERNAL_TEXT
from serving.transport.counts import Figures
from serving.transport.grpcio_calls import Call, Holdings, Requests
from serving.transport.grpcio_messages import MessageInflater
from serving.transport.handshakes import HANDSHAKE_SECONDS, TlsContexts
from serving.transport.headers import Status
from serving.transport.memory import Memory
from serving.transport.messages import MessageError
from serving.transport.methods import (
    UNDECIDED,
    UNDECIDED_TEXT,
    Abort,
    CallbackMethod,
    Method,
    Peer,
    StreamMethod,
    Table,
    TransportLimits,
    UnaryMethod,
)
from serving.transport.sockets import UnixSocket, listen_tcp

_MAX_RPCS = 16_384  # of all connections together
# gRPC's clients wait before they make more. An open call takes up to 110 KB: its objects, and 64 of a message.
_MAX_CALLS_PER_CONNECTION = 100
_LAST_SECONDS = 0.2  # time after the grace for the last statuses to leave
_HANDOVER_SECONDS = 0.02  # in this time the calls that gRPC has given to Python reach their handlers
_READ_BYTES = 2**16  # at once from a connection; by default it may be 4 MiB, whatever the message takes
_STOPPED = Status(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
_NO_MESSAGE = Status(grpc.StatusCode.UNIMPLEMENTED, "no message; expected one")
_OK = Status(grpc.StatusCode.OK)
_INTERNAL = Status(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

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
            ("grpc.max_concurrent_streams", min(limits.calls_per_connection, _MAX_CALLS_PER_CONNECTION)),
            # By default gRPC counts calls until their memory is free, and refuses honest ones near the limit.
            ("grpc.http2.max_deallocating_streams", _MAX_CALLS_PER_CONNECTION),
            # By default gRPC refuses calls at random when a thousand wait for Python: a flood's and all others'.
            ("grpc.server.max_pending_requests", _MAX_RPCS),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_RPCS),
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


class _Handlers(grpc.GenericRpcHandler):
    """The method table for grpc.aio, and the calls in flight."""

    def __init__(self, limits: TransportLimits, memory: Memory) -> None:
        self._limits = limits
        self._handlers: dict[str, Any] = {}
        self._calls: set[Call] = set()
        self._inflater = MessageInflater(limits.message_bytes, limits.message_text)
        self.figures = Figures(lambda: len(self._calls), lambda: self._holdings.bytes, limits.bytes_under_way)
        self._holdings = Holdings(limits, memory, self._inflater, self.figures.evicted)

    def add(self, methods: Table) -> None:
        """Add the methods of a table."""
        self._handlers |= {path: self._handler(path, method) for path, method in methods.items()}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call, or None."""
        handler = self._handlers.get(details.method)
        if handler is None:
            metadata = tuple(details.invocation_metadata)
            self._limits.refused(details.method, Peer(""), metadata, grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return handler

    def cut_off(self) -> None:
        """End the calls in flight."""
        for call in self._calls:
            call.cut_off(_STOPPED)

    def close(self) -> None:
        """End the threads."""
        self._inflater.close()

    def _handler(self, path: str, method: Method) -> Any:
        if isinstance(method, StreamMethod):

            async def stream(_: object, context: Any) -> None:
                await self._end(context, await self._streamed(method, Call(path, context), context))

            return grpc.stream_stream_rpc_method_handler(stream)

        async def unary(_: object, context: Any) -> bytes:
            outcome = await self._answered(method, Call(path, context))
            if isinstance(outcome, Status):
                await self._end(context, outcome)
                return b""
            return outcome

        # As a stream of requests, the only one is read after the door, and grpc.aio does not keep it until the answer.
        return grpc.stream_unary_rpc_method_handler(unary)

    async def _answered(self, method: UnaryMethod | CallbackMethod, call: Call) -> bytes | Status:
        """Return the answer of a unary method, or the status with which its call ends."""
        status = method.door(call.timeout, call.metadata, 0, call.peer) if method.door else None
        if status and status is not UNDECIDED:
            return status
        call.undecided = status is UNDECIDED
        requests = Requests(call, self._holdings, patient=False)

        async def answer() -> bytes | Status:
            message = await requests.next()
            if message is None:
                return _NO_MESSAGE
            call.begun = True
            answering = _answer(method, message, call)
            del message  # which the method may free once it is parsed
            return await answering

        try:
            return await self._guarded(answer(), call)
        finally:
            requests.close()

    async def _streamed(self, method: StreamMethod, call: Call, context: Any) -> Status:
        """Send the answers of a stream method, and return the status with which its call ends."""
        requests = Requests(call, self._holdings, patient=True)
        call.begun = True

        async def answer() -> Status:
            async with aclosing(method.answers(requests, call)) as answers:  # type: ignore[type-var]
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
            requests.close()

    async def _guarded(self, work: Awaitable[Outcome], call: Call) -> Outcome | Status:
        """Return the result of a handler, or a status for any exception, unless grpc.aio itself has ended the call."""
        task = call.task
        assert task
        self._calls.add(call)
        try:
            return await work
        except Abort as abort:
            return abort.status
        except MessageError as error:
            return self._refusal(call, Status(error.code, str(error)))
        except asyncio.CancelledError:
            call.give_up()
            if call.ending:
                task.uncancel()
                return self._refusal(call, call.ending)
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
            self._calls.discard(call)
            call.task = None

    def _refusal(self, call: Call, status: Status) -> Status:
        """Log a refusal by the transport, unless the call's handler does, and return the status for the client."""
        if not call.begun and status is not _STOPPED:
            self._limits.refused(call.path, call.peer, call.metadata, status.code, status.text)
        hidden = call.undecided and status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return Status(status.code, UNDECIDED_TEXT) if hidden else status

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


async def _answer(method: UnaryMethod | CallbackMethod, data: bytes, call: Call) -> bytes | Status:
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
