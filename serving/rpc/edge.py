"""The edge between gRPC and the services: bytes in and out, errors to status codes, and the RPC metrics.

Handlers get and give bytes, so that a message that cannot be parsed gets an answer of ours, and its size is known.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serving.errors import TRANSPORT, InvalidRequest, ServingError
from serving.logs import RefusalLog
from serving.metrics.registry import Metrics
from serving.rpc.door import MethodDoor, Refusal
from serving.rpc.recorder import Recorder
from serving.rpc.status import status_of
from serving.transport.headers import Metadata
from serving.transport.methods import CallbackMethod, Context, StreamMethod, UnaryMethod

#: Where a client may name its request, to find it again in the log.
REQUEST_ID = "x-request-id"
_SHOWN = 64  # characters of it

Request = TypeVar("Request", bound=Message)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Steps:
    """The model and size of a request that was answered, and the seconds of each part of its way."""

    model: str
    version: str
    images: int
    decode: float
    queue: float
    encode: float


class Trace(Protocol):
    """Takes note of a request that has ended; see Tracing.request in serving/rpc/tracing.py."""

    def __call__(
        self,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]],
        seconds: float,
        steps: Steps | None,
        code: grpc.StatusCode,
        /,
    ) -> None: ...


class Call:
    """An RPC under way: what a service is told of it, and where it answers.

    method: service/method. deadline: of the clock of ``time.monotonic``, or None. A unary one is ended by one of
    ``succeed``, ``fail`` and ``end``.
    """

    __slots__ = ("_began", "_context", "_edge", "_record", "deadline")

    def __init__(self, edge: "Edge", record: Recorder, context: Context) -> None:
        self.deadline: float | None = context.deadline
        self._edge = edge
        self._record = record
        self._context = context
        self._began = record.start()
        edge.under_way += 1

    @property
    def method(self) -> str:
        return self._record.name

    @property
    def traced(self) -> bool:
        return self._edge.trace is not None

    @property
    def over(self) -> bool:
        """Tell if the client no longer waits for the answer."""
        return self._context.over

    def when_given_up(self, then: Callable[[], object]) -> None:
        """Call ``then``, and nothing that was given before, once the client no longer waits for the answer."""
        self._context.given_up = then

    def succeed(self, data: bytes, steps: Steps | None = None) -> None:
        """The RPC has an answer."""
        self._context.answer(data)
        if self.traced:
            self.answered(self.seconds, steps)
        self.end(grpc.StatusCode.OK)

    def fail(self, error: Exception) -> None:
        """The RPC is answered with an error."""
        code, text = self._edge.to_status(error)
        self.refused(self.seconds, code, text)
        self._context.finish(code, text, status_of(error).metadata if isinstance(error, ServingError) else ())
        self.end(code)

    def end(self, code: grpc.StatusCode | None = None) -> None:
        """The RPC is over; without a code since the client, or its deadline, ended it."""
        given_up = grpc.StatusCode.DEADLINE_EXCEEDED if self._context.expired else grpc.StatusCode.CANCELLED
        self._record.end(self._began, code or given_up)
        self._edge.under_way -= 1

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    def answered(self, seconds: float, steps: Steps | None) -> None:
        """The RPC, or a request in its stream, was answered after so many seconds."""
        if trace := self._edge.trace:
            trace(self.method, self._context.invocation_metadata(), seconds, steps, grpc.StatusCode.OK)

    def refused(self, seconds: float, code: grpc.StatusCode, text: str) -> None:
        """The RPC, or a request in its stream, got an error after so many seconds."""
        self._edge.note_refusals(self.method, (self._context.invocation_metadata(),), seconds, code, text)


def request_id(metadata: Metadata) -> str:
    """The client's own, or else one made up."""
    given = next((value for key, value in metadata if key == REQUEST_ID and isinstance(value, str)), "")
    return given[:_SHOWN] if given else secrets.token_hex(8)


def check_size(data: bytes, max_bytes: int) -> None:
    """Raises InvalidRequest where a message is too large."""
    if len(data) > max_bytes:
        raise InvalidRequest("request", f"{len(data)} bytes; the limit is {max_bytes} bytes (max_request_bytes)")


def parse(data: bytes, kind: type[Request], max_bytes: int) -> Request:
    """A message from its bytes. Raises InvalidRequest."""
    check_size(data, max_bytes)
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("request", f"{len(data)} bytes that are not a {kind.DESCRIPTOR.full_name}") from error


class Edge:
    """Makes gRPC method handlers of a service's functions."""

    def __init__(self, metrics: Metrics, trace: Trace | None = None) -> None:
        self._metrics = metrics
        self.trace = trace
        self._log = RefusalLog()
        #: What clients are told: new requests are welcome.
        self.ready = False
        #: RPCs that have begun and not ended.
        self.under_way = 0

    def note_refusals(
        self, method: str, requests: Sequence[Metadata], seconds: float, code: grpc.StatusCode, text: str
    ) -> None:
        """Log and trace requests, by their metadata, that got the same error after so many seconds."""
        level = logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.INFO
        self._log.write(level, method, code.name, text, map(request_id, requests), len(requests))
        if self.trace:
            for metadata in requests:
                self.trace(method, metadata, seconds, None, code)

    def refused_by_transport(self, path: str, metadata: Metadata, code: grpc.StatusCode, text: str) -> None:
        """Count and log a call that no service has seen."""
        self._metrics.refused.labels(TRANSPORT).inc()
        self._log.write(logging.INFO, path[1:][:_SHOWN], code.name, text, map(request_id, (metadata,)), 1)

    def to_status(self, error: Exception, requests: int = 1) -> tuple[grpc.StatusCode, str]:
        """The status and text that clients are told, counted; what an error that is not ours says stays in the log."""
        if isinstance(error, ServingError):
            self._metrics.refused.labels(error.reason).inc(requests)
            return error.code, str(error)
        self._metrics.refused.labels("internal").inc()
        _logger.error("a request failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"

    def unary(self, service: str, method: str, answer: Callable[[bytes, Call], Awaitable[bytes]]) -> UnaryMethod:
        """Return a unary method that answers a message's bytes with a message's bytes."""
        record = Recorder(self._metrics, "unary", service, method)

        async def handle(data: bytes, context: Context) -> None:
            call = Call(self, record, context)
            try:
                response = await answer(data, call)
            except asyncio.CancelledError:
                call.end()
                raise
            except Exception as error:
                call.fail(error)
            else:
                call.succeed(response)

        return UnaryMethod(handle)

    def unary_at_once(
        self,
        service: str,
        method: str,
        begin: Callable[[bytes, Call], None],
        refusal: Refusal,
    ) -> CallbackMethod:
        """Return a unary method that is begun with a message's bytes, and answered then or later by way of its call.

        It needs no task of asyncio's, which would cost a tenth of the whole request. refusal: what calls are refused
        with at the door.
        """
        record = Recorder(self._metrics, "unary", service, method)

        def handle(data: bytes, context: Context) -> None:
            call = Call(self, record, context)
            try:
                begin(data, call)
            except Exception as error:
                call.fail(error)

        return CallbackMethod(handle, MethodDoor(self, record, refusal))

    def stream(
        self, service: str, method: str, answer: Callable[[AsyncIterator[bytes], Call], AsyncGenerator[bytes]]
    ) -> StreamMethod:
        """Return a bidirectional method; each message's bytes are the service's to refuse."""
        record = Recorder(self._metrics, "bidi_stream", service, method)

        async def handle(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            call = Call(self, record, context)
            try:
                async with aclosing(answer(requests, call)) as responses:
                    async for response in responses:
                        yield response
                        del response  # while the next one is waited for, which may never come
            except (asyncio.CancelledError, GeneratorExit):
                call.end()
                raise
            except Exception as error:
                call.fail(error)
            else:
                call.end(grpc.StatusCode.OK)

        return StreamMethod(handle)
