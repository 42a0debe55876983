"""Attacks by many small parts, which take more memory or time than their bytes, and by texts that are repeated."""

from functools import cache, partial

from grpc_reflection.v1alpha import reflection_pb2

from benchmarks.attacks.calls import calls, compressed_calls
from benchmarks.attacks.link import (
    CLASSIFY,
    INFER,
    RECONSTRUCT,
    REFLECTION,
    SIDE,
    Attack,
    Link,
    Pieces,
    data,
    framed,
    headers,
    uploads,
)
from benchmarks.attacks.web import again, on_http, post
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as pb_oip
from serving.services.protobuf_wire import delimited
from serving.transport import frames

_MAX_STREAMS = 1000
_MESSAGES_A_STREAM = 800
_MESSAGES_A_PIECE = 200
_FIELDS_OF_A_HALF_CALL = 118
_HALF_CALL_CONNECTIONS = 7
_FIELDS_OF_A_CALL = 42
_REMEMBERED_CALLS = 64
_CONNECTIONS = 250
_PIECE_BYTES = 64
_PIECES_A_MESSAGE, _PIECES_AT_ONCE = 3900, 500
_HALF_MESSAGE_BYTES = 300_000
_HALF_MESSAGES = 260
_TYPED_IMAGES = 5
_LONG_FIELDS = 19_400
_JSON_BYTES = 12_600_000
_FILE_BYTES = 2**23 - 600
_DEPTH, _LISTS = 300, 5200
_CHANGES = 3900


def _small_answers(link: Link) -> Pieces:
    """Ask for thousands of small answers in each stream. No window has room for them."""
    yield from link.ready()
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 30)
    piece = framed(asked.SerializeToString()) * _MESSAGES_A_PIECE
    for _ in range(min(_MAX_STREAMS, link.max_streams)):
        stream = link.next_stream()
        yield headers(stream, REFLECTION)
        for _ in range(_MESSAGES_A_STREAM // _MESSAGES_A_PIECE):
            yield from link.room(len(piece))
            yield data(stream, piece, False)


def _fields(number: int, amount: int) -> list[tuple[str, str]]:
    """Return headers with other values for each number."""
    return [(f"k{place:03}", f"{(number * amount + place) % 1000:03}") for place in range(amount)]


def _half_calls(link: Link) -> Pieces:
    """Open calls of many headers, and send nothing more of them."""
    yield from link.ready()
    for number in range(min(_MAX_STREAMS, link.max_streams)):
        yield headers(link.next_stream(), CLASSIFY, *_fields(number, _FIELDS_OF_A_HALF_CALL))


def _remembered(link: Link) -> Pieces:
    """Make calls of different headers, and then none."""
    yield from link.ready()
    for number in range(_REMEMBERED_CALLS):
        yield headers(link.next_stream(), "/a/b", *_fields(number, _FIELDS_OF_A_CALL), end=True)


def _small_pieces(link: Link) -> Pieces:
    """Send half messages, a few bytes in each frame."""
    yield from link.ready()
    for _ in range(_HALF_MESSAGES):
        stream = link.next_stream()
        begin = framed(bytes(_HALF_MESSAGE_BYTES))[:_PIECE_BYTES]
        yield headers(stream, CLASSIFY) + data(stream, begin, False)
        piece = frames.frame(frames.DATA, 0, stream, bytes(_PIECE_BYTES)) * _PIECES_AT_ONCE
        for _ in range(_PIECES_A_MESSAGE // _PIECES_AT_ONCE):
            yield from link.room(_PIECES_AT_ONCE * _PIECE_BYTES)
            yield piece


@cache
def _typed() -> bytes:
    """Return a tensor whose numbers have a field of protobuf each."""
    tensor = pb_oip.ModelInferRequest.InferInputTensor
    number = delimited(pb_oip.InferTensorContents.UINT_CONTENTS_FIELD_NUMBER, b"\1")
    values = delimited(tensor.CONTENTS_FIELD_NUMBER, number * (_TYPED_IMAGES * SIDE * SIDE))
    shaped = tensor(name="images", datatype="UINT8", shape=[_TYPED_IMAGES, 1, SIDE, SIDE])
    name = delimited(pb_oip.ModelInferRequest.MODEL_NAME_FIELD_NUMBER, b"capsnet-mnist")
    inputs = delimited(pb_oip.ModelInferRequest.INPUTS_FIELD_NUMBER, shaped.SerializeToString() + values)
    return framed(name + inputs)


@cache
def _long_fields() -> bytes:
    """Return fields that nobody knows, with numbers and values of many bytes."""
    number = bytes([0x80 | 500 << 3 & 0x7F, 0x80 | 500 >> 4, 0x80, 0x80, 0])
    return framed((number + b"\x81" + b"\x80" * 8 + b"\0") * _LONG_FIELDS)


def _long_name() -> bytes:
    """Return a model's name of megabytes, whose last character makes Python take four bytes for each."""
    return delimited(pb.ClassifyRequest.MODEL_NAME_FIELD_NUMBER, b"i" * _FILE_BYTES + "\U0001f600".encode())


@cache
def _words() -> bytes:
    """Return JSON with a text where a list is expected, which an error may repeat."""
    return post("/v1/classify", b'{"images":"%s"}' % (b"aa " * (_JSON_BYTES // 3)))


@cache
def _object() -> bytes:
    """Return JSON with an object of many numbers where a list is expected."""
    return post("/v1/classify", b'{"images":{"a":[%s]}}' % b",".join([b"0.1234"] * (_JSON_BYTES // 8)))


@cache
def _name_in_json() -> bytes:
    return post("/v1/classify", b'{"model_name":"%s"}' % (b"a" * (_JSON_BYTES - 20)))


@cache
def _nested() -> bytes:
    """Return small JSON of many lists, deep in others, with a character of two escapes."""
    lists = b"[" * _DEPTH + b",".join([b"[]"] * _LISTS) + b"]" * _DEPTH
    return post("/v2/models/capsnet-mnist/infer", b'{"x":"\\ud83d\\ude00","y":%s}' % lists)


@cache
def _changes() -> bytes:
    """Return a query and a form of thousands of changes."""
    changes = ",".join(["0:1"] * _CHANGES)
    body = f'--e\r\nContent-Disposition: form-data; name="changes"\r\n\r\n{changes}\r\n--e--\r\n'
    return post(f"/v1/reconstruct?changes={changes}", body.encode(), "multipart/form-data; boundary=e")


_SHUT = {frames.INITIAL_WINDOW_SIZE: 0}

SMALL_PARTS = (
    Attack("small answers, not read", _small_answers, settings=_SHUT),
    Attack("half calls of many headers", _half_calls, times=_HALF_CALL_CONNECTIONS),
    Attack("headers to remember", _remembered, times=_CONNECTIONS),
    Attack("half messages in small pieces", _small_pieces),
    Attack("numbers in many fields", partial(calls, path=INFER, make=_typed)),
    Attack("long unknown fields", partial(uploads, path=RECONSTRUCT, make=_long_fields)),
    Attack("gzip of a long name", partial(compressed_calls, path=CLASSIFY, make=_long_name)),
    on_http("words in JSON", partial(again, make=_words)),
    on_http("an object in JSON", partial(again, make=_object)),
    on_http("a long name in JSON", partial(again, make=_name_in_json)),
    on_http("nested JSON", partial(again, make=_nested)),
    on_http("changes", partial(again, make=_changes)),
)
