"""Attacks by image files: costly to decode, large, and in messages that wait for a thread, over gRPC and HTTP."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial

from PIL import Image

from benchmarks.attacks.calls import compressed_calls
from benchmarks.attacks.link import (
    CLASSIFY,
    CLASSIFY_STREAM,
    SIDE,
    Attack,
    Link,
    Pieces,
    framed,
    uploads,
)
from benchmarks.attacks.packed import empty_zlib
from benchmarks.attacks.web import again, head, on_http, post
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.settings import Settings

_IMAGES = 64
_WEB_CONNECTIONS = 8
#: A picture in which nearly the most bytes of a file take fewer than its pixels.
_SIDE_OF_BLOCKS = 1500
#: Pictures that nearly take the memory for decoding: by their pixels alone, and with the most bytes of a file.
_LARGE_SIDE, _LONG_SIDE = 3400, 2700
_LONG_BYTES = Settings.max_image_bytes - 2**18
_SEGMENT_BYTES = 2**16 - 3
#: Bytes of a file beside its largest part.
_OTHER_BYTES = 1024
_TEXT_BYTES = Settings.max_image_bytes - 600
#: The most small segments before a frame, and the most files of a request.
_SEGMENTS, _FILES = 62, Settings.max_images_per_request
_BYTES_BEHIND, _WAITING_CONNECTIONS = 800_000, 300
_GREY = (0, 1)
_GREY_AND_TRANSPARENCY, _COLOURS_AND_TRANSPARENCY = (4, 2), (6, 4)  # PNG's number, and the bytes of a pixel


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _png(width: int, height: int, colours: tuple[int, int], more: bytes = b"") -> bytes:
    """Return a file of black pixels. more: chunks before them."""
    kind, pixel_bytes = colours
    packer = zlib.compressobj(9)
    row = bytes(1 + pixel_bytes * width)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


@cache
def _costly() -> bytes:
    """Return a file that costs the most that the server's limits on its parts allow."""
    exif = b"MM\0*" + struct.pack(">IH", 8, 64) + struct.pack(">HHII", 0x0112, 4, 1, 6) * 64 + bytes(4)
    unpacked = b"C\0\0" + zlib.compress(bytes(2**18 - 1), 9)
    parts = _chunk(b"eXIf", exif) + _chunk(b"iCCP", unpacked) + _chunk(b"zTXt", unpacked) + _chunk(b"teSt", b"") * 50
    return _png(SIDE, SIDE, _GREY_AND_TRANSPARENCY, parts)


@cache
def _large() -> bytes:
    """Return a file of nearly the most bytes, which is quickly decoded."""
    return _png(SIDE, SIDE, _GREY_AND_TRANSPARENCY, _chunk(b"teSt", bytes(Settings.max_image_bytes - _OTHER_BYTES)))


@cache
def _bomb() -> bytes:
    """Return a picture of few bytes and nearly the most pixels."""
    side = int(Settings.max_picture_pixels**0.5)
    return _png(side, side, _COLOURS_AND_TRANSPARENCY)


@cache
def _blocks() -> bytes:
    """Return a picture whose pixels would come after millions of blocks without any."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", _SIDE_OF_BLOCKS, _SIDE_OF_BLOCKS, 8, 6, 0, 0, 0))
    pixels = _chunk(b"IDAT", empty_zlib(Settings.max_image_bytes - _OTHER_BYTES))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + _chunk(b"IEND", b"")


@cache
def photograph(side: int, padding: int) -> bytes:
    """Return a square picture for whose coefficients a decoder needs the most memory. padding: further bytes."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "JPEG", progressive=True, subsampling=0)
    whole, rest = divmod(padding, _SEGMENT_BYTES)
    more = b"".join(b"\xff\xe9" + (size + 2).to_bytes(2) + bytes(size) for size in [_SEGMENT_BYTES] * whole + [rest])
    return file.getvalue()[:2] + more + file.getvalue()[2:]


def _request(file: bytes, count: int = 1, preprocess: pb.Preprocess = pb.PREPROCESS_NONE) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(images=[pb.Image(encoded=file, preprocess=preprocess)] * count)


def _costly_images() -> bytes:
    return framed(_request(_costly(), _IMAGES).SerializeToString())


def _large_images() -> bytes:
    return framed(_request(_large()).SerializeToString())


def _packed_blocks() -> bytes:
    return framed(_request(_blocks(), preprocess=pb.PREPROCESS_AUTO).SerializeToString())


def _photographs() -> bytes:
    file = photograph(_LARGE_SIDE, 0)
    return framed(_request(file, preprocess=pb.PREPROCESS_AUTO).SerializeToString())


def _long_photographs() -> bytes:
    file = photograph(_LONG_SIDE, _LONG_BYTES)
    return framed(_request(file, preprocess=pb.PREPROCESS_AUTO).SerializeToString())


def _frames() -> bytes:
    """Return a picture that has its frame again and again, each of many components."""
    file = io.BytesIO()
    Image.new("L", (28, 28)).save(file, "JPEG")
    frame = _segment(0xC0, struct.pack(">BHHB", 8, 28, 28, 1) + b"\1\x11\0" * (_SEGMENT_BYTES // 3 - 2))
    more = frame * (_LONG_BYTES // len(frame))
    return framed(_request(file.getvalue()[:2] + more + file.getvalue()[2:]).SerializeToString())


def _bombs() -> bytes:
    return framed(_request(_bomb(), preprocess=pb.PREPROCESS_AUTO).SerializeToString())


def _streamed(file: bytes, count: int) -> bytes:
    return framed(pb.ClassifyStreamRequest(request=_request(file, count)).SerializeToString())


def _large_streamed() -> bytes:
    """Return a message of nearly the most bytes."""
    return _streamed(_large(), (Settings.max_request_bytes - _OTHER_BYTES) // len(_large()))


def _costly_streamed() -> bytes:
    """Return a message of the most images, each of which takes long to decode."""
    return _streamed(_costly(), Settings.max_images_per_request)


def _long_ids() -> bytes:
    """Return a message with an id of nearly the largest size, which would come back in its answer."""
    asked = pb.ClassifyStreamRequest(id="i" * (Settings.max_request_bytes - _OTHER_BYTES))
    return framed(asked.SerializeToString())


def _post_costly() -> bytes:
    part = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + _costly() + b"\r\n"
    return post("/v1/classify", part * _IMAGES + b"--edge--\r\n", "multipart/form-data; boundary=edge")


@cache
def _long_text() -> bytes:
    """Return a request with a file that has a text of megabytes where its orientation may stand."""
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + b"a" * _TEXT_BYTES + "\U0001f600".encode()
    return framed(_request(_png(SIDE, SIDE, _GREY, _chunk(b"iTXt", text))).SerializeToString())


@cache
def _segments() -> bytes:
    """Return a request with as many JPEG files as it may have, each of as many segments as it may have."""
    orientation = _segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + bytes(12))
    frame = _segment(0xC0, struct.pack(">BHHB", 8, SIDE, SIDE, 1) + b"\1\x11\0")
    file = b"\xff\xd8" + orientation * _SEGMENTS + frame + _segment(0xDA, b"\1\1\0\0\x3f\0")
    return _request(file, _FILES, pb.PREPROCESS_AUTO).SerializeToString()


def _segments_as_they_are() -> bytes:
    return framed(_segments())


def _post_large() -> bytes:
    return post("/v1/classify", _large(), "image/png")


def _post_bomb() -> bytes:
    return post("/v1/classify?preprocess=auto", _bomb(), "image/png")


def _post_blocks() -> bytes:
    return post("/v1/classify?preprocess=auto", _blocks(), "image/png")


def _post_photograph() -> bytes:
    return post("/v1/classify?preprocess=auto", photograph(_LARGE_SIDE, 0), "image/jpeg")


def _post_long_photograph() -> bytes:
    return post("/v1/classify?preprocess=auto", photograph(_LONG_SIDE, _LONG_BYTES), "image/jpeg")


def _behind_a_picture(link: Link) -> Pieces:
    """Post a picture that takes long, and as much of a next one as the server takes before its answer."""
    yield _post_bomb()
    yield head("/v1/classify", _BYTES_BEHIND, "Content-Type: image/png") + bytes(_BYTES_BEHIND // 2)


def _web(name: str, make: Callable[[], bytes]) -> Attack:
    return on_http(name, partial(again, make=make), least=_WEB_CONNECTIONS)


PICTURES = (
    Attack("costly images", partial(uploads, path=CLASSIFY, make=_costly_images)),
    Attack("large images", partial(uploads, path=CLASSIFY, make=_large_images)),
    Attack("picture bombs", partial(uploads, path=CLASSIFY, make=_bombs)),
    Attack("large messages in streams", partial(uploads, path=CLASSIFY_STREAM, make=_large_streamed)),
    Attack("long ids in streams", partial(uploads, path=CLASSIFY_STREAM, make=_long_ids)),
    Attack("costly messages in streams", partial(uploads, path=CLASSIFY_STREAM, make=_costly_streamed)),
    Attack("pictures of empty blocks", partial(uploads, path=CLASSIFY, make=_packed_blocks)),
    Attack("photographs", partial(uploads, path=CLASSIFY, make=_photographs)),
    Attack("long photographs", partial(uploads, path=CLASSIFY, make=_long_photographs)),
    Attack("pictures of many frames", partial(uploads, path=CLASSIFY, make=_frames)),
    Attack("pictures of long texts", partial(uploads, path=CLASSIFY, make=_long_text)),
    Attack("pictures of many segments", partial(uploads, path=CLASSIFY, make=_segments_as_they_are)),
    Attack("gzip of pictures of many segments", partial(compressed_calls, path=CLASSIFY, make=_segments)),
    _web("pictures of empty blocks", _post_blocks),
    _web("photographs", _post_photograph),
    _web("long photographs", _post_long_photograph),
    _web("costly images", _post_costly),
    _web("large images", _post_large),
    _web("picture bombs", _post_bomb),
    on_http("bytes behind a picture", _behind_a_picture, _WAITING_CONNECTIONS),
)
