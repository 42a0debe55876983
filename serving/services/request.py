"""The path of every request of any protocol and method: decode, queue, compute, encode."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Protocol

from serving.batching.ticket import Share, Ticket
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Steps
from serving.runtime import Arrays
from serving.services.decoding import Decoder, Decoding, Job, Outcome
from serving.transport.rounds import Result


class Query(Protocol):
    """A parsed message of a protocol: it names the model and graph, and converts its bytes to arrays."""

    #: The model and its version. Empty: the server's only model, and its highest version.
    model_name: str
    model_version: str
    #: The name of the graph.
    graph: str
    #: The number of rows, such as images, that the message claims. It is not checked yet.
    size: int
    #: The timeout in the message in seconds, besides the RPC's deadline, or None.
    timeout: float | None
    urgent: bool
    #: True if decoding takes so long that it would delay other requests. It calls ``decode_slowly`` then.
    slow: bool

    def decode(self, model: ServedModel, /) -> Arrays:
        """Return the graph's inputs: contiguous arrays of at least one row. Raises InvalidRequest."""

    def decode_slowly(self, model: ServedModel, /) -> Decoding:
        """Return the decoding of the graph's inputs, for a thread. Raises InvalidRequest, as do the steps."""

    def encode(self, model: ServedModel, share: Share, /) -> bytes:
        """Return the answer's bytes for the graph's outputs. Called after ``decode``."""


class Reply(Protocol):
    """The receiver of a request's answer. Exactly one of ``succeed``, ``fail`` and ``end`` is called, once."""

    @property
    def client(self) -> Hashable:
        """Return a key of the client. Clients take turns."""

    @property
    def deadline(self) -> float | None:
        """Return the deadline of the answer as a time of ``time.monotonic``, or None."""

    @property
    def traced(self) -> bool:
        """Return True if ``succeed`` needs the steps of the request."""

    def in_turns(self, work: Coroutine[object, None, Result], /) -> Coroutine[object, None, Result]:
        """Return what runs a part of the request in a task of its own, in turns with the work of other clients."""

    def when_given_up(self, then: Callable[[], object], /) -> None:
        """Set the function that is called when nobody waits for the answer. It replaces an earlier one."""

    def succeed(self, data: bytes, steps: Steps | None = None, /) -> None:
        """Take the answer."""

    def fail(self, error: Exception, /) -> None:
        """Take the error of a failed request."""

    def end(self) -> None:
        """Note that the request was given up."""


class Request:
    """A request on its way through a graph. The end of each step starts the next. Its model stays open until the end.

    It has no reference to its ticket, since the ticket refers to it: a cycle would live on until a garbage collection.
    """

    __slots__ = ("_began", "_decode_time", "_decoder", "_graph", "_model", "_query", "_reply")

    def __init__(self, query: Query, model: ServedModel, reply: Reply, decoder: Decoder) -> None:
        """Prepare the request. Raises UnknownModel if the model has no such graph."""
        self._decoder = decoder
        self._query = query
        self._model = model
        self._graph = model.graph(query.graph)
        self._reply = reply
        self._began = time.perf_counter()
        self._decode_time = 0.0
        model.acquire()

    def begin(self) -> None:
        """Queue the request once it is decoded: now, or in a thread if decoding is slow."""
        try:
            if not self._query.slow:
                self._queue(self._decode())
                return
            # Refused at once if there is no room: a request that waited for its refusal would hold its memory.
            decoding = self._query.decode_slowly(self._model)
            job = self._decoder.begin(decoding, self._decoded, client=self._reply.client)
        except Exception as error:
            self._fail(error)
            return
        self._reply.when_given_up(partial(self._give_up_decoding, job))

    async def begin_slowly(self) -> None:
        """Decode and queue the request, and wait for slow decoding and for room in the queue.

        For streams, which are patient, since they can be read more slowly. Raises only asyncio.CancelledError.
        """
        try:
            query, client = self._query, self._reply.client
            if query.slow:
                arrays = await self._decoder.decode(query.decode_slowly(self._model), True, client)
                self._decode_time = time.perf_counter() - self._began
            else:
                arrays = self._decode()
            await self._graph.batcher.room_for(arrays, client)
            self._queue(arrays, patient=True)
        except asyncio.CancelledError:
            self._give_up()
            raise
        except Exception as error:
            self._fail(error)

    def _decode(self) -> Arrays:
        arrays = self._query.decode(self._model)
        self._decode_time = time.perf_counter() - self._began
        return arrays

    def _decoded(self, outcome: Outcome) -> None:
        """Queue the request that a thread has decoded."""
        self._decode_time = time.perf_counter() - self._began
        if isinstance(outcome, Exception):
            self._fail(outcome)
            return
        try:
            self._queue(outcome)
        except Exception as error:
            self._fail(error)

    def _give_up_decoding(self, job: Job) -> None:
        self._decoder.give_up(job)
        self._give_up()

    def _queue(self, arrays: Arrays, patient: bool = False) -> None:
        batcher, query, reply = self._graph.batcher, self._query, self._reply
        ticket = batcher.enqueue(
            arrays,
            then=self._computed,
            deadline=self._deadline(),
            urgent=query.urgent,
            client=reply.client,
            patient=patient,
        )
        self._reply.when_given_up(partial(batcher.give_up, ticket))

    def _deadline(self) -> float | None:
        """Return the earlier of the RPC's deadline and the query's own, or None."""
        deadline, timeout = self._reply.deadline, self._query.timeout
        if timeout is None:
            return deadline
        end = time.monotonic() + timeout
        return end if deadline is None else min(deadline, end)

    def _computed(self, ticket: Ticket) -> None:
        """Answer with the result or the error of the ticket."""
        if ticket.error:
            # It is not raised: a traceback would keep the batch, and with it the memory of a model that is unloaded.
            self._fail(ticket.error)
            return
        try:
            share = ticket.result()
            begin = time.perf_counter()
            data = self._query.encode(self._model, share)
            encode_time = time.perf_counter() - begin
        except asyncio.CancelledError:
            self._give_up()
            return
        except Exception as error:
            self._fail(error)
            return
        self._graph.metrics.answered(
            self._decode_time, ticket.waited, ticket.input_time, ticket.infer_time, encode_time
        )
        self._model.release()
        steps = None
        if self._reply.traced:
            artifact = self._model.artifact
            steps = Steps(artifact.name, artifact.version, ticket.size, self._decode_time, ticket.waited, encode_time)
        self._reply.succeed(data, steps)

    def _fail(self, error: Exception) -> None:
        self._graph.metrics.failed(error, time.perf_counter() - self._began)
        self._model.release()
        self._reply.fail(error)

    def _give_up(self) -> None:
        self._graph.metrics.failed(asyncio.CancelledError(), time.perf_counter() - self._began)
        self._model.release()
        self._reply.end()
