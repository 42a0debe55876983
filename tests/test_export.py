"""Tests of the export: the graph, its parity with PyTorch, and the files on the disk."""

import copy
import hashlib
import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import __main__ as command
from export.artifact_writer import ArtifactWriter
from export.build import calibration_images, export_checkpoint
from export.certificate import CERTIFICATE, certificate
from export.graph import (
    BATCH,
    Explanation,
    GraphError,
    check,
    decoder_signature,
    explain_signature,
    receptive_field,
    served_signature,
)
from export.options import Choices
from export.to_int8_weights import to_int8_weights
from export.to_onnx import to_onnx
from export.to_tensorrt import TensorRTMissing
from export.triton import TritonError
from export.verify import (
    BATCHES,
    ParityError,
    Prediction,
    Reference,
    certify,
    certify_decoder,
    certify_explanation,
    edge_images,
    reference,
)
from serving import artifact as artifacts
from serving.artifact import MANIFEST, MANIFEST_DIGEST, MODEL, Artifact, Graph, Training, Variant
from serving.runtime import Arrays, Runtime, onnxruntime, rows
from serving.tensorrt_options import BatchProfile
from tests import graphs
from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint, CheckpointError
from training.data import datasets
from training.data.datasets import Dataset
from training.data.sources import DatasetError
from training.evaluate import predict
from training.model import CONFIGS, CapsNet, CapsNetConfig, to_pixels
from training.run_folder import TENSORS_FILE, checkpoint_path

TINY = CapsNetConfig(conv_channels=8, primary_types=2, decoder_widths=(4,))
BARE = graphs.TINY
NAME = "capsnet-mnist"


def random_network(config: CapsNetConfig) -> CapsNet:
    """Return a network whose poses are as long as a trained network's, so that differences are visible."""
    torch.manual_seed(0)
    network = CapsNet(config).eval()
    with torch.no_grad():
        network.weight.mul_(10)
    return network


def random_images(config: CapsNetConfig, count: int) -> Tensor:
    shape = (count, config.image_channels, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def unverified(model: onnx.ModelProto, config: CapsNetConfig, folder: Path) -> Artifact:
    """Return an artifact with this graph for ``Runtime``."""
    onnx.save_model(model, folder / MODEL)
    return Artifact(
        folder=folder,
        name=NAME,
        version="1",
        labels=tuple(str(label) for label in range(config.classes)),
        image_shape=(config.image_channels, config.image_size, config.image_size),
        pose_size=config.digit_dim,
        files={MODEL: artifacts.digest(folder / MODEL)},
        variants={"fp32": Variant(MODEL)},
        graphs={},
        batches=BatchProfile(1, 8, 32),
        training=Training("mnist"),
    )


FILES = {
    "to_onnx": MODEL,
    "to_int8": "int8.onnx",
    "to_fp16": "fp16.onnx",
    "explanation_to_onnx": "explain.onnx",
    "decoder_to_onnx": "decoder.onnx",
}
IMAGES = random_images(TINY, 20)
LABELS = torch.arange(20) % TINY.classes
DATASET = Dataset("mnist", tuple("0123456789"), random_images(TINY, 300), torch.arange(300) % 10, IMAGES, LABELS)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.verify._MIN_TIMED_SECONDS", 0.0)
        patch.setattr("export.unknown_images.OTHERS", {})  # to read another data set takes a second
        yield


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    """A checkpoint of an untrained network, with the figures that its weights have."""
    network = random_network(TINY)
    errors = int((predict(network, IMAGES)[0].argmax(1) != LABELS).sum())
    return Checkpoint(
        config=TINY,
        dataset="mnist",
        labels=tuple("0123456789"),
        recipe={"epochs": 1, "seed": 1},
        figures={"test_errors": errors, "test_images": len(LABELS), "commit": "abc"},
        state_dict=network.state_dict(),
    )


@pytest.fixture(scope="module")
def exported(trained: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    export = export_checkpoint(trained, DATASET, tmp_path_factory.mktemp("models"), NAME, "1")
    assert not export.failures
    return export.artifact


@pytest.fixture(scope="module")
def expected(trained: Checkpoint) -> Reference:
    return reference(trained.model(), IMAGES, LABELS)


@pytest.fixture(scope="module")
def graph(exported: Artifact) -> onnx.ModelProto:
    return onnx.load_model(exported.file())


@pytest.fixture
def tampered(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph that a test may change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, exported: Artifact) -> Callable[..., None]:
    """A function that replaces conversions, by their names, by the finished graphs, since the exporter takes seconds.

    The export still compares each graph with the network.
    """

    def replace_all(*names: str) -> None:
        for name in names:
            ready = onnx.load_model(exported.folder / FILES[name])
            monkeypatch.setattr(f"export.build.{name}", lambda *_, ready=ready: _copy(ready))

    return replace_all


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


@pytest.fixture
def ready_made(finished: Callable[..., None]) -> None:
    """Replace all conversions by the finished graphs, for tests of later steps."""
    finished(*FILES)


def test_the_manifest_reports_the_parity_of_all_test_and_edge_images(exported: Artifact) -> None:
    parity = exported.variants["fp32"]
    assert parity.images == len(IMAGES) + len(edge_images(1, 28))
    assert parity.labels_changed == 0
    assert 0 < parity.mean_probability_difference <= parity.max_probability_difference <= 1e-5
    assert 0 < parity.mean_pose_difference <= parity.max_pose_difference <= 1e-5
    assert parity.reference == f"PyTorch {torch.__version__}"
    assert parity.runtime.startswith("ONNX Runtime ")
    assert parity.provider == "CPUExecutionProvider"


def test_serving_loads_an_exported_artifact(exported: Artifact) -> None:
    assert artifacts.load(exported.folder) == exported
    graphs = [f"{name}.onnx" for name in ("decoder", "explain", "fp16", "int8", "model")]
    assert sorted(path.name for path in exported.folder.iterdir()) == sorted(
        [CERTIFICATE, MANIFEST, MANIFEST_DIGEST, TENSORS_FILE, *graphs]
    )
    assert len({path.stat().st_mode for path in exported.folder.iterdir()}) == 1


def test_the_weights_of_an_artifact_are_stored_once(exported: Artifact, graph: onnx.ModelProto) -> None:
    whole = exported.file().read_bytes()
    for name in ("int8", "explain"):
        entry: Variant | Graph = exported.variants[name] if name == "int8" else exported.graphs[name]
        assert entry.weights == MODEL
        bare = onnx.load_model(exported.folder / entry.file, load_external_data=False)
        shared = [tensor for tensor in bare.graph.initializer if tensor.external_data]
        assert shared
        for tensor in shared:
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(place["offset"]), int(place["length"])
            assert place["location"] == MODEL
            assert length == 4 * np.prod(tensor.dims)
            (same,) = (own for own in graph.graph.initializer if own.name == tensor.name)
            assert whole[offset : offset + length] == same.raw_data
    assert (exported.folder / "explain.onnx").stat().st_size < exported.file().stat().st_size / 4
    assert exported.variants["fp32"].weights == exported.variants["fp16"].weights == ""
    assert (
        "weights of `int8.onnx` and `explain.onnx` are stored in `model.onnx` alone"
        in (exported.folder / CERTIFICATE).read_text()
    )


def test_a_graph_with_shared_weights_answers_as_the_one_with_its_own(exported: Artifact, trained: Checkpoint) -> None:
    whole = graphs.with_weights(graphs.explained(BARE), trained.model())
    session = onnxruntime().InferenceSession(whole.SerializeToString())
    names = list(explain_signature(TINY).outputs)
    images = {"images": IMAGES.numpy()}
    weights = exported.weights(exported.graphs["explain"])
    found = Runtime(exported.folder / "explain.onnx", "cpu", weights=weights).run(images)
    for name, array in zip(names, session.run(names, images), strict=True):
        np.testing.assert_array_equal(found[name], array)


def test_an_artifacts_checkpoint_exports_to_the_same_graph_without_the_decoder(
    exported: Artifact, trained: Checkpoint, finished: Callable[..., None], tmp_path: Path
) -> None:
    finished("explanation_to_onnx")
    assert checkpoint_path(exported.folder) == exported.folder / TENSORS_FILE
    again = checkpoints.load(exported.folder / TENSORS_FILE)
    assert replace(again, state_dict={}) == replace(trained, state_dict={})
    artifact, _ = export_checkpoint(again, DATASET, tmp_path, NAME, "1", Choices(without=("int8", "fp16")))
    assert artifact.files[MODEL] == exported.files[MODEL]
    assert artifact.training.config == exported.training.config
    assert list(artifact.variants) == ["fp32"]
    assert list(artifact.graphs) == ["explain"]


def test_a_decoder_in_8_bits_is_a_quarter_of_the_size_and_its_cost_is_certified(
    finished: Callable[..., None], tmp_path: Path
) -> None:
    finished("to_onnx", "explanation_to_onnx")  # of a network with the same weights before its decoder
    config = replace(TINY, decoder_widths=(64, 128))
    network = random_network(config)
    errors = int((predict(network, IMAGES)[0].argmax(1) != LABELS).sum())
    figures = {"test_errors": errors, "test_images": len(LABELS)}
    wide = Checkpoint(config, "mnist", tuple("0123456789"), {}, figures, network.state_dict())
    choices = Choices(without=("int8", "fp16"), decoder_weights="int8")
    artifact, _ = export_checkpoint(wide, DATASET, tmp_path, NAME, "1", choices)
    graph = artifact.graphs["decoder"]
    assert (graph.precision, graph.images) == ("int8", 20)
    assert 1e-5 < graph.mean_differences["image"] < graph.differences["image"] < 0.1
    size = (artifact.folder / graph.file).stat().st_size
    parameters = sum(value.numel() for name, value in wide.state_dict.items() if name.startswith("decoder."))
    assert size < 1.5 * parameters
    assert artifacts.load(artifact.folder) == artifact
    page = (artifact.folder / CERTIFICATE).read_text()
    assert f"image {graph.differences['image']:.2g} ({graph.mean_differences['image']:.2g} in the mean)" in page
    assert "`decoder.onnx` stores its weights in 8 bits" in page


def test_a_decoder_in_8_bits_that_is_wrong_is_a_parity_error(
    trained: Checkpoint, expected: Reference, exported: Artifact, tmp_path: Path
) -> None:
    model = to_int8_weights(onnx.load_model(exported.folder / "decoder.onnx"))
    steps = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_steps")]
    onnx.save_model(model, tmp_path / "decoder.onnx")
    certify_decoder(trained.model(), tmp_path / "decoder.onnx", expected, "int8")
    for tensor in steps:
        tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(model, tmp_path / "decoder.onnx")
    with pytest.raises(ParityError, match=r"decoder\.onnx: image differ"):
        certify_decoder(trained.model(), tmp_path / "decoder.onnx", expected, "int8")


@pytest.mark.parametrize("images", [1, 20])
def test_a_true_error_of_a_ten_thousandth_is_a_parity_error(
    expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    honest = Runtime.run

    def off(runtime: Runtime, arrays: Arrays) -> Arrays:
        outputs: dict[str, Any] = honest(runtime, arrays)
        outputs["poses"][:images, 0, 0] += np.float32(1e-4) * (rows(arrays) > 1)
        return outputs

    monkeypatch.setattr(Runtime, "run", off)
    with pytest.raises(ParityError, match=r"poses by up to 0\.0001"):
        certify(expected, Runtime(exported.file(), "cpu"), "fp32")


def test_an_image_that_pytorch_itself_rounds_badly_is_judged_in_double_precision(
    expected: Reference, exported: Artifact
) -> None:
    poses = expected.prediction.poses.copy()
    poses[3, 0, 0] += np.float32(2e-5)
    rounded_badly = expected._replace(prediction=expected.prediction._replace(poses=poses))
    figures = certify(rounded_badly, Runtime(exported.file(), "cpu"), "fp32")
    distances = figures["double_precision"]
    assert distances["images"] == 1
    assert distances["max_distance"] < 1e-5 < 1.9e-5 < distances["max_pytorch_distance"] < 2.1e-5
    assert figures["max_pose_difference"] > 1.9e-5
    variant = Variant("model.onnx", **figures, bytes=1, images_per_second={"1": 1.0})
    page = certificate(NAME, "1", Training("mnist"), {"fp32": variant}, {}, {}, {})
    assert "**Rounding:**" in page
    assert "`model.onnx`: 1 of 35 images." in page
    assert f"PyTorch in single precision up to {distances['max_pytorch_distance']:.2g}" in page


def test_the_explanation_of_an_image_that_is_rounded_badly_is_judged_in_double_precision(
    expected: Reference, exported: Artifact, trained: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, file = trained.model(), exported.folder / "explain.onnx"
    honest = Explanation.explain

    def badly(explanation: Explanation, pixels: Tensor) -> tuple[Tensor, ...]:
        outputs = honest(explanation, pixels)
        if pixels.dtype == torch.float32 and len(pixels) > 15:
            outputs[2][3, 0, 0, 0] += 2e-5
        return outputs

    monkeypatch.setattr(Explanation, "explain", badly)
    graph = certify_explanation(network, file, expected)
    assert graph.double_precision["images"] == 1
    assert graph.double_precision["max_distance"] < 1e-5 < graph.double_precision["max_pytorch_distance"]
    assert graph.differences["couplings"] > 1.9e-5


def test_images_beyond_the_tolerance_are_a_parity_error_if_they_are_many(
    expected: Reference, exported: Artifact
) -> None:
    poses = expected.prediction.poses.copy()
    poses[:3, 0, 0] += np.float32(2e-5)  # of 35, where 5 % is rounded up to two
    with pytest.raises(ParityError, match="poses by up to 2e-05"):
        certify(
            expected._replace(prediction=expected.prediction._replace(poses=poses)),
            Runtime(exported.file(), "cpu"),
            "fp32",
        )


def test_the_manifest_is_written_after_all_graphs_were_verified(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NAME / ".1.partial"
    seen = []

    def note(*arguments: Any) -> Any:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return certify(*arguments)

    monkeypatch.setattr("export.build.certify", note)
    export_checkpoint(trained, DATASET, tmp_path, NAME, "1")
    assert seen == [[MODEL], ["int8.onnx", MODEL], ["fp16.onnx", "int8.onnx", MODEL]]


def test_a_network_of_overlapping_digits_is_measured_by_pairs(
    trained: Checkpoint, tmp_path: Path, ready_made: None
) -> None:
    probabilities, _ = predict(trained.model(), IMAGES)
    pairs = probabilities.topk(2).indices  # most probable first, whatever the order of the classes
    pairs[:3, 1] = probabilities.argmin(1)[:3]
    figures = trained.figures | {"test_errors": 3, "test_images": len(IMAGES)}

    dataset = replace(DATASET, test_labels=pairs)
    artifact, failures = export_checkpoint(replace(trained, figures=figures), dataset, tmp_path, NAME, "1")

    assert not failures
    assert artifact.variants["fp32"].labels_changed == 0
    with pytest.raises(CheckpointError, match="the checkpoint's figures are not those of its weights"):
        export_checkpoint(trained, dataset, tmp_path, NAME, "2")


def test_the_manifest_says_how_the_network_was_trained(exported: Artifact, trained: Checkpoint) -> None:
    assert exported.training.dataset == "mnist"
    assert exported.training.recipe == trained.recipe
    assert exported.training.figures == trained.figures
    config = exported.training.config
    assert CapsNetConfig(**{**config, "decoder_widths": tuple(config["decoder_widths"]), "stem": ()}) == TINY


def test_the_onnx_file_describes_itself(exported: Artifact, graph: onnx.ModelProto) -> None:
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    assert properties.pop("config") == json.dumps(exported.training.config)
    digest = hashlib.sha256(IMAGES.numpy().tobytes() + LABELS.numpy().tobytes()).hexdigest()
    assert properties.pop("export_commit") == exported.training.export_commit
    assert properties == {
        "name": NAME, "version": "1", "dataset": "mnist", "test_data_sha256": digest, "training_commit": "abc",
    }  # fmt: skip
    assert graph.doc_string == f"Capsule network {NAME}, version 1, trained on mnist, in fp32."
    assert graph.graph.name == f"{NAME}-1-model"
    assert all(value.doc_string for value in (*graph.graph.input, *graph.graph.output))


def test_the_onnx_file_holds_no_paths_of_the_machine_it_was_exported_on(exported: Artifact) -> None:
    content = exported.file().read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parent.parent).encode() not in content


def test_the_same_network_exports_silently_to_the_same_graph(
    trained: Checkpoint,
    graph: onnx.ModelProto,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    again = to_onnx(trained.model()).graph
    again.name = graph.graph.name
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert again.SerializeToString(deterministic=True) == graph.graph.SerializeToString(deterministic=True)


def test_the_graph_multiplies_in_at_most_four_axes_without_einsum(graph: onnx.ModelProto) -> None:
    operators = Counter(node.op_type for node in graph.graph.node)
    assert "Einsum" not in operators
    assert operators["MatMul"] == 6  # the first iteration, the votes, and two in each of two more iterations
    assert not operators.keys() & {"Expand", "Gather", "Tile", "If", "Loop"}
    check(graph, served_signature(TINY))


def test_the_weights_are_stored_once_and_the_decoder_not_at_all(exported: Artifact, graph: onnx.ModelProto) -> None:
    network = CapsNet(replace(TINY, decoder_widths=()))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    stored = [
        int(np.prod(tensor.dims)) for tensor in graph.graph.initializer if len(tensor.dims) and tensor.dims != [1]
    ]
    assert sum(stored) <= parameters + 100  # the shapes for Reshape are small initializers too
    assert exported.file().stat().st_size < 4 * parameters + 20_000


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_batch_of_any_size_gives_the_results_of_pytorch(exported: Artifact, trained: Checkpoint, batch: int) -> None:
    images = random_images(TINY, batch)
    found = Runtime(exported.file(), device="cpu").run({"images": images.numpy()})
    probabilities, poses = predict(trained.model(), images)
    np.testing.assert_allclose(np.asarray(found["probabilities"], np.float32), probabilities, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.asarray(found["poses"], np.float32), poses, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "opset"),
    [
        # Several are the same as in the tests of int8 and fp16, so that each graph is made once.
        pytest.param(replace(BARE, image_channels=3, image_size=36, classes=3, routing_iterations=5), 20, id="36x36x3"),
        pytest.param(replace(BARE, image_size=17, classes=1, digit_dim=1, routing_iterations=1), 18, id="smallest"),
        pytest.param(replace(BARE, routing_iterations=2), 25, id="two-iterations"),
        pytest.param(replace(CONFIGS["paper"], decoder_widths=()), 20, id="paper"),
        pytest.param(replace(BARE, digit_bias=True, primary_divisor=32.0, initialization="authors"), 20, id="authors"),
        pytest.param(replace(BARE, agreement="euclidean"), 25, id="euclidean"),
        pytest.param(replace(BARE, normalization="max-min"), 20, id="max-min"),
        pytest.param(graphs.STEM, 20, id="stem"),
        pytest.param(replace(graphs.STEM, routing_scale=4.0), 20, id="scale"),
        pytest.param(replace(graphs.STEM, primary_gate=True), 20, id="gate"),
        pytest.param(replace(CONFIGS["fast"], decoder_widths=()), 20, id="fast"),
        pytest.param(replace(CONFIGS["accurate"], decoder_widths=()), 20, id="accurate"),
        pytest.param(replace(CONFIGS["pairs"], decoder_widths=()), 20, id="pairs"),
    ],
)
def test_any_network_exports_to_any_opset_and_agrees_with_pytorch(
    config: CapsNetConfig, opset: int, tmp_path: Path
) -> None:
    network = graphs.random_network(config)
    model = graphs.exported(config, opset)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    runtime = Runtime(unverified(model, config, tmp_path).file(), device="cpu")
    images = random_images(config, 3)
    figures = certify(reference(network, images, torch.zeros(3, dtype=torch.int64)), runtime, "fp32")
    assert figures["max_pose_difference"] < 1e-5


def test_a_network_that_pytorch_cannot_export_is_a_graph_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def branches(images: Tensor) -> Tensor:
        return images.float() if images.sum() > 0 else images.double()

    monkeypatch.setattr("export.graph.to_pixels", branches)
    with pytest.raises(GraphError, match="PyTorch cannot export the network"):
        to_onnx(random_network(TINY))


def test_check_refuses_an_einsum(tampered: onnx.ModelProto) -> None:
    node = next(node for node in tampered.graph.node if node.op_type == "MatMul")
    node.op_type = "Einsum"
    node.attribute.append(onnx.helper.make_attribute("equation", "ij,jk->ik"))
    with pytest.raises(GraphError, match="Einsum"):
        check(tampered, served_signature(TINY))


def test_check_refuses_a_matmul_over_five_axes(tampered: onnx.ModelProto) -> None:
    nodes = tampered.graph.node
    for axes, output in (([2, 3], "row"), ([2, 4], "column")):
        nodes.append(onnx.helper.make_node("Constant", [], [f"{output}_axes"], value_ints=axes))
        nodes.append(onnx.helper.make_node("Unsqueeze", ["poses", f"{output}_axes"], [output]))
    nodes.append(onnx.helper.make_node("MatMul", ["row", "column"], ["product"], name="wide"))
    with pytest.raises(GraphError, match=r"MatMul over 5 axes \(wide\)"):
        check(tampered, served_signature(TINY))


def test_check_refuses_an_operator_of_another_domain(tampered: onnx.ModelProto) -> None:
    tampered.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    tampered.graph.node.append(onnx.helper.make_node("Route", ["poses"], ["routed"], domain="com.example"))
    with pytest.raises(GraphError, match=r"com\.example\.Route"):
        check(tampered, served_signature(TINY))


def test_check_refuses_a_fixed_batch_axis(tampered: onnx.ModelProto) -> None:
    tampered.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(GraphError):
        check(tampered, served_signature(TINY))


def test_check_refuses_outputs_in_another_order(tampered: onnx.ModelProto) -> None:
    tampered.graph.output.reverse()
    with pytest.raises(GraphError, match="inputs or outputs"):
        check(tampered, served_signature(TINY))


def test_check_refuses_a_graph_of_another_config(graph: onnx.ModelProto) -> None:
    with pytest.raises(GraphError, match="inputs or outputs"):
        check(graph, served_signature(replace(TINY, digit_dim=8)))


def test_check_refuses_invalid_onnx(tampered: onnx.ModelProto) -> None:
    del tampered.graph.initializer[0]
    with pytest.raises(GraphError, match="not valid ONNX"):
        check(tampered, served_signature(TINY))


def test_edge_images_are_blank_saturated_single_pixels_and_repeatable_noise() -> None:
    images = edge_images(3, 36)
    assert images.shape == (15, 3, 36, 36)
    assert images.dtype == torch.uint8
    assert images[0].max() == 0
    assert images[1].min() == 255
    assert [int((image[0] > 0).sum()) for image in images[2:7]] == [1] * 5
    assert len({image.numpy().tobytes() for image in images[2:7]}) == 5
    assert all(len(np.unique(image)) == 256 for image in images[7:])
    assert torch.equal(images, edge_images(3, 36))


def test_a_perturbed_weight_is_a_parity_error_with_the_numbers(exported: Artifact) -> None:
    network = random_network(TINY)
    with torch.no_grad():
        network.weight.mul_(1.1)
    expected = reference(network, IMAGES, LABELS)
    with pytest.raises(
        ParityError,
        match=r"fp32 and PyTorch differ: \d+ of 20 labels changed, \d+ in place of \d+ errors in 20 test images, "
        r"probabilities differ by up to 0\.0\d+ and poses by up to .*; tolerated are 0 labels changed, 0 errors more, "
        "differences of 1e-05, 1e-05 in the mean",
    ):
        certify(expected, Runtime(exported.file(), device="cpu"), "fp32")


def test_a_tampered_graph_is_a_parity_error(expected: Reference, tampered: onnx.ModelProto, tmp_path: Path) -> None:
    (bias,) = (tensor for tensor in tampered.graph.initializer if tensor.name.endswith("primary.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    runtime = Runtime(unverified(tampered, TINY, tmp_path).file(), device="cpu")
    with pytest.raises(ParityError, match="differ"):
        certify(expected, runtime, "fp32")


@pytest.mark.parametrize(("precision", "tolerated"), [("fp32", 0), ("fp16", 1), ("int8", 20)])
def test_changed_labels_are_a_parity_error_however_close_the_probabilities_are(
    expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, precision: str, tolerated: int
) -> None:
    tie = np.zeros((35, TINY.classes), np.float32)
    tie[:, 0] = 0.5
    tie[:, 1] = 0.5 - 1e-6
    poses = np.zeros((35, TINY.classes, TINY.digit_dim), np.float32)
    right = expected._replace(labels=torch.full((20,), 2), prediction=Prediction(tie, poses))  # always wrong
    runtime = Runtime(exported.file(), device="cpu")
    for changed in range(21):
        swapped = tie.copy()
        swapped[:changed, :2] = swapped[:changed, 1::-1]
        swapped[20:, :2] = swapped[20:, 1::-1]  # the edge images have no label to change
        answers = iter([swapped[:20], *swapped[20:, None]])

        def answer(runtime: Runtime, arrays: Arrays, answers: Any = answers) -> Arrays:
            return {"probabilities": next(answers), "poses": poses[: rows(arrays)]}

        monkeypatch.setattr(Runtime, "run", answer)
        if changed <= tolerated:
            assert certify(right, runtime, precision)["labels_changed"] == changed
        else:
            with pytest.raises(ParityError, match=f"{changed} of 20 labels changed"):
                certify(right, runtime, precision)


@pytest.mark.parametrize("errors", [1, 2])
def test_more_errors_than_int8_may_make_are_a_parity_error(
    expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, errors: int
) -> None:
    tie = np.zeros((35, TINY.classes), np.float32)
    tie[:, 0], tie[:, 1] = 0.5, 0.5 - 1e-6
    poses = np.zeros((35, TINY.classes, TINY.digit_dim), np.float32)
    right = expected._replace(labels=torch.zeros(20, dtype=torch.int64), prediction=Prediction(tie, poses))
    swapped = tie.copy()
    swapped[:errors, :2] = swapped[:errors, 1::-1]
    answers = iter([swapped[:20], *swapped[20:, None]])
    runtime = Runtime(exported.file(), "cpu")
    monkeypatch.setattr(
        Runtime, "run", lambda self, arrays: {"probabilities": next(answers), "poses": poses[: rows(arrays)]}
    )
    if errors == 1:  # a share of a thousand, rounded up
        assert certify(right, runtime, "int8")["test_errors"] == 1
    else:
        with pytest.raises(ParityError, match="2 in place of 0 errors in 20 test images"):
            certify(right, runtime, "int8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["probabilities", "poses"])
def test_a_value_that_is_not_finite_is_a_parity_error(
    expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, value: float, output: str
) -> None:
    honest = Runtime.run

    def spoiled(runtime: Runtime, arrays: Arrays) -> Arrays:
        outputs: dict[str, Any] = honest(runtime, arrays)
        outputs[output].flat[-1] = value
        return outputs

    runtime = Runtime(exported.file(), device="cpu")
    monkeypatch.setattr(Runtime, "run", spoiled)
    for precision in artifacts.PRECISIONS:
        with pytest.raises(ParityError, match="the exported model computes 16 values that are not finite"):
            certify(expected, runtime, precision)


def test_weights_that_are_not_finite_are_a_parity_error() -> None:
    network = random_network(TINY)
    with torch.no_grad():
        network.conv1.weight[0] = torch.nan
    with pytest.raises(ParityError, match="PyTorch computes"):
        reference(network, IMAGES, LABELS)


def test_nothing_is_left_of_an_export_that_fails_its_verification(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Runtime.run

    def off(runtime: Runtime, arrays: Arrays) -> Arrays:
        outputs: dict[str, Any] = honest(runtime, arrays)
        return outputs | {"poses": outputs["poses"] + np.float32(2e-5)}

    monkeypatch.setattr(Runtime, "run", off)
    with pytest.raises(ParityError, match=r"0 of 20 labels changed.*poses by up to 2e-05"):
        export_checkpoint(trained, DATASET, tmp_path, NAME, "1")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_is_interrupted(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.build.certify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(trained, DATASET, tmp_path, NAME, "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", artifacts.PRECISIONS)
def test_poses_with_a_wrong_sign_are_a_parity_error_in_every_precision(
    expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    honest = Runtime.run

    def opposite(runtime: Runtime, arrays: Arrays) -> Arrays:
        outputs: dict[str, Any] = honest(runtime, arrays)
        return outputs | {"poses": -outputs["poses"]}

    monkeypatch.setattr(Runtime, "run", opposite)
    with pytest.raises(ParityError, match=f"{precision} and PyTorch differ: 0 of 20 labels changed"):
        certify(expected, Runtime(exported.file(), "cpu"), precision)


@pytest.mark.parametrize("damage", [lambda array: array + np.float32(1e-4), lambda array: array * np.nan])
@pytest.mark.parametrize("output", [*explain_signature(TINY).outputs, "image"])
def test_a_further_graph_with_a_wrong_output_is_a_parity_error(
    trained: Checkpoint, expected: Reference, exported: Artifact, monkeypatch: pytest.MonkeyPatch, output: str,
    damage: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:  # fmt: skip
    ort = onnxruntime()

    class Spoiled:
        def __init__(self, file: str, providers: list[str]) -> None:
            self.session = ort.InferenceSession(file, providers=providers)

        def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
            found = zip(names, self.session.run(names, inputs), strict=True)
            return [damage(array) if name == output else array for name, array in found]

    monkeypatch.setattr("export.verify.onnxruntime", lambda: Mock(InferenceSession=Spoiled))
    graph = exported.graphs["decoder" if output == "image" else "explain"]
    check = certify_decoder if output == "image" else certify_explanation
    with pytest.raises(ParityError, match=f"{graph.file}: {output} differ from PyTorch's by"):
        check(trained.model(), exported.folder / graph.file, expected)


def test_the_explanation_is_compared_on_the_test_images_and_each_edge_image_once(exported: Artifact) -> None:
    assert exported.graphs["explain"].images == 20 + 15


def test_a_precision_that_cannot_be_made_is_left_out_and_reported(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: onnx.ModelProto) -> onnx.ModelProto:
        raise GraphError("a weight is too large")

    monkeypatch.setattr("export.build.to_fp16", fail)
    artifact, failures = export_checkpoint(trained, DATASET, tmp_path, NAME, "1")
    assert failures == {"fp16": "fp16: a weight is too large"}
    assert list(artifact.variants) == ["fp32", "int8"]


def test_tritons_files_are_those_of_the_highest_version(trained: Checkpoint, tmp_path: Path, ready_made: None) -> None:
    other = replace(trained, labels=tuple("abcdefghij"))
    for version, checkpoint, first in (("2", trained, "0"), ("1", other, "0"), ("3", other, "a")):
        export_checkpoint(checkpoint, DATASET, tmp_path, NAME, version)
        assert (tmp_path / NAME / "labels.txt").read_text().startswith(f"{first}\n")


def test_the_next_export_removes_the_files_of_killed_ones(
    trained: Checkpoint, tmp_path: Path, ready_made: None
) -> None:
    for version in ("1", "7"):
        partial = tmp_path / NAME / f".{version}.partial"
        (partial / "folder").mkdir(parents=True)
        (partial / "left.onnx").write_text("half a graph")
    artifact, _ = export_checkpoint(trained, DATASET, tmp_path, NAME, "1")
    assert artifacts.load(artifact.folder) == artifact
    assert not (artifact.folder / "left.onnx").exists()
    assert not [path for path in (tmp_path / NAME).iterdir() if path.name.startswith(".")]
    assert artifacts.find(tmp_path).name == "1"


def test_a_version_that_another_process_is_writing_is_refused_and_left_alone(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path, NAME, "1") as writer:
        writer.write_text("a.txt", "text")
        with (
            pytest.raises(FileExistsError, match="another export of it is under way"),
            ArtifactWriter(tmp_path, NAME, "1"),
        ):
            pass
        with ArtifactWriter(tmp_path, NAME, "2"):
            assert (writer.folder / "a.txt").read_text() == "text"
    assert not list(tmp_path.iterdir())


def test_a_label_that_triton_cannot_read_is_refused_before_anything_is_written(
    trained: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(TritonError, match="has a line break"):
        export_checkpoint(replace(trained, labels=("a\rb", *"123456789")), DATASET, tmp_path, NAME, "1")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_fails_its_certificate_is_left_out_and_reported(
    trained: Checkpoint, checkpoint_file: Path, test_set: None, tmp_path: Path, ready_made: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def strict(expected: Reference, runtime: Runtime, precision: str) -> dict[str, Any]:
        if precision == "int8":
            raise ParityError("int8 and PyTorch differ: too much")
        return certify(expected, runtime, precision)

    monkeypatch.setattr("export.build.certify", strict)
    assert command.main([str(checkpoint_file), str(tmp_path / "models")]) == 1
    assert capsys.readouterr().err == "not written: int8 and PyTorch differ: too much\n"
    artifact = artifacts.load(tmp_path / "models" / NAME / "1")
    assert list(artifact.variants) == ["fp32", "fp16"]
    assert not (artifact.folder / "int8.onnx").exists()
    assert "**int8 is not here.** int8 and PyTorch differ: too much." in (artifact.folder / CERTIFICATE).read_text()


def test_the_certificate_has_the_manifests_numbers(exported: Artifact) -> None:
    page = (exported.folder / CERTIFICATE).read_text()
    for precision, variant in exported.variants.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {precision} | `"))
        assert f"| {variant.bytes:,} |" in line
        assert f"{100 * variant.test_errors / 20:.2f} % ({variant.test_errors})" in line
        assert f"{variant.max_pose_difference:.2g}, {variant.mean_pose_difference:.2g}" in line
        assert set(variant.images_per_second) == {str(batch) for batch in BATCHES}
        assert all(speed > 0 for speed in variant.images_per_second.values())
    for name, sha256 in exported.files.items():
        assert name == CERTIFICATE or f"| `{name}` | `{sha256}` |" in page
    assert "**Not run:** CUDA and TensorRT" in page
    assert "Intel" in page or "AMD" in page or "CPU" in page


def test_half_precision_takes_half_the_space_and_int8_less_than_all(exported: Artifact) -> None:
    sizes = {precision: variant.bytes for precision, variant in exported.variants.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < sizes["fp32"]


def test_the_explanation_tells_the_couplings_of_the_last_iteration(exported: Artifact, trained: Checkpoint) -> None:
    session = onnxruntime().InferenceSession(exported.folder / "explain.onnx")
    probabilities, poses, couplings = session.run(None, {"images": IMAGES[:3].numpy()})[:3]
    model = trained.model()
    with torch.no_grad():
        expected_poses, expected_couplings = model.with_couplings(to_pixels(IMAGES[:3]))
    np.testing.assert_allclose(poses, expected_poses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(couplings[:, -1], expected_couplings, atol=1e-5, rtol=0)
    np.testing.assert_allclose(probabilities, np.linalg.norm(poses, axis=-1), atol=1e-5)
    np.testing.assert_allclose(couplings.sum(2), 1, atol=1e-5)
    np.testing.assert_allclose(couplings[:, 0], 1 / TINY.classes, atol=1e-7)
    assert exported.graphs["explain"].differences["couplings"] <= 1e-5


EXPLAINED = {
    "paper": replace(TINY, decoder_widths=()),
    "one-iteration": replace(BARE, routing_iterations=1),
    "euclidean-with-bias": replace(BARE, agreement="euclidean", digit_bias=True, routing_scale=2.0),
    "max-min-with-gates": replace(BARE, normalization="max-min", primary_gate=True),
    "one-iteration-of-max-min": replace(BARE, normalization="max-min", routing_iterations=1),
    "stem": graphs.STEM,
}


def routed_by_hand(network: CapsNet, pixels: Tensor) -> dict[str, NDArray[np.float64]]:
    """Return the explanation's outputs in double precision, from procedure 1 of the paper as it is written."""
    config, double = network.config, copy.deepcopy(network).double()
    with torch.no_grad():
        u = double.primary_capsules(pixels.double()).numpy()
        weight = double.weight.numpy()
        bias = 0 if double.digit_bias is None else double.digit_bias.numpy()
    u_hat = np.einsum("bid,idje->bjie", u, weight)
    b = np.zeros(u_hat.shape[:3])
    couplings, agreements = [], []
    for iteration in range(config.routing_iterations):
        b_scaled = config.routing_scale * b
        if config.normalization == "softmax":
            c = np.exp(b_scaled) / np.exp(b_scaled).sum(1, keepdims=True)
        elif iteration == 0:
            c = np.ones_like(b)
        else:
            c = (b - b.min(1, keepdims=True)) / np.ptp(b, 1, keepdims=True)
        s = np.einsum("bji,bjie->bje", c, u_hat) + bias
        squares = np.square(s).sum(-1, keepdims=True)
        v = squares / (1 + squares) * s / np.sqrt(squares)
        agreement = np.einsum("bjie,bje->bji", u_hat, v)
        distance = np.square(u_hat - v[:, :, None]).sum(-1)
        b = b + (agreement if config.agreement == "scalar-product" else -distance)
        couplings.append(c)
        agreements.append(agreement)
    return {
        "probabilities": np.linalg.norm(v, axis=-1),
        "poses": v,
        "couplings": np.stack(couplings, 1),
        "agreements": np.stack(agreements, 1),
        "contributions": c * np.einsum("bjie,bje->bji", u_hat, s / np.sqrt(squares)),
        "primary_lengths": np.linalg.norm(u, axis=-1),
    }


@pytest.mark.parametrize("config", EXPLAINED.values(), ids=EXPLAINED)
def test_the_explanation_of_any_network_is_the_routing_as_the_paper_writes_it(config: CapsNetConfig) -> None:
    network = graphs.random_network(config)
    images = graphs.random_images(config, 3)
    found = graphs.run(graphs.explained(config), images)
    expected = routed_by_hand(network, to_pixels(images))
    signature = explain_signature(config)
    for array, (name, value), right in zip(found, signature.outputs.items(), expected.values(), strict=True):
        assert array.shape == right.shape == (3, *value.shape)
        np.testing.assert_allclose(array, right, atol=2e-5, rtol=1e-4, err_msg=name)
    contributions, poses = found[4], found[1]
    if not config.digit_bias:  # they add up to the length of the pose before it is squashed
        length = contributions.sum(-1)
        np.testing.assert_allclose(length**2 / (1 + length**2), np.linalg.norm(poses, axis=-1), atol=1e-5)


def test_a_zero_pose_has_no_contributions_and_nothing_that_is_not_finite() -> None:
    network = graphs.random_network(BARE)
    with torch.no_grad():
        network.weight[:, :, 4] = 0
    outputs = graphs.run(graphs.with_weights(graphs.explained(BARE), network), graphs.random_images(BARE, 2))
    assert all(np.isfinite(array).all() for array in outputs)
    assert not outputs[4][:, 4].any()
    assert outputs[4][:, 5].any()


def test_the_manifest_gives_the_types_of_the_further_graphs(exported: Artifact) -> None:
    for name, signature in (("explain", explain_signature(TINY)), ("decoder", decoder_signature(TINY))):
        runtime = Runtime(exported.folder / f"{name}.onnx", "cpu", weights=exported.weights(exported.graphs[name]))
        for found, typed, wanted in (
            (runtime.inputs, exported.graphs[name].inputs, signature.inputs),
            (runtime.outputs, exported.graphs[name].outputs, signature.outputs),
        ):
            assert list(typed) == list(found) == list(wanted)
            assert {key: (value.dtype, value.shape) for key, value in typed.items()} == {
                key: (value.dtype.name, value.shape) for key, value in found.items()
            }


def test_the_receptive_field_is_the_pixels_that_change_a_primary_capsule(
    exported: Artifact, trained: Checkpoint
) -> None:
    field = exported.graphs["explain"].receptive_field
    assert field is not None
    assert field == receptive_field(TINY)
    model, generator = trained.model().double(), torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 28, 28, generator=generator, dtype=torch.float64, requires_grad=True)
    grid = field.grid
    for kind, row, column in ((0, 0, 0), (1, 2, 4), (0, grid - 1, grid - 1)):
        capsule = (kind * grid + row) * grid + column
        (gradient,) = torch.autograd.grad(model.primary_capsules(image)[0, capsule].sum(), image)
        seen = gradient[0, 0] != 0
        rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
        for indices, place in ((rows, row), (columns, column)):
            first = field.stride * place
            assert indices.tolist() == list(range(first, first + field.size))


@pytest.mark.parametrize("name", ["fast", "accurate", "pairs"])
def test_the_receptive_field_of_a_stem_is_the_pixels_that_change_a_primary_capsule(name: str) -> None:
    config = replace(CONFIGS[name], decoder_widths=())
    field = receptive_field(config)
    model = graphs.random_network(config).double()
    for layer in model.modules():  # so that no pixel is hidden behind a ReLU that is closed
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.abs_()
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *config.image_shape, generator=generator, dtype=torch.float64, requires_grad=True)
    grid = field.grid
    for kind, row, column in ((0, 0, 0), (1, 2, grid - 2), (3, grid - 1, grid - 1)):
        capsule = (kind * grid + row) * grid + column
        (gradient,) = torch.autograd.grad(model.primary_capsules(image)[0, capsule].sum(), image)
        seen = gradient[0, 0] != 0
        rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
        for indices, place in ((rows, row), (columns, column)):
            first = field.stride * place + field.offset
            assert indices.tolist() == list(range(max(first, 0), min(first + field.size, config.image_size)))


def test_half_precision_is_compared_with_every_operation_rounded_too(exported: Artifact) -> None:
    rounded = exported.variants["fp16"].rounded
    assert rounded["max_pose_difference"] <= 1e-2
    assert rounded["max_pose_difference"] != exported.variants["fp16"].max_pose_difference
    assert not exported.variants["fp32"].rounded
    assert not exported.variants["int8"].rounded
    page = (exported.folder / CERTIFICATE).read_text()
    rows = [line for line in page.splitlines() if line.startswith("| fp16")]
    assert [row.split(" | ")[0] for row in rows] == ["| fp16", "| fp16, rounded", "| fp16"]
    assert f"{rounded['max_probability_difference']:.2g}, {rounded['mean_probability_difference']:.2g}" in rows[1]
    assert "fp16 on the CPU is single precision" in page


def test_half_precision_that_differs_once_it_is_rounded_is_not_written(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.verify.rounded", lambda model: onnx.load_model(tmp_path / "other.onnx"))
    with torch.no_grad():
        other = random_network(TINY)
        other.weight.mul_(2)
    onnx.save_model(graphs.with_weights(graphs.exported(BARE), other), tmp_path / "other.onnx")
    artifact, failures = export_checkpoint(trained, DATASET, tmp_path / "models", NAME, "1")
    assert failures["fp16"].startswith("each operation rounded to half precision: fp16 and PyTorch differ")
    assert set(artifact.variants) == {"fp32", "int8"}
    assert not (artifact.folder / "fp16.onnx").exists()


def test_onnx_runtimes_cpu_convolves_half_precision_in_single_precision(exported: Artifact, tmp_path: Path) -> None:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(exported.folder / "fp16.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.shape_inference.infer_shapes(onnx.load_model(tmp_path / "optimized.onnx"))
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert {kinds[node.output[0]] for node in products} == {onnx.TensorProto.FLOAT}


def test_the_decoder_reconstructs_from_the_live_pose_alone(exported: Artifact, trained: Checkpoint) -> None:
    session = onnxruntime().InferenceSession(exported.folder / "decoder.onnx")
    assert {value.name: value.shape for value in session.get_inputs()} == {"pose": [BATCH, 16], "class": [BATCH]}
    model = trained.model()
    assert model.decoder is not None
    poses, classes = torch.randn(5, 10, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 9, 9, 1])
    (image,) = session.run(None, {"pose": poses[torch.arange(5), classes].numpy(), "class": classes.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(image, model.decoder(poses, classes), atol=1e-5, rtol=0)


def test_a_network_without_a_decoder_has_no_decoder_graph(
    tmp_path: Path, trained: Checkpoint, ready_made: None
) -> None:
    state = {name: value for name, value in trained.state_dict.items() if not name.startswith("decoder")}
    bare = replace(trained, config=replace(TINY, decoder_widths=()), state_dict=state)
    artifact, failures = export_checkpoint(bare, DATASET, tmp_path, NAME, "1")
    assert not failures
    assert list(artifact.graphs) == ["explain"]


def test_int8_is_calibrated_on_training_images_as_the_network_takes_them() -> None:
    chosen = calibration_images(DATASET, 30)
    assert chosen.shape == (30, 1, 28, 28)
    assert chosen.equal(calibration_images(DATASET, 30))
    known = {image.numpy().tobytes() for image in DATASET.train_images}
    assert all(image.numpy().tobytes() in known for image in chosen)
    assert len(calibration_images(replace(DATASET, train_images=IMAGES, train_labels=LABELS))) == 20
    pairs = calibration_images(replace(DATASET, objects=2, canvas=36), 30)
    assert pairs.shape == (30, 1, 36, 36)


def test_an_engine_is_asked_for_before_the_long_comparisons(
    trained: Checkpoint, tmp_path: Path, ready_made: None
) -> None:
    with pytest.raises(TensorRTMissing, match="tensorrt is not installed"):
        export_checkpoint(trained, DATASET, tmp_path, NAME, "1", choices=Choices(engine=True))
    assert not (tmp_path / NAME / "1").exists()


def test_an_engine_that_was_built_is_in_the_manifest_and_not_said_to_be_compared(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.build_engine", lambda model, engine, profile: engine.write_bytes(b"engine"))
    artifact, _ = export_checkpoint(trained, DATASET, tmp_path, NAME, "1", choices=Choices(engine=True))
    assert artifact.graphs["tensorrt"] == Graph("model.plan")
    assert artifact.batches == BatchProfile(1, 8, 32)
    assert "| tensorrt | `model.plan` | none | not compared |" in (artifact.folder / CERTIFICATE).read_text()
    assert artifacts.load(artifact.folder).files["model.plan"] == hashlib.sha256(b"engine").hexdigest()


@pytest.mark.parametrize("figures", [{"test_errors": 21, "test_images": 20}, {"test_errors": 21}, {}])
def test_figures_that_are_not_those_of_the_weights_are_refused(
    trained: Checkpoint, tmp_path: Path, ready_made: None, figures: dict[str, int]
) -> None:
    with pytest.raises(CheckpointError, match="figures are not those of its weights"):
        export_checkpoint(replace(trained, figures=figures), DATASET, tmp_path, NAME, "1")
    assert not (tmp_path / NAME / "1").exists()


def test_an_existing_version_is_refused_and_left_as_it_is(trained: Checkpoint, exported: Artifact) -> None:
    repository = exported.folder.parent.parent
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(exported.folder))}.*never overwritten"):
        export_checkpoint(trained, DATASET, repository, NAME, "1")
    assert artifacts.load(exported.folder) == exported


def test_test_images_of_another_shape_are_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"takes images \(1, 28, 28\), the test set's are \(3, 28, 28\)"):
        export_checkpoint(trained, replace(DATASET, test_images=IMAGES.expand(-1, 3, -1, -1)), tmp_path, NAME, "1")
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_labels_than_classes_is_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="10 classes but 2 labels"):
        export_checkpoint(replace(trained, labels=("a", "b")), DATASET, tmp_path, NAME, "1")


def test_weights_that_do_not_fit_the_config_are_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        export_checkpoint(replace(trained, config=CONFIGS["compact"]), DATASET, tmp_path, NAME, "1")


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan")])
def test_a_recipe_that_json_cannot_hold_is_refused(trained: Checkpoint, tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        export_checkpoint(replace(trained, recipe={"rate": value}), DATASET, tmp_path, NAME, "1")


class Payload:
    """An object that creates a file if ``pickle.load`` reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "capsnet.pt", tmp_path / "ran"
    if how == "torch":
        torch.save({"format": checkpoints.FORMAT, "recipe": Payload(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoints.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload itself does not work"


@pytest.fixture
def checkpoint_file(trained: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "capsnet.pt"
    checkpoints.save(trained, path)
    return path


@pytest.fixture
def test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``datasets.load`` return the test images of this module."""
    monkeypatch.setattr(datasets, "load", lambda name, folder, source: DATASET)


def test_the_command_writes_one_version_after_another_and_prints_its_measurements(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out), "--model-version", "10"]) == 0
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out), "--name", "other"]) == 0
    printed = capsys.readouterr()
    versions = {path.parent.relative_to(out).as_posix() for path in out.glob(f"*/*/{MANIFEST}")}
    assert versions == {f"{NAME}/1", f"{NAME}/2", f"{NAME}/10", f"{NAME}/11", "other/1"}
    first = artifacts.load(out / NAME / "1")
    assert f"wrote {first.folder}: {', '.join(first.files)}\n" in printed.out
    figures = first.training.figures["test_errors"]
    for precision in artifacts.PRECISIONS:
        assert re.search(rf"^{precision}: test error \d+\.\d\d % \(\d+ of 20\), \d+ labels changed", printed.out, re.M)
    assert f"fp32: test error {100 * figures / 20:.2f} % ({figures} of 20), 0 labels changed" in printed.out
    assert (out / NAME / "config.pbtxt").exists()
    assert printed.err == ""
    steps = printed.out.partition("wrote ")[0].splitlines()
    assert [step.partition(":")[0] for step in steps] == [
        "computing 20 test images in PyTorch, to compare with", "fp32", "int8", "int8", "fp16", "fp16", "explain",
        "decoder", "measuring the speed of each graph", "calibrating confidences and thresholds",
    ]  # fmt: skip


def test_the_command_says_in_one_line_why_it_failed(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint_file), str(tmp_path / "models"), "--model-version", "1"]
    assert command.main(arguments) == 0
    capsys.readouterr()
    assert command.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "never overwritten" in printed.err


@pytest.mark.parametrize("length", [0, 100, 0.5, 0.99])
def test_the_command_refuses_a_truncated_checkpoint(
    checkpoint_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: float
) -> None:
    content = checkpoint_file.read_bytes()
    checkpoint_file.write_bytes(content[: int(length if length > 1 else length * len(content))])
    assert command.main([str(checkpoint_file), str(tmp_path / "models")]) == 1
    assert str(checkpoint_file) in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_the_command_refuses_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path / "none.pt"), str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err


def test_the_command_finds_the_checkpoint_of_a_run(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(checkpoint_file.parent), str(tmp_path / "models")]) == 0
    assert artifacts.load(tmp_path / "models" / NAME / "1").name == NAME
    (tmp_path / "empty").mkdir()
    assert command.main([str(tmp_path / "empty"), str(tmp_path / "models")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'empty' / 'capsnet.pt'}: no such file\n"


def test_the_command_says_which_version_it_writes_beside_others(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint_file), str(tmp_path / "models")]
    assert command.main(arguments) == 0
    assert "already" not in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert f"{NAME} has a version 1 already, so this is version 2\n" in capsys.readouterr().out


def test_ctrl_c_in_an_export_is_one_line_and_leaves_no_folder(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("export.build.certify", Mock(side_effect=KeyboardInterrupt))
    assert command.main([str(checkpoint_file), str(tmp_path / "new" / "models")]) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing of the export is left\n"
    assert list(tmp_path.iterdir()) == [checkpoint_file]


def test_the_command_refuses_a_checkpoint_of_an_unknown_data_set(
    trained: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "capsnet.pt"
    checkpoints.save(replace(trained, dataset="../letters"), path)
    assert command.main([str(path), str(tmp_path)]) == 1
    assert "unknown data set '../letters'" in capsys.readouterr().err


def test_the_command_fails_if_the_test_set_is_not_available(
    checkpoint_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, folder: Path, source: object) -> Dataset:
        raise DatasetError(f"could not get {name}:\n  {folder}: nothing there")

    monkeypatch.setattr(datasets, "load", fail)
    assert command.main([str(checkpoint_file), str(tmp_path / "models"), "--data-dir", "elsewhere"]) == 1
    assert capsys.readouterr().err.endswith("could not get mnist:\n  elsewhere: nothing there\n")


def test_a_wrong_folder_of_the_data_set_is_an_error_that_names_it(
    checkpoint_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(checkpoint_file), str(tmp_path / "models"), "--data-dir", "elsewhere"]) == 1
    reason = "the folder elsewhere does not have the data set mnist: there is no such folder"
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["capsnet.pt"], id="no-out"),
        pytest.param(["capsnet.pt", "out", "--name", "Upper"], id="upper-case"),
        pytest.param(["capsnet.pt", "out", "--name", "../up"], id="path-in-name"),
        pytest.param(["capsnet.pt", "out", "--name", ""], id="empty-name"),
        pytest.param(["capsnet.pt", "out", "--model-version", "0"], id="version-0"),
        pytest.param(["capsnet.pt", "out", "--model-version", "-1"], id="negative-version"),
        pytest.param(["capsnet.pt", "out", "--model-version", "1.5"], id="fraction"),
        pytest.param(["capsnet.pt", "out", "--opset", "3"], id="old-opset"),
        pytest.param(["capsnet.pt", "out", "--batches", "3", "2"], id="unordered-batches"),
        pytest.param(["capsnet.pt", "out", "--data", ".", "--data-dir", "."], id="two-folders"),
        pytest.param(["capsnet.pt", "out", "--data-dir", ".", "--source", "npm"], id="folder-and-source"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m export" in capsys.readouterr().err
