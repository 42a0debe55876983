"""Tests of the outputs and inputs beside the network's own, over Triton's protocol, with NVIDIA's unmodified client.

Answers are compared with those of capsnet.v1, and with the model's files.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2
from protos.inference import inference_pb2 as pb
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.calibrated import MNIST, PAIRS
from tests.conftest import DATA, ROOT, Ask, Digits, Running
from tests.test_explanations import PATIENCE, classify, explain, graph, image
from tests.test_reconstructions import drawn

FURTHER = ("confidence", "couplings", "contributions", "relevance", "reconstruction")
SHAPES = {"confidence": [10], "couplings": [3, 10, 100], "contributions": [10, 100], "relevance": [28, 28]}


@pytest.fixture
def running(calibrated_servers: Callable[[str], Running], transport: str) -> Running:
    """Every test here runs on each transport."""
    return calibrated_servers(transport)


@pytest.fixture
def stub(running: Running) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]


def one(digits: Digits, count: int = 1) -> pb.ModelInferRequest:
    """Return a request with the first digits."""
    request = pb.ModelInferRequest(model_name=MNIST, raw_input_contents=[digits.images[:count].tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=(count, 1, 28, 28))
    return request


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def in_base_64(*files: bytes) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]


def ask(triton: Ask, call: str, running: Running, **request: Any) -> dict[str, NDArray[np.float64]]:
    """Return the outputs of a request, by a call of its own or in a stream."""
    request = {"model_name": MNIST, **request}
    answer = (
        triton(call, running.address, [request])[0] if call == "stream" else triton(call, running.address, **request)
    )
    return {name: np.array(values) for name, values in answer["outputs"].items()}


def refusal(stub: GRPCInferenceServiceStub, request: pb.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=PATIENCE)
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("call", ["infer", "stream"])
def test_every_output_has_the_numbers_of_capsnet_v1(call: str, triton: Ask, running: Running, digits: Digits) -> None:
    chosen = digits.images[:2]
    outputs = dict.fromkeys((*reversed(FURTHER), "probabilities"), 0)
    answer = ask(triton, call, running, images=chosen[:, None].tolist(), outputs=outputs)
    assert list(answer) == list(outputs)
    sent = [image(pixels) for pixels in chosen]
    explained = explain(running, *sent).results
    for index, (result, explanation) in enumerate(zip(classify(running, *sent), explained, strict=True)):
        (winner,) = explanation.classes
        numbers: dict[str, Any] = {
            "confidence": [capsule.confidence for capsule in result.capsules],
            "probabilities": [capsule.probability for capsule in result.capsules],
            "relevance": np.reshape(winner.relevance.values, (28, 28)),
        }
        for name, expected in numbers.items():
            np.testing.assert_allclose(answer[name][index], expected, rtol=0, atol=1e-6)
        couplings = [iteration.couplings for iteration in winner.iterations]
        np.testing.assert_allclose(answer["couplings"][index, :, winner.class_index], couplings, rtol=0, atol=1e-6)
        contributions = answer["contributions"][index, winner.class_index]
        np.testing.assert_allclose(contributions, winner.contributions, rtol=0, atol=1e-6)
        pose = np.array([capsule.pose for capsule in result.capsules], np.float32)[[winner.class_index]]
        expected_image = drawn(running, pose, [winner.class_index])[0]
        np.testing.assert_allclose(answer["reconstruction"][index], expected_image, rtol=0, atol=1e-6)


def test_relevance_and_reconstruction_are_of_the_class_that_is_named(
    triton: Ask, stub: GRPCInferenceServiceStub, running: Running, digits: Digits
) -> None:
    outputs = {"reconstruction": 0, "relevance": 0}
    images = digits.images[:1, None].tolist()
    answer = ask(triton, "infer", running, images=images, outputs=outputs, parameters={"class": 3})
    (explained,) = explain(running, image(digits.images[0]), classes=[3, 7]).results
    three, seven = (np.reshape(one.relevance.values, (28, 28)) for one in explained.classes)
    np.testing.assert_allclose(answer["relevance"][0], three, rtol=0, atol=1e-6)
    poses = np.asarray(graph(running, "classify")({"images": digits.images[:1, None]})["poses"], np.float32)
    np.testing.assert_allclose(answer["reconstruction"], drawn(running, poses[:, 3], [3]), rtol=0, atol=1e-6)

    request = one(digits)
    request.parameters["class"].int64_param = 3
    request.outputs.add(name="relevance").parameters["class"].int64_param = 7
    request.outputs.add(name="reconstruction")
    raw = stub.ModelInfer(request, timeout=PATIENCE).raw_output_contents
    np.testing.assert_allclose(np.frombuffer(raw[0], "<f4"), seven.ravel(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.frombuffer(raw[1], "<f4"), answer["reconstruction"].ravel(), rtol=0, atol=1e-6)


def test_outputs_that_are_not_named_are_not_computed(triton: Ask, running: Running, digits: Digits) -> None:
    graphs = running.server.repository.get(MNIST, "").graphs

    def batches() -> list[int]:
        return [graphs[name].metrics.statistics.execution_count for name in ("classify", "explain", "decoder")]

    before, images = batches(), digits.images[:1, None].tolist()
    assert list(ask(triton, "infer", running, images=images)) == ["probabilities", "poses"]
    assert list(ask(triton, "infer", running, images=images, outputs={"confidence": 0})) == ["confidence"]
    assert [now - then for now, then in zip(batches(), before, strict=True)] == [2, 0, 0]
    assert list(ask(triton, "stream", running, images=images, outputs={"couplings": 0})) == ["couplings"]
    assert [now - then for now, then in zip(batches(), before, strict=True)] == [2, 1, 0]


@pytest.mark.parametrize("outputs", [{}, {"poses": 0, "contributions": 0}], ids=["network", "explained"])
@pytest.mark.parametrize("call", ["async_infer", "aio_infer", "aio_stream"])
def test_floats_and_files_are_answered_as_their_pixels(
    call: str, outputs: dict[str, int], triton: Ask, running: Running, digits: Digits
) -> None:
    pixels = digits.images[:8]
    requests: list[dict[str, Any]] = [
        {"images": pixels[:, None].tolist()},
        {"images": (pixels[:, None] / 255).tolist(), "datatype": "FP32"},
        {"images": pixels[:, None].tolist(), "datatype": "FP32", "parameters": {"pixel_max": 255}},
        {"images": in_base_64(*map(png, pixels)), "datatype": "BYTES"},
    ]
    requests = [{"model_name": MNIST, "outputs": outputs, **request} for request in requests]
    if call == "aio_stream":
        answers = triton(call, running.address, requests)
    else:
        answers = [triton(call, running.address, **request) for request in requests]
    first, *others = (answer["outputs"] for answer in answers)
    assert list(first) == list(outputs or ("probabilities", "poses"))
    for other in others:
        for name, values in first.items():
            np.testing.assert_allclose(other[name], values, rtol=0, atol=1e-6)


def test_pictures_are_prepared_where_a_request_asks_for_it(
    triton: Ask, stub: GRPCInferenceServiceStub, running: Running
) -> None:
    files = [(DATA / "handwritten" / name).read_bytes() for name in ("3a.jpg", "7b.png")]
    auto = {"parameters": {"preprocess": "auto"}, "datatype": "BYTES"}
    answer = ask(triton, "infer", running, images=in_base_64(*files), **auto)
    sent = [capsnet_pb2.Image(encoded=file, preprocess=capsnet_pb2.PREPROCESS_AUTO) for file in files]
    for found, result in zip(answer["probabilities"], classify(running, *sent), strict=True):
        np.testing.assert_allclose(found, [one.probability for one in result.capsules], rtol=0, atol=1e-6)

    request = pb.ModelInferRequest(model_name=MNIST)
    request.inputs.add(name="images", datatype="BYTES", shape=(2, 1)).contents.bytes_contents.extend(files)
    request.inputs[0].parameters["preprocess"].string_param = "auto"
    raw = stub.ModelInfer(request, timeout=PATIENCE).raw_output_contents[0]
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), answer["probabilities"].ravel(), rtol=0, atol=1e-6)
    del request.inputs[0].parameters["preprocess"]
    code, text = refusal(stub, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("inputs[0].contents.bytes_contents[0]: a JPEG image of ")


def test_values_come_in_contents_if_a_request_asks_for_it(stub: GRPCInferenceServiceStub, digits: Digits) -> None:
    request = one(digits, 2)
    request.outputs.add(name="couplings")
    request.outputs.add(name="confidence").parameters["classification"].int64_param = 20
    raw = stub.ModelInfer(request, timeout=PATIENCE)
    request.parameters["binary_data_output"].bool_param = False
    answer = stub.ModelInfer(request, timeout=PATIENCE)
    assert len(raw.raw_output_contents) == 2 and not answer.raw_output_contents
    couplings, texts = answer.outputs
    assert (list(couplings.shape), list(texts.shape), texts.datatype) == ([2, 3, 10, 100], [2, 10], "BYTES")
    numbers = np.frombuffer(raw.raw_output_contents[0], "<f4")
    np.testing.assert_allclose(couplings.contents.fp32_contents, numbers, rtol=0, atol=1e-6)
    assert [text.split(b":")[1:] for text in texts.contents.bytes_contents[::10]] == [[b"7", b"7"], [b"2", b"2"]]


@pytest.mark.parametrize("count", [1, 8])
def test_empty_contents_beside_raw_ones_do_no_harm(count: int, stub: GRPCInferenceServiceStub, digits: Digits) -> None:
    request = one(digits, count)
    request.inputs[0].contents.SetInParent()
    assert len(stub.ModelInfer(request, timeout=PATIENCE).raw_output_contents) == 2
    request.inputs[0].contents.uint_contents.append(1)
    text = "inputs[0].contents: came with raw_input_contents; expected one of the two"
    assert refusal(stub, request) == (grpc.StatusCode.INVALID_ARGUMENT, text)


def test_all_classes_come_if_more_are_asked_for(triton: Ask, running: Running, digits: Digits) -> None:
    images, outputs = digits.images[:1, None].tolist(), {"probabilities": 20, "confidence": 3}
    answer = ask(triton, "infer", running, images=images, outputs=outputs)
    assert sorted(text.split(":")[2] for text in answer["probabilities"][0]) == list("0123456789")
    confidences = [float(text.split(":")[0]) for text in answer["confidence"][0]]
    assert len(confidences) == 3 and confidences == sorted(confidences, reverse=True)


def test_a_wrong_request_for_further_outputs_is_refused_by_its_field(
    stub: GRPCInferenceServiceStub, triton: Ask, running: Running, digits: Digits
) -> None:
    many = one(digits, 9)
    many.outputs.add(name="relevance")
    text = "inputs[0].shape: 9 images with the output 'relevance'; expected 1 to 8 (max_explained_images)"
    assert refusal(stub, many) == (grpc.StatusCode.INVALID_ARGUMENT, text)
    other = one(digits)
    other.outputs.add(name="reconstruction").parameters["class"].int64_param = 10
    text = 'outputs[0].parameters["class"]: 10; expected 0 to 9'
    assert refusal(stub, other) == (grpc.StatusCode.INVALID_ARGUMENT, text)
    late = one(digits)
    late.outputs.add(name="relevance")
    late.parameters["timeout"].int64_param = 1
    assert refusal(stub, late)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    bad = {"model_name": MNIST, "images": digits.images[:9, None].tolist(), "outputs": {"couplings": 0}}
    good = {**bad, "images": digits.images[:8, None].tolist(), "request_id": "good"}
    wrong = {**good, "parameters": {"sequence_id": 5}} | {"outputs": {"reconstruction": 0}, "priority": 1}
    del wrong["parameters"]
    refused, answered, last = triton("stream", running.address, [bad, good, wrong])
    assert refused["error"].startswith("inputs[0].shape: 9 images with the output 'couplings'")
    assert (answered["id"], list(answered["outputs"])) == ("good", ["couplings"])
    assert answered["parameters"] == {"triton_final_response": True}
    assert list(last["outputs"]) == ["reconstruction"]


@pytest.mark.parametrize("name", [MNIST, PAIRS])
def test_config_metadata_and_the_files_of_the_export_agree(
    name: str, triton: Ask, stub: GRPCInferenceServiceStub, running: Running
) -> None:
    exported = pb.ModelConfig()
    text_format.Parse((ROOT / "models" / name / "config.pbtxt").read_text(), exported, allow_unknown_field=True)
    config = stub.ModelConfig(pb.ModelConfigRequest(name=name), timeout=PATIENCE).config
    assert (list(config.input), list(config.output)) == (list(exported.input), list(exported.output))
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=name), timeout=PATIENCE)
    for described, tensors in ((metadata.inputs, config.input), (metadata.outputs, config.output)):
        assert [(one.name, list(one.shape)) for one in described] == [(one.name, [-1, *one.dims]) for one in tensors]
        assert [f"TYPE_{one.datatype}" for one in described] == [pb.DataType.Name(one.data_type) for one in tensors]
    assert config.parameters["input_datatypes"].string_value == "UINT8, FP32, BYTES"

    optional = {key.partition(".")[2]: value.string_value for key, value in config.parameters.items() if "." in key}
    assert sorted(optional) == sorted(FURTHER)
    shape = running.server.repository.get(name, "").artifact.image_shape
    images = np.zeros((1, *shape), np.uint8).tolist()
    outputs = dict.fromkeys(FURTHER, 0)
    answer = ask(triton, "infer", running, model_name=name, images=images, outputs=outputs)
    assert {key: f"FP32 {list(values.shape[1:])}" for key, values in answer.items()} == optional
    if name == MNIST:
        assert {key: f"FP32 {value}" for key, value in SHAPES.items()} == {key: optional[key] for key in SHAPES}
