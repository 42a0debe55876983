"""Readers of data sets in colour: CIFAR-10's archive and SVHN's MATLAB files, to arrays.

Axes: N images, C H W of an image.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
SVHN_TRAIN, SVHN_TEST = "train_32x32.mat", "test_32x32.mat"

_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_PARTS = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_CIFAR_SHAPE = (3, 32, 32)

# The numbers of MATLAB's element types (MAT-File Format, version 5, table 1-1), and the types of those with data.
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_HEADER_BYTES = 128

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
