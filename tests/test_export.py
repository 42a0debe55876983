"""Tests of the export: the graph, its parity with PyTorch, and what is on the disk afterwards."""

import json
import logging
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import __main__ as command
from export.graph import GraphError, check
from export.to_onnx import export_checkpoint, to_onnx
from export.verify import ParityError, edge_images, verify
from serving import artifact as artifacts
from serving.artifact import MANIFEST, MODEL, Artifact, ArtifactError
from serving.runtime import Prediction, Runtime
from training import checkpoint as checkpoints
from training import datasets
from training.checkpoint import Checkpoint, CheckpointError
from training.datasets import Dataset, DatasetError
from training.evaluate import predict
from training.model import CONFIGS, CapsNet, CapsNetConfig

TINY = CapsNetConfig(conv_channels=8, primary_types=2, decoder_widths=(4,))
NAME = "capsnet-mnist"


def random_network(config: CapsNetConfig) -> CapsNet:
    """A network whose poses are as long as a trained one's, so that a difference has something to show in."""
    torch.manual_seed(0)
    network = CapsNet(config).eval()
    with torch.no_grad():
        network.weight.mul_(10)
    return network


def random_images(config: CapsNetConfig, count: int) -> Tensor:
    shape = (count, config.image_channels, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def unverified(model: onnx.ModelProto, config: CapsNetConfig, folder: Path) -> Artifact:
    """An artifact around a graph, as ``Runtime`` takes it."""
    onnx.save_model(model, folder / MODEL)
    return Artifact(
        folder=folder,
        name=NAME,
        version="1",
        labels=tuple(str(label) for label in range(config.classes)),
        image_shape=(config.image_channels, config.image_size, config.image_size),
        pose_size=config.digit_dim,
        sha256=artifacts.digest(folder / MODEL),
        training={},
        parity={},
    )


IMAGES = random_images(TINY, 20)
LABELS = torch.arange(20) % TINY.classes


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    """A checkpoint whose figures belong to its weights, of a network that was never trained."""
    network = random_network(TINY)
    errors = int((predict(network, IMAGES)[0].argmax(1) != LABELS).sum())
    return Checkpoint(
        config=TINY,
        dataset="mnist",
        labels=tuple("0123456789"),
        recipe={"epochs": 1, "seed": 1},
        figures={"test_errors": errors, "test_images": len(LABELS)},
        state_dict=network.state_dict(),
    )


@pytest.fixture(scope="module")
def exported(trained: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_checkpoint(trained, IMAGES, LABELS, tmp_path_factory.mktemp("models"), NAME, "1")


@pytest.fixture(scope="module")
def graph(exported: Artifact) -> onnx.ModelProto:
    return onnx.load_model(exported.model_file)


@pytest.fixture
def tampered(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph for a test to change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


@pytest.fixture
def ready_made(monkeypatch: pytest.MonkeyPatch, graph: onnx.ModelProto) -> None:
    """The exporter takes seconds: give it the finished graph where a test is about what comes after."""

    def copy(network: CapsNet, opset: int) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(graph)
        return result

    monkeypatch.setattr("export.to_onnx.to_onnx", copy)


def test_the_manifest_reports_the_parity_of_all_test_and_edge_images(exported: Artifact) -> None:
    parity = exported.parity
    assert parity["images"] == len(IMAGES) + len(edge_images(1, 28))
    assert parity["labels_changed"] == 0
    assert 0 < parity["mean_probability_difference"] <= parity["max_probability_difference"] <= 1e-5
    assert 0 < parity["mean_pose_difference"] <= parity["max_pose_difference"] <= 1e-5
    assert parity["reference"] == f"PyTorch {torch.__version__}"
    assert parity["runtime"].startswith("ONNX Runtime ")
    assert parity["provider"] == "CPUExecutionProvider"


def test_what_export_wrote_is_what_serving_loads(exported: Artifact) -> None:
    assert artifacts.load(exported.folder) == exported
    assert sorted(path.name for path in exported.folder.iterdir()) == [MANIFEST, MODEL]


def test_the_manifest_is_written_after_the_model_was_verified(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NAME / "1"
    seen = []

    def note(*arguments: Any) -> Any:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return verify(*arguments)

    monkeypatch.setattr("export.to_onnx.verify", note)
    export_checkpoint(trained, IMAGES, LABELS, tmp_path, NAME, "1")
    assert seen == [[MODEL]]


def test_a_network_of_overlapping_digits_is_measured_by_pairs(trained: Checkpoint, tmp_path: Path) -> None:
    probabilities, _ = predict(trained.model(), IMAGES)
    pairs = probabilities.topk(2).indices  # most probable first, in whatever order the classes are
    pairs[:3, 1] = probabilities.argmin(1)[:3]
    figures = trained.figures | {"test_errors": 3, "test_images": len(IMAGES)}

    exported = export_checkpoint(replace(trained, figures=figures), IMAGES, pairs, tmp_path, NAME, "1")

    assert exported.parity["labels_changed"] == 0
    with pytest.raises(CheckpointError, match="the checkpoint's figures are not those of its weights"):
        export_checkpoint(trained, IMAGES, pairs, tmp_path, NAME, "2")


def test_the_manifest_says_how_the_network_was_trained(exported: Artifact, trained: Checkpoint) -> None:
    assert exported.training["dataset"] == "mnist"
    assert exported.training["recipe"] == trained.recipe
    assert exported.training["figures"] == trained.figures
    config = exported.training["config"]
    assert CapsNetConfig(**config | {"decoder_widths": tuple(config["decoder_widths"])}) == TINY


def test_the_onnx_file_says_what_it_is(exported: Artifact, graph: onnx.ModelProto) -> None:
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    assert properties.pop("config") == json.dumps(exported.training["config"])
    assert properties == {"name": NAME, "version": "1", "dataset": "mnist"}
    assert graph.doc_string == f"Capsule network {NAME}, version 1, trained on mnist."


def test_the_onnx_file_holds_no_paths_of_the_machine_it_was_exported_on(exported: Artifact) -> None:
    content = exported.model_file.read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parent.parent).encode() not in content


def test_the_same_network_exports_to_the_same_graph_and_without_a_word(
    trained: Checkpoint,
    graph: onnx.ModelProto,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    again = to_onnx(trained.model()).graph
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert again.SerializeToString(deterministic=True) == graph.graph.SerializeToString(deterministic=True)


def test_the_graph_multiplies_in_at_most_four_axes_without_einsum(graph: onnx.ModelProto) -> None:
    operators = Counter(node.op_type for node in graph.graph.node)
    assert "Einsum" not in operators
    assert operators["MatMul"] == 6  # the first iteration, the votes, and two in each of two more iterations
    assert not operators.keys() & {"Expand", "Gather", "Tile", "If", "Loop"}
    check(graph, TINY)


def test_the_weights_are_stored_once_and_the_decoder_not_at_all(exported: Artifact, graph: onnx.ModelProto) -> None:
    network = CapsNet(replace(TINY, decoder_widths=()))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    stored = [
        int(np.prod(tensor.dims)) for tensor in graph.graph.initializer if len(tensor.dims) and tensor.dims != [1]
    ]
    assert sum(stored) <= parameters + 100  # the shapes of reshapes are small initializers too
    assert exported.model_file.stat().st_size < 4 * parameters + 20_000


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_batch_of_any_size_gives_what_pytorch_gives(exported: Artifact, trained: Checkpoint, batch: int) -> None:
    images = random_images(TINY, batch)
    found = Runtime(exported, device="cpu").predict(images.numpy())
    probabilities, poses = predict(trained.model(), images)
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.poses, poses, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "opset"),
    [
        pytest.param(replace(TINY, image_channels=3, image_size=36, classes=3, routing_iterations=5), 20, id="36x36x3"),
        pytest.param(replace(TINY, image_size=17, classes=1, digit_dim=1, routing_iterations=1), 18, id="smallest"),
        pytest.param(replace(TINY, routing_iterations=2), 25, id="two-iterations"),
        pytest.param(replace(CONFIGS["paper"], decoder_widths=()), 20, id="paper"),
        pytest.param(replace(CONFIGS["authors"], decoder_widths=(), conv_channels=8), 20, id="authors"),
        pytest.param(replace(TINY, agreement="euclidean"), 20, id="euclidean"),
        pytest.param(replace(TINY, normalization="max-min"), 20, id="max-min"),
    ],
)
def test_any_network_exports_to_any_opset_and_agrees_with_pytorch(
    config: CapsNetConfig, opset: int, tmp_path: Path
) -> None:
    network = random_network(config)
    model = to_onnx(network, opset)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    parity, probabilities = verify(
        network, Runtime(unverified(model, config, tmp_path), device="cpu"), random_images(config, 3)
    )
    assert parity["max_pose_difference"] < 1e-5
    assert probabilities.shape == (3, config.classes)


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
        check(tampered, TINY)


def test_check_refuses_a_matmul_over_five_axes(tampered: onnx.ModelProto) -> None:
    nodes = tampered.graph.node
    for axes, output in (([2, 3], "row"), ([2, 4], "column")):
        nodes.append(onnx.helper.make_node("Constant", [], [f"{output}_axes"], value_ints=axes))
        nodes.append(onnx.helper.make_node("Unsqueeze", ["poses", f"{output}_axes"], [output]))
    nodes.append(onnx.helper.make_node("MatMul", ["row", "column"], ["product"], name="wide"))
    with pytest.raises(GraphError, match=r"MatMul over 5 axes \(wide\)"):
        check(tampered, TINY)


def test_check_refuses_an_operator_of_another_domain(tampered: onnx.ModelProto) -> None:
    tampered.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    tampered.graph.node.append(onnx.helper.make_node("Route", ["poses"], ["routed"], domain="com.example"))
    with pytest.raises(GraphError, match=r"com\.example\.Route"):
        check(tampered, TINY)


def test_check_refuses_a_fixed_batch_axis(tampered: onnx.ModelProto) -> None:
    tampered.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(GraphError):
        check(tampered, TINY)


def test_check_refuses_outputs_in_another_order(tampered: onnx.ModelProto) -> None:
    tampered.graph.output.reverse()
    with pytest.raises(GraphError, match="inputs or outputs"):
        check(tampered, TINY)


def test_check_refuses_a_graph_of_another_config(graph: onnx.ModelProto) -> None:
    with pytest.raises(GraphError, match="inputs or outputs"):
        check(graph, replace(TINY, digit_dim=8))


def test_check_refuses_what_is_not_valid_onnx(tampered: onnx.ModelProto) -> None:
    del tampered.graph.initializer[0]
    with pytest.raises(GraphError, match="not valid ONNX"):
        check(tampered, TINY)


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
    with pytest.raises(ParityError, match=r"\d+ of 35 labels changed, probabilities differ by up to 0\.0\d+ and poses"):
        verify(network, Runtime(exported, device="cpu"), IMAGES)


def test_a_tampered_graph_is_a_parity_error(trained: Checkpoint, tampered: onnx.ModelProto, tmp_path: Path) -> None:
    (bias,) = (tensor for tensor in tampered.graph.initializer if tensor.name.endswith("primary.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    runtime = Runtime(unverified(tampered, TINY, tmp_path), device="cpu")
    with pytest.raises(ParityError, match="differ"):
        verify(trained.model(), runtime, IMAGES)


def test_one_changed_label_is_a_parity_error_however_close_the_probabilities_are(
    trained: Checkpoint, exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tie = torch.zeros(35, TINY.classes)
    tie[:, 0] = 0.5
    tie[:, 1] = 0.5 - 1e-6
    poses = torch.zeros(35, TINY.classes, TINY.digit_dim)
    swapped = tie.clone()
    swapped[30, :2] = swapped[30, :2].flip(0)
    answers = iter([swapped[:20].numpy(), *swapped[20:].unsqueeze(1).numpy()])

    def answer(runtime: Runtime, images: NDArray[np.uint8]) -> Prediction:
        probabilities = next(answers)
        return Prediction(probabilities, poses[: len(probabilities)].numpy())

    runtime = Runtime(exported, device="cpu")
    monkeypatch.setattr(Runtime, "predict", answer)
    monkeypatch.setattr("export.verify.predict", lambda network, images: (tie, poses))
    with pytest.raises(ParityError, match="1 of 35 labels changed"):
        verify(trained.model(), runtime, IMAGES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("output", [0, 1])
def test_a_value_that_is_not_finite_is_a_parity_error(
    trained: Checkpoint, exported: Artifact, monkeypatch: pytest.MonkeyPatch, value: float, output: int
) -> None:
    honest = Runtime.predict

    def spoiled(runtime: Runtime, images: NDArray[np.uint8]) -> Prediction:
        prediction = honest(runtime, images)
        prediction[output].flat[-1] = value
        return prediction

    runtime = Runtime(exported, device="cpu")
    monkeypatch.setattr(Runtime, "predict", spoiled)
    with pytest.raises(ParityError, match="the exported model computes 16 values that are not finite"):
        verify(trained.model(), runtime, IMAGES)


def test_weights_that_are_not_finite_are_a_parity_error(exported: Artifact) -> None:
    network = random_network(TINY)
    with torch.no_grad():
        network.conv1.weight[0] = torch.nan
    with pytest.raises(ParityError, match="PyTorch computes"):
        verify(network, Runtime(exported, device="cpu"), IMAGES)


def test_nothing_is_left_of_an_export_that_fails_its_verification(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Runtime.predict

    def off(runtime: Runtime, images: NDArray[np.uint8]) -> Prediction:
        prediction = honest(runtime, images)
        return prediction._replace(poses=prediction.poses + np.float32(2e-4))

    monkeypatch.setattr(Runtime, "predict", off)
    with pytest.raises(ParityError, match=r"0 of 35 labels changed.*poses by up to 0\.0002"):
        export_checkpoint(trained, IMAGES, LABELS, tmp_path, NAME, "1")
    assert not (tmp_path / NAME / "1").exists()


def test_nothing_is_left_of_an_export_that_is_interrupted(
    trained: Checkpoint, tmp_path: Path, ready_made: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.to_onnx.verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(trained, IMAGES, LABELS, tmp_path, NAME, "1")
    assert not (tmp_path / NAME / "1").exists()


@pytest.mark.parametrize("figures", [{"test_errors": 21, "test_images": 20}, {"test_errors": 21}, {}])
def test_figures_that_are_not_those_of_the_weights_are_refused(
    trained: Checkpoint, tmp_path: Path, ready_made: None, figures: dict[str, int]
) -> None:
    with pytest.raises(CheckpointError, match="figures are not those of its weights"):
        export_checkpoint(replace(trained, figures=figures), IMAGES, LABELS, tmp_path, NAME, "1")
    assert not (tmp_path / NAME / "1").exists()


def test_an_existing_version_is_refused_and_left_as_it_is(trained: Checkpoint, exported: Artifact) -> None:
    repository = exported.folder.parent.parent
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(exported.folder))}.*never overwritten"):
        export_checkpoint(trained, IMAGES, LABELS, repository, NAME, "1")
    assert artifacts.load(exported.folder) == exported


def test_test_images_of_another_shape_are_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"takes images \(1, 28, 28\), the test set's are \(3, 28, 28\)"):
        export_checkpoint(trained, IMAGES.expand(-1, 3, -1, -1), LABELS, tmp_path, NAME, "1")
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_labels_than_classes_is_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="10 classes but 2 labels"):
        export_checkpoint(replace(trained, labels=("a", "b")), IMAGES, LABELS, tmp_path, NAME, "1")


def test_weights_that_do_not_fit_the_config_are_refused(trained: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        export_checkpoint(replace(trained, config=CONFIGS["compact"]), IMAGES, LABELS, tmp_path, NAME, "1")


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan")])
def test_a_recipe_that_json_cannot_hold_is_refused(trained: Checkpoint, tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        export_checkpoint(replace(trained, recipe={"rate": value}), IMAGES, LABELS, tmp_path, NAME, "1")


def test_a_changed_byte_in_the_model_file_is_found_when_it_is_loaded(
    trained: Checkpoint, tmp_path: Path, ready_made: None
) -> None:
    exported = export_checkpoint(trained, IMAGES, LABELS, tmp_path, NAME, "1")
    content = bytearray(exported.model_file.read_bytes())
    content[len(content) // 2] ^= 1
    exported.model_file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        artifacts.load(exported.folder)
    for part in (str(exported.model_file), exported.sha256, artifacts.digest(exported.model_file)):
        assert part in str(caught.value)


class Payload:
    """Unpickled by ``pickle.load``, it creates a file."""

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
    """``datasets.load`` answers with the test images of this module."""
    dataset = Dataset("mnist", tuple("0123456789"), IMAGES[:0], LABELS[:0], IMAGES, LABELS)
    monkeypatch.setattr(datasets, "load", lambda name, folder: dataset)


def test_the_command_writes_one_version_after_another_and_prints_what_it_measured(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out), "--version", "10"]) == 0
    assert command.main([str(checkpoint_file), str(out)]) == 0
    assert command.main([str(checkpoint_file), str(out), "--name", "other"]) == 0
    printed = capsys.readouterr()
    versions = {path.parent.relative_to(out).as_posix() for path in out.glob(f"*/*/{MANIFEST}")}
    assert versions == {f"{NAME}/1", f"{NAME}/2", f"{NAME}/10", f"{NAME}/11", "other/1"}
    first = artifacts.load(out / NAME / "1")
    assert f"wrote {first.model_file}, {first.model_file.stat().st_size} bytes\n" in printed.out
    assert "on 35 images" in printed.out
    assert "0 labels changed\n" in printed.out
    assert f"test error {first.test_error}\n" in printed.out
    assert printed.err == ""


def test_the_command_says_in_one_line_why_it_failed(
    checkpoint_file: Path, tmp_path: Path, test_set: None, ready_made: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint_file), str(tmp_path / "models"), "--version", "1"]
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


def test_the_command_refuses_a_checkpoint_of_an_unknown_data_set(
    trained: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "capsnet.pt"
    checkpoints.save(replace(trained, dataset="../letters"), path)
    assert command.main([str(path), str(tmp_path)]) == 1
    assert "unknown data set '../letters'" in capsys.readouterr().err


def test_the_command_fails_where_the_test_set_cannot_be_had(
    checkpoint_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, folder: Path) -> Dataset:
        raise DatasetError(f"could not get {name}:\n  {folder}: nothing there")

    monkeypatch.setattr(datasets, "load", fail)
    assert command.main([str(checkpoint_file), str(tmp_path / "models"), "--data-dir", "elsewhere"]) == 1
    assert capsys.readouterr().err.endswith("could not get mnist:\n  elsewhere: nothing there\n")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["capsnet.pt"], id="no-out"),
        pytest.param(["capsnet.pt", "out", "--name", "Upper"], id="upper-case"),
        pytest.param(["capsnet.pt", "out", "--name", "../up"], id="path-in-name"),
        pytest.param(["capsnet.pt", "out", "--name", ""], id="empty-name"),
        pytest.param(["capsnet.pt", "out", "--version", "0"], id="version-0"),
        pytest.param(["capsnet.pt", "out", "--version", "-1"], id="negative-version"),
        pytest.param(["capsnet.pt", "out", "--version", "1.5"], id="fraction"),
        pytest.param(["capsnet.pt", "out", "--opset", "3"], id="old-opset"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m export" in capsys.readouterr().err
