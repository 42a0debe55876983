"""The benchmark of relevance maps: its deletions, and its file of results."""

import csv
from pathlib import Path

import numpy as np

from benchmarks import relevance
from training.model import Field
from training.relevance import capsule_map, without_ink


def test_the_ink_with_the_largest_numbers_is_deleted_and_ties_fall_at_random() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 10:20, 10:20] = np.arange(1, 101).reshape(10, 10)
    order = image[0].astype(np.float32)
    order[0] = 1000
    generator = np.random.default_rng(0)
    left = without_ink(image, order, generator)
    np.testing.assert_array_equal(left[0, 19, 10:20], 0)
    assert (left > 0).sum() == 90 and (image > 0).sum() == 100
    equal = [without_ink(image, np.zeros((28, 28), np.float32), generator) for _ in range(2)]
    assert [(one > 0).sum() for one in equal] == [90, 90] and (equal[0] != equal[1]).any()


def test_a_capsules_number_lies_in_the_middle_of_its_pixels() -> None:
    values = np.zeros((2, 3, 3), np.float32)
    values[:, 1, 2] = 1, 3
    pixels = capsule_map(values, Field(stride=8, size=5, offset=2), 28)
    assert pixels.shape == (28, 28) and pixels.argmax() == 12 * 28 + 20
    assert pixels[12, 20] == 4 and pixels[12, 16] == 2 and pixels[4, 20] == 0


def test_each_map_has_a_row_with_its_interval(tmp_path: Path) -> None:
    file = tmp_path / "relevance.csv"
    assert relevance.main(["--digits", "6", "--choosing", "0", "--results", str(file)]) == 0
    with file.open(newline="") as lines:
        rows = {row["map"]: row for row in csv.DictReader(lines)}
    assert list(rows) == ["relevance", "ink", "contributions", "couplings"]
    for row in rows.values():
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert (row["digits"], row["model"]) == ("6", "capsnet-mnist") and row["device"] and row["commit"]
    assert float(rows["relevance"]["difference"]) > 0.1
