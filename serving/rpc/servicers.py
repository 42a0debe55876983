"""gRPC's own services, health and reflection, as methods of the table."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from serving.rpc.symbols import REFLECTION_V1, Symbols
from serving.transport.headers import Metadata, Status
from serving.transport.methods import Abort, Context, Method, StreamMethod, UnaryMethod, table

HEALTH = health.SERVICE_NAME
_WATCH = f"/{HEALTH}/Watch"
Answers = Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]
# The most bytes of a request for these services, which is a name. A watch keeps it, and no memory limit counts the
# bytes that a handler keeps.
_MAX_BYTES = 4096
#: The most watches of one connection. Each takes memory for as long as its client likes, and waits for the server.
MAX_WATCHES = 64


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # without stubs it is Any
    """The health service of the grpcio-health-checking package, with List answered too."""

    def __init__(self) -> None:
        super().__init__()
        self._names = {""}

    async def set(self, service: str, status: int) -> None:
        """Set the status of a service (HealthCheckResponse.ServingStatus)."""
        self._names.add(service)
        await super().set(service, status)

    async def List(self, request: Any, context: Any) -> Any:
        """Return the status of every service."""
        asked = {name: health_pb2.HealthCheckRequest(service=name) for name in sorted(self._names)}
        statuses = {name: await self.Check(request, context) for name, request in asked.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


def health_methods(servicer: Health) -> dict[str, Method]:
    """Return the methods of the health service."""
    methods = _methods(health_pb2_grpc.add_HealthServicer_to_server, servicer)
    watch = methods[_WATCH]
    assert isinstance(watch, StreamMethod)
    return methods | {_WATCH: StreamMethod(_limited(watch.answers))}


def _limited(watch: Answers) -> Answers:
    """Return a function that answers like ``watch``, MAX_WATCHES times at once for each connection."""
    watches: Counter[str] = Counter()

    async def answers(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        connection = context.peer.connection
        if watches[connection] >= MAX_WATCHES:
            text = f"this connection watches the health {MAX_WATCHES} times already, which is the limit"
            raise Abort(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
        watches[connection] += 1
        try:
            async with aclosing(watch(requests, context)) as found:  # type: ignore[type-var]
                async for answer in found:
                    yield answer
        finally:
            watches[connection] -= 1
            if not watches[connection]:
                del watches[connection]

    return answers


def reflection_methods(services: Iterable[str]) -> dict[str, Method]:
    """Return the methods of reflection, of v1alpha and of v1, which have the same messages.

    services: names of all services that the table has beside reflection.
    """
    names = (*services, reflection.SERVICE_NAME, REFLECTION_V1)
    servicer = reflection.aio.ReflectionServicer(names, Symbols())
    methods = _methods(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer)
    renamed = {path.replace(reflection.SERVICE_NAME, REFLECTION_V1): method for path, method in methods.items()}
    return methods | renamed


class _Collector:
    """Stands in for a server where generated code adds a servicer's handlers."""

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing, since the same handlers come by their names too."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take the handlers of a service."""
        self.methods |= table(service, {name: _method(handler) for name, handler in handlers.items()})


def _methods(add: Callable[[Any, Any], None], servicer: object) -> dict[str, Method]:
    collector = _Collector()
    add(servicer, collector)
    return collector.methods


def _method(handler: Any) -> Method:
    """Return a method of the table that does what a handler of generated code does (a grpc.RpcMethodHandler)."""
    parse: Callable[[bytes], Any] = handler.request_deserializer
    serialize: Callable[[Any], bytes] = handler.response_serializer
    if handler.unary_unary:

        async def answer(data: bytes, context: Context) -> bytes:
            with _Statuses(context) as given:
                answer = handler.unary_unary(_parsed(parse, data), given)
                return serialize(await answer if inspect.isawaitable(answer) else answer)

        return UnaryMethod(answer)

    async def answers(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        with _Statuses(context) as given:
            if handler.stream_stream:
                found = handler.stream_stream((_parsed(parse, data) async for data in requests), given)
            else:
                found = _written(handler.unary_stream, _parsed(parse, await _only(requests)), given)
            async for answer in found:
                yield serialize(answer)

    return StreamMethod(answers)


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Return a message from its bytes. Raises Abort."""
    if len(data) > _MAX_BYTES:
        text = f"request: {len(data)} bytes; the limit is {_MAX_BYTES} bytes"
        raise Abort(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
    try:
        return parse(data)
    except DecodeError as error:
        text = "request: bytes that cannot be read as its message"
        raise Abort(Status(grpc.StatusCode.INVALID_ARGUMENT, text)) from error


async def _only(requests: AsyncIterator[bytes]) -> bytes:
    """Return the one message of a method that takes one. Raises Abort."""
    async for data in requests:
        return data
    raise Abort(Status(grpc.StatusCode.UNIMPLEMENTED, "no message; expected one"))


async def _written(behaviour: Callable[[Any, Any], Any], request: Any, context: "_Statuses") -> AsyncIterator[Any]:
    """Yield what a handler sends by ``write`` of its context."""
    writer = asyncio.ensure_future(behaviour(request, context))
    writer.add_done_callback(lambda _: context.written.put_nowait(None))
    try:
        while (answer := await context.written.get()) is not None:
            yield answer
        await writer  # raises what it raised
    finally:
        writer.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await writer


class _Statuses:
    """The part of a servicer's context that gRPC's own services use.

    As a context manager it makes UNIMPLEMENTED of a method that its servicer does not implement.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.written: asyncio.Queue[Any] = asyncio.Queue()

    def __enter__(self) -> "_Statuses":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotImplementedError):
            raise Abort(Status(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")) from error

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self._context.invocation_metadata()

    def set_code(self, code: grpc.StatusCode) -> None:
        """Do nothing: only a method that is not implemented sets a code, and what it raises says the same."""

    def set_details(self, details: str) -> None:
        """Do nothing, as with the code."""

    async def write(self, answer: Any) -> None:
        """Send one answer of several."""
        await self.written.put(answer)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status."""
        raise Abort(Status(code, details, trailing_metadata))
