"""Tests of the Open Inference Protocol and Triton's extensions: NVIDIA's unmodified client with a running server.

The client runs in its own process, see triton_calls.py. Our generated code sends what that client cannot send.
"""

import base64
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from protos.capsnet.v1 import capsnet_pb2
from protos.inference import inference_pb2 as pb
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from serving.server import Server
from tests.conftest import ROOT, Ask, Digits, InThread, Running, settings

NAME = "capsnet-mnist"
INFER = ["infer", "async_infer", "aio_infer"]
STREAM = ["stream", "aio_stream"]


@pytest.fixture
def running(running_on_each: Running) -> Running:
    """Every test here runs on each transport."""
    return running_on_each


@pytest.fixture
def stub(running: Running) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def admin() -> Iterator[GRPCInferenceServiceStub]:
    """A server's administration port."""
    with (
        InThread(Server(settings(admin_port=0))) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.admin_port}") as channel,
    ):
        yield GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def images(digits: Digits) -> list[Any]:
    """The first five digits, (5, 1, 28, 28)."""
    found: list[Any] = digits.images[:5, np.newaxis].tolist()
    return found


def _ours(running: Running, images: list[Any]) -> dict[str, Any]:
    """Return the answer of capsnet.v1 as the protocol's outputs."""
    pixels = (np.array(image, np.uint8).tobytes() for image in images)
    response = running.classify(*(capsnet_pb2.Image(pixels=one) for one in pixels))
    return {
        "probabilities": [[capsule.probability for capsule in result.capsules] for result in response.results],
        "poses": [[list(capsule.pose) for capsule in result.capsules] for result in response.results],
    }


def _request(digits: Digits, images: int = 1) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(raw_input_contents=[digits.images[:images].tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=(images, 1, 28, 28))
    return request


def _slow(model: ServedModel) -> None:
    """Slow the model down to half a second for a batch."""
    run = model.classify.runtime.run

    def slowly(arrays: Arrays) -> Arrays:
        time.sleep(0.5)
        return run(arrays)

    model.classify.batcher._run = slowly


@pytest.mark.parametrize("call", INFER)
def test_an_answer_has_the_same_numbers_as_capsnet_v1(
    call: str, triton: Ask, running: Running, images: list[Any]
) -> None:
    answer = triton(call, running.address, model_name=NAME, model_version="1", request_id="seven", images=images)
    assert (answer["model"], answer["id"], answer["parameters"]) == ([NAME, "1"], "seven", {})
    expected = _ours(running, images)
    assert list(answer["outputs"]) == ["probabilities", "poses"]
    for name, values in answer["outputs"].items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5)


@pytest.mark.parametrize("call", STREAM)
def test_a_stream_is_answered_in_order(call: str, triton: Ask, running: Running, images: list[Any]) -> None:
    requests = [{"model_name": NAME, "request_id": str(index), "images": [images[index % 5]]} for index in range(50)]
    answers = triton(call, running.address, requests)
    assert [answer["id"] for answer in answers] == [str(index) for index in range(50)]
    expected = _ours(running, images)["probabilities"]
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer["outputs"]["probabilities"], [expected[index % 5]], atol=1e-5)
        assert answer["parameters"] == {"triton_final_response": True}


@pytest.mark.parametrize("call", STREAM)
def test_a_stream_goes_on_after_a_refusal(call: str, triton: Ask, running: Running, images: list[Any]) -> None:
    good = {"model_name": NAME, "images": images}
    wrong: list[dict[str, Any]] = [{"images": [[[0]]]}, {"model_name": "other"}, {"sequence_id": 5}]
    requests = [good, *({**good, **change} for change in wrong), good]
    first, *refused, last = triton(call, running.address, requests)
    np.testing.assert_allclose(first["outputs"]["poses"], last["outputs"]["poses"], atol=1e-5)
    shape = "inputs[0].shape: [1, 1, 1]; expected [n, 1, 28, 28], n from 1 to 1024 (max_images_per_request)"
    model = "model_name, model_version: 'other' is not served; there is: capsnet-mnist version 1"
    sequence = "parameters[\"sequence_id\"]: '5'; expected none, since sequences are not supported"
    assert [answer["error"] for answer in refused] == [shape, model, sequence]


def test_a_refusal_in_a_stream_names_its_request(stub: GRPCInferenceServiceStub, digits: Digits) -> None:
    wrong = pb.ModelInferRequest(id="wrong")
    answers = list(stub.ModelStreamInfer(iter([_request(digits), wrong, _request(digits)]), timeout=20))
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert answers[1].infer_response.id == "wrong"
    assert answers[1].error_message == "inputs: 0 tensors; expected one, 'images'"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_messages_may_be_compressed(algorithm: str, triton: Ask, running: Running, images: list[Any]) -> None:
    request = {"model_name": NAME, "images": images, "compression_algorithm": algorithm}
    assert triton("infer", running.address, **request)["outputs"].keys() == {"probabilities", "poses"}


@pytest.mark.parametrize("call", INFER)
def test_the_outputs_that_are_named_come_alone(call: str, triton: Ask, running: Running, images: list[Any]) -> None:
    answer = triton(call, running.address, model_name=NAME, images=images, outputs={"poses": 0})
    assert list(answer["outputs"]) == ["poses"]


def test_the_most_probable_classes_come_by_name(
    triton: Ask, running: Running, digits: Digits, images: list[Any]
) -> None:
    outputs = {"poses": 0, "probabilities": 3}
    answer = triton("infer", running.address, model_name=NAME, images=images, outputs=outputs)
    assert list(answer["outputs"]) == ["poses", "probabilities"]
    expected = _ours(running, images)["probabilities"]
    for texts, probabilities, label in zip(
        answer["outputs"]["probabilities"], expected, digits.labels[:5], strict=True
    ):
        parts = [text.split(":") for text in texts]
        best = sorted(range(10), key=lambda index: -probabilities[index])[:3]
        assert [(int(index), name) for _, index, name in parts] == [(index, str(index)) for index in best]
        assert [float(value) for value, *_ in parts] == pytest.approx([probabilities[i] for i in best], abs=2e-6)
        assert parts[0][2] == str(label)


def test_elements_may_come_one_by_one(stub: GRPCInferenceServiceStub, digits: Digits) -> None:
    raw, typed = _request(digits, 40), _request(digits, 40)
    typed.ClearField("raw_input_contents")
    typed.inputs[0].contents.uint_contents.extend(digits.images[:40].ravel().tolist())
    answers = [stub.ModelInfer(request, timeout=20) for request in (raw, typed)]
    numbers = [[np.frombuffer(data, "<f4") for data in answer.raw_output_contents] for answer in answers]
    for one, other in zip(*numbers, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("call", INFER)
@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "model_name, model_version: 'other' is not served; there is: "),
        ({"model_version": "2"}, "NOT_FOUND", "model_name, model_version: 'capsnet-mnist' version '2' is not served"),
        ({"images": [[[0]]]}, "INVALID_ARGUMENT", "inputs[0].shape: [1, 1, 1]; expected [n, 1, 28, 28], n from 1"),
        (
            {"outputs": {"scores": 0}},
            "INVALID_ARGUMENT",
            "outputs[0].name: 'scores'; expected 'probabilities', ",
        ),
        ({"sequence_id": 3}, "INVALID_ARGUMENT", "parameters[\"sequence_id\"]: '3'; expected none"),
        ({"timeout": 1}, "DEADLINE_EXCEEDED", ""),
    ],
    ids=str,
)
def test_a_wrong_request_gets_a_code_and_a_text(
    call: str, change: dict[str, Any], status: str, text: str, triton: Ask, running: Running, images: list[Any]
) -> None:
    answer = triton(call, running.address, **{"model_name": NAME, "images": images, **change})
    assert answer["status"] == f"StatusCode.{status}"
    assert answer["error"].startswith(text)


def test_the_error_of_a_request_above_the_size_limit_names_the_limit(
    start: Callable[..., Running], triton: Ask, images: list[Any]
) -> None:
    answer = triton("infer", start(max_request_bytes=2048).address, model_name=NAME, images=images)
    assert answer["status"] == "StatusCode.INVALID_ARGUMENT"
    assert "the limit is 2048 bytes (max_request_bytes)" in answer["error"]


def test_bytes_that_are_no_message_are_refused(running: Running) -> None:
    for method, kind in (("ModelInfer", "ModelInferRequest"), ("ModelConfig", "ModelConfigRequest")):
        call = running.channel.unary_unary(f"/inference.GRPCInferenceService/{method}", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff", timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == f"request: 2 bytes that are not a inference.{kind}"


def test_a_stream_goes_on_after_bytes_that_are_no_message(running: Running, digits: Digits) -> None:
    call = running.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", bytes, bytes)
    good = _request(digits).SerializeToString()
    answers = [pb.ModelStreamInferResponse.FromString(data) for data in call(iter([b"\xff", good]), timeout=20)]
    assert [answer.error_message for answer in answers] == [
        "request: 1 bytes that are not a inference.ModelInferRequest",
        "",
    ]


def test_a_request_with_too_little_time_is_given_up(
    start: Callable[..., Running], triton: Ask, images: list[Any]
) -> None:
    running = start(_slow)
    began = time.monotonic()
    answer = triton("infer", running.address, model_name=NAME, images=images, client_timeout=0.2)
    assert answer["status"] == "StatusCode.DEADLINE_EXCEEDED"
    assert time.monotonic() - began < 5


def test_a_high_priority_overtakes_waiting_requests(start: Callable[..., Running], digits: Digits) -> None:
    running = start(_slow, runtimes=1, max_batch=1, priority_ageing=20.0)
    stub = GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]
    order: list[str] = []

    def ask(identifier: str, priority: int) -> Any:
        request = _request(digits)
        request.id = identifier
        request.parameters["priority"].uint64_param = priority
        future = stub.ModelInfer.future(request, timeout=20)
        future.add_done_callback(lambda done: order.append(done.result().id))
        time.sleep(0.05)
        return future

    # When the others come, the first is being computed and the second is next.
    futures = [ask(name, 0) for name in ("first", "second", "third")] + [ask("urgent", 1)]
    for future in futures:
        future.result(timeout=20)
    time.sleep(0.1)
    assert order.index("urgent") < order.index("third")


@pytest.mark.parametrize("ask", ["ask", "aio_ask"])
def test_the_server_and_its_models_say_whether_they_are_ready(ask: str, triton: Ask, running: Running) -> None:
    assert triton(ask, running.address, "is_server_live") is True
    assert triton(ask, running.address, "is_server_ready") is True
    for arguments, ready in [((NAME,), True), ((NAME, "1"), True), ((NAME, "2"), False), (("other",), False)]:
        assert triton(ask, running.address, "is_model_ready", *arguments) is ready


@pytest.mark.parametrize("ask", ["ask", "aio_ask"])
def test_a_model_is_described(ask: str, triton: Ask, running: Running) -> None:
    metadata = triton(ask, running.address, "get_model_metadata", NAME)
    probabilities = {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "10"]}
    assert metadata == {
        "name": NAME,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "28", "28"]}],
        "outputs": [probabilities, {"name": "poses", "datatype": "FP32", "shape": ["-1", "10", "16"]}],
    }
    config = triton(ask, running.address, "get_model_config", NAME)["config"]
    assert (config["name"], config["platform"], config["backend"]) == (NAME, "onnxruntime_onnx", "onnxruntime")
    assert (config["default_model_filename"], config["max_batch_size"]) == ("model.onnx", 1024)
    (pixels,) = config["input"]
    assert (pixels["name"], pixels["data_type"], pixels["dims"]) == ("images", "TYPE_UINT8", ["1", "28", "28"])
    assert [(one["name"], one["data_type"], one["dims"], one["label_filename"]) for one in config["output"]] == [
        ("probabilities", "TYPE_FP32", ["10"], "labels.txt"),
        ("poses", "TYPE_FP32", ["10", "16"], ""),
    ]
    assert [(group["kind"], group["count"]) for group in config["instance_group"]] == [("KIND_CPU", 2)]
    batching = config["dynamic_batching"]
    assert (batching["preferred_batch_size"], batching["priority_levels"]) == ([settings().max_batch], "2")
    assert batching["default_priority_level"] == "2"


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_a_model_that_is_not_there_is_not_described(method: str, triton: Ask, running: Running) -> None:
    for arguments, wanted in [(("other",), "'other'"), ((NAME, "2"), f"'{NAME}' version '2'")]:
        answer = triton("ask", running.address, method, *arguments)
        assert answer["status"] == "StatusCode.NOT_FOUND"
        assert f"{wanted} is not served; there is: {NAME} version 1" in answer["error"]


def test_the_extensions_are_those_that_work(triton: Ask, running: Running) -> None:
    metadata = triton("ask", running.address, "get_server_metadata")
    assert metadata["name"] == "capsnet-serving"
    assert metadata["version"]
    assert "statistics" in metadata["extensions"]
    assert not {"model_repository", "sequence", "system_shared_memory", "trace"} & {*metadata["extensions"]}


MEMORY = "shared memory is not supported; send the tensors in the messages"
LOADING = "not on this port; the server's --admin-port opens a port for loading and unloading of models. Versions"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (("get_system_shared_memory_status",), f"SystemSharedMemoryStatus: {MEMORY}"),
        (("register_system_shared_memory", "region", "/key", 784), f"SystemSharedMemoryRegister: {MEMORY}"),
        (("unregister_system_shared_memory",), f"SystemSharedMemoryUnregister: {MEMORY}"),
        (("get_cuda_shared_memory_status",), f"CudaSharedMemoryStatus: {MEMORY}"),
        (("unregister_cuda_shared_memory", "region"), f"CudaSharedMemoryUnregister: {MEMORY}"),
        (("get_trace_settings",), "TraceSetting: settings of traces are not supported; the server's --trace-endpoint"),
        (("update_trace_settings", NAME, {"trace_rate": "1"}), "TraceSetting: settings of traces are not supported"),
        (("get_log_settings",), "LogSettings: settings of the log are not supported; the server's --log-level"),
        (("update_log_settings", {"log_verbose_level": 1}), "LogSettings: settings of the log are not supported"),
        (("load_model", NAME), f"RepositoryModelLoad: {LOADING}"),
        (("unload_model", NAME), f"RepositoryModelUnload: {LOADING}"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_only_triton_has_is_refused_with_the_reason(
    call: tuple[Any, ...], text: str, triton: Ask, running: Running
) -> None:
    answer = triton("ask", running.address, *call)
    assert answer["status"] == "StatusCode.UNIMPLEMENTED"
    assert answer["error"].startswith(text)


def _texts(address: str, methods: list[str]) -> dict[str, str]:
    """Return, by method, the text with which a port refuses an empty message; of those that it takes, nothing."""
    found = {}
    with grpc.insecure_channel(address) as channel:
        for method in methods:
            try:
                channel.unary_unary(f"/inference.GRPCInferenceService/{method}", bytes, bytes)(b"", timeout=20)
            except grpc.RpcError as error:
                found[method] = error.details() or ""
    return found


def test_no_method_of_triton_is_unknown_on_any_port(start_on_each: Callable[..., Running], triton: Ask) -> None:
    running = start_on_each(admin_port=0)
    pool = descriptor_pool.DescriptorPool()
    for data in triton("descriptions"):
        pool.AddSerializedFile(base64.b64decode(data))
    service = pool.FindServiceByName("inference.GRPCInferenceService")
    methods = [method.name for method in service.methods if not method.client_streaming]
    assert len(methods) >= 19
    refused = _texts(running.address, methods)
    assert "Method not found!" not in refused.values()
    assert not {"ServerLive", "ModelReady", "RepositoryIndex"} & refused.keys()

    refused = _texts(f"127.0.0.1:{running.server.admin_port}", methods)
    assert "Method not found!" not in refused.values()
    assert "RepositoryIndex" not in refused
    for method in ("ServerLive", "ModelInfer", "ModelConfig"):
        assert refused[method] == (
            f"{method}: not on this port, which loads and unloads models; the server's --port has this method"
        )
    assert refused["TraceSetting"].startswith("TraceSetting: settings of traces")
    assert refused["RepositoryModelLoad"].startswith("model_name: ''; expected the name")


def test_statistics_count_requests_images_and_batches(
    start: Callable[..., Running], triton: Ask, images: list[Any]
) -> None:
    running = start(runtimes=1, max_batch=8)
    assert triton("ask", running.address, "get_inference_statistics")["model_stats"][0]["last_inference"] == "0"
    for count in (1, 5, 5):
        triton("infer", running.address, model_name=NAME, images=images[:count])
    triton("infer", running.address, model_name=NAME, images=[[[0]]])
    (stats,) = triton("ask", running.address, "get_inference_statistics", NAME, "1")["model_stats"]
    assert (stats["name"], stats["version"]) == (NAME, "1")
    assert (stats["inference_count"], stats["execution_count"]) == ("11", "3")
    assert abs(int(stats["last_inference"]) - 1000 * time.time()) < 60_000
    steps = stats["inference_stats"]
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert steps[name]["count"] == "3"
        assert int(steps[name]["ns"]) > 0
    assert steps["fail"]["count"] == "1"
    assert [(size["batch_size"], size["compute_infer"]["count"]) for size in stats["batch_stats"]] == [
        ("1", "1"),
        ("5", "2"),
    ]


def test_the_index_tells_the_state_of_each_version(triton: Ask, running: Running) -> None:
    index = triton("ask", running.address, "get_model_repository_index")
    assert index["models"] == [{"name": NAME, "version": "1", "state": "READY", "reason": ""}]


def test_models_are_loaded_and_unloaded_on_the_administration_port_alone(
    start: Callable[..., Running], triton: Ask, tmp_path: Path, images: list[Any]
) -> None:
    shutil.copytree(ROOT / "models" / NAME, tmp_path / NAME)
    running = start(models=str(tmp_path), admin_port=0)
    admin, public = f"127.0.0.1:{running.server.admin_port}", running.address
    assert "model_repository" in triton("ask", public, "get_server_metadata")["extensions"]
    assert triton("ask", admin, "unload_model", NAME) is None
    assert triton("ask", public, "is_model_ready", NAME) is False
    assert triton("ask", public, "is_server_ready") is False
    assert triton("infer", public, model_name=NAME, images=images)["status"] == "StatusCode.NOT_FOUND"
    assert triton("ask", admin, "unload_model", NAME)["status"] == "StatusCode.NOT_FOUND"

    assert triton("ask", admin, "load_model", NAME) is None
    assert triton("ask", public, "is_model_ready", NAME) is True
    assert "outputs" in triton("infer", public, model_name=NAME, images=images)
    assert [model["state"] for model in triton("ask", admin, "get_model_repository_index")["models"]] == ["READY"]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"model_name": ""}, "model_name: ''; expected the name of a folder in the repository"),
        ({"model_name": "../other"}, "model_name: '../other'; expected the name of a folder in the repository"),
        ({"model_name": ".."}, "model_name: '..'; expected the name of a folder in the repository"),
        ({"model_name": "a\0b"}, "model_name: 'a\\x00b'; expected the name of a folder in the repository"),
        ({"model_name": "other"}, "model_name: 'other' is not "),
        ({"model_name": NAME, "repository_name": "r"}, "repository_name: 'r'; expected none, since there is one"),
        (
            {"model_name": NAME, "parameters": {"config": pb.ModelRepositoryParameter(string_param="{}")}},
            'parameters["config"]: not supported; expected none, a model is what its folder has',
        ),
        (
            {"parameters": {str(number): pb.ModelRepositoryParameter() for number in range(5000)}},
            "request: more fields than any request that could be answered",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    request_: dict[str, Any], text: str, admin: GRPCInferenceServiceStub
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        admin.RepositoryModelLoad(pb.RepositoryModelLoadRequest(**request_), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(text)


@pytest.mark.parametrize("batch", [1, 5])
def test_perf_analyzer_finds_all_that_it_needs(batch: int, triton: Ask, running: Running, images: list[Any]) -> None:
    """Make perf_analyzer's calls in its order, and check each answer as its source does."""

    def statistics() -> Any:
        (found,) = triton("ask", running.address, "get_inference_statistics", NAME)["model_stats"]
        return found

    metadata = triton("ask", running.address, "get_model_metadata", NAME)
    config = triton("ask", running.address, "get_model_config", NAME)["config"]
    assert config["max_batch_size"] >= batch
    # It removes the batch axis from the metadata's shapes if the model has batches.
    described = {one["name"]: one["shape"][1:] for one in metadata["inputs"] + metadata["outputs"]}
    assert {one["name"]: one["dims"] for one in config["input"] + config["output"]} == described
    assert all(int(size) > 0 for shape in described.values() for size in shape)
    assert "dynamic_batching" in config
    unwanted = {"sequence_batching", "ensemble_scheduling", "response_cache", "model_transaction_policy"}
    assert not unwanted & config.keys()
    assert "statistics" in triton("ask", running.address, "get_server_metadata")["extensions"]

    before = statistics()
    request = {"model_name": NAME, "request_id": "1", "images": images[:batch]}
    outputs = {"probabilities": 0, "poses": 0}
    assert triton("infer", running.address, **request, outputs=outputs)["outputs"].keys() == outputs.keys()
    assert triton("async_infer", running.address, **request)["id"] == "1"
    (streamed,) = triton("stream", running.address, [request], enable_empty_final_response=True)
    assert (streamed["id"], streamed["parameters"]) == ("1", {"triton_final_response": True})
    after = statistics()
    assert int(after["version"]) == 1
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        grown = [int(found["inference_stats"][name]["count"]) for found in (before, after)]
        assert grown[1] - grown[0] == 3
    assert int(after["inference_count"]) - int(before["inference_count"]) == 3 * batch
    assert int(after["execution_count"]) > int(before["execution_count"])


def test_our_client_and_tritons_fit_in_one_process() -> None:
    code = "import serving.client, tritonclient.grpc, tritonclient.grpc.aio"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _fields(message: Descriptor) -> dict[tuple[str, str], tuple[object, ...]]:
    """Return, by message and field, all that matters on the wire."""
    found: dict[tuple[str, str], tuple[object, ...]] = {}
    for field in message.fields:
        kind = field.message_type or field.enum_type
        oneof = field.containing_oneof.name if field.containing_oneof else None
        facts = (field.number, field.type, field.is_repeated, kind.full_name if kind else None, oneof)
        found[message.full_name, field.name] = facts
    for nested in message.nested_types:
        found |= _fields(nested)
    return found


def test_our_proto_is_a_part_of_tritons(triton: Ask) -> None:
    pool = descriptor_pool.DescriptorPool()
    for data in triton("descriptions"):
        pool.AddSerializedFile(base64.b64decode(data))
    ours = pb.DESCRIPTOR
    for name, message in ours.message_types_by_name.items():
        theirs = _fields(pool.FindMessageTypeByName(f"inference.{name}"))
        assert _fields(message).items() <= theirs.items()
    (enum,) = ours.enum_types_by_name.values()
    their_enum = pool.FindEnumTypeByName(enum.full_name)
    assert {(value.name, value.number) for value in enum.values} <= {
        (value.name, value.number) for value in their_enum.values
    }
    (service,) = ours.services_by_name.values()
    methods = {method.name: method for method in pool.FindServiceByName(service.full_name).methods}
    for method in service.methods:
        other = methods[method.name]
        for one in (method, other):
            assert (one.client_streaming, one.server_streaming) == 2 * (method.name == "ModelStreamInfer",)
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
