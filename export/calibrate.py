"""Calibration: the temperature and the thresholds that say what the lengths of an image's capsules mean.

Axes: N images, B the images of a batch, K objects an image, C H W of an image, J classes, E pose dimension.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.unknown_images import unknown_images
from export.verify import Prediction
from serving.artifact import Calibration
from serving.confidence import confidences, evidence, log_weight
from serving.runtime import Runtime
from training import calibration
from training.calibration import expected_calibration_error
from training.checkpoint import Checkpoint
from training.data.augment import Augmentation
from training.data.compose import place, scenes
from training.data.datasets import Dataset, split
from training.data.specs import NONE
from training.evaluate import PRESENT_LENGTH
from training.model import to_pixels
from training.recipe import AUGMENTATION_NAMES, HELD_OUT_SHARE, SHIFT_SHARE

IMAGES = 10_000
#: The most distorted copies of one image in the sample.
MAX_COPIES = 2
#: The share of the measured images of known classes that get the verdict SUSPICIOUS or NONE_OF_THESE.
FALSE_ALARMS = 0.05
#: The weight of the threshold of all classes together against that of one class, in mistakes.
PRIOR_MISTAKES = 10
#: The images with one object, for a network of several.
SINGLE_IMAGES = 2_000
TEST_IMAGES = "test images"

_SEED = 0
_BATCH_SIZE = 32
_DIGITS = 4  # of a threshold, after the decimal point
_MARGIN_SCALE, _ERROR_SCALE = 10**_DIGITS, 10**6

Floats = NDArray[np.float32]


class Sample(NamedTuple):
    """Images to calibrate on: uint8 (N, C, H, W), and their labels, int64 (N, K), NONE for none of the classes.

    source: says in words which images they are.
    """

    images: Tensor
    labels: Tensor
    source: str


class Calibrated(NamedTuple):
    """A calibration, and what its certificate says beside its figures.

    exact: the share of the test images in which the present classes are exactly their labels. mean_confidences: by kind
    of ``calibration.detected``, the mean of the longest capsules' confidences. trained: the kinds that the training has
    shown to the network as none of the classes. missing: by kind, the reason why it was not measured.
    """

    calibration: Calibration
    exact: float
    mean_confidences: Mapping[str, float]
    trained: frozenset[str]
    missing: Mapping[str, str]


class Network:
    """A network's graphs in the server's runtime. decoder: None for a network without one."""

    def __init__(self, runtime: Runtime, decoder: Runtime | None) -> None:
        self._runtime, self._decoder = runtime, decoder

    def predict(self, images: Tensor) -> Prediction:
        """Return the answers to uint8 images (N, C, H, W)."""
        parts = [self._runtime.run({"images": part.numpy()}) for part in images.split(_BATCH_SIZE)]  # type: ignore[no-untyped-call]
        return Prediction(
            *(np.concatenate([np.asarray(part[name], np.float32) for part in parts]) for name in Prediction._fields)
        )

    def reconstruction_errors(self, images: Tensor, found: Prediction, present: NDArray[np.bool_]) -> Floats:
        """Return the mean squared differences (N,) of images from their reconstructions; zeros without a decoder.

        A reconstruction is the sum, clipped at white, of those of the present classes (N, J), or of the longest
        capsule's if none is present. Pixels are from 0 to 1.
        """
        count = len(images)
        if self._decoder is None:
            return np.zeros(count, np.float32)
        drawn = present.copy()
        nothing = np.flatnonzero(~present.any(1))
        drawn[nothing, found.probabilities[nothing].argmax(1)] = True
        rows, classes = np.nonzero(drawn)
        result = np.zeros((count, *images.shape[1:]), np.float32)
        for begin in range(0, len(rows), _BATCH_SIZE):
            row, category = rows[begin : begin + _BATCH_SIZE], classes[begin : begin + _BATCH_SIZE]
            pixels = self._decoder.run({"pose": found.poses[row, category], "class": category.astype(np.int64)})
            np.add.at(result, row, np.asarray(pixels["image"], np.float32))
        differences = np.minimum(result, 1) - to_pixels(images).numpy()
        errors: Floats = np.square(differences).reshape(count, -1).mean(1, dtype=np.float32)
        return errors


def calibrate(checkpoint: Checkpoint, dataset: Dataset, network: Network, tested: Prediction) -> Calibrated:
    """Measure the calibration of a network on images that it has not seen in this form, and what it detects.

    tested: the answers to the test images, from which nothing is chosen; the expected calibration errors and a row of
    ``detected`` are measured on them.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sample = calibration_sample(checkpoint, dataset, generator)
    found = network.predict(sample.images)
    known = (sample.labels[:, 0] != NONE).numpy()
    labels = sample.labels.numpy()
    seen = evidence(found.probabilities[known].astype(np.float64), arctanh=True)
    temperature = fit_temperature(seen, labels[known])
    presence = balanced_thresholds(found.probabilities, labels)
    source = sample.source
    rule = _Rule(network, presence)
    rule.set_alarms(sample.images[torch.from_numpy(known)], Prediction(*(array[known] for array in found)))
    if dataset.objects > 1:
        single = _single_objects(dataset, generator)
        rule.set_alarms(single, network.predict(single), rule.error)
        source += f"; the margin on {len(single):,} images with one object each"
    kinds = unknown_images(dataset, checkpoint.recipe, generator)
    shown = {TEST_IMAGES: (dataset.test_images[:IMAGES], Prediction(*(array[:IMAGES] for array in tested)))}
    shown |= {kind.name: (kind.images, network.predict(kind.images)) for kind in kinds.shown}

    def confidences_of(answers: Prediction) -> NDArray[np.floating]:
        return confidences(evidence(answers.probabilities, arctanh=True), temperature, dataset.objects)

    calibration = Calibration(
        temperature=temperature,
        objects=dataset.objects,
        arctanh=True,
        presence=presence,
        margin=rule.margin,
        reconstruction_error=rule.error,
        false_alarms=FALSE_ALARMS,
        images=len(labels),
        source=source,
        ece=_errors_of_calibration(tested.probabilities, confidences_of(tested), dataset.test_labels),
        detected={name: rule.findings(images, answers) for name, (images, answers) in shown.items()},
    )
    return Calibrated(
        calibration,
        exact=_exactly_present(tested.probabilities, dataset.test_labels, presence),
        mean_confidences={name: float(confidences_of(answers).max(1).mean()) for name, (_, answers) in shown.items()},
        trained=frozenset(kind.name for kind in kinds.shown if kind.trained),
        missing=kinds.missing,
    )


def calibration_sample(checkpoint: Checkpoint, dataset: Dataset, generator: torch.Generator) -> Sample:
    """Return about IMAGES images: held out by the training, or its own if it held none out.

    Every second one is distorted as in the training, if that has done so; a distorted image is smoother than the images
    that users send. An image is taken MAX_COPIES times at most. Composed data sets get new compositions.
    """
    recipe = checkpoint.recipe
    held_out = _held_out(recipe, dataset)
    pool = held_out if len(held_out) else torch.arange(len(dataset.train_images))
    copies = [pool[torch.randperm(len(pool), generator=generator)] for _ in range(MAX_COPIES)]
    chosen = torch.cat(copies)[:IMAGES]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    augment = _augmentation(recipe, dataset)
    if augment.changes:
        changed = augment(to_pixels(images[::2]), torch.arange(0, len(images), 2), generator)
        images[::2] = changed.mul(255).round().clamp(0, 255).to(torch.uint8)
    said = "training images that were held out" if len(held_out) else "training images, since none were held out"
    said += ", every second one newly distorted" if augment.changes else ""
    if not dataset.canvas:
        return Sample(images, labels.reshape(len(labels), -1), said)
    images, labels = scenes(images, labels, dataset.objects, dataset.canvas, generator)
    return Sample(images, labels.reshape(len(labels), -1), f"{said}, in new compositions")


def fit_temperature(found: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Return the temperature of ``confidences`` for which the sets of the images' labels are the most probable.

    found: the evidence for the classes, (N, J). labels: (N, K), of K different classes an image.
    """
    return calibration.fit_temperature(found, labels, log_weight)


def balanced_thresholds(lengths: Floats, labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Return the least length of each present class, for which as many images miss the class as have it falsely.

    Where several thresholds are as good, the middle is taken. A threshold that rests on few of these mistakes is drawn
    to that of all classes together, as if PRIOR_MISTAKES of its mistakes said so. lengths: (N, J); labels: (N, K).
    """
    true = (labels[:, :, None] == np.arange(lengths.shape[1])).any(1)  # (N, J)
    common, _ = _balanced(lengths[true], lengths[~true])
    result = []
    for category in range(lengths.shape[1]):
        own, mistakes = _balanced(lengths[true[:, category], category], lengths[~true[:, category], category])
        result.append(round((mistakes * own + PRIOR_MISTAKES * common) / (mistakes + PRIOR_MISTAKES), _DIGITS))
    return tuple(result)


def _balanced(true: Floats, false: Floats) -> tuple[float, int]:
    """Return the threshold between the lengths of images with a class and without it, and the number of mistakes."""
    if not len(true):
        return PRESENT_LENGTH, 0
    edges = np.concatenate(([0.0], np.unique(np.concatenate((true, false))).astype(np.float64), [1.0]))
    middles = (edges[:-1] + edges[1:]) / 2
    missed = np.searchsorted(np.sort(true), middles)
    falsely = len(false) - np.searchsorted(np.sort(false), middles)
    differences = np.abs(missed - falsely)
    (best,) = np.nonzero(differences == differences.min())
    return float((edges[best[0]] + edges[best[-1] + 1]) / 2), int(missed[best[0]] + falsely[best[0]])


class _Rule:
    """The rule of the server: which classes are present, and which of these images are suspicious.

    An image with a present class is suspicious if its reconstruction error is large, and an image of one class also if
    its margin is small.

    margin: the least difference between the longest and the second longest capsule of an image that is not suspicious.
    error: the largest reconstruction error of such an image.
    """

    def __init__(self, network: Network, presence: tuple[float, ...]) -> None:
        self._network, self._presence = network, np.array(presence, np.float32)
        self.margin, self.error = 0.0, 0.0

    def set_alarms(self, images: Tensor, found: Prediction, error: float | None = None) -> None:
        """Set both thresholds, so that FALSE_ALARMS of these images are suspicious or show no class.

        Both then call the same share of the images suspicious that they judge. error: the threshold of the
        reconstruction error if it is not to be set, but the margin alone.
        """
        present, margins, errors = self._measure(images, found)
        count = present.sum(1)
        some, one = count > 0, count == 1
        by_error = _levels(-errors, some) if error is None else np.where(errors > error, 0, 1)
        level = np.minimum(_levels(margins, one), np.where(some, by_error, 0))
        common = float(np.quantile(level, FALSE_ALARMS, method="lower"))
        # Rounded to the side that calls fewer images suspicious.
        if some.any() and error is None:
            self.error = math.ceil(float(np.quantile(errors[some], 1 - common)) * _ERROR_SCALE) / _ERROR_SCALE
        if one.any():
            self.margin = math.floor(float(np.quantile(margins[one], common)) * _MARGIN_SCALE) / _MARGIN_SCALE

    def findings(self, images: Tensor, found: Prediction) -> dict[str, float]:
        """Return the shares of images (N, C, H, W): no class, several, suspicious, and one without doubt."""
        present, margins, errors = self._measure(images, found)
        count = present.sum(1)
        strange, close = errors > self.error, margins < self.margin
        shares = {
            "none": count == 0,
            "several": (count > 1) & ~strange,
            "suspicious": (count > 0) & (strange | ((count == 1) & close)),
            "confident": (count == 1) & ~strange & ~close,
        }
        return {name: round(float(share.mean()), _DIGITS) for name, share in shares.items()}

    def _measure(self, images: Tensor, found: Prediction) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Return the present classes (N, J), the margins (N,) and the reconstruction errors (N,)."""
        present, margins = self._present(found)
        return present, margins, self._network.reconstruction_errors(images, found, present)

    def _present(self, found: Prediction) -> tuple[NDArray[np.bool_], Floats]:
        """Return the present classes (N, J) and the margins (N,)."""
        longest = np.sort(found.probabilities, 1)
        margins = longest[:, -1] - longest[:, -2] if longest.shape[1] > 1 else longest[:, -1]
        return found.probabilities >= self._presence, margins


def _levels(values: Floats, judged: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return, for each value (N,), the share of the judged values that are not above it; 1 for those not judged."""
    own = np.sort(values[judged])
    shares = np.searchsorted(own, values, "right") / max(1, len(own))
    return np.where(judged, shares, 1.0)


def _held_out(recipe: Mapping[str, object], dataset: Dataset) -> Tensor:
    """Return the indices of the training images that the training held out; none where the recipe does not say so."""
    count, seed = len(dataset.train_images), recipe.get("seed", 1)
    held_out = recipe.get("held_out", 0)
    if held_out is None:
        held_out = count // HELD_OUT_SHARE
    if not isinstance(held_out, int) or not isinstance(seed, int) or not 0 <= held_out < count:
        held_out, seed = 0, 0
    return split(count, held_out, seed)[1]


def _augmentation(recipe: Mapping[str, object], dataset: Dataset) -> Augmentation:
    """Return the distortion of the training."""
    width = dataset.train_images.shape[-1]
    numbers = {name: value for name, value in recipe.items() if isinstance(value, int | float)}
    share = numbers.get("shift_share", numbers["max_shift"] / width if "max_shift" in numbers else SHIFT_SHARE)
    name = recipe.get("augment") or ("none" if dataset.canvas else "affine")
    return Augmentation(
        name if isinstance(name, str) and name in AUGMENTATION_NAMES else "none",
        share,
        numbers.get("flip", 0.0),
        numbers.get("elastic", 0.0),
        numbers.get("erasing", 0.0),
    )


def _single_objects(dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Return images of one object each for a network of several."""
    chosen = torch.randperm(len(dataset.train_images), generator=generator)[:SINGLE_IMAGES]
    return place(dataset.train_images[chosen], dataset.canvas, generator)


def _errors_of_calibration(lengths: Floats, found: NDArray[np.floating], labels: Tensor) -> dict[str, float]:
    """Return the expected calibration errors of the longest capsule's length and of its confidence, on test images.

    found: the confidences, (N, J). With K objects an image, a right class is right as length, and for 1 / K as
    confidence; the error of the K longest capsules' confidences is there too.
    """
    true = labels.reshape(len(labels), -1).numpy()
    objects = true.shape[1]
    longest = np.argsort(-lengths, 1, kind="stable")[:, :objects]
    right = (true[:, None, :] == longest[:, :, None]).any(2).astype(np.float64)
    chosen = np.take_along_axis(found, longest, 1)
    winners = np.clip(lengths.max(1), 0, 1).astype(np.float64)
    errors = {
        "length": expected_calibration_error(winners, right[:, 0]),
        "confidence": expected_calibration_error(chosen[:, 0], right[:, 0] / objects),
    }
    if objects > 1:
        errors["confidences"] = expected_calibration_error(chosen.ravel(), right.ravel() / objects)
    return {name: round(error, 6) for name, error in errors.items()}


def _exactly_present(lengths: Floats, labels: Tensor, presence: tuple[float, ...]) -> float:
    """Return the share of the images in which the present classes are exactly the labels."""
    true = np.zeros(lengths.shape, bool)
    np.put_along_axis(true, labels.reshape(len(labels), -1).numpy(), True, 1)
    return float(((lengths >= np.array(presence, np.float32)) == true).all(1).mean())
