"""Tests of what each command says about its version, and of packages that it lacks."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

from serving.files.program import PROJECT, command_of, missing_package, reason_of
from tests.conftest import ROOT

COMMANDS = ["serving", "serving.client", "serving.tokens", "training", "training.claims", "export"]


WRONG = {
    ("serving", "--prot"): "--prot; did you mean --port?",
    ("serving.client", "seven.png", "--adress", "x"): "--adress x; did you mean --address?",
    ("serving.client", "seven.png", "--pre", "auto"): "--pre auto; did you mean --preprocess?",
    ("training", "--epoch", "2"): "--epoch 2; did you mean --epochs?",
    ("training", "--learning_rate=0.1"): "--learning_rate=0.1; did you mean --learning-rate?",
    ("export", "runs/a", "models", "--dta", "x"): "--dta x; did you mean --data?",
    ("export", "runs/a", "models", "--zzz"): "--zzz; --help lists the flags",
    ("training", "--data", ""): "argument --data: nothing; expected a folder",
    ("training", "--out="): "argument --out: nothing; expected a folder",
    ("export", "runs/a", "models", "--data", ""): "argument --data: nothing; expected a folder",
    ("serving.client", ""): "argument FILE: nothing; expected a path",
    ("export", "runs/a", ""): "argument OUT: nothing; expected a path",
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_of_a_command_line_is_told_with_what_was_meant(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Call each command in this process, since a start takes longer than the reading of a command line."""
    command, *arguments = words
    monkeypatch.setattr("sys.argv", [command, *arguments])
    with pytest.raises(SystemExit) as end:
        import_module(f"{command}.__main__").main()
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    assert printed.err.splitlines()[-1].endswith(WRONG[words])


def test_a_file_that_cannot_be_written_is_told_by_its_name() -> None:
    assert reason_of(OSError(2, "No such file or directory", "/proc/x")) == "/proc/x: No such file or directory"
    assert reason_of(OSError(28, "No space left on device")) == "No space left on device"
    assert reason_of(OSError("words alone")) == "words alone"
    assert reason_of(ValueError("epochs: 0")) == "epochs: 0"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_tells_the_version_and_loads_no_framework_for_it(command: str) -> None:
    check = (
        f"import sys, runpy; sys.argv = ['x', '--version']\ntry: runpy.run_module('{command}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'uvloop', 'onnxruntime'} & set(sys.modules)"
    )
    result = python("-c", check)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{PROJECT} {version(PROJECT)}\n", "")


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["serving"], "uvloop", "cpu"),
        (["serving"], "hpack", "cpu"),
        (["training", "--dataset", "mnist", "--out", "{folder}"], "torch", "train"),
        (["export", "models/capsnet-mnist/1", "{folder}"], "torch", "cpu,export"),
    ],
    ids=["uvloop", "hpack", "training", "export"],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    command: list[str], package: str, extra: str, tmp_path: object
) -> None:
    words = [one.format(folder=tmp_path) for one in command]
    check = (
        f"import sys, runpy; sys.argv = {['x', *words[1:]]!r}; sys.modules[{package!r}] = None\n"
        f"runpy.run_module({words[0]!r}, run_name='__main__')"
    )
    result = python("-c", check)
    line = f"the package {package} is not installed; install it with: pip install '{PROJECT}[{extra}]'"
    assert result.returncode == 1
    assert result.stderr.endswith(f": {line}\n") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([".venv/bin/python", "-m", "training"], ".venv/bin/python -m export"),
        (["python3.12", "-m", "serving"], "python3.12 -m export"),
        (["/usr/bin/python3", "/usr/local/bin/capsnet-train"], "capsnet-export"),
        (["/opt/pypy/pypy3", "-m", "training"], "python -m export"),
        ([], "python -m export"),
    ],
)
def test_a_command_to_go_on_with_is_as_the_user_typed_the_first_one(
    typed: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", typed)
    monkeypatch.setattr("sys.argv", typed[1:] or [""])
    assert command_of("export") == words


@pytest.mark.parametrize("name", ["serving.batching.gone", "training", None])
def test_a_module_of_the_project_that_is_missing_is_a_fault(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError):
        missing_package(ModuleNotFoundError("No module", name=name), "cpu")
