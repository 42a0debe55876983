"""Tests of every reader of bytes with the inputs that are kept, and with some changes of them.

``python -m benchmarks.fuzz --seconds 600`` tries more, and with ``--guided`` those that reach new branches.
"""

import importlib.util
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.fuzz import __main__ as command
from benchmarks.fuzz.__main__ import Finding, check
from benchmarks.fuzz.corpus import CORPUS, MAX_BYTES, TARGETS, kept, mutations
from benchmarks.fuzz.target import Target
from tests.conftest import ROOT

CHANGES = 300
MAX_CORPUS_BYTES = 400_000


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_input_makes_an_undocumented_error(name: str) -> None:
    for data in kept(TARGETS[name]).values():
        check(TARGETS[name], data)


@pytest.mark.parametrize("name", TARGETS)
def test_no_change_of_a_kept_input_makes_an_undocumented_error(name: str) -> None:
    inputs = list(kept(TARGETS[name]).values())
    for data in islice(mutations(inputs, random.Random(1)), CHANGES):
        assert len(data) <= MAX_BYTES
        check(TARGETS[name], data)


def test_the_kept_inputs_are_of_targets_and_few() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) < MAX_CORPUS_BYTES


def test_a_finding_is_told_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(data: bytes) -> None:
        if len(data) > 3:
            raise ZeroDivisionError("a fault")

    target = Target("wrong", fail, lambda: [b"abc"])
    with pytest.raises(Finding, match=r"wrong: ZeroDivisionError: a fault: b'abcd'"):
        check(target, b"abcd")
    monkeypatch.setattr(command, "TARGETS", {"wrong": target})
    monkeypatch.chdir(tmp_path)
    assert command.main(["--seconds", "5"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert len((tmp_path / "finding-wrong").read_bytes()) > 3
    assert command.main(["--list"]) == 0 and capsys.readouterr().out == "wrong\n"


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is not installed")
def test_inputs_can_be_guided_by_coverage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "idx", "--seconds", "1", "--guided", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0 and "INITED" in result.stderr
    assert not list((tmp_path / "idx").glob("finding-*"))
