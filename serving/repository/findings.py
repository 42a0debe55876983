"""The meaning of the lengths of an image's capsules, by the calibration of a model: confidence, presence and verdict.

Axes: B images, J classes.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.artifact import Calibration
from serving.confidence import confidences, evidence
from serving.runtime import Array, Arrays

#: The calibrated confidences, (B, J) float32; True for each present class, (B, J) bool; and the codes, (B,), see Code.
CONFIDENCES, PRESENT, CODES = "confidences", "present", "codes"

_TRAITS = 3  # of each class: is it present, the longest, and nearly as long as the longest
_MAX_KNOWN = 1024  # traits of images whose codes are remembered


class Verdict(IntEnum):
    """The verdict about an image, with the numbers of ``capsnet.v1.Verdict``."""

    UNSPECIFIED = 0
    OK = 1
    SEVERAL = 2
    NONE_OF_THESE = 3
    SUSPICIOUS = 4
    BLANK = 5


class Presence(IntEnum):
    """The present classes of an image, as far as its code tells."""

    NONE = 0
    #: The class with the longest capsule alone.
    WINNER = 1
    OTHERS = 2


class Code(NamedTuple):
    """The findings of an image besides its numbers, which few images differ in. winner: the longest capsule's class."""

    winner: int
    verdict: Verdict
    presence: Presence

    @classmethod
    def of(cls, number: int) -> "Code":
        """Return the code of a number."""
        rest, presence = divmod(number, len(Presence))
        winner, verdict = divmod(rest, len(Verdict))
        return cls(winner, Verdict(verdict), Presence(presence))

    def __int__(self) -> int:
        """Return the code as one number."""
        return (self.winner * len(Verdict) + self.verdict) * len(Presence) + self.presence


def verdicts(codes: Array) -> NDArray[np.int64]:
    """Return the numbers of the verdicts of codes, in the same shape."""
    return np.asarray(codes, np.int64) // len(Presence) % len(Verdict)


class Findings:
    """The findings of a calibrated model. They are made once for a batch, on the thread that computes it."""

    def __init__(self, calibration: Calibration, classes: int) -> None:
        """Prepare the findings for a number of classes, J."""
        self._thresholds = np.array(calibration.presence, np.float32)
        self._margin = np.float32(calibration.margin if classes > 1 else -np.inf)
        self._calibration = calibration
        self._known: dict[bytes, int] = {}  # the codes of traits of images

    def __call__(self, images: Array, probabilities: Array) -> Arrays:
        """Return the findings by name for images (B, C, H, W) and the lengths of their capsules (B, J)."""
        # Few steps of NumPy, which take long between two batches, when their code is in no cache; and none that lets
        # other threads take the interpreter, as sort and argmax do.
        lengths = np.asarray(probabilities, np.float32)
        behind = np.maximum.reduce(lengths, 1, keepdims=True) - lengths
        traits = np.empty((len(lengths), _TRAITS, lengths.shape[1]), np.bool_)
        present = np.greater_equal(lengths, self._thresholds, out=traits[:, 0])
        np.equal(behind, 0, out=traits[:, 1])
        np.less(behind, self._margin, out=traits[:, 2])
        codes = self._codes(traits)
        for index in blank_images(images):
            codes[index] = int(Code.of(codes[index])._replace(verdict=Verdict.BLANK))
        return {CONFIDENCES: self._confidences(lengths), PRESENT: present, CODES: np.array(codes)}

    def _codes(self, traits: NDArray[np.bool_]) -> list[int]:
        """Return the codes of images from the traits of their classes, (B, 3, J). Few traits differ: see ``_code``."""
        data, size, known = traits.tobytes(), traits[0].size, self._known
        codes = []
        for begin in range(0, len(data), size):
            one = data[begin : begin + size]
            code = known.get(one)
            if code is None:
                if len(known) >= _MAX_KNOWN:
                    known.clear()
                code = known[one] = _code(one)
            codes.append(code)
        return codes

    def _confidences(self, lengths: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the calibrated confidences of classes from the lengths of their capsules, both (B, J)."""
        calibration = self._calibration
        found = evidence(lengths, calibration.arctanh)
        return np.asarray(confidences(found, calibration.temperature, calibration.objects), np.float32)


def present_classes(lengths: Array, present: Array) -> list[int]:
    """Return the present classes of an image, the longest first. lengths, present: (J,)."""
    order = np.argsort(-np.asarray(lengths, np.float32), kind="stable")
    return [int(index) for index in order if present[index]]


def blank_images(images: Array) -> list[int]:
    """Return the indices of those of the images (B, C, H, W) whose pixels are all the same in each channel."""
    # The middle row of the first channel alone shows it for nearly every image: is it the same one pixel further?
    rows, width = images[:, 0, images.shape[2] // 2].tobytes(), images.shape[3]
    even = [
        index
        for index, begin in enumerate(range(0, len(rows), width))
        if rows[begin : begin + width - 1] == rows[begin + 1 : begin + width]
    ]
    return [index for index in even if (images[index] == images[index, :, :1, :1]).all()]


def _code(traits: bytes) -> int:
    """Return the code of an image as a number, from the traits of its classes.

    traits: 1 for each class that is present, for each that is the longest, and for each that is nearly as long, or 0.
    """
    classes = len(traits) // _TRAITS
    present, longest, near = (traits[begin : begin + classes] for begin in range(0, len(traits), classes))
    winner = max(0, longest.find(1))  # the first of equal ones; there is none if a length is not a number
    count = present.count(1)
    if count == 0:
        return int(Code(winner, Verdict.NONE_OF_THESE, Presence.NONE))
    if count > 1:
        return int(Code(winner, Verdict.SEVERAL, Presence.OTHERS))
    verdict = Verdict.SUSPICIOUS if near.count(1) > 1 else Verdict.OK
    return int(Code(winner, verdict, Presence.WINNER if present[winner] else Presence.OTHERS))
