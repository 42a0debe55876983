"""Graphs of random networks, made once, and ONNX Runtime to run them, for the tests of int8 and fp16."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from export.options import OPSET
from export.to_onnx import to_onnx
from serving.runtime import onnxruntime, saturates
from training.model import CapsNet, CapsNetConfig

TINY = CapsNetConfig(conv_channels=8, primary_types=2, decoder_widths=())


def random_network(config: CapsNetConfig) -> CapsNet:
    """Return a network whose capsules are as long as a trained network's, so that differences are visible."""
    torch.manual_seed(0)
    network = CapsNet(config).eval()
    with torch.no_grad():
        network.weight.mul_(3)
        network.primary.weight.mul_(10)
    return network


def exported(config: CapsNetConfig, opset: int = OPSET) -> ModelProto:
    """Return the graph of a random network, made once, since the exporter takes seconds. A test must not change it."""
    return _exported(config, opset)


@cache
def _exported(config: CapsNetConfig, opset: int) -> ModelProto:
    return to_onnx(random_network(config), opset)


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
