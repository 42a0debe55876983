"""The edge between gRPC and the services: bytes in and out, errors to status codes, and the RPC metrics.

Handlers get and give bytes, so that a message that cannot be parsed gets an answer of ours, and its size is known.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from serving.errors import Draining, InvalidRequest, QueueFull, ServingError
from serving.logs import RefusalLog
from serving.metrics import Metrics

#: Where a client may name its request, to find it again in the log.
REQUEST_ID = "x-request-id"
_SHOWN = 64  # characters of it

Request = TypeVar("Request", bound=Message)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Steps:
    """Of a request that was answered: what it was about, and the seconds of each part of its way."""

    model: str
    version: str
    images: int
    decode: float
    queue: float
    encode: float


class Trace(Protocol):
    """Takes note of a request that has ended; see Tracing.request in serving/tracing.py."""

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
    """What a service is told of the RPC that it answers.

    method: service/method. deadline: of the clock of ``time.monotonic``, or None. steps: for the service to set.
    """

    def __init__(self, method: str, context: Any, log: RefusalLog, trace: Trace | None) -> None:
        self.method = method
        self.steps: Steps | None = None
        self._context = context
        self._log = log
        self._trace = trace
        remaining = context.time_remaining()
        self.deadline = None if remaining is None else time.monotonic() + remaining

    @property
    def traced(self) -> bool:
        return self._trace is not None

    def answered(self, seconds: float, steps: Steps | None) -> None:
        """The RPC, or a request in its stream, was answered after so many seconds."""
        if self._trace:
            self._trace(self.method, self._metadata(), seconds, steps, grpc.StatusCode.OK)

    def refused(self, seconds: float, code: grpc.StatusCode, text: str) -> None:
        """The RPC, or a request in its stream, got an error after so many seconds."""
        level = logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.INFO
        self._log.write(level, self.method, code.name, text, self._request_id)
        if self._trace:
            self._trace(self.method, self._metadata(), seconds, None, code)

    @property
    def _request_id(self) -> str:
        """The client's own, or else one made up."""
        given = next((value for key, value in self._metadata() if key == REQUEST_ID and isinstance(value, str)), "")
        return given[:_SHOWN] if given else secrets.token_hex(8)

    def _metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._context.invocation_metadata() or ()


def parse(data: bytes, kind: type[Request], max_bytes: int) -> Request:
    """A message from its bytes. Raises InvalidRequest."""
    if len(data) > max_bytes:
        raise InvalidRequest("request", f"{len(data)} bytes; the limit is {max_bytes} bytes (max_request_bytes)")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest("request", f"{len(data)} bytes that are not a {kind.DESCRIPTOR.full_name}") from error


class Edge:
    """Makes gRPC method handlers of a service's functions."""

    def __init__(self, metrics: Metrics, trace: Trace | None = None) -> None:
        self._metrics = metrics
        self._trace = trace
        self._log = RefusalLog()
        self._draining = False
        #: What clients are told: new requests are welcome.
        self.ready = False
        #: RPCs that have begun and not ended.
        self.under_way = 0

    def refuse_new(self) -> None:
        """Answer every RPC that begins from now on with UNAVAILABLE; those under way go on."""
        self._draining = True

    def to_status(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        """The status and text that a client is told, counted; what an error that is not ours says stays in the log."""
        if isinstance(error, ServingError):
            self._metrics.refused.labels(error.reason).inc()
            return error.code, str(error)
        self._metrics.refused.labels("internal").inc()
        _logger.error("a request failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"

    def unary(
        self, service: str, method: str, answer: Callable[[bytes, Call], Awaitable[bytes]]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """A unary method that answers a message's bytes with a message's bytes."""
        record = _Recorder(self._metrics, "unary", service, method)
        name = f"{service}/{method}"

        async def handle(data: bytes, context: Any) -> bytes:
            start = record.start()
            self.under_way += 1
            call = Call(name, context, self._log, self._trace)
            try:
                self._admit()
                response = await answer(data, call)
            except asyncio.CancelledError:
                record.end(start, _why_cancelled(context))
                raise
            except Exception as error:
                await self._abort(error, record, start, call, context)
            finally:
                self.under_way -= 1
            if self._trace:
                call.answered(time.perf_counter() - start, call.steps)
            record.end(start, grpc.StatusCode.OK)
            return response

        return grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self, service: str, method: str, answer: Callable[[AsyncIterator[bytes], Call], AsyncGenerator[bytes]]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """A bidirectional method; each message's bytes are the service's to refuse."""
        record = _Recorder(self._metrics, "bidi_stream", service, method)
        name = f"{service}/{method}"

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            start = record.start()
            self.under_way += 1
            call = Call(name, context, self._log, self._trace)
            try:
                self._admit()
                async with aclosing(answer(requests, call)) as responses:
                    async for response in responses:
                        yield response
            except (asyncio.CancelledError, GeneratorExit):
                record.end(start, _why_cancelled(context))
                raise
            except Exception as error:
                await self._abort(error, record, start, call, context)
            else:
                record.end(start, grpc.StatusCode.OK)
            finally:
                self.under_way -= 1

        return grpc.stream_stream_rpc_method_handler(handle)

    def _admit(self) -> None:
        if self._draining:
            raise Draining

    async def _abort(self, error: Exception, record: "_Recorder", start: float, call: Call, context: Any) -> NoReturn:
        code, text = self.to_status(error)
        call.refused(time.perf_counter() - start, code, text)
        record.end(start, code)
        await context.abort(code, text, _details(error, code, text))
        raise AssertionError("abort raises") from error


def _details(error: Exception, code: grpc.StatusCode, text: str) -> tuple[tuple[str, str | bytes], ...]:
    """What goes with a status for programs: which field is wrong, or when to try again."""
    detail: BadRequest | RetryInfo
    hint: tuple[tuple[str, str | bytes], ...] = ()
    match error:
        case InvalidRequest():
            violation = BadRequest.FieldViolation(field=error.field, description=error.description)
            detail = BadRequest(field_violations=[violation])
        case QueueFull():
            milliseconds = max(1, math.ceil(1000 * error.retry_after))
            detail = RetryInfo()
            detail.retry_delay.FromMilliseconds(milliseconds)
            hint = (("grpc-retry-pushback-ms", str(milliseconds)),)
        case _:
            return ()
    packed = AnyMessage()
    packed.Pack(detail)
    status = Status(code=code.value[0], message=text, details=[packed])
    return (("grpc-status-details-bin", status.SerializeToString()), *hint)


def _why_cancelled(context: Any) -> grpc.StatusCode:
    """gRPC cancels a handler when its client's deadline passes as well as when the client cancels."""
    remaining = context.time_remaining()
    expired = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


class _Recorder:
    """The RPC metrics of one method, their labels looked up once."""

    def __init__(self, metrics: Metrics, kind: str, service: str, method: str) -> None:
        labels = (kind, service, method)
        self._started = metrics.started.labels(*labels)
        self._handling = metrics.handling.labels(*labels)
        self._handled = {code: metrics.handled.labels(*labels, code.name) for code in grpc.StatusCode}

    def start(self) -> float:
        self._started.inc()
        return time.perf_counter()

    def end(self, start: float, code: grpc.StatusCode) -> None:
        self._handling.observe(time.perf_counter() - start)
        self._handled[code].inc()
