"""Calls that need several graphs of one model, one after the other, such as explanations and reconstructions."""

import asyncio
import time
from collections.abc import Hashable
from types import TracebackType
from typing import Protocol, Self

from serving.batching.ticket import Share, Ticket, settle
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Steps
from serving.runtime import Arrays, rows
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

    patient: True for a call that waits for room in the queues and is not refused. urgent: True if it goes before others
    of its client.
    """

    def __init__(self, model: ServedModel, caller: Caller, decoder: Decoder) -> None:
        self.model = model
        self.patient = False
        self.urgent = False
        self._caller = caller
        self._deadline = caller.deadline
        self._decoder = decoder
        self._began = time.perf_counter()
        self._decode_time = 0.0  # of what no run has counted yet
        self._times = [0.0, 0.0, 0.0]  # of decoding, of waiting in queues, and of everything before the last run's end
        self._images = 0
        self._counted = False  # True if a graph has counted the error

    def __enter__(self) -> Self:
        self.model.acquire()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error and not self._counted:
            self.model.classify.metrics.failed(error, time.perf_counter() - self._began)
        self.model.release()

    @property
    def steps(self) -> Steps:
        """Return the steps of the call. The time after the last run counts as encoding."""
        artifact = self.model.artifact
        decode, waited, computed = self._times
        encode = max(0.0, time.perf_counter() - self._began - computed)
        return Steps(artifact.name, artifact.version, self._images, decode, waited, encode)

    def limit(self, timeout: float | None) -> None:
        """End the runs of the call this many seconds from now at the latest. None: there is no limit."""
        if timeout is not None:
            end = time.monotonic() + timeout
            self._deadline = end if self._deadline is None else min(self._deadline, end)

    async def decode(self, decoding: Decoding) -> Arrays:
        """Return the arrays of a decoding, or other work with pixels, which a thread does. Raises as Decoder.decode."""
        began = time.perf_counter()
        arrays = await self._decoder.decode(decoding, self.patient, self._caller.client)
        seconds = time.perf_counter() - began
        self._decode_time += seconds
        self._times[0] += seconds
        return arrays

    async def run(self, name: str, arrays: Arrays, *, probe: bool = False) -> Share:
        """Return the outputs of a graph for contiguous arrays of one row at least.

        probe: as of Batcher.enqueue. Raises UnknownModel if the model has no such graph, and the errors of
        Batcher.enqueue and of its tickets.
        """
        graph = self.model.graph(name)
        batcher, client = graph.batcher, self._caller.client
        began = time.perf_counter()
        future: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        ticket: Ticket | None = None
        try:
            if self.patient:
                await batcher.room_for(arrays, client)
            ticket = batcher.enqueue(
                arrays,
                then=settle(future),
                deadline=self._deadline,
                urgent=self.urgent,
                client=client,
                patient=self.patient,
                probe=probe,
            )
            size = rows(arrays)
            share = await future
        except BaseException as error:
            if ticket is not None:
                batcher.give_up(ticket)
                ticket = None  # it knows the error too
            graph.metrics.failed(error, time.perf_counter() - began)
            self._counted = True
            raise
        finally:
            # An error knows this frame by its traceback, and the future knows the error: the cycle would keep the
            # batch, and with it the memory of a model that is unloaded.
            del future, arrays
        graph.metrics.answered(self._decode_time, ticket.waited, ticket.input_time, ticket.infer_time, 0.0)
        self._decode_time = 0.0
        self._times[1] += ticket.waited
        self._times[2] = time.perf_counter() - self._began
        self._images = self._images or size
        return share
