"""Tensors of the Open Inference Protocol over HTTP: JSON and Triton's binary data extension, to messages and back.

The elements of BYTES in JSON are texts. With the parameter ``content_type`` of "base64" these stand for other bytes, as
in MLServer.
"""

import base64
import binascii
import struct
from collections.abc import Iterator
from itertools import islice
from typing import cast

import numpy as np
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.web.incoming import BYTES, Incoming, Reply
from serving.web.json_messages import Json, kind_of, read_object, shortest, write_json
from serving.web.problems import invalid

#: The header with the number of bytes of JSON before the binary data.
HEADER_LENGTH = "inference-header-content-length"
_HEADER_NAME = "Inference-Header-Content-Length"
_CONTENT_TYPE, _BASE64 = "content_type", "base64"
# The beginnings of PNG and JPEG files in base64.
_PICTURES = ("iVBORw0KGgo", "/9j/")
_BINARY_SIZE, _BINARY, _BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
#: NumPy's little-endian types of the data types that JSON's numbers can be written as.
DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_TEXTS = "BYTES"
_SHARED_MEMORY = "shared_memory_region"
_KIND_NAMES = {str: "string", list: "array", dict: "object", int: "number", bool: "boolean"}
_MAX_TENSORS = 64
_MAX_RANK = 32
_MAX_SHOWN_CHARACTERS = 64
# The elements that are converted at once: NumPy lets no other thread run meanwhile.
_BLOCK_ELEMENTS = 4096


def read_infer(incoming: Incoming, model_name: str, model_version: str) -> pb.ModelInferRequest:
    """Return the request in a body. Raises Problem."""
    header, binary = _split(incoming)
    content = read_object(header)
    request = pb.ModelInferRequest(model_name=model_name, model_version=model_version, id=_text(content, "id", "id"))
    _set_parameters(request.parameters, _members(content, "parameters", "parameters"))
    for index, item in enumerate(_items(content, "inputs", "inputs")):
        field = f"inputs[{index}]"
        tensor = request.inputs.add(name=_text(item, "name", f"{field}.name"))
        tensor.datatype = _text(item, "datatype", f"{field}.datatype")
        tensor.shape.extend(_shape(item, f"{field}.shape"))
        parameters = _members(item, "parameters", f"{field}.parameters")
        size = parameters.pop(_BINARY_SIZE, None)
        _set_parameters(tensor.parameters, parameters, f"{field}.")
        if _SHARED_MEMORY in parameters:
            continue  # the method says that it is not supported
        if size is None:
            in_base64 = parameters.get(_CONTENT_TYPE) == _BASE64
            request.raw_input_contents.append(_raw(item.get("data"), tensor.datatype, f"{field}.data", in_base64))
            continue
        taken, binary = _take(binary, size, f"{field}.parameters[{_BINARY_SIZE!r}]")
        if "data" in item:
            raise invalid(f"{field}.data", "came with binary data; expected one of the two")
        request.raw_input_contents.append(bytes(taken))
    if binary:
        raise invalid("body", f"{len(binary)} bytes after the data of all inputs; expected none")
    for index, item in enumerate(_items(content, "outputs", "outputs")):
        output = request.outputs.add(name=_text(item, "name", f"outputs[{index}].name"))
        parameters = _members(item, "parameters", f"outputs[{index}].parameters")
        parameters[_BINARY] = _boolean(parameters.get(_BINARY), f"outputs[{index}].parameters[{_BINARY!r}]")
        _set_parameters(output.parameters, parameters, f"outputs[{index}].")
    return request


def take_binary(request: pb.ModelInferRequest) -> tuple[bool, dict[str, bool]]:
    """Return the outputs whose data is binary, and remove their parameters, which concern HTTP alone.

    The first value is for all outputs that the second does not name.
    """
    everywhere = request.parameters.pop(_BINARY_OUTPUT, None) if _BINARY_OUTPUT in request.parameters else None
    chosen: dict[str, bool] = {}
    for output in request.outputs:
        if _BINARY in output.parameters:
            chosen[output.name] = output.parameters[_BINARY].bool_param
            del output.parameters[_BINARY]
    return bool(everywhere and everywhere.bool_param), chosen


def write_infer(response: pb.ModelInferResponse, everywhere: bool, chosen: dict[str, bool]) -> Reply:
    """Return the answer. everywhere, chosen: see take_binary."""
    outputs: list[Json] = []
    binary: list[bytes] = []
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        item: dict[str, Json] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        parameters = _parameters(tensor.parameters)
        if chosen.get(tensor.name, everywhere):
            binary.append(raw)
            parameters[_BINARY_SIZE] = len(raw)
        else:
            item["data"] = _data(raw, tensor.datatype)
        if parameters:
            item["parameters"] = parameters
        outputs.append(item)
    content: dict[str, Json] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        content["id"] = response.id
    if response.parameters:
        content["parameters"] = _parameters(response.parameters)
    content["outputs"] = outputs
    header = write_json(content)
    if not binary:
        return Reply(header)
    return Reply(b"".join((header, *binary)), BYTES, headers={_HEADER_NAME: str(len(header))})


def _split(incoming: Incoming) -> tuple[bytes, memoryview]:
    """Return a body's JSON, and the binary data after it. Raises Problem."""
    body = incoming.body
    given = incoming.headers.get(HEADER_LENGTH)
    if given is None:
        return body, memoryview(b"")
    if not (given.isascii() and given.isdecimal() and len(given) < 12 and 0 < int(given) <= len(body)):
        text = f"{given[:_MAX_SHOWN_CHARACTERS]!r}; expected the bytes of JSON, from 1 to the body's {len(body)}"
        raise invalid(HEADER_LENGTH, text)
    length = int(given)
    return body[:length], memoryview(body)[length:]


def _take(binary: memoryview, size: Json, field: str) -> tuple[memoryview, memoryview]:
    if type(size) is not int or not 0 <= size <= len(binary):
        text = (
            f"{str(size)[:_MAX_SHOWN_CHARACTERS]}; expected a whole number up to the {len(binary)} bytes that are left"
        )
        raise invalid(field, text)
    return binary[:size], binary[size:]


def _of_kind(value: Json, kind: type, field: str) -> Json:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise invalid(field, f"a value of the kind {kind_of(value)}; expected {_KIND_NAMES[kind]}")
    return value


def _text(value: dict[str, Json], name: str, field: str) -> str:
    return str(_of_kind(value.get(name, ""), str, field))


def _boolean(value: Json, field: str) -> Json:
    return None if value is None else _of_kind(value, bool, field)


def _members(value: dict[str, Json], name: str, field: str) -> dict[str, Json]:
    found = value.get(name)
    return {} if found is None else dict(cast("dict[str, Json]", _of_kind(found, dict, field)))


def _items(value: dict[str, Json], name: str, field: str) -> Iterator[dict[str, Json]]:
    found = value.get(name)
    items = cast("list[Json]", _of_kind([] if found is None else found, list, field))
    if len(items) > _MAX_TENSORS:
        raise invalid(field, f"{len(items)} tensors; expected at most {_MAX_TENSORS}")
    for index, item in enumerate(items):
        yield cast("dict[str, Json]", _of_kind(item, dict, f"{field}[{index}]"))


def _shape(item: dict[str, Json], field: str) -> list[int]:
    sizes = cast("list[Json]", _of_kind(item.get("shape", []), list, field))
    if len(sizes) > _MAX_RANK or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise invalid(field, f"expected at most {_MAX_RANK} whole numbers from 0 up")
    return cast("list[int]", sizes)


def _set_parameters(target: object, parameters: dict[str, Json], field: str = "") -> None:
    """Set parameters of a message from their values in JSON; null stands for none. Raises Problem."""
    entries = cast("dict[str, pb.InferParameter]", target)
    for name, value in parameters.items():
        shown = f"{field}parameters[{name[:_MAX_SHOWN_CHARACTERS]!r}]"
        match value:
            case None:
                continue
            case bool():
                entries[name].bool_param = value
            case int() if -(2**63) <= value < 2**63:
                entries[name].int64_param = value
            case int() if 0 <= value < 2**64:
                entries[name].uint64_param = value
            case float():
                entries[name].double_param = value
            case str():
                entries[name].string_param = value
            case _:
                raise invalid(shown, "expected a boolean, a number of at most 64 bits, or a string")


def _parameters(parameters: object) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name, parameter in cast("dict[str, pb.InferParameter]", parameters).items():
        kind = parameter.WhichOneof("parameter_choice")
        found[name] = getattr(parameter, kind) if kind else None
    return found


def _flat(data: Json) -> Iterator[Json]:
    """Yield the elements of lists inside lists, row by row."""
    waiting = [iter(data if isinstance(data, list) else [data])]
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, list):
                waiting.append(iter(item))
                break
            yield item
        else:
            waiting.pop()


def _raw(data: Json, datatype: str, field: str, in_base64: bool) -> bytes:
    """Return the elements of a tensor in JSON as raw contents. in_base64: texts are bytes. Raises Problem."""
    if data is None:
        raise invalid(field, f"missing; expected the elements, or {_BINARY_SIZE} and binary data")
    _of_kind(data, list, field)
    if datatype == _TEXTS:
        parts: list[bytes] = []
        for index, item in enumerate(_flat(data)):
            content = _content(str(_of_kind(item, str, f"{field}[{index}]")), f"{field}[{index}]", in_base64)
            parts += struct.pack("<I", len(content)), content
        return b"".join(parts)
    if datatype not in DTYPES:
        expected = ", ".join((*DTYPES, _TEXTS))
        shown = datatype[:_MAX_SHOWN_CHARACTERS]
        raise invalid(field.replace(".data", ".datatype"), f"{shown!r}; as JSON, expected one of {expected}")
    by_kind: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    allowed = by_kind.get(np.dtype(DTYPES[datatype]).kind, {int})
    elements, blocks, begin = _flat(data), list[bytes](), 0
    while items := list(islice(elements, _BLOCK_ELEMENTS)):
        if not set(map(type, items)) <= allowed:
            index = next(index for index, item in enumerate(items) if type(item) not in allowed)
            raise invalid(
                f"{field}[{begin + index}]", f"a value of the kind {kind_of(items[index])}, not of {datatype}"
            )
        blocks.append(_array(items, datatype, field, begin).tobytes())
        begin += len(items)
    return b"".join(blocks)


def _content(text: str, field: str, in_base64: bool) -> bytes:
    """Return the bytes of an element of BYTES. Raises Problem."""
    if not in_base64:
        if text.startswith(_PICTURES):
            ways = f'the parameter "{_CONTENT_TYPE}" of "{_BASE64}" beside it, or "{_BINARY_SIZE}" and binary data'
            raise invalid(field, f"a picture in base64; expected {ways}")
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(field, f"{len(text)} characters that are no base64") from None


def _array(items: list[Json], datatype: str, field: str, begin: int) -> "NDArray[np.generic]":
    """Return elements as an array. begin: the index of the first one. Raises Problem."""
    dtype = np.dtype(DTYPES[datatype])
    try:
        with np.errstate(over="ignore"):
            return np.array(items, dtype)
    except OverflowError:
        pass
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-(2.0**1023), 2.0**1023)
    for index, item in enumerate(items):
        if not low <= cast(int, item) <= high:
            raise invalid(f"{field}[{begin + index}]", f"{str(item)[:_MAX_SHOWN_CHARACTERS]}; expected {low} to {high}")
    raise invalid(field, f"numbers that {datatype} cannot hold")


def _data(raw: bytes, datatype: str) -> Json:
    """Return raw contents as a flat list of elements."""
    if datatype == "FP32":
        return cast("list[Json]", shortest(np.frombuffer(raw, "<f4")))
    if datatype != _TEXTS:
        return cast("list[Json]", np.frombuffer(raw, DTYPES[datatype]).tolist())
    texts: list[Json] = []
    place = 0
    while place < len(raw):
        [length] = struct.unpack_from("<I", raw, place)
        texts.append(raw[place + 4 : place + 4 + length].decode(errors="replace"))
        place += 4 + length
    return texts
