"""Tests of the readers of CIFAR-10's archive and of SVHN's MATLAB files."""

import io
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data import archives
from training.data.archives import CIFAR_ARCHIVE, SVHN_TEST, SVHN_TRAIN, read_cifar10, read_matlab, read_svhn
from training.data.specs import DATASETS

DRAWN = np.random.default_rng(1)


def archive(parts: dict[str, bytes]) -> dict[str, bytes]:
    """Return CIFAR-10's file with these parts."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in parts.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {CIFAR_ARCHIVE: packed.getvalue()}


def element(kind: int, data: bytes) -> bytes:
    """Return an element of a MATLAB file, padded to 8 bytes."""
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name: str, values: NDArray[Any], kind: int) -> bytes:
    """Return a compressed matrix; its name is a small element."""
    short = struct.pack("<HH4s", 1, len(name), name.encode())
    content = element(6, struct.pack("<II", 9, 0)) + element(5, np.array(values.shape, "<i4").tobytes()) + short
    packed = zlib.compress(element(14, content + element(kind, values.tobytes(order="F"))))
    return struct.pack("<II", 15, len(packed)) + packed


def matlab(images: NDArray[np.uint8], labels: list[int]) -> bytes:
    """Return a file as SVHN's: images (N, C, H, W) and labels from 1 to 10."""
    column = np.array(labels, np.uint8)[:, None]
    return bytes(124) + b"\x00\x01IM" + matrix("X", images.transpose(2, 3, 1, 0), 2) + matrix("y", column, 2)


def test_cifar_records_are_a_label_and_the_pixels_of_three_channels() -> None:
    records = DRAWN.integers(0, 10, (6, 2, 3073)).astype(np.uint8)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    (images, labels), (test_images, test_labels) = read_cifar10(
        archive({name: part.tobytes() for name, part in zip(names, records, strict=True)})
    )
    assert images.shape == (10, 3, 32, 32) and test_images.shape == (2, 3, 32, 32)
    assert labels.tolist() == records[:5, :, 0].ravel().tolist()
    assert test_labels.tolist() == records[5, :, 0].tolist()
    assert images[3, 1, 2, 5] == records[1, 1, 1 + 1024 + 2 * 32 + 5]


def test_a_part_of_cifar_that_is_cut_off_is_refused() -> None:
    parts = {name: bytes(3073) for name in archives._CIFAR_PARTS} | {"data_batch_2.bin": bytes(3072)}
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 3072 bytes"):
        read_cifar10(archive(parts))


def test_svhn_is_read_from_its_matlab_files_and_the_label_10_is_the_digit_0() -> None:
    images = DRAWN.integers(0, 256, (3, 3, 32, 32)).astype(np.uint8)
    (read, labels), (test, test_labels) = read_svhn(
        {SVHN_TRAIN: matlab(images, [10, 1, 9]), SVHN_TEST: matlab(images[:1], [2])}
    )
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(test, images[:1])
    assert labels.tolist() == [0, 1, 9] and test_labels.tolist() == [2]


def test_a_file_that_is_no_whole_matlab_file_is_refused() -> None:
    whole = matlab(DRAWN.integers(0, 256, (1, 3, 32, 32)).astype(np.uint8), [1])
    with pytest.raises(ValueError, match="not a MATLAB file"):
        read_matlab(b"<html>")
    for length in (200, len(whole) - 3):
        with pytest.raises(ValueError, match="damaged"):
            read_matlab(whole[:length])


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_the_files_of_data_sets_in_colour_have_digests_and_ten_labels(name: str) -> None:
    spec = DATASETS[name]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in spec.digests.values())
    assert len(set(spec.labels)) == 10
