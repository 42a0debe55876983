"""Headers of PNG and JPEG files, read before any pixel is decompressed and without Pillow.

A file of a megabyte can hold 100,000 tiny parts, each of which costs Pillow more than a large one. So the parts are
counted first.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

#: The largest file by default. A phone's photograph of 12 million pixels has 2 to 6 MB.
MAX_IMAGE_BYTES = 2**23
#: The most small chunks of a PNG file, and the most small segments before the pixels of a JPEG file. A part of more
#: bytes than these costs Pillow less than the bytes themselves.
MAX_SMALL_PARTS = 64
SMALL_PART_BYTES = 1024
#: The most scans of a JPEG file. Each one goes over the whole image again; encoders write about ten.
MAX_SCANS = 64
#: The largest EXIF data, which is as much as one segment of a JPEG file holds, and the most entries in its first
#: directory. Cameras write about twenty.
MAX_EXIF_BYTES = 65533
MAX_EXIF_ENTRIES = 64
#: The most bytes of the texts with an orientation in a PNG file, as they are in the file and unpacked. Pillow makes a
#: string of each, and one character beyond Unicode's first plane makes all of its characters take four bytes.
MAX_TEXT_BYTES = 2**18

FORMAT, DAMAGED, BYTES, SIZE, PARTS, MEMORY, TIMEOUT = (
    "format",
    "damaged",
    "bytes",
    "size",
    "parts",
    "memory",
    "timeout",
)
#: The causes for which an image is not decoded: it is neither PNG nor JPEG; it is damaged; it has too many bytes; it
#: has another size than the model's images, or is too large to be prepared; it has too many parts; it takes too much
#: memory; it takes too long.
IMAGE_CAUSES = (FORMAT, DAMAGED, BYTES, SIZE, PARTS, MEMORY, TIMEOUT)

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_CHUNK_HEAD = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_UNIQUE = frozenset((b"iCCP", b"eXIf"))  # chunks that Pillow unpacks or parses each time
# The texts from which Pillow takes the orientation; nothing here reads others, nor colour profiles.
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))
_PNG_SIZE = struct.Struct(">IIBB")  # the width, the height, the bits of a sample, and the kind of colours
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by kind of colours (PNG, 11.2.1)
# A packer adds at most a thousandth to pixels, and more to few of them. Blocks of its format that give no pixel could
# take a second of a processor otherwise.
_MORE_PACKED_BYTES = 1024
# Of a segment: its length, the precision, the height, the width and the number of components.
_JPEG_SIZE = struct.Struct(">HxHHB")
_COMPONENT_BYTES = 3  # after it: the number of each, its sampling factors and its table
_COMPONENTS = (1, 3, 4)  # that Pillow decodes
_EXIF = b"Exif\0\0"
# The second of each is wrong, and some cameras write it.
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {
    b"II*\0": "little", b"II\0*": "little", b"MM\0*": "big", b"MM*\0": "big",
}  # fmt: skip
_SCAN_MARKER = b"\xff\xda"
_SCAN, _END = 0xDA, 0xD9
_APPLICATION_1, _COMMENT = 0xE1, 0xFE
_APPLICATIONS = frozenset(range(0xE0, 0xF0))
# The applications' segments that a decoder reads besides EXIF, the last one of each kind: how they begin, and the least
# length of those that count. Two are for the colours (libjpeg, jdmarker.c), XMP is for the orientation.
_READ_SEGMENTS = {
    0xE0: (b"JFIF\0", 16),
    _APPLICATION_1: (b"http://ns.adobe.com/xap/1.0/\0", 2),
    0xEE: (b"Adobe", 14),
}
# Tables of quantization and of Huffman's and arithmetic codes. Pillow reads each, and a file has twelve at most.
_TABLES = frozenset((0xC4, 0xCC, 0xDB))
_MAX_TABLE_BYTES = 2**16
# Fewer unread bytes stay in a JPEG file, since leaving them out takes a copy of all others.
_FEW_UNREAD_BYTES = 2**16
# Start of frame: 0xC0 to 0xCF without those of tables, of extensions and of arithmetic coding's conditions.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# The frames of lossless and hierarchical files cannot be decoded at a reduced size.
_PROGRESSIVE_FRAMES = frozenset((0xC2, 0xCA))
_DECODED_FRAMES = _PROGRESSIVE_FRAMES | {0xC0, 0xC1, 0xC9}
# A marker after a scan's data, without those that restart it.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_FIRST_SEGMENT = 0xC0  # the markers below it have no length
_MAX_SEGMENTS = 1024
# Other segments up to the first scan: tables, restart interval, comment and applications' data. Each has a length.
_SEGMENTS = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, _COMMENT, _SCAN} | _APPLICATIONS


class BadImage(ValueError):
    """A file is not decoded. The text says why, for the client. cause: one of ``IMAGE_CAUSES``."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class ImageHeader(NamedTuple):
    """The format of an image file, ``PNG`` or ``JPEG``, and its size in pixels.

    coefficients: those of a JPEG file of several scans, all of which a decoder keeps; 0 for other files. other_bytes:
    those of the file's parts that are neither pixels nor left out by ``without_unread_parts``. copied: True if the file
    may be copied without these.
    """

    format: str
    width: int
    height: int
    coefficients: int = 0
    other_bytes: int = 0
    copied: bool = False


def read_header(data: bytes) -> ImageHeader:
    """Return the header of a PNG or JPEG file. Raises BadImage, also if the file has more parts than the limits."""
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(_JPEG):
        return _read_jpeg(data)
    raise BadImage(FORMAT, f"{len(data)} bytes that are neither a PNG nor a JPEG file")


def without_unread_parts(data: bytes) -> bytes:
    """Return a file without its colour profile and the texts, comments and previews that nothing here reads.

    Pillow copies and unpacks them all, and refuses a PNG file if they are large. A file without them is returned as it
    is, and so is a JPEG file that has few such bytes or damaged segments.
    """
    unread: list[tuple[int, int]] = []
    if data.startswith(_PNG):
        unread = _unread_chunks(data)
    elif data.startswith(_JPEG):
        with suppress(BadImage):
            unread = _unread_segments(data, list(_segments(data)))
    if not unread:
        return data
    view, begin, kept = memoryview(data), 0, list[memoryview]()
    for first, last in unread:
        kept.append(view[begin:first])
        begin = last
    return b"".join([*kept, view[begin:]])


def _unread_chunks(data: bytes) -> list[tuple[int, int]]:
    """Return the begin and end of each chunk of a PNG file that is left out."""
    unread, position = [], len(_PNG)
    while position + _CHUNK_HEAD.size <= len(data):
        length, kind = _CHUNK_HEAD.unpack_from(data, position)
        end = position + _CHUNK_HEAD.size + length + _CHECKSUM_BYTES
        if _is_unread_chunk(data, kind, position):
            unread.append((position, end))
        if kind == b"IEND":
            break
        position = end
    return unread


def _is_unread_chunk(data: bytes, kind: bytes, position: int) -> bool:
    return kind in _TEXTS and not data.startswith(_ORIENTATION_TEXTS, position + _CHUNK_HEAD.size)


def _unread_segments(data: bytes, segments: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Return the begin and end of each segment of a JPEG file that is left out, in their order.

    segments: from ``_segments``.
    """
    unread: list[tuple[int, int]] = []
    latest: dict[int, tuple[int, int]] = {}
    for marker, begin, end in segments:
        if marker == _APPLICATION_1 and data.startswith(_EXIF, begin + 4):
            continue
        first, least = _READ_SEGMENTS.get(marker, (b"", 0))
        if first and end - begin - 2 >= least and data.startswith(first, begin + 4):
            if marker in latest:
                unread.append(latest[marker])
            latest[marker] = begin, end
        elif marker == _COMMENT or marker in _APPLICATIONS:
            unread.append((begin, end))
    return sorted(unread) if sum(end - begin for begin, end in unread) > _FEW_UNREAD_BYTES else []


def check_exif(name: str, exif: bytes) -> None:
    """Check the size of EXIF data (TIFF 6.0, section 2). name: the format of its file. Raises BadImage.

    The data may be wrong in other ways.
    """
    if len(exif) > MAX_EXIF_BYTES:
        raise BadImage(PARTS, f"a {name} file with {len(exif)} bytes of EXIF; the limit is {MAX_EXIF_BYTES} bytes")
    exif = exif.removeprefix(_EXIF).removeprefix(_EXIF)
    if not exif:
        return
    if (order := _BYTE_ORDERS.get(exif[:4])) is None:
        raise BadImage(DAMAGED, f"a {name} file whose EXIF is damaged or cut off")
    directory = int.from_bytes(exif[4:8], order)
    if (entries := int.from_bytes(exif[directory : directory + 2], order)) > MAX_EXIF_ENTRIES:
        raise BadImage(PARTS, f"a {name} file with {entries} entries of EXIF; the limit is {MAX_EXIF_ENTRIES}")


def check_scans(data: bytes, limit: int = MAX_SCANS, of_size: str = "") -> None:
    """Check the number of scans of a JPEG file, whose header has been read. of_size: the end of the error's text.

    Raises BadImage.
    """
    # What cameras add after the image, such as a film, may contain these bytes by chance.
    if (scans := data.count(_SCAN_MARKER)) > limit and _has_more_scans(data, limit):
        raise BadImage(PARTS, f"a JPEG file of {scans} scans; the limit is {limit}{of_size}")


def _has_more_scans(data: bytes, limit: int) -> bool:
    """Return True if a JPEG file's first image has more scans, or segments beyond all use (JPEG, B.1.1.2)."""
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, position)
        if not match or (marker := data[match.end() - 1]) == _END:
            return False
        position = match.end()
        scans += marker == _SCAN
        if scans > limit:
            break
        if marker >= _FIRST_SEGMENT:
            position += int.from_bytes(data[position : position + 2])
    return True


def damaged(name: str, data: bytes) -> BadImage:
    """Return the error of a file that cannot be decoded."""
    return BadImage(DAMAGED, f"a {name} file of {len(data)} bytes that is damaged or cut off")


def _read_png(data: bytes) -> ImageHeader:
    """Read the chunk IHDR, which must be the first, and go over the heads of the others (PNG, 5.3 and 11.2)."""
    begin = len(_PNG) + _CHUNK_HEAD.size
    if data[len(_PNG) + 4 : begin] != b"IHDR" or len(data) < begin + _PNG_SIZE.size:
        raise damaged("PNG", data)
    width, height, depth, colours = _PNG_SIZE.unpack_from(data, begin)
    position, small, other_bytes, pixel_bytes, text_bytes = len(_PNG), 0, 0, 0, 0
    seen = set()
    while position + _CHUNK_HEAD.size <= len(data):
        length, kind = _CHUNK_HEAD.unpack_from(data, position)
        small += length < SMALL_PART_BYTES
        if small > MAX_SMALL_PARTS:
            raise BadImage(PARTS, f"a PNG file of more than {MAX_SMALL_PARTS} small chunks, the limit")
        if kind in _UNIQUE and kind in seen:
            raise BadImage(PARTS, f"a PNG file with several chunks {kind.decode()}; expected one at most")
        seen.add(kind)
        if kind == b"IDAT":
            pixel_bytes += length
        elif not _is_unread_chunk(data, kind, position):
            other_bytes += min(length, len(data) - position)
            if kind in _TEXTS and (text_bytes := text_bytes + length) > MAX_TEXT_BYTES:
                text = f"a PNG file with {text_bytes} bytes of texts with an orientation; the limit is {MAX_TEXT_BYTES}"
                raise BadImage(PARTS, f"{text} bytes")
        if kind == b"eXIf":
            begin = position + _CHUNK_HEAD.size
            check_exif("PNG", data[begin : begin + length])
        if kind == b"IEND":
            break
        position += _CHUNK_HEAD.size + length + _CHECKSUM_BYTES
    row_bytes = 1 + (width * _SAMPLES.get(colours, 4) * depth + 7) // 8
    if pixel_bytes > height * (row_bytes + row_bytes // 8 + 4) + _MORE_PACKED_BYTES:  # an interlaced file has more rows
        raise BadImage(PARTS, f"a PNG file of {pixel_bytes} packed bytes, which are many more than its pixels take")
    return ImageHeader("PNG", width, height, other_bytes=other_bytes, copied=True)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, begin and end of each segment of a JPEG file, up to that of its first scan (JPEG, B.1.1.4).

    Raises BadImage if one of them is damaged, or if there are more than the limit.
    """
    position, small = 2, 0
    for _ in range(_MAX_SEGMENTS):
        if small > MAX_SMALL_PARTS:
            raise BadImage(PARTS, f"a JPEG file of more than {MAX_SMALL_PARTS} small segments, the limit")
        if position + 5 > len(data) or data[position] != 0xFF:
            raise damaged("JPEG", data)
        marker = data[position + 1]
        if marker == 0xFF:  # a byte that fills up
            position += 1
            small += 1
            continue
        if marker not in _SEGMENTS:
            raise damaged("JPEG", data)
        length = int.from_bytes(data[position + 2 : position + 4])
        yield marker, position, position + 2 + length
        if marker == _SCAN:
            return
        position += 2 + length
        small += length < SMALL_PART_BYTES
    raise BadImage(PARTS, f"a JPEG file of more than {_MAX_SEGMENTS} segments, the limit")


def _read_jpeg(data: bytes) -> ImageHeader:
    """Go over the segments before the first scan (JPEG, B.2.2)."""
    header: ImageHeader | None = None
    exif = b""  # Pillow reads all such segments as one
    components, progressive, table_bytes = 0, False, 0
    segments = []
    for marker, begin, end in _segments(data):
        segments.append((marker, begin, end))
        if marker == _APPLICATION_1 and data.startswith(_EXIF, begin + 4):
            exif += data[begin + 4 + len(_EXIF) : end]
            check_exif("JPEG", exif)
        if marker in _TABLES and (table_bytes := table_bytes + end - begin) > _MAX_TABLE_BYTES:
            raise BadImage(PARTS, f"a JPEG file of more than {_MAX_TABLE_BYTES} bytes of tables, the limit")
        if marker in _FRAMES:
            if marker not in _DECODED_FRAMES:
                raise BadImage(FORMAT, f"a JPEG file of {len(data)} bytes that is lossless or hierarchical")
            if header or begin + 2 + _JPEG_SIZE.size > len(data):
                raise damaged("JPEG", data)
            length, height, width, components = _JPEG_SIZE.unpack_from(data, begin + 2)
            if components not in _COMPONENTS or length != _JPEG_SIZE.size + _COMPONENT_BYTES * components:
                raise damaged("JPEG", data)
            sampling = data[begin + 2 + _JPEG_SIZE.size + 1 : end : _COMPONENT_BYTES]
            header = ImageHeader("JPEG", width, height, _coefficients(width, height, sampling))
            progressive = marker in _PROGRESSIVE_FRAMES
    if header is None:
        raise damaged("JPEG", data)
    scan = segments[-1][1]
    in_one_scan = not progressive and data[scan + 4] == components
    unread = _unread_segments(data, segments)
    return header._replace(
        coefficients=0 if in_one_scan else header.coefficients,
        other_bytes=scan - sum(end - begin for begin, end in unread),
        copied=bool(unread),
    )


def _coefficients(width: int, height: int, sampling: bytes) -> int:
    """Return the number of coefficients of a JPEG image. sampling: of each component, its factors (JPEG, A.1.1)."""
    factors = [(one >> 4, one & 15) for one in sampling]
    across, down = (max(1, *several) for several in zip(*factors, strict=True)) if factors else (1, 1)
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    return 64 * units * sum(horizontal * vertical for horizontal, vertical in factors)
