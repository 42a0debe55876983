"""Methods for the tests of the transports, and servers of them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import grpc

from serving.transport.grpcio_server import GrpcioServer
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Memory
from serving.transport.methods import (
    Abort,
    CallbackMethod,
    Context,
    Method,
    Peer,
    StreamMethod,
    TransportLimits,
    TransportServer,
    UnaryMethod,
    table,
)
from serving.transport.server import GrpcServer

MAX_BYTES = 2**20
BYTES_UNDER_WAY = 4 * 2**20


class Handlers:
    """Handlers that the tests call.

    cancelled: set when one is. ended: set when a stream's has ended. metadata: of the last call.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.ended = threading.Event()
        self.metadata: dict[str, str | bytes] = {}
        self.remaining: float | None = None
        self.door: Status | None = None
        self.expected: list[int] = []
        #: Requests of calls that do not end.
        self.kept: list[bytes] = []

    async def echo(self, request: bytes, context: Context) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.deadline and context.deadline - time.monotonic()
        return request

    async def wait(self, request: bytes, context: Context) -> bytes:
        self.started.set()
        try:
            await asyncio.sleep(float(request))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b"awake"

    async def answer(self, request: bytes, context: Context) -> None:
        await asyncio.sleep(0)
        context.answer(request)

    async def forget_to_answer(self, request: bytes, context: Context) -> None:
        await asyncio.sleep(0)

    async def cancel_itself(self, request: bytes, context: Context) -> bytes:
        raise asyncio.CancelledError

    def answer_at_once(self, request: bytes, context: Context) -> None:
        context.answer(request)

    def answer_later(self, request: bytes, context: Context) -> None:
        context.given_up = self.cancelled.set
        asyncio.get_running_loop().call_later(float(request), lambda: context.answer(b"awake"))
        self.started.set()

    def fail_at_once(self, request: bytes, context: Context) -> None:
        raise RuntimeError("/a/secret/path")

    async def fail(self, request: bytes, context: Context) -> bytes:
        raise RuntimeError("/a/secret/path")

    async def refuse(self, request: bytes, context: Context) -> bytes:
        metadata = (("key", "value"), ("key-bin", b"\0\xff"))
        raise Abort(Status(grpc.StatusCode.NOT_FOUND, "ünknown\n100 %", metadata))

    def refuse_at_once(self, request: bytes, context: Context) -> None:
        metadata = (("key", "value"), ("key-bin", b"\0\xff"))
        context.finish(grpc.StatusCode.NOT_FOUND, "ünknown\n100 %", metadata)

    async def refuse_stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            await self.refuse(request, context)

    async def repeat(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        count, _, size = (await anext(requests)).partition(b" ")
        for _ in range(int(count)):
            yield bytes(int(size))

    async def join(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        yield b"".join([request async for request in requests])

    async def echo_all(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        self.started.set()
        try:
            async for request in requests:
                yield request
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.ended.set()

    async def keep(self, request: bytes, context: Context) -> bytes:
        self.kept.append(request)
        del request
        self.started.set()
        await asyncio.sleep(60)
        return b""

    def keep_at_once(self, request: bytes, context: Context) -> None:
        context.given_up = self.cancelled.set
        self.kept.append(request)
        self.started.set()

    async def keep_one(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        self.kept.append(await anext(requests))
        self.started.set()
        await asyncio.sleep(60)
        yield b""

    async def never_read(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async def fail_in_stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            raise RuntimeError("/a/secret/path")

    def table(self) -> dict[str, Method]:
        def door(timeout: float | None, metadata: Metadata, expected: int, peer: Peer) -> Status | None:
            self.expected.append(expected)
            return self.door

        handlers = self

        class Hidden:
            """A coroutine function that does not look like one."""

            async def __call__(self, request: bytes, context: Context) -> bytes:
                return await handlers.echo(request, context)

        wrong: Any = Hidden()
        return table(
            "test.Test",
            {
                "Echo": UnaryMethod(self.echo),
                "Hidden": UnaryMethod(Hidden()),
                "HiddenAtOnce": CallbackMethod(wrong),
                "Wait": UnaryMethod(self.wait),
                "Answer": UnaryMethod(self.answer),
                "ForgetToAnswer": UnaryMethod(self.forget_to_answer),
                "CancelItself": UnaryMethod(self.cancel_itself),
                "AnswerAtOnce": CallbackMethod(self.answer_at_once),
                "AnswerLater": CallbackMethod(self.answer_later),
                "Guarded": CallbackMethod(self.answer_at_once, door),
                "Fail": UnaryMethod(self.fail),
                "FailAtOnce": CallbackMethod(self.fail_at_once),
                "FailInStream": StreamMethod(self.fail_in_stream),
                "Refuse": UnaryMethod(self.refuse),
                "RefuseAtOnce": CallbackMethod(self.refuse_at_once),
                "RefuseStream": StreamMethod(self.refuse_stream),
                "Repeat": StreamMethod(self.repeat),
                "Join": StreamMethod(self.join),
                "EchoAll": StreamMethod(self.echo_all),
                "Keep": UnaryMethod(self.keep),
                "KeepAtOnce": CallbackMethod(self.keep_at_once),
                "KeepOne": StreamMethod(self.keep_one),
                "NeverRead": StreamMethod(self.never_read),
            },
        )


class Serving(NamedTuple):
    """A server that runs in a thread."""

    server: Any
    handlers: Handlers
    port: int
    loop: asyncio.AbstractEventLoop
    refused: list[tuple[str, grpc.StatusCode, str]]

    @property
    def channel(self) -> Any:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    @property
    def memory(self) -> Memory:
        """Return the memory of a native server."""
        memory: Memory = self.server.memory
        return memory

    def stop(self, grace: float) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop).result(20)

    def drain(self, grace: float) -> None:
        asyncio.run_coroutine_threadsafe(self.server.drain(grace), self.loop).result(20)


def new_server(
    transport: str, limits: TransportLimits, connection_age: float = 0.0, grace: float = 0.0
) -> TransportServer:
    return (GrpcioServer if transport == "grpcio" else GrpcServer)(limits, connection_age, grace)


@contextmanager
def serve(
    transport: str = "native",
    stall_seconds: float = 60.0,
    limits: dict[str, Any] | None = None,
    **options: float,
) -> Iterator[Serving]:
    """A server with these options of GrpcServer and GrpcioServer. limits: further ones of TransportLimits."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Serving:
        refused: list[tuple[str, grpc.StatusCode, str]] = []
        all_limits = TransportLimits(
            MAX_BYTES,
            "too large",
            BYTES_UNDER_WAY,
            "too many",
            lambda path, _peer, _metadata, code, text: refused.append((path, code, text)),
            stall_seconds,
        )
        server, handlers = new_server(transport, replace(all_limits, **limits or {}), **options), Handlers()
        server.add_methods(handlers.table())
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        return Serving(server, handlers, port, loop, refused)

    try:
        serving = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield serving
        serving.stop(0)
        if transport == "native":
            assert serving.memory.used == 0, "bytes of calls that are over still count"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
