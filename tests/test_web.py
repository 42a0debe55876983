"""Tests of the HTTP port: its routes, and the same answers as gRPC's."""

import asyncio
import base64
import gzip
import io
import json
import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from PIL import Image

from benchmarks.attacks.packed import empty_gzip
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2
from serving.errors import QueueFull, Unauthenticated
from serving.rpc.status import status_of
from serving.transport.headers import Status
from serving.transport.methods import UNDECIDED, Abort, CallbackMethod, Context, Table, UnaryMethod
from serving.web import documents
from serving.web.forms import from_pictures, from_query
from serving.web.incoming import JSON, BodyLimits, Incoming
from serving.web.json_messages import to_json
from serving.web.json_requests import read_message
from serving.web.page import read_page
from serving.web.problems import Problem, problem_of
from serving.web.routes import ROUTES, Body, Route
from serving.web.tensors import HEADER_LENGTH, read_infer
from tests.conftest import DATA, Digits, Running
from tests.web_client import Answer, ask, form, serving

SEVEN = (DATA / "seven.png").read_bytes()
CLASSIFY, EXPLAIN, RECONSTRUCT = (f"/capsnet.v1.CapsNetService/{one}" for one in ("Classify", "Explain", "Reconstruct"))
LIMITS = BodyLimits(4, 100_000)
MODEL = "capsnet-mnist"
INFER = f"/v2/models/{MODEL}/infer"


@pytest.fixture(scope="module")
def port(running: Running) -> int:
    return running.server.http_port


def incoming(body: bytes = b"", content_type: str = "", query: str = "", **headers: str) -> Incoming:
    pairs = [tuple(one.split("=", 1)) for one in query.split("&") if one]
    return Incoming({}, pairs, {"content-type": content_type, **headers}, body, LIMITS)  # type: ignore[arg-type]


def called(running: Running, route: Route, message: Message) -> dict[str, Any]:
    """Return the answer of the route's method over gRPC, in JSON."""
    data = running.channel.unary_unary(route.method, bytes, bytes)(message.SerializeToString(), timeout=20)
    return to_json(route.response.FromString(data))


@pytest.mark.parametrize("route", [one for one in ROUTES if one.body is Body.NONE], ids=lambda one: one.path)
def test_every_description_is_that_of_grpc(running: Running, port: int, route: Route) -> None:
    answer = ask(port, route.path.format(name=MODEL, version="1"))
    assert (answer.status, answer.fields["content-type"]) == (200, "application/json")
    message = route.request()
    for name, value in (("name", MODEL), ("version", "1")):
        if name in route.places:
            setattr(message, name, value)
    expected = called(running, route, message)
    if "config" in expected:
        expected = expected["config"]
    if route.path.endswith("/ready"):
        expected = {"name": MODEL, **expected}
    shown = answer.json
    for changing in ("tuning",):
        expected.pop(changing, None), shown.pop(changing, None)
    assert shown == expected


def test_a_picture_is_classified_in_each_form_as_over_grpc(running: Running, port: int) -> None:
    expected = to_json(running.classify(pb.Image(encoded=SEVEN), pb.Image(encoded=SEVEN)))
    one = {**expected, "results": expected["results"][:1]}  # type: ignore[index]
    body, content_type = form(("image", SEVEN), ("image", SEVEN), ("model_name", MODEL))
    alone, _ = form(("image", SEVEN), ("model_version", "1"))
    encoded = base64.b64encode(SEVEN).decode()
    given = json.dumps({"images": [{"encoded": encoded}, {"encoded": encoded}]})
    for wanted, content, kind, query in (
        (expected, body, content_type, ""),
        (one, alone, content_type, ""),
        (one, SEVEN, "image/png", "?model_version=1"),
        (one, SEVEN, "application/octet-stream", f"?model_name={MODEL}"),
        (one, SEVEN, "application/x-www-form-urlencoded", ""),
        (expected, given, "application/json", ""),
        (expected, gzip.compress(given.encode()), "application/json", ""),
    ):
        packed = {"content_encoding": "gzip"} if content[:2] == b"\x1f\x8b" else {}
        answer = ask(port, f"/v1/classify{query}", content, content_type=kind, **packed)
        assert answer.status == 200, answer.body
        assert close(answer.json, wanted)


def close(given: Any, expected: object) -> bool:
    """Return True if two values in JSON are the same, and their numbers differ by less than 1e-6."""
    if isinstance(expected, dict):
        return set(given) == set(expected) and all(close(given[key], one) for key, one in expected.items())
    if isinstance(expected, list):
        return len(given) == len(expected) and all(map(close, given, expected))
    if isinstance(expected, float):
        return bool(abs(given - expected) < 1e-6)
    return bool(given == expected)


def test_pixels_are_classified_from_a_body_of_bytes(port: int, digits: Digits) -> None:
    answer = ask(port, "/v1/classify", digits.images[0].tobytes(), content_type="application/octet-stream")
    assert answer.json["results"][0]["label"] == str(digits.labels[0])


def infer(port: int, content: Any, binary: bytes | None = None, path: str = INFER) -> Answer:
    text = json.dumps(content).encode()
    if binary is None:
        return ask(port, path, text)
    return ask(port, path, text + binary, inference_header_content_length=str(len(text)))


@pytest.fixture(scope="module")
def inferred(running: Running, digits: Digits) -> dict[str, Any]:
    """Return what gRPC answers to two digits: probabilities and poses."""
    request = inference_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[digits.images[:2].tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=(2, 1, 28, 28))
    call = running.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", bytes, bytes)
    response = inference_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=20))
    raws = zip(response.outputs, response.raw_output_contents, strict=True)
    return {one.name: np.frombuffer(raw, "<f4") for one, raw in raws}


def test_tensors_in_json_and_in_binary_give_the_numbers_of_grpc(
    port: int, digits: Digits, inferred: dict[str, Any]
) -> None:
    images = digits.images[:2].reshape(2, 1, 28, 28)
    shape: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": [2, 1, 28, 28]}
    sized = {**shape, "parameters": {"binary_data_size": images.size}}
    for answer in (
        infer(port, {"id": "a", "inputs": [{**shape, "data": images.tolist()}]}),
        infer(port, {"id": "a", "inputs": [{**shape, "data": images.ravel().tolist()}]}),
        infer(port, {"id": "a", "inputs": [sized]}, images.tobytes()),
        infer(port, {"id": "a", "inputs": [sized]}, images.tobytes(), f"/v2/models/{MODEL}/versions/1/infer"),
    ):
        assert answer.status == 200, answer.body
        shown = answer.json
        assert (shown["model_name"], shown["model_version"], shown["id"]) == (MODEL, "1", "a")
        assert [(one["name"], one["datatype"], one["shape"]) for one in shown["outputs"]] == [
            ("probabilities", "FP32", [2, 10]), ("poses", "FP32", [2, 10, 16]),
        ]  # fmt: skip
        for one in shown["outputs"]:
            assert np.abs(np.array(one["data"]) - inferred[one["name"]]).max() < 1e-6


def test_outputs_are_binary_where_the_request_asks_for_it(port: int, digits: Digits, inferred: dict[str, Any]) -> None:
    sized = {"name": "images", "datatype": "UINT8", "shape": [2, 1, 28, 28], "parameters": {"binary_data_size": 1568}}
    content = {
        "inputs": [sized],
        "parameters": {"binary_data_output": True, "priority": 1},
        "outputs": [{"name": "poses", "parameters": {"binary_data": False}}, {"name": "probabilities"}],
    }
    answer = infer(port, content, digits.images[:2].tobytes())
    assert (answer.status, answer.fields["content-type"]) == (200, "application/octet-stream")
    length = int(answer.fields["inference-header-content-length"])
    header, binary = json.loads(answer.body[:length]), answer.body[length:]
    assert [one["name"] for one in header["outputs"]] == ["poses", "probabilities"]
    assert header["outputs"][1]["parameters"] == {"binary_data_size": len(binary)} and "data" in header["outputs"][0]
    assert np.abs(np.frombuffer(binary, "<f4") - inferred["probabilities"]).max() < 1e-6


def test_the_most_probable_classes_come_as_text(port: int, digits: Digits) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 28, 28], "data": digits.images[0].tolist()}
    output: dict[str, Any] = {"name": "probabilities", "parameters": {"classification": 2}}
    [answered] = infer(port, {"inputs": [tensor], "outputs": [output]}).json["outputs"]
    assert (answered["datatype"], answered["shape"]) == ("BYTES", [1, 2])
    assert answered["data"][0].split(":")[1:] == [str(digits.labels[0])] * 2
    output["parameters"]["binary_data"] = True
    answer = infer(port, {"inputs": [tensor], "outputs": [output]})
    assert b":7" in answer.body[int(answer.fields["inference-header-content-length"]) :]


def test_floats_files_and_further_outputs_are_those_of_grpc(running: Running, port: int, digits: Digits) -> None:
    names = ("couplings", "contributions", "relevance", "reconstruction")
    request = inference_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[digits.images[0].tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=(1, 1, 28, 28))
    for name in names:
        request.outputs.add(name=name)
    request.parameters["class"].int64_param = 3
    call = running.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", bytes, bytes)
    response = inference_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=20))
    shared: dict[str, Any] = {"outputs": [{"name": name} for name in names], "parameters": {"class": 3}}
    floats = {"name": "images", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": (digits.images[0] / 255).tolist()}
    buffer = io.BytesIO()
    Image.fromarray(digits.images[0]).save(buffer, "PNG")
    file = struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue()
    sized = {"name": "images", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(file)}}
    for answer in (infer(port, {**shared, "inputs": [floats]}), infer(port, {**shared, "inputs": [sized]}, file)):
        assert answer.status == 200, answer.body
        for one, described, raw in zip(
            answer.json["outputs"], response.outputs, response.raw_output_contents, strict=True
        ):
            assert (one["name"], one["shape"]) == (described.name, list(described.shape))
            np.testing.assert_allclose(one["data"], np.frombuffer(raw, "<f4"), rtol=0, atol=1e-6)


TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 28, 28]}
FILES = {"name": "images", "datatype": "BYTES", "shape": [1]}
IN_BASE64 = {"parameters": {"content_type": "base64"}}
CHOSEN = {"name": "probabilities", "parameters": {"classification": 1}}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([], "body"),
        ({"inputs": [{**TENSOR, "data": [300] * 784}]}, "inputs[0].data[0]"),
        ({"inputs": [{**TENSOR, "data": [0] * 783 + [0.5]}]}, "inputs[0].data[783]"),
        ({"inputs": [{**TENSOR, "data": [True] * 784}]}, "inputs[0].data[0]"),
        ({"inputs": [{**TENSOR, "data": [0] * 783}]}, "raw_input_contents[0]"),
        ({"inputs": [TENSOR]}, "inputs[0].data"),
        ({"inputs": [{**TENSOR, "data": {}}]}, "inputs[0].data"),
        (
            {"inputs": [{**TENSOR, "parameters": {"shared_memory_region": "a", "shared_memory_byte_size": 784}}]},
            'inputs[0].parameters["shared_memory_region"]',
        ),
        ({"inputs": [{**TENSOR, "datatype": "WORD", "data": [0]}]}, "inputs[0].datatype"),
        ({"inputs": [{**TENSOR, "shape": [1, -1], "data": [0]}]}, "inputs[0].shape"),
        ({"inputs": [{**TENSOR, "shape": "x", "data": [0]}]}, "inputs[0].shape"),
        ({"inputs": [{**TENSOR, "name": 1, "data": [0]}]}, "inputs[0].name"),
        ({"inputs": [{**TENSOR, "parameters": {"binary_data_size": 784}}]}, "inputs[0].parameters['binary_data_size']"),
        ({"inputs": [], "parameters": {"a": []}}, "parameters['a']"),
        ({"inputs": [], "parameters": {"a": 2**64}}, "parameters['a']"),
        ({"inputs": 1}, "inputs"),
        ({"inputs": [[]]}, "inputs[0]"),
        ({"inputs": [{**TENSOR, "data": [0] * 784}], "outputs": [{"name": "x"}]}, "outputs[0].name"),
        ({"inputs": [], "id": 5}, "id"),
        ({"inputs": [{**FILES, "data": ["/9j/4AAQ"]}]}, "inputs[0].data[0]"),
        ({"inputs": [{**FILES, "data": ["iVBO", "é"], **IN_BASE64}]}, "inputs[0].data[1]"),
        ({"inputs": [{**FILES, "data": ["iVB"], **IN_BASE64}]}, "inputs[0].data[0]"),
    ],
)
def test_a_wrong_tensor_is_named(port: int, content: Any, field: str) -> None:
    answer = infer(port, content)
    assert (answer.status, answer.fields["content-type"]) == (400, "application/problem+json")
    shown = answer.json
    assert shown["field_violations"][0]["field"] == field
    assert shown["error"] == shown["detail"], "as the Open Inference Protocol calls it"


def test_a_picture_in_json_is_base64_and_an_error_says_so(port: int) -> None:
    data = [[base64.b64encode(SEVEN).decode()]]
    [answered] = infer(port, {"inputs": [{**FILES, "data": data, **IN_BASE64}], "outputs": [CHOSEN]}).json["outputs"]
    assert answered["data"][0].endswith(":7")
    detail = infer(port, {"inputs": [{**FILES, "data": data}]}).json["detail"]
    assert 'expected the parameter "content_type" of "base64" beside it, or "binary_data_size" and binary' in detail


def test_binary_data_must_be_as_long_as_its_header_says(port: int) -> None:
    sized = {**TENSOR, "parameters": {"binary_data_size": 784}}
    assert infer(port, {"inputs": [sized]}, bytes(783)).json["field_violations"][0]["field"].startswith("inputs[0]")
    assert infer(port, {"inputs": [sized]}, bytes(785)).json["field_violations"][0]["field"] == "body"
    for length in ("0", "-1", "9" * 20, "x", "10000"):
        answer = ask(port, INFER, b"{}", inference_header_content_length=length)
        assert answer.json["field_violations"][0]["field"] == "inference-header-content-length"


def test_numbers_of_every_type_become_raw_contents() -> None:
    asked: list[inference_pb2.ModelInferRequest] = []

    async def answer(data: bytes, context: Context) -> bytes:
        asked.append(inference_pb2.ModelInferRequest.FromString(data))
        return inference_pb2.ModelInferResponse().SerializeToString()

    values: dict[str, tuple[list[Any], bytes]] = {
        "BOOL": ([True, False], b"\x01\x00"),
        "INT8": ([[-1], [2]], b"\xff\x02"),
        "UINT16": ([1, 258], b"\x01\x00\x02\x01"),
        "INT64": ([-(2**63)], b"\x00" * 7 + b"\x80"),
        "UINT64": ([2**64 - 1], b"\xff" * 8),
        "FP16": ([1], b"\x00\x3c"),
        "FP32": ([0.5], b"\x00\x00\x00\x3f"),
        "FP64": ([-2], b"\x00" * 7 + b"\xc0"),
        "BYTES": (["é", ""], b"\x02\x00\x00\x00\xc3\xa9\x00\x00\x00\x00"),
    }
    inputs = [{"name": "x", "datatype": kind, "shape": [1], "data": data} for kind, (data, _) in values.items()]
    with serving({"/inference.GRPCInferenceService/ModelInfer": UnaryMethod(answer)}) as web:
        parameters = {"a": 1, "b": 2**63, "c": 0.5, "d": "x", "e": True, "f": None}
        assert infer(web.port, {"inputs": inputs, "parameters": parameters}).status == 200
        assert infer(web.port, {"inputs": [{**inputs[3], "data": [2**63]}]}).status == 400
    [request] = asked
    assert list(request.raw_input_contents) == [raw for _, raw in values.values()]
    kinds = {name: one.WhichOneof("parameter_choice") for name, one in request.parameters.items()}
    assert kinds == {
        "a": "int64_param", "b": "uint64_param", "c": "double_param", "d": "string_param", "e": "bool_param",
    }  # fmt: skip


def test_the_repository_is_listed_as_triton_does_it(port: int) -> None:
    for body in (b"", b"{}", b'{"ready": true}'):
        [model] = ask(port, "/v2/repository/index", body).json
        assert (model["name"], model["state"]) == (MODEL, "READY")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/systemsharedmemory/status", "shared memory is not supported; send the tensors in the messages"),
        ("/v2/systemsharedmemory/region/a/register", "shared memory is not supported"),
        ("/v2/cudasharedmemory/unregister", "shared memory is not supported"),
        ("/v2/trace/setting", "settings of traces are not supported; the server's --trace-endpoint"),
        ("/v2/models/capsnet-mnist/trace/setting", "settings of traces are not supported"),
        ("/v2/logging", "settings of the log are not supported; the server's --log-level"),
        ("/v2/repository/models/capsnet-mnist/load", "not on this port; the server's --admin-port opens a port"),
        ("/v2/repository/models/capsnet-mnist/unload", "not on this port; the server's --admin-port opens a port"),
    ],
)
def test_what_only_triton_has_is_refused_with_the_reason(port: int, path: str, text: str) -> None:
    for body in (None, b"{}"):
        answer = ask(port, path, body)
        assert (answer.status, answer.json["code"]) == (501, "UNIMPLEMENTED")
        assert answer.json["error"].partition(": ")[2].startswith(text)


def test_a_model_that_is_not_served_is_not_ready(port: int) -> None:
    answer = ask(port, "/v2/models/other/ready")
    assert (answer.status, answer.json) == (503, {"name": "other", "ready": False})


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "text"),
    [
        ("/nothing", None, {}, 404, "path: not here"),
        ("/v1/classify/", b"", {}, 404, "path: not here"),
        ("/v1/classify", None, {}, 405, "method: expected POST"),
        ("/v1/model", b"", {}, 405, "method: expected GET, HEAD"),
        ("/v1/model?model_name=other", None, {}, 404, "'other' is not served"),
        ("/v1/model?colour=red", None, {}, 400, "colour: no parameter of this path"),
        ("/v1/model?model_name=a&model_name=b", None, {}, 400, "model_name: came more than once"),
        ("/v1/classify", b"hello", {"content_type": "text/plain"}, 415, "content-type: 'text/plain'"),
        ("/v1/classify", b"hello", {"content_type": "image/png"}, 400, "images[0].pixels: 5 bytes"),
        ("/v1/classify", b"{", {"content_type": "application/json"}, 400, "no JSON"),
        ("/v1/classify", b'{"images": 3}', {"content_type": "application/json"}, 400, "images: a value of the kind"),
        ("/v1/classify", b'{"image": []}', {"content_type": "application/json"}, 400, 'no field named "image"'),
        ("/v1/classify", b"[" * 2500, {"content_type": "application/json"}, 400, "at most 64 levels"),
        ("/v1/classify", b"[" * 200_000, {"content_type": "application/json"}, 400, "lists and objects"),
        ("/v1/classify", b'{"x": NaN}', {"content_type": "application/json"}, 400, "NaN is no number"),
        ("/v1/classify", b'{"\\ud800": 1}', {"content_type": "application/json"}, 400, "half of a character"),
        ("/v1/classify", b"\xff", {"content_type": "application/json"}, 400, "no JSON"),
        ("/v1/classify", b"," * 1_600_001, {"content_type": "application/json"}, 400, "at most 196608 values"),
        ("/v2/models/m/infer", b"," * 1_600_001, {}, 400, "at most 1600000 values"),
        ("/v1/classify", b'"' * 131_073, {"content_type": "application/json"}, 400, "at most 65536 names and texts"),
        ("/v1/classify", b"\\n" * 262_145, {"content_type": "application/json"}, 400, "at most 262144 characters"),
        ("/v1/classify", b" " * 2**23 + b"\xc3\xa9", {"content_type": "application/json"}, 400, "ASCII alone"),
        ("/v1/classify?preprocess=auto", b"{}", {"content_type": "application/json"}, 400, "with JSON, expected it in"),
        ("/v1/classify", b"x", {"content_encoding": "br"}, 415, "content-encoding: 'br'"),
        ("/v1/classify", b"xyz" * 9, {"content_encoding": "gzip"}, 400, "cannot be unpacked by gzip"),
        ("/v1/classify", gzip.compress(bytes(13_000_000)), {"content_encoding": "gzip"}, 413, "max_request_bytes"),
        ("/v1/classify", empty_gzip(12_000_000), {"content_encoding": "gzip"}, 400, "take too long to unpack"),
        ("/v1/classify", gzip.compress(b"{}") + b"x", {"content_encoding": "gzip"}, 400, "which gzip does not end"),
        ("/v1/classify", b"x", {"content_type": "multipart/form-data"}, 400, "cannot be read as a form"),
        ("/v1/classify", b"x", {"x_request_timeout": "soon"}, 400, "x-request-timeout: 'soon'"),
        ("/v1/classify", b"x", {"x_request_timeout": "nan"}, 400, "x-request-timeout: 'nan'"),
        ("/v2/models/other/infer", b'{"inputs": []}', {}, 404, "'other' is not served"),
    ],
)
def test_each_kind_of_error_is_a_problem(
    port: int, path: str, body: bytes | None, headers: dict[str, str], status: int, text: str
) -> None:
    answer = ask(port, path, body, **headers)
    assert (answer.status, answer.fields["content-type"]) == (status, "application/problem+json")
    shown = answer.json
    assert shown["status"] == status and text in shown["detail"]
    if status == 405:
        assert answer.fields["allow"]


def test_every_status_of_grpc_has_one_of_http() -> None:
    expected = {
        "INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503,
        "DEADLINE_EXCEEDED": 504, "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "UNIMPLEMENTED": 501,
        "INTERNAL": 500, "UNKNOWN": 500, "DATA_LOSS": 500,
    }  # fmt: skip
    for name, status in expected.items():
        problem = problem_of(Status(grpc.StatusCode[name], "text"))
        assert (problem.status, json.loads(problem.body())["code"]) == (status, name)
    assert problem_of(Status(grpc.StatusCode.UNAUTHENTICATED, "")).headers == {"WWW-Authenticate": "Bearer"}
    assert problem_of(status_of(QueueFull("full", 1.2))).headers == {"Retry-After": "2"}
    assert problem_of(status_of(QueueFull("full", 0.001))).headers == {"Retry-After": "1"}


def test_a_request_is_made_of_every_field_of_its_message() -> None:
    body, kind = form(
        ("image", SEVEN), ("classes", "3,5"), ("changes", "3:0.5,4:-1"), ("sweep", "2:-0.25:0.25:11"),
        ("format", "png"), ("preprocess", "AUTO"), ("model_name", "m"),
    )  # fmt: skip
    request = from_pictures(incoming(body, kind, "model_version=2&classes=7"), pb.ReconstructRequest)
    assert (request.model_name, request.model_version, list(request.classes)) == ("m", "2", [7, 3, 5])
    assert request.image == pb.Image(encoded=SEVEN, preprocess=pb.PREPROCESS_AUTO)
    assert [(one.dimension, one.delta) for one in request.changes] == [(3, 0.5), (4, -1.0)]
    assert request.sweep == pb.Sweep(dimension=2, first=-0.25, last=0.25, steps=11)
    assert request.format == pb.FORMAT_PNG
    explain = from_pictures(
        incoming(SEVEN, "image/png", "parts=routing,EXPLANATION_PART_RELEVANCE&classes=1"), pb.ExplainRequest
    )
    assert list(explain.parts) == [pb.EXPLANATION_PART_ROUTING, pb.EXPLANATION_PART_RELEVANCE]
    classify = from_pictures(incoming(SEVEN, "image/png", "reconstruction_error=true"), pb.ClassifyRequest)
    assert classify.reconstruction_error and classify.images == [pb.Image(encoded=SEVEN)]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("classes=x", "classes"),
        ("classes=-1", "classes"),
        ("classes=4294967296", "classes"),
        ("classes=" + "9" * 5000, "classes"),
        ("changes=3", "changes"),
        ("changes=3:x", "changes.delta"),
        ("changes=3:nan", "changes.delta"),
        ("changes=3:1e39", "changes.delta"),
        ("sweep=1:2:3", "sweep"),
        ("format=gif", "format"),
        ("preprocess=9", "preprocess"),
        ("poses=1", "poses"),
        ("image=x", "image"),
    ],
)
def test_a_wrong_parameter_is_named(query: str, field: str) -> None:
    with pytest.raises(Problem) as raised:
        from_pictures(incoming(SEVEN, "image/png", query), pb.ReconstructRequest)
    [violation] = json.loads(raised.value.body())["field_violations"]
    assert violation["field"] == field


def test_the_parts_of_a_form_are_limited() -> None:
    def refused(*parts: tuple[str, bytes | str]) -> str:
        with pytest.raises(Problem) as raised:
            from_pictures(incoming(*form(*parts)), pb.ClassifyRequest)
        return raised.value.detail

    assert "max_images_per_request" in refused(*[("image", SEVEN)] * 5)
    assert "max_image_bytes" in refused(("image", bytes(100_001)))
    assert "64 parts" in refused(*[("model_name", "x")] * 65)
    assert "16384 bytes" in refused(("model_name", "x" * 16385))
    assert "no UTF-8" in refused(("model_name", b"\xff"))
    assert "cannot be read as a form" in refused(("x" * 100_000, ""))
    body, kind = form(("image", SEVEN))
    for broken in (body[:-6], body[:50], b"", body.replace(b"edge", b"else")):
        with pytest.raises(Problem):
            from_pictures(incoming(broken, kind), pb.ClassifyRequest)
    with pytest.raises(Problem, match="2 pictures; expected one"):
        from_pictures(incoming(*form(("image", SEVEN), ("image", SEVEN))), pb.ReconstructRequest)
    with pytest.raises(Problem, match="no parameter"):
        from_query(incoming(query="images=1"), pb.GetModelRequest)


def test_messages_in_json_are_those_of_protobuf_but_for_long_integers() -> None:
    one = pb.ClassCapsule(label="é", probability=0.1, pose=[0.25, 1e-30, 3.4e38, 1 / 3])
    answer = pb.ClassifyResponse(results=[pb.Classification(capsules=[one], verdict=pb.VERDICT_OK, present=["a"])])
    drawn = pb.ReconstructResponse(results=[pb.Reconstruction(image=b"\x00\xff", delta=-0.1)])
    described = pb.GetModelResponse(tuning=pb.Tuning(image_seconds=0.1), primary_capsules=pb.PrimaryCapsules(offset=-3))
    for message in (answer, drawn, described, pb.ExplainResponse(), pb.Classification(reconstruction_error=0.0)):
        assert to_json(message) == json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    tensor = inference_pb2.ModelMetadataResponse.TensorMetadata(name="x", shape=[-1, 2**62])
    assert to_json(tensor) == {"name": "x", "datatype": "", "shape": [-1, 2**62]}
    parameters = inference_pb2.ModelInferResponse(parameters={"a": inference_pb2.InferParameter(bool_param=True)})
    assert to_json(parameters)["parameters"] == {"a": {"bool_param": True}}


def test_hostile_bodies_are_refused_as_problems() -> None:
    """Each body is a good one with other bytes in some places, the same ones each time."""
    chance = random.Random(0)
    body, kind = form(("image", SEVEN), ("classes", "3,5"), ("changes", "3:0.5"))
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
    texts = {"name": "y", "datatype": "BYTES", "shape": [2], "data": ["a", ["b"]]}
    output = {"name": "poses", "parameters": {"binary_data": True, "classification": 3}}
    infer = json.dumps({"inputs": [tensor, texts], "outputs": [output], "parameters": {"a": 1.5}}).encode()
    drawn = {"poses": {"poses": [{"class_index": 3, "pose": [0.5, 1]}]}, "sweep": {"steps": 3}, "format": "FORMAT_PNG"}
    others = [
        b"null",
        b"1e999",
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"9" * 30,
        b"\x00",
        b"\xff",
        b"--edge",
        b"\r\n\r\n",
        b",",
        b":",
    ]

    def changed(data: bytes) -> bytes:
        for _ in range(chance.randint(1, 5)):
            place = chance.randrange(len(data) + 1)
            data = data[:place] + chance.choice(others) + data[place + chance.randint(0, 8) :]
        return data

    def tensors() -> Message:
        header = changed(infer)
        return read_infer(incoming(header + bytes(4), **{HEADER_LENGTH: str(len(header))}), "m", "")

    refused = 0
    for turn in range(3000):
        try:
            match turn % 3:
                case 0:
                    message: Message = from_pictures(incoming(changed(body), kind), pb.ReconstructRequest)
                case 1:
                    message = tensors()
                case _:
                    message = read_message(changed(json.dumps(drawn).encode()), pb.ReconstructRequest, 1)
            message.SerializeToString()
        except Problem as problem:
            assert problem.status == 400 and json.loads(problem.body())["detail"]
            refused += 1
    assert 0 < refused < 3000


def fake(asked: list[Message]) -> Table:
    """Return methods that answer Explain at once and Reconstruct later, and keep the requests."""

    def explain(data: bytes, context: Context) -> None:
        asked.append(pb.ExplainRequest.FromString(data))
        relevance = pb.Map(height=1, width=1, values=[0.5])
        found = pb.Explanation(classes=[pb.ClassExplanation(label="7", relevance=relevance)])
        context.answer(pb.ExplainResponse(results=[found]).SerializeToString())

    async def reconstruct(data: bytes, context: Context) -> bytes:
        request = pb.ReconstructRequest.FromString(data)
        asked.append(request)
        if request.model_name == "none":
            raise Abort(Status(grpc.StatusCode.UNIMPLEMENTED, "the model has no decoder"))
        image = SEVEN if request.format == pb.FORMAT_PNG else bytes(784)
        results = [pb.Reconstruction(label="7", image=image)] * (request.sweep.steps or 1)
        return pb.ReconstructResponse(results=results).SerializeToString()

    return {EXPLAIN: CallbackMethod(explain), RECONSTRUCT: UnaryMethod(reconstruct)}


def test_explain_and_reconstruct_are_called_and_a_single_picture_is_sent_as_one() -> None:
    asked: list[Message] = []
    with serving(fake(asked)) as web:
        answer = ask(web.port, "/v1/explain?parts=relevance", SEVEN, content_type="image/png")
        assert answer.json["results"][0]["classes"][0]["relevance"] == {"height": 1, "width": 1, "values": [0.5]}
        assert asked[-1] == pb.ExplainRequest(images=[pb.Image(encoded=SEVEN)], parts=[pb.EXPLANATION_PART_RELEVANCE])
        answer = ask(web.port, "/v1/reconstruct", SEVEN, content_type="image/png")
        assert base64.b64decode(answer.json["results"][0]["image"]) == bytes(784)
        png = {"content_type": "image/png", "accept": "image/png,*/*;q=0.5"}
        answer = ask(web.port, "/v1/reconstruct?changes=3:0.5", SEVEN, **png)
        assert (answer.status, answer.fields["content-type"], answer.body) == (200, "image/png", SEVEN)
        answer = ask(web.port, "/v1/reconstruct?sweep=3:0:1:2", SEVEN, **png)
        assert [one["label"] for one in answer.json["results"]] == ["7", "7"], "several are no single picture"
        poses = json.dumps({"poses": {"poses": [{"class_index": 7, "pose": [0.5, -1]}]}, "changes": [{"dimension": 1}]})
        assert ask(web.port, "/v1/reconstruct", poses, content_type="application/json").status == 200
        request = asked[-1]
        assert isinstance(request, pb.ReconstructRequest)
        assert list(request.poses.poses[0].pose) == [0.5, -1.0] and request.changes[0].dimension == 1
        answer = ask(web.port, "/v1/reconstruct?model_name=none", SEVEN, content_type="image/png")
        assert (answer.status, answer.json["detail"]) == (501, "the model has no decoder")
        answer = ask(web.port, "/v1/classify", SEVEN, content_type="image/png")
        assert (answer.status, answer.json["code"]) == (501, "UNIMPLEMENTED")
        assert web.requests()["/v1/reconstruct", "200"] == 4


def test_a_fault_of_a_method_reaches_no_client_with_its_text(caplog: pytest.LogCaptureFixture) -> None:
    def explain(data: bytes, context: Context) -> None:
        raise ValueError("secret")

    async def reconstruct(data: bytes, context: Context) -> None:
        return None

    methods: Table = {EXPLAIN: CallbackMethod(explain), RECONSTRUCT: UnaryMethod(reconstruct)}
    with serving(methods) as web:
        for path in ("/v1/explain", "/v1/reconstruct"):
            answer = ask(web.port, path, SEVEN, content_type="image/png")
            assert (answer.status, answer.json["code"]) == (500, "INTERNAL")
            assert b"secret" not in answer.body
    assert "secret" in caplog.text and "ended without an answer" in caplog.text


def test_a_token_that_a_door_has_forgotten_again_is_refused_before_the_body_is_looked_at() -> None:
    door = lambda timeout, metadata, expected, peer: UNDECIDED  # noqa: E731
    method = UnaryMethod(lambda data, context: pytest.fail("a stranger has reached the method"), door)
    with serving({EXPLAIN: method}, Unauthenticated("authorization: the token is not valid")) as web:
        answer = ask(web.port, "/v1/explain", b"{", content_type=JSON, authorization="Bearer a.b")
    assert (answer.status, answer.json["code"]) == (401, "UNAUTHENTICATED")


def test_a_request_that_waits_is_held_by_its_method_alone() -> None:
    asked: list[bytes] = []
    others: list[int] = []

    def begin(data: bytes, context: Context) -> None:
        asked.append(data)

        def answer() -> None:
            others.append(sys.getrefcount(asked[0]) - sys.getrefcount(object()) - 1)
            context.answer(b"")

        asyncio.get_running_loop().call_soon(answer)

    with serving({CLASSIFY: CallbackMethod(begin)}) as web:
        assert ask(web.port, "/v1/classify", SEVEN * 100, content_type="image/png").status == 200
    assert asked[0] == pb.ClassifyRequest(images=[pb.Image(encoded=SEVEN * 100)]).SerializeToString()
    assert others == [0], "besides the list above"


def test_the_documents_need_nothing_from_elsewhere_and_name_every_path(port: int) -> None:
    description = ask(port, "/openapi.json").json
    assert {(path, verb.upper()) for path, item in description["paths"].items() for verb in item} == {
        *((one.path, one.verb) for one in ROUTES), ("/v2/health/live", "GET"), ("/v2/health/ready", "GET"),
    }  # fmt: skip
    page = ask(port, "/docs")
    text = page.body.decode()
    assert "http" not in text.replace("http://localhost:8000", "").replace("over HTTP", "").lower().replace("https", "")
    assert "<script" not in text and "style=" not in text
    assert "default-src 'none'" in page.fields["content-security-policy"]
    assert all(route.path in text for route in ROUTES)
    style = ask(port, "/documentation.css")
    assert style.fields["content-type"] == "text/css; charset=utf-8" and b"url(" not in style.body
    [icon] = re.findall(r'rel="icon" href="([^"]+)"', text)
    icons = [ask(port, path) for path in (icon, "/favicon.ico")]  # for which browsers ask beside other documents
    assert [(one.status, one.fields["content-type"]) for one in icons] == [(200, "image/svg+xml")] * 2
    again = ask(port, "/documentation.css", if_none_match=style.fields["etag"])
    assert (again.status, again.body) == (304, b"")


def test_a_page_has_the_files_of_its_folder_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("index.html", "page.js", "parts/page.css", "notes.txt", "secret"):
        (tmp_path / name).write_text(name)
    files = read_page(tmp_path)
    assert set(files) == {"/", "/index.html", "/page.js", "/parts/page.css"}
    assert files["/"].media == "text/html; charset=utf-8" and files["/page.js"].content == b"page.js"
    assert read_page(tmp_path / "missing") == {}
    monkeypatch.setattr(documents, "_PAGE", tmp_path)
    with serving({}) as web:
        answer = ask(web.port, "/")
        assert (answer.status, answer.body) == (200, b"index.html")
        policy = dict(one.strip().split(" ", 1) for one in answer.fields["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["script-src"] == "'self'"
        assert "unsafe" not in str(policy)
        assert ask(web.port, "/secret").status == ask(web.port, "/docs").status == 404


def test_every_answer_has_the_request_id_and_forbids_guesses_of_its_type(port: int) -> None:
    for answer in (ask(port, "/v2", x_request_id="abc"), ask(port, "/nothing", x_request_id="abc")):
        assert answer.fields["x-request-id"] == "abc"
        assert answer.fields["x-content-type-options"] == "nosniff"
        assert answer.fields["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.fields
        assert answer.fields["date"].endswith("GMT")
    assert len(ask(port, "/v2").fields["x-request-id"]) == 16
    assert ask(port, "/v2", verb="HEAD").body == b""


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"origin": "http://elsewhere.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "elsewhere.example:{port}"}, 421),
        ({"host": "1.elsewhere.example"}, 421),
    ],
)
def test_requests_of_foreign_pages_are_refused(port: int, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=port) for name, value in headers.items()}
    assert ask(port, "/v1/classify", SEVEN, content_type="image/png", **sent).status == status


def test_requests_are_counted_by_route_and_status(running: Running, port: int) -> None:
    ask(port, "/nothing")
    ask(port, "/v2/models/other/ready")
    text = ask(running.server.metrics_port, "/metrics").body.decode()
    assert 'capsnet_http_requests_total{code="503",route="/v2/models/{name}/ready"}' in text
    assert 'capsnet_http_requests_total{code="404",route=""}' in text
    assert 'capsnet_connections_accepted_total{port="http"}' in text
