"""Tests of the rules between the parts of the project."""

import shutil
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


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("training/train.py", "from serving.batching.batcher import Batcher", "training takes from serving its files"),
        ("export/build.py", "from serving.settings import Settings", "export takes from serving the artifact"),
        ("serving/client/base.py", "from serving.artifact import Artifact", "the client takes from serving its files"),
        ("serving/files/idx.py", "from serving.errors import InvalidRequest", "serving is built in layers"),
        ("serving/transport/frames.py", "import serving.metrics", "serving is built in layers"),
        ("serving/runtime.py", "import torch", "serving needs no training framework"),
    ],
)
def test_an_import_from_the_wrong_room_breaks_its_contract(
    tmp_path: Path, module: str, line: str, contract: str
) -> None:
    for package in ("protos", "serving", "training", "export"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = subprocess.run(
        [BIN / "lint-imports", "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    broken = [name for name in result.stdout.splitlines() if "BROKEN" in name]
    assert [name.startswith(contract) for name in broken] == [True]
