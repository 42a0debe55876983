"""The body of an HTTP request: read within limits of size, memory and time, and unpacked; and the answer's memory."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import grpc
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serving.transport.memory import Memory, Owner
from serving.transport.messages import ENCODINGS, Inflation
from serving.web.problems import Problem

# A body must come within this time, and a second more for each of these bytes that have come.
_SECONDS, _BYTES_A_SECOND = 20.0, 16384
# The most bytes of a refused request that are read, so that its client can read the answer and go on.
_MAX_DISCARDED_BYTES = 2**20
_DISCARD_SECONDS = 1.0


class Connected(Owner, Protocol):
    """The connection of a request.

    holders: as of Owner; a request is one while a method works on it.
    """

    holders: "tuple[()] | tuple[BodyReader]"

    def abort(self) -> None:
        """Close the connection at once."""


class BodyReader:
    """The body of one request, and the memory that the request holds until its answer has been sent.

    memory: of all requests. evicted: called if the request ends, or its connection, for lack of memory. max_bytes: the
    largest body, packed and unpacked. limit_text: the text about that limit.
    """

    def __init__(
        self,
        receive: Receive,
        length: str,
        owner: Connected,
        memory: Memory,
        evicted: Callable[[], None],
        max_bytes: int,
        limit_text: str,
    ) -> None:
        #: As of serving.transport.memory.Holder.
        self.held, self.waits, self.owner = 0, False, owner
        self._receive = receive
        self._length = length
        self._memory = memory
        self._evicted = evicted
        self._max_bytes = max_bytes
        self._limit_text = limit_text
        self._asking = False
        self._no_room: Problem | None = None
        self._end: Callable[[], object] | None = None
        self._complete = self._abandoned = False

    async def read(self, timeout: float | None) -> bytes:
        """Return the whole body. timeout: the seconds until the request's deadline, or None.

        Raises Problem, and ClientDisconnect if the client goes.
        """
        if self._length.isdecimal() and int(self._length) > self._max_bytes:
            raise self._too_large(self._length)
        loop = asyncio.get_running_loop()
        began, body = loop.time(), bytearray()
        while not self._complete:
            patience = began + _SECONDS + len(body) / _BYTES_A_SECOND - loop.time()
            left = None if timeout is None else began + timeout - loop.time()
            self.waits_for_client()
            try:
                async with asyncio.timeout(patience if left is None else min(left, patience)):
                    part = await self._next()
            except TimeoutError:
                self._abandoned = True
                if left is not None and left < patience:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                    raise Problem(504, "the deadline has passed before the request had come", code) from None
                raise Problem(408, "the request has not come in time", grpc.StatusCode.CANCELLED) from None
            if len(body) + len(part) > self._max_bytes:
                raise self._too_large("more")
            body += part
            self.hold(len(body))
        self._memory.works(self)
        return bytes(body)

    def unpack(self, body: bytes, encoding: str) -> bytes:
        """Return a body without its encoding: gzip, deflate or none. Raises Problem."""
        if encoding in ("", "identity"):
            return body
        if encoding not in ENCODINGS:
            raise Problem(
                415,
                f"content-encoding: {encoding[:64]!r}; expected gzip or deflate",
                grpc.StatusCode.UNIMPLEMENTED,
            )
        inflation = Inflation(body, encoding, self._max_bytes, at_once=0)
        unpacked = inflation.rest()
        if inflation.slow:
            raise Problem(400, f"body: {len(body)} bytes that take too long to unpack")
        if unpacked is None:
            raise Problem(400, f"body: {len(body)} bytes that cannot be unpacked by {encoding}")
        if len(unpacked) > self._max_bytes:
            raise self._too_large("unpacked, more")
        if not inflation.ended:
            raise Problem(400, f"body: {len(body)} bytes, which {encoding} does not end")
        return unpacked

    async def discard(self) -> bool:
        """Read the rest of the body if it is small. Return True if the whole body has been read."""
        discarded = 0
        if self._length.isdecimal() and int(self._length) - self.held > _MAX_DISCARDED_BYTES:
            return self._complete
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not (self._complete or self._abandoned) and discarded <= _MAX_DISCARDED_BYTES:
                    discarded += len(await self._next())
        except (TimeoutError, ClientDisconnect):
            pass
        return self._complete

    def hold(self, size: int) -> None:
        """Reserve memory for the request or its answer, in place of what is reserved for it.

        Requests that wait for their clients may end for its sake. Raises Problem if there is no room.
        """
        memory = self._memory
        memory.hold(self, size - self.held)
        self._asking = True
        memory.make_room(self)
        self._asking = False
        if self._no_room:
            raise self._no_room

    @contextmanager
    def at_work(self, end: Callable[[], object]) -> Iterator[None]:
        """Let others have the memory while a method works on the request: ``end`` is called then.

        Raises Problem at the end of the block if this has happened.
        """
        self._end, self.owner.holders = end, (self,)
        try:
            yield
        finally:
            self._end, self.owner.holders = None, ()
        if self._no_room:
            raise self._no_room

    def waits_for_client(self) -> None:
        """Note that the request goes on when its client has sent or read more."""
        if not self._no_room:
            self._memory.waits(self, asyncio.get_running_loop().time())

    def evict(self, stalled: bool) -> None:
        """Release the memory. If another request needs it, the work ends, or else the connection."""
        memory = self._memory
        self._no_room = Problem(
            429,
            f"requests of {memory.used} bytes are under way; the limit is {memory.max_bytes} bytes "
            "(max_bytes_under_way); try again later",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            headers={"Retry-After": "1"},
        )
        self.release()
        self._evicted()
        if self._end:
            self._end()
        elif not self._asking:
            self.owner.abort()

    def release(self) -> None:
        """Note that nobody needs the body or the answer now."""
        self._memory.leave(self)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._complete = not message.get("more_body", False)
        return cast(bytes, message.get("body", b""))

    def _too_large(self, size: str) -> Problem:
        return Problem(413, f"body: {size} bytes; {self._limit_text}")
