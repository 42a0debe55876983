"""Tests of a service on a graph that does not classify. It is added here; the engine needs no change."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from serving.artifact import Graph, Tensor, digest, find, load
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.further_graph import FurtherGraph
from serving.repository.repository import Repository
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge
from serving.runtime import Arrays, RuntimeSetupError, onnxruntime
from serving.services.decoding import Decoder, Decoding, in_one_step
from serving.services.pipeline import Pipeline
from serving.services.stream import StreamRefusals
from serving.transport.methods import Method, TransportLimits, table
from serving.transport.server import GrpcServer
from tests.conftest import ROOT, Digits, settings

SERVICE = "toy.v1.ExplainService"
EXPLAIN = "explain"
PATIENCE = 20.0


class ExplainQuery:
    """The pixels of one image, answered with its couplings (R, J, I) as float32; an empty message is an error."""

    model_name = model_version = ""
    graph = EXPLAIN
    size = 1
    timeout: float | None = None
    urgent = slow = False
    error: Exception | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def decode(self, model: ServedModel) -> Arrays:
        if not self._data:
            raise InvalidRequest("image", "empty; expected its pixels")
        return {"images": np.frombuffer(self._data, np.uint8).reshape(1, *model.artifact.image_shape)}

    def decode_slowly(self, model: ServedModel) -> Decoding:
        return Decoding(in_one_step(lambda: self.decode(model)), 0, "image")

    def encode(self, model: ServedModel, share: Share) -> bytes:
        return share["couplings"].tobytes()

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        return text.encode()


class ExplainService:
    """A service with two methods: Explain and its stream."""

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._edge = edge
        self._refuse = StreamRefusals(edge, metrics, SERVICE, "ExplainStream")

    def methods(self) -> dict[str, Method]:
        refusal = partial(self._pipeline.refusal, urgent=False, graph=EXPLAIN)
        return table(
            SERVICE,
            {
                "Explain": self._edge.unary_at_once(SERVICE, "Explain", self.explain, refusal),
                "ExplainStream": self._edge.stream(SERVICE, "ExplainStream", self.explain_stream),
            },
        )

    def explain(self, data: bytes, call: Call) -> None:
        self._pipeline.begin(ExplainQuery(data), call)

    def explain_stream(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        return self._pipeline.answer_stream(messages, ExplainQuery, call, self._refuse)


class Serving:
    """A server of the toy service, for its tests."""

    def __init__(self, repository: Repository, metrics: Metrics, channel: grpc.aio.Channel) -> None:
        self.model = repository.get("", "")
        self.metrics = metrics
        self.explain = channel.unary_unary(f"/{SERVICE}/Explain", bytes, bytes)
        self.explain_stream = channel.stream_stream(f"/{SERVICE}/ExplainStream", bytes, bytes)

    def value(self, name: str, graph: str) -> float | None:
        labels = {"model": "capsnet-mnist", "version": "1", "graph": graph}
        return self.metrics.registry.get_sample_value(name, labels)


def serve(test: Callable[[Serving], Coroutine[None, None, None]], graphs: set[str]) -> None:
    """Run a test against a server that opens these graphs."""

    async def run() -> None:
        chosen, metrics = settings(max_batch=4, runtimes=1), Metrics()
        edge = Edge(metrics)
        repository = Repository(chosen, metrics, graphs)
        await repository.open()
        server = GrpcServer(TransportLimits(2**20, "", 2**24, ""))
        service = ExplainService(
            Pipeline(repository, chosen.stream_window, Decoder(1, 2**20, 1.0, 64, refused=print)), edge, metrics
        )
        server.add_methods(service.methods())
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await test(Serving(repository, metrics, channel))
        finally:
            await server.stop(0)
            await repository.close()

    asyncio.run(run())


def expected(digits: Digits, count: int) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of ONNX Runtime alone for the first digits."""
    session = onnxruntime().InferenceSession(find(ROOT / "models", "capsnet-mnist") / "explain.onnx")
    names = ["probabilities", "couplings"]
    return dict(zip(names, session.run(names, {"images": digits.images[:count, None]}), strict=True))


def couplings(answer: bytes) -> NDArray[np.float32]:
    """Return the couplings (R, J, I) of an answer's bytes."""
    return np.frombuffer(answer, np.float32).reshape(3, 10, -1)


def test_a_digit_is_explained_by_a_graph_that_only_its_service_knows(digits: Digits) -> None:
    field = load(find(ROOT / "models", "capsnet-mnist")).graphs[EXPLAIN].receptive_field
    assert field

    async def test(serving: Serving) -> None:
        answer = couplings(await serving.explain(digits.images[0].tobytes(), timeout=PATIENCE))
        assert answer.shape == (3, 10, field.types * field.grid**2)
        np.testing.assert_allclose(answer.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(answer, expected(digits, 1)["couplings"][0], atol=1e-5, rtol=0)
        assert list(serving.model.graphs) == [CLASSIFY, EXPLAIN]
        assert serving.value("capsnet_batch_size_images_sum", EXPLAIN) == 1
        assert serving.value("capsnet_batch_size_images_sum", CLASSIFY) == 0
        assert serving.value("capsnet_decode_seconds_count", EXPLAIN) == 1
        assert serving.value("capsnet_winner_length_count", EXPLAIN) is None, "it classifies nothing"

    serve(test, {EXPLAIN})


def test_its_unary_calls_share_batches_and_its_streams_keep_their_order(digits: Digits) -> None:
    count = 24
    right = expected(digits, count)["couplings"]
    pixels = [digits.images[index].tobytes() for index in range(count)]

    async def test(serving: Serving) -> None:
        answers = await asyncio.gather(*(serving.explain(one, timeout=PATIENCE) for one in pixels))
        np.testing.assert_allclose([couplings(one) for one in answers], right, atol=1e-5, rtol=0)
        streamed = [one async for one in serving.explain_stream(iter([*pixels, b""]), timeout=PATIENCE)]
        assert streamed.pop() == b"image: empty; expected its pixels"
        np.testing.assert_allclose([couplings(one) for one in streamed], right, atol=1e-5, rtol=0)
        assert serving.value("capsnet_batch_size_images_sum", EXPLAIN) == 2 * count
        batches = serving.value("capsnet_batch_size_images_count", EXPLAIN)
        assert batches and batches < 2 * count

    serve(test, {EXPLAIN})


def test_its_errors_are_those_of_every_service(digits: Digits) -> None:
    async def test(serving: Serving) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.explain(b"", timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "image: empty; expected its pixels"

        def fail(arrays: Arrays) -> Arrays:
            raise RuntimeError("only the log may say this")

        serving.model.graphs[EXPLAIN].batcher._run = fail
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.explain(digits.images[0].tobytes(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "the model could not compute this request"
        assert serving.value("capsnet_inference_failures_total", EXPLAIN) == 1
        assert serving.value("capsnet_inference_failures_total", CLASSIFY) == 0

    serve(test, {EXPLAIN})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files that ONNX Runtime has opened."""
    from serving import runtime

    names: list[str] = []
    real = runtime.Runtime.__init__

    def note(self: runtime.Runtime, file: Path, *rest: object, **named: object) -> None:
        names.append(file.name)
        real(self, file, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.Runtime, "__init__", note)
    yield names


@pytest.mark.parametrize("wanted", [set(), {CLASSIFY}, {"other"}], ids=["none", "classify", "one-that-is-not-there"])
def test_a_graph_that_no_service_needs_is_never_opened(digits: Digits, opened: list[str], wanted: set[str]) -> None:
    async def test(serving: Serving) -> None:
        assert list(serving.model.graphs) == [CLASSIFY]
        assert opened == ["model.onnx"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.explain(digits.images[0].tobytes(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == (
            "model_name: 'capsnet-mnist' version '1' has no graph 'explain'; there is: classify"
        )

    serve(test, wanted)


def a_graph(node: str, **attributes: Any) -> bytes:
    """Return a graph of one operator, from ``numbers`` (B, 3) to ``result``."""
    numbers = helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["B", 3])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Sub", ["numbers", "numbers"], ["zero"]),
        helper.make_node(node, ["numbers", "zero"] if node == "Div" else ["numbers"], ["result"], **attributes),
    ]
    graph = helper.make_graph(nodes, "wrong", [numbers], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (a_graph("Div"), "answers with values that are not finite"),
        (a_graph("Softmax", axis=0), "result of a row alone and in a batch differ"),
        (a_graph("ReduceSum", keepdims=1), "result of a row alone and in a batch differ"),
        (b"none", "ONNX Runtime cannot load it"),
    ],
    ids=["infinite", "across-rows", "one-row-for-all", "no-graph"],
)
def test_a_graph_that_answers_wrongly_is_refused_before_it_serves(tmp_path: Path, graph: bytes, message: str) -> None:
    (tmp_path / "odd.onnx").write_bytes(graph)
    artifact = replace(
        load(find(ROOT / "models", "capsnet-mnist")),
        folder=tmp_path,
        files={"odd.onnx": digest(tmp_path / "odd.onnx")},
        graphs={"odd": Graph("odd.onnx")},
    )
    with pytest.raises(RuntimeSetupError, match=message):
        FurtherGraph("odd", artifact, settings()).open(1)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"result": Tensor("float32", (4,))}, r"its output result is \(3,\); its manifest says \(4,\)"),
        ({"other": Tensor("float32", (3,))}, r"its output other is missing; its manifest says \(3,\)"),
    ],
    ids=["another-shape", "another-name"],
)
def test_a_graph_whose_outputs_are_not_those_of_its_manifest_is_refused(
    tmp_path: Path, outputs: dict[str, Tensor], message: str
) -> None:
    (tmp_path / "odd.onnx").write_bytes(a_graph("Relu"))
    artifact = replace(
        load(find(ROOT / "models", "capsnet-mnist")),
        folder=tmp_path,
        files={"odd.onnx": digest(tmp_path / "odd.onnx")},
        graphs={"odd": Graph("odd.onnx", outputs=outputs)},
    )
    with pytest.raises(RuntimeSetupError, match=message):
        FurtherGraph("odd", artifact, settings()).open(1)


@pytest.mark.parametrize(
    ("graph", "changes", "message"),
    [
        ("decoder", {"image_shape": (1, 36, 36)}, r"its image is \(1, 28, 28\); expected \(1, 36, 36\) of this model"),
        ("decoder", {"pose_size": 8}, r"its pose is \(16,\); expected \(8,\) of this model"),
        ("explain", {"image_shape": (3, 28, 28)}, r"its images is \(1, 28, 28\); expected \(3, 28, 28\) of this model"),
        ("explain", {"labels": tuple("abc")}, r"its poses is \(10, 16\); expected \(3, 16\) of this model"),
    ],
)
def test_a_graph_of_another_model_is_refused(graph: str, changes: dict[str, Any], message: str) -> None:
    artifact = replace(load(find(ROOT / "models", "capsnet-mnist")), **changes)
    with pytest.raises(RuntimeSetupError, match=message):
        FurtherGraph(graph, artifact, settings()).open(1)
