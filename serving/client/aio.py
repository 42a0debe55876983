"""The client for asyncio."""

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, Self, overload

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2_grpc

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.client.base import DEFAULT_WINDOW_IMAGES, ClientBase, Deadline, Errors, Patience, check_stream
from serving.client.channel import FIRST_BACKOFF_SECONDS
from serving.client.errors import (
    STREAM_LOST,
    CapsNetError,
    Failure,
    ItemError,
    ShapeError,
    Unavailable,
    failure_of_call,
)
from serving.client.explanations import Class, Explanation, ExplanationOptions, Part, decode_explanation
from serving.client.inputs import (
    Fitting,
    Images,
    Item,
    Preprocess,
    RequestLimits,
    blocks,
    items_of,
    located,
    messages,
    only_image,
    read,
)
from serving.client.reconstructions import Poses, Reconstruction, ReconstructionOptions, Sweep
from serving.client.results import Classification, Model
from serving.client.window import MAX_STATUS_WAIT_SECONDS, Window

# grpc.aio gives this text instead of the status of a call that the server ended while a request was being written.
_WRITE_FAILED_TEXT = "Internal error from Core"
_READ_SLICE_SECONDS = 0.005  # time for which reading a plain iterable may block the event loop


class _Calls(ClientBase):
    """The channel, and the calls that all methods make."""

    def _connect(self) -> None:
        self._opened: aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def _channel(self) -> aio.Channel:
        """Return the channel, made at the first call because a channel belongs to the event loop that runs then.

        Once that loop is closed, the next one gets a new channel. Raises CapsNetError while it is not.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._opened and self._loop is not loop and self._loop and not self._loop.is_closed():
            raise CapsNetError(f"{self._address}: the client belongs to another event loop; expected one client a loop")
        if self._opened is None or self._loop is not loop:
            self._loop = loop
            made = self._channel_settings
            if made.credentials is None:
                self._opened = aio.insecure_channel(made.target, options=made.options)
            else:
                self._opened = aio.secure_channel(made.target, made.credentials, options=made.options)
        return self._opened

    @property
    def _stub(self) -> Any:
        return CapsNetServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and end all calls in flight."""
        self._closed = True
        if self._opened and self._loop is asyncio.get_running_loop():
            await self._opened.close(None)

    async def get_model(self, *, refresh: bool = False, timeout: float | None = None) -> Model:
        """Return the model that the client asks.

        It is fetched once, and again with ``refresh`` or after the server changed it.
        """
        return await self._get_model(refresh, self._deadline(timeout))

    async def wait_until_ready(self, timeout: float | None = 60.0) -> None:
        """Wait up to ``timeout`` seconds until the server is ready. Raises DeadlineExceeded after that."""
        readiness = self._readiness(timeout)
        while True:
            watch = health_pb2_grpc.HealthStub(self._channel).Watch(
                readiness.request,
                timeout=readiness.deadline.left(),
                wait_for_ready=True,
                metadata=self._channel_settings.metadata(),
            )
            try:
                async for answer in watch:
                    if readiness.is_ready(answer):
                        watch.cancel()
                        return
            except grpc.RpcError as error:
                readiness.ended(error)
            await asyncio.sleep(FIRST_BACKOFF_SECONDS)

    async def _get_model(self, refresh: bool, deadline: Deadline) -> Model:
        model = self._model
        if model and not refresh:
            return model
        return self._keep(await self._call(self._stub.GetModel, self._model_request, deadline))

    async def _call(self, method: Any, request: Any, deadline: Deadline, indices: Sequence[int] = ()) -> Any:
        """Make a unary call and return its response. indices: the number, in the input, of each of its images."""
        try:
            return await method(request, timeout=deadline.left(), metadata=self._channel_settings.metadata())
        except grpc.RpcError as error:
            raise self._error(error, indices) from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Unavailable(f"{self._address}: the client was closed") from None
        except aio.UsageError as error:  # the channel was closed meanwhile
            raise Unavailable(f"{self._address}: the client was closed") from error

    async def _encode(self, item: Item | pb.Image, fitting: Fitting, deadline: Deadline) -> Iterable[pb.Image]:
        """Return an item's images, encoded for a request. Raises ItemError."""

        in_thread = blocks(item, fitting)
        content = await asyncio.to_thread(read, item) if in_thread else read(item)

        async def encode_for(model: Model) -> Iterable[pb.Image]:
            if in_thread:
                return await asyncio.to_thread(messages, content, model, fitting)
            return messages(content, model, fitting)

        try:
            return await encode_for(await self._get_model(False, deadline))
        except ShapeError:
            if self._is_fresh:
                raise
            # The server may have changed the model.
            return await encode_for(await self._get_model(True, deadline))

    async def _encode_all(
        self, images: Images, fitting: Fitting, limits: RequestLimits, deadline: Deadline
    ) -> list[pb.Image]:
        """Return the images of a call. Raises InvalidImage."""
        encoded: list[pb.Image] = []
        for item in items_of(images):
            try:
                for image in await self._encode(item, fitting, deadline):
                    limits.check(image)
                    encoded.append(image)
            except ItemError as error:
                raise located(error, len(encoded)) from error.__cause__
        return encoded

    async def _encode_only(self, item: Item, fitting: Fitting, limits: RequestLimits, deadline: Deadline) -> pb.Image:
        """Return the only image of a call. Raises InvalidImage."""
        try:
            return only_image(await self._encode(item, fitting, deadline), limits)
        except ItemError as error:
            raise located(error, None) from error.__cause__


class AsyncCapsNetClient(_Calls):
    """A client for the tasks of one event loop. It raises the same errors as CapsNetClient."""

    async def classify(
        self,
        images: Images,
        *,
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Return the results of all images in order, or raise an error, like CapsNetClient.classify."""
        fitting, template = Fitting.of(resize, preprocess), self._template(reconstruction_error)
        deadline = self._deadline(timeout)
        limits = RequestLimits.of(await self._get_model(False, deadline), template)
        encoded = await self._encode_all(images, fitting, limits, deadline)
        if not encoded:
            return []
        if not limits.hold_all(encoded):
            outcomes = self._outcomes(encoded, fitting, template, deadline, DEFAULT_WINDOW_IMAGES)
            return [result async for result in _raising(outcomes)]
        template.images.extend(encoded)
        response = await self._call(self._stub.Classify, template, deadline, range(len(encoded)))
        return self._decode(response, len(encoded))

    @overload
    def classify_stream(
        self,
        images: Images | AsyncIterable[Item],
        *,
        errors: Literal["raise"] = "raise",
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> AsyncIterator[Classification]: ...

    @overload
    def classify_stream(
        self,
        images: Images | AsyncIterable[Item],
        *,
        errors: Literal["yield"],
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> AsyncIterator[Classification | CapsNetError]: ...

    def classify_stream(
        self,
        images: Images | AsyncIterable[Item],
        *,
        errors: Errors = "raise",
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> AsyncIterator[Classification] | AsyncIterator[Classification | CapsNetError]:
        """Yield the results of any number of images, in order, as they come, like CapsNetClient.classify_stream.

        images: may also be an asynchronous iterable. A plain iterable is read in the event loop and must not block it.
        Files that it names are read in a thread.

        To stop before the end, close the iterator, for example with ``contextlib.aclosing``; else asyncio closes it
        a little later.
        """
        check_stream(errors, window)
        items = images if isinstance(images, AsyncIterable) else items_of(images)
        fitting, template = Fitting.of(resize, preprocess), self._template(reconstruction_error)
        outcomes = self._outcomes(items, fitting, template, Deadline(timeout), window)
        return _raising(outcomes) if errors == "raise" else outcomes

    async def explain(
        self,
        images: Images,
        *,
        classes: Iterable[Class] | None = None,
        parts: Iterable[Part] | None = None,
        resize: bool = False,
        preprocess: Preprocess = "none",
        timeout: float | None = None,
    ) -> list[Explanation]:
        """Return the explanations of all images in order, or raise an error, like CapsNetClient.explain."""
        fitting, options = Fitting.of(resize, preprocess), ExplanationOptions.of(classes, parts)
        deadline = self._deadline(timeout)
        model = await self._get_model(False, deadline)
        limits = RequestLimits.of(model, options.request(model, self._model_request))
        results = []
        for index, image in enumerate(await self._encode_all(images, fitting, limits, deadline)):
            # One in each request: each costs as much as 200 images of Classify, and the server's limit is unknown here.
            request = options.request(await self._get_model(False, deadline), self._model_request)
            request.images.append(image)
            response = await self._call(self._stub.Explain, request, deadline, [index])
            self._note(response.model_name, response.model_version)
            results.append(decode_explanation(response, (await self._get_model(False, deadline)).image_shape))
        return results

    async def reconstruct(
        self,
        image: Item | None = None,
        *,
        poses: Poses | None = None,
        classes: Iterable[Class] | None = None,
        changes: Mapping[int, float] | None = None,
        sweep: Sweep | tuple[int, float, float, int] | None = None,
        resize: bool = False,
        preprocess: Preprocess = "none",
        timeout: float | None = None,
    ) -> list[Reconstruction]:
        """Draw the images that poses stand for, like CapsNetClient.reconstruct."""
        fitting = Fitting.of(resize, preprocess)
        options = ReconstructionOptions.of(image is not None, any(fitting), poses, classes, changes, sweep)
        deadline = self._deadline(timeout)
        model = await self._get_model(False, deadline)
        request = options.request(model, self._model_request)
        if image is not None:
            request.image.CopyFrom(await self._encode_only(image, fitting, RequestLimits.of(model, request), deadline))
        return self._decode_reconstructions(await self._call(self._stub.Reconstruct, request, deadline))

    async def _outcomes(
        self,
        items: Iterable[Item | pb.Image] | AsyncIterable[Item],
        fitting: Fitting,
        template: pb.ClassifyRequest,
        deadline: Deadline,
        window_size: int,
    ) -> AsyncGenerator[Classification | CapsNetError]:
        call_deadline = self._deadline(None) if deadline.seconds is None else deadline
        window = self._window(template, await self._get_model(False, call_deadline), window_size)

        def open_stream() -> Any:
            return self._stub.ClassifyStream(timeout=deadline.left(), metadata=self._channel_settings.metadata())

        async def encode(item: Item | pb.Image) -> Iterable[pb.Image]:
            return await self._encode(item, fitting, self._deadline(None))

        stream = _Stream(window, self._address, open_stream)
        stream.start(items, encode)
        patience = Patience(self._address, deadline, self._timeout, window)
        try:
            while (outcome := await stream.next(patience)) is not None:
                if isinstance(outcome, Classification):
                    self._note(outcome.model_name, outcome.model_version)
                yield outcome
            await stream.finish()
        finally:
            await stream.stop()


async def _raising(outcomes: AsyncGenerator[Classification | CapsNetError]) -> AsyncIterator[Classification]:
    async with aclosing(outcomes):
        async for outcome in outcomes:
            if isinstance(outcome, CapsNetError):
                raise outcome
            yield outcome


_Encode = Callable[[Item | pb.Image], Any]


class _Stream:
    """A stream in progress. One task reads the input, one sends, and one takes the answers; they share the window."""

    def __init__(self, window: Window, address: str, open_stream: Callable[[], Any]) -> None:
        self._window = window
        self._address = address
        self._open_stream = open_stream
        # Exactly one task waits for each event, and clears it.
        self._room = asyncio.Event()
        self._to_send = asyncio.Event()
        self._ready = asyncio.Event()
        self._read_error: BaseException | None = None
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, items: Iterable[Item | pb.Image] | AsyncIterable[Item], encode: _Encode) -> None:
        self._tasks = [asyncio.create_task(self._read(items, encode)), asyncio.create_task(self._run())]

    async def next(self, patience: Patience) -> Classification | CapsNetError | None:
        """Return the next result in order, or None after the last. Raises the error that ended the stream early."""
        while (outcome := self._window.pop()) is None:
            if self._window.all_yielded:
                if self._read_error:
                    raise self._read_error
                return None
            if self._error:
                raise self._error
            await _wait(self._ready, patience.left())
        self._room.set()
        return outcome

    async def finish(self) -> None:
        """Wait a little for the call's status after the last result. Without it the server counts a cancelled call."""
        await asyncio.wait(self._tasks, timeout=MAX_STATUS_WAIT_SECONDS)

    async def stop(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, items: Iterable[Item | pb.Image] | AsyncIterable[Item], encode: _Encode) -> None:
        try:
            if isinstance(items, AsyncIterable):
                async for item in items:
                    await self._add(item, encode)
            else:
                since = time.monotonic()
                for one in items:
                    await self._add(one, encode)
                    if time.monotonic() > since + _READ_SLICE_SECONDS:
                        await asyncio.sleep(0)
                        since = time.monotonic()
        except BaseException as raised:  # next() raises it to the consumer, whatever it is
            self._read_error = raised
        self._window.all_read = True
        self._to_send.set()
        self._ready.set()

    async def _add(self, item: Item | pb.Image, encode: _Encode) -> None:
        """Put an item's images into the window, one by one, when there is room."""
        try:
            for image in await encode(item):
                await self._wait_for_room()
                self._window.add(image)
                self._to_send.set()
        except ItemError as error:
            await self._wait_for_room()
            self._window.add_error(error)
        self._ready.set()

    async def _wait_for_room(self) -> None:
        while not self._window.has_room:
            await _wait(self._room)

    async def _run(self) -> None:
        try:
            while await self._wait_to_send():
                failure = await self._run_call()
                if self._window.all_answered:
                    break
                if error := self._window.broke(failure):
                    raise error
        except BaseException as error:  # next() raises it to the consumer, whatever it is
            self._error = error
        self._ready.set()

    async def _wait_to_send(self) -> bool:
        """Wait until there is something to send. Return False if nothing will follow."""
        while not self._window.asks or self._window.paused_until > time.monotonic():
            if self._window.all_answered:
                return False
            await _wait(self._to_send, self._window.paused_until - time.monotonic() if self._window.asks else None)
        return True

    async def _run_call(self) -> Failure:
        """Run one call to its end and return how it ended."""
        call = self._open_stream()
        sender = asyncio.create_task(self._send(call))
        try:
            while (message := await call.read()) is not aio.EOF:
                self._window.answer(message)
                self._to_send.set()
                self._ready.set()
        except grpc.RpcError as error:
            failure = failure_of_call(error, self._address)
            return replace(STREAM_LOST, cause=error) if _WRITE_FAILED_TEXT in failure.text else failure
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return Failure(grpc.StatusCode.CANCELLED, f"{self._address}: the client was closed")
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        return STREAM_LOST

    async def _send(self, call: Any) -> None:
        """Send waiting images until all are answered. If the call ends early, the receiver handles it."""
        while await self._wait_to_send():
            request = self._window.next_request()
            self._ready.set()  # the time limit for an answer starts now
            await call.write(request)
        await call.done_writing()


def _is_cancelled() -> bool:
    """Return True if this task is being cancelled. grpc raises the same exception when a channel is closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _wait(event: asyncio.Event, seconds: float | None = None) -> None:
    """Wait until the event is set or the time is up. The caller must check its condition again."""
    event.clear()
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
