"""The served graph with its convolutions in 8-bit integers, for CPUs.

The convolutions have nearly all multiply-adds of a network. Squash and routing stay in float32. The graph has
QuantizeLinear and DequantizeLinear around each convolution (QDQ), from which ONNX Runtime makes its integer
convolution, QLinearConv.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn.functional import conv2d

from export.graph import GraphError
from export.verify import edge_images

# The operators between the image and the primary capsules, each with a space after it. Pixels are divided first. ReLU
# stands between the convolutions. The input of the last convolution may be divided too.
_BEGINNING = re.compile("Cast Div (?:Conv Relu )+(?:Div )?Conv ")
_SHORTEST = "Cast, Div, Conv, Relu, Conv"
_SHOWN_OPERATORS = 6  # of a graph with other operators
_MAX_ACTIVATION = 255  # of uint8
_MAX_WEIGHT = 127  # of int8, made symmetric
# An int32 sum begins with the bias. This leaves half of its range to the products.
_MAX_BIAS = 2**30
_MIN_STEP = 1e-12  # if all activations are 0
_BATCH_SIZE = 64

_Floats = NDArray[np.float64]


class _Layer(NamedTuple):
    """A convolution from I to O channels: its node, weights (O, I, k, k), bias (O,), and the divisor of its input."""

    node: NodeProto
    weight: _Floats
    bias: _Floats
    divisor: float

    def __call__(self, features: Tensor) -> Tensor:
        """Convolve features (B, I, H, W), which are divided already, in single precision."""
        rows, columns, *_ = helper.get_node_attr_value(self.node, "pads")
        stride = helper.get_node_attr_value(self.node, "strides")
        weight, bias = (torch.from_numpy(array).float() for array in (self.weight, self.bias))
        return conv2d(features, weight, bias, stride=stride, padding=(rows, columns))


class _Layers(NamedTuple):
    """The beginning of the graph: all its nodes, and its convolutions, in order."""

    nodes: list[NodeProto]
    convolutions: list[_Layer]


class _Ranges(NamedTuple):
    """Ranges of the activations.

    features: the largest input of each convolution after the first, after its division. low, high: the smallest and the
    largest output of the last convolution, by channel, (T*D,).
    """

    features: list[float]
    low: _Floats
    high: _Floats


def to_int8(model: ModelProto, images: Tensor) -> ModelProto:
    """Return a copy of a graph of ``to_onnx`` whose convolutions compute in 8-bit integers.

    Inputs, outputs, operator set, name and properties stay. The same graph and images give the same bytes.

    images: uint8 (N, C, H, W), 0 to 255, of the training set, N one or more. Their activations and those of
    ``edge_images`` set the ranges. Activations outside the ranges are cut off.

    Weights become int8, symmetric, with a scale for each output channel. Activations become uint8. Biases become int32;
    their scale is the product of the other two (Krishnamoorthi, "Quantizing deep convolutional networks for efficient
    inference", arXiv 1806.08342). Two choices avoid errors at no cost:

    - The first convolution takes the image itself, at scale 1/255, so its input is not rounded.
    - The primary capsules have a range for each channel. Some channels reach ten times as far as the others, so one
      range for all would be too coarse. QLinearConv has one scale for its whole output. So the step of each channel is
      folded into the weights of the channel, which have a scale of their own.

    CPUs without VNNI instructions (x86 before 2019) add products of uint8 and int8 in pairs of 16 bits. Such a sum may
    not fit. ONNX Runtime avoids this with the session option ``session.x64quantprecision`` set to ``1``.

    Raises ValueError if there are no images, or if the graph does not take images of this type and shape. Raises
    GraphError if the graph does not begin like those of ``to_onnx``, or if a weight or activation is not finite.
    """
    _check_images(images, model)
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    layers = _layers(graph)
    ranges = _calibrate(layers, torch.cat((images, edge_images(*images.shape[1:3]))))
    beginning = _Beginning(layers, ranges, graph.input[0].name)

    replaced = {node.output[0] for node in layers.nodes}
    nodes = beginning.nodes + [node for node in graph.node if node.output[0] not in replaced]
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in (*graph.initializer, *beginning.constants) if tensor.name in used]
    known = {tensor.name for tensor in initializers} | {name for node in nodes for name in node.output}
    values = [value for value in graph.value_info if value.name in known]
    for field, parts in (("node", nodes), ("initializer", initializers), ("value_info", values)):
        graph.ClearField(field)
        getattr(graph, field).extend(parts)
    result = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    onnx.checker.check_model(result, full_check=True)
    return result


def _check_images(images: Tensor, model: ModelProto) -> None:
    _, *shape = (dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim)
    if images.dtype != torch.uint8 or list(images.shape[1:]) != shape or not len(images):
        raise ValueError(
            f"images to calibrate with: {images.dtype} {tuple(images.shape)}; expected uint8 (N, "
            f"{', '.join(map(str, shape))}), N one or more"
        )


def _layers(graph: GraphProto) -> _Layers:
    """Follow the graph from the image to the convolution of the primary capsules."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    takers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            takers.setdefault(name, []).append(node)
    value, nodes = graph.input[0].name, list[NodeProto]()
    while len(takers.get(value, [])) == 1:
        nodes += takers[value]
        value = nodes[-1].output[0]
    found = _BEGINNING.match("".join(f"{node.op_type} " for node in nodes))
    if not found:
        kinds = ", ".join(node.op_type for node in nodes[:_SHOWN_OPERATORS])
        raise GraphError(f"the graph begins with {kinds}; expected {_SHORTEST}, or more convolutions with ReLU")
    nodes = nodes[: found[0].count(" ")]

    def constant(node: NodeProto, index: int) -> _Floats:
        name = node.input[index] if index < len(node.input) else ""
        if name not in constants:
            raise GraphError(f"input {index} of {node.op_type} {node.name} is no constant")
        array: _Floats = numpy_helper.to_array(constants[name]).astype(np.float64)
        if not np.isfinite(array).all():
            raise GraphError(f"{name} holds values that are not finite numbers")
        return array

    convolutions, divisor = list[_Layer](), 1.0
    for node in nodes:
        if node.op_type == "Div":
            divisor = float(constant(node, 1))
        elif node.op_type == "Conv":
            convolutions.append(_Layer(node, constant(node, 1), constant(node, 2), divisor))
            divisor = 1.0
    return _Layers(nodes, convolutions)


def _calibrate(layers: _Layers, images: Tensor) -> _Ranges:
    first, *others = layers.convolutions
    channels = len(others[-1].bias)
    low, high = np.zeros(channels), np.zeros(channels)  # 0 must be within each range
    greatest = [0.0] * len(others)
    with torch.inference_mode():
        for batch in torch.split(images, _BATCH_SIZE):
            maps = first(batch / first.divisor)
            for index, layer in enumerate(others):
                features = maps.relu() / layer.divisor
                greatest[index] = max(greatest[index], float(features.max()))
                maps = layer(features)  # (B, T*D, h, w) after the last one
            if not maps.isfinite().all():
                raise GraphError("the images to calibrate with give activations that are not finite numbers")
            low = np.minimum(low, maps.amin((0, 2, 3)).numpy())
            high = np.maximum(high, maps.amax((0, 2, 3)).numpy())
    return _Ranges(greatest, low, high)


class _Beginning:
    """The nodes that replace those in ``layers``, and their constants."""

    def __init__(self, layers: _Layers, ranges: _Ranges, image: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names: set[str] = set()
        first, *others = layers.convolutions
        step = 1 / first.divisor
        zero = self._constant("zero", np.uint8(0))
        value = self._dequantize(image, self._constant("pixel_step", np.float32(step)), zero, "int8.pixels")
        layer = first
        for following, greatest in zip(others, ranges.features, strict=True):
            value = self._convolve(layer.node, value, layer.weight, layer.bias, step)
            # Values below 0 are cut off, as by ReLU. Two steps for the same integers divide as the graph did.
            step = max(greatest / _MAX_ACTIVATION, _MIN_STEP)
            undivided = self._constant("undivided_feature_step", np.float32(step * following.divisor))
            value = self._quantize(value, undivided, zero)
            feature_step = self._constant("feature_step", np.float32(step))
            value = self._dequantize(value, feature_step, zero, self._unused("int8.features"))
            layer = following
        steps = np.maximum((ranges.high - ranges.low) / _MAX_ACTIVATION, _MIN_STEP)  # (T*D,)
        zeros = np.rint(-ranges.low / steps)  # the integers for 0, (T*D,)
        weight = layer.weight / steps[:, None, None, None]
        value = self._convolve(layer.node, value, weight, layer.bias / steps + zeros, step)
        value = self._quantize(value, self._constant("one", np.float32(1)), zero)
        steps_name = self._constant("map_steps", steps.astype(np.float32))
        map_zeros = self._constant("map_zeros", zeros.astype(np.uint8))
        self._dequantize(value, steps_name, map_zeros, layer.node.output[0], 1)

    def _convolve(self, layer: NodeProto, value: str, weight: _Floats, bias: _Floats, step: float) -> str:
        """Apply ``layer``, with another weight and bias, to a value with the given step. Return the output's name."""
        steps = np.maximum(np.abs(weight).max((1, 2, 3)) / _MAX_WEIGHT, np.abs(bias) / (step * _MAX_BIAS))
        steps = np.maximum(steps, _MIN_STEP).astype(np.float32)
        bias_steps = np.float32(step) * steps  # exactly the product, as in ONNX Runtime
        integers = np.rint(weight / steps[:, None, None, None]).astype(np.int8)
        bias_integers = np.rint(bias / bias_steps).astype(np.int32)
        names = [value]
        for name, array, scale in ((layer.input[1], integers, steps), (layer.input[2], bias_integers, bias_steps)):
            scale_name, integer_name = self._constant(f"{name}_steps", scale), self._constant(name, array)
            names.append(self._dequantize(integer_name, scale_name, None, self._unused(f"int8.{name}_float"), 0))
        output = f"int8.{layer.output[0]}"
        node = NodeProto()
        node.CopyFrom(layer)
        node.input[:], node.output[:] = names, [output]
        self.nodes.append(node)
        return output

    def _quantize(self, value: str, step: str, zero: str) -> str:
        self.nodes.append(helper.make_node("QuantizeLinear", [value, step, zero], [f"{value}_integers"]))
        return f"{value}_integers"

    def _dequantize(self, value: str, step: str, zero: str | None, output: str, axis: int | None = None) -> str:
        inputs = [value, step] if zero is None else [value, step, zero]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], axis=axis))
        return output

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        unused = self._unused(f"int8.{name}")
        self.constants.append(numpy_helper.from_array(np.asarray(value), unused))
        return unused

    def _unused(self, name: str) -> str:
        """Return an unused name. Two convolutions may share a constant."""
        unused, number = name, 1
        while unused in self._names:
            number += 1
            unused = f"{name}_{number}"
        self._names.add(unused)
        return unused
