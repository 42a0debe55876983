"""Tests of batch normalisation folded into convolutions, and of the export's comparison, which catches a wrong fold."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import folding
from export.build import export_checkpoint
from export.folding import fold, folded
from export.verify import ParityError
from tests.graphs import STEM, TINY, explained, exported, random_images, random_network, run, with_weights
from training.checkpoint import Checkpoint
from training.data.datasets import Dataset
from training.evaluate import predict
from training.model import CapsNet, to_pixels

IMAGES = random_images(STEM, 20)
LABELS = torch.arange(20) % STEM.classes
DATASET = Dataset("mnist", tuple("0123456789"), random_images(STEM, 40), torch.arange(40) % 10, IMAGES, LABELS)


@pytest.fixture(scope="module")
def network() -> CapsNet:
    return random_network(STEM)


@pytest.fixture(scope="module")
def trained(network: CapsNet) -> Checkpoint:
    """A checkpoint whose figures belong to its weights, of a network that was never trained."""
    errors = int((predict(network, IMAGES)[0].argmax(1) != LABELS).sum())
    figures = {"test_errors": errors, "test_images": len(LABELS)}
    return Checkpoint(STEM, "mnist", tuple("0123456789"), {"seed": 1}, figures, network.state_dict())


def test_a_folded_network_has_no_normalisation_and_computes_the_same(network: CapsNet) -> None:
    result = folded(network)
    assert [type(layer) for layer in result.stem] == [nn.Conv2d, nn.ReLU] * len(STEM.stem)
    assert Counter(type(layer) for layer in network.stem)[nn.BatchNorm2d] == len(STEM.stem)
    with torch.inference_mode():
        images = to_pixels(IMAGES)
        torch.testing.assert_close(result(images), network(images), atol=1e-6, rtol=0)


def test_the_normalisations_of_the_test_are_far_from_the_identity(network: CapsNet) -> None:
    identity = copy.deepcopy(network)
    for index, layer in enumerate(identity.stem):
        if isinstance(layer, nn.BatchNorm2d):
            identity.stem[index] = nn.Identity()
    with torch.inference_mode():
        images = to_pixels(IMAGES)
        assert (identity(images) - network(images)).abs().max() > 0.1


def test_a_network_without_a_stem_is_returned_itself() -> None:
    network = random_network(TINY)
    assert folded(network) is network


def test_training_statistics_are_folded_and_not_those_of_a_batch(network: CapsNet) -> None:
    training = copy.deepcopy(network).train()
    with torch.inference_mode():
        torch.testing.assert_close(folded(training)(to_pixels(IMAGES)), network(to_pixels(IMAGES)), atol=1e-6, rtol=0)
    assert training.training


def test_the_graphs_of_a_stem_hold_convolutions_with_bias_and_relu_alone(network: CapsNet) -> None:
    for model in (exported(STEM), explained(STEM)):
        # The explanation begins with the size of the batch.
        operators = [node.op_type for node in model.graph.node if node.op_type != "Shape"]
        assert operators[:10] == ["Cast", "Div", *["Conv", "Relu"] * len(STEM.stem), "Conv", "Reshape"]
        assert Counter(operators)["Conv"] == len(STEM.stem) + 1
        assert all(len(node.input) == 3 for node in model.graph.node if node.op_type == "Conv")
        poses = run(model, IMAGES)[1]
        np.testing.assert_allclose(poses, predict(network, IMAGES)[1], atol=1e-5, rtol=0)


def without_normalisation(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    return fold(convolution, nn.BatchNorm2d(normalisation.num_features, eps=0).eval())


def without_epsilon(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    changed = copy.deepcopy(normalisation)
    changed.eps = 0
    return fold(convolution, changed)


def shifted_before_scaled(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    """``gamma * ((w x - mean) / deviation + beta)``, the affine part in the wrong order."""
    changed = copy.deepcopy(normalisation)
    with torch.no_grad():
        changed.bias.mul_(changed.weight)
    return fold(convolution, changed)


def scaled_before_centred(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    """``gamma * (w x / deviation - mean) + beta``, the normalising part in the wrong order."""
    changed = copy.deepcopy(normalisation)
    with torch.no_grad():
        changed.get_buffer("running_mean").mul_((changed.get_buffer("running_var") + changed.eps).sqrt())
    return fold(convolution, changed)


def of_reversed_channels(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    changed = copy.deepcopy(normalisation)
    with torch.no_grad():
        for values in changed.state_dict().values():
            if values.ndim:
                values.copy_(values.flip(0))
    return fold(convolution, changed)


def without_mean(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    changed = copy.deepcopy(normalisation)
    changed.get_buffer("running_mean").zero_()
    return fold(convolution, changed)


def of_weights(network: CapsNet) -> onnx.ModelProto:
    """Return the graph of a folded network: another's graph with its weights."""
    return with_weights(exported(STEM), network)


def test_a_graph_with_the_weights_of_a_fold_is_the_one_that_is_exported(network: CapsNet) -> None:
    for given, kept in zip(
        of_weights(folded(network)).graph.initializer, exported(STEM).graph.initializer, strict=True
    ):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(given), onnx.numpy_helper.to_array(kept))


def test_a_right_fold_passes_the_exports_comparison(
    trained: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("export.build.to_onnx", lambda network, opset: of_weights(folded(network)))
    monkeypatch.setattr("export.build.explanation_to_onnx", lambda network, opset: explained(STEM))
    artifact, failures = export_checkpoint(trained, DATASET, tmp_path, "capsnet", "1")
    assert not failures
    assert artifact.variants["fp32"].max_pose_difference < 1e-5


@pytest.mark.parametrize(
    "mutated",
    [
        without_normalisation, without_epsilon, shifted_before_scaled, scaled_before_centred, of_reversed_channels,
        without_mean,
    ],
)  # fmt: skip
def test_a_wrong_fold_is_caught_by_the_exports_comparison(
    trained: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutated: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Conv2d],
) -> None:
    monkeypatch.setattr(folding, "fold", mutated)
    monkeypatch.setattr("export.build.to_onnx", lambda network, opset: of_weights(folded(network)))
    with pytest.raises(ParityError, match="fp32 and PyTorch differ"):
        export_checkpoint(trained, DATASET, tmp_path, "capsnet", "1")
    assert list(tmp_path.iterdir()) == []
