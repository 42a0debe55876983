"""Tests of the rules for names and words in the project's Python files, as far as a program can check them."""

import ast
import re
import subprocess
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

#: A docstring opens with a verb or a noun phrase, so with none of these words.
FORBIDDEN_FIRST_WORDS = {"What", "Of", "Where", "That", "Whether", "As", "How"}
#: The names of limits say MAX and MIN.
FORBIDDEN_NAME_PARTS = {"MOST", "LEAST"}
CONSTANT_NAME = re.compile(r"_*[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
UNFINISHED_WORK = re.compile(r"\b(TODO|FIXME)\b")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
#: Line and word.
Finding = tuple[int, str]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Return the text of the project's Python files by name, without the code generated from the protos."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listing.splitlines() if not name.endswith(("_pb2.py", "_pb2_grpc.py"))]
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).is_file()}


class Findings(NamedTuple):
    """The first word of each docstring of a file, and the name of each constant that it assigns."""

    first_words: list[Finding]
    constants: list[Finding]


def findings(text: str) -> Findings:
    """Return what a file's text has for the rules."""
    first_words, constants = list[Finding](), list[Finding]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Documented):
            if docstring := ast.get_docstring(node):
                first_words.append((getattr(node, "lineno", 1), re.split(r"\W", docstring, maxsplit=1)[0]))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and CONSTANT_NAME.fullmatch(node.id):
            constants.append((node.lineno, node.id))
    return Findings(first_words, constants)


@pytest.fixture(scope="module")
def found(sources: dict[str, str]) -> dict[str, Findings]:
    """Return the findings in each file. To parse all files takes seconds."""
    return {name: findings(text) for name, text in sources.items()}


def test_the_rules_read_docstrings_and_constants() -> None:
    text = '"""What it is."""\n_MOST_BYTES, width = 1, 2\nclass A:\n    """A class."""\n    AT_LEAST: int = 3\n'
    assert findings(text) == ([(1, "What"), (3, "A")], [(2, "_MOST_BYTES"), (5, "AT_LEAST")])


def test_the_files_of_every_part_are_read(sources: dict[str, str]) -> None:
    assert {name.partition("/")[0] for name in sources} >= {"benchmarks", "export", "serving", "tests", "training"}


def test_docstrings_open_with_a_verb_or_a_noun_phrase(found: dict[str, Findings]) -> None:
    assert [
        f"{name}:{line}: {word}"
        for name, one in found.items()
        for line, word in one.first_words
        if word in FORBIDDEN_FIRST_WORDS
    ] == []


def test_the_names_of_limits_say_max_and_min(found: dict[str, Findings]) -> None:
    assert [
        f"{name}:{line}: {constant}"
        for name, one in found.items()
        for line, constant in one.constants
        if FORBIDDEN_NAME_PARTS & set(constant.split("_"))
    ] == []


def test_no_file_marks_unfinished_work(sources: dict[str, str]) -> None:
    sources = {name: text for name, text in sources.items() if name != "tests/test_english.py"}
    assert [name for name, text in sources.items() if UNFINISHED_WORK.search(text)] == []
