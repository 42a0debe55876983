"""``capsnet.v1.CapsNetService``, as a translation onto the pipeline."""

import math
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import grpc
import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.batching.batcher import Images
from serving.errors import InvalidRequest
from serving.files.images import from_encoded, from_pixels
from serving.metrics.registry import Metrics
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge, check_size, parse
from serving.runtime import Answer
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import delimited
from serving.settings import Settings
from serving.transport.methods import Method, table

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name
_RESPONSE = pb.ClassifyStreamResponse.RESPONSE_FIELD_NUMBER
_ID = pb.ClassifyStreamResponse.ID_FIELD_NUMBER


class CapsNetService:
    """The project's own service."""

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics, settings: Settings) -> None:
        self._pipeline = pipeline
        self._edge = edge
        self.settings = settings
        self._stream_errors = {
            code: metrics.stream_errors.labels("bidi_stream", SERVICE, "ClassifyStream", code.name)
            for code in grpc.StatusCode
        }

    def methods(self) -> dict[str, Method]:
        """Return the service's part of the method table."""
        edge = self._edge
        return table(
            SERVICE,
            {
                "Classify": edge.unary_at_once(
                    SERVICE, "Classify", self.classify, partial(self._pipeline.refusal, urgent=False)
                ),
                "ClassifyStream": edge.stream(SERVICE, "ClassifyStream", self.classify_stream),
                "GetModel": edge.unary(SERVICE, "GetModel", self.get_model),
            },
        )

    def classify(self, data: bytes, call: Call) -> None:
        """A ClassifyRequest's bytes to a ClassifyResponse's. Raises InvalidRequest and UnknownModel."""
        limit = self.settings.max_request_bytes
        check_size(data, limit)
        model = self._pipeline.repository.default
        if model and (images := model.pixels.read(data)) is not None:
            self._pipeline.begin(_Pixels(images), call)
        else:
            self._pipeline.begin(_Request(parse(data, pb.ClassifyRequest, limit), self.settings), call)

    def classify_stream(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """ClassifyStreamRequests' bytes to ClassifyStreamResponses'."""
        return self._pipeline.answer_stream(messages, self._open, call)

    async def get_model(self, data: bytes, call: Call) -> bytes:
        """A GetModelRequest's bytes to a GetModelResponse's."""
        request = parse(data, pb.GetModelRequest, self.settings.max_request_bytes)
        model = self._pipeline.repository.get(request.model_name, request.model_version)
        artifact, settings, plan = model.artifact, self.settings, model.plan
        channels, height, width = artifact.image_shape
        figures = artifact.variants[settings.precision]
        response = pb.GetModelResponse(
            model_name=artifact.name,
            model_version=artifact.version,
            labels=artifact.labels,
            image_channels=channels,
            image_height=height,
            image_width=width,
            pose_size=artifact.pose_size,
            max_images_per_request=settings.max_images_per_request,
            max_request_bytes=settings.max_request_bytes,
            execution_provider=model.runtime.provider,
            sha256=artifact.sha256(settings.precision),
            precision=settings.precision,
            dataset=artifact.training["dataset"],
            test_errors=figures["test_errors"],
            test_images=figures["test_images"],
            tuning=pb.Tuning(
                threads=plan.threads,
                runtimes=plan.runtimes,
                max_batch=plan.max_batch,
                image_seconds=model.cost.per_image,
                batch_seconds=model.cost.per_batch,
                compared=[pb.Timing(**timing._asdict()) for timing in model.tuned.compared],
            ),
        )
        return response.SerializeToString()

    def _open(self, data: bytes) -> "_StreamItem":
        """Never raises: an item that cannot be read holds the error."""
        limit = self.settings.max_request_bytes
        try:
            check_size(data, limit)
            model = self._pipeline.repository.default
            if model and (read := model.pixels.read_of_stream(data)):
                identifier, images = read
                return _StreamItem(self, identifier, _Pixels(images))
            message = parse(data, pb.ClassifyStreamRequest, limit)
        except InvalidRequest as error:
            return _StreamItem(self, "", _Request(pb.ClassifyRequest(), self.settings), error)
        return _StreamItem(self, message.id, _Request(message.request, self.settings))

    def refusal(self, error: Exception, call: Call, seconds: float) -> pb.Error:
        """What a stream's client is told in place of an answer."""
        code, text = self._edge.to_status(error)
        call.refused(seconds, code, text)
        self._stream_errors[code].inc()
        return pb.Error(code=code.value[0], message=text)


class _Item:
    """A request in this protocol, which says nothing of when, or how urgently, it is to be answered."""

    timeout: float | None = None
    urgent = False

    def encode(self, model: ServedModel, prediction: Answer) -> bytes:
        return model.write_answer(prediction)


class _Pixels(_Item):
    """A request of raw pixels for the default model."""

    model_name = model_version = ""
    slow = False

    def __init__(self, images: Images) -> None:
        self.images = len(images)
        self._images = images

    def decode(self, model: ServedModel) -> Images:
        shape = model.artifact.image_shape
        if self._images.shape[1:] == shape:
            return self._images
        # The default model has become another meanwhile.
        return np.stack([from_pixels(one.tobytes(), shape, _field(index)) for index, one in enumerate(self._images)])


class _Request(_Item):
    """Any ClassifyRequest."""

    def __init__(self, request: pb.ClassifyRequest, settings: Settings) -> None:
        self.model_name = request.model_name
        self.model_version = request.model_version
        self._request = request
        self._settings = settings
        self.images = len(request.images)
        self.slow = any(image.encoded for image in request.images)

    def decode(self, model: ServedModel) -> Images:
        limit, shape = self._settings.max_images_per_request, model.artifact.image_shape
        if not 1 <= self.images <= limit:
            raise InvalidRequest("images", f"{self.images}; expected 1 to {limit} (max_images_per_request)")
        pixels = [image.pixels for image in self._request.images]
        if set(map(len, pixels)) == {math.prod(shape)}:  # for many of which one step takes far less than one for each
            return np.frombuffer(b"".join(pixels), np.uint8).reshape(self.images, *shape)
        images = []
        for index, image in enumerate(self._request.images):
            match image.WhichOneof("content"):
                case "pixels":
                    images.append(from_pixels(image.pixels, shape, _field(index)))
                case "encoded":
                    images.append(from_encoded(image.encoded, shape, f"images[{index}].encoded"))
                case _:
                    raise InvalidRequest(f"images[{index}]", "has no content; expected pixels or encoded")
        return np.stack(images)


def _field(index: int) -> str:
    """The name of the field with an image's pixels."""
    return f"images[{index}].pixels"


class _StreamItem(_Item):
    """A ClassifyStreamRequest: a request and its id; error: why it could not be parsed."""

    def __init__(
        self, service: CapsNetService, identifier: str, request: _Pixels | _Request, error: InvalidRequest | None = None
    ) -> None:
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.images = request.images
        self.slow = request.slow
        self.decode = request.decode
        self._service = service
        self._id = identifier
        self.error: Exception | None = error

    def encode(self, model: ServedModel, prediction: Answer) -> bytes:
        identifier = delimited(_ID, self._id.encode()) if self._id else b""
        return identifier + delimited(_RESPONSE, super().encode(model, prediction))

    def encode_error(self, error: Exception, call: Call, seconds: float) -> bytes:
        refusal = self._service.refusal(error, call, seconds)
        return pb.ClassifyStreamResponse(id=self._id, error=refusal).SerializeToString()
