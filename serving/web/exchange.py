"""One HTTP request as the context of a method's handler (see serving.transport.methods.Context)."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Protocol

import grpc

from serving.transport.call import INTERNAL_TEXT
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Owner
from serving.transport.methods import Abort, CallbackMethod, Peer, UnaryMethod
from serving.transport.rounds import Result

#: The methods that HTTP can call.
OneAnswer = UnaryMethod | CallbackMethod

_GONE = Status(grpc.StatusCode.CANCELLED, "the client has gone")
_EXPIRED = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
_INTERNAL = Status(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

_logger = logging.getLogger(__name__)


class Connected(Owner, Protocol):
    """The connection of a client."""

    @property
    def peer(self) -> Peer:
        """Return the client."""

    def watch(self, lost: Callable[[], object] | None) -> None:
        """Call a function if the client goes, from now on; None for no function."""

    def in_turns(self, work: Coroutine[object, None, Result], /) -> Coroutine[object, None, Result]:
        """Return what runs a part of a handler in turns with the work of other clients."""

    def abort(self) -> None:
        """Close the connection at once."""


class Exchange:
    """A request, from its headers to its answer. timeout: in seconds, or None."""

    def __init__(self, connection: Connected, metadata: Metadata, timeout: float | None) -> None:
        self.given_up: Callable[[], object] | None = None
        self.expired = self.undecided = False
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._connection = connection
        self._metadata = metadata
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[bytes | Status] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Return True if nobody waits for the handler."""
        return self._outcome.done()

    @property
    def peer(self) -> Peer:
        """Return the client of the connection."""
        return self._connection.peer

    @property
    def left(self) -> float | None:
        """Return the seconds until the deadline, or None."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""
        return self._metadata

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return what runs a part of the handler in its own task."""
        return self._connection.in_turns(work)

    def keep(self, size: int) -> None:
        """Do nothing: there are no streams."""

    def answer(self, data: bytes) -> None:
        """Take the answer."""
        self._end(data)

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Take the status of a failed call."""
        self._end(Status(code, text, metadata))

    def give_up(self) -> None:
        """End the exchange without an answer, and tell its handler."""
        self._give_up(_GONE)

    async def call(self, method: OneAnswer, data: bytes) -> bytes | Status:
        """Return a method's answer to a message, or the status with which it ends without one."""
        left = self.left
        timer = None if left is None else self._loop.call_later(max(0.0, left), self._expire)
        self._connection.watch(self.give_up)
        try:
            if isinstance(method, CallbackMethod):
                self._begin(method, data)
            else:
                self._task = self._loop.create_task(self.in_turns(self._run(method, data)))
            del data  # which the method may free once it is parsed
            await asyncio.wait((self._outcome,))  # and not the future itself, which a cancelled task would cancel
            return self._outcome.result()
        finally:
            self._connection.watch(None)
            if timer:
                timer.cancel()
            self.give_up()  # if this task is cancelled

    def _begin(self, method: CallbackMethod, data: bytes) -> None:
        try:
            method.begin(data, self)
        except Abort as abort:
            self._end(abort.status)
        except Exception:
            _logger.exception("a handler failed")
            self._end(_INTERNAL)

    async def _run(self, method: UnaryMethod, data: bytes) -> None:
        try:
            answering = method.answer(data, self)
            del data
            answer = await answering
            if answer is not None:
                self._end(answer)
            elif not self.over:
                raise TypeError("a handler has ended without an answer")
        except Abort as abort:
            self._end(abort.status)
        except asyncio.CancelledError:
            self._end(_GONE)
            raise
        except Exception:
            _logger.exception("a handler failed")
            self._end(_INTERNAL)

    def _expire(self) -> None:
        self.expired = True
        self._give_up(_EXPIRED)

    def _give_up(self, status: Status) -> None:
        """End the exchange for the client, and then tell its handler, if there is no outcome yet."""
        if self._outcome.done():
            return
        self._outcome.set_result(status)
        if self._task:
            self._task.cancel()
        if given_up := self.given_up:
            self.given_up = None
            given_up()

    def _end(self, outcome: bytes | Status) -> None:
        self.given_up = None
        if not self._outcome.done():
            self._outcome.set_result(outcome)
