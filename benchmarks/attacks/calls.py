"""Attacks by calls: without an end, without a reader, costly to unpack, or not to be answered."""

import gzip
from collections.abc import Callable
from functools import partial

from grpc_reflection.v1alpha import reflection_pb2

from benchmarks.attacks.link import (
    CHECK,
    CLASSIFY,
    CLASSIFY_STREAM,
    EXPLAIN,
    GET_MODEL,
    INFER,
    INK,
    RECONSTRUCT,
    REFLECTION,
    SIDE,
    WATCH,
    Attack,
    Link,
    Message,
    Pieces,
    cancel,
    data,
    framed,
    headers,
    request,
    stream_request,
    uploads,
    zipped,
)
from benchmarks.attacks.packed import empty_gzip
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as pb_oip
from serving.services.protobuf_wire import delimited
from serving.settings import Settings
from serving.transport import frames

_CALLS_A_CONNECTION = 4096
_CALLS_A_PIECE = 32
_MAX_PIECE_BYTES = 2**15
_IMAGES_OF_A_LARGE_ANSWER = 64
_HALF_MESSAGE_BYTES = 400
#: Just below the server's largest request. Zeros are compressed to a thousandth.
_BOMB_BYTES = 9 * 2**20 - 1024
_SMALL_BOMB_BYTES = 2**16 - 1024
_CLASSES = 10
#: A field of protobuf: an image without content.
_EMPTY_IMAGE = b"\x1a\x00"
_WRONG_TOKEN_CHARACTERS = 40
_IMAGES_OF_A_LARGE_REQUEST = 64
_SMALL_MESSAGES_A_PIECE = 1000
_POSE_SIZE, _STEPS = 16, 64


def calls(link: Link, path: str, make: Message, *more: tuple[str, str]) -> Pieces:
    """Make calls as fast as the server takes them."""
    yield from link.ready()
    message = make()
    count = max(1, min(_CALLS_A_PIECE, _MAX_PIECE_BYTES // len(message)))
    while True:
        yield from link.room(count * len(message))
        streams = [link.next_stream() for _ in range(count)]
        yield b"".join(headers(stream, path, *more) + data(stream, message) for stream in streams)


def _bombs(link: Link, repeated: bytes) -> Pieces:
    yield from calls(link, CLASSIFY, partial(zipped, repeated, _BOMB_BYTES), ("grpc-encoding", "gzip"))


def _unparsable() -> bytes:
    return framed(b"\xff" * 8)


def _half_request() -> bytes:
    return request()[:_HALF_MESSAGE_BYTES]


def _empty() -> bytes:
    return framed(b"")


def _held(link: Link, path: str, make: Message, end: bool) -> Pieces:
    """Open as many calls as the server allows, then stay silent."""
    yield from link.ready()
    message = make()
    for _ in range(min(_CALLS_A_CONNECTION, link.max_streams)):
        yield from link.room(len(message))
        stream = link.next_stream()
        yield headers(stream, path) + data(stream, message, end)


def _unread(link: Link) -> Pieces:
    """Ask for large answers, as many as fit into the connection's window, and read none."""
    yield from link.ready()
    link.reads = False
    message = request(_IMAGES_OF_A_LARGE_ANSWER)
    for _ in range(link.window // len(message)):
        stream = link.next_stream()
        yield headers(stream, CLASSIFY) + data(stream, message)


def _dimensions() -> bytes:
    """Return a request of the Open Inference Protocol for a tensor with millions of dimensions."""
    tensor = delimited(pb_oip.ModelInferRequest.InferInputTensor.SHAPE_FIELD_NUMBER, b"\1" * (_BOMB_BYTES - 64))
    name = delimited(pb_oip.ModelInferRequest.MODEL_NAME_FIELD_NUMBER, b"capsnet-mnist")
    return name + delimited(pb_oip.ModelInferRequest.INPUTS_FIELD_NUMBER, tensor)


def compressed_calls(link: Link, path: str, make: Callable[[], bytes]) -> Pieces:
    """Send a small compressed message that takes long to read once it is unpacked."""
    yield from calls(link, path, lambda: framed(gzip.compress(make()), True), ("grpc-encoding", "gzip"))


def _parts() -> bytes:
    """Return a request for millions of parts of an explanation."""
    image = pb.ExplainRequest(images=[pb.Image(pixels=bytes(SIDE * SIDE))]).SerializeToString()
    number = pb.ExplainRequest.PARTS_FIELD_NUMBER
    return image + delimited(number, bytes([pb.EXPLANATION_PART_ROUTING]) * (_BOMB_BYTES - len(image)))


def _contents() -> bytes:
    """Return a request with an image that has a million contents, of two kinds by turns."""
    both = delimited(pb.Image.PIXELS_FIELD_NUMBER, b"") + delimited(pb.Image.ENCODED_FIELD_NUMBER, b"")
    content = both * ((_BOMB_BYTES - 64) // len(both))
    return delimited(pb.ClassifyRequest.IMAGES_FIELD_NUMBER, content)


def _names() -> bytes:
    """Return a request that names a model millions of times."""
    return delimited(pb.GetModelRequest.MODEL_NAME_FIELD_NUMBER, b"") * (_BOMB_BYTES // 2)


def _small_messages(link: Link, path: str, message: bytes) -> Pieces:
    """Send many messages of a few bytes in each stream."""
    yield from link.ready()
    piece = framed(message) * _SMALL_MESSAGES_A_PIECE
    while True:
        stream = link.next_stream()
        yield headers(stream, path)
        for _ in range(link.stream_window // len(piece)):
            yield from link.room(len(piece))
            yield data(stream, piece, False)
        yield cancel(stream)


def _wrong_message() -> bytes:
    """Return a message of a stream that is wrong, and just large enough for a request."""
    return pb.ClassifyStreamRequest(id="i" * 40).SerializeToString()


def _empty_blocks() -> bytes:
    return framed(empty_gzip(_BOMB_BYTES), True)


def _gzip_of_empty_blocks(link: Link) -> Pieces:
    yield from uploads(link, CLASSIFY, _empty_blocks, ("grpc-encoding", "gzip"))


def _small_bombs(link: Link) -> Pieces:
    """Send compressed messages that are just small enough to be unpacked at once."""
    yield from calls(link, CLASSIFY, partial(zipped, b"\0", _SMALL_BOMB_BYTES), ("grpc-encoding", "gzip"))


def _expired(link: Link) -> Pieces:
    """Make calls whose time is over when they come."""
    yield from calls(link, CLASSIFY, request, ("grpc-timeout", "1n"))


def _explain() -> bytes:
    """Return a request for as much of an explanation as the server answers at once."""
    asked = pb.ExplainRequest(
        images=[pb.Image(pixels=INK)] * Settings.max_explained_images,
        classes=range(_CLASSES),
        parts=[
            pb.EXPLANATION_PART_ROUTING, pb.EXPLANATION_PART_CONTRIBUTIONS, pb.EXPLANATION_PART_RELEVANCE,
        ],
    )  # fmt: skip
    return framed(asked.SerializeToString())


def _sweeps() -> bytes:
    """Return a request for as many drawn images as the server answers at once, each as a PNG file."""
    poses = [pb.ClassPose(class_index=1, pose=[0.1] * _POSE_SIZE)] * (Settings.max_images_per_request // _STEPS)
    asked = pb.ReconstructRequest(
        poses=pb.Poses(poses=poses),
        sweep=pb.Sweep(dimension=1, first=-1, last=1, steps=_STEPS),
        format=pb.FORMAT_PNG,
    )
    return framed(asked.SerializeToString())


def _named_file() -> bytes:
    """Return a request of reflection for the largest file."""
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
    message: bytes = asked.SerializeToString()
    return message


def _unread_streams(link: Link) -> Pieces:
    """Ask for answers in many streams, and read none."""
    yield from link.ready()
    message = stream_request(_IMAGES_OF_A_LARGE_ANSWER)
    streams = []
    for _ in range(min(_CALLS_A_CONNECTION, link.max_streams)):
        streams.append(link.next_stream())
        yield headers(streams[-1], CLASSIFY_STREAM)
    while True:
        for stream in streams:
            yield from link.room(len(message))
            yield data(stream, message, False)


def _wrong_tokens(link: Link) -> Pieces:
    """Make calls, each with another token that the server has never seen."""
    yield from link.ready()
    message = request()
    while True:
        yield from link.room(_CALLS_A_PIECE * len(message))
        piece = b""
        for stream in (link.next_stream() for _ in range(_CALLS_A_PIECE)):
            token = f"good.{id(link):x}{stream:x}".ljust(_WRONG_TOKEN_CHARACTERS, "x")
            piece += headers(stream, CLASSIFY, ("authorization", f"Bearer {token}")) + data(stream, message)
        yield piece


CALLS = (
    Attack("gzip of empty blocks", _gzip_of_empty_blocks),
    Attack("small gzip bombs", _small_bombs),
    Attack("expired requests", _expired),
    Attack("explanations", partial(calls, path=EXPLAIN, make=_explain)),
    Attack("sweeps as PNG", partial(calls, path=RECONSTRUCT, make=_sweeps)),
    Attack("model descriptions", partial(calls, path=GET_MODEL, make=_empty)),
    Attack("health checks", partial(calls, path=CHECK, make=_empty)),
    Attack("reflection files", partial(_small_messages, path=REFLECTION, message=_named_file())),
    Attack("streams, not read", _unread_streams, settings={frames.INITIAL_WINDOW_SIZE: 0}),
    Attack("windows open, nothing read", _unread, settings={frames.INITIAL_WINDOW_SIZE: frames.MAX_WINDOW}),
    Attack(
        "windows shut, many streams", partial(_held, path=CLASSIFY, make=request, end=True),
        settings={frames.INITIAL_WINDOW_SIZE: 0}, times=2,
    ),
    Attack("half calls", partial(_held, path=CLASSIFY, make=_half_request, end=False)),
    Attack("half calls without a byte", partial(_held, path=CLASSIFY, make=bytes, end=False)),
    Attack("watches", partial(_held, path=WATCH, make=_empty, end=True)),
    Attack("gzip bombs", partial(_bombs, repeated=b"\0")),
    Attack("gzip of empty images", partial(_bombs, repeated=_EMPTY_IMAGE)),
    Attack("gzip of dimensions", partial(compressed_calls, path=INFER, make=_dimensions)),
    Attack("gzip of parts", partial(compressed_calls, path=EXPLAIN, make=_parts)),
    Attack("gzip of contents", partial(compressed_calls, path=CLASSIFY, make=_contents)),
    Attack("gzip of names", partial(compressed_calls, path=GET_MODEL, make=_names)),
    Attack("right requests", partial(calls, path=CLASSIFY, make=request)),
    Attack("large right requests", partial(calls, path=CLASSIFY, make=partial(request, _IMAGES_OF_A_LARGE_REQUEST))),
    Attack("empty messages in streams", partial(_small_messages, path=CLASSIFY_STREAM, message=b"")),
    Attack("wrong messages in streams", partial(_small_messages, path=CLASSIFY_STREAM, message=_wrong_message())),
    Attack("reflection lists", partial(_small_messages, path=REFLECTION, message=b"\x3a\0")),
    Attack("unknown methods", partial(calls, path="/no.Service/Method", make=request)),
    Attack("unparsable reflection", partial(calls, path=REFLECTION, make=_unparsable)),
    Attack("unparsable requests", partial(calls, path=CLASSIFY, make=_unparsable)),
    Attack("wrong tokens", _wrong_tokens, server="tokens"),
)  # fmt: skip
