"""Tests that a picture gets the same numbers over gRPC, HTTP, the Open Inference Protocol and the command line.

tests/test_web_page.py compares the numbers that the page gets.
"""

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.client import CapsNetClient
from serving.client.__main__ import main
from serving.server import Server
from tests.calibrated import MNIST, PAIRS, overlapped
from tests.conftest import DATA, ROOT, Ask, Digits, InThread, settings
from tests.web_client import ask

PATIENCE = 60
TOLERANCE = 1e-6
SEVEN, PHOTOGRAPH = DATA / "seven.png", DATA / "handwritten" / "3a.jpg"
#: The outputs of the Open Inference Protocol that have numbers of capsnet.v1.
OUTPUTS = ["probabilities", "poses", "confidence", "couplings", "contributions", "relevance", "reconstruction"]

Answered = TypeVar("Answered", bound=Message)
Numbers = dict[str, Any]


class Picture(NamedTuple):
    """A picture for a model, as a message and as a file for the command line and for curl. shape: (H, W) of pixels."""

    model: str
    image: pb.Image
    file: Path
    raw: Path
    shape: tuple[int, int]

    @property
    def prepared(self) -> bool:
        return self.image.preprocess == pb.PREPROCESS_AUTO


class Answers(NamedTuple):
    """The answers of capsnet.v1 for a picture."""

    classified: pb.ClassifyResponse
    explained: pb.ExplainResponse
    reconstructed: pb.ReconstructResponse


class Requests(NamedTuple):
    """The requests of capsnet.v1 for a picture."""

    classify: pb.ClassifyRequest
    explain: pb.ExplainRequest
    reconstruct: pb.ReconstructRequest

    @classmethod
    def of(cls, model: str, image: pb.Image) -> "Requests":
        return cls(
            pb.ClassifyRequest(model_name=model, images=[image], reconstruction_error=True),
            pb.ExplainRequest(model_name=model, images=[image]),
            pb.ReconstructRequest(model_name=model, image=image),
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The server of the repository's models, as they are."""
    with InThread(Server(settings(models=str(ROOT / "models"), model="", http_port=0))) as running:
        yield running


@pytest.fixture(scope="module", params=["pixels", "PNG", "photograph", "pair"])
def picture(request: pytest.FixtureRequest, digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Picture:
    """Each picture in turn: a digit as pixels and as a file, a photograph to prepare, and an overlapping 3 and 5."""
    if request.param == "PNG":
        return Picture(MNIST, pb.Image(encoded=SEVEN.read_bytes()), SEVEN, SEVEN, (28, 28))
    if request.param == "photograph":
        image = pb.Image(encoded=PHOTOGRAPH.read_bytes(), preprocess=pb.PREPROCESS_AUTO)
        return Picture(MNIST, image, PHOTOGRAPH, PHOTOGRAPH, (28, 28))
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[0]] for label in (3, 5))
    model, pixels = (MNIST, digits.images[0]) if request.param == "pixels" else (PAIRS, overlapped(three, five))
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "pixels").write_bytes(pixels.tobytes())
    (folder / "pixels.idx").write_bytes(struct.pack(">2x2B3i", 8, 3, 1, *pixels.shape) + pixels.tobytes())
    image = pb.Image(pixels=pixels.tobytes())
    return Picture(model, image, folder / "pixels.idx", folder / "pixels", (pixels.shape[0], pixels.shape[1]))


@pytest.fixture(scope="module")
def expected(server: Server, picture: Picture) -> Answers:
    """The answers over gRPC, without the client library."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        return answers_of(channel, Requests.of(picture.model, picture.image))


def answers_of(channel: grpc.Channel, requests: Requests) -> Answers:
    stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
    return Answers(
        stub.Classify(requests.classify, timeout=PATIENCE),
        stub.Explain(requests.explain, timeout=PATIENCE),
        stub.Reconstruct(requests.reconstruct, timeout=PATIENCE),
    )


def assert_same(found: dict[str, Any], expected: Message) -> None:
    """Assert that an answer in JSON is a message, its floats up to 1e-6."""
    message = json_format.ParseDict(found, type(expected)())
    numbers: tuple[list[float], list[float]] = ([], [])
    assert _without_floats(_as_dict(message), numbers[0]) == _without_floats(_as_dict(expected), numbers[1])
    np.testing.assert_allclose(*numbers, rtol=0, atol=TOLERANCE)


def _as_dict(message: Message) -> Any:
    return json_format.MessageToDict(message, always_print_fields_with_no_presence=True)


def _without_floats(value: Any, floats: list[float]) -> Any:
    """Return a value of JSON without its floats, which go into the list."""
    if isinstance(value, float):
        floats.append(value)
        return None
    if isinstance(value, list):
        return [_without_floats(one, floats) for one in value]
    return {key: _without_floats(one, floats) for key, one in value.items()} if isinstance(value, dict) else value


def assert_close(found: Numbers, expected: Numbers) -> None:
    """Assert that texts are equal, and numbers up to 1e-6."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, str | list):
            assert found[name] == value, name
        else:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE, err_msg=name)


def numbers_of(answers: Answers) -> Numbers:
    """Return the numbers of the messages, of which the explained class is the winner."""
    [classified], [explained] = answers.classified.results, answers.explained.results
    [winner] = explained.classes
    drawn = answers.reconstructed.results
    return {
        "label": classified.label,
        "verdict": pb.Verdict.Name(classified.verdict).removeprefix("VERDICT_"),
        "present": list(classified.present),
        "error": classified.reconstruction_error,
        "lengths": np.array([one.probability for one in classified.capsules]),
        "confidences": np.array([one.confidence for one in classified.capsules]),
        "poses": np.array([one.pose for one in classified.capsules]),
        "primary_lengths": np.array(explained.primary_lengths),
        "entropies": np.array(explained.entropies),
        "pixels": np.frombuffer(explained.pixels, np.uint8),
        "couplings": np.array([one.couplings for one in winner.iterations]),
        "agreements": np.array([one.agreements for one in winner.iterations]),
        "contributions": np.array(winner.contributions),
        "relevance": np.array(winner.relevance.values),
        "drawn_labels": [one.label for one in drawn],
        "drawn_poses": np.array([one.pose for one in drawn]),
        "drawn": np.frombuffer(b"".join(one.image for one in drawn), np.uint8),
        "layers": np.frombuffer(b"".join(one.layer for one in drawn), np.uint8),
    }


def test_every_picture_has_the_numbers_that_are_compared(expected: Answers, picture: Picture) -> None:
    numbers = numbers_of(expected)
    [explained] = expected.explained.results
    several = picture.model == PAIRS
    assert explained.classification.verdict == (pb.VERDICT_SEVERAL if several else pb.VERDICT_OK)
    right = ["3", "5"] if several else ["3"] if picture.prepared else ["7"]
    assert sorted(numbers["present"]) == sorted(numbers["drawn_labels"]) == right
    assert 0 < numbers["error"] < 0.06 and len(numbers["relevance"]) == picture.shape[0] * picture.shape[1]
    assert len(numbers["layers"]) == (2 * 36 * 36 if several else 0)


def test_the_client_library_has_the_numbers_of_grpc(server: Server, picture: Picture, expected: Answers) -> None:
    item = (
        np.frombuffer(picture.image.pixels, np.uint8).reshape(picture.shape) if picture.image.pixels else picture.file
    )
    preprocess: Any = "auto" if picture.prepared else "none"
    with CapsNetClient(f"127.0.0.1:{server.port}", model=picture.model) as client:
        [classified] = client.classify(item, preprocess=preprocess, reconstruction_error=True)
        [explained] = client.explain(item, preprocess=preprocess)
        drawn = client.reconstruct(item, preprocess=preprocess)
    [winner] = explained.classes
    found = {
        "label": classified.label,
        "verdict": str(classified.verdict),
        "present": list(classified.present),
        "error": classified.reconstruction_error,
        "lengths": classified.probabilities,
        "confidences": classified.confidences,
        "poses": classified.poses,
        "primary_lengths": explained.primary_lengths,
        "entropies": explained.entropies,
        "pixels": explained.pixels.ravel(),
        "couplings": winner.couplings,
        "agreements": winner.agreements,
        "contributions": winner.contributions,
        "relevance": winner.relevance.ravel(),
        "drawn_labels": [one.label for one in drawn],
        "drawn_poses": [one.pose for one in drawn],
        "drawn": np.concatenate([one.image.ravel() for one in drawn]),
        "layers": np.concatenate(
            [one.layer.ravel() for one in drawn if one.layer is not None] or [np.empty(0, np.uint8)]
        ),
    }
    assert_close(found, numbers_of(expected))


def test_the_command_line_has_the_numbers_of_grpc(
    server: Server, picture: Picture, expected: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(picture.file), "--json", "--explain", "--reconstruct"]
    arguments += ["--address", f"127.0.0.1:{server.port}", "--model", picture.model]
    arguments += ["--preprocess", "auto"] if picture.prepared else []
    assert main(arguments) == 0
    numbers = json.loads(capsys.readouterr().out)
    explained, drawn = numbers["explanation"], numbers["reconstructions"]
    [winner] = explained["classes"]
    found = {
        "label": numbers["label"],
        "verdict": numbers["verdict"],
        "present": numbers["present"],
        "error": numbers["reconstruction_error"],
        "lengths": list(numbers["probabilities"].values()),
        "confidences": list(numbers["confidences"].values()),
        "poses": list(numbers["poses"].values()),
        "primary_lengths": explained["primary_lengths"],
        "entropies": explained["entropies"],
        "pixels": np.ravel(explained["pixels"]),
        "couplings": winner["couplings"],
        "agreements": winner["agreements"],
        "contributions": winner["contributions"],
        "relevance": np.ravel(winner["relevance"]),
        "drawn_labels": [one["label"] for one in drawn],
        "drawn_poses": [one["pose"] for one in drawn],
        "drawn": np.ravel([one["image"] for one in drawn]),
        "layers": np.ravel([one["layer"] for one in drawn if one["layer"]]),
    }
    assert_close(found, numbers_of(expected))


def test_http_has_the_numbers_of_grpc(server: Server, picture: Picture, expected: Answers) -> None:
    for path, request, answer in _calls(picture, expected):
        body = json_format.MessageToJson(request, preserving_proto_field_name=True)
        response = ask(server.http_port, path, body, content_type="application/json")
        assert response.status == 200, response.body
        assert_same(response.json, answer)


def test_curl_has_the_numbers_of_grpc(server: Server, picture: Picture, expected: Answers) -> None:
    for path, _, answer in _calls(picture, expected):
        form = [f"image=@{picture.raw}", f"model_name={picture.model}"]
        form += ["preprocess=auto"] if picture.prepared else []
        form += ["reconstruction_error=true"] if path == "/v1/classify" else []
        command = ["curl", "--silent", "--show-error", "--fail", "--max-time", str(PATIENCE)]
        for part in form:
            command += ["-F", part]
        url = f"http://127.0.0.1:{server.http_port}{path}"
        printed = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
        assert_same(json.loads(printed), answer)


def _calls(picture: Picture, expected: Answers) -> Iterator[tuple[str, Message, Message]]:
    """Yield the path, the request and the answer over gRPC of each method."""
    requests = Requests.of(picture.model, picture.image)
    yield from zip(("/v1/classify", "/v1/explain", "/v1/reconstruct"), requests, expected, strict=True)


def test_the_clients_of_triton_have_the_numbers_of_grpc(
    triton: Ask, server: Server, picture: Picture, expected: Answers
) -> None:
    encoded = bool(picture.image.encoded)
    pixels = np.frombuffer(picture.image.pixels, np.uint8)
    request = {
        "images": [base64.b64encode(picture.image.encoded).decode()]
        if encoded
        else pixels.reshape(1, 1, *picture.shape).tolist(),
        "datatype": "BYTES" if encoded else "UINT8",
        "parameters": {"preprocess": "auto"} if picture.prepared else {},
    }
    over_http = [{**request, "model": picture.model, "outputs": OUTPUTS, "binary": binary} for binary in (True, False)]
    command = [sys.executable, "-m", "tests.triton_http_outputs", f"127.0.0.1:{server.http_port}"]
    result = subprocess.run(
        command, cwd=ROOT, input=json.dumps(over_http), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr
    answer = triton(
        "infer", f"127.0.0.1:{server.port}", model_name=picture.model, outputs=dict.fromkeys(OUTPUTS, 0), **request
    )
    answered = [answer["outputs"], *json.loads(result.stdout)]
    numbers = numbers_of(expected)
    winner, size = expected.classified.results[0].class_index, picture.shape[0] * picture.shape[1]
    for outputs in answered:
        found = {name: np.array(values)[0] for name, values in outputs.items()}
        for mine, theirs in (
            ("lengths", found["probabilities"]),
            ("poses", found["poses"]),
            ("confidences", found["confidence"]),
            ("couplings", found["couplings"][:, winner]),
            ("contributions", found["contributions"][winner]),
            ("relevance", found["relevance"].ravel()),
            ("drawn", np.rint(255 * found["reconstruction"].ravel())),
        ):
            right = numbers["drawn"][:size] if mine == "drawn" else numbers[mine]
            np.testing.assert_allclose(theirs, right, rtol=0, atol=TOLERANCE, err_msg=mine)
        np.testing.assert_allclose(
            found["reconstruction"], np.array(answered[0]["reconstruction"])[0], rtol=0, atol=TOLERANCE
        )
