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

_MAX_COUNT = 2  # of present classes: what more of them say is the same


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
        # The code of class 0 by: is the margin small, is the winner present, and how many classes are present.
        self._codes = np.array(
            [
                [[_code(count, present, doubtful) for count in range(_MAX_COUNT + 1)] for present in (False, True)]
                for doubtful in (False, True)
            ]
        )
        # The codes of neighbouring classes lie this far apart.
        self._step = int(Code(1, Verdict.UNSPECIFIED, Presence.NONE))

    def __call__(self, images: Array, probabilities: Array) -> Arrays:
        """Return the findings by name for images (B, C, H, W) and the lengths of their capsules (B, J)."""
        # Few steps, and none that lets other threads take the interpreter, as sort and argmax do: it would wait.
        lengths = np.asarray(probabilities, np.float32)
        longest = np.maximum.reduce(lengths, 1, keepdims=True)
        winning = lengths == longest
        if np.count_nonzero(winning) != len(lengths):  # equal lengths, of which the first wins, or none is finite
            winning = np.arange(lengths.shape[1]) == lengths.argmax(1)[:, None]
        present = lengths >= self._thresholds
        # A winner is shortened by 1, so that another class is the longest.
        margins = longest[:, 0] - np.maximum.reduce(lengths - winning, 1)
        counts = np.minimum(np.add.reduce(present, 1), _MAX_COUNT)
        # Each row has one winner, so these are in the order of the rows.
        winner_present, winners = present[winning], winning.nonzero()[1]
        doubtful = margins < self._margin
        codes = self._codes[doubtful.view(np.uint8), winner_present.view(np.uint8), counts]
        codes += winners * self._step
        blank = blank_images(images)
        if blank is not None:
            codes[blank] += len(Presence) * (Verdict.BLANK - verdicts(codes[blank]))
        return {CONFIDENCES: self._confidences(lengths), PRESENT: present, CODES: codes}

    def _confidences(self, lengths: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the calibrated confidences of classes from the lengths of their capsules, both (B, J)."""
        calibration = self._calibration
        found = evidence(lengths, calibration.arctanh)
        return np.asarray(confidences(found, calibration.temperature, calibration.objects), np.float32)


def present_classes(lengths: Array, present: Array) -> list[int]:
    """Return the present classes of an image, the longest first. lengths, present: (J,)."""
    order = np.argsort(-np.asarray(lengths, np.float32), kind="stable")
    return [int(index) for index in order if present[index]]


def blank_images(images: Array) -> NDArray[np.bool_] | None:
    """Return True for each of the images (B, C, H, W) whose pixels are all the same, (B,), or None if none is."""
    # The middle row alone shows it for nearly every image.
    middle = images[:, :, images.shape[2] // 2]
    even = (middle == middle[:, :, :1]).reshape(len(images), -1)
    if not np.count_nonzero(np.logical_and.reduce(even, 1)):
        return None
    pixels = images.reshape(*images.shape[:2], -1)
    blank: NDArray[np.bool_] = (pixels == pixels[:, :, :1]).all((1, 2))
    return blank


def _code(count: int, winner_present: bool, doubtful: bool) -> int:
    """Return the code of class 0 as a number. doubtful: True if another class is nearly as long."""
    if count == 0:
        return int(Code(0, Verdict.NONE_OF_THESE, Presence.NONE))
    if count > 1:
        return int(Code(0, Verdict.SEVERAL, Presence.OTHERS))
    verdict = Verdict.SUSPICIOUS if doubtful else Verdict.OK
    return int(Code(0, verdict, Presence.WINNER if winner_present else Presence.OTHERS))
