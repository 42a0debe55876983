"""Explanations: their options, and the server's answers with NumPy arrays.

Axes: R iterations of the routing, I primary capsules, C channels, H rows, W columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.errors import InvalidRequest, ServerFault, brief
from serving.client.results import Classification, Model, PrimaryCapsules, decode_results

#: A part of an explanation.
Part = Literal["routing", "contributions", "relevance"]
#: A class: its label, or its index in the model's labels.
Class = str | int

#: The largest index of a class, dimension of a pose, or number of steps: a uint32.
MAX_NUMBER = 2**32 - 1

_PARTS: dict[str, "pb.ExplanationPart"] = {
    "routing": pb.EXPLANATION_PART_ROUTING,
    "contributions": pb.EXPLANATION_PART_CONTRIBUTIONS,
    "relevance": pb.EXPLANATION_PART_RELEVANCE,
}


@dataclass(frozen=True, eq=False, slots=True)
class ClassExplanation:
    """The way of one class's pose through the network. The arrays are float32, read-only, and empty if not asked for.

    couplings: (R, I), the share of each primary capsule's vote that the class gets, from 0 to 1, by iteration.
    agreements: (R, I), the scalar product of each primary capsule's vote with the pose of the iteration.
    contributions: (I,), each primary capsule's vote, multiplied by its coupling in the last iteration, and projected on
        the direction of the pose.
    relevance: (H, W): how much the class's pose, projected on its undisturbed direction, shrinks on average if a patch
        around the pixel becomes the ground. Negative where it grows.
    """

    label: str
    class_index: int
    couplings: NDArray[np.float32] = field(repr=False)
    agreements: NDArray[np.float32] = field(repr=False)
    contributions: NDArray[np.float32] = field(repr=False)
    relevance: NDArray[np.float32] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for ``json.dumps``."""
        return {
            "label": self.label,
            "class_index": self.class_index,
            "couplings": self.couplings.tolist(),
            "agreements": self.agreements.tolist(),
            "contributions": self.contributions.tolist(),
            "relevance": self.relevance.tolist(),
        }


@dataclass(frozen=True, eq=False, slots=True)
class Explanation:
    """The way from one image to its classification. The arrays are read-only.

    primary_capsules: the primary capsules' axes, and their places in the image.
    primary_lengths: (I,) float32, from 0 to 1.
    entropies: (R,) float32, by iteration the mean entropy of the primary capsules' couplings: 1 if each splits its vote
        evenly over all classes, 0 if each votes for one class. Empty if the routing was not asked for.
    classes: the explained classes, in the order of the call; without ``classes``, the winner alone.
    pixels: (C, H, W) uint8, the image as the network saw it, after any preparation.
    """

    classification: Classification
    primary_capsules: PrimaryCapsules
    primary_lengths: NDArray[np.float32] = field(repr=False)
    entropies: NDArray[np.float32] = field(repr=False)
    classes: tuple[ClassExplanation, ...]
    pixels: NDArray[np.uint8] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for ``json.dumps``, without the classification, which has its own."""
        return {
            "primary_capsules": asdict(self.primary_capsules),
            "primary_lengths": self.primary_lengths.tolist(),
            "entropies": self.entropies.tolist(),
            "pixels": self.pixels.tolist(),
            "classes": [one.to_dict() for one in self.classes],
        }


@dataclass(frozen=True)
class ExplanationOptions:
    """The options of a call of ``explain``."""

    classes: tuple[Class, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, classes: Iterable[Class] | None, parts: Iterable[Part] | None) -> Self:
        """Check the options of a call. Raises InvalidRequest."""
        if isinstance(parts, str) or not isinstance(parts, Iterable | None):
            raise InvalidRequest(f"parts: {parts!r}; expected a list of parts, or None for all", field="parts")
        chosen = () if parts is None else tuple(parts)
        if parts is not None and not (chosen and all(one in get_args(Part) for one in chosen)):
            known = ", ".join(get_args(Part))
            raise InvalidRequest(f"parts: {chosen}; expected some of {known}, or None for all", field="parts")
        return cls(checked_classes(classes), chosen)

    def request(self, model: Model, asked: pb.GetModelRequest) -> pb.ExplainRequest:
        """Return a request without images to the model that ``asked`` names. Raises InvalidRequest."""
        return pb.ExplainRequest(
            model_name=asked.model_name,
            model_version=asked.model_version,
            classes=class_indices(self.classes, model),
            parts=[_PARTS[part] for part in self.parts],
        )


def checked_classes(classes: Iterable[Class] | None) -> tuple[Class, ...]:
    """Return the classes of a call, none for None. Raises InvalidRequest unless they are labels or indices."""
    if classes is None:
        return ()
    chosen = tuple(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else (classes,)
    if not chosen:
        raise InvalidRequest(
            "classes: none; expected one at least, or None for the model's own choice", field="classes"
        )
    for one in chosen:
        if not isinstance(one, str) and not (isinstance(one, Integral) and 0 <= one <= MAX_NUMBER):
            raise InvalidRequest(f"classes: {brief(repr(one))}; expected labels, or indices from 0", field="classes")
    return chosen


def class_indices(classes: Sequence[Class], model: Model) -> list[int]:
    """Return the indices of classes. Raises InvalidRequest for a label that the model does not have."""
    indices = []
    for place, one in enumerate(classes):
        if isinstance(one, str) and one not in model.labels:
            known = ", ".join(model.labels)
            name = f"classes[{place}]"
            raise InvalidRequest(f"{name}: {one!r}; {model.name} has {known}", field=name)
        indices.append(model.labels.index(one) if isinstance(one, str) else int(one))
    return indices


def decode_explanation(response: pb.ExplainResponse, shape: tuple[int, int, int]) -> Explanation:
    """Return the explanation of a request's only image. shape: (C, H, W). Raises ServerFault for a malformed one."""
    if len(response.results) != 1:
        raise ServerFault(f"results: {len(response.results)}; expected 1")
    [result] = response.results
    capsules = PrimaryCapsules.from_message(response.primary_capsules)
    [classification] = decode_results([result.classification], 1, response.model_name, response.model_version)
    return Explanation(
        classification=classification,
        primary_capsules=capsules,
        primary_lengths=_floats(result.primary_lengths, (capsules.count,), "primary_lengths"),
        entropies=_floats(result.entropies, (len(result.entropies),), "entropies"),
        classes=tuple(_class_explanation(one, capsules.count) for one in result.classes),
        pixels=pixels_of(result.pixels, shape, "pixels"),
    )


def pixels_of(data: bytes, shape: tuple[int, int, int], name: str) -> NDArray[np.uint8]:
    """Return the bytes of an image as (C, H, W). Raises ServerFault if there are not as many as its shape has."""
    pixels = np.frombuffer(data, np.uint8)
    if pixels.size != np.prod(shape):
        raise ServerFault(f"{name}: {pixels.size} bytes; expected {shape[0]} x {shape[1]} x {shape[2]}")
    return pixels.reshape(shape)


def _class_explanation(message: pb.ClassExplanation, capsules: int) -> ClassExplanation:
    iterations = len(message.iterations)
    couplings = [number for one in message.iterations for number in one.couplings]
    agreements = [number for one in message.iterations for number in one.agreements]
    size = message.relevance.height, message.relevance.width
    contributions = (capsules if message.contributions else 0,)
    return ClassExplanation(
        label=message.label,
        class_index=message.class_index,
        couplings=_floats(couplings, (iterations, capsules), "couplings"),
        agreements=_floats(agreements, (iterations, capsules), "agreements"),
        contributions=_floats(message.contributions, contributions, "contributions"),
        relevance=_floats(message.relevance.values, size, "relevance.values"),
    )


def _floats(numbers: Sequence[float], shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    if len(numbers) != np.prod(shape, dtype=int):
        raise ServerFault(f"{name}: {len(numbers)} numbers; expected {' x '.join(map(str, shape))}")
    array = np.array(numbers, np.float32).reshape(shape)
    array.flags.writeable = False
    return array
