"""One RPC: its state, its deadline, its answers and its status (gRPC's PROTOCOL-HTTP2.md)."""

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import ClassVar

import grpc

from serving.transport import headers
from serving.transport.counts import MEMORY, STALLED
from serving.transport.frames import ErrorCode
from serving.transport.headers import Metadata, RequestHead, status_fields
from serving.transport.messages import PREFIX
from serving.transport.methods import UNDECIDED_TEXT, Abort, Method, Peer
from serving.transport.rounds import Result
from serving.transport.sending import Sending, only_answer
from serving.transport.streams import WORK_A_TURN, Streams, StreamState

#: The text for clients after a fault of this server.
INTERNAL_TEXT = "internal error; the server's log has the details"

# The work of a handler with a task until it first waits: sixteen of them fit in a turn.
_TASK_WORK = WORK_A_TURN // 16

_BYTES_A_ROW = 1024  # of an answer, about

_logger = logging.getLogger(__name__)


class Call:
    """A stream of a connection, and the context of its handler (see serving.transport.methods.Context).

    This class is the answering half. Only the event loop's thread may use it.
    """

    #: The memory of a call and its tasks, without its data.
    own_bytes: ClassVar[int]
    #: The bytes that this call holds; kept by Memory.
    held = 0
    #: Whether what is held waits for the client; kept by Memory.
    waits = False
    _sending: Sending | None = None
    state = StreamState.OPEN
    deadline: float | None = None
    expired = False
    given_up: Callable[[], object] | None = None
    undecided = False
    _headers_sent = False
    _succeeded = False
    _unread = 0  # the rows of the answers that wait for the client, about
    _task: asyncio.Task[None] | None = None
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, streams: Streams, stream: int, head: RequestHead[Method]) -> None:
        #: The connection. Memory knows it as the owner.
        self.streams = self.owner = streams
        self.stream = stream
        self._head = head
        streams.memory.hold(self, head.held_bytes + self.own_bytes)
        if (timeout := head.timeout) is not None:
            self.deadline = time.monotonic() + timeout
            self._timer = streams.loop.call_later(timeout, self._expire)

    @property
    def over(self) -> bool:
        """Tell if nobody waits for anything from the handler."""
        return self.state is StreamState.CLOSED or (self._sending is not None and self._sending.trailers is not None)

    @property
    def sending(self) -> Sending:
        """Return the data that waits to be sent. A call whose answer goes out at once never needs it."""
        if self._sending is None:
            self._sending = Sending(self.streams.peer, self.stream)
        return self._sending

    @property
    def peer(self) -> Peer:
        """Return the client of the connection."""
        return self.streams.client

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self._head.metadata

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return what runs a part of the handler in its own task."""
        return self.streams.place.in_turns(work)

    def keep(self, size: int) -> None:
        """Count bytes that the handler keeps, or a negative number of those that it keeps no longer."""
        memory = self.streams.memory
        if self.state is not StreamState.CLOSED:  # otherwise nothing of the call counts
            memory.hold(self, size)
            if size > 0 and memory.used > memory.max_bytes:
                memory.make_room(self)

    def answer(self, data: bytes) -> None:
        """Send the only answer, and the status OK."""
        self.given_up = None
        if self.state is StreamState.CLOSED:
            return
        streams = self.streams
        if self._sending is None and not streams.shrinks_table:
            sent = only_answer(streams.peer, self.stream, data)
            if sent is not None:
                streams.send_answer(sent)
                streams.place.prove()
                self._leave()
                return
        if self.over:
            return
        self._send_headers()
        self._put(data)
        self.finish(grpc.StatusCode.OK)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status, after all waiting data."""
        self.given_up = None
        if self.over:
            return
        block = headers.OK if code is grpc.StatusCode.OK else headers.write(status_fields(code, text, metadata))
        if not self._headers_sent:  # one block for both
            block = headers.ANSWER + block
            self._headers_sent = True
        self.sending.trailers = block
        self._succeeded = code is grpc.StatusCode.OK
        self.pump()

    def refuse(self, code: grpc.StatusCode, text: str) -> None:
        """End the call with an error, whatever its handler does."""
        if not self.over and not self._task and not self.given_up:
            self.streams.limits.refused(self._head.path, self.peer, self._head.metadata, code, text)
        self._stop_handler()
        hidden = self.undecided and code is grpc.StatusCode.RESOURCE_EXHAUSTED
        self.finish(code, UNDECIDED_TEXT if hidden else text)

    def abandon(self) -> None:
        """Note that the client has gone, or must not be sent anything else."""
        self._stop_handler()
        self._close()

    def pump(self) -> None:
        """Send waiting data, as far as the client's windows allow."""
        streams, sending = self.streams, self.sending
        if before := sending.size:
            if sent := sending.take():
                streams.memory.hold(self, sending.size - before)
                streams.send_all(sent)
            streams.block(self)
            if sending.size:
                if sent or not self.waits:
                    streams.memory.waits(self, streams.loop.time())
                return
            if self._unread:
                self._count_unread(-self._unread)
            self._all_sent()
        if sending.trailers is not None:
            if self._succeeded:
                streams.place.prove()
            streams.send_trailers(self.stream, sending.trailers)
            self._leave()

    def wake_writer(self) -> None:
        """Resume a handler that waits for the client to read."""

    def evict(self, stalled: bool) -> None:
        """End a call that waits for its client, or for which there is no room (see Memory)."""
        self.streams.counts.evicted[STALLED if stalled else MEMORY] += 1
        if self.sending.size:
            self.sending.drop()
            self.streams.limits.dropped("an answer is dropped: its client does not read it", self.peer)
            self.streams.reset(self, ErrorCode.CANCEL if stalled else ErrorCode.ENHANCE_YOUR_CALM)
            return
        memory, limits = self.streams.memory, self.streams.limits
        text = limits.no_room(memory.used, memory.max_bytes)
        if stalled:
            text = f"the request has not come further for {memory.stall_seconds:g} seconds"
        if self._task or self.given_up:  # otherwise ``refuse`` tells it
            limits.dropped(f"a call is ended: {text}", self.peer)
        self.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _count_unread(self, more: int) -> None:
        """Tell that answers wait for the client, in units of about a row's; a negative number once all are sent."""
        self._unread += more
        self.streams.limits.unread(self.peer.connection, more)

    def _all_sent(self) -> None:
        """Note that no answer waits."""
        self.streams.memory.works(self)
        self.wake_writer()

    def _put(self, data: bytes) -> None:
        """Send an answer, and keep the part for which the client's windows have no room."""
        self.sending.put(data)
        self.streams.memory.hold(self, len(data) + PREFIX.size)
        self.pump()
        if self.sending.size:
            self._count_unread(max(1, len(data) // _BYTES_A_ROW))

    def _send_headers(self) -> None:
        self._headers_sent = True
        self.streams.send_headers(self.stream, headers.ANSWER, end_stream=False)

    @abstractmethod
    async def _handle(self) -> None:
        """Run the method's handler."""

    def _start_task(self) -> None:
        self.streams.further_work += _TASK_WORK
        self._task = self.streams.loop.create_task(self._run())

    async def _run(self) -> None:
        """Run the handler, and end the call when it ends."""
        try:
            await self.in_turns(self._handle())
        except Abort as abort:
            self.finish(abort.status.code, abort.status.text, abort.status.metadata)
        except asyncio.CancelledError:
            self.finish(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        _logger.error("a handler failed", exc_info=error)
        self.finish(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

    def _stop_handler(self) -> None:
        if task := self._task:
            self._task = None  # it will know an error, whose traceback knows this object: a cycle would live on
            task.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def _expire(self) -> None:
        self.expired = True
        self.refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        if self.state is not StreamState.CLOSED:  # the client does not take what waits for it
            self.streams.reset(self, ErrorCode.CANCEL)

    def _leave(self) -> None:
        """Close the stream, since all is sent; what the client may still send is not wanted (RFC 9113, section 8.1)."""
        if self.state is StreamState.OPEN:
            self.streams.send_reset(self.stream, ErrorCode.NO_ERROR)
        self._close()

    def _close(self) -> None:
        if self.state is StreamState.CLOSED:
            return
        self.state = StreamState.CLOSED
        self.streams.memory.leave(self)
        if self._timer:
            self._timer.cancel()
        if self._sending is not None:
            self._sending.drop()
        self.streams.forget(self.stream)
