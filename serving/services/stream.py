"""A stream of requests. Answers keep the order, while later requests are already read and computed."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Hashable
from contextlib import suppress
from typing import Protocol

import grpc

from serving.errors import Draining
from serving.metrics.registry import Metrics
from serving.rpc.edge import Call, Edge, Steps
from serving.services.computed import ComputedQuery, ComputedRequest, ComputedStreamQuery
from serving.services.request import Query, Reply, Request
from serving.transport.rounds import Result

# Bytes of answers that wait are told to the call in steps of so many.
_STEP_BYTES = 8192

#: A function that counts and logs the error of a request, given the seconds since it came, and returns its status.
Refuse = Callable[[Exception, Call, float], tuple[grpc.StatusCode, str]]


class StreamQuery(Query, Protocol):
    """A query of a stream, in which an error is an answer too."""

    #: The error of an invalid message, or None.
    error: Exception | None

    def encode_error(self, code: grpc.StatusCode, text: str, /) -> bytes:
        """Return the bytes of an answer with an error."""


#: A function that reads a message, and one that makes the request of a query.
Parse = Callable[[bytes], StreamQuery | ComputedStreamQuery]
Make = Callable[[Query | ComputedQuery, Reply], Request | ComputedRequest]


class StreamRefusals:
    """The counter of errors that are answers in the streams of one method."""

    def __init__(self, edge: Edge, metrics: Metrics, service: str, method: str) -> None:
        self._edge = edge
        self._errors = {
            code: metrics.stream_errors.labels("bidi_stream", service, method, code.name) for code in grpc.StatusCode
        }

    def __call__(self, error: Exception, call: Call, seconds: float) -> tuple[grpc.StatusCode, str]:
        code, text = self._edge.to_status(error)
        call.refused(seconds, code, text)
        self._errors[code].inc()
        return code, text


class Stream:
    """One stream: a task reads its requests, and ``answers`` yields their answers.

    window: the most images in flight. A larger request goes alone.
    """

    _reader: "asyncio.Task[None]"

    def __init__(self, call: Call, refuse: Refuse, window: int) -> None:
        self.call = call
        self.refuse = refuse
        self._window = _Window(window)
        #: The bytes of the answers that wait for their turn or for the client, and as many as the call was told.
        self.bytes = self.told_bytes = 0
        self._replies: deque[_StreamReply] = deque()
        self._waiter: asyncio.Future[None] | None = None  # waits for the first answer, or for the end of reading
        self._reading = False  # True while it waits for the client's next request
        self._ended = False  # True after end(): it reads nothing else
        self._complete = False  # True when the client has sent everything

    async def answers(
        self,
        messages: AsyncIterator[bytes],
        parse: Parse,
        make: Make,
    ) -> AsyncGenerator[bytes]:
        """Yield the answers in the order of their requests.

        Raises Draining if reading ended before the client had sent everything, and any error of reading the messages.
        """
        self._reader = asyncio.create_task(self.call.in_turns(self._read(messages, parse, make)))
        self._reader.add_done_callback(lambda _: self.wake())
        while (reply := await self._next()) is not None:
            self.bytes -= len(reply.answer)
            if self.bytes < self.told_bytes:
                self.tell_bytes()
            yield reply.answer
            self._window.leave(reply.size)
            del reply  # while the next one is waited for, which may never come
        if self._ended and not self._complete:
            raise Draining
        await self._reader

    def end(self) -> None:
        """Stop reading."""
        self._ended = True
        if self._reading:
            self._reader.cancel()

    async def close(self) -> None:
        """Give up all requests in flight: the client has gone, or everything is answered."""
        self._reader.cancel()
        with suppress(asyncio.CancelledError, Exception):  # its error does not matter now
            await self._reader
        while self._replies:
            self._replies.popleft().give_up()

    def wake(self) -> None:
        """Wake the writer if the first answer has come."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def tell_bytes(self) -> None:
        """Tell the call the bytes of the answers that wait, in whole steps."""
        more = self.bytes // _STEP_BYTES * _STEP_BYTES - self.told_bytes
        self.told_bytes += more
        self.call.keep(more)

    async def _next(self) -> "_StreamReply | None":
        """Wait for the next answer in order. Return None when all requests are answered and none will follow."""
        while True:
            if self._replies and self._replies[0].answered:
                return self._replies.popleft()
            if not self._replies and self._reader.done():
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def _read(
        self,
        messages: AsyncIterator[bytes],
        parse: Parse,
        make: Make,
    ) -> None:
        while not self._ended:
            self._reading = True
            try:
                query = parse(await anext(messages))
            except StopAsyncIteration:
                self._complete = True
                return
            finally:
                self._reading = False
            await self._begin(query, make)
            del query  # while the next one is waited for, which may never come

    async def _begin(self, query: StreamQuery | ComputedStreamQuery, make: Make) -> None:
        """Queue a request, or answer it with its error, once the window has room for it."""
        reply = _StreamReply(query, self)
        await self._window.enter(reply.size)
        self._replies.append(reply)
        if query.error:  # not raised, since its traceback would keep the request
            reply.fail(query.error)
            return
        try:
            request = make(query, reply)
        except Exception as error:
            reply.fail(error)
        else:
            await request.begin_slowly()


class _StreamReply:
    """The place of one answer in its stream."""

    __slots__ = ("_began", "_given_up", "_query", "_stream", "answer", "answered", "size")

    #: The deadline of a stream is for its last answer, not for each one.
    deadline: float | None = None

    def __init__(self, query: StreamQuery | ComputedStreamQuery, stream: Stream) -> None:
        self._query: StreamQuery | ComputedStreamQuery | None = (
            query  # None after the answer, so that an unread answer keeps no request
        )
        self._stream = stream
        self._given_up: Callable[[], object] | None = None
        self._began = time.perf_counter()
        #: The images that it takes from the window: at least one, so that wrong requests are limited too.
        self.size = max(1, query.size)
        self.answer = b""
        self.answered = False

    @property
    def client(self) -> Hashable:
        return self._stream.call.client

    @property
    def traced(self) -> bool:
        return self._stream.call.traced

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        return self._stream.call.in_turns(work)

    def when_given_up(self, then: Callable[[], object]) -> None:
        self._given_up = then

    def succeed(self, data: bytes, steps: Steps | None = None) -> None:
        if steps:
            self._stream.call.answered(time.perf_counter() - self._began, steps)
        self._put(data)

    def fail(self, error: Exception) -> None:
        code, text = self._stream.refuse(error, self._stream.call, time.perf_counter() - self._began)
        assert self._query
        self._put(self._query.encode_error(code, text))

    def end(self) -> None:
        self._given_up = None

    def give_up(self) -> None:
        """Tell the request that nobody waits for its answer."""
        if given_up := self._given_up:
            given_up()

    def _put(self, answer: bytes) -> None:
        self._given_up = self._query = None
        self.answer, self.answered = answer, True
        stream = self._stream
        stream.bytes += len(answer)
        if stream.bytes >= stream.told_bytes + _STEP_BYTES:
            stream.tell_bytes()
        stream.wake()


class _Window:
    """The images of one stream in flight. A request larger than the window enters when the window is empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._inside = 0
        self._left = asyncio.Event()

    async def enter(self, images: int) -> None:
        while self._inside and self._inside + images > self._size:
            self._left.clear()
            await self._left.wait()
        self._inside += images

    def leave(self, images: int) -> None:
        self._inside -= images
        self._left.set()
