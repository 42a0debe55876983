"""One RPC: its messages, its deadline and its status (gRPC's PROTOCOL-HTTP2.md)."""

import asyncio
import logging
import struct
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from serving.transport import frames, headers
from serving.transport.frames import ErrorCode
from serving.transport.headers import RequestHead

if TYPE_CHECKING:
    from serving.transport.connection import Connection

#: Bytes of a call that a client may send ahead of what is read.
WINDOW = 2**18
#: Encodings of messages that a client may use, and zlib's parameter for each.
ENCODINGS = {"gzip": 31, "deflate": 15}
_MOST_UNSENT = 2**16  # bytes of answers that wait for the client, after which a stream's handler waits
_UNREAD_SECONDS = 60.0  # for a client without a deadline to take its only answer
_MESSAGE_BYTES = 64  # that a message takes beside its own
_UNPACKED_AT_ONCE = 2**16  # bytes that are unpacked on the event loop; more takes a thread
_PREFIX = struct.Struct(">BI")  # before each message: whether it is compressed, and its length
_STREAM = struct.Struct(">I")
_END = frames.END_STREAM | frames.END_HEADERS

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """A method's handler: ``behaviour`` takes what ``deserialize`` makes of a message, or an iterator of them.

    at_once: it is no coroutine; it takes note of the request, and ``answer`` or ``finish`` is called then or later.
    door: asked as soon as the headers are there, with how many calls were let in before it, of what is being read of
    this connection, and have yet to come in full; the header block of a refusal, or None to go on.
    """

    behaviour: Callable[[Any, "Call"], Any]
    many_requests: bool
    many_answers: bool
    deserialize: Callable[[bytes], Any] | None
    serialize: Callable[[Any], bytes] | None
    at_once: bool
    door: "Callable[[RequestHead[Method], int], bytes | None] | None" = None


@dataclass(slots=True)
class Budget:
    """Bytes of requests under way, and of answers that their clients do not take, of all clients.

    most: how many there may be. partial: the calls with a message that has not come in full, in the order of their
    beginning.
    """

    most: int
    used: int = 0
    partial: "dict[Call, None]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """message: most bytes of one; message_text and budget_text: what clients are told of the limits.

    refused: told of each call that the transport itself refuses: its path, its metadata, the status and the text.
    """

    message: int
    message_text: str
    budget: Budget
    budget_text: str
    refused: Callable[[str, headers.Metadata, grpc.StatusCode, str], None] = lambda *_: None


class _Aborted(Exception):
    """A handler has ended its call by ``abort``."""


_ANSWER_HEAD = frames.head_of(frames.HEADERS, frames.END_HEADERS, len(headers.ANSWER))
_OK_HEAD = frames.head_of(frames.HEADERS, _END, len(headers.OK))


class Call:
    """A stream of a connection, and the context that its handler is given, with methods named as in ``grpc.aio``.

    It also is the iterator of its requests. Only the event loop's thread may use it.
    """

    __slots__ = (
        "_head",
        "_headers_sent",
        "_held",
        "_limits",
        "_may_receive",
        "_messages",
        "_method",
        "_partial",
        "_room",
        "_stream_bytes",
        "_task",
        "_timer",
        "_trailers",
        "_unpacking",
        "_unsent",
        "_unsent_bytes",
        "_waiter",
        "closed",
        "connection",
        "deadline",
        "ended",
        "expired",
        "given_up",
        "stream",
        "window",
    )

    def __init__(
        self,
        connection: "Connection",
        stream: int,
        head: RequestHead[Method],
        method: Method,
        limits: Limits,
        window: int,
    ) -> None:
        self.connection = connection
        self.stream = stream
        #: Bytes that the client lets this stream send.
        self.window = window
        #: Nothing is sent any more, and nothing that comes is read.
        self.closed = False
        self._stream_bytes = _STREAM.pack(stream)
        self._head = head
        self._method = method
        self._limits = limits
        self._may_receive = WINDOW
        self._partial: bytearray | None = None  # of a message
        self._unpacking: asyncio.Future[bytes | None] | None = None  # of a message
        self._held = 0  # bytes that count in the budget
        self._messages: deque[bytes] = deque()
        #: The client has sent all.
        self.ended = False
        self._waiter: asyncio.Future[None] | None = None  # of who reads
        self._room: asyncio.Future[None] | None = None  # of who writes
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._headers_sent = False
        self._trailers: bytes | None = None  # to be sent once all else is
        self._task: asyncio.Task[None] | None = None
        #: Of the clock of ``time.monotonic``.
        self.deadline: float | None = None
        #: The deadline, and not the client, ended it.
        self.expired = False
        #: Told when nobody waits for the answer any more, before there is one.
        self.given_up: Callable[[], object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if (timeout := head.timeout) is not None:
            self.deadline = time.monotonic() + timeout
            self._timer = connection.loop.call_later(timeout, self._expire)

    def begin(self) -> None:
        """Once the headers are there: a method that takes many requests can start."""
        budget = self._limits.budget
        self._hold(self._head.size)
        if budget.used > budget.most and not self._make_room():
            return
        if self._head.timeout_error:
            self.refuse(grpc.StatusCode.INTERNAL, f"grpc-timeout: {self._head.timeout_error!r} is not a timeout")
        elif self._method.many_requests:
            self._start()

    def invocation_metadata(self) -> headers.Metadata:
        return self._head.metadata

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Iterable[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """End the call with a status; raises what ends the handler."""
        self.finish(code, details, trailing_metadata)
        raise _Aborted

    async def write(self, message: Any) -> None:
        """Send an answer of several; waits while the client does not read."""
        if self.over:
            return
        data = message if self._method.serialize is None else self._method.serialize(message)
        size = len(data) + _PREFIX.size
        connection = self.connection
        if not self._headers_sent:
            self._send_headers()
        if not self._unsent and size <= self.window and size <= connection.window and size <= frames.MOST_BYTES:
            self.window -= size
            connection.window -= size
            parts = frames.head_of(frames.DATA, 0, size), self._stream_bytes, _PREFIX.pack(0, len(data)), data
            connection.send(b"".join(parts))
        else:
            self._queue(data)
        while not self.closed and (self._unsent_bytes > _MOST_UNSENT or connection.paused):
            self._room = connection.loop.create_future()
            await self._room

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._messages:
            if self.closed or (self.ended and not self._unpacking):
                raise StopAsyncIteration
            self._waiter = self.connection.loop.create_future()
            await self._waiter
        data = self._messages.popleft()
        self._release(len(data) + _PREFIX.size + _MESSAGE_BYTES)
        if not self._messages:
            self._let_send()
        return data if self._method.deserialize is None else self._method.deserialize(data)

    def receive(self, data: bytes, size: int, end: bool) -> None:
        """What the client sent; size: bytes of it that count for flow control; end: it is all."""
        self._may_receive -= size
        if self._may_receive < 0:
            self.connection.reset(self, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if self.ended:
            self.connection.reset(self, ErrorCode.STREAM_CLOSED)
            return
        self.ended = end
        if self._trailers is not None:
            return
        budget = self._limits.budget
        self._hold(len(data))
        if budget.used > budget.most and not self._make_room():
            return
        if self._unpacking:
            self._partial = self._partial or bytearray()
            self._partial += data
            return
        if self._partial:
            self._partial += data
            if not self._split(self._partial):
                return
        elif not self._split(data):
            return
        if end:
            self._all_received()
        elif self._may_receive < WINDOW // 2 and not self._messages:
            self._let_send()

    def end(self) -> None:
        """The client has sent all, and said so without data."""
        if not self.ended:
            self.ended = True
            if not self._unpacking and not self.over:
                self._all_received()

    @property
    def over(self) -> bool:
        """Nobody waits for anything more."""
        return self.closed or self._trailers is not None

    def refuse(self, code: grpc.StatusCode, text: str) -> None:
        """End the call with an error, whatever its handler does."""
        if not self.over and not self._task and not self.given_up:
            self._limits.refused(self._head.path, self._head.metadata, code, text)
        self._stop_handler()
        self.finish(code, text)

    def abandon(self) -> None:
        """The client has gone, or is to be sent nothing more."""
        self._stop_handler()
        self._close()

    def _stop_handler(self) -> None:
        if self._task:
            self._task.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def pump(self) -> None:
        """Send what waits, as far as the client lets it."""
        connection, unsent = self.connection, self._unsent
        while unsent:
            size = min(len(unsent[0]), self.window, connection.window, frames.MOST_BYTES)
            if size <= 0:
                if self.window > 0:
                    connection.blocked[self.stream] = self
                else:  # not to be looked at again before its own window opens
                    connection.blocked.pop(self.stream, None)
                return
            self.window -= size
            connection.window -= size
            self._unsent_bytes -= size
            self._release(size)
            connection.send(frames.frame(frames.DATA, 0, self.stream, bytes(unsent[0][:size])))
            if size == len(unsent[0]):
                unsent.popleft()
            else:
                unsent[0] = unsent[0][size:]
        connection.blocked.pop(self.stream, None)
        self.wake_writer()
        if self._trailers is not None:
            connection.send_headers(self.stream, self._trailers, end_stream=True)
            self._leave()

    def pump_more(self) -> None:
        """The window is another."""
        if self._unsent:
            self.pump()

    def wake_writer(self) -> None:
        if self._room and not self._room.done():
            self._room.set_result(None)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Send the status, after all that waits to be sent."""
        self.given_up = None
        if self.over:
            return
        if code is grpc.StatusCode.OK:
            self._trailers = headers.OK
        else:
            self._trailers = headers.write(headers.status_fields(code, text, metadata))
        if not self._headers_sent:  # one block for both
            self._trailers = headers.ANSWER + self._trailers
            self._headers_sent = True
        self.pump()

    def answer(self, data: bytes) -> None:
        """Send the only answer, and that all went well."""
        self.given_up = None
        size = len(data) + _PREFIX.size
        connection = self.connection
        if self.closed:
            return
        fits = size <= self.window and size <= connection.window and size <= frames.MOST_BYTES
        if fits and not connection.shrinks_table:
            connection.window -= size
            stream = self._stream_bytes
            head = frames.head_of(frames.DATA, 0, size)
            prefix = _PREFIX.pack(0, len(data))
            connection.send(
                b"".join(
                    (_ANSWER_HEAD, stream, headers.ANSWER, head, stream, prefix, data, _OK_HEAD, stream, headers.OK)
                )
            )
            self._leave()
            return
        self._send_headers()
        self._queue(data)
        self.finish(grpc.StatusCode.OK)
        if not self.closed and not self._timer:
            self._timer = connection.loop.call_later(_UNREAD_SECONDS, self._expire)

    def _send_headers(self) -> None:
        self._headers_sent = True
        self.connection.send_headers(self.stream, headers.ANSWER, end_stream=False)

    def _queue(self, data: bytes) -> None:
        message = _PREFIX.pack(0, len(data)) + data
        self._unsent.append(memoryview(message))
        self._unsent_bytes += len(message)
        self._hold(len(message))
        self.pump()

    def _make_room(self) -> bool:
        """Give up messages that have been coming for the longest, or else this call; False if it is this."""
        budget = self._limits.budget
        while budget.used > budget.most and not self.over:
            call = next(iter(budget.partial), self)
            budget.partial.pop(call, None)
            call.refuse(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"requests of {budget.used} bytes are under way; {self._limits.budget_text}; try again later",
            )
        return not self.over

    def _split(self, data: bytes | bytearray) -> bool:
        """Take the whole messages from what came; False if the call ends over it, or goes on once one is unpacked."""
        at, end = 0, len(data)
        try:
            while end - at >= _PREFIX.size:
                compressed, length = _PREFIX.unpack_from(data, at)
                if length > self._limits.message:
                    self._refuse_size(f"{length} bytes")
                    return False
                stop = at + _PREFIX.size + length
                if stop > end:
                    break
                message = bytes(data[at + _PREFIX.size : stop])
                at = stop
                if not (self._unpack(message, compressed) if compressed else self._take(message)):
                    return False
            return True
        finally:
            self._keep(data, at)

    def _keep(self, data: bytes | bytearray, at: int) -> None:
        """What came from ``at`` on belongs to a message that is not whole."""
        partial = self._limits.budget.partial
        if self.closed:
            return
        if data is self._partial:
            del self._partial[:at]
            if not self._partial:
                partial.pop(self, None)
        elif at < len(data):
            self._partial = bytearray(data[at:])
            partial[self] = None

    def _take(self, message: bytes) -> bool:
        """A message has come; False if it is one too many."""
        if self._messages and not self._method.many_requests:
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, "several messages; expected one")
            return False
        self._messages.append(message)
        self._hold(_MESSAGE_BYTES)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
        return True

    def _unpack(self, data: bytes, flag: int) -> bool:
        """Take a compressed message; False if the call has ended over it, or goes on once it is unpacked."""
        encoding = self._head.encoding
        if flag != 1 or encoding not in ENCODINGS:
            self.refuse(grpc.StatusCode.INTERNAL, "a message is compressed; grpc-encoding does not say how")
            return False
        reader = zlib.decompressobj(ENCODINGS[encoding])
        begin = _inflate(reader, data, _UNPACKED_AT_ONCE)
        if begin is None or reader.eof:
            return self._unpacked(data, begin, reader)
        # The rest may take so long that others would wait for it.
        most = self._limits.message + 1 - len(begin)
        self._unpacking = self.connection.loop.run_in_executor(None, _inflate, reader, reader.unconsumed_tail, most)
        self._unpacking.add_done_callback(lambda rest: self._go_on(data, begin, rest, reader))
        return False

    def _go_on(self, data: bytes, begin: bytes, rest: "asyncio.Future[bytes | None]", reader: Any) -> None:
        """A large message is unpacked; what came after it waits."""
        self._unpacking = None
        if self.over or rest.cancelled():
            return
        try:
            end = rest.result()
        except Exception as error:  # memory may have run out
            self._stop_handler()
            self._fail(error)
            return
        if not self._unpacked(data, None if end is None else begin + end, reader):
            return
        if self._partial and not self._split(self._partial):
            return
        if self.ended:
            self._all_received()
        elif not self._messages:
            self._let_send()

    def _unpacked(self, data: bytes, message: bytes | None, reader: Any) -> bool:
        if message is not None and len(message) > self._limits.message:
            self._refuse_size(f"more than {self._limits.message} bytes once decompressed")
            return False
        if message is None or not reader.eof or reader.unused_data:
            text = f"{len(data)} bytes that are not a message in {self._head.encoding}"
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, text)
            return False
        # What it has grown to is held as long as what came.
        self._hold(len(message) - len(data))
        budget = self._limits.budget
        return (budget.used <= budget.most or self._make_room()) and self._take(message)

    def _refuse_size(self, shown: str) -> None:
        self.refuse(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"request: {shown}; {self._limits.message_text}",
        )

    def _all_received(self) -> None:
        if self._partial:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "request: ends within a message")
        elif self._method.many_requests:
            if self._waiter and not self._waiter.done():
                self._waiter.set_result(None)
        elif not self._messages:
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, "no message; expected one")
        else:
            self._start()

    def _start(self) -> None:
        if not self._method.at_once:
            self._task = self.connection.loop.create_task(self._run())
            return
        try:
            self._method.behaviour(self._request(), self)
        except Exception as error:
            self._fail(error)

    def _request(self) -> Any:
        method = self._method
        if method.many_requests:
            return self
        message = self._messages[0]
        return message if method.deserialize is None else _deserialized(method, message)

    async def _run(self) -> None:
        method = self._method
        try:
            if method.many_answers:
                await self._answer_all(method.behaviour(self._request(), self))
                self.finish(grpc.StatusCode.OK)
            else:
                answer = await method.behaviour(self._request(), self)
                if answer is not None:  # else it has called ``answer`` or ``finish`` itself
                    self.answer(answer if method.serialize is None else method.serialize(answer))
        except _Aborted:
            pass
        except asyncio.CancelledError:
            self.finish(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, _Unreadable):
            self.finish(grpc.StatusCode.INVALID_ARGUMENT, "request: bytes that cannot be read as its message")
            return
        _logger.error("a handler failed", exc_info=error)
        self.finish(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")

    async def _answer_all(self, answers: Any) -> None:
        """answers: a generator of them, or what sends them with ``write``."""
        if not hasattr(answers, "__aiter__"):
            await answers
            return
        async with aclosing(answers):
            async for answer in answers:
                await self.write(answer)

    def _expire(self) -> None:
        self.expired = True
        self.refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        if not self.closed:  # the client does not take what waits for it
            self.connection.reset(self, ErrorCode.CANCEL)

    def _let_send(self) -> None:
        """Let the client send as much again as the window holds."""
        if not self.ended and not self.closed and self._may_receive < WINDOW // 2:
            self.connection.send(frames.window_update(self.stream, WINDOW - self._may_receive))
            self._may_receive = WINDOW

    def _hold(self, size: int) -> None:
        self._held += size
        self._limits.budget.used += size

    def _release(self, size: int) -> None:
        self._held -= size
        self._limits.budget.used -= size

    def _leave(self) -> None:
        """All is sent; what the client may still send is not wanted (RFC 9113, section 8.1)."""
        if not self.ended:
            self.connection.send(frames.reset(self.stream, ErrorCode.NO_ERROR))
        self._close()

    def _close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._release(self._held)
        self._messages.clear()  # a reader that is awake already must not release them once more
        if self._partial:
            self._limits.budget.partial.pop(self, None)
            self._partial = None
        if self._timer:
            self._timer.cancel()
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
        self.wake_writer()
        self._unsent.clear()
        self.connection.forget(self.stream)


def _inflate(reader: Any, data: bytes, most: int) -> bytes | None:
    """Up to so many bytes of what zlib's reader makes of these; None where it cannot read them."""
    try:
        inflated: bytes = reader.decompress(data, most)
    except zlib.error:
        return None
    return inflated


class _Unreadable(Exception):
    """A message that its method cannot read."""


def _deserialized(method: Method, data: bytes) -> Any:
    assert method.deserialize is not None
    try:
        return method.deserialize(data)
    except Exception as error:
        raise _Unreadable from error
