"""Tests that confidences are right as often as they say, on all test images."""

import re

import numpy as np
import pytest

from serving.artifact import find, load
from serving.repository.findings import CONFIDENCES, Findings
from serving.runtime import Runtime
from tests.conftest import ROOT, Digits

BINS = 15
BATCH = 100
MAX_POINTS = 0.5


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
