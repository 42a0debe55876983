"""Tests of the manifest, and of the faults with which the server refuses to start."""

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from serving.artifact import (
    MANIFEST,
    MANIFEST_DIGEST,
    ArtifactError,
    Graph,
    Training,
    files_named_by,
    find,
    is_name,
    is_version,
    load,
    manifest,
    write_manifest,
)
from serving.files.reading import RefusedFile, read_whole
from tests.conftest import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find(ROOT / "models", "capsnet-mnist"), tmp_path / "capsnet-mnist" / "1"))


def write(folder: Path, text: str) -> None:
    """Write a manifest with its digest."""
    (folder / MANIFEST).write_text(text)
    (folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")


def test_the_embedded_model_is_sound(copy: Path) -> None:
    artifact = load(copy)
    assert (artifact.name, artifact.version) == ("capsnet-mnist", "1")
    assert artifact.training.figures["test_errors"] == len(artifact.training.figures["test_mistakes"])
    assert artifact.test_error() == "0.26 % (26 of 10000)"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], "other", "format is not capsnet-artifact-2"),
        (["name"], 5, "name is 5; expected the name of its folder"),
        (["version"], "7", "version is '7'; expected the name of its folder"),
        (["labels"], ["a", "a"], "labels is ('a', 'a'); expected different texts"),
        (["labels"], [], "labels is (); expected different texts"),
        (["labels"], None, "labels is (); expected different texts"),
        (
            ["inputs", "images", "shape"],
            [None, 2, 28, 28],
            "inputs.images.shape is (2, 28, 28); expected 1 or 3 channels",
        ),
        (["inputs", "images", "shape"], [None, 1, "28", 28], "expected 1 or 3 channels, and a height and a width"),
        (["inputs", "images", "shape"], [28, 28], "inputs.images.shape is [28, 28]; expected a list of 4 sizes"),
        (["outputs", "poses", "shape"], [None, 10, 0], "outputs.poses.shape[2] is 0; expected a whole number above 0"),
        (["training", "dataset"], 3, "training.dataset is 3; expected a text"),
        (["variants", "fp16"], {"file": "fp16.onnx"}, "variants.fp16.test_images is None"),
        (["variants", "fp32", "test_images"], 0, "variants.fp32.test_images is 0"),
        (["variants", "fp32", "test_images"], 2**40, "variants.fp32.test_images is 1099511627776"),
        (["variants", "int8", "test_errors"], -1, "variants.int8.test_errors is -1"),
        (["variants", "int8", "test_errors"], True, "variants.int8.test_errors is True"),
        (["variants", "int8", "file"], ["int8.onnx"], "variants.int8.file is ['int8.onnx']; expected a text"),
        (["variants", "int8", "file"], {}, "variants.int8.file is {}; expected a text"),
        (["files", "a\0b"], {"sha256": "0"}, "expected names without folders"),
        (["files", "\ud800"], {"sha256": "0"}, "expected names without folders"),
        (["labels"], "0123456789", "labels is (); expected different texts"),
        (["labels"], ["\ud800"], "expected different texts"),
        (["training", "dataset"], "\ud800", "expected a text"),
        (["files"], {"../model.onnx": {"sha256": "0"}}, "files is ['../model.onnx']; expected names without folders"),
        (["files"], {}, "files has no digest of decoder.onnx, explain.onnx, int8.onnx, model.onnx"),
        (["variants", "int8", "weights"], "other.onnx", "files has no digest of other.onnx"),
        (["graphs", "explain", "weights"], "other.onnx", "files has no digest of other.onnx"),
        (["graphs", "explain", "weights"], 3, "graphs.explain.weights is 3; expected a text"),
        (["files"], None, "files is None; expected an object"),
        (["variants"], {}, "variants is []; expected fp32"),
        (
            ["variants"],
            {"fp32": {"file": "model.onnx"}, "fp8": {"file": "model.onnx"}},
            "expected fp32, and of fp32, int8",
        ),
        (["tensorrt", "batches"], {"min": 1, "opt": 9, "max": 8}, "tensorrt.batches is {'min': 1, 'opt': 9, 'max': 8}"),
        (["tensorrt", "batches"], {"min": 1, "max": 8}, "expected min, opt and max"),
        (["variants", "int8"], 3, "variants.int8 is 3; expected an object"),
        (
            ["variants", "int8", "max_pose_difference"],
            "0",
            "variants.int8.max_pose_difference is '0'; expected a number",
        ),
        (["variants", "int8", "tolerance"], {"difference": "0"}, "variants.int8.tolerance.difference is '0'"),
        (["variants", "int8", "rounded"], {"test_errors": "0"}, "variants.int8.rounded.test_errors is '0'"),
        (["graphs", "explain", "file"], None, "graphs.explain.file is None; expected a text"),
        (["graphs", "explain", "receptive_field", "grid"], 0, "graphs.explain.receptive_field.grid is 0"),
        (["graphs", "explain", "receptive_field", "offset"], 0.5, "graphs.explain.receptive_field.offset is 0.5"),
        (["graphs", "explain", "receptive_field", "offset"], 2**31, "graphs.explain.receptive_field.offset is 2147"),
        (["calibration", "temperature"], 1e-320, "calibration.temperature is 1e-320; expected a number from 1e-06"),
        (["calibration", "temperature"], float("inf"), "calibration.temperature is inf; expected a number from 1e-06"),
        (["calibration", "temperature"], float("nan"), "calibration.temperature is nan; expected a number from 1e-06"),
        (["calibration", "margin"], float("nan"), "calibration.margin is nan; expected a number from 0 to 1"),
        (["calibration", "presence"], [0.5] * 9, "expected 10 numbers from 0 to 1"),
        (["calibration", "presence"], [float("nan")] * 10, "expected 10 numbers from 0 to 1"),
        (["calibration", "objects"], 0, "calibration.objects is 0; expected a whole number above 0"),
        (["calibration", "objects"], 11, "calibration.objects is 11; expected a whole number up to the number of clas"),
        (["calibration", "objects"], 1.5, "calibration.objects is 1.5; expected a whole number above 0"),
        (["calibration", "arctanh"], 1, "calibration.arctanh is 1; expected true or false"),
        (["preparation", "centred_by_mass"], 1, "preparation.centred_by_mass is 1; expected true or false"),
        (["preparation", "polarity"], "bright", "preparation.polarity is 'bright'"),
        (["preparation", "object_size"], 2**40, "preparation.object_size is 1099511627776"),
        (["training", "figures"], [], "training.figures is []; expected an object"),
    ],
)
def test_a_wrong_field_is_reported_by_name(copy: Path, keys: list[str], value: Any, message: str) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    write(copy, json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        load(copy)
    assert str(caught.value).startswith(str(copy))
    assert message in str(caught.value)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_manifest_is_read_and_written_without_loss(copy: Path, padding: int) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    if padding:  # the first capsule's receptive field begins outside the image
        content["graphs"]["explain"]["receptive_field"]["offset"] = -padding
        content["variants"]["fp32"]["rounded"] = {"max_pose_difference": 0.25, "labels_changed": 2}
        for entry in (content["variants"]["fp32"], content["graphs"]["explain"]):
            entry["double_precision"] = {"images": 3, "max_distance": 2e-5}
        write(copy, json.dumps(content))
    artifact = load(copy)
    assert manifest(artifact) == content
    write_manifest(artifact)
    assert load(copy) == artifact


def test_an_older_manifest_and_one_with_fields_that_are_not_known_are_read(copy: Path) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    needed = ("file", "test_errors", "test_images")
    content["variants"] = {
        precision: {name: variant[name] for name in needed} for precision, variant in content["variants"].items()
    }
    content["graphs"] = {"explain": {"file": "explain.onnx", "colour": "red"}}
    content["training"] = {"dataset": "mnist", "teacher": {"name": "x"}}
    content["calibration"] = {
        name: content["calibration"][name] for name in ("temperature", "presence", "margin", "false_alarms")
    }
    content["more"] = [1]
    write(copy, json.dumps(content))
    artifact = load(copy)
    assert artifact.test_error("int8") == "0.26 % (26 of 10000)"
    assert artifact.graphs == {"explain": Graph("explain.onnx")}
    assert artifact.calibration and (artifact.calibration.objects, artifact.calibration.arctanh) == (1, False)
    assert artifact.training == Training("mnist")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    write(copy, text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        load(copy)


def test_the_digests_are_those_that_sha256sum_reckons(copy: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST_DIGEST], cwd=copy, check=True, capture_output=True)
    for name, sha256 in load(copy).files.items():
        assert hashlib.sha256((copy / name).read_bytes()).hexdigest() == sha256


def files() -> list[str]:
    return sorted(path.name for path in find(ROOT / "models", "capsnet-mnist").iterdir())


@pytest.mark.parametrize("name", files())
def test_one_changed_byte_in_any_file_is_found_when_the_model_is_loaded(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    before = hashlib.sha256(content).hexdigest()
    for position in (0, len(content) // 2, len(content) - 1):
        content[position] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(ArtifactError) as caught:
            load(copy)
        content[position] ^= 1
        message = str(caught.value)
        if name == MANIFEST_DIGEST:
            assert str(copy / MANIFEST) in message
            assert MANIFEST_DIGEST in message
        else:
            assert message.startswith(f"{copy / name}: SHA-256 is ")
            assert before in message
            assert len(re.findall(r"\b[0-9a-f]{64}\b", message)) == 2


@pytest.mark.parametrize("name", files())
def test_a_missing_file_is_reported_by_name(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(str(copy / name))):
        load(copy)


def test_a_missing_precision_is_reported_with_those_that_exist(copy: Path) -> None:
    content = json.loads((copy / MANIFEST).read_text())
    del content["variants"]["int8"]
    write(copy, json.dumps(content))
    artifact = load(copy)
    assert artifact.file() == artifact.file("fp32") == copy / "model.onnx"
    with pytest.raises(ArtifactError, match=r"has no graph in int8; there is: fp32$"):
        artifact.file("int8")


def test_a_file_that_changes_after_it_was_verified_is_not_read(copy: Path) -> None:
    artifact = load(copy)
    assert artifact.read(artifact.file()) == artifact.file().read_bytes()
    artifact.file().write_bytes(b"another file")
    with pytest.raises(ArtifactError, match=r"model\.onnx: SHA-256 is .*, manifest\.json says "):
        artifact.read(artifact.file())


@pytest.mark.parametrize("name", files())
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)}: not readable: not a regular file"):
        load(copy)
    assert files_named_by(copy / MANIFEST) == ([] if name == MANIFEST else [*json_files(copy)])


def json_files(folder: Path) -> list[str]:
    """Return the names of the files in a manifest."""
    return list(json.loads((folder / MANIFEST).read_text())["files"])


def test_a_link_out_of_the_repository_is_refused(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.move(copy / "model.onnx", outside)
    (copy / "model.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"model\.onnx: not readable: a link that leads out of the repository"):
        load(copy)


@pytest.mark.parametrize("level", ["version", "name"])
def test_a_folder_that_is_a_link_out_of_the_repository_is_refused(copy: Path, tmp_path: Path, level: str) -> None:
    repository = tmp_path / "repository"
    folder = repository / "capsnet-mnist" / "1"
    link, target = (folder, copy) if level == "version" else (folder.parent, copy.parent)
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(ArtifactError, match="not readable: a link that leads out of the repository"):
        load(folder)


def test_links_inside_the_repository_and_to_it_are_followed(copy: Path, tmp_path: Path) -> None:
    """Kubernetes mounts files as links into a hidden folder beside them."""
    (copy / "..data").mkdir()
    for name in files():
        (copy / name).rename(copy / "..data" / name)
        (copy / name).symlink_to(f"..data/{name}")
    link = tmp_path / "link"
    link.symlink_to(copy.parent.parent)
    artifact = load(link / "capsnet-mnist" / "1")
    assert len(artifact.read(artifact.file())) == (copy / "..data" / "model.onnx").stat().st_size


def test_a_link_to_itself_is_refused(copy: Path) -> None:
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx: not readable: "):
        load(copy)


def test_a_file_above_the_limit_is_refused_before_it_is_read(copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.truncate(2**40)  # it takes no room, but hours to read
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: not readable: 1099511627776 bytes; the limit is 2147483648 bytes"
    ):
        load(copy)
    with (copy / MANIFEST).open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not readable: .* bytes; the limit is 16777216 bytes$"):
        load(copy)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    assert read_whole(file, tmp_path, 10) == bytes(10)
    with pytest.raises(RefusedFile, match=r"10 bytes; the limit is 9 bytes$"):
        read_whole(file, tmp_path, 9)
    file.write_bytes(bytes(100))
    before = os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, 10, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: before)
    with pytest.raises(RefusedFile, match="it grew while it was read"):
        read_whole(file, tmp_path, 16)


def test_the_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    tracemalloc.start()
    assert read_whole(tmp_path / "file", tmp_path, 2**31) == bytes(10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("capsnet-mnist", True), ("mödel 1.0_b", True), ("x" * 128, True), ("x" * 129, False), ("", False),
        ("..", False), (".hidden", False), ("a\nb", False), ("a\x1b[31m", False), ("a\u202eb", False),
        ("\udcff", False),
    ],
)  # fmt: skip
def test_a_models_name_is_printable(text: str, good: bool) -> None:
    assert is_name(text) == good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0", True), ("12", True), ("9" * 18, True), ("9" * 19, False), ("", False), ("01", False), ("-1", False),
        ("1\n", False), ("\u0661", False), ("1.0", False), ("..", False),
    ],
)  # fmt: skip
def test_a_version_is_a_number_with_one_spelling(text: str, good: bool) -> None:
    assert is_version(text) == good
