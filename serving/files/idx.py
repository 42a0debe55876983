"""The IDX file format, in which MNIST and the data sets modelled on it are distributed.

An IDX file is two zero bytes, a byte for the element type, a byte for the number of dimensions, the size of each
dimension as a big-endian 32-bit unsigned integer, and then the elements in row-major order.
"""

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

GZIP_MAGIC = b"\x1f\x8b"
MAX_DECOMPRESSED_BYTES = 2**30

_ELEMENT_TYPES = frozenset({0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E})
_UNSIGNED_BYTE = 0x08
_MAX_DIMENSIONS = 4


def is_idx(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` looks like an uncompressed IDX file of any element type.

    Only the first four bytes count. Fewer than four bytes are never IDX.
    """
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _ELEMENT_TYPES and head[3] > 0


def read_idx(data: bytes) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes, gzipped or not.

    Returns a new array of the shape in the file's header, with one to four dimensions.

    Raises:
        ValueError: ``data`` is not an IDX file, holds other elements than unsigned bytes, has more than four
            dimensions, or is shorter or longer than its header says; or :func:`decompress` refuses it.
    """
    raw = decompress(data)
    shape = _parse_shape(raw)
    size = _file_size(shape)
    if len(raw) < size:
        raise ValueError(f"truncated IDX file: {len(raw)} bytes of the {size} that shape {shape} takes")
    if len(raw) > size:
        raise ValueError(f"trailing bytes in an IDX file: {len(raw)} bytes, expected {size} for shape {shape}")
    return np.frombuffer(raw, dtype=np.uint8)[_header_size(len(shape)) :].reshape(shape).copy()


def decompress(data: bytes) -> bytes:
    """Gunzip an IDX file of unsigned bytes. Data that is not gzipped is returned unchanged and unchecked.

    At most the bytes that the IDX header announces are decompressed, whatever the compressed stream holds.

    Raises:
        ValueError: ``data`` is gzipped and corrupt or incomplete, does not contain an IDX file that :func:`read_idx`
            reads, announces more than ``MAX_DECOMPRESSED_BYTES``, or holds more bytes than it announces.
    """
    if not data.startswith(GZIP_MAGIC):
        return data
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        head = stream.decompress(data, _header_size(_MAX_DIMENSIONS))
        shape = _parse_shape(head)
        size = _file_size(shape)
        if size > MAX_DECOMPRESSED_BYTES:
            raise ValueError(
                f"gzipped IDX file of shape {shape} takes {size} bytes, expected at most {MAX_DECOMPRESSED_BYTES}"
            )
        # One byte more than announced, to detect a longer stream. For zlib, 0 would mean no limit.
        raw = head + stream.decompress(stream.unconsumed_tail, max(size + 1 - len(head), 1))
    except zlib.error as error:
        raise ValueError(f"corrupt gzip stream: {error}") from error
    if len(raw) > size:
        raise ValueError(f"trailing bytes in a gzipped IDX file: expected {size} bytes for shape {shape}, got more")
    if not stream.eof:
        raise ValueError(f"truncated gzip stream: {len(raw)} bytes of the {size} that shape {shape} takes")
    if stream.unused_data:
        raise ValueError(f"{len(stream.unused_data)} trailing bytes after the gzip stream, expected none")
    return raw


def _parse_shape(data: bytes) -> tuple[int, ...]:
    if not is_idx(data):
        start = data[:4].hex(" ") or "nothing"
        raise ValueError(f"not an IDX file: begins with {start}, expected 00 00 08 and then 01 to 04")
    element_type, dimensions = data[2], data[3]
    if element_type != _UNSIGNED_BYTE:
        raise ValueError(f"IDX element type 0x{element_type:02x}, expected 0x{_UNSIGNED_BYTE:02x} (unsigned byte)")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"IDX file of {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    if len(data) < _header_size(dimensions):
        raise ValueError(f"truncated IDX header: {len(data)} bytes of {_header_size(dimensions)}")
    return struct.unpack_from(f">{dimensions}I", data, 4)


def _header_size(dimensions: int) -> int:
    return 4 + 4 * dimensions


def _file_size(shape: tuple[int, ...]) -> int:
    return _header_size(len(shape)) + math.prod(shape)
