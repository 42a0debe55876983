"""The readers of requests: the project's own messages, Triton's, and images."""

import io
import struct
import warnings
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image

from benchmarks.fuzz.target import Parts, Target
from protos.capsnet.v1 import capsnet_pb2
from protos.inference import inference_pb2
from serving.artifact import Artifact, Training
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.files.images import limit_metadata
from serving.metrics.registry import Metrics
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge
from serving.runtime import Array
from serving.services.capsnet import CapsNetService
from serving.services.capsnet_codec import PixelReader
from serving.services.computed import ComputedQuery
from serving.services.encoded_images import from_encoded
from serving.services.open_inference import InferenceService
from serving.services.pipeline import Pipeline
from serving.services.request import Query
from serving.services.stream import StreamQuery
from serving.settings import Settings
from serving.tensorrt_options import BatchProfile

_SHAPE = (1, 2, 3)  # of the images of requests, so that a whole one is small
_SHAPES = ((1, 28, 28), (3, 8, 8))  # of encoded images
_CLASSES, _POSE, _MAX_IMAGES = 2, 2, 8
_ARTIFACT = Artifact(
    folder=Path(),
    name="m",
    version="1",
    labels=("a", "b"),
    image_shape=_SHAPE,
    pose_size=_POSE,
    files={},
    variants={},
    graphs={},
    batches=BatchProfile(1, 1, 1),
    training=Training("none"),
)
_CALL = cast(Call, None)  # which the services only hand on


class _Model:
    """A model that answers zeros."""

    artifact = _ARTIFACT


class _Pipeline:
    """A pipeline that decodes a query, and encodes an answer to it. parse: of the latest stream."""

    def __init__(self) -> None:
        self.model = cast(ServedModel, _Model())
        self.repository = SimpleNamespace(default=self.model)
        self.parse: Callable[[bytes], StreamQuery] | None = None
        #: The images of the latest query, or None if it was refused.
        self.images: Array | None = None
        #: The answer's bytes.
        self.answer = b""

    def begin(self, query: Query | ComputedQuery, call: Call) -> None:
        self.images = None
        if isinstance(query, ComputedQuery):
            raise InvalidRequest("request", "takes graphs that the model lacks")
        images = query.decode(self.model)[IMAGES]
        assert images.dtype == np.uint8 and images.shape[1:] == _SHAPE and 1 <= len(images) <= _MAX_IMAGES
        outputs = {
            PROBABILITIES: np.zeros((len(images), _CLASSES), np.float32),
            POSES: np.zeros((len(images), _CLASSES, _POSE), np.float32),
        }
        self.answer = query.encode(self.model, Share(outputs, 0, len(images)))
        self.images = images

    def answer_stream(
        self, messages: object, parse: Callable[[bytes], StreamQuery], call: Call, refuse: object
    ) -> AsyncGenerator[bytes]:
        self.parse = parse
        return cast(AsyncGenerator[bytes], None)


class _Services:
    """The services whose messages are read."""

    def __init__(self) -> None:
        metrics = Metrics()
        self.pipeline = _Pipeline()
        pipeline, edge = cast(Pipeline, self.pipeline), Edge(metrics)
        settings = replace(Settings(), max_images_per_request=_MAX_IMAGES)
        self.classify = CapsNetService(pipeline, edge, metrics, settings)
        self.infer = InferenceService(pipeline, edge, metrics, settings)
        self.classify.classify_stream(cast(Any, None), _CALL)
        self._parse_classify = self.pipeline.parse
        self.infer.model_stream_infer(cast(Any, None), _CALL)
        self._parse_infer = self.pipeline.parse

    def streamed(self, data: bytes, infer: bool) -> None:
        """Read a request of a stream. Raises InvalidRequest."""
        parse = self._parse_infer if infer else self._parse_classify
        assert parse
        query = parse(data)  # raises nothing
        if query.error:
            assert query.encode_error(InvalidRequest.code, str(query.error))
            raise query.error
        self.pipeline.begin(query, _CALL)


@cache
def _services() -> _Services:
    return _Services()


def run_classify(data: bytes) -> None:
    """Read a ClassifyRequest, alone or of a stream."""
    services, parts = _services(), Parts(data)
    of_stream, body = parts.number() & 1, parts.rest()
    read = PixelReader(_SHAPE, _MAX_IMAGES).read_of_stream(body) if of_stream else None
    pixels = read[1] if read else None if of_stream else PixelReader(_SHAPE, _MAX_IMAGES).read(body)
    try:
        if of_stream:
            services.streamed(body, infer=False)
        else:
            services.classify.classify(body, _CALL)
    except InvalidRequest as error:
        check_text(error)
        assert pixels is None or not len(pixels)
        return
    if of_stream:
        message = capsnet_pb2.ClassifyStreamRequest.FromString(body)
        answer = capsnet_pb2.ClassifyStreamResponse.FromString(services.pipeline.answer)
        assert answer.id == message.id
        request, response = message.request, answer.response
    else:
        request = capsnet_pb2.ClassifyRequest.FromString(body)
        response = capsnet_pb2.ClassifyResponse.FromString(services.pipeline.answer)
    images = services.pipeline.images
    assert images is not None and len(response.results) == len(images) == len(request.images)
    for image, given in zip(images, request.images, strict=True):
        assert given.encoded or given.pixels == image.tobytes()
    if pixels is not None:  # without protobuf's classes, so they must find the same
        assert not request.model_name and [one.tobytes() for one in pixels] == [one.pixels for one in request.images]


def run_infer(data: bytes) -> None:
    """Read a ModelInferRequest, alone or of a stream."""
    services, parts = _services(), Parts(data)
    of_stream, body = parts.number() & 1, parts.rest()
    try:
        if of_stream:
            services.streamed(body, infer=True)
        else:
            services.infer.model_infer(body, _CALL)
    except InvalidRequest as error:
        check_text(error)
        return
    answer = services.pipeline.answer
    request = inference_pb2.ModelInferRequest.FromString(body)
    if of_stream:
        streamed = inference_pb2.ModelStreamInferResponse.FromString(answer)
        response = streamed.infer_response
    else:
        response = inference_pb2.ModelInferResponse.FromString(answer)
    images = services.pipeline.images
    assert response.id == request.id and images is not None
    in_contents = any(output.HasField("contents") for output in response.outputs)
    assert len(response.outputs) == (len(request.outputs) or 2)
    assert len(response.raw_output_contents) == (0 if in_contents else len(response.outputs))
    raw, tensor = request.raw_input_contents, request.inputs[0]
    if tensor.datatype == "UINT8":
        assert images.tobytes() == (raw[0] if raw else bytes(tensor.contents.uint_contents))
    elif tensor.datatype == "FP32":
        numbers = np.frombuffer(raw[0], "<f4") if raw else np.array(tensor.contents.fp32_contents, np.float32)
        factors = [1, 255] if numbers.max() <= 1 else [1]
        assert any((images.ravel() == np.rint(numbers * np.float32(factor))).all() for factor in factors)
    else:
        assert tensor.datatype == "BYTES"


def run_image(data: bytes) -> None:
    """Decode an image file of one of two sizes."""
    parts = Parts(data)
    shape = _SHAPES[parts.number() % len(_SHAPES)]
    limit_metadata()  # as the server's process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = from_encoded(parts.rest(), shape, "image")
    except InvalidRequest as error:
        check_text(error)
    else:
        assert pixels.shape == shape and pixels.dtype == np.uint8


def check_text(error: InvalidRequest) -> None:
    """Check that an error's text fits in a header, and that a client's text in it cannot harm a log."""
    assert len(str(error)) < 1000 and str(error).isprintable(), error


def _seeds_of_classify() -> list[bytes]:
    pixels = bytes(range(6))
    image = capsnet_pb2.Image(pixels=pixels)
    encoded = capsnet_pb2.Image(encoded=encoded_file(_SHAPE, "PNG"))
    requests = [
        capsnet_pb2.ClassifyRequest(images=[image]),
        capsnet_pb2.ClassifyRequest(images=[image] * 3),
        capsnet_pb2.ClassifyRequest(images=[image, encoded], model_name="m", model_version="1"),
    ]
    streamed = [capsnet_pb2.ClassifyStreamRequest(id="7", request=request) for request in requests]
    whole = [b"\0" + one.SerializeToString() for one in requests]
    return whole + [b"\1" + one.SerializeToString() for one in streamed]


def _seeds_of_infer() -> list[bytes]:
    tensor = inference_pb2.ModelInferRequest.InferInputTensor(name=IMAGES, datatype="UINT8", shape=[1, *_SHAPE])
    raw = inference_pb2.ModelInferRequest(model_name="m", id="7", inputs=[tensor], raw_input_contents=[bytes(6)])
    listed = inference_pb2.ModelInferRequest(inputs=[tensor])
    listed.inputs[0].contents.uint_contents.extend(range(6))
    chosen = inference_pb2.ModelInferRequest(inputs=[tensor], raw_input_contents=[bytes(6)])
    output = chosen.outputs.add(name=PROBABILITIES)
    output.parameters["classification"].int64_param = 1
    chosen.outputs.add(name=POSES)
    chosen.parameters["priority"].string_param = "1"
    chosen.parameters["timeout"].int64_param = 10
    floats = inference_pb2.ModelInferRequest(inputs=[tensor], raw_input_contents=[np.ones(6, "<f4").tobytes()])
    listed_floats = inference_pb2.ModelInferRequest(inputs=[tensor])
    listed_floats.inputs[0].contents.fp32_contents.extend([0, 1, 0.5, 254, 3, 100])
    listed_floats.inputs[0].parameters["pixel_max"].int64_param = 255
    files = inference_pb2.ModelInferRequest(inputs=[tensor])
    files.inputs[0].contents.bytes_contents.append(encoded_file(_SHAPE, "PNG"))
    raw_file = struct.pack("<I", len(encoded_file(_SHAPE, "PNG"))) + encoded_file(_SHAPE, "PNG")
    raw_files = inference_pb2.ModelInferRequest(inputs=[tensor], raw_input_contents=[raw_file])
    raw_files.parameters["binary_data_output"].bool_param = False
    for request, datatype in ((floats, "FP32"), (listed_floats, "FP32"), (files, "BYTES"), (raw_files, "BYTES")):
        request.inputs[0].datatype = datatype
        if datatype == "BYTES":
            request.inputs[0].shape[:] = [1]
    requests = (raw, listed, chosen, floats, listed_floats, files, raw_files)
    messages = [one.SerializeToString() for one in requests]
    return [bytes((mode,)) + message for message in messages for mode in (0, 1)]


def _seeds_of_images() -> list[bytes]:
    files = [b"\0" + encoded_file(_SHAPES[0], name) for name in ("PNG", "JPEG")]
    files += [b"\1" + encoded_file(_SHAPES[1], name) for name in ("PNG", "JPEG")]
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    turned, palette, progressive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    grey = Image.new("L", (28, 28), 100)
    grey.save(turned, "JPEG", exif=exif)
    grey.convert("P").save(palette, "PNG", transparency=0)
    grey.save(progressive, "JPEG", progressive=True)
    return files + [b"\0" + file.getvalue() for file in (turned, palette, progressive)]


def encoded_file(shape: tuple[int, int, int], kind: str) -> bytes:
    """Return an image file of a shape (C, H, W)."""
    channels, height, width = shape
    pixels = (np.arange(height * width * channels) * 7 % 256).astype(np.uint8).reshape(height, width, channels)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, kind)
    return file.getvalue()


TARGETS = (
    Target("classify", run_classify, _seeds_of_classify),
    Target("infer", run_infer, _seeds_of_infer),
    Target("image", run_image, _seeds_of_images),
)
