"""The server's answers as plain values with NumPy arrays: classifications and the model.

Axes: J classes, E dimensions of a pose.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.errors import ServerFault


class Verdict(StrEnum):
    """Judgement of an image by the lengths of its capsules and the thresholds of the model's calibration.

    UNKNOWN: the model has no calibration, or the server is older than this client.
    """

    UNKNOWN = ""
    #: One class is present.
    OK = "OK"
    #: Several classes are present: perhaps overlapping objects.
    SEVERAL = "SEVERAL"
    #: No class is present.
    NONE_OF_THESE = "NONE_OF_THESE"
    #: One class is present, but another is nearly as long, or the reconstruction differs much from the image.
    SUSPICIOUS = "SUSPICIOUS"
    #: All pixels of the image are the same.
    BLANK = "BLANK"


_VERDICTS: dict[int, Verdict] = {
    pb.VERDICT_OK: Verdict.OK,
    pb.VERDICT_SEVERAL: Verdict.SEVERAL,
    pb.VERDICT_NONE_OF_THESE: Verdict.NONE_OF_THESE,
    pb.VERDICT_SUSPICIOUS: Verdict.SUSPICIOUS,
    pb.VERDICT_BLANK: Verdict.BLANK,
}


@dataclass(frozen=True, eq=False, slots=True)
class Classification:
    """The model's result for one image. The arrays are read-only.

    label, class_index: the class with the longest capsule.
    probability: the length of that capsule, from 0 to 1. The paper calls it a probability; ``confidence`` is one.
    probabilities: (J,) float32, the lengths of all class capsules. They need not add up to 1.
    poses: (J, E) float32, the class capsules' pose vectors.
    labels: the J class names.
    confidence: the calibrated confidence of label, from 0 to 1; 0 if the verdict is UNKNOWN.
    confidences: (J,) float32, those of all classes, given that the image shows as many objects of these classes as
        ``Calibration.objects`` says. They add up to 1, so those of K objects are at most 1 / K.
    present: the classes whose capsule is long enough, the longest first; none if the verdict is UNKNOWN.
    verdict: what the lengths say about the image.
    reconstruction_error: the mean squared difference of the image, its pixels from 0 to 1, from its reconstruction;
        None unless the call asked for it.
    """

    label: str
    class_index: int
    probability: float
    probabilities: NDArray[np.float32] = field(repr=False)
    poses: NDArray[np.float32] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    model_name: str
    model_version: str
    confidence: float
    confidences: NDArray[np.float32] = field(repr=False)
    present: tuple[str, ...]
    verdict: Verdict
    reconstruction_error: float | None

    @property
    def pose(self) -> NDArray[np.float32]:
        """Return the winner's pose vector, (E,) float32."""
        pose: NDArray[np.float32] = self.poses[self.class_index]
        return pose

    def to_dict(self) -> dict[str, Any]:
        """Return the values for ``json.dumps``; those of all classes are by label."""
        numbers = {
            "label": self.label,
            "class_index": self.class_index,
            "probability": self.probability,
            "confidence": self.confidence,
            "verdict": str(self.verdict),
            "present": list(self.present),
            "probabilities": dict(zip(self.labels, self.probabilities.tolist(), strict=True)),
            "confidences": dict(zip(self.labels, self.confidences.tolist(), strict=True)),
            "poses": dict(zip(self.labels, self.poses.tolist(), strict=True)),
            "model_name": self.model_name,
            "model_version": self.model_version,
        }
        if self.reconstruction_error is not None:
            numbers["reconstruction_error"] = self.reconstruction_error
        return numbers


@dataclass(frozen=True)
class Preparation:
    """The look of the training images, which ``preprocess="auto"`` gives to a picture.

    polarity: "bright-on-dark", "dark-on-bright", or "" for either and for photographs.
    object_size: the longer side of the object in pixels, in the image's middle; 0 if objects may fill the image.
    centred_by_mass: True if the object's centre of mass is in the middle; False for the middle of its box.
    """

    polarity: str
    object_size: int
    centred_by_mass: bool


@dataclass(frozen=True)
class Calibration:
    """The figures behind confidence, present and verdict, measured at export.

    temperature, objects, arctanh: the confidences are softmax(evidence / temperature), where an image shows one object,
        and the evidence is arctanh(length) or, if ``arctanh`` is False, the length. For several objects see
        ``Calibration`` in ``capsnet.proto``.
    presence: the least length of a present class, by class.
    margin: the least difference between the two longest capsules of an image that is not suspicious.
    reconstruction_error: the largest one of an image that is not suspicious; 0 if the model has no decoder.
    false_alarms: the share of the measured images of known classes that are called suspicious, or none of the classes.
    objects: the number K of objects that an image is taken to show. Then ``K * confidence`` is the probability that a
        class is shown.
    """

    temperature: float
    presence: tuple[float, ...]
    margin: float
    reconstruction_error: float
    false_alarms: float
    objects: int
    arctanh: bool


@dataclass(frozen=True)
class PrimaryCapsules:
    """The primary capsules and the pixels that they see. Capsule i is ``numpy.unravel_index(i, shape)``.

    types, rows, columns: the capsules' own axes, in this order.
    offset, stride, size: the capsules in a row or column r see ``size`` pixels from ``stride * r + offset`` on.
    """

    types: int
    rows: int
    columns: int
    offset: int
    stride: int
    size: int

    @classmethod
    def from_message(cls, message: pb.PrimaryCapsules) -> "PrimaryCapsules":
        return cls(message.types, message.rows, message.columns, message.offset, message.stride, message.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (types, rows, columns)."""
        return self.types, self.rows, self.columns

    @property
    def count(self) -> int:
        """Return the number I of primary capsules."""
        return self.types * self.rows * self.columns

    def place(self, capsule: int) -> tuple[slice, slice]:
        """Return the rows and the columns of the image that a capsule sees: ``image[:, rows, columns]``.

        They begin in the image, and may end beyond it. Raises IndexError for an unknown capsule.
        """
        return self._seen(self._row_and_column(capsule)[0]), self._seen(self._row_and_column(capsule)[1])

    def centre(self, capsule: int) -> tuple[float, float]:
        """Return the row and the column in the middle of the pixels that a capsule sees, padding included.

        Raises IndexError for an unknown capsule.
        """
        row, column = self._row_and_column(capsule)
        middle = self.offset + (self.size - 1) / 2
        return self.stride * row + middle, self.stride * column + middle

    def _row_and_column(self, capsule: int) -> tuple[int, int]:
        if not 0 <= capsule < self.count:
            raise IndexError(f"capsule {capsule}; expected 0 to {self.count - 1}")
        return divmod(capsule % (self.rows * self.columns), self.columns)

    def _seen(self, number: int) -> slice:
        first = self.stride * number + self.offset
        return slice(max(0, first), max(0, first + self.size))


@dataclass(frozen=True)
class Model:
    """A served model.

    labels: the class names, in the order of the capsules.
    image_shape: (C, H, W).
    pose_size: the dimension of a pose.
    max_images_per_request, max_request_bytes: the server's limits for one request.
    test_errors: the number of images, out of test_images of the data set, that the model classified wrongly.
    preparation: the preparation that ``preprocess="auto"`` makes; None if the server is too old to tell.
    calibration: the figures behind confidence, present and verdict; None if the model has none.
    primary_capsules: None if the model cannot explain its answers.
    reconstructs: True if the model has a decoder, for ``reconstruct`` and ``reconstruction_error``.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pose_size: int
    max_images_per_request: int
    max_request_bytes: int
    precision: str
    execution_provider: str
    sha256: str
    dataset: str
    test_errors: int
    test_images: int
    preparation: Preparation | None
    calibration: Calibration | None
    primary_capsules: PrimaryCapsules | None
    reconstructs: bool

    @classmethod
    def from_message(cls, message: pb.GetModelResponse) -> "Model":
        return cls(
            name=message.model_name,
            version=message.model_version,
            labels=tuple(message.labels),
            image_shape=(message.image_channels, message.image_height, message.image_width),
            pose_size=message.pose_size,
            max_images_per_request=message.max_images_per_request,
            max_request_bytes=message.max_request_bytes,
            precision=message.precision,
            execution_provider=message.execution_provider,
            sha256=message.sha256,
            dataset=message.dataset,
            test_errors=message.test_errors,
            test_images=message.test_images,
            preparation=_preparation(message.preparation) if message.HasField("preparation") else None,
            calibration=_calibration(message.calibration) if message.HasField("calibration") else None,
            primary_capsules=PrimaryCapsules.from_message(message.primary_capsules)
            if message.HasField("primary_capsules")
            else None,
            reconstructs=message.reconstructs,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for ``json.dumps``."""
        return asdict(self)


_POLARITIES: dict[int, str] = {
    pb.POLARITY_BRIGHT_ON_DARK: "bright-on-dark",
    pb.POLARITY_DARK_ON_BRIGHT: "dark-on-bright",
}


def _preparation(message: pb.Preparation) -> Preparation:
    return Preparation(_POLARITIES.get(message.polarity, ""), message.object_size, message.centred_by_mass)


def _calibration(message: pb.Calibration) -> Calibration:
    return Calibration(
        temperature=message.temperature,
        presence=tuple(message.presence),
        margin=message.margin,
        reconstruction_error=message.reconstruction_error,
        false_alarms=message.false_alarms,
        objects=message.objects or 1,
        arctanh=message.arctanh,
    )


def decode(response: pb.ClassifyResponse, count: int) -> list[Classification]:
    """Return the results of a response to a request of ``count`` images.

    Raises ServerFault if the response has another number of results, or results of different shapes.
    """
    return decode_results(response.results, count, response.model_name, response.model_version)


def decode_results(results: Sequence[pb.Classification], count: int, name: str, version: str) -> list[Classification]:
    """Return ``count`` results of a model's version. Raises ServerFault as ``decode``."""
    capsules = [capsule for result in results for capsule in result.capsules]
    if len(results) != count or not capsules or len(capsules) % count:
        raise ServerFault(f"results: {len(results)} of {len(capsules)} capsules in all; expected {count}, all alike")
    labels = tuple(capsule.label for capsule in results[0].capsules)
    probabilities = np.array([capsule.probability for capsule in capsules], np.float32)
    # One array for all, and not one for each pose.
    poses = np.fromiter(chain.from_iterable([capsule.pose for capsule in capsules]), np.float32)
    if poses.size % len(capsules) or len(labels) * count != len(capsules):
        raise ServerFault(
            f"results: poses of {poses.size} numbers in all for {len(capsules)} capsules; expected E each"
        )
    if any(result.class_index >= len(labels) for result in results):
        raise ServerFault(f"results: a class_index beyond the {len(labels)} classes")
    confidences = np.zeros_like(probabilities)
    if any(result.verdict for result in results):
        confidences[:] = [capsule.confidence for capsule in capsules]
    probabilities.flags.writeable = poses.flags.writeable = confidences.flags.writeable = False
    by_image = zip(
        results,
        probabilities.reshape(count, len(labels)),
        confidences.reshape(count, len(labels)),
        poses.reshape(count, len(labels), -1),
        strict=True,
    )
    return [
        Classification(
            label=result.label,
            class_index=result.class_index,
            probability=float(lengths[result.class_index]),
            probabilities=lengths,
            poses=vectors,
            labels=labels,
            model_name=name,
            model_version=version,
            confidence=result.confidence,
            confidences=chances,
            present=tuple(result.present),
            verdict=_VERDICTS.get(result.verdict, Verdict.UNKNOWN),
            reconstruction_error=result.reconstruction_error if result.HasField("reconstruction_error") else None,
        )
        for result, lengths, chances, vectors in by_image
    ]
