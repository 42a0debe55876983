"""Tests of the packages that `make dist` built, installed into environments of their own, away from the source."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version

from tests.conftest import ROOT, Running
from tests.test_packages import SERVER_ONLY

pytestmark = pytest.mark.install

UV = Path(sys.executable).parent / "uv"
PACKAGES = ("protos", "serving", "training", "export")
PLATFORMS = ("windows", "macos")
#: Other servers' packages, each with its release of November 2026. A conflict would lead to one of years before.
OTHERS = {"tritonclient[grpc]": "2.73", "kserve": "0.21", "mlserver": "1.7.1"}


@dataclass(frozen=True)
class Environment:
    """An environment with the wheel, and a folder outside of the source to run commands in."""

    bin: Path
    folder: Path

    def run(self, program: str, *arguments: str, status: int = 0) -> str:
        """Run one of its programs, check the exit status, and return the output with the errors."""
        result = subprocess.run(
            [self.bin / program, *arguments], cwd=self.folder, env=_clean_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == status, result.stdout
        return result.stdout


def _clean_environment() -> dict[str, str]:
    dropped = ("PYTHON", "VIRTUAL_ENV", "CAPSNET_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def uv(*arguments: str, text: str = "") -> str:
    result = subprocess.run([UV, *arguments], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def install(folder: Path, *requirements: str) -> Environment:
    """Return a new environment with these packages."""
    uv("venv", "--quiet", "--python", sys.executable, str(folder / "venv"))
    uv("pip", "install", "--quiet", "--python", str(folder / "venv" / "bin" / "python"), *requirements)
    (folder / "elsewhere").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "seven.png", folder / "elsewhere")
    return Environment(folder / "venv" / "bin", folder / "elsewhere")


def only(pattern: str) -> Path:
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/{pattern}: {len(found)} files; run: make dist"
    return found[0]


@pytest.fixture(scope="module")
def wheel() -> Path:
    return only("*.whl")


@pytest.fixture(scope="module")
def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the client alone, and Triton's."""
    return install(tmp_path_factory.mktemp("light"), str(wheel), "tritonclient[grpc]")


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the server."""
    return install(tmp_path_factory.mktemp("full"), f"{wheel}[cpu]")


def test_the_client_is_installed_without_the_servers_packages(light: Environment, version: str) -> None:
    listed = uv("pip", "list", "--python", str(light.bin / "python"), "--format", "json")
    names = {one["name"] for one in json.loads(listed)}
    assert "capsnet-serving" in names
    assert not names & (SERVER_ONLY | {"onnxruntime", "torch"})
    assert light.run("capsnet-client", "--version") == f"capsnet-serving {version}\n"


def test_a_command_without_its_packages_says_what_to_install(light: Environment, version: str) -> None:
    said = light.run("capsnet-server", status=1)
    assert re.fullmatch(r"cannot start: the package \w+ is not installed; .*'capsnet-serving\[cpu\]'\n", said)
    for command, extra in (("capsnet-train", "train"), ("capsnet-export", "cpu,export")):
        assert light.run(command, "--version") == f"capsnet-serving {version}\n"
        arguments = [str(ROOT / "models" / "capsnet-mnist" / "1"), "models"] if command == "capsnet-export" else []
        said = light.run(command, *arguments, status=1)
        assert re.fullmatch(rf".*: the package \w+ is not installed; .*'capsnet-serving\[{extra}\]'\n", said)


def test_the_client_answers_beside_the_client_of_triton(light: Environment, running: Running) -> None:
    answer = light.run("capsnet-client", "seven.png", "--address", running.address, "--json")
    assert json.loads(answer)["label"] == "7"
    script = light.folder / "both.py"
    script.write_text(f"""
import numpy as np
from google.protobuf import __version__
from tritonclient.grpc import InferenceServerClient, InferInput
from serving.client import CapsNetClient

with CapsNetClient("{running.address}") as client:
    [ours] = client.classify("seven.png")
    pixels = np.zeros((1, 1, 28, 28), np.uint8)
triton = InferenceServerClient("{running.address}")
images = InferInput("images", pixels.shape, "UINT8")
images.set_data_from_numpy(pixels)
lengths = triton.infer("capsnet-mnist", [images]).as_numpy("probabilities")
print(ours.label, lengths.shape, __version__.split(".")[0])
""")
    assert light.run("python", "-W", "error", "both.py") == "7 (1, 10) 6\n"


def test_a_users_checker_finds_the_types(light: Environment) -> None:
    for package in PACKAGES:
        found = light.run("python", "-c", f"import importlib.util as u; print(u.find_spec('{package}').origin)")
        assert (Path(found.strip()).parent / "py.typed").is_file()
    script = light.folder / "typed.py"
    script.write_text(
        "from serving.client import CapsNetClient\n\nwith CapsNetClient('127.0.0.1:1') as client:\n"
        "    reveal_type(client.classify('seven.png'))\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(light.bin / "python"), "--strict", script.name]
    checked = subprocess.run(command, cwd=light.folder, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert "list[serving.client.results.Classification]" in checked.stdout


@pytest.fixture
def address(full: Environment) -> Iterator[str]:
    """The address of the installed server, with the network that the wheel brings."""
    command = [
        str(full.bin / "capsnet-server"), "--port", "0", "--metrics-port", "0", "--http-port", "-1", "--threads", "1",
        "--runtimes", "1", "--max-batch", "8",
    ]  # fmt: skip
    environment = _clean_environment()
    with subprocess.Popen(command, cwd=full.folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            said = ""
            while not (found := re.search(r"gRPC on (127\.0\.0\.1:\d+)", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            yield found[1]
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_installed_server_answers_the_installed_client(full: Environment, address: str) -> None:
    assert "seven.png: 7\n" in full.run("capsnet-client", "seven.png", "--address", address)


@pytest.mark.parametrize("command", ["server", "client", "train", "export"])
def test_each_installed_command_tells_the_version(full: Environment, version: str, command: str) -> None:
    assert full.run(f"capsnet-{command}", "--version") == f"capsnet-serving {version}\n"


@pytest.fixture(scope="module")
def resolved(wheel: Path) -> dict[str, dict[str, str]]:
    """The version of each package that the client leads to, by platform or by what is installed beside it.

    The resolver waits for the registry most of the time, so all questions are asked together.
    """
    client = f"capsnet-serving @ {wheel.as_uri()}"
    questions: dict[str, tuple[str, ...]] = {
        platform: (client, "--python-platform", platform, "--only-binary", ":all:") for platform in PLATFORMS
    }
    questions |= {other: (f"{client}\n{other}",) for other in OTHERS}
    with ThreadPoolExecutor(len(questions)) as pool:
        return dict(zip(questions, pool.map(lambda question: _resolve(*question), questions.values()), strict=True))


def _resolve(requirements: str, *flags: str) -> dict[str, str]:
    command = ("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.12", *flags, "-")
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[.*\])?==(\S+)", uv(*command, text=requirements), re.MULTILINE))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_client_installs_on_each_platform(resolved: dict[str, dict[str, str]], platform: str) -> None:
    found = resolved[platform]
    assert {"grpcio", "numpy", "pillow", "protobuf"} <= found.keys()
    assert not found.keys() & SERVER_ONLY


@pytest.mark.parametrize("other", OTHERS)
def test_the_client_costs_no_release_of_another_servers_client(resolved: dict[str, dict[str, str]], other: str) -> None:
    found = resolved[other]
    assert Version(found[other.partition("[")[0]]) >= Version(OTHERS[other])
    assert Version(found["protobuf"]) >= Version("6.33.5")


def test_the_wheel_holds_the_licence_and_the_networks_and_the_source_its_tests(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert "\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\nLicense-File: NOTICE\n" in metadata
    for file in ("LICENSE", "NOTICE"):
        assert f"capsnet_serving-{version}.dist-info/licenses/{file}" in names
    assert "serving/models/capsnet-mnist/1/model.onnx" in names and "serving/models/capsnet-mnist/README.md" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    with tarfile.open(only("*.tar.gz")) as source:
        held = {name.partition("/")[2] for name in source.getnames()}
    assert {"LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py", "Makefile"} <= held
    assert not [name for name in held if name.startswith((".venv", ".git/"))]


@pytest.mark.parametrize("image", ["cpu", "gpu", "training"])
def test_the_lists_of_packages_name_the_wheel(wheel: Path, version: str, image: str) -> None:
    content = json.loads(only(f"*-{image}.cdx.json").read_text())
    assert content["metadata"]["component"]["version"] == version
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert content["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    kept = json.loads((ROOT / "deploy" / "sbom" / f"{image}.json").read_text())
    assert content["components"] == kept["components"]
