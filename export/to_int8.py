"""The served graph with both convolutions in 8-bit integers, for CPUs.

The convolutions are nearly all of a network's multiply-adds; squash and routing stay as they are, in float32.
Written in QuantizeLinear and DequantizeLinear around each convolution (QDQ), from which ONNX Runtime makes its integer
convolution, QLinearConv.
"""

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

_BEGINNINGS = (
    ("Cast", "Div", "Conv", "Relu", "Conv"),
    ("Cast", "Div", "Conv", "Relu", "Div", "Conv"),  # with a primary divisor
)
_MAX_ACTIVATION = 255  # of uint8
_MAX_WEIGHT = 127  # of int8, made symmetric
# An int32 sum begins with the bias. This leaves half of its range to the products.
_MAX_BIAS = 2**30
_MIN_STEP = 1e-12  # where all activations are 0
_BATCH_SIZE = 64

_Floats = NDArray[np.float64]


class _Layers(NamedTuple):
    """The beginning of the graph: its nodes in order, and their constants.

    255, by which pixels are divided; the divisor of the features; weights (O, I, 9, 9) and bias (O,) of each
    convolution O channels from I; the second convolution's stride.
    """

    nodes: list[NodeProto]
    pixel_divisor: float
    feature_divisor: float
    weights: list[_Floats]
    biases: list[_Floats]
    strides: list[int]


class _Ranges(NamedTuple):
    """Ranges of the activations: the greatest feature after ReLU and division; the ends of each channel's, (T*D,)."""

    feature: float
    low: _Floats
    high: _Floats


def to_int8(model: ModelProto, images: Tensor) -> ModelProto:
    """A copy of a graph of ``to_onnx`` whose two convolutions compute in 8-bit integers; inputs, outputs, operator
    set, name and properties stay.

    images: uint8 (N, C, H, W), 0 to 255, of the training set, N one or more; they and ``edge_images`` set the ranges
    of the activations, and what lies outside is cut off. The same graph and images give the same bytes.

    Weights become int8, symmetric, with a scale for each channel that comes out; activations uint8; biases int32 at
    the product of both scales (as "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342,
    recommends). Two choices make it exact where that is free:

    - The image itself is the first convolution's input, at scale 1/255: nothing is rounded.
    - A primary capsule's value has a range for each channel, since single channels reach ten times as far as the
      others and one range for all would be too coarse for those. QLinearConv has one scale for its whole output;
      so each channel's step is folded into its weights, whose scales are its own anyway.

    CPUs without VNNI instructions (x86 before 2019) add products of uint8 and int8 in saturated 16-bit pairs, which
    can be wrong; ONNX Runtime's session option ``session.x64quantprecision`` set to ``1`` avoids it there.

    Raises ValueError where the images are not as the graph takes them, or there are none; GraphError where the graph
    does not begin as those of ``to_onnx`` do, or a weight or activation is not finite.
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
    """Follow the image to the second convolution."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    value, nodes = graph.input[0].name, list[NodeProto]()
    for _ in range(max(map(len, _BEGINNINGS))):
        if tuple(node.op_type for node in nodes) in _BEGINNINGS:
            break
        takers = [node for node in graph.node if value in node.input]
        if len(takers) != 1:
            break
        nodes.append(takers[0])
        value = takers[0].output[0]
    kinds = tuple(node.op_type for node in nodes)
    needed = {name for node in nodes for name in node.input[1:]}
    if kinds not in _BEGINNINGS or not needed <= constants.keys():
        raise GraphError(f"the graph begins with {', '.join(kinds)}; expected {', '.join(_BEGINNINGS[0])}")

    def constant(name: str) -> _Floats:
        array: _Floats = numpy_helper.to_array(constants[name]).astype(np.float64)
        if not np.isfinite(array).all():
            raise GraphError(f"{name} holds values that are not finite numbers")
        return array

    divisors = [float(constant(node.input[1])) for node in nodes if node.op_type == "Div"]
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    strides: list[int] = helper.get_node_attr_value(convolutions[1], "strides")
    return _Layers(
        nodes,
        divisors[0],
        divisors[1] if len(divisors) > 1 else 1.0,
        [constant(node.input[1]) for node in convolutions],
        [constant(node.input[2]) for node in convolutions],
        strides,
    )


def _calibrate(layers: _Layers, images: Tensor) -> _Ranges:
    first, second, first_bias, second_bias = (
        torch.from_numpy(array).float() for array in (*layers.weights, *layers.biases)
    )
    feature, low, high = 0.0, np.zeros(len(second)), np.zeros(len(second))  # so that 0 is within each range
    with torch.inference_mode():
        for batch in torch.split(images, _BATCH_SIZE):
            features = conv2d(batch / layers.pixel_divisor, first, first_bias).relu() / layers.feature_divisor
            maps = conv2d(features, second, second_bias, stride=layers.strides)  # (B, T*D, h, w)
            if not maps.isfinite().all():
                raise GraphError("the images to calibrate with give activations that are not finite numbers")
            feature = max(feature, float(features.max()))
            low = np.minimum(low, maps.amin((0, 2, 3)).numpy())
            high = np.maximum(high, maps.amax((0, 2, 3)).numpy())
    return _Ranges(feature, low, high)


class _Beginning:
    """The nodes that take the place of those in ``layers``, and their constants."""

    def __init__(self, layers: _Layers, ranges: _Ranges, image: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        first, second = (node for node in layers.nodes if node.op_type == "Conv")
        pixel = 1 / layers.pixel_divisor
        feature = max(ranges.feature / _MAX_ACTIVATION, _MIN_STEP)
        steps = np.maximum((ranges.high - ranges.low) / _MAX_ACTIVATION, _MIN_STEP)  # (T*D,)
        zeros = np.rint(-ranges.low / steps)  # what stands for 0, (T*D,)
        zero = self._constant("zero", np.uint8(0))

        value = self._dequantize(image, self._constant("pixel_step", np.float32(pixel)), zero, "int8.pixels")
        value = self._convolve(first, value, layers.weights[0], layers.biases[0], pixel)
        # What is cut off below 0 is what ReLU would. Two steps for the same integers divide as the graph did.
        undivided = self._constant("undivided_feature_step", np.float32(feature * layers.feature_divisor))
        value = self._quantize(value, undivided, zero)
        value = self._dequantize(value, self._constant("feature_step", np.float32(feature)), zero, "int8.features")
        weight = layers.weights[1] / steps[:, None, None, None]
        value = self._convolve(second, value, weight, layers.biases[1] / steps + zeros, feature)
        value = self._quantize(value, self._constant("one", np.float32(1)), zero)
        steps_name = self._constant("map_steps", steps.astype(np.float32))
        self._dequantize(value, steps_name, self._constant("map_zeros", zeros.astype(np.uint8)), second.output[0], 1)

    def _convolve(self, layer: NodeProto, value: str, weight: _Floats, bias: _Floats, step: float) -> str:
        """``layer`` on a value with the given step, with another weight and bias; returns the output's name."""
        steps = np.maximum(np.abs(weight).max((1, 2, 3)) / _MAX_WEIGHT, np.abs(bias) / (step * _MAX_BIAS))
        steps = np.maximum(steps, _MIN_STEP).astype(np.float32)
        bias_steps = np.float32(step) * steps  # exactly the product, as ONNX Runtime takes it to be
        integers = np.rint(weight / steps[:, None, None, None]).astype(np.int8)
        bias_integers = np.rint(bias / bias_steps).astype(np.int32)
        names = [value]
        for name, array, scale in ((layer.input[1], integers, steps), (layer.input[2], bias_integers, bias_steps)):
            scale_name = self._constant(f"{name}_steps", scale)
            names.append(self._dequantize(self._constant(name, array), scale_name, None, f"int8.{name}_float", 0))
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
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"int8.{name}"))
        return f"int8.{name}"
