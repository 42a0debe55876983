"""Tests of the graph in half precision: its float16 parts, and its difference to float32."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from export.graph import GraphError
from export.to_fp16 import rounded, to_fp16
from export.verify import edge_images
from tests.graphs import STEM, TINY, assert_kept, by_hand, changed, digest, exported, random_images, run
from training.model import CapsNetConfig

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def graph() -> ModelProto:
    return exported(TINY)


@pytest.fixture(scope="module")
def half(graph: ModelProto) -> ModelProto:
    return to_fp16(graph)


def types(model: ModelProto) -> dict[str, int]:
    """Return the element type of each value and initializer."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    result = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        result[value.name] = value.type.tensor_type.elem_type
    return result


def test_convolutions_and_votes_are_in_half_precision_and_the_rest_in_single(half: ModelProto) -> None:
    found = types(half)
    products = [found[node.output[0]] for node in half.graph.node if node.op_type == "MatMul"]
    assert products == [FLOAT, HALF, FLOAT, FLOAT, FLOAT, FLOAT]  # the second product is the votes
    for node in half.graph.node:
        if node.op_type in ("Conv", "Relu"):
            assert {found[name] for name in (*node.input, *node.output)} == {HALF}
        if node.op_type in ("ReduceL2", "Pow", "Add", "Softmax", "Mul"):
            assert found[node.output[0]] == FLOAT
    assert found["images"] == TensorProto.UINT8
    assert found["probabilities"] == found["poses"] == FLOAT


def test_casts_stand_only_at_the_borders_of_half_precision(half: ModelProto) -> None:
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    # The image, the capsules from and to half, the votes, and the weights, which are cast once at the load.
    assert len(casts) == 5
    assert casts[0].input[0] == "images"
    assert len({node.input[0] for node in casts}) == 5


def test_the_weights_are_stored_in_half_precision_and_the_file_is_half_as_large(
    graph: ModelProto, half: ModelProto
) -> None:
    large = [tensor for tensor in half.graph.initializer if np.prod(tensor.dims) > 100]
    assert len(large) == 3
    assert {tensor.data_type for tensor in large} == {HALF}
    saved = graph.ByteSize() - half.ByteSize()
    parameters = sum(int(np.prod(tensor.dims)) for tensor in large)
    assert saved == pytest.approx(2 * parameters, rel=0.02)


def test_the_graph_is_valid_and_keeps_names_properties_shapes_and_operator_set(
    graph: ModelProto, half: ModelProto
) -> None:
    named = ModelProto()
    named.CopyFrom(graph)
    named.doc_string = "A text."
    onnx.helper.set_model_props(named, {"name": "value"})
    assert_kept(to_fp16(named), named)


def test_the_same_graph_gives_the_same_bytes_and_is_left_as_it_was(graph: ModelProto, half: ModelProto) -> None:
    before = graph.SerializeToString(deterministic=True)
    assert to_fp16(graph).SerializeToString(deterministic=True) == half.SerializeToString(deterministic=True)
    assert graph.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_batch_of_any_size_is_near_to_single_precision(graph: ModelProto, half: ModelProto, batch: int) -> None:
    images = random_images(TINY, batch)
    for found, expected in zip(run(half, images), run(graph, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        assert found.dtype == np.float32


def test_blank_saturated_and_noise_images_are_near_to_single_precision(graph: ModelProto, half: ModelProto) -> None:
    images = edge_images(1, 28)
    for found, expected in zip(run(half, images), run(graph, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("config", "opset"),
    [
        pytest.param(replace(TINY, image_channels=3, image_size=20, classes=3), 18, id="colour"),
        pytest.param(replace(TINY, agreement="euclidean"), 25, id="euclidean"),
        pytest.param(replace(TINY, normalization="max-min"), 20, id="max-min"),
        pytest.param(replace(TINY, digit_bias=True, primary_divisor=32.0, initialization="authors"), 20, id="authors"),
        pytest.param(replace(TINY, routing_iterations=1, classes=1, digit_dim=1), 20, id="one-iteration-one-class"),
        pytest.param(STEM, 20, id="stem"),
        pytest.param(replace(STEM, routing_scale=4.0), 20, id="scale"),
        pytest.param(replace(STEM, primary_gate=True), 20, id="gate"),
    ],
)
def test_any_network_is_near_to_single_precision(config: CapsNetConfig, opset: int) -> None:
    graph = exported(config, opset)
    half = to_fp16(graph)
    images = torch.cat((random_images(config, 3), edge_images(config.image_channels, config.image_size)))
    for model in (half, rounded(half)):
        for found, expected in zip(run(model, images), run(graph, images), strict=True):
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_all_convolutions_of_a_stem_are_in_half_precision() -> None:
    half = to_fp16(exported(STEM))
    found = types(half)
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == len(STEM.stem) + 1
    assert {found[name] for node in convolutions for name in (*node.input, *node.output)} == {HALF}


def test_the_bytes_of_two_convolutions_are_those_that_they_always_were() -> None:
    assert digest(to_fp16(by_hand())) == "7ba2f7bdafaabd75b8423f76ca9bfb709c981e530f82bbd5a12e902d06118c11"


def test_the_rounded_graph_rounds_where_onnx_runtimes_cpu_does_not() -> None:
    half = to_fp16(by_hand())
    told = ModelProto()
    told.CopyFrom(rounded(half))
    names = ["scaled", "first", "features", "divided", "maps"]
    told.graph.output.extend(onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    images = torch.randint(0, 256, (4, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    poses, *values = run(told, images)
    for value in values:
        assert np.array_equal(value, value.astype(np.float16))
    pixels = (images / 256).half().float()
    weights = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in half.graph.initializer}
    maps = pixels
    for layer, stride, divisor in (("first", 1, 4), ("second", 2, 1)):
        weight, bias = (weights[f"{layer}.{name}"].float() for name in ("weight", "bias"))
        maps = torch.nn.functional.conv2d(maps, weight, bias, stride=stride).half().float()
        maps = (maps.relu() / divisor).half().float() if layer == "first" else maps
    assert np.array_equal(values[-1], maps.numpy())
    assert np.array_equal(poses, run(rounded(half), images)[0])
    assert not np.array_equal(poses, run(half, images)[0])


def test_the_rounded_graph_is_single_precision_but_for_its_rounding(half: ModelProto) -> None:
    model = rounded(half)
    found = types(model)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert {name for name, kind in found.items() if kind == HALF} == {
        node.output[0] for node in casts if node.attribute[0].i == HALF
    }
    assert all(tensor.data_type != HALF for tensor in model.graph.initializer)
    assert list(model.graph.output) == list(half.graph.output)


@pytest.mark.parametrize("factor", [100, 3000])
def test_capsules_longer_than_the_root_of_the_largest_half_stay_finite_and_near(
    graph: ModelProto, factor: float
) -> None:
    long = changed(graph, "primary.weight", lambda array: array * factor)
    images = random_images(TINY, 4)
    name = next(node for node in long.graph.node if node.op_type == "ReduceL2").output[0]
    long.graph.output.append(onnx.helper.make_tensor_value_info(name, FLOAT, None))
    *expected, length = run(long, images)
    assert length.max() > 256 if factor == 3000 else length.max() > 10
    *found, _ = run(to_fp16(long), images)
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("value", [1e5, -65520, np.inf, np.nan])
@pytest.mark.parametrize("name", ["conv1.weight", "primary.bias", "network.weight"])
def test_a_weight_that_half_precision_cannot_hold_is_a_graph_error(graph: ModelProto, name: str, value: float) -> None:
    def spoil(array: NDArray[np.float32]) -> NDArray[np.float32]:
        copy = array.copy()
        copy.flat[-1] = value
        return copy

    with pytest.raises(GraphError, match=f"{name} holds values that are not finite in float16"):
        to_fp16(changed(graph, name, spoil))


def test_the_largest_half_is_kept_exactly(graph: ModelProto) -> None:
    largest = changed(graph, "primary.bias", lambda array: np.full_like(array, 65504))
    (bias,) = (tensor for tensor in to_fp16(largest).graph.initializer if tensor.name.endswith("primary.bias"))
    assert set(onnx.numpy_helper.to_array(bias)) == {65504}


def test_a_graph_that_does_not_begin_with_two_convolutions_is_a_graph_error() -> None:
    value = onnx.helper.make_tensor_value_info("images", FLOAT, ["batch", 2])
    output = onnx.helper.make_tensor_value_info("poses", FLOAT, ["batch", 2])
    node = onnx.helper.make_node("Relu", ["images"], ["poses"])
    other = onnx.helper.make_model(onnx.helper.make_graph([node], "other", [value], [output]))
    with pytest.raises(GraphError, match="meets 0 convolutions"):
        to_fp16(other)
