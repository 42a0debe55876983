"""The messages of ``inference.GRPCInferenceService.ModelInfer``: decoding of requests, encoding of answers."""

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.rpc.edge import check_size, malformed
from serving.services.protobuf_wire import BYTES, FLAT, Fields, delimited, split, tag, varint
from serving.services.typed_contents import Malformed, TypedContents

SHARED_MEMORY = "shared_memory_region"
SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
_ID = pb.ModelInferResponse.ID_FIELD_NUMBER
_RAW = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_RESPONSE = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER
# The most characters of a client's text in an error: the error goes out as a header of limited size.
_MAX_SHOWN_CHARACTERS = 64
_SHOWN_SIZES = 8
_MAX_FIELDS = 4096  # the most fields of a ModelInferRequest; a usual one has a handful
_REQUEST, _TENSOR = pb.ModelInferRequest, pb.ModelInferRequest.InferInputTensor
_TENSOR_FIELDS = Fields(packed=_TENSOR.SHAPE_FIELD_NUMBER, apart=_TENSOR.CONTENTS_FIELD_NUMBER)
_INFER_FIELDS = Fields({_REQUEST.INPUTS_FIELD_NUMBER: _TENSOR_FIELDS, _REQUEST.OUTPUTS_FIELD_NUMBER: FLAT})


class Received(NamedTuple):
    """A ModelInferRequest. typed: its pixels if they came as numbers, which the message may lack then, or None."""

    message: pb.ModelInferRequest
    typed: TypedContents | None = None


def read_request(data: bytes, max_bytes: int) -> Received:
    """Return a received ModelInferRequest. Raises InvalidRequest."""
    check_size(data, max_bytes)
    try:
        if len(data) > _MAX_FIELDS:  # a shorter message stays small however it is parsed
            rest, places = split(data, _MAX_FIELDS, _INFER_FIELDS)
            typed = TypedContents(data, places, _MAX_FIELDS) if places else None
            return Received(pb.ModelInferRequest.FromString(rest), typed)
        message = pb.ModelInferRequest.FromString(data)
        if message.raw_input_contents or not message.inputs:
            return Received(message)
        contents = message.inputs[0].contents.SerializeToString()
        return Received(message, TypedContents(contents, [slice(0, len(contents))], _MAX_FIELDS))
    except (DecodeError, Malformed) as error:
        raise malformed(len(data), pb.ModelInferRequest) from error


class Output(NamedTuple):
    """A requested output. classes: the number of most probable classes to return; 0 for the numbers."""

    name: str
    classes: int = 0


class TensorMessages:
    """The reader of requests for one version of a model, and the writer of its answers from prepared bytes."""

    def __init__(self, artifact: Artifact, max_images: int) -> None:
        """Prepare the messages. max_images: the most images in one request."""
        self._image_shape = artifact.image_shape
        self._image_bytes = artifact.image_shape[0] * artifact.image_shape[1] * artifact.image_shape[2]
        self._max_images = max_images
        self._labels = [label.encode() for label in artifact.labels]
        classes = len(self._labels)
        self._shapes = {PROBABILITIES: (classes,), POSES: (classes, artifact.pose_size)}
        self._all = (Output(PROBABILITIES), Output(POSES))
        name = pb.ModelInferResponse(model_name=artifact.name, model_version=artifact.version)
        self._head = name.SerializeToString()
        final = pb.InferParameter(bool_param=True)
        self._final = pb.ModelInferResponse(parameters={"triton_final_response": final}).SerializeToString()
        self._raw = tag(_RAW, BYTES)
        self._described = lru_cache(1024)(self._describe)

    def check_input(self, received: Received) -> None:
        """Check all of a request's input but the values of its pixels. Raises InvalidRequest."""
        request = received.message
        if len(request.inputs) != 1:
            raise InvalidRequest("inputs", f"{len(request.inputs)} tensors; expected one, {IMAGES!r}")
        tensor = request.inputs[0]
        if tensor.name != IMAGES:
            raise InvalidRequest("inputs[0].name", f"{tensor.name[:_MAX_SHOWN_CHARACTERS]!r}; expected {IMAGES!r}")
        if tensor.datatype != "UINT8":
            raise InvalidRequest(
                "inputs[0].datatype",
                f"{tensor.datatype[:_MAX_SHOWN_CHARACTERS]!r}; expected 'UINT8', pixels from 0 to 255 as bytes",
            )
        shape = tuple(tensor.shape)
        if shape[1:] != self._image_shape or not 1 <= shape[0] <= self._max_images:
            raise InvalidRequest("inputs[0].shape", self._about_shape(shape))
        if tensor.parameters:
            _refuse_shared_memory(tensor, "inputs[0]")
        if request.raw_input_contents:
            self._check_raw(request, tensor, shape[0])
        else:
            self._check_typed(received.typed, shape[0])

    def images(self, received: Received) -> NDArray[np.uint8]:
        """Return the images (n, C, H, W) of a checked request. Raises InvalidRequest."""
        message, typed = received
        shape = tuple(message.inputs[0].shape)
        if message.raw_input_contents:
            return np.frombuffer(message.raw_input_contents[0], np.uint8).reshape(shape)
        assert typed
        return typed.values().reshape(shape)

    def outputs(self, request: pb.ModelInferRequest) -> tuple[Output, ...]:
        """Return the requested outputs, in the order of the request. Raises InvalidRequest."""
        if not request.outputs:
            return self._all
        chosen: dict[str, Output] = {}
        for index, output in enumerate(request.outputs):
            field, name = f"outputs[{index}]", output.name
            if name not in self._shapes:
                expected = " or ".join(map(repr, self._shapes))
                raise InvalidRequest(f"{field}.name", f"{name[:_MAX_SHOWN_CHARACTERS]!r}; expected {expected}")
            if name in chosen:
                raise InvalidRequest(f"{field}.name", f"{name!r} once more; expected each output once")
            chosen[name] = Output(name, self._classes(output, field) if output.parameters else 0)
        return tuple(chosen.values())

    def encode(self, identifier: str, outputs: tuple[Output, ...], share: Share) -> bytes:
        """Return a ModelInferResponse with these outputs. identifier: the request's id."""
        return b"".join(self._parts(identifier, outputs, share))

    def encode_for_stream(self, identifier: str, outputs: tuple[Output, ...], share: Share) -> bytes:
        """Return a ModelStreamInferResponse with these outputs. identifier: the request's id."""
        parts = self._final, *self._parts(identifier, outputs, share)
        return b"".join((tag(_RESPONSE, BYTES), varint(sum(map(len, parts))), *parts))

    def _about_shape(self, shape: tuple[int, ...]) -> str:
        sizes = ", ".join(map(str, shape[:_SHOWN_SIZES])) + (", ..." if len(shape) > _SHOWN_SIZES else "")
        expected = ", ".join(map(str, self._image_shape))
        return f"[{sizes}]; expected [n, {expected}], n from 1 to {self._max_images} (max_images_per_request)"

    def _about_size(self, images: int) -> str:
        return f"{images * self._image_bytes} ({images} x {' x '.join(map(str, self._image_shape))})"

    def _check_raw(
        self, request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor, images: int
    ) -> None:
        """Check the number of the pixels that came as bytes. Raises InvalidRequest."""
        raw, size = request.raw_input_contents, images * self._image_bytes
        if tensor.HasField("contents"):
            raise InvalidRequest("inputs[0].contents", "came with raw_input_contents; expected one of the two")
        if len(raw) != 1:
            raise InvalidRequest("raw_input_contents", f"{len(raw)}; expected one, for {IMAGES!r}")
        if len(raw[0]) != size:
            text = f"{len(raw[0])} bytes; expected {self._about_size(images)}"
            raise InvalidRequest("raw_input_contents[0]", text)

    def _check_typed(self, typed: TypedContents | None, images: int) -> None:
        """Check the number and kind of the pixels that came as numbers. Raises InvalidRequest."""
        size = images * self._image_bytes
        if typed is None or not typed.kinds:
            raise InvalidRequest("raw_input_contents", f"none; expected one, of {size} bytes, for {IMAGES!r}")
        for kind in typed.kinds:
            if kind != "uint_contents":
                raise InvalidRequest(f"inputs[0].contents.{kind}", "not for UINT8; expected uint_contents")
        if typed.count != size:
            raise InvalidRequest(
                "inputs[0].contents.uint_contents", f"{typed.count} values; expected {self._about_size(images)}"
            )

    def _classes(self, output: pb.ModelInferRequest.InferRequestedOutputTensor, field: str) -> int:
        """Return the number of requested classes, or 0 for the numbers. Raises InvalidRequest."""
        _refuse_shared_memory(output, field)
        if "classification" not in output.parameters:
            return 0
        field += '.parameters["classification"]'
        if output.name != PROBABILITIES:
            raise InvalidRequest(field, f"on {output.name!r}; expected on {PROBABILITIES!r} alone")
        classes = _whole_number(output.parameters["classification"], field)
        if not 1 <= classes <= len(self._labels):
            raise InvalidRequest(field, f"{classes}; expected 1 to {len(self._labels)}, the number of classes")
        return classes

    def _parts(self, identifier: str, outputs: tuple[Output, ...], share: Share) -> list[bytes]:
        """Return the bytes of a ModelInferResponse, in parts."""
        parts = [self._head]
        if identifier:
            parts.append(delimited(_ID, identifier.encode()))
        parts.append(self._described(len(share), outputs))
        for output in outputs:
            if output.classes:
                data = self._classified(np.asarray(share[PROBABILITIES], np.float32), output.classes)
            else:
                data = share[output.name].tobytes()
            parts += self._raw + varint(len(data)), data  # not joined yet, since large data would be copied twice
        return parts

    def _describe(self, images: int, outputs: tuple[Output, ...]) -> bytes:
        """Return the outputs' names, types and shapes as bytes of a ModelInferResponse."""
        response = pb.ModelInferResponse()
        for output in outputs:
            if output.classes:
                response.outputs.add(name=output.name, datatype="BYTES", shape=(images, output.classes))
            else:
                response.outputs.add(name=output.name, datatype="FP32", shape=(images, *self._shapes[output.name]))
        return response.SerializeToString()

    def _classified(self, probabilities: NDArray[np.float32], classes: int) -> bytes:
        """Return the most probable classes of each row of (n, J), ``value:index:label``, as BYTES in raw contents."""
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :classes]
        values = np.take_along_axis(probabilities, order, axis=1)
        parts: list[bytes] = []
        for value, index in zip(values.ravel().tolist(), order.ravel().tolist(), strict=True):
            text = b"%f:%d:%s" % (value, index, self._labels[index])
            parts += struct.pack("<I", len(text)), text
        return b"".join(parts)


def refused(identifier: str, text: str) -> bytes:
    """Return a ModelStreamInferResponse for a request that cannot be answered."""
    final = pb.InferParameter(bool_param=True)
    response = pb.ModelInferResponse(id=identifier, parameters={"triton_final_response": final})
    return pb.ModelStreamInferResponse(error_message=text, infer_response=response).SerializeToString()


def schedule(request: pb.ModelInferRequest) -> tuple[float | None, bool]:
    """Return the request's timeout in seconds, or None, and True if it goes before others.

    Raises InvalidRequest.
    """
    parameters = request.parameters
    if not parameters:
        return None, False
    # Each is read by name: a request may carry any number of unknown parameters.
    for name in SEQUENCE:
        if name in parameters and (value := _value(parameters[name])):
            text = f"{str(value)[:_MAX_SHOWN_CHARACTERS]!r}; expected none, since sequences are not supported"
            raise InvalidRequest(f'parameters["{name}"]', text)
    urgent = "priority" in parameters and _whole_number(parameters["priority"], 'parameters["priority"]') == 1
    microseconds = "timeout" in parameters and _whole_number(parameters["timeout"], 'parameters["timeout"]')
    return microseconds / 1e6 or None, urgent  # 0 means no timeout, as in Triton


def _refuse_shared_memory(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor, field: str
) -> None:
    if SHARED_MEMORY in tensor.parameters:
        raise InvalidRequest(
            f'{field}.parameters["{SHARED_MEMORY}"]', "shared memory is not supported; expected the data in the message"
        )


def _whole_number(parameter: pb.InferParameter, field: str) -> int:
    """Return a whole number from 0, which clients send in different kinds of parameter. Raises InvalidRequest."""
    value = _value(parameter)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or value < 0:
        kind = parameter.WhichOneof("parameter_choice")
        shown = f"{kind} {str(value)[:_MAX_SHOWN_CHARACTERS]!r}" if kind else "no value"
        raise InvalidRequest(field, f"{shown}; expected a whole number from 0 up, in int64_param")
    return value


def _value(parameter: pb.InferParameter) -> bool | int | str | float | None:
    kind = parameter.WhichOneof("parameter_choice")
    value: bool | int | str | float | None = getattr(parameter, kind) if kind else None
    return value
