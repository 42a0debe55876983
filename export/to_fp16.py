"""The served graph in half precision (float16) where that is safe, for GPUs; and an emulation of it for CPUs."""

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph import GraphError

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_MOVES = ("Reshape", "Transpose")
_STAYS_HALF = ("Cast", "Div", "Conv", "Relu", *_MOVES)
_VOTES_RANK = 3  # (I, B, J*E); no other matrix product has three axes


def to_fp16(model: ModelProto) -> ModelProto:
    """Return a copy of a graph of ``to_onnx`` that computes partly in float16.

    The part from the image to the primary capsules before their squash is in float16, and so are the votes from the
    squashed capsules. Inputs, outputs, operator set, name and properties do not change.

    Convolution and digit capsule weights are stored in float16, which halves the file. Everything else stays in
    float32: lengths and squash, since the square of 256 is beyond float16; softmax; and the routing's sums over all
    primary capsules, which would round after each step, and overflow for long votes.

    A weight keeps 11 significant bits. A weight below 6.1e-5 in magnitude has an error of at most 3e-8.

    Raises GraphError if a weight is not finite in float16, whose greatest number is 65,504, or if the graph does not
    begin like those of ``to_onnx``.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    half_nodes, half = _half(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph)
    for tensor in graph.initializer:
        if tensor.name in half:
            tensor.CopyFrom(_halved(tensor))

    nodes: list[NodeProto] = []
    casts: dict[str, str] = {}
    for node in graph.node:
        is_half = node.output[0] in half_nodes
        if node.op_type == "Cast" and is_half:
            next(entry for entry in node.attribute if entry.name == "to").i = _HALF
        else:
            floats = 1 if node.op_type in _MOVES else len(node.input)  # the second input of Reshape is its shape
            for index, name in enumerate(node.input[:floats]):
                if (name in half) == is_half:
                    continue
                if name not in casts:
                    casts[name] = f"{name}_{'half' if is_half else 'float'}"
                    nodes.append(helper.make_node("Cast", [name], [casts[name]], to=_HALF if is_half else _FLOAT))
                node.input[index] = casts[name]
        nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)
    for value in graph.value_info:
        if value.name in half:
            value.type.tensor_type.elem_type = _HALF
    result = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    onnx.checker.check_model(result, full_check=True)
    return result


def rounded(model: ModelProto) -> ModelProto:
    """Return a graph of ``to_fp16`` in float32, with the result of each half-precision operation rounded to float16.

    ONNX Runtime's CPU provider computes float16 graphs in float32 and rounds only where a cast stands; this graph gives
    the numbers of a processor that stores every result in float16 and sums within an operation in float32.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    half = {value.name for value in known if value.type.tensor_type.elem_type == _HALF}
    for tensor in graph.initializer:
        if tensor.data_type == _HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        output = node.output[0]
        if output not in half or node.op_type in _MOVES:
            continue
        if node.op_type == "Cast":
            next(entry for entry in node.attribute if entry.name == "to").i = _FLOAT
        node.output[0] = f"{output}_unrounded"
        nodes.append(helper.make_node("Cast", [node.output[0]], [f"{output}_half"], to=_HALF))
        nodes.append(helper.make_node("Cast", [f"{output}_half"], [output], to=_FLOAT))
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("value_info")
    result = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    onnx.checker.check_model(result, full_check=True)
    return result


def _half(graph: GraphProto) -> tuple[set[str], set[str]]:
    """Return the nodes, by their first outputs, and the values that become float16 in a graph with all shapes."""
    initializers = {tensor.name for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    votes = [node for node in products if ranks[node.output[0]] == _VOTES_RANK]
    # The capsules are transposed for the votes, already in float16.
    begun = {node.output[0] for node in votes} | {node.input[0] for node in votes}

    image = graph.input[0].name
    operands = [makers[name].input[0] if name in makers else name for name in (node.input[1] for node in products)]
    half = {image} | (initializers & set(operands))
    found: set[str] = set()
    convolutions = 0
    for node in graph.node:
        if node.output[0] in begun or (node.op_type in _STAYS_HALF and node.input[0] in half):
            found.add(node.output[0])
            half.update(node.output)
            if node.op_type not in _MOVES:
                half.update(initializers & set(node.input))
            convolutions += node.op_type == "Conv"
    every = sum(node.op_type == "Conv" for node in graph.node)
    if convolutions != every or not every:
        raise GraphError(f"the image meets {convolutions} convolutions before their squash; the graph has {every}")
    return found, half - {image}


def _halved(tensor: TensorProto) -> TensorProto:
    with np.errstate(over="ignore"):
        array = numpy_helper.to_array(tensor).astype(np.float16)
    if not np.isfinite(array).all():
        raise GraphError(f"{tensor.name} holds values that are not finite in float16")
    return numpy_helper.from_array(array, tensor.name)
