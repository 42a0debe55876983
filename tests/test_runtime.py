"""Tests of the runtime: each precision of the embedded model, and what it asks of ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import PRECISIONS, find, load
from serving.runtime import Runtime, saturates
from tests.conftest import ROOT, Digits, Running


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_of_the_embedded_model_makes_the_errors_of_its_certificate(
    precision: str, digits: Digits
) -> None:
    artifact = load(find(ROOT / "models"))
    runtime = Runtime(artifact, "cpu", precision=precision)
    images = digits.images[:, None]
    parts = [runtime.predict(images[start : start + 250]) for start in range(0, len(images), 250)]
    classes = np.concatenate([part.probabilities.argmax(1) for part in parts])
    errors = int((classes != digits.labels).sum())
    # Another processor may round another way in the last digit, where two classes are as good as equal.
    assert abs(errors - artifact.variants[precision]["test_errors"]) <= (0 if precision == "fp32" else 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f\n", True),
        ("flags : fpu avx2 avx512f avx512_vnni\n", False),
        ("flags : fpu avx2 avx_vnni\n", False),
        ("Features : fp asimd\n", False),
    ],
    ids=["avx2", "avx512-vnni", "avx-vnni", "arm"],
)
def test_a_processor_without_vnni_is_known_by_its_flags(tmp_path: Path, text: str, expected: bool) -> None:
    info = tmp_path / "cpuinfo"
    assert not saturates(info)
    info.write_text(text)
    assert saturates(info) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_server_tells_the_precision_it_serves(start: Callable[..., Running], precision: str, digits: Digits) -> None:
    running = start(precision=precision)
    described = running.stub.GetModel(pb.GetModelRequest(), timeout=20)
    assert described.precision == precision
    assert described.sha256 == running.server.artifact.sha256(precision)
    image = pb.Image(pixels=digits.images[0].tobytes())
    assert running.classify(image).results[0].label == str(digits.labels[0])
