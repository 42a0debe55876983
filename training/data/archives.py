"""Readers of CIFAR-10's archive, SVHN's MATLAB files and smallNORB's matrices, to arrays.

Axes: N images, C H W of an image.
"""

import gzip
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
SVHN_TRAIN, SVHN_TEST = "train_32x32.mat", "test_32x32.mat"
_NORB_TRAIN, _NORB_TEST = "smallnorb-5x46789x9x18x6x2x96x96-training", "smallnorb-5x01235x9x18x6x2x96x96-testing"
NORB_TRAIN_IMAGES, NORB_TRAIN_LABELS = f"{_NORB_TRAIN}-dat.mat.gz", f"{_NORB_TRAIN}-cat.mat.gz"
NORB_TEST_IMAGES, NORB_TEST_LABELS = f"{_NORB_TEST}-dat.mat.gz", f"{_NORB_TEST}-cat.mat.gz"

_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_PARTS = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_CIFAR_SHAPE = (3, 32, 32)

# The numbers of MATLAB's element types (MAT-File Format, version 5, table 1-1), and the types of those with data.
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_HEADER_BYTES = 128

# smallNORB's matrices: the element types by the first number of the file. The header has the sizes of three axes at
# least. Images are read in parts, since all of a file take eight times as much memory as what is kept.
_NORB_TYPES = {0x1E3D4C55: "u1", 0x1E3D4C54: "<i4"}
_NORB_MIN_AXES = 3
_NORB_PART = 1024

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_cifar10(files: Mapping[str, bytes]) -> tuple[Labelled, Labelled]:
    """Return CIFAR-10's images (N, 3, 32, 32) and labels (N,), of training and test. Raises ValueError if damaged."""
    record = 1 + int(np.prod(_CIFAR_SHAPE))
    parts = []
    with tarfile.open(fileobj=io.BytesIO(files[CIFAR_ARCHIVE])) as archive:
        for name in _CIFAR_PARTS:
            member = archive.extractfile(f"{_CIFAR_FOLDER}/{name}")
            content = member.read() if member else b""
            if not content or len(content) % record:
                raise ValueError(f"{name} has {len(content)} bytes; expected a multiple of {record}")
            parts.append(np.frombuffer(content, np.uint8).reshape(-1, record))
    train, test = np.concatenate(parts[:-1]), parts[-1]
    return _of_records(train), _of_records(test)


def _of_records(records: NDArray[np.uint8]) -> Labelled:
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE).copy(), records[:, 0].astype(np.int64)


def read_svhn(files: Mapping[str, bytes]) -> tuple[Labelled, Labelled]:
    """Return SVHN's images (N, 3, 32, 32) and labels (N,), of training and test. Raises ValueError if damaged."""
    train, test = (read_matlab(files[name]) for name in (SVHN_TRAIN, SVHN_TEST))
    return _of_variables(train), _of_variables(test)


def _of_variables(variables: Mapping[str, NDArray[np.generic]]) -> Labelled:
    images = np.ascontiguousarray(variables["X"].transpose(3, 2, 0, 1)).astype(np.uint8)
    return images, variables["y"].reshape(-1).astype(np.int64) % 10  # the digit 0 has the label 10


def read_matlab(content: bytes) -> dict[str, NDArray[np.generic]]:
    """Return the numeric arrays of a MATLAB file of version 5, by name. Raises ValueError for another file."""
    if content[124:128] != b"\x00\x01IM":
        raise ValueError("not a MATLAB file of version 5 with the lowest byte first")
    variables = {}
    data, place = memoryview(content), _HEADER_BYTES
    try:
        while place < len(data):
            kind, size = struct.unpack_from("<II", data, place)
            element = data[place + 8 : place + 8 + size]
            place += 8 + size
            if kind == _COMPRESSED:
                element = memoryview(zlib.decompress(element))
                kind, size = struct.unpack_from("<II", element)
                element = element[8 : 8 + size]
            if kind == _MATRIX:
                name, values = _matrix(element)
                variables[name] = values
    except (struct.error, zlib.error, KeyError) as error:
        raise ValueError(f"a damaged MATLAB file, or one with other than numbers: {error}") from error
    return variables


def _matrix(element: memoryview) -> tuple[str, NDArray[np.generic]]:
    """Return the name and the values of a matrix, whose elements are flags, dimensions, name and real part."""
    place, parts = 0, []
    for _ in range(4):
        kind, size = struct.unpack_from("<II", element, place)
        if kind >> 16:  # a small element has its size and its data in the 8 bytes of the tag
            parts.append((kind & 0xFFFF, element[place + 4 : place + 4 + (kind >> 16)]))
            place += 8
        else:
            parts.append((kind, element[place + 8 : place + 8 + size]))
            place += 8 + (size + 7) // 8 * 8
    _, shape, name, (kind, values) = parts
    dimensions = np.frombuffer(shape[1], "<i4")
    return bytes(name[1]).decode("ascii"), np.frombuffer(values, _NUMBERS[kind]).reshape(dimensions, order="F")


def read_smallnorb(files: Mapping[str, bytes]) -> tuple[Labelled, Labelled]:
    """Return smallNORB's images (N, 1, 48, 48) and labels (N,), of training and test. Raises ValueError if damaged.

    An image is the left one of its stereo pair. Each pixel is the mean of four, as Sabour et al. halved the images.
    """
    return (
        (_left_images(files[NORB_TRAIN_IMAGES]), _labels(files[NORB_TRAIN_LABELS])),
        (_left_images(files[NORB_TEST_IMAGES]), _labels(files[NORB_TEST_LABELS])),
    )


def _left_images(content: bytes) -> NDArray[np.uint8]:
    """Return the left image of each pair (N, 2, H, W) at half its height and width."""
    with gzip.open(io.BytesIO(content)) as file:
        count, _, height, width = _matrix_head(file, "u1", 4)
        parts = []
        for start in range(0, count, _NORB_PART):
            shape = min(_NORB_PART, count - start), 2, height // 2, 2, width // 2, 2
            left = np.frombuffer(_all_of(file, math.prod(shape)), np.uint8).reshape(shape)[:, 0]
            parts.append(np.rint(left.mean((2, 4), dtype=np.float32)).astype(np.uint8))
    return np.concatenate(parts)[:, None]


def _labels(content: bytes) -> NDArray[np.int64]:
    with gzip.open(io.BytesIO(content)) as file:
        (count,) = _matrix_head(file, "<i4", 1)
        return np.frombuffer(_all_of(file, 4 * count), "<i4").astype(np.int64)


def _matrix_head(file: gzip.GzipFile, kind: str, axes: int) -> tuple[int, ...]:
    """Read the head of a matrix of smallNORB, and return its shape. Raises ValueError for other elements or axes."""
    magic, found = struct.unpack("<II", _all_of(file, 8))
    if _NORB_TYPES.get(magic) != kind or found != axes:
        raise ValueError(f"begins with {magic:#x} and {found} axes; expected a matrix of {kind} with {axes}")
    return struct.unpack(f"<{axes}I", _all_of(file, 4 * max(axes, _NORB_MIN_AXES))[: 4 * axes])


def _all_of(file: gzip.GzipFile, size: int) -> bytes:
    try:
        content = file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"a damaged gzip file: {error}") from error
    if len(content) < size:
        raise ValueError(f"ends {size - len(content)} bytes too early")
    return content
