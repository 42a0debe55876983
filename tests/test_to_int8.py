"""Tests of the graph in 8-bit integers: its quantised parts, ONNX Runtime's optimisation, and its accuracy."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from export.graph import GraphError
from export.to_int8 import to_int8
from export.verify import edge_images
from tests.graphs import STEM, TINY, assert_kept, by_hand, changed, digest, exported, random_images, run
from training.model import CapsNetConfig

TOLERANCE = 0.03  # of probabilities and poses, which are from -1 to 1


@pytest.fixture(scope="module")
def graph() -> ModelProto:
    model = ModelProto()
    model.CopyFrom(exported(TINY))
    model.doc_string = "A text."
    onnx.helper.set_model_props(model, {"name": "value"})
    return model


IMAGES = random_images(TINY, 8)


@pytest.fixture(scope="module")
def integer(graph: ModelProto) -> ModelProto:
    return to_int8(graph, IMAGES)


def maker(model: ModelProto, name: str) -> NodeProto:
    (node,) = (node for node in model.graph.node if name in node.output)
    return node


def constant(model: ModelProto, name: str) -> NDArray[Any]:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    return array


def test_both_convolutions_and_nothing_else_are_quantised(graph: ModelProto, integer: ModelProto) -> None:
    before, after = (Counter(node.op_type for node in model.graph.node) for model in (graph, integer))
    assert after - before == {"DequantizeLinear": 7, "QuantizeLinear": 2}
    assert before - after == {"Cast": 1, "Div": 1, "Relu": 1}
    for node in integer.graph.node:
        if node.op_type == "Conv":
            assert [maker(integer, name).op_type for name in node.input] == ["DequantizeLinear"] * 3


def test_weights_are_symmetric_int8_with_a_scale_for_each_channel_and_biases_int32(integer: ModelProto) -> None:
    for convolution in (node for node in integer.graph.node if node.op_type == "Conv"):
        value, weight, bias = (maker(integer, name) for name in convolution.input)
        integers, steps = (constant(integer, name) for name in weight.input)
        assert integers.dtype == np.int8
        assert np.abs(integers.astype(int)).max((1, 2, 3)).tolist() == [127] * len(integers)
        assert steps.shape == (len(integers),)
        bias_integers, bias_steps = (constant(integer, name) for name in bias.input)
        assert bias_integers.dtype == np.int32
        assert np.array_equal(bias_steps, constant(integer, value.input[1]) * steps)


def test_the_image_is_the_first_convolutions_integers_without_rounding(integer: ModelProto) -> None:
    first = next(node for node in integer.graph.node if node.op_type == "Conv")
    pixels = maker(integer, first.input[0])
    assert pixels.input[0] == "images"
    assert constant(integer, pixels.input[1]) == np.float32(1 / 255)
    assert constant(integer, pixels.input[2]) == 0


def test_onnx_runtime_convolves_integers_and_hands_them_from_one_to_the_other(
    integer: ModelProto, tmp_path: Path
) -> None:
    run(integer, IMAGES, tmp_path / "optimized.onnx")
    nodes = list(onnx.load_model(tmp_path / "optimized.onnx").graph.node)
    operators = Counter(node.op_type for node in nodes)
    assert operators["QLinearConv"] == 2
    assert operators["DequantizeLinear"] == 1
    assert not operators.keys() & {"QuantizeLinear", "Conv", "Cast", "Relu"}
    beginning = [node.op_type for node in nodes[: [node.op_type for node in nodes].index("DequantizeLinear")]]
    assert set(beginning) <= {"QLinearConv", "Transpose"}


def test_the_graph_is_valid_and_keeps_names_properties_shapes_and_operator_set(
    graph: ModelProto, integer: ModelProto
) -> None:
    assert_kept(integer, graph)
    used = {name for node in integer.graph.node for name in node.input}
    assert {tensor.name for tensor in integer.graph.initializer} <= used


def test_the_same_graph_and_images_give_the_same_bytes_and_the_graph_is_left_as_it_was(
    graph: ModelProto, integer: ModelProto, capfd: pytest.CaptureFixture[str]
) -> None:
    before = graph.SerializeToString(deterministic=True)
    again = to_int8(graph, IMAGES)
    assert again.SerializeToString(deterministic=True) == integer.SerializeToString(deterministic=True)
    assert graph.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_batch_of_any_size_is_near_to_float(graph: ModelProto, integer: ModelProto, batch: int) -> None:
    images = random_images(TINY, batch)
    for found, expected in zip(run(integer, images), run(graph, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        assert found.dtype == np.float32


def test_an_image_gets_the_same_answer_in_any_batch(integer: ModelProto) -> None:
    together = run(integer, IMAGES)[0]
    apart = np.concatenate([run(integer, image)[0] for image in torch.split(IMAGES, 1)])
    np.testing.assert_allclose(together, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "opset"),
    [
        pytest.param(TINY, 20, id="tiny"),
        pytest.param(replace(TINY, image_channels=3, image_size=20, classes=3), 18, id="colour"),
        pytest.param(replace(TINY, agreement="euclidean"), 25, id="euclidean"),
        pytest.param(replace(TINY, normalization="max-min"), 20, id="max-min"),
        pytest.param(replace(TINY, digit_bias=True, primary_divisor=32.0, initialization="authors"), 20, id="authors"),
        pytest.param(replace(TINY, routing_iterations=1, classes=1, digit_dim=1), 20, id="one-iteration-one-class"),
        pytest.param(STEM, 20, id="stem"),
        pytest.param(replace(STEM, routing_scale=4.0), 20, id="scale"),
        pytest.param(replace(STEM, primary_gate=True), 20, id="gate"),
        pytest.param(replace(STEM, image_channels=3, stem=((8, 3, 2, 0),), primary_divisor=4.0), 20, id="one-in-stem"),
    ],
)
def test_any_network_is_near_to_float_on_images_of_any_kind(config: CapsNetConfig, opset: int, tmp_path: Path) -> None:
    graph = exported(config, opset)
    images = random_images(config, 8)
    integer = to_int8(graph, images)
    images = torch.cat((images, edge_images(config.image_channels, config.image_size)))
    path = tmp_path / "optimized.onnx"
    for found, expected in zip(run(integer, images, path), run(graph, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    operators = Counter(node.op_type for node in onnx.load_model(path).graph.node)
    assert (operators["QLinearConv"], operators["QuantizeLinear"]) == (len(config.convolutions) + 1, 0)


def test_every_convolution_of_a_stem_has_a_step_for_its_own_input() -> None:
    graph = exported(STEM)
    images = random_images(STEM, 8)
    integer = to_int8(graph, images)
    values = [node.output[0] for node in graph.graph.node if node.op_type == "Relu"]
    told = ModelProto()
    told.CopyFrom(graph)
    told.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values)
    _, _, *features = run(told, torch.cat((images, edge_images(1, 28))))
    convolutions = [node for node in integer.graph.node if node.op_type == "Conv"]
    steps = [float(constant(integer, maker(integer, node.input[0]).input[1])) for node in convolutions]
    assert steps == pytest.approx([1 / 255, *(float(array.max()) / 255 for array in features)], rel=1e-5)
    assert len(set(steps)) == len(STEM.stem) + 1


def test_the_bytes_of_two_convolutions_are_those_that_they_always_were() -> None:
    images = torch.randint(0, 256, (4, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert digest(to_int8(by_hand(), images)) == "42d5932f0bc847f52101951e01ba35ed8c2dc655a1284364c0f8d0303f97b897"


def test_two_convolutions_may_share_a_constant(graph: ModelProto) -> None:
    shared = ModelProto()
    shared.CopyFrom(exported(replace(TINY, primary_types=1)))
    (first, second) = (node for node in shared.graph.node if node.op_type == "Conv")
    second.input[2] = first.input[2]
    for found, expected in zip(run(to_int8(shared, IMAGES), IMAGES), run(shared, IMAGES), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_images_beyond_the_calibrated_range_are_cut_off_and_stay_finite(graph: ModelProto) -> None:
    integer = to_int8(graph, torch.zeros((1, 1, 28, 28), dtype=torch.uint8))
    for output in run(integer, torch.cat((edge_images(1, 28), IMAGES))):
        assert np.isfinite(output).all()


def edited(model: ModelProto, name: str, value: float, rows: slice) -> ModelProto:
    """Return a copy in which some rows of one initializer, found by the end of its name, have this value."""

    def change(array: NDArray[np.float32]) -> NDArray[np.float32]:
        array[rows] = value
        return array

    return changed(model, name, change)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(None)])
@pytest.mark.parametrize("layer", ["conv1", "primary"])
def test_channels_without_weights_are_near_to_float(graph: ModelProto, layer: str, rows: slice) -> None:
    dead = edited(graph, f"{layer}.weight", 0, rows)
    for model in (dead, edited(dead, f"{layer}.bias", 0, rows)):
        for found, expected in zip(run(to_int8(model, IMAGES), IMAGES), run(model, IMAGES), strict=True):
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_a_bias_that_dwarfs_its_weights_is_near_to_float(graph: ModelProto) -> None:
    small = edited(edited(graph, "primary.weight", 1e-12, slice(0, 2)), "primary.bias", 3, slice(0, 2))
    for found, expected in zip(run(to_int8(small, IMAGES), IMAGES), run(small, IMAGES), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_weight_that_is_not_finite_is_a_graph_error(graph: ModelProto, value: float) -> None:
    with pytest.raises(GraphError, match=r"conv1\.weight holds values that are not finite"):
        to_int8(edited(graph, "conv1.weight", value, slice(0, 1)), IMAGES)


def test_activations_that_are_not_finite_are_a_graph_error(graph: ModelProto) -> None:
    huge = edited(edited(graph, "conv1.weight", 3e37, slice(None)), "primary.weight", 3e37, slice(None))
    with pytest.raises(GraphError, match="activations that are not finite"):
        to_int8(huge, IMAGES)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(IMAGES[:0], id="none"),
        pytest.param(IMAGES.float(), id="float"),
        pytest.param(IMAGES[0], id="one-axis-less"),
        pytest.param(IMAGES.expand(-1, 3, -1, -1), id="colour"),
        pytest.param(IMAGES[..., 1:], id="narrow"),
    ],
)
def test_images_that_the_graph_does_not_take_are_refused(graph: ModelProto, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images to calibrate with: .*expected uint8 \(N, 1, 28, 28\)"):
        to_int8(graph, images)


def test_a_graph_that_is_quantised_already_is_a_graph_error(integer: ModelProto) -> None:
    with pytest.raises(GraphError, match="the graph begins with DequantizeLinear, Conv"):
        to_int8(integer, IMAGES)


def test_a_convolution_without_a_bias_is_a_graph_error(graph: ModelProto) -> None:
    bare = ModelProto()
    bare.CopyFrom(graph)
    del next(node for node in bare.graph.node if node.op_type == "Conv").input[2]
    with pytest.raises(GraphError, match=r"input 2 of Conv .* is no constant"):
        to_int8(bare, IMAGES)


def test_the_file_is_smaller_by_three_bytes_a_weight_of_the_convolutions(
    graph: ModelProto, integer: ModelProto
) -> None:
    weights = sum(
        int(np.prod(tensor.dims)) for tensor in integer.graph.initializer if tensor.data_type == TensorProto.INT8
    )
    assert graph.ByteSize() - integer.ByteSize() == pytest.approx(3 * weights, abs=10_000)
