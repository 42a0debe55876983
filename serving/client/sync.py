"""The client for programs without asyncio. Each stream uses threads, which end with it."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, Self, overload

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.client.base import DEFAULT_WINDOW_IMAGES, ClientBase, Deadline, Errors, Patience, check_stream
from serving.client.channel import FIRST_BACKOFF_SECONDS
from serving.client.errors import (
    STREAM_LOST,
    CapsNetError,
    Failure,
    InvalidRequest,
    ItemError,
    ShapeError,
    brief,
    failure_of_call,
)
from serving.client.explanations import Class, Explanation, ExplanationOptions, Part, decode_explanation
from serving.client.inputs import (
    Fitting,
    Images,
    Item,
    Preprocess,
    RequestLimits,
    items_of,
    located,
    messages,
    only_image,
    read,
)
from serving.client.reconstructions import Poses, Reconstruction, ReconstructionOptions, Sweep
from serving.client.results import Classification, Model
from serving.client.window import MAX_STATUS_WAIT_SECONDS, Window

_Metadata = tuple[tuple[str, str], ...]
_Open = Callable[[Iterator[pb.ClassifyStreamRequest]], Any]


class _Calls(ClientBase):
    """The channel, and the calls that all methods make."""

    def _connect(self) -> None:
        made = self._channel_settings
        if made.credentials is None:
            self._channel = grpc.insecure_channel(made.target, options=made.options)
        else:
            self._channel = grpc.secure_channel(made.target, made.credentials, options=made.options)
        self._stub = CapsNetServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end all calls in flight."""
        self._closed = True
        self._channel.close()

    def get_model(self, *, refresh: bool = False, timeout: float | None = None) -> Model:
        """Return the model that the client asks.

        It is fetched once, and again with ``refresh`` or after the server changed it.
        """
        return self._get_model(refresh, self._deadline(timeout))

    def wait_until_ready(self, timeout: float | None = 60.0) -> None:
        """Wait up to ``timeout`` seconds until the server is ready. Raises DeadlineExceeded after that."""
        readiness = self._readiness(timeout)
        while True:
            self._check_open()
            watch = health_pb2_grpc.HealthStub(self._channel).Watch(
                readiness.request,
                timeout=readiness.deadline.left(),
                wait_for_ready=True,
                metadata=self._channel_settings.metadata(),
            )
            try:
                for answer in watch:
                    if readiness.is_ready(answer):
                        watch.cancel()
                        return
            except grpc.RpcError as error:
                readiness.ended(error)
            time.sleep(FIRST_BACKOFF_SECONDS)

    def _get_model(self, refresh: bool, deadline: Deadline) -> Model:
        model = self._model
        if model and not refresh:
            return model
        self._check_open()
        return self._keep(self._call(self._stub.GetModel, self._model_request, deadline))

    def _call(self, method: Any, request: Any, deadline: Deadline, indices: Sequence[int] = ()) -> Any:
        """Make a unary call and return its response. indices: the number, in the input, of each of its images."""
        return self._begun(lambda metadata: method(request, timeout=deadline.left(), metadata=metadata), indices)

    def _begun(self, begin: Callable[[_Metadata], Any], indices: Sequence[int] = ()) -> Any:
        """Begin a call with its metadata. Raises CapsNetError, and nothing else."""
        self._check_open()
        metadata = self._channel_settings.metadata()
        try:
            return begin(metadata)
        except grpc.RpcError as error:
            raise self._error(error, indices) from error
        except ValueError as error:  # grpc's, for a channel that another thread has closed meanwhile
            self._check_open()
            raise InvalidRequest(f"{self._address}: {brief(str(error))}") from error

    def _encode(self, item: Item | pb.Image, fitting: Fitting, deadline: Deadline) -> Iterator[pb.Image]:
        """Return an item's images, encoded for a request. Raises ItemError."""
        content = read(item)
        try:
            return messages(content, self._get_model(False, deadline), fitting)
        except ShapeError:
            if self._is_fresh:
                raise
            # The server may have changed the model.
            return messages(content, self._get_model(True, deadline), fitting)

    def _encode_all(
        self, images: Images, fitting: Fitting, limits: RequestLimits, deadline: Deadline
    ) -> list[pb.Image]:
        """Return the images of a call. Raises InvalidImage."""
        encoded: list[pb.Image] = []
        for item in items_of(images):
            try:
                for image in self._encode(item, fitting, deadline):
                    limits.check(image)
                    encoded.append(image)
            except ItemError as error:
                raise located(error, len(encoded)) from error.__cause__
        return encoded

    def _encode_only(self, item: Item, fitting: Fitting, limits: RequestLimits, deadline: Deadline) -> pb.Image:
        """Return the only image of a call. Raises InvalidImage."""
        try:
            return only_image(self._encode(item, fitting, deadline), limits)
        except ItemError as error:
            raise located(error, None) from error.__cause__


class CapsNetClient(_Calls):
    """A client for programs without asyncio. Several threads may use one client at once.

    All methods raise subclasses of CapsNetError: Unavailable if no server answers, DeadlineExceeded, Overloaded,
    UnknownModel, Unsupported, AccessDenied, ServerFault, and InvalidImage for an image that the model does not take.
    """

    def classify(
        self,
        images: Images,
        *,
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Return the results of all images in order. If one image fails, the whole call raises its error.

        images: an array of any library, (H, W), (C, H, W), (n, H, W) or (n, C, H, W), of uint8 from 0 to 255 or floats
            from 0 to 1; an image or IDX file, by path, as bytes or opened; an image that Pillow has opened; or an
            iterable of these. Images beyond the server's limit for one request go out in several requests.
        resize: scale image files and opened images to the model's size.
        preprocess: "auto" lets the server prepare files and opened images of any size as the training images were: it
            finds the object, its polarity, size and place. Arrays and IDX files are sent as they are.
        reconstruction_error: also reconstruct each image from its poses, and return the error. It costs a run of the
            model's decoder.
        timeout: time limit for all images in seconds, instead of the client's.
        """
        fitting, template = Fitting.of(resize, preprocess), self._template(reconstruction_error)
        deadline = self._deadline(timeout)
        limits = RequestLimits.of(self._get_model(False, deadline), template)
        encoded = self._encode_all(images, fitting, limits, deadline)
        if not encoded:
            return []
        if not limits.hold_all(encoded):
            return list(_raising(self._outcomes(encoded, fitting, template, deadline, DEFAULT_WINDOW_IMAGES)))
        template.images.extend(encoded)
        return self._decode(self._call(self._stub.Classify, template, deadline, range(len(encoded))), len(encoded))

    @overload
    def classify_stream(
        self,
        images: Images,
        *,
        errors: Literal["raise"] = "raise",
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> Iterator[Classification]: ...

    @overload
    def classify_stream(
        self,
        images: Images,
        *,
        errors: Literal["yield"],
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> Iterator[Classification | CapsNetError]: ...

    def classify_stream(
        self,
        images: Images,
        *,
        errors: Errors = "raise",
        resize: bool = False,
        preprocess: Preprocess = "none",
        reconstruction_error: bool = False,
        timeout: float | None = None,
        window: int = DEFAULT_WINDOW_IMAGES,
    ) -> Iterator[Classification] | Iterator[Classification | CapsNetError]:
        """Yield the results of any number of images, in order, as they come.

        images: as for ``classify``. A thread reads the iterable, at most ``window`` images ahead of the last result.
            If the iterable raises, the stream raises the same error after the results of the images before it.
        errors: "raise" ends the stream at the first image that cannot be classified. "yield" gives the error in the
            place of the result, with its ``index``, and goes on. An error of the whole stream is always raised.
        resize, preprocess, reconstruction_error: as for ``classify``.
        timeout: time limit for the whole stream in seconds; by default none. The client's limit holds for each answer.

        If the server goes away, the stream goes on at another server of the same address, with up to ``retries``
        further attempts. Closing the iterator ends the stream.
        """
        check_stream(errors, window)
        fitting, template = Fitting.of(resize, preprocess), self._template(reconstruction_error)
        outcomes = self._outcomes(items_of(images), fitting, template, Deadline(timeout), window)
        return _raising(outcomes) if errors == "raise" else outcomes

    def explain(
        self,
        images: Images,
        *,
        classes: Iterable[Class] | None = None,
        parts: Iterable[Part] | None = None,
        resize: bool = False,
        preprocess: Preprocess = "none",
        timeout: float | None = None,
    ) -> list[Explanation]:
        """Return the explanations of all images in order: how the network came to its answers.

        images, resize, preprocess: as for ``classify``.
        classes: the labels or indices of the classes to explain, for each image. None: the winner of each image.
        parts: some of "routing", "contributions" and "relevance". None: all. The relevance of one image costs the
            server about as much as 200 images of ``classify``.
        timeout: time limit for all images in seconds, instead of the client's.

        Raises InvalidRequest for options that contradict each other, and Unsupported if the model has no such graph.
        """
        fitting, options = Fitting.of(resize, preprocess), ExplanationOptions.of(classes, parts)
        deadline = self._deadline(timeout)
        model = self._get_model(False, deadline)
        limits = RequestLimits.of(model, options.request(model, self._model_request))
        results = []
        for index, image in enumerate(self._encode_all(images, fitting, limits, deadline)):
            # One in each request: each costs as much as 200 images of Classify, and the server's limit is unknown here.
            request = options.request(self._get_model(False, deadline), self._model_request)
            request.images.append(image)
            response = self._call(self._stub.Explain, request, deadline, [index])
            self._note(response.model_name, response.model_version)
            results.append(decode_explanation(response, self._get_model(False, deadline).image_shape))
        return results

    def reconstruct(
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
        """Draw the images that poses stand for: those found in an image, or given ones.

        image: one image, as for ``classify``.
        poses: in place of an image, a pose for each class, (E,) numbers, or pairs of a class and a pose.
        classes: with an image, the labels or indices of the classes to draw. None: the present ones, or the longest if
            none is present.
        changes: numbers to add to each pose, by dimension.
        sweep: numbers to add to one dimension of each pose, one after the other: a row of drawings for each pose.
        resize, preprocess, timeout: as for ``classify``.

        Raises InvalidRequest for options that contradict each other, and Unsupported if the model has no decoder.
        """
        fitting = Fitting.of(resize, preprocess)
        options = ReconstructionOptions.of(image is not None, any(fitting), poses, classes, changes, sweep)
        deadline = self._deadline(timeout)
        model = self._get_model(False, deadline)
        request = options.request(model, self._model_request)
        if image is not None:
            request.image.CopyFrom(self._encode_only(image, fitting, RequestLimits.of(model, request), deadline))
        return self._decode_reconstructions(self._call(self._stub.Reconstruct, request, deadline))

    def _outcomes(
        self,
        items: Iterable[Item | pb.Image],
        fitting: Fitting,
        template: pb.ClassifyRequest,
        deadline: Deadline,
        window_size: int,
    ) -> Generator[Classification | CapsNetError]:
        call_deadline = self._deadline(None) if deadline.seconds is None else deadline
        window = self._window(template, self._get_model(False, call_deadline), window_size)

        def open_stream(requests: Iterator[pb.ClassifyStreamRequest]) -> Any:
            return self._begun(
                lambda metadata: self._stub.ClassifyStream(requests, timeout=deadline.left(), metadata=metadata)
            )

        def encode(item: Item | pb.Image) -> Iterator[pb.Image]:
            return self._encode(item, fitting, self._deadline(None))

        stream = _Stream(window, self._address, open_stream)
        stream.start(items, encode)
        patience = Patience(self._address, deadline, self._timeout, window)
        try:
            while (outcome := stream.next(patience)) is not None:
                if isinstance(outcome, Classification):
                    self._note(outcome.model_name, outcome.model_version)
                yield outcome
            stream.finish()
        finally:
            stream.stop()


def _raising(outcomes: Generator[Classification | CapsNetError]) -> Iterator[Classification]:
    with closing(outcomes):
        for outcome in outcomes:
            if isinstance(outcome, CapsNetError):
                raise outcome
            yield outcome


class _Stream:
    """A stream in progress.

    One thread reads the input, one takes the answers, and one of grpc's threads takes the requests. They share the
    window, under one lock.
    """

    def __init__(self, window: Window, address: str, open_stream: _Open) -> None:
        self._window = window
        self._address = address
        self._open_stream = open_stream
        lock = threading.Lock()
        self._room = threading.Condition(lock)  # the reader of the input waits here
        self._to_send = threading.Condition(lock)  # the sender waits here, and the receiver between two calls
        self._ready = threading.Condition(lock)  # the consumer waits here
        self._lock = lock
        self._calls = 0
        self._call: Any = None
        self._stopped = False
        self._ended = threading.Event()  # the status of the last call has come
        self._read_error: BaseException | None = None
        self._error: BaseException | None = None

    def start(self, items: Iterable[Item | pb.Image], encode: Callable[[Item | pb.Image], Iterator[pb.Image]]) -> None:
        for target, arguments in ((self._read, (items, encode)), (self._receive, ())):
            # Daemons, since nothing can end a thread that waits for the caller's iterable.
            threading.Thread(target=target, args=arguments, name="capsnet-client", daemon=True).start()

    def next(self, patience: Patience) -> Classification | CapsNetError | None:
        """Return the next result in order, or None after the last. Raises the error that ended the stream early."""
        with self._lock:
            while (outcome := self._window.pop()) is None:
                if self._window.all_yielded:
                    if self._read_error:
                        raise self._read_error
                    return None
                if self._error:
                    raise self._error
                self._ready.wait(patience.left())
            self._room.notify()
            return outcome

    def finish(self) -> None:
        """Wait a little for the call's status after the last result. Without it the server counts a cancelled call."""
        self._ended.wait(MAX_STATUS_WAIT_SECONDS)

    def stop(self) -> None:
        """Tell all threads to end."""
        with self._lock:
            self._stopped = True
            call = self._call
            for condition in (self._room, self._to_send):
                condition.notify_all()
        if call:
            call.cancel()

    def _read(self, items: Iterable[Item | pb.Image], encode: Callable[[Item | pb.Image], Iterator[pb.Image]]) -> None:
        error = None
        try:
            for item in items:
                try:
                    for image in encode(item):
                        if not self._add(image):
                            return
                except ItemError as invalid:
                    if not self._add(invalid):
                        return
        except BaseException as raised:  # next() raises it to the consumer, whatever it is
            error = raised
        with self._lock:
            self._read_error = error
            self._window.all_read = True
            self._to_send.notify_all()
            self._ready.notify()

    def _add(self, image: pb.Image | ItemError) -> bool:
        """Put an image into the window when there is room. Return False after the end of the stream."""
        with self._lock:
            while not (self._window.has_room or self._stopped):
                self._room.wait()
            if self._stopped:
                return False
            if isinstance(image, ItemError):
                self._window.add_error(image)
                self._ready.notify()
            else:
                self._window.add(image)
                self._to_send.notify_all()
            return True

    def _requests(self, call: int) -> Iterator[pb.ClassifyStreamRequest]:
        """Yield the requests that the call of this number sends."""
        window = self._window
        while True:
            with self._lock:
                while (pause := self._pause()) is None or pause > 0:
                    if self._stopped or self._calls != call or window.all_answered:
                        return
                    self._to_send.wait(pause)
                if self._stopped or self._calls != call:
                    return
                request = window.next_request()
                self._ready.notify()  # the time limit for an answer starts now
            if request:
                yield request

    def _pause(self) -> float | None:
        """Return the seconds until there is something to send, or None while nothing waits."""
        return self._window.paused_until - time.monotonic() if self._window.asks else None

    def _receive(self) -> None:
        try:
            while self._wait_to_call():
                failure = self._run_call()
                with self._lock:
                    self._calls += 1  # the sender of the call ends
                    self._to_send.notify_all()
                    if self._stopped or self._window.all_answered:
                        break
                    if error := self._window.broke(failure):
                        raise error
        except BaseException as error:  # next() raises it to the consumer, whatever it is
            with self._lock:
                self._error = error
        with self._lock:
            self._calls += 1
            self._to_send.notify_all()
            self._ready.notify()
        self._ended.set()

    def _wait_to_call(self) -> bool:
        """Wait until there is something to send. Return False if nothing will follow."""
        with self._lock:
            while (pause := self._pause()) is None or pause > 0:
                if self._stopped or self._window.all_answered:
                    return False
                self._to_send.wait(pause)
            return not self._stopped

    def _run_call(self) -> Failure:
        """Take the answers of one call and return how it ended."""
        call = self._open_stream(self._requests(self._calls))
        with self._lock:
            self._call = call
            stopped = self._stopped
        if stopped:
            call.cancel()
        try:
            for message in call:
                with self._lock:
                    self._window.answer(message)
                    self._to_send.notify_all()
                    self._ready.notify()
        except grpc.RpcError as error:
            return failure_of_call(error, self._address)
        return STREAM_LOST
