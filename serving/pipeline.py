"""The one path of a request, whichever protocol and method it came by: decode, queue, infer, encode."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from serving.batcher import Images, Ticket
from serving.errors import Draining
from serving.models import ServedModel
from serving.repository import Repository
from serving.rpc import Call, Steps
from serving.runtime import Prediction


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

    def decode(self, model: ServedModel, /) -> Images:
        """The images, (n, C, H, W), n at least 1. Raises InvalidRequest."""

    def encode(self, model: ServedModel, prediction: Prediction, /) -> bytes:
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
    began: float
    decode_time: float


class Pipeline:
    """Takes requests to their models and back. stream_window: the most images of one stream under way."""

    def __init__(self, repository: Repository, stream_window: int) -> None:
        self.repository = repository
        self._stream_window = stream_window
        self._streams: set[_Stream] = set()

    async def answer(self, item: Item, call: Call) -> bytes:
        """Of one request. Raises the errors of serving/errors.py."""
        began = time.perf_counter()
        model = self.repository.get(item.model_name, item.model_version)
        model.acquire()
        try:
            images = await asyncio.to_thread(item.decode, model) if item.slow else item.decode(model)
            decode_time = time.perf_counter() - began
            ticket = model.batcher.enqueue(images, _deadline(item, call), item.urgent)
            prediction = await model.batcher.wait(ticket)
            data, call.steps = _encode(item, model, ticket, prediction, decode_time, call.traced)
            return data
        except BaseException as error:  # a request that is given up too
            model.metrics.failed(error, time.perf_counter() - began)
            raise
        finally:
            model.release()

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
            images = await asyncio.to_thread(item.decode, model) if item.slow else item.decode(model)
            decode_time = time.perf_counter() - began
            ticket = await model.batcher.enqueue_patiently(images, _deadline(item, None), item.urgent)
        except Exception as error:
            model.release()
            seconds = time.perf_counter() - began
            model.metrics.failed(error, seconds)
            return item.encode_error(error, call, seconds)
        except asyncio.CancelledError as error:
            model.release()
            model.metrics.failed(error, time.perf_counter() - began)
            raise
        return _Pending(item, model, ticket, began, decode_time)

    async def _end(self, pending: _Pending, call: Call) -> bytes:
        model = pending.model
        try:
            prediction = await model.batcher.wait(pending.ticket)
            data, steps = _encode(pending.item, model, pending.ticket, prediction, pending.decode_time, call.traced)
            if steps:
                call.answered(time.perf_counter() - pending.began, steps)
            return data
        except asyncio.CancelledError as error:
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


def _deadline(item: Item, call: Call | None) -> float | None:
    """When the answer must be there. A stream's own deadline is that of its last answer, not of each."""
    deadlines = [] if item.timeout is None else [time.monotonic() + item.timeout]
    if call and call.deadline is not None:
        deadlines.append(call.deadline)
    return min(deadlines, default=None)


def _encode(
    item: Item, model: ServedModel, ticket: Ticket, prediction: Prediction, decode_time: float, traced: bool
) -> tuple[bytes, Steps | None]:
    begin = time.perf_counter()
    data = item.encode(model, prediction)
    encode_time = time.perf_counter() - begin
    model.metrics.answered(decode_time, ticket.waited, ticket.input_time, ticket.infer_time, encode_time)
    if not traced:
        return data, None
    artifact = model.artifact
    return data, Steps(artifact.name, artifact.version, len(ticket.images), decode_time, ticket.waited, encode_time)


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
