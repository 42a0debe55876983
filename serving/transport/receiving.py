"""The receiving half of a call, and the two kinds of complete calls."""

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import perf_counter, thread_time
from typing import ClassVar

import grpc

from serving.transport import messages
from serving.transport.call import Call
from serving.transport.frames import ErrorCode, window_update
from serving.transport.headers import RequestHead
from serving.transport.messages import Inflation, MessageError, MessageReader
from serving.transport.methods import Abort, CallbackMethod, Method, StreamMethod, UnaryMethod
from serving.transport.rounds import TURN_SECONDS
from serving.transport.streams import Streams, StreamState
from serving.transport.unpacking import Job

#: The bytes of a call that a client may send before the server reads them.
WINDOW = 2**18
_LOW_WINDOW = WINDOW // 2  # the window is refilled below this
#: The bytes of streamed answers of a connection above which its handlers wait for the next turn of the event loop.
MAX_BYTES_A_TURN = 2**18
_MESSAGE_BYTES = 64  # memory of a message in addition to its own bytes
_MESSAGE_BYTES_WITH_PREFIX = _MESSAGE_BYTES + messages.PREFIX.size
_MANY_ANSWERS = 16  # of a stream, after which its connection is proven (see serving.transport.rounds.Place)
_MAX_UNSENT_BYTES = 2**16  # bytes of answers that wait for the client; above this a stream's handler waits


class ReceivingCall(Call):
    """A call that reads its client's data. Subclasses handle the messages."""

    #: True if the handler starts only after the whole request has come.
    needs_all: ClassVar[bool]

    _may_receive = WINDOW
    _body = 0  # bytes received, if the client has told their number
    _reader: MessageReader | None = None  # for messages that do not come in one piece
    _unpacking: Job | None = None
    _reserved = 0  # bytes that are held for the message which is being inflated

    @abstractmethod
    def _take(self, message: bytes) -> None:
        """Take a received message."""

    @abstractmethod
    def _take_end(self) -> None:
        """Note that all messages have been taken."""

    def begin(self) -> None:
        """Note that the call is accepted. Most handlers start only when the request has come."""

    def receive(self, data: bytes, size: int, end: bool) -> None:
        """Take what the client sent; size: bytes of it that count for flow control; end: it is all."""
        self._may_receive -= size
        if self._may_receive < 0:
            self.streams.reset_faulty(self, ErrorCode.FLOW_CONTROL_ERROR)
            return
        if self.state is StreamState.HALF_CLOSED_REMOTE:
            self.streams.reset_faulty(self, ErrorCode.STREAM_CLOSED)
            return
        if self._head.content_length is not None and not self._is_as_long_as_told(len(data), end):
            return
        if end:
            self.state = StreamState.HALF_CLOSED_REMOTE
        if not self.over:
            self._read(data)

    def end(self) -> None:
        """Take note that the client has sent all, and said so without data."""
        if self.state is StreamState.OPEN:
            if self._head.content_length is not None and not self._is_as_long_as_told(0, True):
                return
            self.state = StreamState.HALF_CLOSED_REMOTE
            if not self.over and not (self._reader and self._reader.inflation):
                self._end_of_request()

    def _is_as_long_as_told(self, size: int, end: bool) -> bool:
        """Count received bytes. Reset the stream if content-length tells another number (RFC 9113, section 8.1.1)."""
        self._body += size
        expected = self._head.content_length
        if expected is None or (self._body == expected if end else self._body <= expected):
            return True
        self.streams.reset_faulty(self, ErrorCode.PROTOCOL_ERROR)
        return False

    def wait_for_client(self) -> None:
        """Note that the request is not complete yet."""
        if self.needs_all and not self.over:
            self.streams.memory.waits(self, self.streams.loop.time())

    def _read(self, data: bytes) -> None:
        """Read what came, on top of what is there."""
        reader, limits = self._reader, self.streams.limits
        if reader is None:
            message = messages.whole(data)
            if message is not None and len(message) <= limits.message_bytes:
                self._received([message], len(data))
                return
            reader = self._reader = MessageReader(limits.message_bytes, limits.message_text, self._head.encoding)
        before = reader.buffered
        try:
            received = reader.feed(data)
        except MessageError as error:
            self.refuse(error.code, str(error))
        else:
            if len(received) > 1:
                self.streams.count_messages(received)
            self._received(received, reader.buffered - before + _size(received))

    def _received(self, received: list[bytes], size: int) -> None:
        """Take complete messages. size: the growth of their bytes and of the bytes that the reader keeps."""
        memory, reader = self.streams.memory, self._reader
        memory.hold(self, size + _MESSAGE_BYTES * len(received))
        if (reader is not None and reader.buffered) or (self.needs_all and self.state is StreamState.OPEN):
            memory.waits(self, self.streams.loop.time())
        elif self.waits and not self.sending.size:
            memory.works(self)
        if memory.used > memory.max_bytes:
            memory.make_room(self)
        for message in received:
            if self.over:
                return
            self._take(message)
        if self.over:
            return
        if reader is not None and reader.inflation:
            self._inflate(reader, reader.inflation)
        elif self.state is StreamState.HALF_CLOSED_REMOTE:
            self._end_of_request()
        else:
            self._let_send()

    def _end_of_request(self) -> None:
        if self._reader is not None and self._reader.buffered:
            self.refuse(grpc.StatusCode.INVALID_ARGUMENT, "request: ends within a message")
        else:
            self._take_end()

    def _inflate(self, reader: MessageReader, inflation: Inflation) -> None:
        """Inflate a large message in a thread, so that other calls need not wait. Later data of the call waits."""
        if self._unpacking is None:
            self._unpacking = Job(
                inflation, lambda: self._reserve(inflation.max_rest), lambda rest: self._inflated(reader, rest)
            )
            self.streams.unpacker.unpack(self.streams, self._unpacking)

    def _reserve(self, size: int) -> None:
        """Hold memory for a message before it is inflated. The call may end if there is none."""
        self._reserved += size
        memory = self.streams.memory
        memory.hold(self, size)
        if memory.used > memory.max_bytes:
            memory.make_room(self)

    def _release(self) -> None:
        """Release the memory for the message that was inflated."""
        self.streams.memory.hold(self, -self._reserved)
        self._reserved = 0
        self._unpacking = None

    def _inflated(self, reader: MessageReader, rest: "asyncio.Future[bytes | None]") -> None:
        self._release()
        if self.over or rest.cancelled():
            return
        place, begin = self.streams.place, thread_time()
        try:
            self._read_inflated(reader, rest)
        finally:
            place.charge(thread_time() - begin)

    def _read_inflated(self, reader: MessageReader, rest: "asyncio.Future[bytes | None]") -> None:
        before = reader.buffered
        try:
            received = reader.inflated(rest.result())
        except MessageError as error:
            self.refuse(error.code, str(error))
        except Exception as error:  # memory may have run out
            self._stop_handler()
            self._fail(error)
        else:
            self._received(received, reader.buffered - before + _size(received))

    def _stop_unpacking(self) -> None:
        if self._unpacking:
            self.streams.unpacker.give_up(self.streams, self._unpacking)
            self._release()

    def _stop_handler(self) -> None:
        self._stop_unpacking()
        super()._stop_handler()

    def _let_send(self) -> None:
        """Let the client send as much again as the window holds."""
        if self.state is StreamState.OPEN and self._may_receive < _LOW_WINDOW:
            self.streams.send(window_update(self.stream, WINDOW - self._may_receive))
            self._may_receive = WINDOW

    def _all_sent(self) -> None:
        if not (self._reader and self._reader.buffered):
            self.streams.memory.works(self)
        self.wake_writer()


class UnaryCall(ReceivingCall):
    """A call with one request and one answer."""

    needs_all = True
    own_bytes = 4096
    _message: bytes | None = None

    def _take(self, message: bytes) -> None:
        if self._message is not None:
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, "several messages; expected one")
        self._message = message

    def _take_end(self) -> None:
        if self._message is None:
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, "no message; expected one")
        elif isinstance(self._head.method, CallbackMethod):
            self._begin(self._head.method)
        else:
            self._start_task()

    def _begin(self, method: CallbackMethod) -> None:
        """Run a handler that needs no task."""
        try:
            returned: object = method.begin(self._hand_over(), self)  # type: ignore[func-returns-value]
            if returned is not None:  # a coroutine would never run
                raise TypeError(f"a handler has returned {type(returned).__name__}; expected nothing")
        except Abort as abort:
            self.finish(abort.status.code, abort.status.text, abort.status.metadata)
        except Exception as error:
            self._fail(error)

    async def _handle(self) -> None:
        method = self._head.method
        assert isinstance(method, UnaryMethod)
        answer = await method.answer(self._hand_over(), self)
        if answer is not None:
            self.answer(answer)
        elif not self.over:
            raise TypeError("a handler has ended without an answer")

    def _close(self) -> None:
        super()._close()
        # With what has come of a message: the errors of a cancelled handler may keep this object.
        self._reader = self._message = None

    def _hand_over(self) -> bytes:
        """Return the complete request, and keep no reference: its handler has a parsed copy."""
        message, self._message = self._message, None
        assert message is not None
        return message


class StreamCall(ReceivingCall):
    """A call with any number of requests and answers. It is also the iterator of its requests."""

    needs_all = False
    own_bytes = 12288
    _reading: asyncio.Future[None] | None = None  # set while the handler waits for a message
    _room: asyncio.Future[None] | None = None  # set while the handler waits for the client to read
    _handed_over = 0  # the bytes of the message that the handler has
    _answers = 0  # those that were sent, and several that waited together as one
    _turn_end = 0.0  # the time after which the handler leaves its turn of the event loop to others

    def __init__(self, streams: Streams, stream: int, head: RequestHead[Method]) -> None:
        super().__init__(streams, stream, head)
        self._messages: deque[bytes] = deque()

    def begin(self) -> None:
        """Start the handler, which reads messages as they come."""
        self._start_task()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the next message. The one before it counts as held until then: its handler may wait with it."""
        if self._handed_over:
            self.streams.memory.hold(self, -self._handed_over)
            self._handed_over = 0
        if self._messages and perf_counter() > self._turn_end:  # many small ones would hold up other calls
            await asyncio.sleep(0)
            self._turn_end = perf_counter() + TURN_SECONDS
        while not self._messages:
            inflating = self._reader is not None and self._reader.inflation
            if self.state is StreamState.CLOSED or (self.state is StreamState.HALF_CLOSED_REMOTE and not inflating):
                raise StopAsyncIteration
            self._reading = self.streams.loop.create_future()
            await self._reading
            self._turn_end = perf_counter() + TURN_SECONDS
        message = self._messages.popleft()
        self._handed_over = len(message) + _MESSAGE_BYTES_WITH_PREFIX
        if self._may_receive < _LOW_WINDOW:
            self._let_send()
        return message

    def wake_writer(self) -> None:
        if self._room and not self._room.done():
            self._room.set_result(None)

    async def _handle(self) -> None:
        method = self._head.method
        assert isinstance(method, StreamMethod)
        answers = method.answers(self, self)
        async with aclosing(answers):  # type: ignore[type-var]
            async for answer in answers:
                await self._write(answer)
                del answer  # while the next one is waited for, which may never come
        self.finish(grpc.StatusCode.OK)

    async def _write(self, data: bytes) -> None:
        """Send one answer, and wait while the client does not read."""
        streams, sending = self.streams, self.sending
        if self.over:
            return
        if not self._headers_sent:
            self._send_headers()
        sent = sending.message(data)
        if sent is not None:
            streams.send_answer(sent)
            streams.sent_this_turn += len(data)
            self._count_answer()
        else:
            self._put(data)
        while not self.over and (
            sending.size > _MAX_UNSENT_BYTES or streams.paused or streams.sent_this_turn > MAX_BYTES_A_TURN
        ):
            self._room = streams.loop.create_future()
            await self._room

    def _all_sent(self) -> None:
        super()._all_sent()
        self._count_answer()

    def _count_answer(self) -> None:
        self._answers += 1
        if self._answers == _MANY_ANSWERS:
            self.streams.place.prove()

    def _take(self, message: bytes) -> None:
        self._messages.append(message)
        self._wake_reader()

    def _take_end(self) -> None:
        self._wake_reader()

    def _let_send(self) -> None:
        if not self._messages:
            super()._let_send()

    def _wake_reader(self) -> None:
        if self._reading and not self._reading.done():
            self._reading.set_result(None)

    def _close(self) -> None:
        if self.state is StreamState.CLOSED:
            return
        self._stop_unpacking()  # if the handler has ended before the request
        super()._close()
        self._reader = None
        self._messages.clear()  # a reader that is already awake must not release them again
        self._handed_over = 0
        self._wake_reader()
        self.wake_writer()


def _size(received: list[bytes]) -> int:
    """Return the bytes of messages with their prefixes."""
    return sum(map(len, received)) + messages.PREFIX.size * len(received)
