"""The manifest: what serving refuses to start with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.artifact import MANIFEST, ArtifactError, find, load
from tests.conftest import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find(ROOT / "models"), tmp_path / "capsnet-mnist" / "1"))


def test_the_embedded_model_is_sound(copy: Path) -> None:
    artifact = load(copy)
    assert (artifact.name, artifact.version) == ("capsnet-mnist", "1")
    assert artifact.training["figures"]["test_errors"] == len(artifact.training["figures"]["test_mistakes"])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], "other", "format is not capsnet-artifact-1"),
        (["name"], 5, "name is 5; expected the name of its folder"),
        (["version"], "7", "version is '7'; expected the name of its folder"),
        (["labels"], ["a", "a"], "labels is ('a', 'a'); expected different texts"),
        (["labels"], [], "labels is (); expected different texts"),
        (["labels"], None, "a field is missing or malformed"),
        (
            ["inputs", "images", "shape"],
            [None, 2, 28, 28],
            "inputs.images.shape is (2, 28, 28); expected 1 or 3 channels",
        ),
        (["inputs", "images", "shape"], [None, 1, "28", 28], "expected 1 or 3 channels, and a height and a width"),
        (["inputs", "images", "shape"], [28, 28], "a field is missing or malformed"),
        (["outputs", "poses", "shape"], [None, 10, 0], "outputs.poses.shape[2] is 0; expected a whole number above 0"),
        (["training", "dataset"], 3, "training.dataset is 3; expected a text"),
        (["training", "figures"], {}, "training.figures.test_images is None"),
        (["training", "figures", "test_images"], 0, "training.figures.test_images is 0"),
        (["training", "figures", "test_errors"], -1, "training.figures.test_errors is -1"),
        (["files", "model.onnx", "sha256"], "0", "the manifest says 0"),
    ],
)
def test_a_wrong_field_is_told_by_name(copy: Path, keys: list[str], value: Any, message: str) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        load(copy)
    assert str(caught.value).startswith(str(copy))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        load(copy)
