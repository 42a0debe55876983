"""Tests of the model cards: they say what the manifests say."""

from dataclasses import replace
from pathlib import Path

import pytest

from export.model_card import card, main
from serving.artifact import Artifact, load
from tests.conftest import ROOT

VERSIONS = sorted((ROOT / "models").glob("*/[0-9]*"))
SECTIONS = ["Use", "Limits", "Data", "Training", "Metrics", "Calibration", "Other images"]


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return load(ROOT / "models" / "capsnet-mnist-accurate" / "1")


def sections(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.parent.name)
def test_each_network_has_the_card_of_its_manifest(folder: Path) -> None:
    artifact = load(folder)
    text = (folder.parent / "README.md").read_text()
    assert text == card(artifact), "run: make cards"
    assert sections(text) == SECTIONS
    assert artifact.test_error() in text
    assert f"({artifact.version}/CERTIFICATE.md)" in text and (folder / "CERTIFICATE.md").is_file()


def test_the_parameters_of_network_and_decoder_are_counted_apart(artifact: Artifact) -> None:
    assert "| parameters | 398,720, and 1,411,344 of the decoder |" in card(artifact)
    config = {**artifact.training.config, "decoder_widths": []}
    without = replace(artifact, training=replace(artifact.training, config=config))
    assert "| parameters | 1,810,064, and 0 of the decoder |" in card(without)


def test_a_network_of_other_images_promises_nothing_about_digits(artifact: Artifact) -> None:
    other = replace(
        artifact, labels=("cat", "dog"), training=replace(artifact.training, dataset="pets"), calibration=None
    )
    text = card(other)
    assert "| classes | cat, dog |" in text and "datasets: [pets]" in text
    assert "digit" not in text
    assert sections(text) == SECTIONS[:5]


def test_a_folder_that_is_no_artifact_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "model" / "1")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
