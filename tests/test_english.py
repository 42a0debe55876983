"""Tests of the rules for names and words in the project's Python files, as far as a program can check them."""

import ast
import re
import subprocess

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


def first_words(text: str) -> list[Finding]:
    """Return the first word of each docstring."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Documented)]
    docstrings = [(getattr(node, "lineno", 1), ast.get_docstring(node)) for node in nodes]
    return [(line, re.split(r"\W", docstring, maxsplit=1)[0]) for line, docstring in docstrings if docstring]


def constants(text: str) -> list[Finding]:
    """Return the name of each constant that is assigned."""
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    return [
        (name.lineno, name.id) for name in names if isinstance(name.ctx, ast.Store) and CONSTANT_NAME.fullmatch(name.id)
    ]


def test_the_rules_read_docstrings_and_constants() -> None:
    text = '"""What it is."""\n_MOST_BYTES, width = 1, 2\nclass A:\n    """A class."""\n    AT_LEAST: int = 3\n'
    assert first_words(text) == [(1, "What"), (3, "A")]
    assert constants(text) == [(2, "_MOST_BYTES"), (5, "AT_LEAST")]


def test_the_files_of_every_part_are_read(sources: dict[str, str]) -> None:
    assert {name.partition("/")[0] for name in sources} >= {"benchmarks", "export", "serving", "tests", "training"}


def test_docstrings_open_with_a_verb_or_a_noun_phrase(sources: dict[str, str]) -> None:
    assert [
        f"{name}:{line}: {word}"
        for name, text in sources.items()
        for line, word in first_words(text)
        if word in FORBIDDEN_FIRST_WORDS
    ] == []


def test_the_names_of_limits_say_max_and_min(sources: dict[str, str]) -> None:
    assert [
        f"{name}:{line}: {constant}"
        for name, text in sources.items()
        for line, constant in constants(text)
        if FORBIDDEN_NAME_PARTS & set(constant.split("_"))
    ] == []


def test_no_file_marks_unfinished_work(sources: dict[str, str]) -> None:
    sources = {name: text for name, text in sources.items() if name != "tests/test_english.py"}
    assert [name for name, text in sources.items() if UNFINISHED_WORK.search(text)] == []
