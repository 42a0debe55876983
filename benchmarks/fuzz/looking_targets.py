"""The readers of requests that look inside a network, and of HTTP's bodies, before a model of made-up numbers.

Axes: B images, J classes, E dimensions of a pose, R iterations, I primary capsules.
"""

import base64
import json
import logging
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast
from urllib.parse import parse_qsl

import numpy as np
from google.protobuf.message import Message

from benchmarks.fuzz.request_targets import check_text, encoded_file
from benchmarks.fuzz.target import Parts, Target
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact, Calibration, Graph, Preparation, ReceptiveField, Tensor, Training
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.repository.findings import Findings
from serving.repository.further_graph import AGREEMENTS, CONTRIBUTIONS, COUPLINGS, IMAGE, PRIMARY_LENGTHS
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge
from serving.runtime import Arrays, rows
from serving.services.capsnet import CapsNetService
from serving.services.capsnet_codec import CapsNetCodec
from serving.services.computed import ComputedQuery
from serving.services.decoding import Decoding, in_one_go
from serving.services.explanations import Explanations
from serving.services.graphs import DECODER, EXPLAIN
from serving.services.open_inference import InferenceService
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.reconstructions import Reconstructions
from serving.services.request import Query
from serving.settings import Settings
from serving.tensorrt_options import BatchProfile
from serving.web.forms import MULTIPART
from serving.web.incoming import BYTES, JSON, BodyLimits, Incoming
from serving.web.problems import Problem
from serving.web.routes import ROUTES, Body, Route
from serving.web.tensors import HEADER_LENGTH

_SHAPE = _, _HEIGHT, _WIDTH = (1, 4, 4)
_CLASSES, _POSE, _ITERATIONS, _PRIMARY = 3, 2, 2, 4
_EXPLAINED: dict[str, tuple[int, ...]] = {
    COUPLINGS: (_ITERATIONS, _CLASSES, _PRIMARY), AGREEMENTS: (_ITERATIONS, _CLASSES, _PRIMARY),
    CONTRIBUTIONS: (_CLASSES, _PRIMARY), PRIMARY_LENGTHS: (_PRIMARY,),
}  # fmt: skip
_CLASSIFIED: dict[str, tuple[int, ...]] = {PROBABILITIES: (_CLASSES,), POSES: (_CLASSES, _POSE)}
_OUTPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    CLASSIFY: _CLASSIFIED,
    EXPLAIN: _CLASSIFIED | _EXPLAINED,
    DECODER: {IMAGE: _SHAPE},
}
_ARTIFACT = Artifact(
    folder=Path(),
    name="m",
    version="1",
    labels=("a", "b", "c"),
    image_shape=_SHAPE,
    pose_size=_POSE,
    files={},
    variants={},
    graphs={
        EXPLAIN: Graph(
            "explain.onnx",
            receptive_field=ReceptiveField("type-row-column", 1, 2, 2, 2),
            outputs={name: Tensor("float32", shape) for name, shape in _OUTPUTS[EXPLAIN].items()},
        ),
        DECODER: Graph("decoder.onnx", outputs={IMAGE: Tensor("float32", _SHAPE)}),
    },
    batches=BatchProfile(1, 1, 1),
    training=Training("none"),
    preparation=Preparation("bright-on-dark", 3, True),
    calibration=Calibration(0.1, (0.5, 0.5, 0.5), 0.1, 0.2),
)
_SETTINGS = Settings(max_images_per_request=8, max_explained_images=4, max_picture_pixels=2**14, max_image_bytes=2**14)
#: The routes with a body, in their order.
_ROUTES = [route for route in ROUTES if route.body in (Body.PICTURES, Body.TENSORS)]
_MEDIA = (JSON, f"{MULTIPART}; boundary=edge", "image/png", BYTES, "text/plain", "")
_CALL = cast(Call, None)  # which the services only hand on


class _Model:
    """A model whose graphs answer made-up numbers, the same ones for the same number of rows."""

    artifact, settings = _ARTIFACT, _SETTINGS

    def __init__(self) -> None:
        calibration = _ARTIFACT.calibration
        assert calibration
        self._findings = Findings(calibration, _CLASSES)

    def compute(self, name: str, arrays: Arrays) -> Share:
        """Return the outputs of a graph."""
        size = rows(arrays)
        random = np.random.default_rng(size)
        outputs: Arrays = {one: random.random((size, *shape), np.float32) for one, shape in _OUTPUTS[name].items()}
        if name == CLASSIFY:
            outputs = {**outputs, **self._findings(arrays[IMAGES], outputs[PROBABILITIES])}
        return Share(outputs, 0, size)


class _Computation:
    """The computation of a call, which ends at once."""

    patient = urgent = False

    def __init__(self, model: _Model) -> None:
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def limit(self, timeout: float | None) -> None:
        assert timeout is None or timeout > 0

    async def decode(self, decoding: Decoding) -> Arrays:
        assert decoding.bytes >= 0
        return in_one_go(decoding.steps)

    async def run(self, name: str, arrays: Arrays, *, probe: bool = False) -> Share:
        return self.model.compute(name, arrays)


class _Pipeline:
    """A pipeline that answers at once. answer: the bytes of the latest answer."""

    def __init__(self) -> None:
        self.model = _Model()
        self.repository = SimpleNamespace(default=self.model)
        self.answer = b""

    def computation(self, model_name: str, model_version: str, caller: object) -> _Computation:
        return _Computation(self.model)

    def begin(self, query: Query | ComputedQuery, call: Call) -> None:
        model = cast(ServedModel, self.model)
        if isinstance(query, ComputedQuery):
            self.answer = _result(query.answer(cast(Any, _Computation(self.model))))
            return
        arrays = in_one_go(query.decode_slowly(model).steps) if query.slow else query.decode(model)
        images = arrays[IMAGES]
        assert images.dtype == np.uint8 and images.shape[1:] == _SHAPE
        assert 1 <= len(images) <= _SETTINGS.max_images_per_request
        self.answer = query.encode(model, self.model.compute(CLASSIFY, arrays))


class _Services:
    """The methods, by their paths: functions of a request's bytes that return the answer's."""

    def __init__(self) -> None:
        metrics, self._pipeline = Metrics(), _Pipeline()
        pipeline, edge = cast(Pipeline, self._pipeline), Edge(metrics)
        classify = CapsNetService(pipeline, edge, metrics, _SETTINGS).classify
        infer = InferenceService(pipeline, edge, metrics, _SETTINGS).model_infer
        codecs = PerModel(lambda model: CapsNetCodec(model.artifact, _SETTINGS.max_images_per_request))
        explain = Explanations(pipeline, _SETTINGS, codecs).explain
        reconstruct = Reconstructions(pipeline, _SETTINGS, codecs).reconstruct
        self.methods: dict[str, Callable[[bytes], bytes]] = {
            "Classify": lambda data: self._begun(classify, data),
            "Explain": lambda data: _result(explain(data, _CALL)),
            "Reconstruct": lambda data: _result(reconstruct(data, _CALL)),
            "ModelInfer": lambda data: self._begun(infer, data),
        }

    def _begun(self, method: Callable[[bytes, Call], None], data: bytes) -> bytes:
        method(data, _CALL)
        return self._pipeline.answer


def _result(coroutine: Coroutine[None, None, bytes]) -> bytes:
    """Return the result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast(bytes, stop.value)
    raise AssertionError("a coroutine waits")


@cache
def _services() -> _Services:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as in the server
    return _Services()


def run_looked(data: bytes) -> None:
    """Read a ClassifyRequest, an ExplainRequest or a ReconstructRequest, and answer it."""
    parts = Parts(data)
    name = ("Classify", "Explain", "Reconstruct")[parts.number() % 3]
    body = parts.rest()
    try:
        answer = _services().methods[name](body)
    except InvalidRequest as error:
        check_text(error)
        return
    if name == "Classify":
        classified = pb.ClassifyResponse.FromString(answer)
        assert len(classified.results) == len(pb.ClassifyRequest.FromString(body).images)
        for result in classified.results:
            assert abs(sum(one.confidence for one in result.capsules) - 1) < 1e-5 and result.verdict
    elif name == "Explain":
        asked, explained = pb.ExplainRequest.FromString(body), pb.ExplainResponse.FromString(answer)
        assert len(explained.results) == len(asked.images)
        for explanation in explained.results:
            assert len(explanation.classes) == (len(asked.classes) or 1)
            assert len(explanation.pixels) == _HEIGHT * _WIDTH
    else:
        given, drawn = pb.ReconstructRequest.FromString(body), pb.ReconstructResponse.FromString(answer)
        steps = given.sweep.steps if given.HasField("sweep") else 1
        poses = len(given.poses.poses) or len(given.classes)
        assert len(drawn.results) == poses * steps or (not poses and drawn.results)


def run_web(data: bytes) -> None:
    """Read a body of HTTP with its parameters, answer it, and write the answer."""
    parts = Parts(data)
    route, media = _ROUTES[parts.number() % len(_ROUTES)], _MEDIA[parts.number() % len(_MEDIA)]
    query = parse_qsl(parts.take(parts.number()).decode("latin-1"), keep_blank_values=True)
    length = int.from_bytes(parts.take(2))
    headers = {"content-type": media, "accept": JSON if length % 2 else "image/png"}
    if length and route.body is Body.TENSORS:
        headers[HEADER_LENGTH] = str(length)
    limits = BodyLimits(_SETTINGS.max_images_per_request, _SETTINGS.max_image_bytes)
    place = dict.fromkeys(route.places, "1")
    try:
        prepared = route.prepare(Incoming(place, query, headers, parts.rest(), limits))
        message = prepared.message.SerializeToString()
        reply = prepared.write(_services().methods[route.method.rpartition("/")[2]](message))
    except InvalidRequest as error:
        check_text(error)
        return
    except Problem as problem:
        assert 400 <= problem.status < 500 and len(problem.detail) < 1000
        assert json.loads(problem.body(with_error=True))["detail"] == problem.detail
        return
    assert reply.status == 200
    if reply.media == JSON:
        assert isinstance(json.loads(reply.body), dict)


def _seeds_of_looked() -> list[bytes]:
    pixels, file = pb.Image(pixels=bytes(range(_HEIGHT * _WIDTH))), pb.Image(encoded=encoded_file(_SHAPE, "PNG"))
    photo = pb.Image(encoded=encoded_file((3, 40, 30), "JPEG"), preprocess=pb.PREPROCESS_AUTO)
    change, sweep = pb.Change(dimension=1, delta=0.5), pb.Sweep(dimension=0, first=-1, last=1, steps=2)
    pose = pb.ClassPose(class_index=1, pose=[0.5, -0.25])
    requests: list[list[Message]] = [
        [
            pb.ClassifyRequest(images=[pixels, photo], reconstruction_error=True),
            pb.ClassifyRequest(images=[photo, file]),
        ],
        [
            pb.ExplainRequest(images=[pixels, file], classes=[2, 0], parts=[pb.EXPLANATION_PART_ROUTING]),
            pb.ExplainRequest(images=[photo]),
        ],
        [
            pb.ReconstructRequest(image=pixels, classes=[0, 1], changes=[change]),
            pb.ReconstructRequest(image=photo, format=pb.FORMAT_PNG),
            pb.ReconstructRequest(poses=pb.Poses(poses=[pose, pose]), sweep=sweep),
        ],
    ]
    return [bytes((place,)) + one.SerializeToString() for place, messages in enumerate(requests) for one in messages]


def _web(route: Route, media: str, query: bytes, body: bytes, length: int = 0) -> bytes:
    head = bytes((_ROUTES.index(route), _MEDIA.index(media), len(query)))
    return head + query + length.to_bytes(2) + body


def _seeds_of_web() -> list[bytes]:
    file, edge = encoded_file((3, 12, 9), "PNG"), b'--edge\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    form = edge % (b"image", file) + edge % (b"preprocess", b"auto") + b"--edge--\r\n"
    seeds: list[bytes] = []
    for route in (one for one in _ROUTES if one.body is Body.PICTURES):
        seeds += [
            _web(route, _MEDIA[1], b"", form),
            _web(route, "image/png", b"preprocess=auto", file, 1),
        ]
    classify, explain, reconstruct = (one for one in _ROUTES if one.body is Body.PICTURES)
    many = edge % (b"image", bytes(16)) * 2 + edge % (b"parts", b"routing,relevance") + b"--edge--\r\n"
    poses = b'{"poses": {"poses": [{"class_index": 1, "pose": [0.5, 1]}]}, "sweep": {"steps": 3, "last": 1}}'
    seeds += [
        _web(classify, JSON, b"", b'{"images": [{"pixels": "AAECAwQFBgcICQoLDA0ODw=="}], "model_name": "m"}', 1),
        _web(explain, _MEDIA[1], b"classes=1,2", many, 1),
        _web(reconstruct, BYTES, b"changes=1:0.5&sweep=0:-1:1:3&format=png&classes=0,1", bytes(range(16))),
        _web(reconstruct, JSON, b"", poses, 1),
    ]
    infer = next(one for one in _ROUTES if one.body is Body.TENSORS)
    tensor = b'{"inputs":[{"name":"images","datatype":"%s","shape":[%s],%s}]%s}'
    outputs = b',"outputs":[{"name":"relevance","parameters":{"binary_data":true}},{"name":"reconstruction"}]'
    size = b'"parameters":{"binary_data_size":%d%s}'
    numbers = b'"data":[[0,1,2,3],%s]' % b",".join([b"[4,5,6,7]"] * 3)
    raw = len(file).to_bytes(4, "little") + file
    encoded = b'"data":["%s"],"parameters":{"content_type":"base64"}' % base64.b64encode(encoded_file(_SHAPE, "PNG"))
    headers = [
        tensor % (b"UINT8", b"1,1,4,4", numbers, b""),
        tensor % (b"UINT8", b"1,1,4,4", size % (16, b""), outputs),
        tensor % (b"BYTES", b"1", size % (len(raw), b',"preprocess":"auto"'), b',"parameters":{"class":1}'),
        tensor % (b"BYTES", b"1", encoded, b',"id":"7"'),
    ]
    data = (b"", bytes(range(16)), raw, b"")
    return seeds + [_web(infer, BYTES, b"", one + more, len(one)) for one, more in zip(headers, data, strict=True)]


TARGETS = (Target("looked", run_looked, _seeds_of_looked), Target("web", run_web, _seeds_of_web))
