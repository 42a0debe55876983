"""Tests of the findings: confidences, present classes and verdicts, from the lengths of capsules."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Calibration
from serving.repository.findings import (
    CODES,
    CONFIDENCES,
    PRESENT,
    Code,
    Findings,
    Presence,
    Verdict,
    present_classes,
    verdicts,
)
from serving.runtime import Arrays

CALIBRATION = Calibration(temperature=0.2, presence=(0.5, 0.5, 0.8), margin=0.25)
NOISE = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 4), np.uint8)


def found(*lengths: list[float], images: NDArray[np.uint8] = NOISE, calibration: Calibration = CALIBRATION) -> Arrays:
    """Return the findings of images, by default of noise, with capsules of these lengths."""
    rows = np.array(lengths, np.float32)
    return Findings(calibration, rows.shape[1])(np.resize(images, (len(rows), *images.shape[1:])), rows)


def code(*lengths: float, images: NDArray[np.uint8] = NOISE) -> Code:
    return Code.of(int(found(list(lengths), images=images)[CODES][0]))


def test_the_verdicts_have_the_numbers_of_the_protocol() -> None:
    assert {f"VERDICT_{verdict.name}": verdict.value for verdict in Verdict} == dict(pb.Verdict.items())


def test_a_code_is_read_back() -> None:
    for whole in (Code(0, Verdict.OK, Presence.WINNER), Code(731, Verdict.BLANK, Presence.OTHERS)):
        assert Code.of(int(whole)) == whole


def test_the_confidences_are_the_softmax_of_the_lengths_by_the_temperature() -> None:
    lengths = np.random.default_rng(1).random((50, 3))
    exponentials = np.exp(lengths / CALIBRATION.temperature)
    confidences = found(*lengths.tolist())[CONFIDENCES]
    assert confidences.dtype == np.float32
    numbers = np.asarray(confidences, np.float32)
    np.testing.assert_allclose(numbers, exponentials / exponentials.sum(1, keepdims=True), rtol=1e-5)


def test_the_calibration_says_how_many_objects_share_the_confidence() -> None:
    pairs = replace(CALIBRATION, objects=2, arctanh=True)
    confidences = found([0.95, 0.9, 0.1], [0.9, 0.1, 0.1], calibration=pairs)[CONFIDENCES]
    assert confidences.dtype == np.float32
    np.testing.assert_allclose(np.asarray(confidences, np.float32), [[0.5, 0.5, 0], [0.5, 0.25, 0.25]], atol=0.01)


@pytest.mark.parametrize(
    ("lengths", "verdict", "presence"),
    [
        ((0.9, 0.1, 0.1), Verdict.OK, Presence.WINNER),
        ((0.6, 0.2, 0.1), Verdict.OK, Presence.WINNER),
        ((0.6, 0.4, 0.1), Verdict.SUSPICIOUS, Presence.WINNER),
        ((0.6, 0.7, 0.1), Verdict.SEVERAL, Presence.OTHERS),
        ((0.9, 0.5, 0.8), Verdict.SEVERAL, Presence.OTHERS),
        ((0.4, 0.1, 0.1), Verdict.NONE_OF_THESE, Presence.NONE),
        ((0.4, 0.1, 0.79), Verdict.NONE_OF_THESE, Presence.NONE),
        ((0.5, 0.1, 0.79), Verdict.OK, Presence.OTHERS),
        ((0.6, 0.1, 0.79), Verdict.SUSPICIOUS, Presence.OTHERS),
        ((0.1, 0.1, 0.8), Verdict.OK, Presence.WINNER),
    ],
)
def test_the_verdict_follows_from_the_thresholds(
    lengths: tuple[float, ...], verdict: Verdict, presence: Presence
) -> None:
    assert code(*lengths) == (int(np.argmax(lengths)), verdict, presence)


def test_a_blank_image_is_blank_whatever_its_capsules_say() -> None:
    blank = np.zeros((1, 3, 5, 4), np.uint8)
    blank[:] = np.array([10, 20, 30], np.uint8)[:, np.newaxis, np.newaxis]
    for lengths in ((0.9, 0.1, 0.1), (0.9, 0.9, 0.1), (0.1, 0.1, 0.1), (0.6, 0.4, 0.1)):
        assert code(*lengths, images=blank).verdict is Verdict.BLANK
        assert code(*lengths, images=blank)._replace(verdict=Verdict.OK) == code(*lengths)._replace(verdict=Verdict.OK)
    for pixel in np.ndindex(blank.shape):
        nearly = blank.copy()
        nearly[pixel] += 1
        assert code(0.9, 0.1, 0.1, images=nearly).verdict is Verdict.OK


def test_each_image_of_a_batch_has_findings_of_its_own() -> None:
    lengths = np.random.default_rng(2).random((300, 3)).tolist()
    images = np.random.default_rng(3).integers(0, 2, (300, 1, 1, 2), np.uint8)
    together = found(*lengths, images=images)
    alone = [found(one, images=images[index : index + 1]) for index, one in enumerate(lengths)]
    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]))
    assert set(verdicts(together[CODES])) == set(Verdict) - {Verdict.UNSPECIFIED}


def test_a_model_of_one_class_has_no_second_capsule_to_doubt_it() -> None:
    one = found([0.9], [0.1], calibration=replace(CALIBRATION, presence=(0.5,)))
    assert verdicts(one[CODES]).tolist() == [Verdict.OK, Verdict.NONE_OF_THESE]
    np.testing.assert_array_equal(one[CONFIDENCES], 1)


def test_present_classes_come_the_longest_first() -> None:
    lengths = np.array([0.6, 0.1, 0.9, 0.6], np.float32)
    assert present_classes(lengths, lengths >= 0.5) == [2, 0, 3]
    assert found([0.6, 0.7, 0.7])[PRESENT].tolist() == [[True, True, False]]
