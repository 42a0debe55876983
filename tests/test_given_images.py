"""Tests of requests of many files, whose headers would take the event loop long."""

from collections.abc import Callable
from pathlib import Path

import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference
from serving.artifact import Artifact, Training
from serving.files.image_headers import ImageHeader, read_header
from serving.services import encoded_images
from serving.services.decoding import Decoding, in_one_go
from serving.services.given_images import GivenImages
from serving.services.open_inference_codec import read_request
from serving.services.tensor_inputs import TensorReader
from serving.settings import Settings
from serving.tensorrt_options import BatchProfile
from tests.test_image_headers import SIDE, exif_of, segment, with_segments

FEW, MANY = 16, 100
FILE = with_segments(segment(0xE1, b"Exif\0\0" + exif_of(1)) * 50)
ARTIFACT = Artifact(
    folder=Path(),
    name="digits",
    version="1",
    labels=("0", "1"),
    image_shape=(1, SIDE, SIDE),
    pose_size=2,
    files={},
    variants={},
    graphs={},
    batches=BatchProfile(1, 1, 1),
    training=Training("digits"),
)


def classify(images: int) -> Decoding:
    """Return the decoding of a ClassifyRequest."""
    given = [pb.Image(encoded=FILE, preprocess=pb.PREPROCESS_AUTO)] * images
    return GivenImages(given, Settings()).decode_slowly(ARTIFACT)


def infer(images: int) -> Decoding:
    """Return the decoding of a ModelInferRequest."""
    request = inference.ModelInferRequest()
    tensor = request.inputs.add(name="images", datatype="BYTES", shape=[images])
    tensor.contents.bytes_contents.extend([FILE] * images)
    tensor.parameters["preprocess"].string_param = "auto"
    return TensorReader(ARTIFACT, Settings()).decoding(read_request(request.SerializeToString(), 2**24))


@pytest.mark.parametrize("make", [classify, infer])
def test_the_headers_of_many_files_are_left_to_a_thread(
    make: Callable[[int], Decoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = list[int]()

    def noted(data: bytes) -> ImageHeader:
        lengths.append(len(data))
        return read_header(data)

    monkeypatch.setattr(encoded_images, "read_header", noted)
    few = make(FEW)
    assert (few.measure, len(lengths)) == (None, FEW)
    many = make(MANY)
    assert (many.bytes, many.images, len(lengths)) == (0, MANY, FEW)
    assert many.measure
    assert [len(lengths) for _ in zip(range(3), many.measure, strict=False)] == [FEW + 1, FEW + 2, FEW + 3]
    assert in_one_go(many.measure) - few.bytes == (MANY - FEW) * SIDE * SIDE
    assert lengths == [len(FILE)] * (FEW + MANY)
    assert in_one_go(many.steps)["images"].shape == (MANY, 1, SIDE, SIDE)
