"""Tests of the service as a client sees it: answers, and the errors of wrong requests."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.files.image_headers import IMAGE_CAUSES
from serving.files.images import limit_metadata
from serving.repository.served_model import ServedModel
from serving.rpc.servicers import MAX_WATCHES
from serving.runtime import Arrays, RuntimeSetupError
from serving.services import image_messages
from serving.services.capsnet import _Message
from serving.services.encoded_images import from_encoded
from serving.services.per_model import PerModel
from tests.conftest import DATA, Digits, Running, settings
from tests.inflating import inflating

SEVEN = (DATA / "seven.png").read_bytes()
DIGIT = pb.Image(encoded=SEVEN)


@pytest.fixture
def running(running_on_each: Running) -> Running:
    """Every test here runs on each transport."""
    return running_on_each


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


def _png(size: tuple[int, int] = (28, 28), mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def _huge_png() -> bytes:
    """Return a valid PNG of 10,000 x 10,000 grey pixels in about 100 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    rows = inflating(bytes(10_001) * 100, 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _refusal(running: Running, *images: pb.Image) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        running.classify(*images)
    return caught.value.code(), caught.value.details() or ""


def test_an_answer_has_label_probability_and_pose_of_every_capsule(running: Running) -> None:
    response = running.classify(DIGIT)
    assert (response.model_name, response.model_version) == ("capsnet-mnist", "1")
    (result,) = response.results
    assert (result.label, result.class_index) == ("7", 7)
    assert [capsule.label for capsule in result.capsules] == list("0123456789")
    for capsule in result.capsules:
        assert len(capsule.pose) == 16
        assert capsule.probability == pytest.approx(float(np.linalg.norm(list(capsule.pose))), abs=1e-5)
    assert result.capsules[7].probability == max(capsule.probability for capsule in result.capsules) > 0.8


def test_pixels_and_an_encoded_file_of_the_same_digit_get_the_same_answer(running: Running, digits: Digits) -> None:
    answers = running.classify(DIGIT, pb.Image(pixels=digits.images[0].tobytes())).results
    assert answers[0] == answers[1]


def test_a_digit_gets_the_same_answer_alone_and_among_others(running: Running, digits: Digits) -> None:
    images = [pb.Image(pixels=image.tobytes()) for image in digits.images[:40]]
    together = running.classify(*images).results
    for image, answer in zip(images, together, strict=True):
        alone = running.classify(image).results[0]
        assert alone.label == answer.label
        for one, other in zip(alone.capsules, answer.capsules, strict=True):
            assert list(one.pose) == pytest.approx(list(other.pose), abs=1e-5)


def test_the_model_describes_itself(running: Running) -> None:
    model = running.stub.GetModel(pb.GetModelRequest())
    assert list(model.labels) == list("0123456789")
    assert (model.image_channels, model.image_height, model.image_width, model.pose_size) == (1, 28, 28, 16)
    assert model.execution_provider == "CPUExecutionProvider"
    assert (model.dataset, model.test_images) == ("mnist", 10_000)
    assert 0 < model.test_errors <= 60


def test_the_model_and_version_may_be_named_and_others_are_not_found(running: Running) -> None:
    request = pb.ClassifyRequest(model_name="capsnet-mnist", model_version="1", images=[DIGIT])
    assert running.stub.Classify(request).results[0].label == "7"
    for name, version in (("capsnet-norb", ""), ("", "9")):
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Classify(pb.ClassifyRequest(model_name=name, model_version=version, images=[DIGIT]))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "there is: capsnet-mnist version 1" in str(caught.value.details())
    for name, code in (("x" * 2**16, grpc.StatusCode.NOT_FOUND), ("x" * 100_000, grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Classify(pb.ClassifyRequest(model_name=name, images=[DIGIT]))
        assert caught.value.code() is code
        assert len(str(caught.value.details())) < 1000
    assert caught.value.details() == "model_name: 100000 bytes; expected at most 65536 of a text"


WRONG_IMAGES: dict[str, tuple[pb.Image, str]] = {
    "too few pixels": (pb.Image(pixels=bytes(783)), "images[1].pixels: 783 bytes; expected 784 (1 x 28 x 28"),
    "a wrong size": (pb.Image(encoded=_png((64, 32))), "images[1].encoded: a PNG image of 64 x 32 pixels; expected 28"),
    "a cut-off PNG": (pb.Image(encoded=SEVEN[:120]), "images[1].encoded: a PNG file of 120 bytes that is damaged or"),
    "a cut-off header": (pb.Image(encoded=SEVEN[:20]), "images[1].encoded: a PNG file of 20 bytes that is damaged or"),
    "100 megapixels": (pb.Image(encoded=_huge_png()), "a PNG image of 10000 x 10000 pixels; expected 28 x 28"),
    "text": (pb.Image(encoded=b"no image, in seven.png"), "images[1].encoded: 22 bytes that are neither a PNG nor a"),
    "an empty file": (pb.Image(encoded=b""), "images[1].encoded: 0 bytes that are neither"),
    "nothing": (pb.Image(), "images[1]: has no content; expected pixels or encoded"),
}


@pytest.mark.parametrize(("image", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_a_wrong_image_is_refused_by_name(running: Running, image: pb.Image, message: str) -> None:
    code, details = _refusal(running, DIGIT, image)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details


def test_a_request_without_images_is_refused(running: Running) -> None:
    expected = "images: 0; expected 1 to 1024 (max_images_per_request)"
    assert _refusal(running) == (grpc.StatusCode.INVALID_ARGUMENT, expected)


def test_too_many_images_in_a_request_are_refused_with_the_limit(start: Callable[..., Running]) -> None:
    limited = start(max_images_per_request=4)
    assert len(limited.classify(*[DIGIT] * 4).results) == 4
    code, details = _refusal(limited, *[DIGIT] * 5)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "images: 5; expected 1 to 4 (max_images_per_request)"


def test_a_request_above_the_size_limit_is_refused_with_the_limit(
    start: Callable[..., Running], transport: str
) -> None:
    limited = start(max_request_bytes=10_000)
    code, details = _refusal(limited, pb.Image(encoded=bytes(10_000)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "request: 10006 bytes; the limit is 10000 bytes (max_request_bytes)"
    code, details = _refusal(limited, pb.Image(encoded=bytes(50_000)))  # more than the server reads
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    if transport == "native":
        assert details == "request: 50008 bytes; the limit is 10000 bytes (max_request_bytes)"
    else:  # gRPC's own words
        assert "larger than max" in details


def test_each_limit_on_encoded_images_is_named_and_counted(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = start(max_image_bytes=2048, max_image_memory=2**16, image_threads=1, image_timeout=0.2)
    invalid, exhausted = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
    large = pb.Image(encoded=SEVEN + bytes(2048))
    text = f"images[1].encoded: {2048 + len(SEVEN)} bytes; the limit is 2048 bytes (max_image_bytes)"
    assert _refusal(limited, DIGIT, large) == (invalid, text)
    assert len(limited.classify(*[DIGIT] * 51).results) == 51
    text = f"images: decoding takes {784 * (52 + 32)} bytes of memory; the limit is 65536 bytes (max_image_memory)"
    assert _refusal(limited, *[DIGIT] * 52) == (invalid, text)
    released = threading.Event()

    def wait_and_decode(*arguments: Any) -> Any:
        assert released.wait(20)
        return from_encoded(*arguments)

    monkeypatch.setattr(image_messages, "from_encoded", wait_and_decode)
    try:
        text = "images: not decoded within 0.2 seconds (image_timeout)"
        assert _refusal(limited, DIGIT) == (exhausted, text)
        assert _refusal(limited, DIGIT) == (exhausted, text)  # it never had the thread
        assert limited.classify(pb.Image(pixels=bytes(784))).results  # which raw pixels do not need
    finally:
        released.set()
    assert limited.classify(DIGIT).results[0].label == "7"
    value = limited.server.metrics.registry.get_sample_value
    causes = {cause: value("capsnet_images_refused_total", {"cause": cause}) for cause in IMAGE_CAUSES}
    assert causes == dict.fromkeys(IMAGE_CAUSES, 0) | {"bytes": 1, "memory": 1, "timeout": 2}
    assert value("capsnet_refused_total", {"reason": "image_timeout"}) == 2
    labels = {"model": "capsnet-mnist", "version": "1", "reason": "REJECTED"}
    assert value("nv_inference_request_failure", labels) == 2
    assert value("capsnet_refused_total", {"reason": "invalid"}) == 2
    assert (value("capsnet_decoding_requests"), value("capsnet_decoding_memory_bytes")) == (0, 0)


def test_a_model_of_larger_images_than_the_limit_is_not_loaded(start: Callable[..., Running]) -> None:
    with pytest.raises(RuntimeSetupError, match=r"images of 784 pixels; the limit is 783 \(max_image_pixels\)"):
        start(max_image_pixels=783)


def test_bytes_that_are_no_message_are_refused(running: Running) -> None:
    call = running.channel.unary_unary("/capsnet.v1.CapsNetService/Classify", bytes, bytes)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "request: 3 bytes that are not a capsnet.v1.ClassifyRequest"


def test_valid_requests_succeed_while_wrong_ones_are_refused(running: Running) -> None:
    stop = threading.Event()
    refused: list[grpc.StatusCode] = []

    def send_wrong_ones() -> None:
        wrong = [image for image, _ in WRONG_IMAGES.values()]
        while not stop.is_set():
            for image in wrong:
                refused.append(_refusal(running, image)[0])

    thread = threading.Thread(target=send_wrong_ones)
    thread.start()
    try:
        answers = [running.classify(DIGIT).results[0].label for _ in range(150)]
    finally:
        stop.set()
        thread.join()
    assert answers == ["7"] * 150
    assert len(refused) > len(WRONG_IMAGES)
    assert set(refused) == {grpc.StatusCode.INVALID_ARGUMENT}


def test_a_stream_answers_a_wrong_request_in_its_place_and_goes_on(running: Running) -> None:
    wrong = pb.Image(pixels=bytes(3))
    requests = [
        pb.ClassifyStreamRequest(id=str(index), request=pb.ClassifyRequest(images=[wrong if index == 5 else DIGIT]))
        for index in range(12)
    ]
    answers = list(running.stub.ClassifyStream(iter(requests), timeout=20))
    assert [answer.id for answer in answers] == [str(index) for index in range(12)]
    for index, answer in enumerate(answers):
        if index == 5:
            assert answer.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert "images[0].pixels: 3 bytes" in answer.error.message
        else:
            assert answer.response.results[0].label == "7"


def test_a_stream_larger_than_queue_and_window_is_answered_whole(start: Callable[..., Running]) -> None:
    small = start(max_queue=64, max_images_per_request=64, stream_window=48, max_batch=8)
    request = pb.ClassifyRequest(images=[DIGIT] * 20)
    requests = (pb.ClassifyStreamRequest(id=str(index), request=request) for index in range(30))
    answers = list(small.stub.ClassifyStream(requests, timeout=30))
    assert [len(answer.response.results) for answer in answers] == [20] * 30


def test_many_streams_wait_for_room_in_the_queue_and_leave_some_to_others(start: Callable[..., Running]) -> None:
    small = start(max_queue=64, max_images_per_request=32, stream_window=48, max_batch=8)
    request = pb.ClassifyRequest(images=[DIGIT] * 16)

    def stream(count: int) -> list[int]:
        requests = (pb.ClassifyStreamRequest(request=request) for _ in range(count))
        return [len(answer.response.results) for answer in small.stub.ClassifyStream(requests, timeout=60)]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, 20) for _ in range(8)]
        while not all(future.done() for future in streams):
            assert len(small.classify(*[DIGIT] * 16).results) == 16
    assert [future.result() for future in streams] == [[16] * 20] * 8


def test_a_small_file_that_unpacks_to_much_text_is_refused_quickly(running: Running) -> None:
    limit_metadata()  # the server's process does this at its start
    text = b"\0".join([b"Raw profile type exif", b"", zlib.compress(bytes(2**20), 9)])
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    bomb = SEVEN[:33] + chunk * 60 + SEVEN[33:]
    code, details = _refusal(running, pb.Image(encoded=bomb))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "damaged or cut off" in details


def test_a_client_that_leaves_its_stream_harms_no_other(running: Running) -> None:
    def endless() -> Iterator[pb.ClassifyStreamRequest]:
        while True:
            yield pb.ClassifyStreamRequest(request=pb.ClassifyRequest(images=[DIGIT]))

    call = running.stub.ClassifyStream(endless(), timeout=20)
    for _ in range(5):
        next(call)
    call.cancel()
    assert running.classify(DIGIT).results[0].label == "7"


def test_a_fault_of_the_model_is_internal_and_tells_no_inner_text(start: Callable[..., Running]) -> None:
    def patch(model: ServedModel) -> None:
        real = model.classify.runtime.run

        def run(arrays: Arrays) -> Arrays:
            if (np.asarray(arrays["images"]) == 255).all(axis=(1, 2, 3)).any():
                raise RuntimeError("secret /inner/path")
            return real(arrays)

        model.classify.batcher._run = run

    faulty = start(patch)
    code, details = _refusal(faulty, pb.Image(pixels=b"\xff" * 784))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "the model could not compute this request")
    assert faulty.classify(DIGIT).results[0].label == "7"


def test_health_says_serving_for_the_server_and_the_service(running: Running) -> None:
    stub = health_pb2_grpc.HealthStub(running.channel)
    for service in ("", "capsnet.v1.CapsNetService"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(request, timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="another"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_connection_watches_the_health_a_limited_number_of_times(running: Running) -> None:
    with grpc.insecure_channel(running.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(MAX_WATCHES)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="watches the health 64 times already") as caught:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        another = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(another).status == health_pb2.HealthCheckResponse.SERVING
        another.cancel()
        for watch in watches:
            watch.cancel()
        end = time.monotonic() + 30
        while True:
            try:
                assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
                return
            except grpc.RpcError:
                assert time.monotonic() < end, "ended watches leave their places"


def test_reflection_lists_the_services_and_their_messages(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="capsnet.v1.ClassifyRequest"),
    ]
    services, file = stub.ServerReflectionInfo(iter(requests), timeout=10)
    names = {service.name for service in services.list_services_response.service}
    assert {"capsnet.v1.CapsNetService", "grpc.health.v1.Health"} <= names
    assert file.file_descriptor_response.file_descriptor_proto


def test_images_are_not_looked_at_where_they_are_too_many() -> None:
    class Images(list[pb.Image]):
        def __iter__(self) -> Any:
            raise AssertionError("looked at")

    request: Any = SimpleNamespace(model_name="", model_version="", images=Images([pb.Image()] * 3))
    codecs: Any = PerModel(lambda model: None)
    query = _Message(request, settings(max_images_per_request=2), codecs)
    assert (query.size, query.slow) == (3, False)


def test_a_watch_keeps_no_more_of_a_client_than_a_name(running_on_each: Running) -> None:
    stub: Any = health_pb2_grpc.HealthStub(running_on_each.channel)
    named = health_pb2.HealthCheckRequest(service="a" * 5000)
    for ask in (stub.Check, stub.Watch):
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(ask(named, timeout=10)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "request: 5003 bytes; the limit is 4096 bytes"


def test_health_lists_every_service_and_tells_a_watch_of_each_change(
    start: Callable[..., Running], transport: str
) -> None:
    server = start(drain_delay=0.5)
    stub = health_pb2_grpc.HealthStub(server.channel)
    statuses = stub.List(health_pb2.HealthListRequest(), timeout=10).statuses
    serving = health_pb2.HealthCheckResponse.SERVING
    names = ("", "capsnet.v1.CapsNetService", "inference.GRPCInferenceService")
    assert {name: status.status for name, status in statuses.items()} == dict.fromkeys(names, serving)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(watch).status == serving
    server.stop()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


REFLECTED = ["v1alpha", "v1"]


def _reflected(
    running: Running, version: str, *requests: dict[str, Any]
) -> list[reflection_pb2.ServerReflectionResponse]:
    ask = running.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(ask(iter(reflection_pb2.ServerReflectionRequest(**one) for one in requests), timeout=10))


@pytest.mark.parametrize("version", REFLECTED)
@pytest.mark.parametrize(
    "symbol",
    [
        "capsnet.v1.CapsNetService",
        "capsnet.v1.CapsNetService.Classify",
        "capsnet.v1.ClassifyRequest",
        "capsnet.v1.ClassifyRequest.images",
        "inference.GRPCInferenceService.ModelInfer",
        "grpc.health.v1.Health.Check",
        "grpc.health.v1.HealthCheckResponse.ServingStatus",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1.ServerReflectionRequest",
        "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo",
    ],
)
def test_reflection_finds_symbols_and_their_members(running: Running, version: str, symbol: str) -> None:
    [answer] = _reflected(running, version, {"file_containing_symbol": symbol})
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(one)
        for one in answer.file_descriptor_response.file_descriptor_proto
    ]
    assert any(symbol.startswith(f"{file.package}.") for file in files)


@pytest.mark.parametrize("version", REFLECTED)
def test_reflection_of_each_version_lists_both_and_says_what_it_does_not_know(running: Running, version: str) -> None:
    unknown = ("capsnet.v1.CapsNetService.Nothing", "capsnet.v1.Nothing", "Classify", "")
    services, *answers = _reflected(
        running, version, {"list_services": ""}, *({"file_containing_symbol": symbol} for symbol in unknown)
    )
    names = [service.name for service in services.list_services_response.service]
    assert {f"grpc.reflection.{one}.ServerReflection" for one in REFLECTED} <= set(names)
    assert len(answers) == len(unknown)
    for answer in answers:
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
def test_bytes_that_are_no_message_of_grpcs_own_services_are_refused_quietly(
    running: Running, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.channel.unary_unary(path, bytes, bytes)(b"\xff\xff", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text
