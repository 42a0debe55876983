"""The writer of ExplainResponse, as bytes: an explanation may have tens of thousands of numbers.

Axes: R iterations, J classes, I primary capsules, Q explained classes.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.repository.further_graph import AGREEMENTS, CONTRIBUTIONS, COUPLINGS, PRIMARY_LENGTHS
from serving.runtime import Array
from serving.services.capsnet_codec import AnswerWriter
from serving.services.model_messages import primary_capsules
from serving.services.protobuf_wire import VARINT, delimited, tag, varint

_Explanation, _Class, _Iteration, _Map = pb.Explanation, pb.ClassExplanation, pb.RoutingIteration, pb.Map


class ExplanationWriter:
    """The writer of the explanations of one version of a model."""

    def __init__(self, artifact: Artifact, write: AnswerWriter) -> None:
        """Prepare a writer. write: the writer of the same version's classifications."""
        self._write = write
        self._labels = [label.encode() for label in artifact.labels]
        response = pb.ExplainResponse(model_name=artifact.name, model_version=artifact.version)
        self._begin = response.SerializeToString()
        self._end = pb.ExplainResponse(primary_capsules=primary_capsules(artifact)).SerializeToString()

    def response(self, explanations: Iterable[bytes]) -> bytes:
        """Return the ``ExplainResponse`` with explanations."""
        number = pb.ExplainResponse.RESULTS_FIELD_NUMBER
        return b"".join([self._begin, *(delimited(number, one) for one in explanations), self._end])

    def explanation(
        self,
        image: NDArray[np.uint8],
        share: Share,
        classes: Sequence[int],
        parts: frozenset[int],
        relevance: NDArray[np.float32] | None,
    ) -> bytes:
        """Return the ``Explanation`` of one image (C, H, W).

        share: the outputs of ``explain`` for it, with its findings. relevance: (Q, H, W), or None.
        """
        routing = pb.EXPLANATION_PART_ROUTING in parts
        fields = [
            self._write.field(_Explanation.CLASSIFICATION_FIELD_NUMBER, share),
            _floats(_Explanation.PRIMARY_LENGTHS_FIELD_NUMBER, share[PRIMARY_LENGTHS][0]),
        ]
        if routing:
            fields.append(_floats(_Explanation.ENTROPIES_FIELD_NUMBER, entropies(share[COUPLINGS][0])))
        for place, index in enumerate(classes):
            content = delimited(_Class.LABEL_FIELD_NUMBER, self._labels[index])
            if index:
                content += tag(_Class.CLASS_INDEX_FIELD_NUMBER, VARINT) + varint(index)
            if routing:
                content += _iterations(share[COUPLINGS][0, :, index], share[AGREEMENTS][0, :, index])
            if pb.EXPLANATION_PART_CONTRIBUTIONS in parts:
                content += _floats(_Class.CONTRIBUTIONS_FIELD_NUMBER, share[CONTRIBUTIONS][0, index])
            if relevance is not None:
                content += delimited(_Class.RELEVANCE_FIELD_NUMBER, _map(relevance[place]))
            fields.append(delimited(_Explanation.CLASSES_FIELD_NUMBER, content))
        fields.append(delimited(_Explanation.PIXELS_FIELD_NUMBER, image.tobytes()))
        return b"".join(fields)


def entropies(couplings: Array) -> NDArray[np.float64]:
    """Return the mean entropy of the primary capsules' couplings by iteration, (R,): 1 for equal ones.

    couplings: (R, J, I). Those of a primary capsule count as shares of their sum. 0 with a single class.
    """
    classes = couplings.shape[1]
    if classes == 1:
        return np.zeros(len(couplings))
    numbers = np.asarray(couplings, np.float64)
    sums = numbers.sum(1, keepdims=True)
    shares = numbers / np.where(sums > 0, sums, 1)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    result: NDArray[np.float64] = -(shares * logarithms).sum(1).mean(-1) / math.log(classes)
    return result


def _iterations(couplings: Array, agreements: Array) -> bytes:
    """Return the fields of a class's iterations. couplings, agreements: (R, I)."""
    return b"".join(
        [
            delimited(
                _Class.ITERATIONS_FIELD_NUMBER,
                _floats(_Iteration.COUPLINGS_FIELD_NUMBER, shares)
                + _floats(_Iteration.AGREEMENTS_FIELD_NUMBER, agreed),
            )
            for shares, agreed in zip(couplings, agreements, strict=True)
        ]
    )


def _map(numbers: NDArray[np.float32]) -> bytes:
    """Return the ``Map`` of numbers (H, W)."""
    height, width = numbers.shape
    size = pb.Map(height=height, width=width).SerializeToString()
    return size + _floats(_Map.VALUES_FIELD_NUMBER, numbers)


def _floats(number: int, values: Array) -> bytes:
    """Return a field of floats."""
    return delimited(number, np.asarray(values, "<f4").tobytes())
