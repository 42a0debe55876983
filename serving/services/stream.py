"""A stream of requests and its answers in order, while later requests are read and computed already."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

import grpc

from serving.errors import Draining
from serving.metrics.registry import Metrics
from serving.rpc.edge import Call, Edge, Steps
from serving.services.request import Query, Reply, Request

#: Counts and logs an error of a request that came so many seconds ago; returns the status that its client is told.
Refuse = Callable[[Exception, Call, float], tuple[grpc.StatusCode, str]]


class StreamQuery(Query, Protocol):
    """A query of a stream, where an error is an answer too."""

    #: Error of a message that cannot be parsed.
    error: Exception | None

    def encode_error(self, code: grpc.StatusCode, text: str, /) -> bytes:
        """Return the bytes of the answer that tells of an error."""


class StreamRefusals:
    """Counts and logs the errors that are answers in the streams of one method."""

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
    """One stream: a task reads its requests, and ``answers`` yields what they are answered with.

    window: most images under way; a request that has more goes alone.
    """

    _reader: "asyncio.Task[None]"

    def __init__(self, call: Call, refuse: Refuse, window: int) -> None:
        self.call = call
        self.refuse = refuse
        self._window = _Window(window)
        self._replies: deque[_StreamReply] = deque()
        self._waiter: asyncio.Future[None] | None = None  # for the first answer, or the end of reading
        self._reading = False  # it waits for the client's next request
        self._ended = False  # it is to read nothing further
        self._complete = False  # the client has sent all

    async def answers(
        self,
        messages: AsyncIterator[bytes],
        parse: Callable[[bytes], StreamQuery],
        make: Callable[[Query, Reply], Request],
    ) -> AsyncGenerator[bytes]:
        """Yield the answers in the order of their requests.

        Raises Draining where reading was ended before the client had sent all, and what reading the messages raises.
        """
        self._reader = asyncio.create_task(self._read(messages, parse, make))
        self._reader.add_done_callback(lambda _: self.wake())
        while (reply := await self._next()) is not None:
            yield reply.answer
            self._window.leave(reply.size)
            del reply  # while the next one is waited for, which may never come
        if self._ended and not self._complete:
            raise Draining
        await self._reader

    def end(self) -> None:
        """Read nothing further."""
        self._ended = True
        if self._reading:
            self._reader.cancel()

    async def close(self) -> None:
        """Give up what is under way: the client waits for nothing any longer, or all is answered."""
        self._reader.cancel()
        with suppress(asyncio.CancelledError, Exception):  # its error no longer matters
            await self._reader
        while self._replies:
            self._replies.popleft().give_up()

    def wake(self) -> None:
        """Look whether the first answer is there."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def _next(self) -> "_StreamReply | None":
        """Wait for the first reply's answer; None once all are answered and nothing more comes."""
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
        parse: Callable[[bytes], StreamQuery],
        make: Callable[[Query, Reply], Request],
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

    async def _begin(self, query: StreamQuery, make: Callable[[Query, Reply], Request]) -> None:
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
    """Place of one request's answer in its stream."""

    __slots__ = ("_began", "_given_up", "_query", "_stream", "answer", "answered", "size")

    #: A stream's own deadline is that of its last answer, not of each.
    deadline: float | None = None

    def __init__(self, query: StreamQuery, stream: Stream) -> None:
        self._query: StreamQuery | None = query  # until it is answered: an answer that is not read keeps no request
        self._stream = stream
        self._given_up: Callable[[], object] | None = None
        self._began = time.perf_counter()
        #: Images that it takes of the window: one at least, so that not even wrong requests pile up without bound.
        self.size = max(1, query.size)
        self.answer = b""
        self.answered = False

    @property
    def traced(self) -> bool:
        return self._stream.call.traced

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
        """Tell whoever computes the answer that nobody waits for it."""
        if given_up := self._given_up:
            given_up()

    def _put(self, answer: bytes) -> None:
        self._given_up = self._query = None
        self.answer, self.answered = answer, True
        self._stream.wake()


class _Window:
    """Images of one stream that may be under way; a request larger than the window enters when it is empty."""

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
