"""Broken requests by kind, drawn by lot: the frames of one stream, or of a whole connection's end."""

import base64
import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.attacks.link import (
    CLASSIFY,
    CLASSIFY_STREAM,
    REFLECTION,
    WATCH,
    block,
    cancel,
    data,
    framed,
    headers,
    literal,
    priority,
    text,
    zipped,
)
from benchmarks.soak.right_answers import as_png, digits
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference
from serving.transport import frames
from serving.transport.messages import PREFIX

INFER = "/inference.GRPCInferenceService/ModelInfer"
INFER_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
GET_MODEL = "/capsnet.v1.CapsNetService/GetModel"
Field = tuple[str, str]
_BOMB_BYTES = 2**20
_MANY = 20_000


@dataclass(frozen=True)
class Maker:
    """The maker of broken requests. fields: the metadata of a client that may call."""

    random: random.Random
    fields: tuple[Field, ...]

    def junk(self, most: int = 300) -> bytes:
        return self.random.randbytes(self.random.randint(1, most))

    def call(self, stream: int, message: bytes, path: str = CLASSIFY, *more: Field) -> bytes:
        """Return a call of one message with gRPC's prefix."""
        return headers(stream, path, *self.fields, *more) + data(stream, message)

    def with_block(self, stream: int, header_block: bytes) -> bytes:
        """Return a whole call whose header block is given."""
        return frames.header_frames(stream, header_block, False) + data(stream, framed(b""))

    def usual_block(self, path: str = CLASSIFY) -> bytes:
        return block(path, *self.fields)

    def mutated(self, message: bytes) -> bytes:
        """Return a message with some bytes changed, cut off or repeated."""
        changed = bytearray(message)
        for _ in range(self.random.randint(1, 8)):
            at = self.random.randrange(len(changed))
            match self.random.randrange(3):
                case 0:
                    changed[at] = self.random.randrange(256)
                case 1:
                    del changed[at : at + self.random.randint(1, 40)]
                case 2:
                    changed[at:at] = changed[at : at + self.random.randint(1, 40)]
            if not changed:
                return b"\0"
        return bytes(changed)


#: Returns the frames of a broken request on a stream.
Make = Callable[[Maker, int], bytes]

_DIGITS = digits(8)
_PNG = [as_png(image) for image in _DIGITS]
_CLASSIFY = pb.ClassifyRequest(images=[pb.Image(pixels=_DIGITS[0].tobytes()), pb.Image(encoded=_PNG[1])])


def _infer(**changes: object) -> inference.ModelInferRequest:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 28, 28], **changes}
    pixels = _DIGITS[0].tobytes()
    given = inference.ModelInferRequest.InferInputTensor(**tensor)  # type: ignore[arg-type]
    return inference.ModelInferRequest(inputs=[given], raw_input_contents=[pixels])


def _of_images(*images: pb.Image, name: str = "") -> bytes:
    return framed(pb.ClassifyRequest(model_name=name, images=images).SerializeToString())


def _huge_png() -> bytes:
    """Return the start of a PNG file whose header tells of 65,000 x 65,000 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 65_000, 65_000, 8, 0, 0, 0, 0)
    return _PNG[0][:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + _PNG[0][33:]


def _garbage(maker: Maker, stream: int) -> bytes:
    path = maker.random.choice((CLASSIFY, INFER, GET_MODEL, "/inference.GRPCInferenceService/ModelConfig"))
    return maker.call(stream, framed(b"\xff" + maker.junk()), path)


def _mutated_classify(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, framed(maker.mutated(_CLASSIFY.SerializeToString())))


def _mutated_infer(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, framed(maker.mutated(_infer().SerializeToString())), INFER)


def _wrong_pixels(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, _of_images(pb.Image(pixels=maker.junk(700))))


def _wrong_picture(maker: Maker, stream: int) -> bytes:
    good = maker.random.choice(_PNG)
    picture = maker.random.choice(
        (good[:-30], good[: len(good) // 2], b"\xff\xd8\xff" + maker.junk(), _huge_png(), b"GIF89a" + maker.junk())
    )
    return maker.call(stream, _of_images(pb.Image(encoded=picture)))


def _no_image(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, _of_images(*[pb.Image()] * maker.random.randrange(4)))


def _unknown_model(maker: Maker, stream: int) -> bytes:
    name = maker.random.choice(("../../etc/passwd", "\x1b[31mred\n", "x" * 500, "\u202e", "%s%n", "capsnet-mnist/1"))
    return maker.call(stream, _of_images(pb.Image(pixels=bytes(784)), name=name))


def _wrong_tensor(maker: Maker, stream: int) -> bytes:
    message = maker.random.choice(
        (
            _infer(name="x" * 200), _infer(datatype="BYTES"), _infer(shape=[-1, 1, 28, 28]),
            _infer(shape=[2**62, 1, 28, 28]), _infer(shape=[1] * 100), _infer(shape=[]),
            inference.ModelInferRequest(), inference.ModelInferRequest(raw_input_contents=[b""] * 50),
        )
    )  # fmt: skip
    return maker.call(stream, framed(message.SerializeToString()), INFER)


def _wrong_prefix(maker: Maker, stream: int) -> bytes:
    message = maker.random.choice(
        (
            PREFIX.pack(0, 1000) + maker.junk(), PREFIX.pack(0, 2**32 - 1) + maker.junk(), PREFIX.pack(7, 3) + b"abc",
            framed(b"") + framed(b""), framed(b"")[:3], PREFIX.pack(0, 5 * 2**20) + maker.junk(),
        )
    )  # fmt: skip
    return maker.call(stream, message)


def _wrong_compression(maker: Maker, stream: int) -> bytes:
    bomb = zipped(b"\0", _BOMB_BYTES)
    message, encoding = maker.random.choice(
        (
            (framed(b"abc", True), "identity"), (framed(maker.junk(), True), "gzip"), (bomb[:-9], "gzip"),
            (bomb, "deflate"), (framed(b""), "br"), (framed(maker.junk(), True), "snappy"),
        )
    )  # fmt: skip
    return maker.call(stream, message, CLASSIFY, ("grpc-encoding", encoding))


def _bomb(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, zipped(b"\0", _BOMB_BYTES), CLASSIFY, ("grpc-encoding", "gzip"))


def _nothing(maker: Maker, stream: int) -> bytes:
    return headers(stream, CLASSIFY, *maker.fields, end=True)


def _wrong_path(maker: Maker, stream: int) -> bytes:
    path = maker.random.choice(
        ("/", "//", "/no.Service/Method", CLASSIFY + "X", CLASSIFY.lower(), "/../" + CLASSIFY, "/" + "x" * 5000)
    )
    return maker.call(stream, framed(b""), path)


def _no_grpc(maker: Maker, stream: int) -> bytes:
    """Return a call that is no gRPC request: another method or content type."""
    start = maker.random.choice((b"\x82\x86\x84\x01\x09localhost", b"\x83\x86\x04" + text(CLASSIFY)))
    kind = maker.random.choice(
        (b"", literal("content-type", "text/html"), literal("content-type", "application/grpc+x"))
    )
    return maker.with_block(stream, start + kind)


def _wrong_token(maker: Maker, stream: int) -> bytes:
    token = maker.random.choice(("", "x", "Bearer", "Bearer x.y", "Bearer \u00e9", "Basic eDp5", "Bearer " + "a" * 600))
    more = (("authorization", token),) if token else ()
    return headers(stream, CLASSIFY, *more) + data(stream, framed(b""))


def _new_wrong_token(maker: Maker, stream: int) -> bytes:
    token = f"Bearer good.{maker.random.randbytes(20).hex()}"
    return headers(stream, CLASSIFY, ("authorization", token)) + data(stream, framed(b""))


def _wrong_timeout(maker: Maker, stream: int) -> bytes:
    timeout = maker.random.choice(("", "1", "S", "-1S", "1.5S", "999999999S", "1x", "0n", "1n", "1u", "\u0661S"))
    return maker.call(stream, framed(_CLASSIFY.SerializeToString()), CLASSIFY, ("grpc-timeout", timeout))


def _malformed_headers(maker: Maker, stream: int) -> bytes:
    field = maker.random.choice(
        (
            literal("Upper", "x"), literal("", "x"), literal("connection", "close"), literal("te", "gzip"),
            literal(":path", "/x"), literal(":unknown", "x"), literal("a b", "x"),
            b"\0\x01a\x03x\0y", b"\0\x01a\x03x\ny",
            literal("transfer-encoding", "chunked"), literal("grpc-timeout", "1S") * 2, literal("host", "other"),
        )
    )  # fmt: skip
    return maker.with_block(stream, maker.usual_block() + field)


def _much_metadata(maker: Maker, stream: int) -> bytes:
    many = maker.random.choice((literal("x-junk", "y" * 120) * 160, literal("x", "y") * 1000))
    return maker.with_block(stream, maker.usual_block() + many)


def _odd_metadata(maker: Maker, stream: int) -> bytes:
    key, value = maker.random.choice(
        (
            ("x-bin", "!!!"), ("traceparent", "00-zz-zz-zz"), ("x-request-id", "i" * 3000),
            ("grpc-accept-encoding", ",,"),
            ("x-request-id", "\u202e\u0085"), ("grpc-tags-bin", base64.b64encode(os.urandom(9)).decode()),
        )
    )  # fmt: skip
    return maker.call(stream, framed(b"\xff"), CLASSIFY, (key, value))


def _wrong_length(maker: Maker, stream: int) -> bytes:
    length = maker.random.choice(("1", "99999999999", "-1", "x", "18446744073709551616"))
    return maker.call(stream, framed(b"\xff"), CLASSIFY, ("content-length", length))


def _broken_stream(maker: Maker, stream: int) -> bytes:
    path = maker.random.choice((CLASSIFY_STREAM, INFER_STREAM))
    right = pb.ClassifyStreamRequest(id="1", request=_CLASSIFY) if path == CLASSIFY_STREAM else _infer()
    messages = [framed(right.SerializeToString()), *(framed(maker.junk()) for _ in range(maker.random.randint(1, 5)))]
    maker.random.shuffle(messages)
    return maker.call(stream, b"".join(messages), path)


def _broken_reflection(maker: Maker, stream: int) -> bytes:
    return maker.call(stream, framed(b"\xff" + maker.junk()), REFLECTION)


def _broken_health(maker: Maker, stream: int) -> bytes:
    path = maker.random.choice((WATCH, WATCH.replace("Watch", "Check")))
    ended = cancel(stream) if path == WATCH else b""
    return maker.call(stream, framed(maker.random.choice((b"\xff", b"\x0a\x03abc"))), path) + ended


def _given_up(maker: Maker, stream: int) -> bytes:
    """Return a call that is reset right after its headers, half its message, or all of it."""
    message = framed(_CLASSIFY.SerializeToString())
    whole = maker.random.random() < 0.3
    size = len(message) if whole else maker.random.randrange(1, len(message))
    path = maker.random.choice((CLASSIFY, CLASSIFY_STREAM, INFER, GET_MODEL))
    begun = headers(stream, path, *maker.fields)
    return begun + maker.random.choice((b"", data(stream, message[:size], whole))) + cancel(stream)


def _after_the_end(maker: Maker, stream: int) -> bytes:
    whole = maker.call(stream, framed(_CLASSIFY.SerializeToString()))
    return whole + maker.random.choice((data(stream, b"x"), headers(stream, CLASSIFY, *maker.fields, end=True)))


def _wrong_window(maker: Maker, stream: int) -> bytes:
    size = maker.random.choice((0, frames.MAX_WINDOW))
    return headers(stream, CLASSIFY, *maker.fields) + frames.window_update(stream, size)


def _own_priority(maker: Maker, stream: int) -> bytes:
    return (
        headers(stream, CLASSIFY, *maker.fields)
        + frames.frame(frames.PRIORITY, 0, stream, struct.pack(">IB", stream, 15))
        + cancel(stream)
    )


#: Kinds of which a request must never be answered OK.
NEVER_OK: dict[str, Make] = {
    "garbage": _garbage,
    "wrong pixels": _wrong_pixels,
    "wrong picture": _wrong_picture,
    "no image": _no_image,
    "unknown model": _unknown_model,
    "wrong tensor": _wrong_tensor,
    "wrong prefix": _wrong_prefix,
    "wrong compression": _wrong_compression,
    "gzip bomb": _bomb,
    "nothing": _nothing,
    "wrong path": _wrong_path,
    "no gRPC": _no_grpc,
    "wrong token": _wrong_token,
    "new wrong token": _new_wrong_token,
    "malformed headers": _malformed_headers,
    "much metadata": _much_metadata,
    "odd metadata": _odd_metadata,
    "wrong length": _wrong_length,
    "broken reflection": _broken_reflection,
    "given up": _given_up,
    "wrong window": _wrong_window,
    "own priority": _own_priority,
}
#: Kinds of which a request may be answered OK: a change may have left it right, or its error comes in the stream.
PERHAPS_OK: dict[str, Make] = {
    "mutated classify": _mutated_classify,
    "mutated infer": _mutated_infer,
    "wrong timeout": _wrong_timeout,
    "broken stream": _broken_stream,
    "broken health": _broken_health,
    "after the end": _after_the_end,
}
#: Kinds that gRPC's own server may leave without an answer until their deadline.
NOT_ANSWERED_BY_GRPCIO = frozenset(("wrong prefix", "wrong compression", "nothing", "wrong window"))
#: Kinds that cost the server much; few of them are drawn.
COSTLY = {"gzip bomb": 0.02, "new wrong token": 0.02, "much metadata": 0.2}
BROKEN: dict[str, Make] = NEVER_OK | PERHAPS_OK


def last_words(maker: Maker) -> bytes:
    """Return bytes that break a whole connection."""
    wrong: Sequence[bytes] = (
        maker.junk(2000),
        frames.frame(frames.DATA, 0, 0, b"x"),
        struct.pack(">HBBBI", 2**8, 0, frames.DATA, 0, 1),
        frames.frame(frames.SETTINGS, 0, 0, b"abc"),
        frames.frame(frames.PING, 0, 0, b"short"),
        frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, b"\x82"),
        frames.header_frames(2, block(CLASSIFY), True),
        frames.header_frames(2**31 - 1, b"\xff\xff\xff\xff\xff\xff", True),
        frames.window_update(0, 0),
        frames.window_update(0, frames.MAX_WINDOW),
        frames.frame(frames.GOAWAY, 0, 0, bytes(8) + maker.junk()),
        frames.frame(frames.HEADERS, 0, 2**31 - 1, block(CLASSIFY)) + priority(1),
        frames.settings({frames.INITIAL_WINDOW_SIZE: 2**32 - 1}),
    )
    return maker.random.choice(wrong)
