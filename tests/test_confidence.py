"""Tests of the confidences: their formula, and that they are right as often as they say, on all test images."""

import re
from itertools import combinations

import numpy as np
import pytest

from serving.artifact import find, load
from serving.confidence import confidences as confidences_of
from serving.confidence import evidence, log_weight
from serving.repository.findings import CONFIDENCES, Findings
from serving.runtime import Runtime
from tests.conftest import ROOT, Digits

BINS = 15
BATCH = 100
MAX_POINTS = 0.5


@pytest.mark.parametrize("objects", [1, 2, 3, 5])
def test_a_confidence_is_the_share_of_the_sets_that_the_class_is_in(objects: int) -> None:
    found = np.random.default_rng(objects).normal(size=(20, 5))
    sets = [*combinations(range(5), objects)]
    weights = np.stack([np.exp(found[:, list(one)].sum(1) / 0.3) for one in sets], 1)  # (20, sets)
    expected = [weights[:, [k in one for one in sets]].sum(1) / weights.sum(1) / objects for k in range(5)]
    np.testing.assert_allclose(confidences_of(found, 0.3, objects), np.stack(expected, 1), rtol=1e-12)
    np.testing.assert_allclose(log_weight(found, 0.3, objects), np.log(weights.sum(1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objects", [1, 2, 4])
def test_confidences_of_extreme_evidence_are_finite_and_add_up_to_1(objects: int) -> None:
    found = np.array([[9, 0, 0, 0, 0, 0], [9, 9, 9, 9, 9, 0], [0.0] * 6, [1e6, -1e6, 5, 0, 0, 0]])
    for temperature in (1e-6, 0.01, 1e6):
        result = confidences_of(found, temperature, objects)
        np.testing.assert_allclose(result.sum(1), 1)
        assert ((result >= 0) & (result <= (1 + 1e-12) / objects)).all()
    first = confidences_of(found, 1e-3, objects)[0]
    rest = (1 - 1 / objects) / 5
    np.testing.assert_allclose(first, [1 / objects, *[rest] * 5], atol=1e-12)


def test_two_objects_that_are_surely_there_have_a_half_each_though_one_is_longer() -> None:
    seen = evidence(np.array([[0.98, 0.85, 0.1, 0.1]], np.float32), arctanh=True)
    np.testing.assert_allclose(confidences_of(seen, 0.1, 2), [[0.5, 0.5, 0, 0]], atol=1e-4)
    assert confidences_of(seen, 0.1)[0, 0] > 0.99


def test_the_evidence_is_the_arctanh_of_the_length_or_in_older_models_the_length() -> None:
    lengths = np.array([[0, 0.5, 0.95, 1 - 2**-24, 1, 1.0000001]], np.float32)
    seen = evidence(lengths, arctanh=True)
    np.testing.assert_allclose(seen[:, :3], np.arctanh([[0, 0.5, 0.95]]), rtol=1e-6)
    assert np.isfinite(seen).all() and (np.diff(seen) >= 0).all()
    np.testing.assert_array_equal(evidence(lengths, arctanh=False), lengths)


# The larger network takes twice as long; its certificate has its figure.
@pytest.mark.parametrize("model", ["capsnet-mnist"])
def test_the_calibration_error_of_the_confidences_is_that_of_the_certificate(model: str, digits: Digits) -> None:
    artifact = load(find(ROOT / "models", model))
    assert artifact.calibration
    run, findings = Runtime(artifact.file(), "cpu").run, Findings(artifact.calibration, 10)
    confidences, right = [], []
    for begin in range(0, len(digits.images), BATCH):
        images = digits.images[begin : begin + BATCH, None]
        found = np.asarray(findings(images, run({"images": images})["probabilities"])[CONFIDENCES], np.float64)
        confidences.append(found.max(1))
        right.append(found.argmax(1) == digits.labels[begin : begin + BATCH])
    gaps = np.concatenate(right) - np.concatenate(confidences)
    bins = np.minimum((np.concatenate(confidences) * BINS).astype(int), BINS - 1)
    points = 100 * np.abs(np.bincount(bins, gaps, BINS)).sum() / len(gaps)
    certificate = (artifact.folder / "CERTIFICATE.md").read_text()
    told = re.search(r"its confidence by ([\d.]+) points", certificate)
    assert told and points == pytest.approx(float(told[1]), abs=0.02)
    assert points < MAX_POINTS
