"""Tests of the reader of pixels that came as numbers, with protobuf's classes as the reference."""

import tracemalloc
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.errors import InvalidRequest
from serving.services.open_inference_codec import read_request
from serving.services.protobuf_wire import delimited, varint
from serving.services.typed_contents import READING_BYTES, Malformed, TypedContents

MANY_BYTES = 2**26
MAX_FIELDS = 4096
KEY = b"\x20"  # of a number in uint_contents that is not packed
PIXELS = np.random.default_rng(0).integers(0, 256, 40_000).tolist()


def _packed(numbers: Iterable[int]) -> bytes:
    return delimited(4, b"".join(map(varint, numbers)))


def _one_by_one(numbers: Iterable[int]) -> bytes:
    return b"".join(KEY + varint(number) for number in numbers)


def _in_many_ways(numbers: list[int]) -> bytes:
    """Return packed numbers, single ones, and fields that mean nothing."""
    unknown = b"\x7b" + delimited(4, b"\1\2") + b"\x7c" + b"\x25abcd" + delimited(4, b"") + b"\x98\6\1"
    return (
        _one_by_one(numbers[:3]) + unknown + _packed(numbers[3:100]) + _packed(numbers[100:101])
        + _one_by_one(numbers[101:20_000]) + unknown + _one_by_one(numbers[20_000:20_017]) + _packed(numbers[20_017:])
    )  # fmt: skip


def _padded(numbers: list[int]) -> bytes:
    """Return numbers with more bytes than they need, which protobuf reads as if they had not."""
    padded = [
        bytes((number & 127 | 128, number >> 7 | 128)) + b"\x80" * (index % 8) + b"\0"
        for index, number in enumerate(numbers)
    ]
    return delimited(4, b"".join(padded)) + b"".join(KEY + one for one in padded)


def _in_short_spans(numbers: list[int]) -> bytes:
    """Return packed numbers in fields of one to a few, and some of more numbers than are read at once."""
    return (
        b"".join(_packed(numbers[at : at + 3]) for at in range(0, 3000, 3)) + _packed(numbers[3000:20_000])
        + b"".join(map(_packed, zip(numbers[20_000:20_500]))) + _one_by_one(numbers[20_500:20_530])
        + b"".join((_packed if at % 2 else _one_by_one)(numbers[at : at + 1]) for at in range(20_530, 21_000))
        + _packed(numbers[21_000:29_000]) + _packed(numbers[29_000:37_000]) + _packed(numbers[37_000:])
    )  # fmt: skip


def _contents(data: bytes) -> TypedContents:
    return TypedContents(data, [slice(0, len(data))], MAX_FIELDS)


@pytest.mark.parametrize("write", [_packed, _one_by_one, _in_many_ways, _in_short_spans, _padded])
def test_numbers_are_read_as_protobuf_reads_them(write: Callable[[list[int]], bytes]) -> None:
    data = write(PIXELS)
    expected = pb.InferTensorContents.FromString(data).uint_contents
    contents = _contents(data)
    assert (contents.kinds, contents.count) == (("uint_contents",), len(expected))
    assert contents.values().tobytes() == bytes(expected)


@pytest.mark.parametrize("write", [_packed, _one_by_one])
@pytest.mark.parametrize("number", [256, 2**14, 2**32 - 1, 2**35 + 300, 2**64 - 1])
def test_a_number_above_255_is_named_with_its_place(write: Callable[[list[int]], bytes], number: int) -> None:
    data = write([*PIXELS, number, 999])
    expected = pb.InferTensorContents.FromString(data).uint_contents[len(PIXELS)]
    with pytest.raises(InvalidRequest) as caught:
        _contents(data).values()
    text = f"inputs[0].contents.uint_contents[{len(PIXELS)}]: {expected}; expected 0 to 255"
    assert str(caught.value) == text


def test_a_number_is_cut_to_32_bits_as_protobuf_cuts_it() -> None:
    data = _packed([2**32 + 7, 2**63 + 9, 5]) + _one_by_one([2**40 + 3])
    assert pb.InferTensorContents.FromString(data).uint_contents == [7, 9, 5, 3]
    assert _contents(data).values().tolist() == [7, 9, 5, 3]


@pytest.mark.parametrize("name", [field.name for field in pb.InferTensorContents.DESCRIPTOR.fields])
def test_every_kind_of_contents_is_found_packed_and_not(name: str) -> None:
    contents = pb.InferTensorContents()
    getattr(contents, name).extend([b"x" if name == "bytes_contents" else 1] * 3)
    packed = contents.SerializeToString()
    key = packed[0] & ~7
    single = {0: bytes((key, 1)), 1: bytes((key | 1,)) + b"12345678", 5: bytes((key | 5,)) + b"1234"}
    for data in (packed, *single.values()):
        found = tuple(kind.name for kind, _ in pb.InferTensorContents.FromString(data).ListFields())
        assert _contents(data).kinds == found
    assert _contents(packed).kinds == (name,)
    assert _contents(b"").kinds == _contents(delimited(4, b"")).kinds == ()


@pytest.mark.parametrize(
    "data",
    [
        b"\x20", b"\x22\5\1", b"\x22\1\x80", b"\x27", b"\x20" + b"\xff" * 10 + b"\1", b"\x7b\x20\1", b"\x7c",
        b"\x25abc", b"\x21abc", b"\x32\3abc", b"\x35abc", b"\x42\4abc",
        _one_by_one(PIXELS) + b"\x20\x80", _packed(PIXELS)[:-1],
    ],
)  # fmt: skip
def test_what_protobuf_cannot_read_is_refused(data: bytes) -> None:
    with pytest.raises(Exception, match="parsing"):
        pb.InferTensorContents.FromString(data)
    with pytest.raises(Malformed):
        _contents(data)
    message = pb.ModelInferRequest(
        inputs=[{"name": "x" * 5000}]
    ).SerializeToString()  # longer than what is parsed first
    for whole in (delimited(5, delimited(5, data)), message + delimited(5, delimited(5, data))):
        with pytest.raises(InvalidRequest) as caught:
            read_request(whole, MANY_BYTES)
        assert str(caught.value) == f"request: {len(whole)} bytes that are not a inference.ModelInferRequest"


def test_a_number_of_too_many_bytes_is_refused() -> None:
    for endless in (b"\xff" * 11 + b"\1", b"\xff" * 2**17 + b"\1"):
        contents = _contents(delimited(4, b"\1" + endless))
        with pytest.raises(InvalidRequest, match="a number of more than 10 bytes; expected 0 to 255"):
            contents.values()


def test_floats_and_files_are_read_as_protobuf_reads_them() -> None:
    floats = np.random.default_rng(0).random(40_000, np.float32)
    single = b"".join(b"\x35" + number.tobytes() for number in floats[:100])
    data = delimited(6, floats[100:].tobytes()) + delimited(8, b"one") + single + delimited(8, b"") + b"\x30\1"
    expected = pb.InferTensorContents.FromString(data)
    contents = _contents(data)
    assert contents.kinds == ("fp32_contents", "bytes_contents")
    assert contents.float_count == len(expected.fp32_contents) == 40_000
    pieces = list(contents.floats())
    assert np.concatenate(pieces).tolist() == list(expected.fp32_contents)
    assert len(pieces) > 8 and max(map(len, pieces)) < 10_000
    assert contents.elements == list(expected.bytes_contents) == [b"one", b""]


def test_numbers_by_the_million_count_little_and_other_fields_each() -> None:
    assert _contents(_one_by_one([1] * 10**6)).count == 10**6
    for many in (b"\x42\0", b"\x22\0", KEY + b"\1\x78\1"):
        with pytest.raises(InvalidRequest, match="more fields than any request"):
            _contents(many * MAX_FIELDS + b"\x78\1")


def test_the_message_has_all_but_the_numbers_and_keeps_its_empty_contents() -> None:
    request = pb.ModelInferRequest(model_name="m", id="7")
    request.outputs.add(name="poses")
    request.parameters["timeout"].int64_param = 9
    for _ in range(2):
        tensor = request.inputs.add(name="images", datatype="UINT8", shape=[1, 2, 3])
        tensor.contents.uint_contents.extend(PIXELS)
    received = read_request(request.SerializeToString(), MANY_BYTES)
    for one in request.inputs:
        one.contents.Clear()
    assert received.message == request
    assert received.message.inputs[1].HasField("contents")
    assert received.typed is not None and received.typed.values().tolist() == PIXELS * 2


def test_contents_in_a_group_belong_to_no_tensor() -> None:
    group = b"\xa3\6" + delimited(5, delimited(5, _packed(PIXELS))) + b"\xa4\6"
    received = read_request(group + delimited(5, delimited(1, b"images")), MANY_BYTES)
    assert len(received.message.inputs) == 1 and received.typed is None


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("number", [1, 200])
def test_reading_takes_little_memory_besides_the_pixels(kind: int, number: int) -> None:
    count = 2**20
    data = delimited(5, delimited(5, delimited(kind, varint(number) * count)))
    tracemalloc.start()
    try:
        typed = read_request(data, MANY_BYTES).typed
        assert typed
        assert len(typed.values()) == (count if kind == 4 else 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < count + READING_BYTES


def test_steps_pause_so_that_other_requests_get_their_turns() -> None:
    assert len(list(_contents(_packed(PIXELS)).steps())) > 1
    assert not list(chain(_contents(b"").steps()))


@pytest.mark.parametrize(
    "data",
    [
        delimited(4, b"\1") * 3000,
        (delimited(4, b"\1") + KEY + b"\1") * 1500,
        (KEY + b"\1" + b"\x78\1") * 1500 + (KEY + b"\1") * 1500,
        (b"\x35" + bytes(4)) * 3000,
        delimited(6, bytes(4)) * 3000,
    ],
    ids=["packed", "packed and not", "apart", "floats", "packed floats"],
)
def test_numbers_in_many_fields_are_read_at_once(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, read = 0, np.frombuffer

    def counted(*given: Any, **named: Any) -> NDArray[Any]:
        nonlocal calls
        calls += 1
        return read(*given, **named)

    monkeypatch.setattr(np, "frombuffer", counted)
    contents = _contents(data)
    numbers = [int(number) for piece in contents.floats() for number in piece] or contents.values().tolist()
    assert len(numbers) == 3000 and len(set(numbers)) == 1
    assert calls < 20
