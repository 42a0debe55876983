"""Tests of the readers of CIFAR-10's archive, SVHN's MATLAB files and smallNORB's matrices."""

import gzip
import io
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data import archives
from training.data.archives import (
    CIFAR_ARCHIVE,
    NORB_TEST_IMAGES,
    NORB_TEST_LABELS,
    NORB_TRAIN_IMAGES,
    NORB_TRAIN_LABELS,
    SVHN_TEST,
    SVHN_TRAIN,
    read_cifar10,
    read_matlab,
    read_smallnorb,
    read_svhn,
)
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


BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54


def norb(values: NDArray[Any], magic: int) -> bytes:
    """Return a file as smallNORB's. Its header has three sizes at least."""
    sizes = (*values.shape, 1, 1)[: max(3, values.ndim)]
    return gzip.compress(struct.pack(f"<II{len(sizes)}I", magic, values.ndim, *sizes) + values.tobytes())


def norb_files(pairs: NDArray[np.uint8], labels: list[int]) -> dict[str, bytes]:
    """Return smallNORB's files: the pairs to train on, and the first one for the test."""
    categories = np.array(labels, "<i4")
    return {
        NORB_TRAIN_IMAGES: norb(pairs, BYTES),
        NORB_TRAIN_LABELS: norb(categories, INTEGERS),
        NORB_TEST_IMAGES: norb(pairs[:1], BYTES),
        NORB_TEST_LABELS: norb(categories[:1], INTEGERS),
    }


def test_smallnorb_is_the_left_image_of_each_pair_at_half_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_NORB_PART", 2)  # three pairs take two parts
    pairs = DRAWN.integers(0, 256, (3, 2, 96, 96)).astype(np.uint8)
    (images, labels), (test, test_labels) = read_smallnorb(norb_files(pairs, [4, 0, 2]))
    assert images.shape == (3, 1, 48, 48) and test.shape == (1, 1, 48, 48)
    assert images[2, 0, 5, 7] == round(pairs[2, 0, 10:12, 14:16].mean())
    np.testing.assert_array_equal(test, images[:1])
    assert labels.tolist() == [4, 0, 2] and test_labels.tolist() == [4]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (norb(np.zeros((2, 2, 4, 4), np.uint8), INTEGERS), "begins with 0x1e3d4c54 and 4 axes"),
        (norb(np.zeros((2, 4, 4), np.uint8), BYTES), "begins with 0x1e3d4c55 and 3 axes; expected .* with 4"),
        (gzip.compress(norb(np.zeros((2, 2, 4, 4), np.uint8), BYTES)), "begins with"),
        (gzip.compress(gzip.decompress(norb(np.zeros((2, 2, 4, 4), np.uint8), BYTES))[:-5]), "ends 5 bytes too early"),
        (norb(DRAWN.integers(0, 256, (2, 2, 4, 4)).astype(np.uint8), BYTES)[:-40], "a damaged gzip file"),
        (b"<html>", "a damaged gzip file"),
    ],
)
def test_a_file_that_is_no_whole_matrix_of_smallnorb_is_refused(content: bytes, text: str) -> None:
    files = norb_files(np.zeros((1, 2, 4, 4), np.uint8), [1])
    with pytest.raises(ValueError, match=text):
        read_smallnorb(files | {NORB_TRAIN_IMAGES: content})


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("svhn", 10), ("smallnorb", 5)])
def test_the_files_of_other_data_sets_have_digests_and_the_classes_have_labels(name: str, classes: int) -> None:
    spec = DATASETS[name]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in spec.digests.values())
    assert len(set(spec.labels)) == classes
