"""A graph whose weights are stored in 8 bits and computed with in single precision."""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph import GraphError

_MAX_WEIGHT = 127  # of int8, made symmetric
_MIN_STEP = 1e-12  # if all weights of a channel are 0
_MIN_AXES = 2  # of a weight; biases and scalars stay as they are


def to_int8_weights(model: ModelProto) -> ModelProto:
    """Return a copy of a graph whose float32 matrices are int8, symmetric, with a step for each output channel.

    DequantizeLinear makes them float32 again. ONNX Runtime does so once, when it loads the graph, if its session option
    ``session.disable_quant_qdq`` is ``1``, and else for each batch. The output channels of a matrix are its rows if
    Gemm transposes it, else its last axis.

    Raises GraphError if a weight is not finite, or if the graph has no matrix.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    matrices = [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= _MIN_AXES
    ]
    if not matrices:
        raise GraphError("the graph has no weights to store in 8 bits")
    nodes: list[NodeProto] = []
    for tensor in matrices:
        axis = 0 if _is_transposed(graph, tensor.name) else len(tensor.dims) - 1
        weight = numpy_helper.to_array(tensor)
        if not np.isfinite(weight).all():
            raise GraphError(f"{tensor.name} holds values that are not finite numbers")
        others = tuple(one for one in range(weight.ndim) if one != axis)
        steps = np.maximum(np.abs(weight).max(others, keepdims=True) / _MAX_WEIGHT, _MIN_STEP).astype(np.float32)
        integers, scales = f"{tensor.name}_integers", f"{tensor.name}_steps"
        nodes.append(helper.make_node("DequantizeLinear", [integers, scales], [tensor.name], axis=axis))
        graph.initializer.append(numpy_helper.from_array(steps.reshape(-1), scales))
        tensor.CopyFrom(numpy_helper.from_array(np.rint(weight / steps).astype(np.int8), integers))
    nodes.extend(graph.node)
    graph.ClearField("node")
    graph.node.extend(nodes)
    result = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    onnx.checker.check_model(result, full_check=True)
    return result


def _is_transposed(graph: onnx.GraphProto, name: str) -> bool:
    """Return True if a Gemm takes this weight transposed."""
    return any(
        node.op_type == "Gemm"
        and node.input[1] == name
        and any(entry.name == "transB" and entry.i for entry in node.attribute)
        for node in graph.node
    )
