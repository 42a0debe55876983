"""Reconstructions: their options, and the server's answers with NumPy arrays.

Axes: E dimensions of a pose, C channels, H rows, W columns.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.errors import InvalidRequest, ServerFault, brief
from serving.client.explanations import MAX_NUMBER, Class, checked_classes, class_indices, pixels_of
from serving.client.results import Classification, Model, decode_results

#: The pose of a class, (E,) numbers.
Pose = NDArray[Any] | Sequence[float]
#: Poses by class, or pairs of a class and a pose, in which a class may stand several times.
Poses = Mapping[Class, Pose] | Iterable[tuple[Class, Pose]]

_MIN_STEPS = 2


class Sweep(NamedTuple):
    """Numbers that are added to one dimension of a pose: ``steps`` of them, evenly from ``first`` to ``last``."""

    dimension: int
    first: float
    last: float
    steps: int


@dataclass(frozen=True, eq=False, slots=True)
class Reconstruction:
    """A drawn pose. The arrays are read-only.

    image: (C, H, W) uint8.
    layer: (C, H, W) uint8, the part of the sent image that belongs to this class; None unless an image of two classes
        or more was drawn without changes.
    pose: (E,) float32, the pose that was drawn, with the changes.
    delta: the number that the sweep added; 0 without a sweep.
    classification: of the sent image, with its reconstruction error; None for poses.
    """

    label: str
    class_index: int
    image: NDArray[np.uint8] = field(repr=False)
    layer: NDArray[np.uint8] | None = field(repr=False)
    pose: NDArray[np.float32] = field(repr=False)
    delta: float
    classification: Classification | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for ``json.dumps``, without the classification, which has its own."""
        return {
            "label": self.label,
            "class_index": self.class_index,
            "delta": self.delta,
            "pose": self.pose.tolist(),
            "image": self.image.tolist(),
            "layer": None if self.layer is None else self.layer.tolist(),
        }


@dataclass(frozen=True)
class ReconstructionOptions:
    """The options of a call of ``reconstruct``. poses: None if the poses are those of an image."""

    poses: tuple[tuple[Class, tuple[float, ...]], ...] | None
    classes: tuple[Class, ...]
    changes: tuple[tuple[int, float], ...]
    sweep: Sweep | None

    @classmethod
    def of(
        cls,
        has_image: bool,
        is_fitted: bool,
        poses: Poses | None,
        classes: Iterable[Class] | None,
        changes: Mapping[int, float] | None,
        sweep: Sweep | tuple[int, float, float, int] | None,
    ) -> Self:
        """Check the options of a call. is_fitted: True if it has options for an image. Raises InvalidRequest."""
        if has_image == (poses is not None):
            raise InvalidRequest(f"image and poses: {'both' if has_image else 'neither'}; expected one of them")
        if poses is not None and is_fitted:
            raise InvalidRequest("resize and preprocess: given with poses; expected with an image alone")
        if poses is not None and classes is not None:
            raise InvalidRequest(
                "classes with poses: poses have their own classes; expected classes with an image alone"
            )
        if not isinstance(changes, Mapping | None):
            raise InvalidRequest(f"changes: {brief(repr(changes))}; expected {{DIMENSION: NUMBER}}", field="changes")
        for dimension, delta in (changes or {}).items():
            _check_dimension(dimension, "changes")
            _check_delta(delta, "changes")
        return cls(
            None if poses is None else _pairs(poses),
            checked_classes(classes),
            tuple((changes or {}).items()),
            None if sweep is None else _sweep(sweep),
        )

    def request(self, model: Model, asked: pb.GetModelRequest) -> pb.ReconstructRequest:
        """Return a request without its image to the model that ``asked`` names. Raises InvalidRequest."""
        request = pb.ReconstructRequest(
            model_name=asked.model_name,
            model_version=asked.model_version,
            classes=class_indices(self.classes, model),
            changes=[pb.Change(dimension=dimension, delta=delta) for dimension, delta in self.changes],
            format=pb.FORMAT_PIXELS,
        )
        if self.sweep:
            request.sweep.CopyFrom(pb.Sweep(**self.sweep._asdict()))
        if self.poses is not None:
            indices = class_indices([one for one, _ in self.poses], model)
            request.poses.SetInParent()
            for index, (_, pose) in zip(indices, self.poses, strict=True):
                request.poses.poses.add(class_index=index, pose=pose)
        return request


def decode_reconstructions(response: pb.ReconstructResponse) -> list[Reconstruction]:
    """Return the reconstructions of a response. Raises ServerFault for a malformed one."""
    shape = response.image_channels, response.image_height, response.image_width
    classification = None
    if response.HasField("classification"):
        [classification] = decode_results([response.classification], 1, response.model_name, response.model_version)
    results = []
    for number, result in enumerate(response.results):
        name = f"results[{number}]"
        if not result.pose:
            raise ServerFault(f"{name}.pose: empty; expected numbers")
        pose = np.array(result.pose, np.float32)
        pose.flags.writeable = False
        results.append(
            Reconstruction(
                label=result.label,
                class_index=result.class_index,
                image=pixels_of(result.image, shape, f"{name}.image"),
                layer=pixels_of(result.layer, shape, f"{name}.layer") if result.layer else None,
                pose=pose,
                delta=result.delta,
                classification=classification,
            )
        )
    return results


def _pairs(poses: Poses) -> tuple[tuple[Class, tuple[float, ...]], ...]:
    """Return poses as pairs. Raises InvalidRequest unless each is one vector of numbers."""
    result = []
    try:
        pairs = [(one, pose) for one, pose in (poses.items() if isinstance(poses, Mapping) else poses)]
    except (TypeError, ValueError):
        raise InvalidRequest("poses: no pairs; expected {CLASS: POSE}, or pairs of these", field="poses") from None
    for one, pose in pairs:
        try:
            numbers = np.asarray(pose, np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"poses: {brief(str(error))} for class {one!r}; expected numbers") from error
        if numbers.ndim != 1:
            raise InvalidRequest(f"poses: an array of shape {numbers.shape} for class {one!r}; expected (E,)")
        result.append((one, tuple(numbers.tolist())))
    if not result:
        raise InvalidRequest("poses: none; expected one at least", field="poses")
    checked_classes([one for one, _ in result])
    return tuple(result)


def _sweep(sweep: Sweep | tuple[int, float, float, int]) -> Sweep:
    values: tuple[Any, ...] = tuple(sweep) if isinstance(sweep, Iterable) else (sweep,)
    if len(values) != len(Sweep._fields):
        raise InvalidRequest(f"sweep: {len(values)} values; expected {', '.join(Sweep._fields)}", field="sweep")
    result = Sweep(*values)
    _check_dimension(result.dimension, "sweep")
    _check_delta(result.first, "sweep")
    _check_delta(result.last, "sweep")
    if not (isinstance(result.steps, Integral) and _MIN_STEPS <= result.steps <= MAX_NUMBER):
        raise InvalidRequest(f"sweep: {result.steps!r} steps; expected {_MIN_STEPS} or more", field="sweep")
    return result


def _check_dimension(dimension: int, name: str) -> None:
    if not (isinstance(dimension, Integral) and 0 <= dimension <= MAX_NUMBER):
        raise InvalidRequest(f"{name}: dimension {dimension!r}; expected a whole number, 0 or more", field=name)


def _check_delta(delta: float, name: str) -> None:
    if not (isinstance(delta, Real) and math.isfinite(delta)):
        raise InvalidRequest(f"{name}: {delta!r}; expected a finite number", field=name)
