"""``capsnet.v1.CapsNetService``: its methods, and the messages of classification to queries for the pipeline."""

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import grpc
import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.classifier import IMAGES
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge, check_id, check_size, parse, parse_names
from serving.runtime import Arrays
from serving.services.capsnet_codec import CapsNetCodec
from serving.services.computation import Computation
from serving.services.computed import ComputedQuery, ComputedStreamQuery
from serving.services.decoding import Decoding, in_one_step
from serving.services.drawing import with_errors
from serving.services.encoded_images import Images, from_pixels
from serving.services.explanations import Explanations
from serving.services.given_images import GivenImages
from serving.services.graphs import DECODER, EXPLAIN, check_draws
from serving.services.model_messages import description
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import check_fields, delimited, fields_of, max_fields
from serving.services.reconstructions import Reconstructions
from serving.services.stream import StreamRefusals
from serving.settings import Settings
from serving.transport.methods import Method, table

SERVICE = pb.DESCRIPTOR.services_by_name["CapsNetService"].full_name
#: The names of its methods.
METHODS = tuple(pb.DESCRIPTOR.services_by_name["CapsNetService"].methods_by_name)
_RESPONSE = pb.ClassifyStreamResponse.RESPONSE_FIELD_NUMBER
_ID = pb.ClassifyStreamResponse.ID_FIELD_NUMBER
_FIELDS = fields_of(pb.ClassifyRequest)
_STREAMED_FIELDS = fields_of(pb.ClassifyStreamRequest)


class CapsNetService:
    """The project's own service: classification, explanation, reconstruction, and the description of a model."""

    #: The graphs of each model that the service needs.
    GRAPHS = (CLASSIFY, EXPLAIN, DECODER)

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics, settings: Settings) -> None:
        self._pipeline = pipeline
        self._edge = edge
        self._settings = settings
        self._max_fields = max_fields(settings.max_images_per_request)
        self._codecs = PerModel(lambda model: CapsNetCodec(model.artifact, settings.max_images_per_request))
        self._explanations = Explanations(pipeline, settings, self._codecs)
        self._reconstructions = Reconstructions(pipeline, settings, self._codecs)
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
                "Explain": edge.unary(
                    SERVICE,
                    "Explain",
                    self._explanations.explain,
                    partial(self._pipeline.refusal, urgent=False, graph=EXPLAIN),
                ),
                "Reconstruct": edge.unary(
                    SERVICE,
                    "Reconstruct",
                    self._reconstructions.reconstruct,
                    partial(self._pipeline.refusal, urgent=False, graph=DECODER),
                ),
            },
        )

    def classify(self, data: bytes, call: Call) -> None:
        """Answer a ClassifyRequest with a ClassifyResponse. Raises InvalidRequest and UnknownModel."""
        limit = self._settings.max_request_bytes
        check_size(data, limit)
        model = self._pipeline.repository.default
        query: _Pixels | _Message | _Compared
        if model and (images := (codec := self._codecs(model)).pixels.read(data)) is not None:
            query = _Pixels(images, codec, self._codecs)
        else:
            check_fields(data, self._max_fields, _FIELDS)
            request = parse(data, pb.ClassifyRequest, limit)
            kind = _Compared if request.reconstruction_error else _Message
            query = kind(request, self._settings, self._codecs)
        self._pipeline.begin(query, call)

    def classify_stream(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """Answer ClassifyStreamRequests with ClassifyStreamResponses."""
        return self._pipeline.answer_stream(messages, self._parse_streamed, call, self._refuse)

    async def get_model(self, data: bytes, call: Call) -> bytes:
        """Answer a GetModelRequest with a GetModelResponse. Raises InvalidRequest and UnknownModel."""
        request = parse_names(data, pb.GetModelRequest, self._settings.max_request_bytes)
        model = self._pipeline.repository.get(request.model_name, request.model_version)
        return description(model, self._settings).SerializeToString()

    def _parse_streamed(self, data: bytes) -> "_Streamed | _StreamedCompared":
        limit = self._settings.max_request_bytes
        try:
            check_size(data, limit)
            model = self._pipeline.repository.default
            if model and (read := (codec := self._codecs(model)).pixels.read_of_stream(data)):
                identifier, images = read
                return _Streamed(identifier, _Pixels(images, codec, self._codecs))
            check_fields(data, self._max_fields, _STREAMED_FIELDS)
            message = parse(data, pb.ClassifyStreamRequest, limit)
            check_id(message.id)
        except InvalidRequest as error:
            nothing = _Message(pb.ClassifyRequest(), self._settings, self._codecs)
            return _Streamed("", nothing, error.alone())
        if message.request.reconstruction_error:
            return _StreamedCompared(message.id, _Compared(message.request, self._settings, self._codecs))
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
        self._images = GivenImages(request.images, settings)
        self.size = self._images.size
        self.slow = self._images.slow
        self._codecs = codecs

    def decode(self, model: ServedModel) -> Arrays:
        self._codec = self._codecs(model)
        return self._images.decode(model.artifact)

    def decode_slowly(self, model: ServedModel) -> Decoding:
        self._codec = self._codecs(model)
        return self._images.decode_slowly(model.artifact)


class _Compared(ComputedQuery):
    """A ClassifyRequest that asks for the reconstruction error."""

    def __init__(self, request: pb.ClassifyRequest, settings: Settings, codecs: PerModel[CapsNetCodec]) -> None:
        self.model_name = request.model_name
        self.model_version = request.model_version
        self._images = GivenImages(request.images, settings)
        self.size = self._images.size
        self._codecs = codecs

    async def answer(self, computation: Computation) -> bytes:
        check_draws(computation.model.artifact)
        images = await self._images.decode_for(computation)
        share = await computation.run(CLASSIFY, {IMAGES: images})
        return self._codecs(computation.model).write(await with_errors(computation, images, share))


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
        return _streamed(self._id, self._query.encode(model, share))

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        return _streamed_error(self._id, code, text)


class _StreamedCompared(ComputedStreamQuery):
    """A ClassifyStreamRequest that asks for the reconstruction error: a query, and the id of its answer."""

    def __init__(self, identifier: str, query: _Compared) -> None:
        self.model_name = query.model_name
        self.model_version = query.model_version
        self.size = query.size
        self._query = query
        self._id = identifier

    async def answer(self, computation: Computation) -> bytes:
        return _streamed(self._id, await self._query.answer(computation))

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        return _streamed_error(self._id, code, text)


def _streamed(identifier: str, response: bytes) -> bytes:
    """Return a ClassifyStreamResponse with the bytes of a ClassifyResponse."""
    return (delimited(_ID, identifier.encode()) if identifier else b"") + delimited(_RESPONSE, response)


def _streamed_error(identifier: str, code: grpc.StatusCode, text: str) -> bytes:
    """Return a ClassifyStreamResponse with an error."""
    error = pb.Error(code=code.value[0], message=text)
    return pb.ClassifyStreamResponse(id=identifier, error=error).SerializeToString()


def _field(index: int) -> str:
    """Return the name of the field with an image's pixels."""
    return f"images[{index}].pixels"
