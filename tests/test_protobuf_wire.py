"""Tests of the checks of a message in protobuf's encoding before it is parsed."""

import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.errors import InvalidRequest
from serving.services.protobuf_wire import TOO_MANY_FIELDS, check_fields, fields_of, tag

FIELDS = fields_of(pb.ReconstructRequest)
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
