"""Tests of the checks of an image file before it is decoded, with files that were made to cost much."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.attacks.packed import empty_zlib
from serving.errors import InvalidRequest
from serving.files.image_headers import IMAGE_CAUSES, MAX_IMAGE_BYTES, BadImage, read_header, without_unread_parts
from serving.files.images import limit_metadata
from serving.services.encoded_images import RefusedImage, decoding_bytes, from_encoded
from tests.inflating import inflating

SIDE = 28
LARGE = 1024
RAMP = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE).astype(np.uint8))
PNG_HEAD_BYTES = 33  # the signature and IHDR
#: The CPU time that any file of a megabyte may take, with room for a slow machine. The worst ones took 0.3 to 53 s.
MAX_CPU_SECONDS = 0.25


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(chunks: bytes, image: Image.Image = RAMP) -> bytes:
    """Return a PNG file with further chunks after its header."""
    data = encode(image, "PNG")
    return data[:PNG_HEAD_BYTES] + chunks + data[PNG_HEAD_BYTES:]


def progressive(side: int = SIDE) -> bytes:
    return encode(Image.new("RGB", (side, side), "red"), "JPEG", progressive=True, quality=50)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(segments: bytes) -> bytes:
    """Return a JPEG file with further segments before its own."""
    data = progressive()
    return data[:2] + segments + data[2:]


def with_scans(count: int, side: int = LARGE) -> bytes:
    """Return a JPEG file with ``count`` more scans, of ten bytes each, that go over the whole image."""
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 0, 0x10)
    data = progressive(side)
    last = data.rfind(b"\xff\xda")
    return data[:last] + scan * count + data[-2:]


EXIF_TEXT = b"Raw profile type exif\0\0"
XMP_TEXT = b"XML:com.adobe.xmp\0\0\0\0\0"


def exif_of(entries: int) -> bytes:
    """Return EXIF data with this number of entries, each with the orientation 6."""
    return b"MM\0*" + struct.pack(">IH", 8, entries) + struct.pack(">HHII", 0x0112, 4, 1, 6) * entries + bytes(4)


def raw_profile(exif: bytes) -> bytes:
    """Return a compressed text with EXIF data as ImageMagick writes it."""
    return chunk(b"zTXt", EXIF_TEXT + zlib.compress(b"\nexif\n%d\n" % len(exif) + exif.hex().encode()))


HOSTILE = {
    "100,000 scans": (with_scans(100_000), LARGE, "parts", "a JPEG file of 1000.. scans; the limit is 64"),
    "80,000 chunks": (with_chunks(chunk(b"abCd", b"") * 80_000), SIDE, "parts", "more than 64 small chunks, the limit"),
    "250,000 segments": (with_segments(b"\xff\xfe\0\2" * 250_000), SIDE, "parts", "more than 64 small segments"),
    "5,000 segments of a kilobyte": (
        with_segments(segment(0xFE, bytes(1022)) * 5000), SIDE, "parts", "more than 1024 segments, the limit",
    ),
    "a megabyte of filling bytes": (with_segments(b"\xff" * 1_000_000), SIDE, "parts", "more than 64 small segments"),
    "5,000 entries": (
        with_chunks(chunk(b"eXIf", exif_of(5000))), SIDE, "parts", "with 5000 entries of EXIF; the limit is 64",
    ),
    "5,000 entries in a text": (with_chunks(raw_profile(exif_of(5000))), SIDE, "parts", "5000 entries of EXIF"),
    "5,000 entries of a JPEG file": (
        with_segments(b"\xff\xe1" + struct.pack(">H", 60022) + b"Exif\0\0" + exif_of(5000)), SIDE, "parts", "5000 entr",
    ),
    "a large EXIF": (
        with_chunks(chunk(b"eXIf", exif_of(1) + bytes(70_000))), SIDE, "parts", "bytes of EXIF; the limit is 65533",
    ),
    "an EXIF in two segments": (
        with_segments((b"\xff\xe1" + struct.pack(">H", 60000) + b"Exif\0\0" + exif_of(1) + bytes(59966)) * 2),
        SIDE, "parts", "bytes of EXIF; the limit is 65533",
    ),
    "an EXIF in a text that inflates to 200 MB": (
        with_chunks(chunk(b"zTXt", EXIF_TEXT + inflating(bytes(2**20), 200))), SIDE, "damaged", "damaged or cut off",
    ),
    "EXIF in texts that inflate to 15 MB": (
        with_chunks(chunk(b"zTXt", EXIF_TEXT + zlib.compress(bytes(2**18 - 1), 9)) * 60), SIDE, "damaged", "damaged",
    ),
    "a wide orientation text of 2 MB": (
        with_chunks(chunk(b"iTXt", XMP_TEXT + b"a" * 2**21 + "\U0001f600".encode())), SIDE, "parts",
        "with 2097178 bytes of texts with an orientation; the limit is 262144 bytes",
    ),
    "an EXIF of 3 MB that is a text": (
        with_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + b"\n" * 3 * 2**20)), SIDE, "parts",
        "bytes of texts with an orientation; the limit",
    ),
    "a packed text of 6 MB that is empty": (
        with_chunks(chunk(b"zTXt", EXIF_TEXT + empty_zlib(6 * 2**20))), SIDE, "parts", "6291.* bytes of texts with an",
    ),
    "a packed XMP of 6 MB that is empty": (
        with_chunks(chunk(b"iTXt", XMP_TEXT.replace(b"\0\0", b"\0\1", 1) + empty_zlib(6 * 2**20))), SIDE, "parts",
        "bytes of texts with an orientation; the limit is 262144",
    ),
    "60 orientation texts of 100 KB": (
        with_chunks(chunk(b"iTXt", XMP_TEXT + b"\xff" * 100_000) * 60), SIDE, "parts", "with 300066 bytes of texts",
    ),
    "colour profiles that inflate to 256 KB each": (
        with_chunks(chunk(b"iCCP", b"C\0\0" + zlib.compress(bytes(2**18 - 1), 9)) * 60), SIDE, "parts",
        "with several chunks iCCP; expected one at most",
    ),
    "many frames of many components": (
        with_segments(segment(0xC0, struct.pack(">BHHB", 8, SIDE, SIDE, 200) + bytes(65_400)) * 100), SIDE, "damaged",
        "damaged or cut off",
    ),
    "two frames": (
        with_segments(segment(0xC0, struct.pack(">BHHB", 8, SIDE, SIDE, 1) + b"\1\x11\0")), SIDE, "damaged", "damaged",
    ),
    "a frame of two components": (
        with_segments(segment(0xC0, struct.pack(">BHHB", 8, SIDE, SIDE, 2) + b"\1\x11\0" * 2)), SIDE,
        "damaged", "damaged or cut off",
    ),
    "two megabytes of tables": (
        with_segments(segment(0xDB, (b"\0" + bytes(64)) * 1000) * 32), SIDE, "parts", "more than 65536 bytes of tables",
    ),
    "a second header": (
        with_chunks(chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))), SIDE, "size",
        "a PNG image of 30000 x 30000 pixels; expected 28 x 28",
    ),
    "eight megabytes": (
        with_chunks(chunk(b"abCd", bytes(MAX_IMAGE_BYTES))), SIDE, "bytes", r"8388608 bytes \(max_image_bytes"
    ),
    "no image": (b"GIF89a" + bytes(100), SIDE, "format", "106 bytes that are neither a PNG nor a JPEG file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_cause_before_it_costs_much(name: str) -> None:
    limit_metadata()  # the server's process does this at its start
    data, side, cause, message = HOSTILE[name]
    begin = time.thread_time()
    with pytest.raises(RefusedImage, match=f"^images\\[3\\]: .*{message}") as caught:
        from_encoded(data, (1, side, side), "images[3]")
    assert time.thread_time() - begin < MAX_CPU_SECONDS
    assert caught.value.cause == cause
    assert cause in IMAGE_CAUSES


def test_a_hostile_file_takes_little_memory() -> None:
    limit_metadata()
    for data, side, *_ in HOSTILE.values():
        tracemalloc.start()
        with pytest.raises(InvalidRequest):
            from_encoded(data, (1, side, side), "f")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 2**20


UNREAD = {
    "a profile that inflates to 256 MB": chunk(b"iCCP", b"C\0\0" + inflating(bytes(2**20), 256)),
    "texts that inflate to 15 MB": chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(2**18 - 1), 9)) * 60,
    "a text of 300 KB": chunk(b"tEXt", b"workflow\0" + b"x" * 300_000),
    "a compressed text of 300 KB": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 300_000)),
    "a text in UTF-8 that inflates to 2 MB": chunk(b"iTXt", b"n\0\1\0\0\0" + zlib.compress(b"x" * 2**21)),
    "a text that is cut off": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 300_000)[:20]),
}


@pytest.mark.parametrize("name", UNREAD)
def test_texts_and_profiles_that_nothing_reads_are_not_unpacked(name: str) -> None:
    limit_metadata()
    data = with_chunks(UNREAD[name])
    begin = time.thread_time()
    tracemalloc.start()
    pixels = from_encoded(data, (1, SIDE, SIDE), "f")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (pixels[0] == np.asarray(RAMP)).all()
    assert (time.thread_time() - begin < MAX_CPU_SECONDS, peak < 4 * 2**20) == (True, True)


@pytest.mark.parametrize(
    "text",
    [raw_profile(exif_of(1)), chunk(b"iTXt", XMP_TEXT + b'<x:xmpmeta tiff:Orientation="6"/>')],
    ids=["EXIF", "XMP"],
)
def test_an_orientation_in_a_text_is_obeyed(text: bytes) -> None:
    for unread in (b"", UNREAD["a compressed text of 300 KB"]):
        [pixels] = from_encoded(with_chunks(unread + text), (1, SIDE, SIDE), "f")
        assert (pixels == np.asarray(RAMP.transpose(Image.Transpose.ROTATE_270))).all()


def test_pixels_beyond_the_image_are_not_inflated() -> None:
    data = encode(RAMP, "PNG")
    inflated = zlib.decompress(data[data.index(b"IDAT") + 4 : -16])
    squeeze = zlib.compressobj(9)
    more = squeeze.compress(inflated) + squeeze.compress(bytes(2**19)) + squeeze.flush()
    begin = time.thread_time()
    bomb = data[:PNG_HEAD_BYTES] + chunk(b"IDAT", more) + chunk(b"IEND", b"")
    assert (from_encoded(bomb, (1, SIDE, SIDE), "f")[0] == np.asarray(RAMP)).all()
    assert time.thread_time() - begin < MAX_CPU_SECONDS


def test_files_within_the_limits_are_decoded() -> None:
    shape = (1, SIDE, SIDE)
    expected = np.asarray(RAMP)
    for chunks in (
        chunk(b"abCd", b"") * 61,
        chunk(b"abCd", bytes(1024)) * 900,
        chunk(b"eXIf", b""),
        chunk(b"eXIf", exif_of(0)),
    ):
        assert (from_encoded(with_chunks(chunks), shape, "f")[0] == expected).all()
    for chunks in (chunk(b"eXIf", exif_of(64)), raw_profile(exif_of(64)), raw_profile(b"Exif\0\0" + exif_of(20))):
        assert (from_encoded(with_chunks(chunks), shape, "f")[0] == np.rot90(expected, -1)).all()
    more = 64 - progressive().count(b"\xff\xda")
    assert from_encoded(with_scans(more + 1, SIDE), shape, "f").shape == shape


def test_an_interlaced_file_and_the_default_image_of_an_animation_are_decoded() -> None:
    frames = [Image.new("L", (SIDE, SIDE), value) for value in range(20)]
    animated = encode(RAMP, "PNG", save_all=True, append_images=frames, default_image=True)
    assert (from_encoded(animated, (1, SIDE, SIDE), "f")[0] == np.asarray(RAMP)).all()
    # Adam7 with the pixels of a uniform image: each pass has rows of one filter byte and equal pixels.
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(
        (b"\0" + b"\x37" * len(range(x, SIDE, across))) * len(range(y, SIDE, down)) for x, y, across, down in passes
    )
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 1)
    interlaced = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert (from_encoded(interlaced, (1, SIDE, SIDE), "f") == 0x37).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_header_of_a_file_is_read_and_any_cut_of_it_is_refused_or_read(kind: str) -> None:
    data = encode(Image.new("RGB", (40, 30)), kind)
    assert read_header(data)[:3] == (kind, 40, 30)
    for length in range(len(data)):
        try:
            header = read_header(data[:length])
        except ValueError:
            continue
        assert header[:3] == (kind, 40, 30)


def test_the_bytes_of_a_file_that_are_no_pixels_are_counted() -> None:
    image = Image.new("RGB", (40, 30))
    exif = Image.Exif()
    exif[0x010E] = "x" * 1000
    for kind in ("PNG", "JPEG"):
        plain, more = (read_header(encode(image, kind, exif=one)) for one in (Image.Exif(), exif))
        assert 1000 < more.other_bytes - plain.other_bytes < 1200
        assert plain.other_bytes < 1000
    for chunks in (b"", chunk(b"tEXt", b"workflow\0" + bytes(1000))):
        assert read_header(with_chunks(chunks)).other_bytes == 13, "IHDR's"


XMP = b"http://ns.adobe.com/xap/1.0/\0"
#: Segments of a JPEG file that nothing reads, or that a later one of the same kind replaces.
UNREAD_SEGMENTS = {
    "colour profile": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(60_000)) * 2,
    "comments": segment(0xFE, bytes(60_000)) * 2,
    "previews": segment(0xED, b"Photoshop 3.0\0" + bytes(60_000)) + segment(0xE0, b"JFXX\0" + bytes(60_000)),
    "own data": segment(0xE9, bytes(65_533)) * 100,
    "own data in many segments": segment(0xE9, bytes(1022)) * 1000,
    "orientations that do not count": segment(0xE1, XMP + b'tiff:Orientation="8"' + bytes(60_000)) * 2,
    "colours that do not count": segment(0xEE, b"Adobe\0d\0\0\0\0\0" + bytes(60_000)) * 2,
}


@pytest.mark.parametrize("name", UNREAD_SEGMENTS)
def test_segments_that_nothing_reads_are_left_out(name: str) -> None:
    colours = Image.merge("RGB", [RAMP, RAMP.transpose(Image.Transpose.FLIP_LEFT_RIGHT), RAMP])
    oriented = segment(0xE1, XMP + b'tiff:Orientation="6"') + segment(0xEE, b"Adobe\0d\0\0\0\0\1")
    plain = encode(colours, "JPEG", quality=95)
    plain = plain[:2] + oriented + plain[2:]
    data = plain[:2] + UNREAD_SEGMENTS[name] + plain[2:]
    kept = without_unread_parts(data)
    assert len(kept) < len(plain) + 62_000
    assert read_header(data) == read_header(plain)._replace(
        other_bytes=read_header(plain).other_bytes + len(kept) - len(plain), copied=True
    )
    shape = (3, SIDE, SIDE)
    expected = from_encoded(plain, shape, "f")
    turned = from_encoded(encode(colours, "JPEG", quality=95), shape, "f").transpose(0, 2, 1)[:, :, ::-1]
    assert np.array_equal(expected, turned), "the orientation is obeyed"
    assert np.array_equal(from_encoded(data, shape, "f"), expected)


@pytest.mark.parametrize(
    ("read", "skipped"),
    [
        (segment(0xEE, b"Adobe\0d\0\0\0\0\0"), segment(0xEE, b"Adobe_X")),
        (segment(0xEE, b"Adobe\0d\0\0\0\0\0"), segment(0xEE, b"Adobe_CM\0")),
        (segment(0xE1, XMP + b'tiff:Orientation="6"'), segment(0xE1, b"http://ns.adobe.com/xap/1.0")),
    ],
)
def test_a_segment_that_a_decoder_skips_replaces_none_that_it_reads(read: bytes, skipped: bytes) -> None:
    colours = Image.merge("RGB", [RAMP, RAMP.transpose(Image.Transpose.FLIP_LEFT_RIGHT), RAMP])
    data = encode(colours, "JPEG", quality=95)
    without = data[:2] + data[20:]  # without JFIF, which would decide on the colours
    shape = (3, SIDE, SIDE)
    expected = from_encoded(without[:2] + read + without[2:], shape, "f")
    assert not np.array_equal(expected, from_encoded(without, shape, "f"))
    more = read + skipped + segment(0xFE, bytes(60_000)) * 2
    assert np.array_equal(from_encoded(without[:2] + more + without[2:], shape, "f"), expected)


def test_few_unread_bytes_of_a_jpeg_file_stay_in_it_and_so_does_a_damaged_file() -> None:
    data = encode(RAMP, "JPEG")
    few = data[:2] + segment(0xFE, bytes(60_000)) + data[2:]
    assert without_unread_parts(few) is few
    cut = data[:2] + segment(0xFE, bytes(60_000)) * 2 + b"\0" + data[2:]
    assert without_unread_parts(cut) is cut
    with pytest.raises(BadImage):
        read_header(cut)


def test_pixels_that_take_many_more_bytes_packed_than_not_are_refused() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0))

    def file(packed: bytes) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")

    rows = bytes((1 + SIDE) * SIDE)
    for level in range(10):
        assert from_encoded(file(zlib.compress(rows, level)), (1, SIDE, SIDE), "f").shape == (1, SIDE, SIDE)
    with pytest.raises(RefusedImage, match="packed bytes, which are many more than its pixels take") as caught:
        from_encoded(file(empty_zlib(10_000) + b"\1"), (1, SIDE, SIDE), "f")
    assert caught.value.cause == "parts"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (33, 77)])
def test_pixels_that_cannot_be_packed_are_no_more_than_a_file_may_have(mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, size[::-1], np.uint16)
    image = Image.fromarray(noise) if mode == "I;16" else Image.fromarray(noise.astype(np.uint8)).convert(mode)
    for level in (0, 9):
        assert read_header(encode(image, "PNG", compress_level=level))[1:3] == size


def test_the_memory_of_a_decoding_counts_its_images_and_the_work_on_one() -> None:
    assert decoding_bytes((3, 10, 20), images=7) == 10 * 20 * (7 * 3 + 32)
