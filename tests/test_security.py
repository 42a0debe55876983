"""Tests that SECURITY.md names tests and attacks that exist, and of rules that no other file tests."""

import ast
import re
import ssl
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.attacks.table import ATTACKS
from serving.access.certificates import Certificates
from tests.certificates import make_all
from tests.conftest import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()
PACKAGES = ("serving", "training", "export", "benchmarks", "protos", "deploy")
#: Functions that run code of the files or texts they read, whatever their arguments.
FORBIDDEN = {
    "eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open",
    "joblib.load", "dill.load", "dill.loads", "yaml.load", "yaml.unsafe_load", "torch.jit.load", "torch.package",
    "torch.hub.load", "os.system", "tarfile.extractall", "archive.extractall",
}  # fmt: skip
#: Functions that read plain values alone with an argument.
SAFE_WITH = {"torch.load": ("weights_only", True), "trainer.fit": ("weights_only", True)}


def _rows() -> list[list[str]]:
    """Return the cells of the table of classes."""
    section = PAGE.split("\n## Classes of weaknesses and their tests\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@cache
def _tests(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_a_class_of_weaknesses_has_tests_that_exist(row: list[str]) -> None:
    name, what, tests = row
    assert re.match(r"(CVE-\d{4}-\d{4,}|CWE-\d+), ", name)
    assert what
    attacks, functions = re.findall(r'"([^"]+)"', tests), re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert attacks or functions
    assert len(attacks) + len(functions) == len(re.split(r"[,;] (?=[\"`])", tests))
    assert set(attacks) <= ATTACKS.keys()
    for file, function in functions:
        assert function in _tests(ROOT / "tests" / file), f"{file}::{function}"


def test_the_classes_that_everyone_asks_for_are_in_the_table() -> None:
    asked = {
        "CVE-2023-44487",
        "CVE-2024-27316",
        "CVE-2025-8671",
        *(f"CVE-2019-{number}" for number in range(9511, 9519)),
    }
    assert asked <= set(re.findall(r"CVE-\d{4}-\d+", " ".join(row[0] for row in _rows())))


def _calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the name and the node of each call in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def test_no_code_reads_objects_that_may_run_code() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *(f"{one}/*.py" for one in PACKAGES)]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listing) > 100
    seen: dict[str, int] = dict.fromkeys(SAFE_WITH, 0)
    for name in listing:
        for function, call in _calls(ROOT / name):
            assert function not in FORBIDDEN, f"{name}:{call.lineno}: {function}"
            arguments = {one.arg: getattr(one.value, "value", None) for one in call.keywords}
            assert not arguments.get("allow_pickle"), f"{name}:{call.lineno}: {function}"
            assert arguments.get("shell") is not True, f"{name}:{call.lineno}: {function}"
            if function in SAFE_WITH and (function != "trainer.fit" or "ckpt_path" in arguments):
                argument, value = SAFE_WITH[function]
                assert arguments.get(argument) is value, f"{name}:{call.lineno}: {function}"
                seen[function] += 1
    assert all(seen.values())


def test_tls_neither_renegotiates_nor_compresses(tmp_path: Path) -> None:
    make_all(tmp_path)
    certificates = Certificates(str(tmp_path / "server.pem"), str(tmp_path / "server.key"), "")
    for context in (certificates.grpc_context(), certificates.http_context()):
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
