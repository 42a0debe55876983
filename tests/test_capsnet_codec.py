"""Tests of requests and answers as bytes, read and written directly and through protobuf messages."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Calibration, find, load
from serving.batching.ticket import Share
from serving.repository.findings import CODES, Code, Findings
from serving.runtime import Arrays
from serving.services.capsnet_codec import RECONSTRUCTION_ERRORS, AnswerWriter, PixelReader
from tests.conftest import ROOT

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


LABELS = ("ankle boot", "bag", "cat", "é", "dog")
MODEL = replace(
    load(find(ROOT / "models", "capsnet-mnist")), labels=LABELS, pose_size=3, calibration=None, image_shape=(1, 2, 2)
)
CALIBRATION = Calibration(temperature=0.1, presence=(0.5, 0.5, 0.5, 0.5, 0.8), margin=0.2)


def outputs(count: int) -> Arrays:
    """Return outputs of images whose findings have every kind."""
    random = np.random.default_rng(count)
    probabilities = random.random((count, len(LABELS)), np.float32) ** 2
    return {"probabilities": probabilities, "poses": random.normal(size=(count, len(LABELS), 3)).astype(np.float32)}


def written(arrays: Arrays, labels: Sequence[str] = LABELS) -> pb.ClassifyResponse:
    """Return the answer with protobuf's own classes."""
    response = pb.ClassifyResponse(model_name=MODEL.name, model_version=MODEL.version)
    for index, lengths in enumerate(np.asarray(arrays["probabilities"], np.float32)):
        winner = int(lengths.argmax())
        result = response.results.add(label=labels[winner], class_index=winner)
        for place, label in enumerate(labels):
            result.capsules.add(label=label, probability=lengths[place], pose=arrays["poses"][index, place].tolist())
        if CODES in arrays:
            for place, confidence in enumerate(arrays["confidences"][index].tolist()):
                result.capsules[place].confidence = confidence
            result.confidence = result.capsules[winner].confidence
            order = sorted(range(len(labels)), key=lambda place: -lengths[place])
            result.present.extend(labels[place] for place in order if arrays["present"][index, place])
            verdict: pb.Verdict = Code.of(int(arrays[CODES][index])).verdict.value  # type: ignore[assignment]  # a number
            result.verdict = verdict
        if RECONSTRUCTION_ERRORS in arrays:
            result.reconstruction_error = arrays[RECONSTRUCTION_ERRORS][index]
    return response


@pytest.mark.parametrize("errors", [False, True], ids=["", "errors"])
@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["plain", "calibrated"])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_answers_are_the_bytes_that_protobuf_writes(count: int, calibration: Calibration | None, errors: bool) -> None:
    arrays = dict(outputs(count))
    images = np.random.default_rng(0).integers(0, 2, (count, 1, 2, 2), np.uint8)
    if calibration:
        arrays |= Findings(calibration, len(LABELS))(images, arrays["probabilities"])
    if errors:
        arrays[RECONSTRUCTION_ERRORS] = np.linspace(0, 1, count, dtype=np.float32)
    write = AnswerWriter(replace(MODEL, calibration=calibration))
    for _ in range(2):
        assert write(Share(arrays, 0, count)) == written(arrays).SerializeToString()
    part = {name: array[count // 2 :] for name, array in arrays.items()}
    assert write(Share(arrays, count // 2, count)) == written(part).SerializeToString()
    if calibration and count == 200:
        assert {one.verdict for one in written(arrays).results} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["plain", "calibrated"])
def test_the_requests_of_several_batches_get_the_bytes_of_their_own_images(calibration: Calibration | None) -> None:
    images = np.random.default_rng(0).integers(0, 2, (5, 1, 2, 2), np.uint8)
    write = AnswerWriter(replace(MODEL, calibration=calibration))
    batches: list[Arrays] = []
    for _ in range(2):
        arrays = {name: np.roll(array, len(batches), 0) for name, array in outputs(5).items()}
        found = Findings(calibration, 5)(images, arrays["probabilities"]) if calibration else {}
        batches.append({**arrays, **found})
    for begin, end in ((0, 1), (1, 3), (3, 5)):
        for batch in batches:
            part = {name: array[begin:end] for name, array in batch.items()}
            assert write(Share(batch, begin, end)) == written(part).SerializeToString()


def test_a_writer_keeps_no_array_of_a_batch() -> None:
    write, arrays = AnswerWriter(MODEL), outputs(2)
    assert write(Share(arrays, 0, 2))
    kept = [weakref.ref(array) for array in arrays.values()]
    del arrays
    assert [reference() for reference in kept] == [None, None]


def test_one_classification_is_written_as_a_field_of_another_message() -> None:
    arrays = dict(outputs(1))
    response = pb.ReconstructResponse.FromString(AnswerWriter(MODEL).field(7, Share(arrays, 0, 1)))
    assert response.classification == written(arrays).results[0]
