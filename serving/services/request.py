"""Path of every request, whichever protocol and method it came by: decode, queue, compute, encode."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from serving.batching.ticket import Share, Ticket
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Steps
from serving.runtime import Arrays


class Query(Protocol):
    """A parsed message of a protocol: which graph of which model computes it, and how its bytes become arrays."""

    #: Empty for the server's only model, and for its highest version.
    model_name: str
    model_version: str
    #: Name of the graph.
    graph: str
    #: Number of rows that it says it has, such as images; not checked yet.
    size: int
    #: Seconds that the client gives it, beside the RPC's own deadline, or None.
    timeout: float | None
    urgent: bool
    #: Decoding takes long enough to hold up other requests.
    slow: bool

    def decode(self, model: ServedModel, /) -> Arrays:
        """Return the inputs of the graph, contiguous and of one row at least. Raises InvalidRequest."""

    def encode(self, model: ServedModel, share: Share, /) -> bytes:
        """Return the answer's bytes for the graph's outputs; called after ``decode``."""


class Reply(Protocol):
    """Place of a request's answer. It gets exactly one of ``succeed``, ``fail`` and ``end``, once."""

    @property
    def deadline(self) -> float | None:
        """Deadline of this answer by the clock of ``time.monotonic``, or None."""

    @property
    def traced(self) -> bool:
        """Tell whether ``succeed`` needs the steps of the request."""

    def when_given_up(self, then: Callable[[], object], /) -> None:
        """Call ``then``, in place of an earlier one, as soon as nobody waits for the answer any longer."""

    def succeed(self, data: bytes, steps: Steps | None = None, /) -> None:
        """Take the answer."""

    def fail(self, error: Exception, /) -> None:
        """Take an error in place of an answer."""

    def end(self) -> None:
        """Take notice that the request was given up."""


class Request:
    """A request on its way through a graph, driven by the ends of its steps. Its model stays until it has ended.

    It keeps no reference to its ticket, which has one to it: a cycle would outlive the request until garbage is
    collected.
    """

    __slots__ = ("_began", "_decode_time", "_graph", "_model", "_query", "_reply")

    def __init__(self, query: Query, model: ServedModel, reply: Reply) -> None:
        """Raises UnknownModel where the model has no such graph."""
        self._query = query
        self._model = model
        self._graph = model.graph(query.graph)
        self._reply = reply
        self._began = time.perf_counter()
        self._decode_time = 0.0
        model.acquire()

    def begin(self) -> None:
        """Decode and queue the request now, or in a task of its own where decoding is slow."""
        if self._query.slow:
            task = asyncio.get_running_loop().create_task(self.begin_slowly(patient=False))
            self._reply.when_given_up(task.cancel)
            return
        try:
            self._queue(self._decode())
        except Exception as error:
            self._fail(error)

    async def begin_slowly(self, patient: bool = True) -> None:
        """Decode and queue the request, and wait for what takes long: decoding, and where patient, room in the queue.

        Patience is for streams, which can simply be read more slowly. Raises asyncio.CancelledError alone.
        """
        query, batcher = self._query, self._graph.batcher
        try:
            arrays = await asyncio.to_thread(self._decode) if query.slow else self._decode()
            if patient:
                ticket = await batcher.enqueue_patiently(
                    arrays, then=self._computed, deadline=self._deadline(), urgent=query.urgent
                )
                self._reply.when_given_up(partial(batcher.give_up, ticket))
            else:
                self._queue(arrays)
        except asyncio.CancelledError:
            self._give_up()
            raise
        except Exception as error:
            self._fail(error)

    def _decode(self) -> Arrays:
        arrays = self._query.decode(self._model)
        self._decode_time = time.perf_counter() - self._began
        return arrays

    def _queue(self, arrays: Arrays) -> None:
        batcher, query = self._graph.batcher, self._query
        ticket = batcher.enqueue(arrays, then=self._computed, deadline=self._deadline(), urgent=query.urgent)
        self._reply.when_given_up(partial(batcher.give_up, ticket))

    def _deadline(self) -> float | None:
        """Return when the answer must be there, by the RPC's deadline and the query's own."""
        deadline, timeout = self._reply.deadline, self._query.timeout
        if timeout is None:
            return deadline
        end = time.monotonic() + timeout
        return end if deadline is None else min(deadline, end)

    def _computed(self, ticket: Ticket) -> None:
        """Answer with what the ticket ended with."""
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
