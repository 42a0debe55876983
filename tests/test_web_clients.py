"""Tests of the HTTP port with others' programs: NVIDIA's client, curl, and a tester of its description."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import just

from protos.capsnet.v1 import capsnet_pb2 as pb
from tests.conftest import DATA, ROOT, Digits, Running
from tests.web_client import ask

SEVEN = DATA / "seven.png"
PATIENCE = 60


def test_the_unmodified_client_of_triton_gets_the_numbers_of_grpc(
    running: Running, digits: Digits, tmp_path: Path
) -> None:
    expected = running.classify(*(pb.Image(pixels=image.tobytes()) for image in digits.images[:2]))
    lengths = [[capsule.probability for capsule in one.capsules] for one in expected.results]
    poses = [[list(capsule.pose) for capsule in one.capsules] for one in expected.results]
    (tmp_path / "digits").write_bytes(digits.images[:2].tobytes())
    command = [sys.executable, "-m", "tests.triton_http_calls", f"127.0.0.1:{running.server.http_port}"]
    result = subprocess.run(
        [*command, str(tmp_path / "digits")], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for outputs in (*found["outputs"], found["later"]):
        assert np.abs(np.array(outputs["probabilities"]) - np.array(lengths)).max() < 1e-6
        assert np.abs(np.array(outputs["poses"]) - np.array(poses)).max() < 1e-6
    assert (found["live"], found["ready"]) == ([True, True], [True, False])
    assert found["server"]["name"] == "capsnet-serving"
    assert [one["name"] for one in found["model"]["outputs"]] == ["probabilities", "poses"]
    assert found["config"]["max_batch_size"] == 1024
    assert [one["name"] for one in found["index"]] == ["capsnet-mnist"]
    assert [row[0].split(":")[1] for row in found["classes"]] == list(map(str, digits.labels[:2]))
    assert found["statistics"] > 0
    status, text = found["error"]
    assert "400" in status and text.startswith("inputs[0].shape: [2, 1, 14, 28]")


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", str(PATIENCE), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_curl_classifies_a_picture_in_a_form_and_in_a_body(running: Running) -> None:
    url = f"http://127.0.0.1:{running.server.http_port}/v1/classify"
    expected = running.classify(pb.Image(encoded=SEVEN.read_bytes())).results[0].capsules[7].probability
    for arguments in (
        ["-F", f"image=@{SEVEN}"],
        ["-F", f"image=@{SEVEN}", "-F", f"image=@{SEVEN}", "-F", "model_name=capsnet-mnist"],
        ["--data-binary", f"@{SEVEN}", "-H", "Content-Type: image/png"],
        ["--data-binary", f"@{SEVEN}", "-H", "Content-Type: application/octet-stream", "-H", "Expect: 100-continue"],
        ["--data-binary", f"@{SEVEN}", "-H", "Transfer-Encoding: chunked", "--http1.1"],
    ):
        for one in json.loads(curl(*arguments, url))["results"]:
            assert one["label"] == "7"
            assert one["capsules"][7]["probability"] == pytest.approx(expected, abs=1e-6)
    status = curl("-F", f"image=@{ROOT / 'Makefile'}", "-w", "%{http_code} %{content_type}", "-o", "/dev/null", url)
    assert status == "400 application/problem+json"


#: Paths whose answers are 503 for a model that is not served, or 501 for one without the graph.
UNAVAILABLE = ("/ready", "/v1/explain", "/v1/reconstruct")


def test_answers_are_those_that_the_description_promises(running: Running) -> None:
    """Try each operation with a few requests, the same ones each time."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi

    conformance = [
        openapi.status_code_conformance, openapi.content_type_conformance, openapi.response_schema_conformance,
    ]  # fmt: skip
    port = running.server.http_port
    schema = schemathesis.openapi.from_dict(ask(port, "/openapi.json").json)
    tried = set[str]()
    operations: Any = schema.get_all_operations()
    for result in operations:
        operation = result.ok()
        checks = conformance if operation.path.endswith(UNAVAILABLE) else [not_a_server_error, *conformance]
        given(case=operation.as_strategy(), base=just(f"http://127.0.0.1:{port}"), checks=just(checks))(_try)()
        tried.add(operation.path)
    assert len(tried) == len(schema.raw_schema["paths"])


@settings(
    max_examples=3, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def _try(case: Any, base: str, checks: list[Any]) -> None:
    case.headers.pop("x-request-timeout", None)  # the description allows times that are too short for any answer
    case.validate_response(case.call(base_url=base), checks=checks)
