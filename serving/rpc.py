"""The edge between gRPC and the service: bytes in and out, errors to status codes, and the RPC metrics.

Handlers get and give bytes, so that a message that cannot be parsed gets an answer of ours, and its size is known.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serving.errors import Draining, InvalidRequest, ServingError, TooLarge
from serving.metrics import Metrics

Request = TypeVar("Request", bound=Message)

_logger = logging.getLogger(__name__)


def parse(data: bytes, kind: type[Request], max_bytes: int) -> Request:
    """A message from its bytes. Raises TooLarge and InvalidRequest."""
    if len(data) > max_bytes:
        raise TooLarge(f"request: {len(data)} bytes; the limit is {max_bytes} bytes (max_request_bytes)")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"request: {len(data)} bytes that are not a {kind.DESCRIPTOR.full_name}") from error


def to_status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and text that a client is told; the text of an error that is not ours stays in the log."""
    if isinstance(error, ServingError):
        return error.code, str(error)
    _logger.error("a request failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"


class Edge:
    """Makes gRPC method handlers of the service's functions, for one gRPC service."""

    def __init__(self, service: str, metrics: Metrics, max_request_bytes: int) -> None:
        self._service = service
        self._metrics = metrics
        self._max_bytes = max_request_bytes
        self._draining = False
        #: RPCs that have begun and not ended.
        self.under_way = 0

    def refuse_new(self) -> None:
        """Answer every RPC that begins from now on with UNAVAILABLE; those under way go on."""
        self._draining = True

    def _admit(self) -> None:
        if self._draining:
            raise Draining

    def unary(
        self, method: str, kind: type[Request], answer: Callable[[Request], Awaitable[Message]]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """A unary method that answers a request of this kind."""
        record = _Recorder(self._metrics, "unary", self._service, method)

        async def handle(data: bytes, context: Any) -> bytes:
            start = record.start()
            self.under_way += 1
            try:
                self._admit()
                response = (await answer(parse(data, kind, self._max_bytes))).SerializeToString()
            except asyncio.CancelledError:
                record.end(start, _why_cancelled(context))
                raise
            except Exception as error:
                await _abort(error, record, start, context)
            finally:
                self.under_way -= 1
            record.end(start, grpc.StatusCode.OK)
            return response

        return grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self, method: str, answer: Callable[[AsyncIterator[bytes]], AsyncIterator[Message]]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """A bidirectional method; ``answer`` gets the messages' bytes, so that each can be refused by itself."""
        record = _Recorder(self._metrics, "bidi_stream", self._service, method)

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            start = record.start()
            self.under_way += 1
            try:
                self._admit()
                async for response in answer(requests):
                    yield response.SerializeToString()
            except (asyncio.CancelledError, GeneratorExit):
                record.end(start, _why_cancelled(context))
                raise
            except Exception as error:
                await _abort(error, record, start, context)
            else:
                record.end(start, grpc.StatusCode.OK)
            finally:
                self.under_way -= 1

        return grpc.stream_stream_rpc_method_handler(handle)


async def _abort(error: Exception, record: "_Recorder", start: float, context: Any) -> NoReturn:
    code, text = to_status(error)
    record.end(start, code)
    await context.abort(code, text)
    raise AssertionError("abort raises") from error


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
