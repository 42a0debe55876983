"""Tests of the checks of a message in protobuf's encoding before it is parsed."""

import pytest
from google.protobuf.message import Message

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference
from serving.errors import InvalidRequest
from serving.services.open_inference_codec import read_request
from serving.services.protobuf_wire import MAX_TEXT_BYTES, TOO_MANY_FIELDS, check_fields, fields_of, tag

FIELDS = fields_of(pb.ReconstructRequest)
CLASSIFY = fields_of(pb.ClassifyRequest)
MAX_FIELDS = 10_000
UNKNOWN = 500
SHORT = tag(UNKNOWN, 0) + b"\1"
LONG_NUMBER = b"\x81" + b"\x80" * 8 + b"\0"


def long_tag(wire_type: int) -> bytes:
    """Return a key of five bytes, the last of which say nothing."""
    first, second = tag(UNKNOWN, wire_type)
    return bytes((first, second | 0x80, 0x80, 0x80, 0))


@pytest.mark.parametrize(
    ("field", "as_many"),
    [
        (SHORT, 1),
        (long_tag(0) + LONG_NUMBER, 4),
        (long_tag(2) + b"\x81\x80\x80\x80\0x", 3),
        (tag(UNKNOWN, 0) + LONG_NUMBER, 4),
        (long_tag(5) + b"abcd", 2),
        (long_tag(3) + long_tag(4), 4),
    ],
    ids=["short", "all long", "length", "number", "key", "group"],
)
def test_a_field_with_long_numbers_counts_as_several(field: bytes, as_many: int) -> None:
    pb.ReconstructRequest.FromString(field)  # which protobuf can read
    few = MAX_FIELDS // as_many
    check_fields(field * few, MAX_FIELDS, FIELDS)
    with pytest.raises(InvalidRequest, match=TOO_MANY_FIELDS):
        check_fields(field * few + SHORT * MAX_FIELDS, MAX_FIELDS, FIELDS)
    with pytest.raises(InvalidRequest, match=TOO_MANY_FIELDS):
        check_fields(field * (few + 1), MAX_FIELDS, FIELDS)


LONG = "a" * (MAX_TEXT_BYTES - 3) + "\U0001f600"
SHORTER = LONG[1:]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ClassifyRequest(model_name=LONG), "model_name"),
        (pb.ClassifyStreamRequest(request=pb.ClassifyRequest(model_version=LONG)), "request.model_version"),
        (pb.ExplainRequest(model_name=LONG), "model_name"),
        (pb.ReconstructRequest(model_version=LONG), "model_version"),
        (inference.ModelInferRequest(id=LONG), "id"),
        (inference.ModelInferRequest(inputs=[{"name": "x"}, {"datatype": LONG}]), "inputs.datatype"),
        (inference.ModelInferRequest(outputs=[{"name": LONG}]), "outputs.name"),
        (
            inference.ModelInferRequest(parameters={"x": inference.InferParameter(string_param=LONG)}),
            "parameters.value.string_param",
        ),
        (inference.ModelInferRequest(parameters={LONG: inference.InferParameter()}), "parameters.key"),
        (inference.RepositoryModelLoadRequest(model_name=LONG), "model_name"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_a_long_text_is_refused_with_its_field_before_it_is_parsed(message: Message, field: str) -> None:
    data = message.SerializeToString()
    text = f"{field}: {MAX_TEXT_BYTES + 1} bytes; expected at most {MAX_TEXT_BYTES} of a text"
    with pytest.raises(InvalidRequest) as caught:
        check_fields(data, MAX_FIELDS, fields_of(type(message)))
    assert str(caught.value) == text


def test_a_text_within_the_limit_is_read_and_many_of_them_count_as_many_fields() -> None:
    request = inference.ModelInferRequest(model_name=SHORTER)
    assert read_request(request.SerializeToString(), 2**20).message == request
    check_fields(pb.ClassifyRequest(model_name=SHORTER).SerializeToString(), MAX_FIELDS, FIELDS)
    request.outputs.extend([inference.ModelInferRequest.InferRequestedOutputTensor(name=SHORTER)] * 4)
    with pytest.raises(InvalidRequest, match=TOO_MANY_FIELDS):
        read_request(request.SerializeToString(), 2**20)


def test_the_bytes_of_pictures_are_no_text() -> None:
    check_fields(pb.ClassifyRequest(images=[pb.Image(encoded=bytes(2**20))]).SerializeToString(), 1100, CLASSIFY)
