"""Graphs of random networks, made once, and ONNX Runtime to run them, for the tests of int8 and fp16."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from export.options import OPSET
from export.to_onnx import explanation_to_onnx, to_onnx
from serving.runtime import onnxruntime, saturates
from training.model import CapsNet, CapsNetConfig

TINY = CapsNetConfig(conv_channels=8, primary_types=2, decoder_widths=())
STEM = replace(TINY, stem=((8, 5, 2, 2), (12, 3, 1, 1), (8, 3, 2, 1)), primary_kernel=3, primary_stride=1)


def random_network(config: CapsNetConfig) -> CapsNet:
    """Return a network whose capsules are as long as a trained network's, so that differences are visible.

    The normalisations of a stem have statistics of random images, and random weights and biases.
    """
    torch.manual_seed(0)
    network = CapsNet(config).eval()
    with torch.no_grad():
        network.weight.mul_(3)
        network.primary.weight.mul_(10 if not config.stem else 1)
        if config.stem:
            normalise(network)
    return network


def normalise(network: CapsNet) -> None:
    """Give the stem's normalisations statistics of random images, and random weights and biases."""
    layers = [layer for layer in network.stem if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
        layer.momentum = 1.0
    network.stem.train()(random_images(network.config, 16) / 255)
    network.stem.eval()


def exported(config: CapsNetConfig, opset: int = OPSET) -> ModelProto:
    """Return the graph of a random network, made once, since the exporter takes seconds. A test must not change it."""
    return _exported(config, opset)


@cache
def _exported(config: CapsNetConfig, opset: int) -> ModelProto:
    return to_onnx(random_network(config), opset)


@cache
def explained(config: CapsNetConfig) -> ModelProto:
    """Return the graph that also shows the routing of a random network, made once. A test must not change it."""
    return explanation_to_onnx(random_network(config))


def with_weights(model: ModelProto, network: CapsNet) -> ModelProto:
    """Return a graph with a network's weights in place of its own, since the exporter takes seconds."""
    result = ModelProto()
    result.CopyFrom(model)
    weights = {f"network.{name}": value for name, value in network.state_dict().items() if "decoder." not in name}
    stored = [tensor for tensor in result.graph.initializer if tensor.name in weights]
    assert {tensor.name for tensor in stored} == weights.keys()
    for tensor in stored:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].numpy(), tensor.name))
    return result


def by_hand() -> ModelProto:
    """A graph of two convolutions whose sums are exact in any order, so that its bytes depend on no processor."""
    generator = np.random.default_rng(0)
    constants = {
        "scale": np.float32(256),
        "first.weight": generator.integers(-8, 9, (4, 1, 3, 3)).astype(np.float32) / 8,
        "first.bias": generator.integers(-8, 9, 4).astype(np.float32) / 8,
        "divisor": np.float32(4),
        "second.weight": generator.integers(-8, 9, (6, 4, 3, 3)).astype(np.float32) / 8,
        "second.bias": generator.integers(-8, 9, 6).astype(np.float32) / 8,
    }
    make: Callable[..., NodeProto] = onnx.helper.make_node
    first, second = ({"kernel_shape": [3, 3], "strides": [n, n], "pads": [0] * 4} for n in (1, 2))
    nodes = [
        make("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        make("Div", ["pixels", "scale"], ["scaled"]),
        make("Conv", ["scaled", "first.weight", "first.bias"], ["first"], **first),
        make("Relu", ["first"], ["features"]),
        make("Div", ["features", "divisor"], ["divided"]),
        make("Conv", ["divided", "second.weight", "second.bias"], ["maps"], **second),
        make("Softmax", ["maps"], ["poses"], axis=1),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "by-hand",
        [value("images", TensorProto.UINT8, ["batch", 1, 9, 9])], [value("poses", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def changed(model: ModelProto, name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> ModelProto:
    """Return a copy with ``change`` applied to the one initializer whose name ends like this."""
    result = ModelProto()
    result.CopyFrom(model)
    (tensor,) = (tensor for tensor in result.graph.initializer if tensor.name.endswith(name))
    array = np.asarray(change(numpy_helper.to_array(tensor).copy()), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return result


def digest(model: ModelProto) -> str:
    """SHA-256 of a graph's nodes and constants, hexadecimal."""
    parts = [part.SerializeToString(deterministic=True) for part in (*model.graph.node, *model.graph.initializer)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def random_images(config: CapsNetConfig, count: int) -> Tensor:
    return torch.randint(
        0, 256, (count, *config.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def run(model: ModelProto, images: Tensor, optimized: Path | None = None) -> list[NDArray[np.float32]]:
    """Return all outputs for images (B, C, H, W). ONNX Runtime writes its optimized graph to ``optimized``."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if saturates(Path("/proc/cpuinfo")):  # the server runs int8 like this on such a processor
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"images": images.numpy()})
    return outputs


def assert_kept(result: ModelProto, original: ModelProto) -> None:
    """Check that a converted graph is valid and keeps the names, properties, shapes and operator set."""
    onnx.checker.check_model(result, full_check=True)
    for field in ("doc_string", "metadata_props", "opset_import", "ir_version", "producer_name"):
        assert getattr(result, field) == getattr(original, field)
    assert list(result.graph.input) == list(original.graph.input)
    assert list(result.graph.output) == list(original.graph.output)
    assert {node.domain for node in result.graph.node} == {""}
    for value in result.graph.value_info:
        assert not any(axis.dim_param.startswith("unk") for axis in value.type.tensor_type.shape.dim)
