"""Tests that the generated code belongs to the .proto files, and that buf finds no fault in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BUF = Path(sys.executable).parent / "buf"
PROTOC = Path(sys.prefix) / "protoc"  # the generator, which the Makefile installs beside the other packages


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/**/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    assert (PROTOC / "grpc_tools").is_dir(), "run: make dev"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *files]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(PROTOC)}, check=True)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    kept = {
        path.relative_to(ROOT): path.read_text() for path in ROOT.glob("protos/**/*_pb2*.py*") if path.suffix != ".pyc"
    }
    assert made == kept, "run: make protos"


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]], ids=["lint", "format"])
def test_buf_finds_nothing(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUF_CACHE_DIR", str(tmp_path))
    result = subprocess.run([BUF, *command], cwd=ROOT / "protos", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_generated_code_works_with_the_packages_of_other_servers_clients() -> None:
    # Those of Triton, KServe and MLServer take no protobuf 7.
    for path in ROOT.glob("protos/**/*_pb2.py"):
        assert "# Protobuf Python Version: 6." in path.read_text()
