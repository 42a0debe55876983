"""Tests of the calibration: its figures, the images that it is measured on, and what it says of unknown images."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import calibrate as calibration
from export.calibrate import (
    IMAGES,
    Network,
    balanced_thresholds,
    calibrate,
    calibration_sample,
    fit_temperature,
)
from export.certificate import certificate
from export.unknown_images import OTHERS, unknown_images
from export.verify import Prediction
from serving.artifact import Training, Variant, load
from serving.confidence import confidences, evidence
from serving.runtime import Arrays, Runtime
from tests.conftest import ROOT
from training.calibration import MIN_TEMPERATURE, expected_calibration_error
from training.checkpoint import Checkpoint
from training.data import datasets
from training.data.datasets import Dataset, split
from training.data.sources import DatasetError
from training.data.specs import NONE
from training.model import CapsNetConfig

LABELS = tuple("0123456789")


def lengths_of(classes: list[int], length: float = 0.9, other: float = 0.1) -> NDArray[np.float32]:
    """Return lengths (N, 10) with one long capsule each."""
    result = np.full((len(classes), 10), other, np.float32)
    result[np.arange(len(classes)), classes] = length
    return result


def labels_of(*rows: int | tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(len(rows), -1)


def a_dataset(count: int = 60, objects: int = 1, canvas: int = 0, none: int = 0) -> Dataset:
    """Return images with their index as pixels in the middle, to recognise them, and random test images."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 10:18, 10:18] = torch.arange(1, count + 1, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    labels = torch.arange(count) % 10
    labels[count - none :] = NONE
    size = canvas or 28
    tests = torch.randint(0, 256, (20, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    test_labels = torch.arange(20) % 10
    if objects > 1:
        test_labels = torch.stack([test_labels, (test_labels + 1) % 10], 1)
    name = "multimnist" if objects > 1 else "mnist"
    return Dataset(name, LABELS, images, labels, tests, test_labels, objects, canvas)


def a_checkpoint(**recipe: Any) -> Checkpoint:
    return Checkpoint(CapsNetConfig(), "mnist", LABELS, recipe, {}, {})


class Graph:
    """A stand-in for a Runtime. answer: from the inputs to the outputs."""

    def __init__(self, answer: Any) -> None:
        self.run = answer


def network(answer: Any, decode: Any = None) -> Network:
    return Network(cast(Runtime, Graph(answer)), cast(Runtime, Graph(decode)) if decode else None)


def seeing(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Answer with the class of the image's largest pixel, less one, modulo ten; an image without ink with nothing."""
    images = np.asarray(arrays["images"])
    largest = images.reshape(len(images), -1).max(1).astype(int)
    lengths = lengths_of([(one - 1) % 10 for one in largest])
    lengths[largest == 0] = 0.1
    return {"probabilities": lengths, "poses": np.repeat(lengths[:, :, None], 16, 2)}


def test_the_temperature_is_the_one_that_the_answers_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.random((20_000, 10), np.float32)
    found = evidence(lengths, arctanh=True)
    drawn = np.array([generator.choice(10, p=row / row.sum()) for row in confidences(found, 0.2)])
    assert fit_temperature(found, drawn[:, None]) == pytest.approx(0.2, rel=0.03)


def test_the_temperature_of_pairs_is_the_one_that_they_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    found = generator.random((4_000, 5))
    pairs = np.array([(first, second) for second in range(5) for first in range(second)])
    weights = np.exp(found[:, pairs].sum(2) / 0.2)
    drawn = [generator.choice(len(pairs), p=row / row.sum()) for row in weights]
    assert fit_temperature(found, pairs[drawn]) == pytest.approx(0.2, rel=0.03)


def test_a_network_without_mistakes_has_a_temperature_and_finite_confidences() -> None:
    classes = list(range(10)) * 10
    lengths = lengths_of(classes)
    seen = evidence(lengths.astype(np.float64), arctanh=True)
    temperature = fit_temperature(seen, labels_of(*classes))
    assert MIN_TEMPERATURE < temperature < 1
    found = confidences(seen, temperature)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found.max() == pytest.approx(1 - 1 / 102, rel=0.01), "one mistake more than it has made"


def test_both_objects_of_an_image_share_its_confidence() -> None:
    labels = [(first, (first + 1) % 10) for first in range(10)]
    lengths = np.full((10, 10), 0.1, np.float32)
    np.put_along_axis(lengths, labels_of(*labels), 0.9, 1)
    seen = evidence(lengths, arctanh=True)
    found = confidences(seen, fit_temperature(seen, labels_of(*labels)), objects=2)
    np.testing.assert_allclose(np.take_along_axis(found, labels_of(*labels), 1), 0.5, atol=0.06)


def test_the_calibration_error_of_pairs_counts_a_shown_class_as_a_half() -> None:
    lengths = lengths_of([0] * 4)
    lengths[:, 1] = 0.8
    found = np.zeros((4, 10))
    found[:, 0], found[:, 1] = 0.5, 0.45
    labels = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 0]])
    errors = calibration._errors_of_calibration(lengths, found, labels)
    # The longest capsule is always right, the second one in two of four. The eight confidences fall into two bins.
    assert errors == {"length": pytest.approx(0.1), "confidence": 0, "confidences": pytest.approx(0.1)}


def test_a_network_of_one_class_needs_no_temperature() -> None:
    assert fit_temperature(np.ones((5, 1)), np.zeros((5, 1), np.int64)) == 1


def test_the_calibration_error_is_the_mean_gap_of_its_bins() -> None:
    predicted = np.array([0.95, 0.95, 0.96, 0.96, 0.30, 0.31])
    right = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    # Two bins: 4 images, 0.955 predicted and 0.75 right; 2 images, 0.305 predicted and 0.5 right.
    assert expected_calibration_error(predicted, right) == pytest.approx((4 * 0.205 + 2 * 0.195) / 6)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_a_threshold_misses_a_class_as_often_as_it_finds_it_falsely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PRIOR_MISTAKES", 1e-9)
    generator = np.random.default_rng(0)
    labels = np.arange(20_000)[:, None] % 10
    lengths = generator.normal(0.3, 0.1, (20_000, 10)).astype(np.float32)
    np.put_along_axis(lengths, labels, generator.normal(0.7, 0.1, (20_000, 1)).astype(np.float32), 1)
    for category, threshold in enumerate(balanced_thresholds(lengths, labels)):
        true, above = labels[:, 0] == category, lengths[:, category] >= threshold
        assert abs(int((true & ~above).sum()) - int((~true & above).sum())) <= 1
        assert (true & ~above).sum() > 10


def test_a_threshold_between_lengths_that_do_not_overlap_is_in_the_middle() -> None:
    classes = list(range(9)) * 3
    found = balanced_thresholds(lengths_of(classes, 0.8, 0.2), labels_of(*classes))
    assert found == (0.5,) * 10, "the class without images has that of all"


def test_two_objects_of_an_image_are_both_present() -> None:
    labels = labels_of(*[(first, (first + 1) % 10) for first in range(10)])
    lengths = np.full((10, 10), 0.2, np.float32)
    np.put_along_axis(lengths, labels, 0.8, 1)
    present = lengths >= np.array(balanced_thresholds(lengths, labels))
    assert (present.sum(1) == 2).all()


def ids(images: Tensor) -> list[int]:
    """Return the indices of images of ``a_dataset`` that are as they were."""
    return sorted(set((images.flatten(1).amax(1).int() - 1).tolist()))


def test_the_images_are_those_that_training_held_out() -> None:
    dataset = a_dataset()
    sample = calibration_sample(
        a_checkpoint(held_out=12, seed=7, augment="none"), dataset, torch.Generator().manual_seed(0)
    )
    assert ids(sample.images) == split(60, 12, 7)[1].tolist()
    assert len(sample.images) == 24 <= IMAGES
    assert sample.source == "training images that were held out"
    assert (sample.labels[:, 0] == dataset.train_labels[sample.images.flatten(1).amax(1).long() - 1]).all()
    a_twelfth = calibration_sample(
        a_checkpoint(held_out=None, seed=7, augment="none"), dataset, torch.Generator().manual_seed(0)
    )
    assert ids(a_twelfth.images) == split(60, 5, 7)[1].tolist()


def test_training_images_are_called_so_and_every_second_one_is_distorted() -> None:
    dataset = a_dataset()
    for recipe in ({}, {"held_out": 0}, {"held_out": "all"}, {"held_out": 60}):
        sample = calibration_sample(a_checkpoint(**recipe), dataset, torch.Generator().manual_seed(0))
        assert sample.source == "training images, since none were held out, every second one newly distorted"
    original = dataset.train_images[:, 0, 13, 13]
    unchanged = [bool((dataset.train_images == image).flatten(1).all(1).any()) for image in sample.images]
    assert all(unchanged[1::2]) and not any(unchanged[::2])
    assert len(sample.images) == 2 * len(original)


def test_composed_data_gets_new_pairs() -> None:
    dataset = a_dataset(objects=2, canvas=36)
    sample = calibration_sample(a_checkpoint(), dataset, torch.Generator().manual_seed(0))
    assert sample.images.shape == (120, 1, 36, 36)
    assert sample.labels.shape == (120, 2)
    assert (sample.labels[:, 0] != sample.labels[:, 1]).all()
    assert sample.source == "training images, since none were held out, in new compositions"


def test_the_reconstruction_is_that_of_the_present_classes_or_of_the_longest_capsule() -> None:
    drawn: list[int] = []

    def decode(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        classes = np.asarray(arrays["class"], np.int64)
        drawn.extend(classes.tolist())
        assert np.asarray(arrays["pose"]).shape == (len(classes), 16)
        return {"image": np.full((len(classes), 1, 2, 2), 0.6, np.float32) * (classes > 0)[:, None, None, None]}

    images = torch.tensor([255, 51, 0], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    lengths = lengths_of([1, 2, 3])
    present = np.zeros((3, 10), bool)
    present[0, [1, 2]] = present[1, 2] = True
    found = Prediction(lengths, np.repeat(lengths[:, :, None], 16, 2))
    errors = network(seeing, decode).reconstruction_errors(images, found, present)
    # 0.6 + 0.6 is clipped at white; 0.6 - 51 / 255; nothing is present, so the longest, the class 3, is drawn.
    np.testing.assert_allclose(errors, [0, 0.16, 0.36], atol=1e-6)
    assert sorted(drawn) == [1, 2, 2, 3]


def test_a_calibration_has_the_shares_of_each_kind_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.unknown_images.OTHERS", {})
    dataset = a_dataset(none=6)
    tested = Prediction(lengths_of([*range(10)] * 2), np.ones((20, 10, 16), np.float32))
    result = calibrate(a_checkpoint(none=0.125, augment="none"), dataset, network(seeing), tested)
    found = result.calibration
    assert found.images == 120
    assert found.margin == pytest.approx(0.8, abs=1e-4)
    assert found.reconstruction_error == 0, "there is no decoder"
    assert found.ece["length"] == pytest.approx(0.1)
    assert found.ece["confidence"] < 0.02
    assert result.exact == 1
    assert found.detected["test images"] == {"none": 0, "several": 0, "suspicious": 0, "confident": 1}
    assert found.detected["one grey level"]["none"] == pytest.approx(1 / 256, abs=1e-4)
    assert {"one grey level", "uniform noise", "test images, patches shuffled"} == result.trained
    for shares in found.detected.values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_a_small_margin_or_a_large_error_is_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.unknown_images.OTHERS", {})
    truth = a_dataset()

    def decode(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        return {"image": np.zeros((len(np.asarray(arrays["class"])), 1, 28, 28), np.float32)}

    lengths = lengths_of([*range(10)] * 2)
    lengths[:5, 9] = 0.3  # less distinct than any image that was measured
    tested = Prediction(lengths, np.ones((20, 10, 16), np.float32))
    dark = replace(truth, test_images=torch.cat([truth.train_images[:10], 255 * torch.ones(10, 1, 28, 28).byte()]))
    result = calibrate(a_checkpoint(augment="none"), dark, network(seeing, decode), tested)
    found = result.calibration
    ink = np.square(np.arange(1, 61) / 255) * 64 / 784
    assert found.reconstruction_error == pytest.approx(np.quantile(ink, 0.95), rel=0.05)
    assert found.detected["test images"] == {"none": 0, "several": 0, "suspicious": 0.75, "confident": 0.25}


def rule_on(lengths: NDArray[np.float32], errors: NDArray[np.float32]) -> tuple[calibration._Rule, Tensor, Prediction]:
    """Return a rule, and images with these lengths and reconstruction errors."""
    seen = network(seeing, lambda arrays: {})
    seen.reconstruction_errors = lambda images, found, present: errors  # type: ignore[method-assign]
    return calibration._Rule(seen, (0.5,) * 10), torch.zeros(len(lengths), 1), Prediction(lengths, lengths[:, :, None])


@pytest.mark.parametrize("missing", [0, 300])
def test_margin_and_error_together_make_the_false_alarms(missing: int) -> None:
    generator = np.random.default_rng(0)
    lengths = lengths_of([0] * 10_000)
    lengths[:, 1] = generator.uniform(0.1, 0.45, 10_000)
    lengths[:missing, 0] = 0.48
    rule, images, found = rule_on(lengths, generator.random(10_000, np.float32))
    rule.set_alarms(images, found)
    shares = rule.findings(images, found)
    assert shares["none"] == missing / 10_000
    assert shares["none"] + shares["suspicious"] == pytest.approx(0.05, abs=0.001)
    close, strange = float(np.mean(0.9 - lengths[missing:, 1] < rule.margin)), 1 - rule.error
    assert close == pytest.approx(strange, abs=0.005), "each alone calls the same share suspicious"
    assert close == pytest.approx(0.0253 if not missing else 0.0104, abs=0.002)


def test_the_margin_leaves_the_alarms_of_the_error_their_part() -> None:
    generator = np.random.default_rng(0)
    lengths = lengths_of([0] * 10_000)
    lengths[:, 1] = generator.uniform(0.1, 0.45, 10_000)
    errors = generator.random(10_000).astype(np.float32)
    rule, images, found = rule_on(lengths, errors)
    rule.error = 0.97
    rule.set_alarms(images, found, rule.error)
    assert rule.error == 0.97
    assert rule.findings(images, found)["suspicious"] == pytest.approx(0.05, abs=0.001)
    rule.set_alarms(images, found, 0.5)
    assert np.all(0.9 - lengths[:, 1] >= rule.margin), "the error alone calls more suspicious than that"


@pytest.mark.parametrize(
    ("recipe", "objects", "trained"),
    [({"none": 0.125}, 1, True), ({"none": 0.125}, 2, True), ({"none": True}, 1, True), ({"none": True}, 2, False),
     ({"none": 0.0}, 1, False), ({}, 1, False)],
)  # fmt: skip
def test_only_kinds_that_training_has_shown_are_called_so(
    recipe: dict[str, Any], objects: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.unknown_images.OTHERS", {})
    dataset = a_dataset(objects=objects, canvas=36 if objects > 1 else 0)
    kinds = unknown_images(dataset, recipe, torch.Generator().manual_seed(0)).shown
    names = {kind.name for kind in kinds if kind.trained}
    assert names == ({"one grey level", "uniform noise", "test images, patches shuffled"} if trained else set())
    assert {kind.images.shape[1:] for kind in kinds} == {dataset.image_shape}
    assert ("one object alone" if objects > 1 else "two objects in one image") in {kind.name for kind in kinds}


def test_a_data_set_that_is_not_here_is_said_to_be_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Dataset:
        raise DatasetError(f"the data set {name} is not on this machine")

    monkeypatch.setattr("export.unknown_images.load_present", missing)
    tested = Prediction(lengths_of([*range(10)] * 2), np.ones((20, 10, 16), np.float32))
    result = calibrate(a_checkpoint(), a_dataset(), network(seeing), tested)
    assert list(result.missing) == list(OTHERS["fashion-mnist"])
    tolerance = {"difference": None, "mean_difference": None, "labels_changed": None, "more_errors": None}
    variant = Variant("model.onnx", test_images=1, images_per_second={"1": 1.0}, tolerance=tolerance)
    page = certificate("a", "1", Training("mnist"), {"fp32": variant}, {}, {}, {}, result)
    assert "| Fashion-MNIST, shoes |  | not run |" in page
    assert "**Fashion-MNIST, shoes: not run.** the data set fashion-mnist is not on this machine." in page
    assert (
        f"| temperature | {result.calibration.temperature:g} | the confidences of an image are softmax(arctanh(" in page
    )
    assert "together, 5% of the measured images are suspicious or have no present class." in page
    assert "training images, since none were held out" in page
    assert re.search(r"^\| test images \|  \| .* \| 100.0 % \| 0.9\d\d \|$", page, re.MULTILINE), "the mean confidence"


def test_a_certificate_says_what_is_right_of_several_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.unknown_images.OTHERS", {})
    tested = Prediction(lengths_of([*range(10)] * 2), np.ones((20, 10, 16), np.float32))
    result = calibrate(a_checkpoint(), a_dataset(objects=2, canvas=36), network(seeing), tested)
    assert (result.calibration.objects, result.calibration.arctanh) == (2, True)
    assert result.calibration.ece.keys() == {"length", "confidence", "confidences"}
    tolerance = {"difference": None, "mean_difference": None, "labels_changed": None, "more_errors": None}
    variant = Variant("model.onnx", test_images=1, images_per_second={"1": 1.0}, tolerance=tolerance)
    page = certificate("a", "1", Training("multimnist"), {"fp32": variant}, {}, {}, {}, result)
    assert "expected calibration error in 15 bins of equal width). An answer is right if the image shows its" in page
    assert "A right answer counts as 1 against the length, and as 1 / 2 against the confidence." in page
    assert "2 times the confidence is the probability that the class is shown" in page


def test_nothing_is_downloaded_for_the_data_of_other_objects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DatasetError, match="the data set mnist is not on this machine"):
        datasets.load_present("mnist")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["capsnet-mnist", "capsnet-mnist-accurate", "capsnet-multimnist"])
def test_the_networks_in_the_repository_are_calibrated(name: str) -> None:
    artifact = load(ROOT / "models" / name / "1")
    found = artifact.calibration
    assert found and artifact.preparation.polarity == "bright-on-dark"
    assert len(found.presence) == 10 and all(0.3 < one < 0.8 for one in found.presence)
    assert found.images == 10_000 and "none were held out" in found.source
    assert found.detected["one grey level"]["confident"] < 0.05
    shoes = found.detected["Fashion-MNIST, shoes"]
    assert found.arctanh and found.ece["confidence"] < 0.005 < found.ece["length"]
    if name == "capsnet-multimnist":
        assert found.objects == 2 and found.ece["confidences"] < 0.005
        assert found.detected["test images"]["several"] > 0.94  # and 5 % false alarms
        return
    assert found.objects == 1 and found.ece["length"] > 0.05
    assert found.detected["test images"]["confident"] > 0.93  # and 5 % false alarms
    assert shoes["confident"] < 0.01
    for kind in ("uniform noise", "black and white noise", "test images, inverted"):
        assert found.detected[kind]["none"] > 0.99
