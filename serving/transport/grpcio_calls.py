"""The calls of gRPC's own server: their contexts, their requests, and the bytes that these hold."""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import cached_property
from typing import Any

import grpc
from grpc import aio

from serving.transport.counts import MEMORY
from serving.transport.grpcio_messages import MessageInflater
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Memory
from serving.transport.messages import MessageError
from serving.transport.methods import UNIX_ADDRESS, Peer, TransportLimits, common_name
from serving.transport.rounds import Result

_FIRST_BYTES = 2**21  # that the first message of a connection is taken to have
_MAX_COMING_BYTES = 2**23  # of the messages of a connection that are on their way
_TURN_SECONDS = 0.25  # after which a call without a message leaves its turn to the next
_END_SECONDS = 0.005  # in this time gRPC mostly reports that the end of the requests was the end of the call

# In the form of RFC 2253, without what _ESCAPED finds.
_COMMON_NAME = re.compile(rb"(?:\A|[,+])CN=")
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


class Call:
    """A call, and the context of its handler (see serving.transport.methods.Context).

    path: of its method. context: gRPC's. task: of its handler. begun: True once the handler may have seen a request.
    ending: the status with which the server ends the call, whatever its handler does, or None.
    """

    def __init__(self, path: str, context: Any) -> None:
        self.path = path
        self._context = context
        self.read: Callable[[], Awaitable[Any]] = context.read
        #: The seconds that are left until the deadline.
        self.timeout: float | None = context.time_remaining()
        self.deadline = None if self.timeout is None else time.monotonic() + self.timeout
        self.given_up: Callable[[], object] | None = None
        self.undecided = False
        self.metadata: Metadata = tuple(context.invocation_metadata() or ())
        self.outcome: asyncio.Future[bytes | Status] = asyncio.get_running_loop().create_future()
        self.task = asyncio.current_task()
        self.begun = False
        self.ending: Status | None = None

    @property
    def gone(self) -> bool:
        """Return True if the client has ended the call."""
        return bool(self._context.cancelled())

    @property
    def expired(self) -> bool:
        """Return True if the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def over(self) -> bool:
        """Return True if nobody waits for the handler."""
        return self.outcome.done()

    @cached_property
    def peer(self) -> Peer:
        """Return the client of the connection."""
        kind, _, address = str(self._context.peer()).partition(":")
        if kind == "unix":
            return Peer(UNIX_ADDRESS, connection=UNIX_ADDRESS)
        if kind not in ("ipv4", "ipv6"):  # the client has gone
            return Peer("")
        host = address.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
        return Peer(host, _subject(self._context.auth_context()), connection=address)

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self.metadata

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return the work itself: gRPC reads as it likes."""
        return work

    def keep(self, size: int) -> None:
        """Do nothing: answers do not count."""

    def answer(self, data: bytes) -> None:
        """Send the only answer of a unary call, and the status OK."""
        self._end(data)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status."""
        self._end(Status(code, text, metadata))

    def cut_off(self, status: Status) -> None:
        """End the handler, and let the client have this status."""
        self.ending = self.ending or status
        if self.task and self.task is not asyncio.current_task():
            self.task.cancel()

    def give_up(self) -> None:
        """Tell the handler that nobody waits for its answer."""
        self.outcome.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def _end(self, outcome: bytes | Status) -> None:
        self.given_up = None
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class _Connection:
    """A connection, as far as gRPC tells it (see serving.transport.memory.Owner), and the turns of its calls.

    gRPC reads 64 KB of a message, and the whole of it once this server asks for the message; it does not tell how long
    a message is. So the calls of a connection take turns to ask, and to inflate what comes. As many have a turn as may
    do if their messages are as long as those before them. A call whose message does not come, such as an idle stream,
    leaves its turn.

    holders: the requests of its calls, the oldest first.
    """

    def __init__(self, memory: Memory) -> None:
        self.held = 0
        self.holders: dict[Requests, None] = {}
        self._memory = memory
        self._expected = _FIRST_BYTES  # of the next message
        self._asking: dict[Requests, float] = {}  # those that have a turn, and the times of its end
        self._waiting: dict[Requests, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self, requests: "Requests") -> None:
        """Wait until a call may ask for its next message. Call ``end_turn`` after it, whether or not it has come."""
        if not self._waiting and self._has_room(requests):
            self._asking[requests] = time.monotonic() + _TURN_SECONDS
            return
        turn = self._waiting[requests] = asyncio.get_running_loop().create_future()
        self.go_on()
        await turn

    def take(self, requests: "Requests", size: int) -> None:
        """Note that a message of this size has come, and keep the turn of its call until it ends."""
        self._expected = max(size, self._expected // 2)
        self._asking[requests] = math.inf

    def end_turn(self, requests: "Requests") -> None:
        """Note that a call has its message, or that none will come."""
        self._asking.pop(requests, None)
        self._waiting.pop(requests, None)
        self.go_on()

    def go_on(self) -> None:
        """Give the next turns."""
        while self._waiting and self._has_room(requests := next(iter(self._waiting))):
            turn = self._waiting.pop(requests)
            if not turn.done():  # otherwise its call has been cancelled
                self._asking[requests] = time.monotonic() + _TURN_SECONDS
                turn.set_result(None)
        if not self._waiting or self._timer:
            return
        end = min(self._asking.values(), default=math.inf)
        if end < math.inf:
            delay = max(0.0, end - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        """Take the turns from those that have had them for long."""
        self._timer = None
        now = time.monotonic()
        self._asking = {requests: end for requests, end in self._asking.items() if end > now}
        self.go_on()

    def _has_room(self, requests: "Requests") -> bool:
        """Return True if there is room for another message."""
        if not self._asking and not self.held:
            return True
        coming = (len(self._asking) + 1) * self._expected
        if requests.patient and self._memory.used + coming > self._memory.max_bytes:
            return False
        return not self._asking or coming <= _MAX_COMING_BYTES


class Holdings:
    """The requests of all calls of a server, by connection.

    inflater: of compressed requests. bytes: held by all of them. evicted: the ended calls, by reason.
    """

    def __init__(
        self, limits: TransportLimits, memory: Memory, inflater: MessageInflater, evicted: dict[str, int]
    ) -> None:
        self.limits = limits
        self.memory = memory
        self.inflater = inflater
        self.evicted = evicted
        self.bytes = 0
        self._connections: dict[str, _Connection] = {}

    def enter(self, requests: "Requests", connection: str) -> _Connection:
        """Add a call's requests to those of a connection, and return it."""
        owner = self._connections.get(connection)
        if owner is None:
            owner = self._connections[connection] = _Connection(self.memory)
        owner.holders[requests] = None
        return owner

    def leave(self, requests: "Requests", connection: str) -> None:
        """Remove a call's requests, which hold nothing, from those of a connection."""
        holders = self._connections[connection].holders
        del holders[requests]
        if not holders:
            del self._connections[connection]


class Requests:
    """The requests of a call, as they were before compression, and the holder of the latest one's bytes.

    They are held until the next one is asked for. patient: they wait for room in memory, and are not refused.
    """

    held = 0
    waits = False

    def __init__(self, call: Call, holdings: Holdings, patient: bool) -> None:
        self.patient = patient
        self._call = call
        self._holdings = holdings
        self.owner = holdings.enter(self, call.peer.connection)

    def evict(self, _: bool) -> None:
        """End the call, since there is no room for its bytes."""
        limits, memory = self._holdings.limits, self._holdings.memory
        text = limits.no_room(memory.used, memory.max_bytes)
        self._holdings.evicted[MEMORY] += 1
        self._hold(0)
        if self._call.begun:  # otherwise the refusal is logged
            limits.dropped(f"a call is ended: {text}", self._call.peer)
        self._call.cut_off(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the next request. Raises CancelledError if there is none because the client has ended the call."""
        message = await self.next()
        if message is not None:
            return message
        await asyncio.sleep(_END_SECONDS)
        if self._call.gone or self._call.expired:
            raise asyncio.CancelledError
        raise StopAsyncIteration

    async def next(self) -> bytes | None:
        """Return the next request, or None. Raises MessageError."""
        self._hold(0)
        try:
            await self.owner.turn(self)
            message = await self._call.read()
            if message is aio.EOF:
                return None
            self.owner.take(self, len(message))
            self._hold(len(message))
            inflated = await self._holdings.inflater.inflated(message, self._call.peer.connection)
            del message
            self._hold(len(inflated))
            return inflated
        finally:
            self.owner.end_turn(self)

    def close(self) -> None:
        """Note that the call has ended."""
        self._hold(0)
        self._holdings.leave(self, self._call.peer.connection)

    def _hold(self, size: int) -> None:
        """Hold these bytes, and none before them. Raises MessageError if there is no room for them."""
        memory, more = self._holdings.memory, size - self.held
        self._holdings.bytes += more
        memory.hold(self, more)
        if more < 0:
            self.owner.go_on()
        if more > 0 and memory.used > memory.max_bytes:
            memory.make_room(self)
            if ending := self._call.ending:
                raise MessageError(ending.code, ending.text)


def _subject(properties: Mapping[str, Iterable[bytes]]) -> str:
    """Return the common name in a client's certificate, from gRPC's properties, which hold the first one of several."""
    subject = b"".join(properties.get("x509_subject", ()))  # in the form of RFC 2253
    names = [one.decode(errors="replace") for one in properties.get("x509_common_name", ())]
    return common_name(names) if len(_COMMON_NAME.findall(_ESCAPED.sub(b"", subject))) == 1 else ""
