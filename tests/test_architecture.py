"""The rules between the parts of the project."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("module", ["serving.server", "serving.client", "serving.__main__"])
def test_serving_loads_no_training_framework(module: str) -> None:
    check = (
        f"import sys, {module}; "
        "sys.exit(', '.join({'torch', 'lightning', 'onnx', 'training', 'export'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy"],
        ["lint-imports", "--no-cache"],
    ],
    ids=" ".join,
)
def test_the_linter_finds_nothing(command: list[str]) -> None:
    result = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_two_builds_of_onnx_runtime_are_never_asked_for_together() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not any("onnxruntime" in requirement for requirement in project["dependencies"])
    bringing = {name for name, wanted in extras.items() if any("onnxruntime" in one for one in wanted)}
    assert bringing == {"cpu", "gpu"}
