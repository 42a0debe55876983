"""The graph that is served: what goes into it, and what must hold of the finished file."""

from collections.abc import Iterable
from typing import Any

import onnx
from torch import Tensor, nn

from training.model import CapsNet, CapsNetConfig, lengths, to_pixels

INPUT = "images"
OUTPUTS = ("probabilities", "poses")
BATCH = "batch"

_LARGEST_MATMUL_RANK = 4


class GraphError(RuntimeError):
    """The network could not be turned into an ONNX graph, or the graph is not one to serve; the text says why."""


class ServedNetwork(nn.Module):
    """What is exported: the network without its decoder, with the normalisation of pixels inside.

    ``forward`` takes uint8 images (B, C, H, W), 0 to 255, and returns the probabilities (B, J) and the poses
    (B, J, E), both float32.
    """

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        poses = self.network(to_pixels(images))
        return lengths(poses), poses


def check(model: onnx.ModelProto, config: CapsNetConfig) -> None:
    """Check a finished graph.

    It must be valid ONNX with operators of the standard alone; its input and outputs must have the names, types and
    shapes that are served, the batch axis left open; and it must hold no Einsum and no MatMul over five axes or
    more, which ONNX Runtime computes by copying the weights for each image.

    Raises GraphError at the first thing that does not hold.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the graph is not valid ONNX: {error}") from error
    size, classes = config.image_size, config.classes
    _check_values(inferred.input, {INPUT: ("UINT8", [BATCH, config.image_channels, size, size])})
    probabilities, poses = OUTPUTS
    _check_values(
        inferred.output,
        {probabilities: ("FLOAT", [BATCH, classes]), poses: ("FLOAT", [BATCH, classes, config.digit_dim])},
    )
    ranks = {tensor.name: len(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        ranks[value.name] = len(value.type.tensor_type.shape.dim)
    for node in inferred.node:
        if node.domain:
            raise GraphError(f"the operator {node.domain}.{node.op_type} is not of the ONNX standard")
        if node.op_type == "Einsum":
            raise GraphError(f"the graph holds an Einsum ({node.name})")
        if node.op_type == "MatMul":
            rank = max(ranks[name] for name in (*node.input, *node.output))
            if rank > _LARGEST_MATMUL_RANK:
                raise GraphError(f"the graph holds a MatMul over {rank} axes ({node.name})")


def _check_values(values: Iterable[onnx.ValueInfoProto], expected: dict[str, tuple[str, list[Any]]]) -> None:
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
        found[value.name] = (onnx.TensorProto.DataType.Name(tensor.elem_type), shape)
    if list(found.items()) != list(expected.items()):
        raise GraphError(f"the graph's inputs or outputs are {found}; expected {expected}")
