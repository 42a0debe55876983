"""Conversion of a checkpoint's network to ONNX graphs."""

import logging
import warnings
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, nn

from export.folding import folded
from export.graph import (
    BATCH,
    Explanation,
    GraphError,
    LiveDecoder,
    ServedNetwork,
    Signature,
    check,
    decoder_signature,
    explain_signature,
    served_signature,
)
from export.options import OPSET
from training.model import CapsNet

# The exporter treats an axis of length 1 as fixed.
_EXAMPLE_IMAGES = 2


def to_onnx(network: CapsNet, opset: int = OPSET) -> onnx.ModelProto:
    """Return the checked graph that classifies. The same network gives the same bytes.

    Its batch normalisations are folded into its convolutions.

    opset: the version of the ONNX operators, one of OPSETS. Raises GraphError.
    """
    return _export(ServedNetwork(folded(network)), _images(network), served_signature(network.config), opset)


def explanation_to_onnx(network: CapsNet, opset: int = OPSET) -> onnx.ModelProto:
    """Export like ``to_onnx``, with the further outputs of ``explain_signature``, which show the routing."""
    return _export(Explanation(folded(network)), _images(network), explain_signature(network.config), opset)


def decoder_to_onnx(network: CapsNet, opset: int = OPSET) -> onnx.ModelProto:
    """Return the decoder, which the network must have, as a graph from a pose and its class to an image."""
    config = network.config
    example = {
        "pose": torch.zeros(_EXAMPLE_IMAGES, config.digit_dim),
        "class": torch.zeros(_EXAMPLE_IMAGES, dtype=torch.int64),
    }
    return _export(LiveDecoder(network), example, decoder_signature(config), opset)


def _images(network: CapsNet) -> dict[str, Tensor]:
    return {"images": torch.zeros((_EXAMPLE_IMAGES, *network.config.image_shape), dtype=torch.uint8)}


def _export(module: nn.Module, example: Mapping[str, Tensor], signature: Signature, opset: int) -> onnx.ModelProto:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                module.eval(),
                tuple(example.values()),
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=tuple({0: torch.export.Dim(BATCH)} for _ in example),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise GraphError(f"PyTorch cannot export the network: {error}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    _strip(model)
    for values, meant in ((model.graph.input, signature.inputs), (model.graph.output, signature.outputs)):
        for value in values:
            value.doc_string = meant[value.name].meaning if value.name in meant else ""
    check(model, signature)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes, which include stack traces with paths of this machine."""
    graph = model.graph
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
