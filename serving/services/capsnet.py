"""``capsnet.v1.CapsNetService``: its messages to queries for the pipeline, and the description of a model."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial

import grpc
import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.classifier import IMAGES
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge, check_size, parse
from serving.runtime import Arrays
from serving.services.capsnet_codec import CapsNetCodec
from serving.services.decoding import Decoding, Steps, in_one_step
from serving.services.encoded_images import Images, from_pixels
from serving.services.image_messages import ImageReader, check_unprepared
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import FLAT, Fields, check_fields, delimited
from serving.services.stream import StreamRefusals
from serving.settings import Settings
from serving.transport.methods import Method, table

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name
_RESPONSE = pb.ClassifyStreamResponse.RESPONSE_FIELD_NUMBER
# The most fields besides the images. Up to twice the allowed images get the answer that names the limit.
_MAX_OTHER_FIELDS = 1024
_ID = pb.ClassifyStreamResponse.ID_FIELD_NUMBER
_STREAMED_FIELDS = Fields({pb.ClassifyStreamRequest.REQUEST_FIELD_NUMBER: FLAT})


class CapsNetService:
    """The project's own service: classification, and the description of a model."""

    #: The graphs of each model that the service needs.
    GRAPHS = (CLASSIFY,)

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics, settings: Settings) -> None:
        self._pipeline = pipeline
        self._edge = edge
        self._settings = settings
        self._max_fields = 2 * settings.max_images_per_request + _MAX_OTHER_FIELDS
        self._codecs = PerModel(lambda model: CapsNetCodec(model.artifact, settings.max_images_per_request))
        self._refuse = StreamRefusals(edge, metrics, SERVICE, "ClassifyStream")

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
        """Answer a ClassifyRequest with a ClassifyResponse. Raises InvalidRequest and UnknownModel."""
        limit = self._settings.max_request_bytes
        check_size(data, limit)
        model = self._pipeline.repository.default
        query: _Pixels | _Message
        if model and (images := (codec := self._codecs(model)).pixels.read(data)) is not None:
            query = _Pixels(images, codec, self._codecs)
        else:
            check_fields(data, self._max_fields)
            query = _Message(parse(data, pb.ClassifyRequest, limit), self._settings, self._codecs)
        self._pipeline.begin(query, call)

    def classify_stream(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """Answer ClassifyStreamRequests with ClassifyStreamResponses."""
        return self._pipeline.answer_stream(messages, self._parse_streamed, call, self._refuse)

    async def get_model(self, data: bytes, call: Call) -> bytes:
        """Answer a GetModelRequest with a GetModelResponse. Raises InvalidRequest and UnknownModel."""
        request = parse(data, pb.GetModelRequest, self._settings.max_request_bytes)
        model = self._pipeline.repository.get(request.model_name, request.model_version)
        return _description(model, self._settings).SerializeToString()

    def _parse_streamed(self, data: bytes) -> "_Streamed":
        limit = self._settings.max_request_bytes
        try:
            check_size(data, limit)
            model = self._pipeline.repository.default
            if model and (read := (codec := self._codecs(model)).pixels.read_of_stream(data)):
                identifier, images = read
                return _Streamed(identifier, _Pixels(images, codec, self._codecs))
            check_fields(data, self._max_fields, _STREAMED_FIELDS)
            message = parse(data, pb.ClassifyStreamRequest, limit)
        except InvalidRequest as error:
            nothing = _Message(pb.ClassifyRequest(), self._settings, self._codecs)
            return _Streamed("", nothing, error)
        return _Streamed(message.id, _Message(message.request, self._settings, self._codecs))


class _ClassifyQuery:
    """A request in this protocol. It has neither a timeout nor a priority of its own."""

    graph = CLASSIFY
    timeout: float | None = None
    urgent = False
    _codec: CapsNetCodec

    def encode(self, model: ServedModel, share: Share) -> bytes:
        return self._codec.write(share)


class _Pixels(_ClassifyQuery):
    """A request of raw pixels for the default model."""

    model_name = model_version = ""
    slow = False

    def __init__(self, images: Images, codec: CapsNetCodec, codecs: PerModel[CapsNetCodec]) -> None:
        """Prepare a request. codec: of the present default model."""
        self.size = len(images)
        self._images = images
        self._codec = codec
        self._codecs = codecs

    def decode(self, model: ServedModel) -> Arrays:
        if model.artifact is not self._codec.artifact:  # the default model has changed meanwhile
            self._codec, shape = self._codecs(model), model.artifact.image_shape
            images = [from_pixels(one.tobytes(), shape, _field(index)) for index, one in enumerate(self._images)]
            return {IMAGES: np.stack(images)}
        return {IMAGES: self._images}

    def decode_slowly(self, model: ServedModel) -> Decoding:
        return Decoding(in_one_step(lambda: self.decode(model)), 0, "images")


class _Message(_ClassifyQuery):
    """A ClassifyRequest of any kind."""

    def __init__(self, request: pb.ClassifyRequest, settings: Settings, codecs: PerModel[CapsNetCodec]) -> None:
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.size = len(request.images)
        # Too many images are not read: a small message may hold millions.
        self.slow = self.size <= settings.max_images_per_request and any(image.encoded for image in request.images)
        self._request = request
        self._settings = settings
        self._codecs = codecs

    def decode(self, model: ServedModel) -> Arrays:
        shape = model.artifact.image_shape
        given = self._take_images(model)
        pixels = [image.pixels for image in given]
        if set(map(len, pixels)) == {math.prod(shape)}:  # all in one step, in place of one for each
            for index, image in enumerate(given):
                check_unprepared(image, f"images[{index}]")
            return {IMAGES: np.frombuffer(b"".join(pixels), np.uint8).reshape(self.size, *shape)}
        reader = ImageReader(model.artifact, self._settings)
        return {IMAGES: np.stack([reader.read(image, f"images[{index}]") for index, image in enumerate(given)])}

    def decode_slowly(self, model: ServedModel) -> Decoding:
        reader = ImageReader(model.artifact, self._settings)
        given = self._take_images(model)
        return Decoding(self._steps(given, reader), reader.decoding_bytes(given), "images", self.size)

    def _take_images(self, model: ServedModel) -> Sequence[pb.Image]:
        """Return the images. Raises InvalidRequest if there are none or too many."""
        self._codec = self._codecs(model)
        limit = self._settings.max_images_per_request
        if not 1 <= self.size <= limit:
            raise InvalidRequest("images", f"{self.size}; expected 1 to {limit} (max_images_per_request)")
        given = self._request.images
        del self._request  # an image's file may be a thousand times as large as its pixels, and is not needed now
        return given

    def _steps(self, given: Sequence[pb.Image], reader: ImageReader) -> Steps:
        """Decode the images one after the other."""
        images = np.empty((self.size, *reader.shape), np.uint8)
        for index, image in enumerate(given):
            images[index] = reader.read(image, f"images[{index}]")
            yield
        return {IMAGES: images}


class _Streamed:
    """A ClassifyStreamRequest: a query, and the id of its answer. error: the error of parsing, or None."""

    graph = CLASSIFY
    timeout: float | None = None
    urgent = False

    def __init__(self, identifier: str, query: _Pixels | _Message, error: InvalidRequest | None = None) -> None:
        self.model_name = query.model_name
        self.model_version = query.model_version
        self.size = query.size
        self.slow = query.slow
        self.decode = query.decode
        self.decode_slowly = query.decode_slowly
        self.error: Exception | None = error
        self._query = query
        self._id = identifier

    def encode(self, model: ServedModel, share: Share) -> bytes:
        identifier = delimited(_ID, self._id.encode()) if self._id else b""
        return identifier + delimited(_RESPONSE, self._query.encode(model, share))

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        error = pb.Error(code=code.value[0], message=text)
        return pb.ClassifyStreamResponse(id=self._id, error=error).SerializeToString()


def _field(index: int) -> str:
    """Return the name of the field with an image's pixels."""
    return f"images[{index}].pixels"


def _description(model: ServedModel, settings: Settings) -> pb.GetModelResponse:
    artifact, classify = model.artifact, model.classify
    channels, height, width = artifact.image_shape
    variant, plan = artifact.variant(settings.precision), classify.plan
    return pb.GetModelResponse(
        model_name=artifact.name,
        model_version=artifact.version,
        labels=artifact.labels,
        image_channels=channels,
        image_height=height,
        image_width=width,
        pose_size=artifact.pose_size,
        max_images_per_request=settings.max_images_per_request,
        max_request_bytes=settings.max_request_bytes,
        execution_provider=classify.runtime.provider,
        sha256=artifact.sha256(settings.precision),
        precision=settings.precision,
        dataset=artifact.training.dataset,
        test_errors=variant.test_errors,
        test_images=variant.test_images,
        tuning=pb.Tuning(
            threads=plan.threads,
            runtimes=plan.runtimes,
            max_batch=plan.max_batch,
            image_seconds=classify.cost.per_image,
            batch_seconds=classify.cost.per_batch,
            compared=[pb.Timing(**timing._asdict()) for timing in classify.tuned.compared],
        ),
    )
