"""Tests of the Makefile: its list of targets, and the commands that they run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", TEXT.replace("\\\n", ""), re.MULTILINE)[1].split())  # type: ignore[index]


def environment() -> dict[str, str]:
    """Return the environment without what the ``make`` that may run the tests tells those that it starts."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def make(*arguments: str) -> str:
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout


def test_help_lists_every_target_with_a_description() -> None:
    listed = dict(re.findall(r"^make ([a-z-]+) +(\S.*)$", make("help"), re.MULTILINE))
    assert listed.keys() == TARGETS
    assert {"dev", "train", "export", "check", "test", "serve"} <= TARGETS


def test_training_and_export_take_their_arguments() -> None:
    for target, command in (("train", "-m training --epochs 2"), ("export", "-m export --epochs 2")):
        assert make("--dry-run", target, "ARGS=--epochs 2").strip().endswith(command)


def test_the_check_lints_and_leaves_out_tests_that_start_a_server_a_training_or_an_export() -> None:
    commands = make("--dry-run", "check")
    assert "mypy" in commands
    assert '-m "not server and not training and not exporter and not attack and not install"' in commands


def test_the_packages_are_built_and_tested_by_a_target_of_their_own_that_ci_runs() -> None:
    commands = make("--dry-run", "dist")
    assert "-m install tests/test_installed.py" in commands and "--require-hashes" in commands
    assert "\nmake dist\n" in (ROOT / ".ci" / "run").read_text()


def test_ci_measures_the_claims_on_a_tiny_scale() -> None:
    assert make("--dry-run", "claims", "ARGS=full").strip().endswith("-m training.claims full")
    assert "\nmake claims\n" in (ROOT / ".ci" / "run").read_text()


def test_the_attacks_have_a_target_of_their_own_that_ci_runs() -> None:
    assert '-m "not attack and not install"' in make("--dry-run", "test")
    assert "-m attack tests/test_attacks.py" in make("--dry-run", "attacks")
    assert "\nmake attacks\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("reached", [True, False])
def test_the_other_locks_are_made_where_pytorchs_index_is_not_reached(tmp_path: Path, reached: bool) -> None:
    calls = tmp_path / "calls"
    for name in ("uv", "python"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        fails = "" if reached else '[[ "$*" != *--torch-backend* ]] || { echo "many lines" >&2; exit 2; }'
        program.write_text(f'#!/bin/bash\necho "$@" >> {calls}\n{fails}\n')
        program.chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "--silent", "requirements", f"DEV_VENV={tmp_path}", f"PYTHON={tmp_path / 'bin' / 'python'}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    made = re.findall(r"requirements/([\w-]+)\.txt(?=\n)", calls.read_text())
    assert sorted(made) == ["build", "cpu", "gpu", "installer", "torch-cpu", "torch-cuda", "training"]
    assert calls.read_text().endswith("deploy/sbom.py\n")
    assert (result.returncode == 0) == reached
    message, *rest = result.stderr.splitlines() or [""]
    if reached:
        assert (message, rest) == ("", [])
    else:
        assert message.startswith("deploy/requirements/torch-cpu.txt is as it was: uv found no PyTorch for the CPU")
        assert len(rest) == 1 and re.match(r"make(\[\d+\])?: \*\*\* ", rest[0])
