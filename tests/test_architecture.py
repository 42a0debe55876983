"""Tests of the rules between the parts of the project."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
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


# A module, an import that it must not have, and how the contract begins that the import breaks.
FORBIDDEN = [
    ("training/train.py", "from serving.batching.batcher import Batcher", "training takes from serving its files"),
    ("export/build.py", "from serving.settings import Settings", "export takes from serving the artifact"),
    ("serving/client/base.py", "from serving.artifact import Artifact", "the client takes from serving its files"),
    ("serving/files/idx.py", "from serving.errors import InvalidRequest", "serving is built in layers"),
    ("serving/transport/frames.py", "import serving.metrics", "serving is built in layers"),
    ("serving/runtime.py", "import torch", "serving needs no training framework"),
]


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The linter's words on each broken contract, of a copy of the packages that has all forbidden imports."""
    folder = tmp_path_factory.mktemp("packages")
    for package in ("protos", "serving", "training", "export"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module, line, _ in FORBIDDEN:
        with (folder / module).open("a") as file:
            file.write(f"\n{line}\n")
    result = subprocess.run(
        [BIN / "lint-imports", "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )
    names = [name for line in result.stdout.splitlines() for name, word, _ in [line.partition(" BROKEN")] if word]
    details = result.stdout.partition("Broken contracts\n")[2]
    headings = re.split(rf"^({'|'.join(map(re.escape, names))})\n-+\n", details, flags=re.MULTILINE)
    return dict(zip(headings[1::2], headings[2::2], strict=True))


def test_forbidden_imports_break_no_other_contract(broken_contracts: dict[str, str]) -> None:
    contracts = sorted({contract for _, _, contract in FORBIDDEN})
    assert all(name.startswith(one) for name, one in zip(sorted(broken_contracts), contracts, strict=True))


@pytest.mark.parametrize(("module", "line", "contract"), FORBIDDEN)
def test_an_import_from_the_wrong_room_breaks_its_contract(
    broken_contracts: dict[str, str], module: str, line: str, contract: str
) -> None:
    importer, imported = module.removesuffix(".py").replace("/", "."), line.split()[1]
    chain = re.compile(rf"^- +{re.escape(importer)} -> {re.escape(imported)} \(", re.MULTILINE)
    broken = [name for name, said in broken_contracts.items() if chain.search(said)]
    assert [name.startswith(contract) for name in broken] == [True]


SIZED = sorted(path for folder in ("serving", "training", "export") for path in (ROOT / folder).rglob("*.py"))
MAX_FUNCTION_LINES, MAX_CLASS_LINES, MAX_LAYERS = 60, 250, 9
# What grpc's own types, and the generated code of its services, leave untyped: contexts, handlers, descriptors.
UNTYPED = {
    "serving/rpc/servicers.py", "serving/rpc/symbols.py", "serving/transport/grpcio_calls.py",
    "serving/transport/grpcio_server.py",
}  # fmt: skip
REQUEST_PATH = ("transport", "rpc", "web", "services", "repository", "batching")


@pytest.mark.parametrize("path", SIZED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_and_no_class_is_too_long(path: Path) -> None:
    too_long = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.end_lineno
            lines = node.end_lineno - node.lineno + 1
            if lines > (MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES):
                too_long.append(f"{node.name}: {lines} lines")
    assert too_long == []


def imports_within_serving() -> dict[str, set[str]]:
    """By module of serving, the modules of it that it imports when it is loaded, those for types alone left out."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "serving").rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        asked: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                asked |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
            elif isinstance(node, ast.Import):
                asked |= {one.name for one in node.names}
        found[name] = (asked & modules.keys()) - {name}
    return found


def test_serving_has_no_cycle_of_imports_and_few_layers() -> None:
    imports = imports_within_serving()
    assert "serving.transport.frames" in imports["serving.transport.frame_reader"]
    assert list(TopologicalSorter(imports).static_order()), "raises CycleError, which names the cycle"
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [one["layers"] for one in contracts if one["name"] == "serving is built in layers"]
    assert len(layers) <= MAX_LAYERS


@pytest.mark.parametrize("room", REQUEST_PATH)
def test_the_path_of_a_request_is_typed_but_where_grpc_is_not(room: str) -> None:
    untyped = set()
    for path in (ROOT / "serving" / room).rglob("*.py"):
        if any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(path.read_text()))):
            untyped.add(path.relative_to(ROOT).as_posix())
    assert untyped <= UNTYPED
