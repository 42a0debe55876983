"""The edge between gRPC and the services: bytes in and out, errors to status codes, and the RPC metrics.

Handlers take and return bytes, so that this server answers an invalid message itself, and knows its size.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
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
from serving.transport.headers import Metadata, Status
from serving.transport.methods import CallbackMethod, Context, Peer, StreamMethod, UnaryMethod, client_of
from serving.transport.rounds import Result

#: The metadata in which a client may name its request, to find it in the log.
REQUEST_ID = "x-request-id"
_MAX_SHOWN_CHARACTERS = 64
#: The longest name of a request in a stream, or in the Open Inference Protocol.
MAX_ID_CHARACTERS = 4096
#: The largest message that has names and nothing else.
MAX_NAMES_BYTES = 65536

Request = TypeVar("Request", bound=Message)
#: The metadata and the client of a refused request.
Refused = tuple[Metadata, Peer]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Steps:
    """The model and size of an answered request, and the seconds of each step."""

    model: str
    version: str
    images: int
    decode: float
    queue: float
    encode: float


class Trace(Protocol):
    """A function that traces an ended request; see Tracing.request in serving/rpc/tracing.py."""

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
    """An RPC in flight, with which a service reads its properties and answers it.

    method: service/method. deadline: a time of ``time.monotonic``, or None. A unary RPC ends with one of ``succeed``,
    ``fail`` and ``end``.
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
    def client(self) -> Hashable:
        """Return a key of the client's connection."""
        return self._context.peer.connection

    @property
    def traced(self) -> bool:
        return self._edge.trace is not None

    @property
    def over(self) -> bool:
        """Return True if the client does not wait for the answer."""
        return self._context.over

    def when_given_up(self, then: Callable[[], object]) -> None:
        """Set the function that is called once the client does not wait for the answer. It replaces an earlier one."""
        self._context.given_up = then

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return what runs a part of the RPC in a task of its own, in turns with the work of other clients."""
        return self._context.in_turns(work)

    def keep(self, size: int) -> None:
        """Count bytes of answers that a stream keeps, or a negative number of those that it keeps no longer."""
        self._context.keep(size)

    def succeed(self, data: bytes, steps: Steps | None = None) -> None:
        """Send the answer, and end the RPC."""
        self._context.answer(data)
        if self.traced:
            self.answered(self.seconds, steps)
        self.end(grpc.StatusCode.OK)

    def fail(self, error: Exception) -> None:
        """Send an error, and end the RPC."""
        code, text = self._edge.to_status(error)
        self.refused(self.seconds, code, text)
        self._context.finish(code, text, status_of(error).metadata if isinstance(error, ServingError) else ())
        self.end(code)

    def note(self, change: str) -> None:
        """Log a change of the server that was made for the client."""
        self._edge.note_change(self.method, self._context.invocation_metadata(), self._context.peer, change)

    def end(self, code: grpc.StatusCode | None = None) -> None:
        """Note the end of the RPC. code: None if the client or its deadline ended it."""
        if code is None:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if self._context.expired else grpc.StatusCode.CANCELLED
        self._record.end(self._began, code)
        self._edge.under_way -= 1

    @property
    def seconds(self) -> float:
        """Return the seconds since the RPC began."""
        return time.perf_counter() - self._began

    def answered(self, seconds: float, steps: Steps | None) -> None:
        """Trace that the RPC, or a request in its stream, was answered after these seconds."""
        if trace := self._edge.trace:
            trace(self.method, self._context.invocation_metadata(), seconds, steps, grpc.StatusCode.OK)

    def refused(self, seconds: float, code: grpc.StatusCode, text: str) -> None:
        """Log and trace that the RPC, or a request in its stream, got an error after these seconds."""
        refused = (self._context.invocation_metadata(), self._context.peer)
        self._edge.note_refusals(self.method, (refused,), seconds, code, text)


def request_id(metadata: Metadata) -> str:
    """Return the request id that the client gave, or a generated one."""
    given = next((value for key, value in metadata if key == REQUEST_ID and isinstance(value, str)), "")
    return given[:_MAX_SHOWN_CHARACTERS] if given else secrets.token_hex(8)


def _client(peer: Peer) -> dict[str, str]:
    """Return the fields of the log that name a client: its address, and the name that is known or certified."""
    name = peer.name or (f"certificate {peer.subject}" if peer.subject else "")
    fields = {"peer": peer.address} if peer.address else {}
    return fields if name in ("", client_of(peer.address)) else fields | {"client": name}


def _fields(method: str, code: grpc.StatusCode, metadata: Metadata, peer: Peer) -> dict[str, str]:
    """Return the fields of the log for a refused request."""
    return {"method": method, "code": code.name, "request_id": request_id(metadata), **_client(peer)}


def _shown(path: str) -> str:
    """Return service/method of a path that any client may have made up."""
    return path[1:][:_MAX_SHOWN_CHARACTERS]


def check_size(data: bytes, max_bytes: int) -> None:
    """Raise InvalidRequest if a message is too large."""
    if len(data) > max_bytes:
        raise InvalidRequest("request", f"{len(data)} bytes; the limit is {max_bytes} bytes (max_request_bytes)")


def parse(data: bytes, kind: type[Request], max_bytes: int) -> Request:
    """Parse a message. Raises InvalidRequest."""
    check_size(data, max_bytes)
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise malformed(len(data), kind) from error


def parse_names(data: bytes, kind: type[Request], max_bytes: int) -> Request:
    """Parse a message that has names and nothing else. Raises InvalidRequest for a long one, which takes longer."""
    if len(data) > MAX_NAMES_BYTES:
        raise InvalidRequest("request", f"{len(data)} bytes; expected at most {MAX_NAMES_BYTES} of names")
    return parse(data, kind, max_bytes)


def check_id(identifier: str) -> None:
    """Raise InvalidRequest for the long name of a request, which is kept until its answer and comes back in it."""
    if len(identifier) > MAX_ID_CHARACTERS:
        raise InvalidRequest("id", f"{len(identifier)} characters; expected at most {MAX_ID_CHARACTERS}")


def malformed(size: int, kind: type[Message]) -> InvalidRequest:
    """Return the error for ``size`` bytes that are no message of a kind."""
    return InvalidRequest("request", f"{size} bytes that are not a {kind.DESCRIPTOR.full_name}")


class Edge:
    """The maker of gRPC methods from a service's functions."""

    def __init__(self, metrics: Metrics, trace: Trace | None = None) -> None:
        self._metrics = metrics
        self.trace = trace
        self._log = RefusalLog()
        self._connection_log = RefusalLog(events="connections were refused or ended")
        self._act_log = RefusalLog(events="changes were made for clients")
        #: True while new requests are accepted.
        self.ready = False
        #: The number of RPCs in flight.
        self.under_way = 0

    def note_refusals(
        self, method: str, requests: Sequence[Refused], seconds: float, code: grpc.StatusCode, text: str
    ) -> None:
        """Log and trace requests that got the same error after these seconds."""
        level = logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.INFO
        self._log.write(level, text, (_fields(method, code, *one) for one in requests), len(requests))
        if self.trace:
            for metadata, _ in requests:
                self.trace(method, metadata, seconds, None, code)

    def refused_by_transport(self, path: str, peer: Peer, metadata: Metadata, code: grpc.StatusCode, text: str) -> None:
        """Count and log a call that no service has seen."""
        self._metrics.refused.labels(TRANSPORT).inc()
        self._log.write(logging.INFO, text, (_fields(_shown(path), code, metadata, peer) for _ in range(1)), 1)

    def denied(self, path: str, peer: Peer, metadata: Metadata, error: ServingError) -> Status:
        """Count and log a call that its client may not make, or nobody may, and return the status to send."""
        self._metrics.refused.labels(error.reason).inc()
        fields = (_fields(_shown(path), error.code, metadata, peer) for _ in range(1))
        self._log.write(logging.INFO, str(error), fields, 1)
        return status_of(error)

    def note_change(self, method: str, metadata: Metadata, peer: Peer, change: str) -> None:
        """Log a change of the server that was made for a client."""
        fields = {"method": method, "request_id": request_id(metadata), **_client(peer)}
        self._act_log.write(logging.INFO, change, [fields], 1)

    def dropped(self, text: str, peer: Peer) -> None:
        """Log the end of a connection, or of an answer, that the transport has caused."""
        self._connection_log.write(logging.INFO, text, [_client(peer)], 1)

    def to_status(self, error: Exception, requests: int = 1) -> tuple[grpc.StatusCode, str]:
        """Return the status and text for clients, and count the requests.

        Other errors are logged, without text to clients.
        """
        if isinstance(error, ServingError):
            self._metrics.refused.labels(error.reason).inc(requests)
            return error.code, str(error)
        self._metrics.refused.labels("internal").inc()
        _logger.error("a request failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"

    def unary(
        self,
        service: str,
        method: str,
        answer: Callable[[bytes, Call], Awaitable[bytes]],
        refusal: Refusal | None = None,
    ) -> UnaryMethod:
        """Return a unary method that answers a message's bytes with a message's bytes.

        refusal: decides which calls are refused at the door, and with which error; None to refuse none there.
        """
        record = Recorder(self._metrics, "unary", service, method)

        async def handle(data: bytes, context: Context) -> None:
            call = Call(self, record, context)
            answering = answer(data, call)
            del data  # which the service may free once it is parsed
            try:
                response = await answering
            except asyncio.CancelledError:
                call.end()
                raise
            except Exception as error:
                call.fail(error)
            else:
                call.succeed(response)

        return UnaryMethod(handle, MethodDoor(self, record, refusal) if refusal else None)

    def unary_at_once(
        self,
        service: str,
        method: str,
        begin: Callable[[bytes, Call], None],
        refusal: Refusal,
    ) -> CallbackMethod:
        """Return a unary method that begins with a message's bytes, and whose call is answered then or later.

        It needs no asyncio task; benchmarks/README.md has the gain. refusal: decides which calls are refused at the
        door, and with which error.
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
        """Return a bidirectional method. The service itself must check the bytes of each message."""
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
