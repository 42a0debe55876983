"""Weights that are stored once: a graph of an artifact refers to those that another file of it holds already."""

from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

#: Smaller constants stay in the graph, since a reference takes about a hundred bytes itself.
MIN_SHARED_BYTES = 1024


def share_weights(model: ModelProto, file: Path) -> bool:
    """Replace a graph's weights whose bytes are in ``file`` by references, and return True if there were any.

    The references are ONNX's external data: the name of the file, which must stay in the same folder, and the offset
    and length of the weight's bytes in it. A graph that is opened by its path finds them by itself.
    """
    content = file.read_bytes()
    shared = False
    for tensor in model.graph.initializer:
        offset = content.find(tensor.raw_data) if len(tensor.raw_data) >= MIN_SHARED_BYTES else -1
        if offset < 0:
            continue
        place = {"location": file.name, "offset": offset, "length": len(tensor.raw_data)}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(place[key])) for key in place)
        shared = True
    return shared
