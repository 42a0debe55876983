"""Explain: the way of poses through the network, and the relevance of pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.files.occlusion import Masked, Occlusion, ground_of
from serving.metrics.registry import CLASSIFY
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, check_size, parse
from serving.services.capsnet_codec import CapsNetCodec
from serving.services.computation import Caller, Computation
from serving.services.decoding import Decoding, Steps, in_one_step
from serving.services.encoded_images import Images
from serving.services.explanations_codec import ExplanationWriter
from serving.services.given_images import GivenImages, Limit
from serving.services.graphs import EXPLAIN, check_explains
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import check_fields, fields_of, max_fields
from serving.settings import Settings

_PARTS = pb.EXPLANATION_PART_ROUTING, pb.EXPLANATION_PART_CONTRIBUTIONS, pb.EXPLANATION_PART_RELEVANCE
_FIELDS = fields_of(pb.ExplainRequest)
# The memory for writing explanations, by that of the outputs.
_COPIES = 4

Maps = NDArray[np.float32]


class _PreparedModel(NamedTuple):
    """The objects that explanations of one version of a model need."""

    codec: CapsNetCodec
    writer: ExplanationWriter
    occlusion: Occlusion


class Explanations:
    """The method Explain."""

    def __init__(self, pipeline: Pipeline, settings: Settings, codecs: PerModel[CapsNetCodec]) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._codecs = codecs
        self._prepared = PerModel(self._prepare)

    async def explain(self, data: bytes, call: Call) -> bytes:
        """Answer an ExplainRequest with an ExplainResponse. Raises as ``answer``."""
        settings = self._settings
        check_size(data, settings.max_request_bytes)
        check_fields(data, max_fields(settings.max_explained_images), _FIELDS)
        request = parse(data, pb.ExplainRequest, settings.max_request_bytes)
        del data  # which would double the request's memory until the answer
        return await self.answer(request, call)

    async def answer(self, request: pb.ExplainRequest, caller: Caller) -> bytes:
        """Return the bytes of an ExplainResponse.

        Raises InvalidRequest, UnknownModel, Unsupported, and as Computation.run.
        """
        settings = self._settings
        few = settings.max_explained_images < settings.max_images_per_request
        limit: Limit = "max_explained_images" if few else "max_images_per_request"
        given = GivenImages(request.images, settings, limit)
        with self._pipeline.computation(request.model_name, request.model_version, caller) as computation:
            model = computation.model
            check_explains(model.artifact)
            classes = check_classes(request.classes, len(model.artifact.labels))
            parts = self._check_parts(request.parts, model)
            images = await given.decode_for(computation)
            return await self._explain(computation, images, classes, parts)

    async def _explain(
        self, computation: Computation, images: Images, classes: list[int], parts: frozenset[int]
    ) -> bytes:
        codec, writer, occlusion = self._prepared(computation.model)
        share = await computation.run(EXPLAIN, {IMAGES: images})
        outputs = {name: share[name] for name in share.batch}
        if codec.findings:
            outputs |= codec.findings(images, outputs[PROBABILITIES])
        chosen = [classes or [int(lengths.argmax())] for lengths in outputs[PROBABILITIES]]
        maps: list[Maps | None] = [None] * len(images)
        if pb.EXPLANATION_PART_RELEVANCE in parts:
            for index, image in enumerate(images):
                maps[index] = await relevance_of(computation, occlusion, image, chosen[index], "parts")

        def write() -> Steps:
            """Write one explanation after the other, by the number of its image."""
            written: dict[str, NDArray[np.uint8]] = {}
            for index, image in enumerate(images):
                found = Share(outputs, index, index + 1)
                explanation = writer.explanation(image, found, chosen[index], parts, maps[index])
                written[str(index)] = np.frombuffer(explanation, np.uint8)
                yield
            return written

        # In a thread: it takes milliseconds, and the event loop would write the explanations of a crowd at once.
        memory = _COPIES * sum(output.nbytes for output in outputs.values())
        explanations = await computation.decode(Decoding(write(), memory, "parts"))
        return writer.response([explanation.tobytes() for explanation in explanations.values()])

    def _check_parts(self, parts: Sequence[int], model: ServedModel) -> frozenset[int]:
        """Return the parts to answer. Raises InvalidRequest."""
        if len(parts) > len(_PARTS):  # a body of JSON may have a million
            raise InvalidRequest("parts", f"{len(parts)}; expected {len(_PARTS)} at most")
        for index, part in enumerate(parts):
            if part not in _PARTS:
                raise InvalidRequest(f"parts[{index}]", f"{part}; expected {_PARTS[0]} to {_PARTS[-1]}")
        chosen = frozenset(parts or _PARTS)
        if pb.EXPLANATION_PART_RELEVANCE in chosen:
            check_relevance(self._prepared(model).occlusion, self._settings, "parts")
        return chosen

    def _prepare(self, model: ServedModel) -> _PreparedModel:
        codec = self._codecs(model)
        _, height, width = model.artifact.image_shape
        return _PreparedModel(codec, ExplanationWriter(model.artifact, codec.write), Occlusion(height, width))


async def relevance_of(
    computation: Computation, occlusion: Occlusion, image: Images, classes: Sequence[int], field: str
) -> Maps:
    """Return the relevance of an image's pixels for classes, (Q, H, W).

    field: the request's field, for errors. Raises as Computation.decode and Computation.run.
    """
    ground = ground_of(image, computation.model.artifact.preparation.polarity)
    masked: Masked | None = None

    def mask() -> dict[str, Images]:
        nonlocal masked
        masked = occlusion.masked(image, ground)
        return {IMAGES: masked.images}

    decoding = Decoding(in_one_step(mask), occlusion.max_images * image.nbytes, field)
    arrays = await computation.decode(decoding)
    assert masked is not None
    share = await computation.run(CLASSIFY, arrays, probe=True)
    return occlusion.relevance(np.asarray(share[POSES], np.float32), masked.places, list(classes))


def check_relevance(occlusion: Occlusion, settings: Settings, field: str) -> None:
    """Raise InvalidRequest if the queue cannot hold the images of a relevance map. field: the request's field."""
    needed, limit = occlusion.max_images, settings.max_queue
    if needed > limit:
        raise InvalidRequest(
            field, f"the relevance takes {needed} images at once; the queue holds only {limit} (max_queue)"
        )


def check_classes(classes: Sequence[int], count: int) -> list[int]:
    """Return the indices of classes that a request names. Raises InvalidRequest if one is unknown or named twice."""
    known: set[int] = set()
    for place, index in enumerate(classes):
        if index >= count:
            raise InvalidRequest(f"classes[{place}]", f"{index}; expected 0 to {count - 1}")
        if index in known:
            raise InvalidRequest(f"classes[{place}]", f"{index} a second time; expected each class once")
        known.add(index)
    return list(classes)
