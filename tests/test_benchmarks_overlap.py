"""The benchmarks of overlapping digits and of the page's sliders: their figures."""

from itertools import islice

import numpy as np
import pytest

from benchmarks import overlap, sliders


def test_an_overlap_counts_bright_pixels_alone() -> None:
    first, second = np.zeros((2, 4, 4), np.uint8)
    assert overlap.overlap(first, second) == 0
    first[0], second[0, :2], second[1, :2] = 255, 128, 127
    assert overlap.overlap(first, second) == 0.5
    second[1, :2] = 200
    assert overlap.overlap(first, second) == pytest.approx(2 / 6)


def test_pairs_are_two_different_digits_and_the_same_each_time() -> None:
    pairs, again = list(islice(overlap.pairs(), 20)), list(islice(overlap.pairs(), 20))
    for one, other in zip(pairs, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.image.shape == (36, 36) and one.labels[0] != one.labels[1]
        both = np.minimum(one.parts.astype(int).sum(0), 255)
        np.testing.assert_array_equal(one.image, both)


def test_a_row_has_quantiles_of_both_times() -> None:
    row = sliders.row([(float(step), step + 10.0) for step in range(101)])
    assert (row["steps"], row["drawn_p50_ms"], row["drawn_p95_ms"], row["frame_max_ms"]) == (
        101,
        "50.0",
        "95.0",
        "110.0",
    )
