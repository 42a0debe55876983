"""Tests of the runtime: each precision of the embedded model, and the options for ONNX Runtime."""

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.to_fp16 import to_fp16
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import PRECISIONS, Artifact, ArtifactError, digest, find, load, write_manifest
from serving.files.reading import read_whole
from serving.metrics.registry import Metrics
from serving.repository.classifier import open_classifier
from serving.repository.further_graph import FurtherGraph
from serving.repository.served_model import ServedModel
from serving.runtime import (
    Runtime,
    RuntimeSetupError,
    TensorSpec,
    example,
    return_free_memory,
    rows,
    saturates,
)
from serving.settings import Settings
from serving.tensorrt_options import TENSORRT, execution_provider_options
from tests.conftest import ROOT, Digits, Running


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model with fp16 too, which does not come with it, to save space."""
    source = load(find(ROOT / "models", "capsnet-mnist"))
    folder = Path(shutil.copytree(source.folder, tmp_path_factory.mktemp("models") / source.name / source.version))
    onnx.save_model(to_fp16(onnx.load_model(source.file())), folder / "fp16.onnx")
    fp16 = replace(source.variants["fp32"], file="fp16.onnx")
    artifact = replace(
        source,
        folder=folder,
        files=source.files | {fp16.file: digest(folder / fp16.file)},
        variants={**source.variants, "fp16": fp16},
    )
    write_manifest(artifact)
    return artifact


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_the_embedded_model_makes_the_errors_of_its_certificate(
    precision: str, digits: Digits, complete: Artifact
) -> None:
    artifact = load(complete.folder)
    weights = artifact.weights(artifact.variant(precision))
    runtime = Runtime(artifact.file(precision), "cpu", quantized=precision == "int8", weights=weights)
    images = digits.images[:, None]
    parts = [runtime.run({"images": images[start : start + 250]}) for start in range(0, len(images), 250)]
    classes = np.concatenate([part["probabilities"].argmax(1) for part in parts])
    errors = int((classes != digits.labels).sum())
    # Another processor may round the last digit differently, and two classes may be almost equal.
    assert abs(errors - artifact.variants[precision].test_errors) <= (0 if precision == "fp32" else 3)


def test_a_runtime_opens_any_graph_and_tells_its_inputs_and_outputs(digits: Digits) -> None:
    artifact = load(find(ROOT / "models", "capsnet-mnist"))
    explain = artifact.graphs["explain"]
    field = explain.receptive_field
    assert field
    capsules = field.types * field.grid**2
    runtime = Runtime(artifact.folder / explain.file, "cpu", weights=artifact.weights(explain))
    byte, real = np.dtype(np.uint8), np.dtype(np.float32)
    assert runtime.inputs == {"images": TensorSpec(byte, (1, 28, 28))}
    assert runtime.outputs == {
        "probabilities": TensorSpec(real, (10,)),
        "poses": TensorSpec(real, (10, 16)),
        "couplings": TensorSpec(real, (3, 10, capsules)),
        "agreements": TensorSpec(real, (3, 10, capsules)),
        "contributions": TensorSpec(real, (10, capsules)),
        "primary_lengths": TensorSpec(real, (capsules,)),
    }
    outputs = runtime.run({"images": digits.images[:3, None]})
    assert {name: array.shape for name, array in outputs.items()} == {
        "probabilities": (3, 10), "poses": (3, 10, 16), "couplings": (3, 3, 10, capsules),
        "agreements": (3, 3, 10, capsules), "contributions": (3, 10, capsules), "primary_lengths": (3, capsules),
    }  # fmt: skip
    (classified,) = [Runtime(artifact.file(), "cpu").run({"images": digits.images[:3, None]})["poses"]]
    np.testing.assert_allclose(np.asarray(outputs["poses"], float), np.asarray(classified, float), atol=1e-5)


def test_a_runtime_takes_several_inputs_of_different_types(tmp_path: Path) -> None:
    pose = onnx.helper.make_tensor_value_info("pose", onnx.TensorProto.FLOAT, ["batch", 4])
    number = onnx.helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["batch"])
    picked = onnx.helper.make_tensor_value_info("picked", onnx.TensorProto.FLOAT, ["batch", 1])
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["class", "axis"], ["index"]),
        onnx.helper.make_node("GatherElements", ["pose", "index"], ["picked"], axis=1),
    ]
    axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph = onnx.helper.make_graph(nodes, "pick", [pose, number], [picked], [axis])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save_model(model, tmp_path / "pick.onnx")

    runtime = Runtime(tmp_path / "pick.onnx", "cpu")

    assert runtime.inputs == {
        "pose": TensorSpec(np.dtype(np.float32), (4,)),
        "class": TensorSpec(np.dtype(np.int64), ()),
    }
    poses = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = runtime.run({"pose": poses, "class": np.array([1, 3])})
    np.testing.assert_array_equal(np.asarray(outputs["picked"], float), [[1], [7]])
    arrays = example(runtime.inputs, 5, np.random.default_rng(0))
    assert rows(arrays) == 5 and len(runtime.run(arrays)["picked"]) == 5, "made-up inputs can be computed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f\n", True),
        ("flags : fpu avx2 avx512f avx512_vnni\n", False),
        ("flags : fpu avx2 avx_vnni\n", False),
        ("Features : fp asimd\n", False),
    ],
    ids=["avx2", "avx512-vnni", "avx-vnni", "arm"],
)
def test_a_processor_without_vnni_is_known_by_its_flags(tmp_path: Path, text: str, expected: bool) -> None:
    info = tmp_path / "cpuinfo"
    assert not saturates(info)
    info.write_text(text)
    assert saturates(info) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_server_tells_the_precision_it_serves(
    start: Callable[..., Running], precision: str, digits: Digits, complete: Artifact
) -> None:
    running = start(precision=precision, models=str(complete.folder.parent.parent))
    described = running.stub.GetModel(pb.GetModelRequest(), timeout=20)
    assert described.precision == precision
    assert described.sha256 == running.model.artifact.sha256(precision)
    assert described.test_errors == running.model.artifact.variants[precision].test_errors
    image = pb.Image(pixels=digits.images[0].tobytes())
    assert running.classify(image).results[0].label == str(digits.labels[0])


class FakeSession:
    """A session of the first provider that answers blank images. It remembers the arguments of its construction."""

    made: ClassVar[list[tuple[str, list[Any]]]] = []

    def __init__(self, file: str, options: Any, providers: list[Any]) -> None:
        self.made.append((file, providers))
        self.providers = [one if isinstance(one, str) else one[0] for one in providers]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> list[Any]:
        return [self._tensor("images", "tensor(uint8)", ["batch", 1, 28, 28])]

    def get_outputs(self) -> list[Any]:
        return [
            self._tensor("probabilities", "tensor(float)", ["batch", 10]),
            self._tensor("poses", "tensor(float)", ["batch", 10, 16]),
        ]

    @staticmethod
    def _tensor(name: str, kind: str, shape: list[Any]) -> Mock:
        tensor = Mock(type=kind, shape=shape)
        tensor.name = name
        return tensor

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        count = len(inputs["images"])
        return [np.zeros((count, 10), np.float32), np.zeros((count, 10, 16), np.float32)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_gets_the_manifests_batches_and_keeps_each_graphs_engines_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, complete: Artifact
) -> None:
    fake = Mock(__version__="1.31", InferenceSession=FakeSession)
    fake.get_available_providers.return_value = [TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("serving.runtime.onnxruntime", lambda: fake)
    artifact = complete

    runtime = open_classifier(artifact, "tensorrt", 0, precision, tmp_path)

    assert runtime.provider == TENSORRT
    assert not runtime.fell_back
    file, (first, *others) = FakeSession.made[-1]
    folder = tmp_path / artifact.sha256(precision)
    # Not its bytes, since the cache key is the file; and a copy, since the file may change after its verification.
    assert file == str(folder / artifact.file(precision).name)
    assert Path(file).read_bytes() == artifact.file(precision).read_bytes()
    assert others == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert folder.is_dir()
    profile = artifact.batches
    assert first == (
        TENSORRT, execution_provider_options(profile, artifact.image_shape, folder, fp16=precision == "fp16"),
    )  # fmt: skip


def test_tensorrt_that_is_not_there_is_an_error_and_no_silent_fallback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeSetupError, match=r"device tensorrt was asked for, but this ONNX Runtime has only .*CPU"):
        open_classifier(load(find(ROOT / "models", "capsnet-mnist")), "tensorrt", 0, "fp32", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Mock(__version__="1.31", InferenceSession=FakeSession)
    fake.get_available_providers.return_value = [TENSORRT, "CPUExecutionProvider"]
    monkeypatch.setattr("serving.runtime.onnxruntime", lambda: fake)
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeSetupError, match="cannot be made: Not a directory; engine_cache names another"):
        open_classifier(load(find(ROOT / "models", "capsnet-mnist")), "tensorrt", 0, "fp32", tmp_path / "file")


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Mock(__version__="1.31", InferenceSession=FakeSession)
    fake.get_available_providers.return_value = [TENSORRT, "CPUExecutionProvider"]
    monkeypatch.setattr("serving.runtime.onnxruntime", lambda: fake)
    artifact = load(find(ROOT / "models", "capsnet-mnist"))
    (tmp_path / artifact.sha256() / "model.onnx").mkdir(parents=True)
    with pytest.raises(RuntimeSetupError, match="cannot be written: Is a directory; engine_cache names another"):
        open_classifier(artifact, "tensorrt", 0, "fp32", tmp_path)


def test_a_batch_beyond_tensorrts_profile_is_refused_before_anything_is_built() -> None:
    with pytest.raises(RuntimeSetupError, match="max_batch: 33; this model was exported for batches of up to 32"):
        ServedModel(find(ROOT / "models", "capsnet-mnist"), Settings(device="tensorrt", max_batch=33), Metrics())


def test_weights_are_read_from_the_named_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load(find(ROOT / "models", "capsnet-mnist"))
    file, weights = artifact.folder / artifact.graphs["explain"].file, artifact.weights(artifact.graphs["explain"])
    assert weights == artifact.file()
    assert {"probabilities", "poses", "couplings"} < Runtime(file, "cpu", weights=weights).outputs.keys()
    monkeypatch.chdir(artifact.folder)  # the folder in which ONNX Runtime would look for them
    (tmp_path / "model.onnx").write_bytes(artifact.file().read_bytes()[:1000])
    (tmp_path / "other").write_bytes(artifact.file().read_bytes())
    for wrong in (None, tmp_path / "model.onnx", tmp_path / "other"):
        with pytest.raises(RuntimeSetupError, match="ONNX Runtime cannot load it"):
            Runtime(file, "cpu", weights=wrong)


def test_weights_outside_the_verified_file_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "capsnet-mnist" / "1"
    shutil.copytree(find(ROOT / "models", "capsnet-mnist"), folder)
    model = onnx.load_model(folder / "model.onnx")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    artifact = load(find(ROOT / "models", "capsnet-mnist"))
    with pytest.raises(RuntimeSetupError, match="ONNX Runtime cannot load it"):
        Runtime(replace(artifact, folder=folder).file(), "cpu")


@pytest.fixture
def copied(tmp_path: Path) -> Artifact:
    """A verified copy of the embedded model."""
    return load(Path(shutil.copytree(find(ROOT / "models", "capsnet-mnist"), tmp_path / "capsnet-mnist" / "1")))


@pytest.mark.parametrize("name", ["model.onnx", "int8.onnx"])
def test_a_file_that_is_swapped_after_its_verification_is_not_opened(copied: Artifact, name: str) -> None:
    (copied.folder / name).write_bytes((copied.folder / "explain.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=rf"/{re.escape(name)}: SHA-256 is .*, manifest\.json says "):
        open_classifier(copied, "cpu", 1, "int8")  # which has its weights in model.onnx


def test_the_weights_of_a_further_graph_that_are_swapped_are_not_opened(copied: Artifact) -> None:
    graph = FurtherGraph("explain", copied, Settings())
    copied.file().write_bytes(bytes(copied.file().stat().st_size))
    with pytest.raises(ArtifactError, match=r"/model\.onnx: SHA-256 is .*, manifest\.json says "):
        graph.open(1)


def test_the_bytes_that_were_compared_are_those_that_are_opened(
    copied: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_swap(path: Path, root: Path, max_bytes: int, setting: str) -> bytes:
        content = read_whole(path, root, max_bytes, setting)
        path.write_bytes(b"another file")
        return content

    monkeypatch.setattr("serving.artifact.read_whole", read_and_swap)
    assert open_classifier(copied, "cpu", 1, "int8").inputs.keys() == {"images"}


@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "link", "../models/../secret"])
def test_weights_are_not_read_from_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to("../secret")
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.format(folder=tmp_path))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("given", "sum")]
    add = helper.make_node("Add", ["given", "weight"], ["sum"])
    graph = helper.make_graph([add], "graph", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "models" / "model.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(RuntimeSetupError, match="ONNX Runtime cannot load it"):
        Runtime(tmp_path / "models" / "model.onnx", "cpu")


def test_memory_is_returned_where_the_c_library_can_and_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    return_free_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_free_memory()


_FREED_BLOCKS = """
import os
from pathlib import Path
from serving.runtime import keep_little_free_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_little_free_memory(2**16)
bytearray(2**24)  # by default, glibc keeps blocks of up to this size from now on
before = resident_mib()
blocks = []
for _ in range(400):
    blocks.append(bytearray(2**17))
    blocks.append(bytes(1000))
blocks[::2] = [None] * 400
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have ways of their own")
def test_freed_blocks_of_large_messages_go_back_to_the_system() -> None:
    command = [sys.executable, "-c", _FREED_BLOCKS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(printed) < 25  # of 50 MiB
