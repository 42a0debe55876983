"""Tests of requests of raw pixels, read from bytes directly and through protobuf messages."""

import math

import numpy as np
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.services.capsnet_codec import PixelReader

SHAPES = [(1, 28, 28), (1, 2, 2), (3, 8, 8), (1, 12, 12), (2, 100, 100)]
MAX_IMAGES = 70


def request(shape: tuple[int, int, int], count: int) -> pb.ClassifyRequest:
    random = np.random.default_rng(count)
    return pb.ClassifyRequest(images=[pb.Image(pixels=random.bytes(math.prod(shape))) for _ in range(count)])


def of_stream(identifier: str, message: pb.ClassifyRequest) -> bytes:
    return pb.ClassifyStreamRequest(id=identifier, request=message).SerializeToString()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 16, MAX_IMAGES])
def test_the_images_are_those_that_protobuf_reads(shape: tuple[int, int, int], count: int) -> None:
    message, reader = request(shape, count), PixelReader(shape, MAX_IMAGES)
    expected = np.stack([np.frombuffer(image.pixels, np.uint8).reshape(shape) for image in message.images])
    images = reader.read(message.SerializeToString())
    assert images is not None and images.flags.c_contiguous
    np.testing.assert_array_equal(images, expected)
    for identifier in ("", "7", "é" * 20, "x" * 127):
        read = reader.read_of_stream(of_stream(identifier, message))
        assert read and read[0] == identifier and read[1].flags.c_contiguous
        np.testing.assert_array_equal(read[1], expected)


def test_every_other_request_is_left_to_protobuf() -> None:
    shape = SHAPES[0]
    reader = PixelReader(shape, MAX_IMAGES)
    others = [
        pb.ClassifyRequest(),
        request(shape, MAX_IMAGES + 1),
        request((1, 28, 27), 1),
        request((1, 28, 56), 1),
        pb.ClassifyRequest(model_name="mnist", images=request(shape, 1).images),
        pb.ClassifyRequest(model_version="1", images=request(shape, 1).images),
        pb.ClassifyRequest(images=[pb.Image(encoded=bytes(784))]),
        pb.ClassifyRequest(images=[*request(shape, 2).images, pb.Image(encoded=bytes(784))]),
        pb.ClassifyRequest(images=[pb.Image(encoded=bytes(784)), *request(shape, 2).images]),
        pb.ClassifyRequest(images=[pb.Image()]),
    ]
    for message in others:
        assert reader.read(message.SerializeToString()) is None
        assert reader.read_of_stream(of_stream("", message)) is None
        assert reader.read_of_stream(of_stream("7", message)) is None
    assert reader.read_of_stream(of_stream("x" * 128, request(shape, 1))) is None
    assert reader.read_of_stream(b"") is None


@pytest.mark.parametrize("count", [1, 2])
def test_truncated_or_changed_bytes_are_read_as_protobuf_reads_them(count: int) -> None:
    shape = (1, 2, 2)
    reader, random = PixelReader(shape, MAX_IMAGES), np.random.default_rng(0)
    whole = of_stream("ab", request(shape, count))
    inner = request(shape, count).SerializeToString()
    for data in [whole[:end] for end in range(len(whole))]:
        assert reader.read_of_stream(data) is None
    for data in [inner[:end] for end in range(len(inner)) if end % (len(inner) // count)]:
        assert reader.read(data) is None
    for _ in range(5000):
        changed = bytearray(whole)
        for place in random.integers(0, len(changed), random.integers(1, 4)):
            changed[place] = random.choice(np.array([0x08, 0x0A, 0x12, 0x1A, 0x80, 0xFF, random.integers(256)]))
        if (read := reader.read_of_stream(bytes(changed))) is None:
            continue
        message = pb.ClassifyStreamRequest.FromString(bytes(changed))
        assert message.id == read[0] and not message.request.model_name and not message.request.model_version
        assert [image.pixels for image in message.request.images] == [image.tobytes() for image in read[1]]
