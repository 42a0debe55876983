"""``capsnet.v1.CapsNetService``: decode and check a request, have it computed, encode the answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.batcher import Batcher
from serving.errors import Draining, InvalidRequest, TooLarge, UnknownModel
from serving.images import from_encoded, from_pixels
from serving.metrics import Metrics
from serving.rpc import Edge, parse, to_status
from serving.runtime import Prediction
from serving.settings import Settings

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name


class CapsNetService:
    """The service for one model."""

    def __init__(
        self, artifact: Artifact, provider: str, batcher: Batcher, metrics: Metrics, settings: Settings
    ) -> None:
        self._artifact = artifact
        self._provider = provider
        self._batcher = batcher
        self._metrics = metrics
        self._settings = settings
        self._streams: set[_Stream] = set()

    def handler(self, edge: Edge) -> "grpc.GenericRpcHandler[bytes, bytes]":
        """The service's methods, for ``grpc.aio.Server.add_generic_rpc_handlers``."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Classify": edge.unary("Classify", pb.ClassifyRequest, self.classify),
                "ClassifyStream": edge.stream("ClassifyStream", self.classify_stream),
                "GetModel": edge.unary("GetModel", pb.GetModelRequest, self.get_model),
            },
        )

    async def classify(self, request: pb.ClassifyRequest, patient: bool = False) -> pb.ClassifyResponse:
        """Raises InvalidRequest, TooLarge, UnknownModel, and what Batcher.submit raises; patient as there."""
        self._check_model(request.model_name, request.model_version)
        limit = self._settings.max_images_per_request
        if not request.images:
            raise InvalidRequest(f"images: none; expected 1 to {limit}")
        if len(request.images) > limit:
            raise TooLarge(f"images: {len(request.images)}; the limit is {limit} a request (max_images_per_request)")
        return self._encode(await self._batcher.submit(await self._decode(request), patient))

    async def classify_stream(self, messages: AsyncIterator[bytes]) -> AsyncIterator[pb.ClassifyStreamResponse]:
        """Answer in order while later requests are already read and computed, up to a window of images."""
        pending: asyncio.Queue[tuple[asyncio.Task[pb.ClassifyStreamResponse], int] | None] = asyncio.Queue()
        window = _Window(self._settings.stream_window)
        tasks: set[asyncio.Task[pb.ClassifyStreamResponse]] = set()

        async def read() -> None:
            try:
                async for data in messages:
                    item = self._parse_item(data)
                    # Counted as one at least, so that not even wrong requests can pile up without bound.
                    images = max(1, len(item.request.images)) if isinstance(item, pb.ClassifyStreamRequest) else 1
                    await window.enter(images)
                    task = asyncio.create_task(self._answer_item(item))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    pending.put_nowait((task, images))
            finally:
                pending.put_nowait(None)

        reader = asyncio.create_task(read())
        stream = _Stream(window, reader)
        self._streams.add(stream)
        try:
            while (entry := await pending.get()) is not None:
                task, images = entry
                yield await task
                window.leave(images)
            if stream.ended:
                raise Draining
            await reader  # raises what reading raised
        finally:
            self._streams.discard(stream)
            reader.cancel()
            for task in tuple(tasks):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):  # what reading ran into no longer matters
                await reader

    def end_idle_streams(self) -> None:
        """End the streams that had nothing under way at this call and at the one before."""
        for stream in self._streams:
            if stream.window.inside == 0 and stream.was_idle:
                stream.ended = True
                stream.reader.cancel()
            stream.was_idle = stream.window.inside == 0

    async def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """Raises UnknownModel."""
        self._check_model(request.model_name, request.model_version)
        artifact = self._artifact
        channels, height, width = artifact.image_shape
        figures = artifact.variants[self._settings.precision]
        return pb.GetModelResponse(
            model_name=artifact.name,
            model_version=artifact.version,
            labels=artifact.labels,
            image_channels=channels,
            image_height=height,
            image_width=width,
            pose_size=artifact.pose_size,
            max_images_per_request=self._settings.max_images_per_request,
            max_request_bytes=self._settings.max_request_bytes,
            execution_provider=self._provider,
            sha256=artifact.sha256(self._settings.precision),
            precision=self._settings.precision,
            dataset=artifact.training["dataset"],
            test_errors=figures["test_errors"],
            test_images=figures["test_images"],
        )

    def _check_model(self, name: str, version: str) -> None:
        served = self._artifact
        if (name and name != served.name) or (version and version != served.version):
            # Cut short, since the text of an error goes out as a header, whose size is limited.
            wanted = f"{(name or served.name)[:64]!r} version {(version or served.version)[:64]!r}"
            raise UnknownModel(
                f"model_name, model_version: {wanted} is not served; {served.name} version {served.version} is"
            )

    async def _decode(self, request: pb.ClassifyRequest) -> NDArray[np.uint8]:
        """The request's images as one array (n, C, H, W)."""
        if any(image.WhichOneof("content") == "encoded" for image in request.images):
            # Decompression takes long enough to hold up other requests.
            return await asyncio.to_thread(self._stack, request)
        return self._stack(request)

    def _stack(self, request: pb.ClassifyRequest) -> NDArray[np.uint8]:
        shape = self._artifact.image_shape
        images = []
        for index, image in enumerate(request.images):
            match image.WhichOneof("content"):
                case "pixels":
                    images.append(from_pixels(image.pixels, shape, f"images[{index}].pixels"))
                case "encoded":
                    images.append(from_encoded(image.encoded, shape, f"images[{index}].encoded"))
                case _:
                    raise InvalidRequest(f"images[{index}]: has no content; expected pixels or encoded")
        return np.stack(images)

    def _encode(self, prediction: Prediction) -> pb.ClassifyResponse:
        labels = self._artifact.labels
        response = pb.ClassifyResponse(model_name=self._artifact.name, model_version=self._artifact.version)
        winners = prediction.probabilities.argmax(1).tolist()
        rows = zip(winners, prediction.probabilities.tolist(), prediction.poses.tolist(), strict=True)
        for winner, probabilities, poses in rows:
            result = response.results.add(label=labels[winner], class_index=winner)
            for label, probability, pose in zip(labels, probabilities, poses, strict=True):
                result.capsules.add(label=label, probability=probability, pose=pose)
        return response

    def _parse_item(self, data: bytes) -> pb.ClassifyStreamRequest | Exception:
        try:
            return parse(data, pb.ClassifyStreamRequest, self._settings.max_request_bytes)
        except Exception as error:
            return error

    async def _answer_item(self, item: pb.ClassifyStreamRequest | Exception) -> pb.ClassifyStreamResponse:
        """One answer of a stream. An error is an answer here, so that the rest of the stream goes on."""
        identifier = ""
        try:
            if isinstance(item, Exception):
                raise item
            identifier = item.id
            return pb.ClassifyStreamResponse(id=identifier, response=await self.classify(item.request, patient=True))
        except Exception as error:
            code, text = to_status(error)
            self._metrics.stream_errors.labels(code.name).inc()
            return pb.ClassifyStreamResponse(id=identifier, error=pb.Error(code=code.value[0], message=text))


class _Window:
    """How many images of one stream may be under way; a request larger than the window enters when it is empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.inside = 0
        self._left = asyncio.Event()

    async def enter(self, images: int) -> None:
        while self.inside and self.inside + images > self._size:
            self._left.clear()
            await self._left.wait()
        self.inside += images

    def leave(self, images: int) -> None:
        self.inside -= images
        self._left.set()


@dataclass(eq=False)
class _Stream:
    """A stream under way, for the end of the server."""

    window: _Window
    reader: "asyncio.Task[None]"
    was_idle: bool = False
    ended: bool = False
