"""Tests of the benchmark of conversions: it compares all conversions, and names those that it could not run."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

from benchmarks import conversions
from benchmarks.conversions import CONVERSIONS, FIRST, OURS_FP16, OURS_INT8
from tests.graphs import STEM, exported, random_images
from training.data.datasets import Dataset


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Undo that the command silences all logs of its process."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = random_images(STEM, 40), torch.arange(40) % 10
    dataset = Dataset("mnist", tuple("0123456789"), images, labels, images[:20], labels[:20])
    monkeypatch.setattr(conversions, "load_or_exit", lambda *_: dataset)


def test_every_conversion_is_measured_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "model.onnx", tmp_path / "figures.csv"
    onnx.save_model(exported(STEM), file)
    assert conversions.main([str(file), "--rounds", "1", "--batches", "2", "--images", "10", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    with out.open(newline="") as stream:
        rows = {row["variant"]: row for row in csv.DictReader(stream)}
    assert rows.keys() >= {FIRST, OURS_INT8, OURS_FP16}
    for name in CONVERSIONS:
        assert name in rows or f"{name}: not run, " in printed.err
    assert rows[FIRST]["labels_changed"] == "0"
    assert float(rows[FIRST]["max_pose_difference"]) == 0
    assert int(rows[OURS_INT8]["bytes"]) < int(rows[FIRST]["bytes"])
    assert rows[OURS_FP16]["max_pose_difference_rounded"] != rows[OURS_FP16]["max_pose_difference"]
    assert rows[OURS_INT8]["max_pose_difference_rounded"] == ""
    assert all(row["not_finite"] == "0" and float(row["images_per_second_2"]) > 0 for row in rows.values())
