"""Requests whose answer takes several graphs, one after the other: a coroutine in a task of its own computes it."""

import asyncio
from abc import abstractmethod

import grpc

from serving.services.computation import Computation
from serving.services.places import Places
from serving.services.request import Reply


class ComputedQuery:
    """A parsed message of a protocol that takes several graphs to answer."""

    #: The model and its version. Empty: the server's only model, and its highest version.
    model_name: str
    model_version: str
    #: The number of rows, such as images, that the message claims. It is not checked yet.
    size: int

    @abstractmethod
    async def answer(self, computation: Computation) -> bytes:
        """Return the answer's bytes. Raises the errors of the computation, and InvalidRequest."""


class ComputedStreamQuery(ComputedQuery):
    """Such a message of a stream, in which an error is an answer too."""

    #: The error of an invalid message, or None.
    error: Exception | None = None

    @abstractmethod
    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        """Return the bytes of an answer with an error."""


class ComputedRequest:
    """A request on its way through several graphs. Its model stays open until the end.

    places: for the images of requests that are not refused.
    """

    def __init__(self, query: ComputedQuery, computation: Computation, reply: Reply, places: Places) -> None:
        self._query = query
        self._computation = computation
        self._reply = reply
        self._places = places
        self._taken = 0  # of the places
        computation.model.acquire()

    def begin(self) -> None:
        """Compute the answer in a task."""
        task = asyncio.get_running_loop().create_task(self._reply.in_turns(_answer(self._query, self._computation)))
        # A task that is cancelled before its first step runs none of its code, so the task cannot note its end.
        task.add_done_callback(self._end)
        self._reply.when_given_up(task.cancel)

    async def begin_slowly(self) -> None:
        """Compute the answer in a task that waits for room in the queues, and does not fail if there is none.

        For streams, which it keeps from reading until it has places: a computation holds many times the bytes of its
        message, such as 200 copies of an image. The task is not waited for: later requests of the stream are read
        meanwhile, up to its window. Raises only asyncio.CancelledError.
        """
        self._computation.patient = True
        try:
            self._taken = await self._places.take(self._reply.client, self._query.size)
        except asyncio.CancelledError:
            self._computation.model.release()
            self._reply.end()
            raise
        self.begin()

    def _end(self, task: "asyncio.Task[bytes]") -> None:
        self._computation.model.release()
        if self._taken:
            self._places.leave(self._taken)
        if task.cancelled():
            self._reply.end()
        elif error := task.exception():
            self._reply.fail(error if isinstance(error, Exception) else RuntimeError(str(error)))
        else:
            self._reply.succeed(task.result(), self._computation.steps if self._reply.traced else None)


async def _answer(query: ComputedQuery, computation: Computation) -> bytes:
    with computation:
        return await query.answer(computation)
