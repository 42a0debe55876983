"""Tests of a request's path through a running server: faults in the model, and streams from end to end."""

import itertools
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as inference
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.repository.served_model import ServedModel
from serving.services.protobuf_wire import delimited, varint
from tests.conftest import Running
from tests.predictions import Predict, Prediction, change_predict
from tests.raw_client import failure

SECRET = "what only the log may say"
POISON = 255
PATIENCE = 10.0
PLAIN = {"max_batch": 4, "runtimes": 1}


@pytest.fixture
def running(running_on_each: Running) -> Running:
    """Every test here runs on each transport."""
    return running_on_each


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


def image(value: int = 0) -> pb.Image:
    """Return an image whose pixels all have this value."""
    return pb.Image(pixels=bytes([value]) * 784)


def message(identifier: str, *images: pb.Image) -> pb.ClassifyStreamRequest:
    return pb.ClassifyStreamRequest(id=identifier, request=pb.ClassifyRequest(images=images or [image()]))


def infer(images: int = 1, **parameters: int) -> inference.ModelInferRequest:
    request = inference.ModelInferRequest(raw_input_contents=[bytes(784 * images)])
    request.inputs.add(name="images", datatype="UINT8", shape=(images, 1, 28, 28))
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


def inference_stub(running: Running) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]


def with_predict(change: Callable[[Predict], Predict]) -> Callable[[ServedModel], None]:
    """Return a patch for ``start`` that replaces the model's function."""

    def patch(model: ServedModel) -> None:
        change_predict(model.classify.batcher, change)

    return patch


class Gate:
    """A gate that holds each batch up until the test lets it go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, predict: Predict) -> Predict:
        def held(images: NDArray[np.uint8]) -> Prediction:
            self.sizes.append(len(images))
            self.begun.release()
            assert self.go.wait(PATIENCE)
            return predict(images)

        return held

    def wait(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE)


def later(running: Running, *images: pb.Image, timeout: float = 20) -> "Future[pb.ClassifyResponse]":
    future: Future[pb.ClassifyResponse] = running.stub.Classify.future(
        pb.ClassifyRequest(images=images or [image()]), timeout=timeout
    )
    return future


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def trailers(error: grpc.RpcError) -> dict[str, Any]:
    return {one.key: one.value for one in error.trailing_metadata() or ()}


def detail(error: grpc.RpcError, into: Message) -> None:
    """Read the one detail of an error's status."""
    status = Status.FromString(trailers(error)["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (packed,) = status.details
    assert packed.Unpack(into)


def value(running: Running, metric: str, **labels: str) -> float:
    """Return a metric's value from the page, or the sum over the samples with these labels."""
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == metric]
    found = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    assert found, metric
    return sum(found)


def under_way(running: Running) -> int:
    """Return the number of images that wait or are in a batch that is not computed yet."""
    batcher = running.model.classify.batcher
    batches = [slot.batch for slot in batcher._slots._slots]
    return batcher.queued + sum(batch.rows for batch in batches if batch)


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


def test_a_runtime_that_raises_is_internal_without_its_text_and_counted_and_the_server_goes_on(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    def fail_on_poison(predict: Predict) -> Predict:
        def failing(images: NDArray[np.uint8]) -> Prediction:
            if (images == POISON).any():
                raise RuntimeError(SECRET)
            return predict(images)

        return failing

    running = start(with_predict(fail_on_poison), **PLAIN)
    error = refusal(lambda: running.classify(image(POISON)))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the model could not compute this request")
    error = refusal(
        lambda: inference_stub(running).ModelInfer(
            inference.ModelInferRequest(inputs=infer().inputs, raw_input_contents=[bytes([POISON]) * 784]), timeout=20
        )
    )
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the model could not compute this request")
    assert len(running.classify(image()).results) == 1
    assert any(SECRET in (record.exc_text or "") for record in caplog.records), "the log has the reason"
    assert value(running, "capsnet_inference_failures_total") == 2
    assert value(running, "capsnet_refused_total", reason="failed") == 2
    assert value(running, "nv_inference_request_failure", reason="BACKEND") == 2
    answers = list(running.stub.ClassifyStream(iter([message("bad", image(POISON)), message("good")]), timeout=20))
    assert [(answer.id, answer.WhichOneof("result")) for answer in answers] == [("bad", "error"), ("good", "response")]
    assert answers[0].error == pb.Error(code=13, message="the model could not compute this request")


def test_a_runtime_that_hangs_is_given_up_after_the_batch_timeout_and_the_server_goes_on(
    start: Callable[..., Running],
) -> None:
    go = threading.Event()

    def hang_on_poison(predict: Predict) -> Predict:
        def hanging(images: NDArray[np.uint8]) -> Prediction:
            if (images == POISON).any():
                go.wait(PATIENCE)
            return predict(images)

        return hanging

    running = start(with_predict(hang_on_poison), batch_timeout=0.3, **PLAIN)
    began = time.monotonic()
    error = refusal(lambda: running.classify(image(POISON)))
    assert 0.2 < time.monotonic() - began < 5
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the model could not compute this request")
    assert len(running.classify(*[image()] * 9).results) == 9
    assert value(running, "capsnet_inference_hangs_total") == 1
    go.set()
    assert len(running.classify(*[image()] * 9).results) == 9


def test_answers_that_are_not_finite_are_internal_and_counted_and_others_in_the_batch_are_answered(
    start: Callable[..., Running],
) -> None:
    def spoil(predict: Predict) -> Predict:
        def spoiling(images: NDArray[np.uint8]) -> Prediction:
            answer = predict(images)
            probabilities, poses = (array.copy() for array in answer)
            bad = (images == POISON).all((1, 2, 3))
            poses[bad, 3, 5] = np.inf
            probabilities[bad, 3] = np.nan
            return Prediction(probabilities, poses)

        return spoiling

    gate = Gate()
    running = start(with_predict(lambda predict: gate(spoil(predict))), **PLAIN)
    first = later(running)
    gate.wait()
    good, bad, mixed = later(running), later(running, image(POISON)), later(running, image(), image(POISON))
    until(lambda: under_way(running) == 5, "all to come")
    gate.go.set()
    for call in (first, good):
        assert len(call.result().results) == 1
    for call in (bad, mixed):
        error = call.exception()
        assert isinstance(error, grpc.RpcError)
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the model could not compute this request")
    assert value(running, "capsnet_non_finite_images_total") == 2


def test_of_a_batch_of_32_with_a_poisoned_member_31_are_answered(start: Callable[..., Running]) -> None:
    gate = Gate()

    def fail_on_poison(predict: Predict) -> Predict:
        def failing(images: NDArray[np.uint8]) -> Prediction:
            if (images == POISON).any():
                raise RuntimeError(SECRET)
            return predict(images)

        return failing

    def patch(model: ServedModel) -> None:
        with_predict(lambda predict: gate(fail_on_poison(predict)))(model)
        slots = model.classify.batcher._slots
        slots._policy = replace(slots._policy, good_batch=32)  # one batch instead of several good ones

    running = start(patch, max_batch=32, runtimes=1)
    first = later(running)
    gate.wait()
    calls = [later(running, image(POISON if index == 17 else index)) for index in range(32)]
    until(lambda: under_way(running) == 33, "all to come")
    gate.go.set()
    assert len(first.result().results) == 1
    errors = [call.exception() for call in calls]
    assert [index for index, error in enumerate(errors) if error] == [17]
    assert gate.sizes == [1, 32] + [1] * 32
    assert value(running, "capsnet_inference_retries_total") == 32


@pytest.mark.parametrize("rows", [0, 1, 3], ids=["none", "too few", "too many"])
def test_a_runtime_that_answers_for_another_number_of_images_fails_at_once(
    start: Callable[..., Running], rows: int
) -> None:
    def miscount(predict: Predict) -> Predict:
        def miscounting(images: NDArray[np.uint8]) -> Prediction:
            if not (images == POISON).any():
                return predict(images)
            return Prediction(*(np.resize(array, (rows, *array.shape[1:])) for array in predict(images)))

        return miscounting

    running = start(with_predict(miscount), **PLAIN)
    began = time.monotonic()
    error = refusal(lambda: running.classify(image(POISON), image(POISON)))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert time.monotonic() - began < 5
    assert len(running.classify(image(), image()).results) == 2


def test_a_runtime_that_answers_something_else_fails_at_once(start: Callable[..., Running]) -> None:
    def flatten(predict: Predict) -> Predict:
        def flattening(images: NDArray[np.uint8]) -> Prediction:
            answer = predict(images)
            bad = bool((images == POISON).any())
            return Prediction(answer.probabilities.ravel(), answer.poses.ravel()) if bad else answer

        return flattening

    running = start(with_predict(flatten), batch_timeout=3.0, **PLAIN)
    began = time.monotonic()
    assert refusal(lambda: running.classify(image(POISON))).code() is grpc.StatusCode.INTERNAL
    assert time.monotonic() - began < 1.5, "its thread lives on: nothing has to run into the timeout"
    assert value(running, "capsnet_inference_hangs_total") == 0
    assert len(running.classify(image()).results) == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ClassifyRequest(), "images"),
        (pb.ClassifyRequest(images=[image(), pb.Image(pixels=b"1")]), "images[1].pixels"),
        (pb.ClassifyRequest(images=[image(), image(), pb.Image(encoded=b"GIF89a")]), "images[2].encoded"),
        (pb.ClassifyRequest(images=[pb.Image()]), "images[0]"),
    ],
    ids=["no image", "pixels", "encoded", "no content"],
)
def test_a_wrong_request_names_its_field_for_programs_too(
    running: Running, request_: pb.ClassifyRequest, field: str
) -> None:
    error = refusal(lambda: running.stub.Classify(request_, timeout=20))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    detail(error, found := BadRequest())
    (violation,) = found.field_violations
    assert violation.field == field
    assert error.details() == f"{field}: {violation.description}"


def test_a_wrong_inference_request_names_its_field_for_programs_too(running: Running) -> None:
    request = infer()
    request.inputs[0].shape[:] = [1, 28, 28]
    error = refusal(lambda: inference_stub(running).ModelInfer(request, timeout=20))
    detail(error, found := BadRequest())
    assert [violation.field for violation in found.field_violations] == ["inputs[0].shape"]


@pytest.mark.parametrize("data", [b"\\xff" * 100, b"\\x1a\\xff\\xff\\xff\\xff\\x07", bytes(range(256))], ids=range(3))
def test_bytes_that_are_no_message_are_refused_and_harm_nobody(running: Running, data: bytes) -> None:
    for method in (
        "capsnet.v1.CapsNetService/Classify",
        "capsnet.v1.CapsNetService/GetModel",
        "inference.GRPCInferenceService/ModelInfer",
        "inference.GRPCInferenceService/RepositoryIndex",
    ):
        call = running.channel.unary_unary(f"/{method}", bytes, bytes)
        error = refusal(lambda call=call: call(data, timeout=20))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"request: {len(data)} bytes that are not a" in str(error.details())
    channel: Any = running.channel  # its stubs want serializers
    stream = channel.stream_stream("/capsnet.v1.CapsNetService/ClassifyStream", bytes, bytes)
    answers = [
        pb.ClassifyStreamResponse.FromString(answer)
        for answer in stream(iter([data, message("good").SerializeToString()]), timeout=20)
    ]
    assert [answer.error.code for answer in answers] == [3, 0]
    assert answers[1].id == "good"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("capsnet.v1.CapsNetService/Classify", b"\x1a\0" * 1_000_000),
        ("inference.GRPCInferenceService/ModelInfer", b"\x2a\0" * 1_000_000),
        ("inference.GRPCInferenceService/ModelInfer", (b"\x2a" + varint(2000) + b"\x32\0" * 1000) * 1000),
        ("inference.GRPCInferenceService/ModelInfer", delimited(5, delimited(3, b"\1" * 2_000_000))),
        ("inference.GRPCInferenceService/ModelInfer", delimited(5, b"\x18\1" * 1_000_000)),
        ("inference.GRPCInferenceService/ModelInfer", delimited(6, b"\x12\0" * 1_000_000)),
        ("inference.GRPCInferenceService/ModelInfer", delimited(5, delimited(5, b"\x42\0" * 1_000_000))),
        ("capsnet.v1.CapsNetService/Classify", b"\xa3\6\xa4\6" + b"\x1a\0" * 1_000_000),
        ("inference.GRPCInferenceService/ModelInfer", b"\xa3\6" + b"\x2a\0" * 1_000_000 + b"\xa4\6"),
    ],
    ids=[
        "images",
        "tensors",
        "fields of tensors",
        "dimensions",
        "dimensions one by one",
        "parameters of outputs",
        "texts of tensors",
        "images after a group",
        "tensors in a group",
    ],
)
def test_fields_by_the_million_are_refused_before_they_are_parsed(
    running: Running, method: str, message: bytes
) -> None:
    channel: Any = running.channel  # its stubs want serializers
    error = failure(channel.unary_unary(f"/{method}"), message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "request: more fields than any request that could be answered"


SERVICES = (
    pb.DESCRIPTOR.services_by_name["CapsNetService"],
    inference.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)
UNARY = [method for service in SERVICES for method in service.methods if not method.client_streaming]
LONG = "request: 2000000 bytes; expected at most 65536 of names"
TOO_MANY = "request: more fields than any request that could be answered"


def by_the_million(kind: Any) -> Iterator[bytes]:
    """Yield messages of a kind with a million fields or whole numbers in it, or in one of the messages in it.

    It leaves out InferTensorContents, which has a reader of its own (tests/test_typed_contents.py).
    """
    yield b"\x7a\0" * 1_000_000
    for field in kind.fields:
        if field.message_type:
            if field.message_type != inference.InferTensorContents.DESCRIPTOR:
                yield from (delimited(field.number, content) for content in by_the_million(field.message_type))
        elif field.is_packed and field.cpp_type != field.CPPTYPE_FLOAT:
            yield delimited(field.number, b"\1" * 2_000_000)


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
def test_no_method_reads_fields_by_the_million(running: Running, method: Any) -> None:
    """Also a field that nobody knows costs the parser time; some methods read nothing of their message."""
    channel: Any = running.channel  # its stubs want serializers
    call = channel.unary_unary(f"/{method.containing_service.full_name}/{method.name}", bytes, bytes)
    for message in by_the_million(method.input_type):
        try:
            assert method.name in ("ServerLive", "ServerReady", "ServerMetadata"), call(message, timeout=PATIENCE)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED or error.details() in (LONG, TOO_MANY)


def test_fields_by_the_million_in_a_stream_are_refused_and_the_next_request_is_answered(running: Running) -> None:
    many = b"\x12" + varint(2_000_000) + b"\x1a\0" * 1_000_000
    good = pb.ClassifyStreamRequest(id="b", request=pb.ClassifyRequest(images=[pb.Image(pixels=bytes(784))]))
    channel: Any = running.channel  # its stubs want serializers
    stream = channel.stream_stream("/capsnet.v1.CapsNetService/ClassifyStream")
    answers = [pb.ClassifyStreamResponse.FromString(one) for one in stream(iter([many, good.SerializeToString()]))]
    assert answers[0].error.message == "request: more fields than any request that could be answered"
    assert (answers[1].id, len(answers[1].response.results)) == ("b", 1)


def test_a_long_id_is_refused_without_it_and_the_next_request_is_answered(running: Running) -> None:
    """It would be kept until the answer, of which a stream may have hundreds."""
    text = "id: 5000 characters; expected at most 4096"
    answers = list(running.stub.ClassifyStream(iter([message("i" * 5000), message("b")]), timeout=PATIENCE))
    assert (answers[0].id, answers[0].error.message, answers[1].id) == ("", text, "b")
    long = infer()
    long.id = "i" * 5000
    stub = GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]
    streamed = list(stub.ModelStreamInfer(iter([long, infer()]), timeout=PATIENCE))
    assert (streamed[0].error_message, streamed[0].infer_response.id, streamed[1].error_message) == (text, "", "")
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(long, timeout=PATIENCE)
    assert caught.value.details() == text


def test_an_empty_stream_ends_well(running: Running) -> None:
    for stub in (running.stub.ClassifyStream, inference_stub(running).ModelStreamInfer):
        stream = stub(iter(()), timeout=20)
        assert list(stream) == []
        assert stream.code() is grpc.StatusCode.OK


def test_right_and_wrong_requests_of_a_stream_are_answered_in_their_order(start: Callable[..., Running]) -> None:
    running = start(stream_window=5, max_images_per_request=16, **PLAIN)
    sizes = [1, 0, 16, 3, 17, 1, 0, 0, 7, 16, 2] * 5
    requests = [
        pb.ClassifyStreamRequest(id=str(index), request=pb.ClassifyRequest(images=[image(index)] * size))
        for index, size in enumerate(sizes)
    ]
    requests[3].request.model_name = "none"
    answers = list(running.stub.ClassifyStream(iter(requests), timeout=20))
    assert [answer.id for answer in answers] == [str(index) for index in range(len(sizes))]
    assert [len(answer.response.results) for answer in answers] == [
        size if 1 <= size <= 16 and index != 3 else 0 for index, size in enumerate(sizes)
    ]
    codes = [answer.error.code for answer in answers]
    assert codes == [5 if index == 3 else 0 if 1 <= size <= 16 else 3 for index, size in enumerate(sizes)]


def test_a_stream_is_read_no_further_than_its_window(start: Callable[..., Running]) -> None:
    gate = Gate()
    running = start(with_predict(gate), stream_window=6, **PLAIN)
    stream = running.stub.ClassifyStream((message(str(index), image(), image()) for index in range(50)), timeout=20)
    gate.wait()
    time.sleep(0.2)
    assert under_way(running) == 6
    gate.go.set()
    assert [answer.id for answer in stream] == [str(index) for index in range(50)]
    assert value(running, "capsnet_batch_size_images_sum") == 100


def test_a_client_that_leaves_its_stream_removes_its_waiting_requests(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    running = start(with_predict(gate), stream_window=100, **PLAIN)
    stop = threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        yield from (message(str(index)) for index in range(60))
        stop.wait(PATIENCE)

    stream = running.stub.ClassifyStream(requests(), timeout=20)
    gate.wait()
    until(lambda: under_way(running) == 60, "the stream's requests")
    stream.cancel()
    until(lambda: running.model.classify.batcher.queued == 0, "the end of what waits")
    gate.go.set()
    stop.set()
    assert len(running.classify(image()).results) == 1
    until(lambda: value(running, "capsnet_rpcs_in_flight") == 0, "the end of the stream")
    computed, cancelled = (
        value(running, "capsnet_batch_size_images_sum"),
        value(running, "capsnet_cancelled_images_total"),
    )
    assert computed <= 1 + 2 * 4, "the batch under way, the one ahead, and the last request"
    assert computed + cancelled == 61
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_leaves_a_stream_of_failing_requests_causes_no_server_errors(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def fail(predict: Predict) -> Predict:
        def failing(images: NDArray[np.uint8]) -> Prediction:
            raise RuntimeError(SECRET)

        return failing

    running = start(with_predict(lambda predict: gate(fail(predict))), stream_window=100, **PLAIN)
    never = threading.Event()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        yield from (message(str(index)) for index in range(8))
        never.wait(PATIENCE)

    stream = running.stub.ClassifyStream(requests(), timeout=20)
    gate.wait()
    gate.go.set()
    next(stream)
    stream.cancel()
    never.set()
    until(lambda: value(running, "capsnet_rpcs_in_flight") == 0, "the end of the stream")
    assert "never retrieved" not in caplog.text


def test_a_deadline_that_cannot_be_met_is_answered_long_before_it(start: Callable[..., Running]) -> None:
    def slow(predict: Predict) -> Predict:
        def slowly(images: NDArray[np.uint8]) -> Prediction:
            time.sleep(0.05 * len(images))
            return predict(images)

        return slowly

    running = start(with_predict(slow), **PLAIN)
    for _ in range(3):
        running.classify(*[image()] * 8)  # the server measures the time of a batch
    began = time.monotonic()
    error = refusal(lambda: later(running, *[image()] * 200, timeout=2).result())
    elapsed = time.monotonic() - began
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert str(error.details()).startswith("deadline: "), "the server's answer, and not the client's own timer"
    assert elapsed < 1
    assert value(running, "capsnet_refused_total", reason="deadline") == 1
    assert value(running, "capsnet_batch_size_images_sum") == 24, "nothing of it was computed"
    error = refusal(lambda: inference_stub(running).ModelInfer(infer(200, timeout=2_000_000), timeout=20))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "the protocol's own timeout"
    assert value(running, "capsnet_batch_size_images_sum") == 24


def test_one_slow_batch_does_not_make_an_idle_server_refuse_for_ever(start: Callable[..., Running]) -> None:
    hiccups = itertools.count()

    def stumble(predict: Predict) -> Predict:
        def stumbling(images: NDArray[np.uint8]) -> Prediction:
            if next(hiccups) == 0:
                time.sleep(2)
            return predict(images)

        return stumbling

    running = start(with_predict(stumble), **PLAIN)
    running.classify(image())
    answered = [later(running, timeout=0.3).exception() is None for _ in range(30)]
    assert all(answered[-10:]), "it has learned that batches are quick again"


def test_priority_1_goes_before_waiting_requests(start: Callable[..., Running]) -> None:
    gate = Gate()
    running = start(with_predict(gate), max_batch=1, runtimes=1, priority_ageing=30.0)
    stub = inference_stub(running)
    calls = [stub.ModelInfer.future(infer(), timeout=20)]
    gate.wait()
    done: list[int] = []
    for index, priority in enumerate((0, 0, 0, 0, 0, 1)):
        calls.append(stub.ModelInfer.future(infer(priority=priority), timeout=20))
        calls[-1].add_done_callback(partial(_note, done, index))
        while under_way(running) < index + 2:
            time.sleep(0.001)
    gate.go.set()
    for call in calls:
        call.result()
    until(lambda: len(done) == 6, "all")
    assert done.index(5) <= 1, "only the one that was handed over before is ahead of it"


def _note(done: list[int], index: int, _: object) -> None:
    done.append(index)
