"""The graphs of an artifact: the content of each, and the checks of the finished file.

Axes as in training/model.py: B images, C H W of an image, I primary capsules, J classes, E pose dimension, and
R routing iterations.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import onnx
import torch
from torch import Tensor, nn

from serving.artifact import ReceptiveField
from serving.artifact import Tensor as TensorType
from training.model import CapsNet, CapsNetConfig, lengths, to_pixels, votes

BATCH = "batch"
#: The length below which a pose is taken for shorter than it is, so that a zero pose has the direction zero. The
#: exporter would drop a smaller one.
MIN_DIRECTED_LENGTH = 1e-6

#: ONNX's names of element types, and the manifest's.
_DTYPES = {"UINT8": "uint8", "INT64": "int64", "FLOAT": "float32"}

_MAX_MATMUL_RANK = 4


class GraphError(RuntimeError):
    """The network cannot be converted to an ONNX graph, or the graph cannot be served. The text says why."""


class Value(NamedTuple):
    """An input or output of a graph: its ONNX type, its shape after the batch axis, and its description."""

    type: str
    shape: tuple[int, ...]
    meaning: str


class Signature(NamedTuple):
    """The inputs and outputs of a graph, by name and in order. The first axis of every value is the open batch axis."""

    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]


def served_signature(config: CapsNetConfig) -> Signature:
    """Return the signature of the graphs that classify."""
    return Signature(
        {"images": Value("UINT8", config.image_shape, "Pixels from 0 to 255; the graph brings them to 0 to 1.")},
        {
            "probabilities": Value("FLOAT", (config.classes,), "The length of each class's pose; they add up to no 1."),
            "poses": Value("FLOAT", (config.classes, config.digit_dim), "The digit capsules v."),
        },
    )


def explain_signature(config: CapsNetConfig) -> Signature:
    """Return the signature of the graph that classifies and shows its routing."""
    served = served_signature(config)
    pairs = (config.classes, config.primary_capsules)
    routed = (config.routing_iterations, *pairs)
    return Signature(
        served.inputs,
        {
            **served.outputs,
            "couplings": Value(
                "FLOAT", routed, "By routing iteration, how much of each primary capsule's vote each class got, c."
            ),
            "agreements": Value(
                "FLOAT", routed, "By routing iteration, each vote's scalar product with that iteration's pose."
            ),
            "contributions": Value(
                "FLOAT", pairs, "Each vote times its last coupling, projected on the direction of the pose."
            ),
            "primary_lengths": Value("FLOAT", pairs[1:], "The length of each primary capsule."),
        },
    )


def decoder_signature(config: CapsNetConfig) -> Signature:
    """Return the signature of the graph that reconstructs."""
    return Signature(
        {
            "pose": Value("FLOAT", (config.digit_dim,), "The pose of one class."),
            "class": Value("INT64", (), "Which class it is, from 0."),
        },
        {"image": Value("FLOAT", config.image_shape, "The reconstruction, pixels from 0 to 1.")},
    )


class ServedNetwork(nn.Module):
    """The served network: without its decoder, with the normalization of pixels inside.

    ``forward`` takes uint8 images (B, C, H, W), 0 to 255, and returns the probabilities (B, J) and the poses
    (B, J, E), both float32.
    """

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        poses = self.network(to_pixels(images))
        return lengths(poses), poses


class Explanation(nn.Module):
    """A ServedNetwork that shows its routing, for the outputs of ``explain_signature``."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.explain(to_pixels(images))

    def explain(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in order, for pixels from 0 to 1, (B, C, H, W).

        They are the probabilities (B, J), the poses (B, J, E), by iteration the couplings (B, R, J, I) and the
        agreements (B, R, J, I), the contributions (B, J, I), and the lengths of the primary capsules (B, I). A zero
        pose has no direction; its contributions are 0.
        """
        u = self.network.primary_capsules(pixels)  # (B, I, D)
        iterations = self.network.routed_by_iteration(u)
        u_hat = votes(u, self.network.weight)  # (B, J, I, E)
        v, c = iterations[-1]
        probabilities = lengths(v)
        direction = v / probabilities.clamp(min=MIN_DIRECTED_LENGTH).unsqueeze(-1)
        compared = torch.stack([*(poses for poses, _ in iterations), direction], -1)  # (B, J, E, R + 1)
        products = (u_hat @ compared).permute(0, 3, 1, 2)  # (B, R + 1, J, I)
        return (
            probabilities,
            v,
            torch.stack([couplings for _, couplings in iterations], 1),
            products[:, :-1],
            c * products[:, -1],
            lengths(u),
        )


class LiveDecoder(nn.Module):
    """The decoder on the E inputs that are not masked, instead of all J*E.

    ``forward`` takes poses (B, E) and their classes (B,), int64, and returns pixels from 0 to 1, (B, C, H, W).
    """

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        decoder, config = network.decoder, network.config
        assert decoder is not None
        first, *rest = decoder.layers
        assert isinstance(first, nn.Linear)
        by_class = first.weight.detach().reshape(-1, config.classes, config.digit_dim).permute(1, 2, 0)  # (J, E, width)
        self.register_buffer("by_class", by_class.contiguous())
        self.register_buffer("bias", first.bias.detach())
        self.rest = nn.Sequential(*rest)
        self.shape = config.image_shape

    def forward(self, pose: Tensor, category: Tensor) -> Tensor:
        hidden = torch.bmm(pose.unsqueeze(1), self.get_buffer("by_class")[category]).squeeze(1)
        pixels: Tensor = self.rest(hidden + self.get_buffer("bias"))
        return pixels.reshape(-1, *self.shape)


def receptive_field(config: CapsNetConfig) -> ReceptiveField:
    """Return the pixels that each primary capsule sees, to interpret couplings."""
    return ReceptiveField(
        order="type, row, column",
        types=config.primary_types,
        grid=config.primary_grid,
        **config.receptive_field._asdict(),
    )


def tensor_types(values: Mapping[str, Value]) -> dict[str, TensorType]:
    """Return the types of a signature's inputs or outputs for the manifest."""
    return {name: TensorType(_DTYPES[value.type], value.shape) for name, value in values.items()}


def check(model: onnx.ModelProto, signature: Signature) -> None:
    """Check a finished graph.

    It must be valid ONNX with operators of the standard alone; its inputs and outputs must have the names, types and
    shapes of the signature, the batch axis left open; and it must hold no Einsum and no MatMul over five axes or
    more, which ONNX Runtime computes by copying the weights for each image.

    Raises GraphError for the first check that fails.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the graph is not valid ONNX: {error}") from error
    _check_values(inferred.input, signature.inputs)
    _check_values(inferred.output, signature.outputs)
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
            if rank > _MAX_MATMUL_RANK:
                raise GraphError(f"the graph holds a MatMul over {rank} axes ({node.name})")


def _check_values(values: Iterable[onnx.ValueInfoProto], wanted: Mapping[str, Value]) -> None:
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
        found[value.name] = (onnx.TensorProto.DataType.Name(tensor.elem_type), shape)
    expected = {name: (value.type, [BATCH, *value.shape]) for name, value in wanted.items()}
    if list(found.items()) != list(expected.items()):
        raise GraphError(f"the graph's inputs or outputs are {found}; expected {expected}")
