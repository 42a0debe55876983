"""The messages of ``inference.GRPCInferenceService.ModelInfer``: parsing of requests, encoding of answers."""

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from protos.inference import inference_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.repository.classifier import PROBABILITIES
from serving.rpc.edge import check_size, malformed
from serving.services.infer_outputs import ALWAYS, CONFIDENCE, OF_ONE_CLASS, SOURCES, output_shapes
from serving.services.infer_parameters import (
    MAX_SHOWN_CHARACTERS,
    alternatives,
    refuse_shared_memory,
    wants_contents,
    whole_number,
)
from serving.services.protobuf_wire import BYTES, delimited, fields_of, split, tag, varint
from serving.services.tensor_inputs import Received
from serving.services.typed_contents import Malformed, TypedContents

#: The parameter of an output with the number of most probable classes to return, and that with the class it is of.
CLASSIFICATION, CLASS = "classification", "class"
# The outputs with a number for each class.
_CLASSIFIED = (PROBABILITIES, CONFIDENCE)
_ID = pb.ModelInferResponse.ID_FIELD_NUMBER
_OUTPUTS = pb.ModelInferResponse.OUTPUTS_FIELD_NUMBER
_RAW = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_CONTENTS = pb.ModelInferResponse.InferOutputTensor.CONTENTS_FIELD_NUMBER
_FP32_CONTENTS = pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER
_BYTES_CONTENTS = pb.InferTensorContents.BYTES_CONTENTS_FIELD_NUMBER
_RESPONSE = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER
_MAX_FIELDS = 4096  # the most fields of a ModelInferRequest; a usual one has a handful
_INFER_FIELDS = fields_of(pb.ModelInferRequest, apart=pb.InferTensorContents)


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
    """A requested output.

    classes: the number of most probable classes to return; 0 for the numbers. class_index: the class that relevance and
    reconstruction are of; None for the winner of each image.
    """

    name: str
    classes: int = 0
    class_index: int | None = None


class Wanted(NamedTuple):
    """The wishes for an answer. contents: True if its values must be in contents, and not in raw_output_contents."""

    outputs: tuple[Output, ...]
    contents: bool = False


class TensorMessages:
    """The reader of the requested outputs for one version of a model, and the writer of its answers."""

    def __init__(self, artifact: Artifact) -> None:
        self._labels = [label.encode() for label in artifact.labels]
        self._shapes = output_shapes(artifact)
        self._named = {name: Output(name) for name in self._shapes}
        self._all = Wanted(tuple(map(Output, ALWAYS)))
        name = pb.ModelInferResponse(model_name=artifact.name, model_version=artifact.version)
        self._head = name.SerializeToString()
        final = pb.InferParameter(bool_param=True)
        self._final = pb.ModelInferResponse(parameters={"triton_final_response": final}).SerializeToString()
        self._raw = tag(_RAW, BYTES)
        self._described = lru_cache(1024)(self._describe)

    def wanted(self, request: pb.ModelInferRequest) -> Wanted:
        """Return the wishes for the answer, its outputs in the order of the request. Raises InvalidRequest."""
        parameters, given = request.parameters, request.outputs
        contents = bool(parameters) and wants_contents(parameters)
        if not given:
            return Wanted(self._all.outputs, True) if contents else self._all
        default = self._class_index(parameters, "") if parameters else None
        chosen: dict[str, Output] = {}
        for index, output in enumerate(given):
            name = output.name
            if (found := self._named.get(name)) is None:
                text = f"{name[:MAX_SHOWN_CHARACTERS]!r}; expected {alternatives(self._shapes)}"
                raise InvalidRequest(f"outputs[{index}].name", text)
            if name in chosen:
                raise InvalidRequest(f"outputs[{index}].name", f"{name!r} once more; expected each output once")
            if default is not None and name in OF_ONE_CLASS:
                found = found._replace(class_index=default)
            if output.parameters:
                found = self._with_parameters(found, output.parameters, f"outputs[{index}]")
            chosen[name] = found
        return Wanted(tuple(chosen.values()), contents)

    def encode(self, identifier: str, wanted: Wanted, share: Share) -> bytes:
        """Return a ModelInferResponse. identifier: the request's id."""
        return b"".join(self._parts(identifier, wanted, share))

    def encode_for_stream(self, identifier: str, wanted: Wanted, share: Share) -> bytes:
        """Return a ModelStreamInferResponse. identifier: the request's id."""
        parts = self._final, *self._parts(identifier, wanted, share)
        return b"".join((tag(_RESPONSE, BYTES), varint(sum(map(len, parts))), *parts))

    def _with_parameters(self, output: Output, parameters: Mapping[str, pb.InferParameter], field: str) -> Output:
        """Return a requested output with its parameters. Raises InvalidRequest."""
        refuse_shared_memory(parameters, field)
        if CLASSIFICATION in parameters:
            place = _check_place(output.name, CLASSIFICATION, _CLASSIFIED, field)
            if not (classes := whole_number(parameters[CLASSIFICATION], place)):
                raise InvalidRequest(place, "0; expected 1 or more; all classes come if there are fewer")
            output = output._replace(classes=min(classes, len(self._labels)))
        if CLASS in parameters:
            _check_place(output.name, CLASS, OF_ONE_CLASS, field)
            output = output._replace(class_index=self._class_index(parameters, f"{field}."))
        return output

    def _class_index(self, parameters: Mapping[str, pb.InferParameter], place: str) -> int | None:
        """Return the class that parameters name, or None. Raises InvalidRequest.

        place: the beginning of the names of their fields.
        """
        if CLASS not in parameters:
            return None
        field = f'{place}parameters["{CLASS}"]'
        if (index := whole_number(parameters[CLASS], field)) >= len(self._labels):
            raise InvalidRequest(field, f"{index}; expected 0 to {len(self._labels) - 1}")
        return index

    def _parts(self, identifier: str, wanted: Wanted, share: Share) -> list[bytes]:
        """Return the bytes of a ModelInferResponse, in parts."""
        outputs = wanted.outputs
        parts = [self._head]
        if identifier:
            parts.append(delimited(_ID, identifier.encode()))
        if wanted.contents:
            return parts + [self._with_contents(output, share) for output in outputs]
        parts.append(self._described(len(share), outputs))
        for output in outputs:
            if output.classes:
                texts = self._classified(output, share)
                data = b"".join([part for text in texts for part in (struct.pack("<I", len(text)), text)])
            else:
                data = share[SOURCES.get(output.name, output.name)].tobytes()
            parts += self._raw + varint(len(data)), data  # not joined yet, since large data would be copied twice
        return parts

    def _with_contents(self, output: Output, share: Share) -> bytes:
        """Return an output with its values in contents, as a field of a ModelInferResponse."""
        if output.classes:
            contents = b"".join([delimited(_BYTES_CONTENTS, text) for text in self._classified(output, share)])
        else:
            values = np.asarray(share[SOURCES.get(output.name, output.name)], "<f4")
            contents = delimited(_FP32_CONTENTS, values.tobytes())
        described = self._tensor(len(share), output).SerializeToString()
        return delimited(_OUTPUTS, described + delimited(_CONTENTS, contents))

    def _describe(self, images: int, outputs: tuple[Output, ...]) -> bytes:
        """Return the outputs' names, types and shapes as bytes of a ModelInferResponse."""
        tensors = [self._tensor(images, output) for output in outputs]
        return pb.ModelInferResponse(outputs=tensors).SerializeToString()

    def _tensor(self, images: int, output: Output) -> pb.ModelInferResponse.InferOutputTensor:
        """Return an output's name, type and shape."""
        datatype = "BYTES" if output.classes else "FP32"
        shape = (output.classes,) if output.classes else self._shapes[output.name]
        return pb.ModelInferResponse.InferOutputTensor(name=output.name, datatype=datatype, shape=(images, *shape))

    def _classified(self, output: Output, share: Share) -> list[bytes]:
        """Return the most probable classes of each image, ``value:index:label``."""
        numbers = np.asarray(share[SOURCES.get(output.name, output.name)], np.float32)
        order = np.argsort(-numbers, axis=1, kind="stable")[:, : output.classes]
        values = np.take_along_axis(numbers, order, axis=1)
        pairs = zip(values.ravel().tolist(), order.ravel().tolist(), strict=True)
        return [b"%f:%d:%s" % (value, index, self._labels[index]) for value, index in pairs]


def _check_place(name: str, parameter: str, outputs: Sequence[str], field: str) -> str:
    """Return the field of an output's parameter. Raises InvalidRequest if it does not belong to this output."""
    place = f'{field}.parameters["{parameter}"]'
    if name not in outputs:
        raise InvalidRequest(place, f"on {name!r}; expected on {alternatives(outputs)} alone")
    return place


def refused(identifier: str, text: str) -> bytes:
    """Return a ModelStreamInferResponse for a request that cannot be answered."""
    final = pb.InferParameter(bool_param=True)
    response = pb.ModelInferResponse(id=identifier, parameters={"triton_final_response": final})
    return pb.ModelStreamInferResponse(error_message=text, infer_response=response).SerializeToString()
