"""ModelInferRequests as queries for the pipeline."""

from typing import NamedTuple

import grpc
import numpy as np

from protos.inference import inference_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.metrics.registry import CLASSIFY
from serving.repository.classifier import IMAGES
from serving.repository.served_model import ServedModel
from serving.rpc.edge import check_id
from serving.runtime import Arrays
from serving.services.computation import Computation
from serving.services.computed import ComputedQuery, ComputedStreamQuery
from serving.services.decoding import Decoding
from serving.services.infer_outputs import COMPUTED, FurtherOutputs
from serving.services.infer_parameters import schedule
from serving.services.open_inference_codec import TensorMessages, refused
from serving.services.per_model import PerModel
from serving.services.tensor_inputs import BYTES, UINT8, Received, TensorReader
from serving.settings import Settings

# From this size on, a request whose pixels are not in bytes is decoded in a thread.
_SLOW_BYTES = 16384


class InferCodec(NamedTuple):
    """The readers and writers of one version of a model."""

    inputs: TensorReader
    messages: TensorMessages
    further: FurtherOutputs

    @classmethod
    def of(cls, artifact: Artifact, settings: Settings) -> "InferCodec":
        """Prepare the codec of a version."""
        return cls(TensorReader(artifact, settings), TensorMessages(artifact), FurtherOutputs(artifact, settings))


Codecs = PerModel[InferCodec]


def infer_query(received: Received, size: int, codecs: Codecs) -> "InferQuery | ComputedInferQuery":
    """Return the query of a ModelInferRequest of ``size`` bytes. Raises InvalidRequest."""
    kind = ComputedInferQuery if _is_computed(received) else InferQuery
    return kind(received, size, codecs)


def streamed_infer_query(
    received: Received, size: int, codecs: Codecs
) -> "StreamedInferQuery | StreamedComputedInferQuery":
    """Return the query of such a request of a stream, which has the error of an invalid one."""
    if not _is_computed(received):
        return StreamedInferQuery(received, size, codecs)
    try:
        return StreamedComputedInferQuery(received, size, codecs)
    except InvalidRequest as error:
        return StreamedInferQuery(received, size, codecs, error.alone())


def _is_computed(received: Received) -> bool:
    """Return True if a request chooses outputs that take more than the classifying graph."""
    outputs = received.message.outputs
    return bool(outputs) and any(output.name in COMPUTED for output in outputs)


def _weight(request: pb.ModelInferRequest, size: int) -> tuple[int, bool]:
    """Return the number of images that a request of ``size`` bytes claims, and True if a thread must decode them."""
    if not (inputs := request.inputs):
        return 0, False
    tensor = inputs[0]
    shape, datatype = tensor.shape, tensor.datatype
    slow = datatype == BYTES or (size >= _SLOW_BYTES and (datatype != UINT8 or not request.raw_input_contents))
    return shape[0] if shape else 0, slow


class _Query:
    """A ModelInferRequest. Raises InvalidRequest."""

    def __init__(self, received: Received, size: int, codecs: Codecs) -> None:
        request = received.message
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.size, self.slow = _weight(request, size)
        self._id = ""
        check_id(request.id)
        self._id = request.id
        self._received = received
        self._codecs = codecs
        self.timeout, self.urgent = schedule(request.parameters)

    def _take(self, model: ServedModel) -> Received:
        """Return the request, and keep its id and its outputs alone. Raises InvalidRequest."""
        self._codec = self._codecs(model)
        received = self._received
        del self._received
        self._wanted = self._codec.messages.wanted(received.message)
        return received

    def _encode(self, share: Share) -> bytes:
        """Return the answer's bytes. Called after ``_take``."""
        return self._codec.messages.encode(self._id, self._wanted, share)


class _Streamed(_Query):
    """A ModelInferRequest of a stream."""

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        return refused(self._id, text)

    def _encode(self, share: Share) -> bytes:
        return self._codec.messages.encode_for_stream(self._id, self._wanted, share)


class InferQuery(_Query):
    """A ModelInferRequest for the classifying graph. Raises InvalidRequest."""

    graph = CLASSIFY

    def decode(self, model: ServedModel) -> Arrays:
        received = self._take(model)
        return {IMAGES: self._codec.inputs.images(received)}

    def decode_slowly(self, model: ServedModel) -> Decoding:
        received = self._take(model)
        return self._codec.inputs.decoding(received)

    def encode(self, model: ServedModel, share: Share) -> bytes:
        return self._encode(share)


class StreamedInferQuery(_Streamed, InferQuery):
    """Such a request of a stream. error: the error of parsing, or None."""

    def __init__(self, received: Received, size: int, codecs: Codecs, error: InvalidRequest | None = None) -> None:
        self.error: Exception | None = error
        try:
            super().__init__(received, size, codecs)
        except InvalidRequest as wrong:
            self.error = wrong.alone()
            self.size = 0


class ComputedInferQuery(_Query, ComputedQuery):
    """A ModelInferRequest for outputs that take several graphs. Raises InvalidRequest."""

    async def answer(self, computation: Computation) -> bytes:
        received = self._take(computation.model)
        inputs, _, further = self._codec
        chosen = {output.name: output.class_index for output in self._wanted.outputs}
        further.check(chosen, self.size)
        computation.urgent = self.urgent
        computation.limit(self.timeout)
        if self.slow:
            decoding = inputs.decoding(received)
            del received  # while others are decoded, since files may be a thousand times as large as their pixels
            images = np.asarray((await computation.decode(decoding))[IMAGES], np.uint8)
        else:
            images = inputs.images(received)
        return self._encode(await further.compute(computation, images, chosen))


class StreamedComputedInferQuery(_Streamed, ComputedInferQuery, ComputedStreamQuery):
    """Such a request of a stream. Raises InvalidRequest."""
