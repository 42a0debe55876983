"""Calls that need several graphs of one model, one after the other, such as explanations and reconstructions."""

import asyncio
import time
from collections.abc import Hashable
from types import TracebackType
from typing import Protocol, Self

from serving.batching.ticket import Share, Ticket, settle
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from serving.services.decoding import Decoder, Decoding


class Caller(Protocol):
    """The client that a computation is for."""

    @property
    def client(self) -> Hashable:
        """Return a key of the client. Clients take turns."""

    @property
    def deadline(self) -> float | None:
        """Return the deadline of the answer as a time of ``time.monotonic``, or None."""


class Computation:
    """The computation of one call. It is a context manager, which keeps its model open.

    Each run waits in the queue of its graph with the call's deadline, in the client's turn. A cancelled run leaves the
    queue.
    """

    def __init__(self, model: ServedModel, caller: Caller, decoder: Decoder) -> None:
        self.model = model
        self._caller = caller
        self._decoder = decoder
        self._decode_time = 0.0

    def __enter__(self) -> Self:
        self.model.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.release()

    async def decode(self, decoding: Decoding) -> Arrays:
        """Return the arrays of a decoding, which a thread makes. Raises as Decoder.decode."""
        began = time.perf_counter()
        arrays = await self._decoder.decode(decoding)
        self._decode_time += time.perf_counter() - began
        return arrays

    async def run(self, name: str, arrays: Arrays) -> Share:
        """Return the outputs of a graph for contiguous arrays of one row at least.

        Raises UnknownModel if the model has no such graph, and the errors of Batcher.enqueue and of its tickets.
        """
        graph = self.model.graph(name)
        began = time.perf_counter()
        future: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        ticket: Ticket | None = None
        try:
            ticket = graph.batcher.enqueue(
                arrays, then=settle(future), deadline=self._caller.deadline, client=self._caller.client
            )
            share = await future
        except BaseException as error:
            if ticket is not None:
                graph.batcher.give_up(ticket)
            graph.metrics.failed(error, time.perf_counter() - began)
            raise
        graph.metrics.answered(self._decode_time, ticket.waited, ticket.input_time, ticket.infer_time, 0.0)
        self._decode_time = 0.0
        return share
