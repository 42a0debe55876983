"""gRPC's own server, grpc.aio, under the same method table: for whoever trusts gRPC's C core alone."""

import asyncio
import errno
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from grpc import aio

from serving.transport import headers
from serving.transport.call import INTERNAL_TEXT
from serving.transport.frame_reader import MAX_CALLS
from serving.transport.headers import Metadata, Status
from serving.transport.methods import (
    Abort,
    CallbackMethod,
    Method,
    StreamMethod,
    Table,
    TransportLimits,
    UnaryMethod,
)
from serving.transport.sockets import UnixSocket, listen_tcp

_MAX_RPCS = 4 * MAX_CALLS  # of all connections together
_LAST_SECONDS = 0.2  # after the grace, for the last statuses to leave
_END_SECONDS = 0.005  # in which gRPC tells whether a client's end is that of the call, in most cases
_STOPPED = Status(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
_OK = Status(grpc.StatusCode.OK)
_INTERNAL = Status(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

Outcome = TypeVar("Outcome")

_logger = logging.getLogger(__name__)


class GrpcioServer:
    """Serves a method table by grpc.aio (a TransportServer). Made, and used, in an event loop that runs.

    connection_age: seconds after which a client's connection is renewed, 0 for never; grace: seconds that its calls
    then get to finish.
    """

    def __init__(self, limits: TransportLimits, connection_age: float = 0.0, grace: float = 0.0) -> None:
        self._handlers = _Handlers(limits)
        self._started = False
        self._draining: asyncio.Task[None] | None = None
        options: list[tuple[str, int]] = [
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", MAX_CALLS),
            ("grpc.max_metadata_size", headers.MAX_BYTES),
            ("grpc.absolute_max_metadata_size", headers.MAX_BYTES),
            ("grpc.so_reuseport", 0),  # or a second server would take half of the connections without a word
        ]
        if connection_age:
            options.append(("grpc.max_connection_age_ms", max(1, round(1000 * connection_age))))
            options.append(("grpc.max_connection_age_grace_ms", round(1000 * grace)))
        self._server = aio.server(options=options, maximum_concurrent_rpcs=_MAX_RPCS)
        self._server.add_generic_rpc_handlers((self._handlers,))

    def add_methods(self, methods: Table) -> None:
        """Serve these methods too; before ``start``."""
        self._handlers.add(methods)

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError."""
        if port:  # since gRPC does not say why it cannot
            for probe in listen_tcp(host, port):
                probe.close()
        address = f"[{host}]" if ":" in host else host or "[::]"
        try:
            bound: int = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError as error:
            raise OSError(errno.EADDRINUSE, "the port is taken") from error
        return bound

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, in the place of one that nobody listens on. Raises OSError."""
        probe = UnixSocket(path)  # since gRPC would take it from another server without a word
        probe.unlink()
        probe.socket.close()
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(errno.EADDRINUSE, "the socket cannot be opened") from error

    async def start(self) -> None:
        """Take connections."""
        self._started = True
        await self._server.start()

    async def drain(self, grace: float) -> None:
        """Take no further connection or call; those under way go on for ``grace`` seconds at most."""
        if not self._started:  # gRPC stops, and closes its ports, only what was started
            await self.start()
        if self._draining is None:
            self._draining = asyncio.create_task(self._server.stop(grace + _LAST_SECONDS))
            await asyncio.sleep(0)  # it begins

    async def stop(self, grace: float) -> None:
        """Drain, and wait for the calls under way, for at most ``grace`` seconds; then end them."""
        await self.drain(grace)
        assert self._draining
        if grace:
            await asyncio.wait((self._draining,), timeout=grace)
        if not self._draining.done():
            self._handlers.cut_off()
            await asyncio.wait((self._draining,), timeout=_LAST_SECONDS)
            await self._server.stop(0)
        await self._draining


class _Context:
    """A call, as its handler sees it (see serving.transport.methods.Context)."""

    def __init__(self, context: Any) -> None:
        self._context = context
        #: Seconds that the client gave it, as far as they are left.
        self.timeout: float | None = context.time_remaining()
        self.deadline = None if self.timeout is None else time.monotonic() + self.timeout
        self.given_up: Callable[[], object] | None = None
        self.metadata: Metadata = tuple(context.invocation_metadata() or ())
        self.outcome: asyncio.Future[bytes | Status] = asyncio.get_running_loop().create_future()

    @property
    def gone(self) -> bool:
        """Tell if the client has ended the call."""
        return bool(self._context.cancelled())

    @property
    def expired(self) -> bool:
        """Tell if the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def over(self) -> bool:
        """Tell if nobody waits for anything from the handler."""
        return self.outcome.done()

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self.metadata

    def answer(self, data: bytes) -> None:
        """Send the only answer of a unary call, and that all went well."""
        self._end(data)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status."""
        self._end(Status(code, text, metadata))

    def give_up(self) -> None:
        """Tell the handler that nobody waits any longer."""
        self.outcome.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def _end(self, outcome: bytes | Status) -> None:
        self.given_up = None
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it is generic in its stubs alone
    """The method table as grpc.aio asks for it, and the calls that are under way."""

    def __init__(self, limits: TransportLimits) -> None:
        self._limits = limits
        self._handlers: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cut_off = False
        self._bytes = 0  # of unary requests under way

    def add(self, methods: Table) -> None:
        """Take the methods of a table."""
        self._handlers |= {path: self._handler(method) for path, method in methods.items()}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call, or None."""
        handler = self._handlers.get(details.method)
        if handler is None:
            metadata = tuple(details.invocation_metadata)
            self._limits.refused(details.method, metadata, grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return handler

    def cut_off(self) -> None:
        """End the calls that are under way."""
        self._cut_off = True
        for task in self._tasks:
            task.cancel()

    def _handler(self, method: Method) -> Any:
        if isinstance(method, StreamMethod):

            async def stream(requests: Any, context: Any) -> None:
                await self._end(context, await self._streamed(method, requests, context))

            return grpc.stream_stream_rpc_method_handler(stream)

        async def unary(data: bytes, context: Any) -> bytes:
            outcome = await self._answered(method, data, _Context(context))
            if isinstance(outcome, Status):
                await self._end(context, outcome)
                return b""
            return outcome

        return grpc.unary_unary_rpc_method_handler(unary)

    async def _answered(self, method: UnaryMethod | CallbackMethod, data: bytes, call: _Context) -> bytes | Status:
        """Return the answer of a unary method, or the status that its call ends with."""
        if method.door and (status := method.door(call.timeout, call.metadata, 0)):
            return status
        limits = self._limits
        if self._bytes + len(data) > limits.bytes_under_way:
            text = f"requests of {self._bytes + len(data)} bytes are under way; {limits.memory_text}; try again later"
            return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._bytes += len(data)
        try:
            return await self._guarded(_answer(method, data, call), call)
        finally:
            self._bytes -= len(data)

    async def _streamed(self, method: StreamMethod, requests: Any, context: Any) -> Status:
        """Send the answers of a stream method, and return the status that its call ends with."""
        call = _Context(context)

        async def answer() -> Status:
            async with (
                aclosing(_messages(requests, call)) as messages,
                aclosing(method.answers(messages, call)) as answers,  # type: ignore[type-var]
            ):
                async for answer in answers:
                    await context.write(answer)
                    del answer  # while the next one is waited for, which may never come
            outcome = call.outcome.result() if call.outcome.done() else None
            return outcome if isinstance(outcome, Status) else _OK

        return await self._guarded(answer(), call)

    async def _guarded(self, work: Awaitable[Outcome], call: _Context) -> Outcome | Status:
        """Return what a handler's work comes to, whatever it raises, unless grpc.aio itself has ended the call."""
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            return await work
        except Abort as abort:
            return abort.status
        except asyncio.CancelledError:
            call.give_up()
            if self._cut_off:
                task.uncancel()
                return _STOPPED
            if not task.cancelling() and not call.gone:  # a handler's own doing; the client would never learn of it
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
        except Exception:  # the client has gone, or its deadline has passed, and gRPC has yet to say so
            raise asyncio.CancelledError from None


async def _answer(method: UnaryMethod | CallbackMethod, data: bytes, call: _Context) -> bytes | Status:
    """Return the outcome of a unary call. Raises what its handler raises."""
    if isinstance(method, CallbackMethod):
        returned: object = method.begin(data, call)  # type: ignore[func-returns-value]
        if returned is not None:  # a coroutine would never run
            raise TypeError(f"a handler has returned {type(returned).__name__}; expected nothing")
        return await call.outcome
    answer = await method.answer(data, call)
    if answer is not None:
        return answer
    if not call.over:
        raise TypeError("a handler has ended without an answer")
    return call.outcome.result()


async def _messages(requests: Any, call: _Context) -> AsyncGenerator[bytes]:
    """Yield what grpc.aio's iterator of requests does, which is no iterator for ``anext``.

    Raises CancelledError where that one ends as if the client had sent all, though the client has ended the call.
    """
    async for message in requests:
        yield message
        del message  # while the next one is waited for, which may never come
    await asyncio.sleep(_END_SECONDS)
    if call.gone or call.expired:
        raise asyncio.CancelledError
