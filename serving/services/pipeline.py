"""The one path of a request, whichever protocol and method it came by: decode, queue, infer, encode."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from serving.batching.ticket import Share, Ticket, settle
from serving.errors import Draining, ServingError
from serving.metrics.registry import ModelMetrics
from serving.repository.repository import Repository
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Steps
from serving.runtime import Arrays


class Item(Protocol):
    """A request to classify, as its protocol has it."""

    model_name: str
    model_version: str
    #: Images that it says it has.
    images: int
    #: Seconds that the client gives it, beside the RPC's own deadline, or None.
    timeout: float | None
    urgent: bool
    #: Decoding takes long enough to hold up other requests.
    slow: bool

    def decode(self, model: ServedModel, /) -> Arrays:
        """The inputs of the model's graph, of one row at least. Raises InvalidRequest."""

    def encode(self, model: ServedModel, share: Share, /) -> bytes:
        """The answer's bytes."""


class StreamItem(Item, Protocol):
    """A request of a stream, where an error is an answer too."""

    #: Why it could not be parsed.
    error: Exception | None

    def encode_error(self, error: Exception, call: Call, seconds: float, /) -> bytes:
        """The bytes of the answer that tells of the error, so many seconds after the request came."""


@dataclass(slots=True)
class _Pending:
    """A request of a stream on its way."""

    item: StreamItem
    model: ServedModel
    ticket: Ticket
    answer: "asyncio.Future[Share]"
    began: float
    decode_time: float


class Pipeline:
    """Takes requests to their models and back. stream_window: the most images of one stream under way."""

    def __init__(self, repository: Repository, stream_window: int) -> None:
        self.repository = repository
        self._stream_window = stream_window
        self._streams: set[_Stream] = set()

    def begin(self, item: Item, call: Call) -> None:
        """Answer a request, then or later, by way of its call. Raises UnknownModel."""
        _Request(item, self.repository.get(item.model_name, item.model_version), call).begin()

    def refusal(self, timeout: float | None, expected: int, urgent: bool) -> tuple[ServingError, ModelMetrics] | None:
        """What a request that has come just now would be refused with, whatever it holds, and where that is counted.

        timeout: what it is given. expected: requests that are to be begun before it. urgent: it may be. None where that
        is not to be said without reading it.
        """
        if (model := self.repository.only) and (error := model.batcher.refusal(timeout, urgent, expected)):
            return error, model.metrics
        return None

    async def answer_stream(
        self, messages: AsyncIterator[bytes], open_item: Callable[[bytes], StreamItem], call: Call
    ) -> AsyncGenerator[bytes]:
        """Of a stream of requests, in order, while later ones are already read and computed, up to a window of images.

        open_item: never raises; what cannot be parsed is an item with an ``error``.
        """
        pending: asyncio.Queue[tuple[_Pending | bytes, int] | None] = asyncio.Queue()
        window = _Window(self._stream_window)
        stream = _Stream()

        async def read() -> None:
            try:
                while not stream.ended:
                    stream.reading = True
                    try:
                        data = await anext(messages)
                    except StopAsyncIteration:
                        stream.complete = True
                        return
                    finally:
                        stream.reading = False
                    item = open_item(data)
                    # Counted as one at least, so that not even wrong requests can pile up without bound.
                    images = max(1, item.images)
                    await window.enter(images)
                    pending.put_nowait((await self._begin(item, call), images))
            finally:
                pending.put_nowait(None)

        reader = stream.reader = asyncio.create_task(read())
        self._streams.add(stream)
        try:
            while (entry := await pending.get()) is not None:
                under_way, images = entry
                yield under_way if isinstance(under_way, bytes) else await self._end(under_way, call)
                window.leave(images)
            if stream.ended and not stream.complete:
                raise Draining
            await reader  # raises what reading raised
        finally:
            self._streams.discard(stream)
            reader.cancel()
            with suppress(asyncio.CancelledError, Exception):  # what reading ran into no longer matters
                await reader
            while not pending.empty():
                entry = pending.get_nowait()
                if entry and isinstance(entry[0], _Pending):
                    self._abandon(entry[0])

    def end_streams(self) -> None:
        """Read no more requests of any stream; each ends with UNAVAILABLE once what it has read is answered."""
        for stream in self._streams:
            stream.ended = True
            if stream.reading:
                stream.reader.cancel()

    async def _begin(self, item: StreamItem, call: Call) -> _Pending | bytes:
        """Queue a request of a stream, or answer what is wrong with it."""
        began = time.perf_counter()
        try:
            if item.error:
                raise item.error
            model = self.repository.get(item.model_name, item.model_version)
        except Exception as error:
            return item.encode_error(error, call, 0.0)
        model.acquire()
        try:
            arrays = await asyncio.to_thread(item.decode, model) if item.slow else item.decode(model)
            decode_time = time.perf_counter() - began
            answer: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
            ticket = await model.batcher.enqueue_patiently(
                arrays, then=settle(answer), deadline=_deadline(item, None), urgent=item.urgent
            )
        except Exception as error:
            model.release()
            seconds = time.perf_counter() - began
            model.metrics.failed(error, seconds)
            return item.encode_error(error, call, seconds)
        except asyncio.CancelledError as error:
            model.release()
            model.metrics.failed(error, time.perf_counter() - began)
            raise
        return _Pending(item, model, ticket, answer, began, decode_time)

    async def _end(self, pending: _Pending, call: Call) -> bytes:
        model = pending.model
        try:
            share = await pending.answer
            data, steps = _encode(pending.item, model, pending.ticket, share, pending.decode_time, call.traced)
            if steps:
                call.answered(time.perf_counter() - pending.began, steps)
            return data
        except asyncio.CancelledError as error:
            model.batcher.give_up(pending.ticket)
            model.metrics.failed(error, time.perf_counter() - pending.began)
            raise
        except Exception as error:
            seconds = time.perf_counter() - pending.began
            model.metrics.failed(error, seconds)
            return pending.item.encode_error(error, call, seconds)
        finally:
            model.release()

    def _abandon(self, pending: _Pending) -> None:
        pending.model.batcher.give_up(pending.ticket)
        pending.model.metrics.failed(asyncio.CancelledError(), time.perf_counter() - pending.began)
        pending.model.release()


class _Request:
    """A unary request on its way, driven by the ends of its steps: decoding and inference."""

    __slots__ = ("_began", "_call", "_decode_time", "_item", "_model", "_ticket")

    _decode_time: float
    _ticket: Ticket

    def __init__(self, item: Item, model: ServedModel, call: Call) -> None:
        self._item = item
        self._model = model
        self._call = call
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._model.acquire()
        if self._item.slow:
            decoding = asyncio.get_running_loop().run_in_executor(None, self._item.decode, self._model)
            self._call.when_given_up(decoding.cancel)
            decoding.add_done_callback(self._decoded)
            return
        try:
            self._queue(self._item.decode(self._model))
        except Exception as error:
            self._fail(error)

    def _decoded(self, decoding: "asyncio.Future[Arrays]") -> None:
        if decoding.cancelled():
            self._give_up()
            return
        try:
            arrays = decoding.result()
            if self._call.over:
                self._give_up()
            else:
                self._queue(arrays)
        except Exception as error:
            self._fail(error)

    def _queue(self, arrays: Arrays) -> None:
        self._decode_time = time.perf_counter() - self._began
        batcher = self._model.batcher
        deadline = _deadline(self._item, self._call)
        self._ticket = batcher.enqueue(arrays, then=self._computed, deadline=deadline, urgent=self._item.urgent)
        self._call.when_given_up(lambda: batcher.give_up(self._ticket))

    def _computed(self, ticket: Ticket) -> None:
        call = self._call
        try:
            share = ticket.result()
            data, steps = _encode(self._item, self._model, ticket, share, self._decode_time, call.traced)
        except asyncio.CancelledError:
            self._give_up()
            return
        except Exception as error:
            self._fail(error)
            return
        self._model.release()
        call.succeed(data, steps)

    def _fail(self, error: Exception) -> None:
        self._model.metrics.failed(error, time.perf_counter() - self._began)
        self._model.release()
        self._call.fail(error)

    def _give_up(self) -> None:
        self._model.metrics.failed(asyncio.CancelledError(), time.perf_counter() - self._began)
        self._model.release()
        self._call.end()


def _deadline(item: Item, call: Call | None) -> float | None:
    """When the answer must be there. A stream's own deadline is that of its last answer, not of each."""
    deadline = call.deadline if call else None
    if item.timeout is None:
        return deadline
    timeout = time.monotonic() + item.timeout
    return timeout if deadline is None else min(deadline, timeout)


def _encode(
    item: Item, model: ServedModel, ticket: Ticket, share: Share, decode_time: float, traced: bool
) -> tuple[bytes, Steps | None]:
    begin = time.perf_counter()
    data = item.encode(model, share)
    encode_time = time.perf_counter() - begin
    model.metrics.answered(decode_time, ticket.waited, ticket.input_time, ticket.infer_time, encode_time)
    if not traced:
        return data, None
    artifact = model.artifact
    return data, Steps(artifact.name, artifact.version, ticket.size, decode_time, ticket.waited, encode_time)


class _Window:
    """How many images of one stream may be under way; a request larger than the window enters when it is empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._inside = 0
        self._left = asyncio.Event()

    async def enter(self, images: int) -> None:
        while self._inside and self._inside + images > self._size:
            self._left.clear()
            await self._left.wait()
        self._inside += images

    def leave(self, images: int) -> None:
        self._inside -= images
        self._left.set()


class _Stream:
    """A stream under way, for the end of the server.

    reading: it waits for the client's next request. ended: it is to read no more. complete: the client has sent all.
    """

    reader: "asyncio.Task[None]"
    reading = False
    ended = False
    complete = False
