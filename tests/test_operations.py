"""The page for operators and the container's recipe say what the code does."""

import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import grpc
import pytest
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.files.options import option_of
from serving.settings import ENVIRONMENT_PREFIX, Settings
from tests.conftest import DATA, ROOT, Running

PAGE = (ROOT / "docs" / "operations.md").read_text()
BIN = Path(sys.executable).parent


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its own first two lines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_settings_table_is_that_of_the_settings() -> None:
    expected = [
        [
            f"`--{setting.name.replace('_', '-')}`",
            f"`{ENVIRONMENT_PREFIX}{setting.name.upper()}`",
            "" if setting.default == "" else f"`{setting.default}`",
            option_of(setting).help,
        ]
        for setting in fields(Settings)
    ]
    assert _rows("Settings") == expected


def test_the_metrics_table_is_that_of_the_metrics_page(running: Running) -> None:
    digit = pb.Image(encoded=(DATA / "seven.png").read_bytes())
    running.classify(digit)
    with pytest.raises(grpc.RpcError):
        running.classify()
    list(running.stub.ClassifyStream(iter([pb.ClassifyStreamRequest()]), timeout=20))
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        page = response.read().decode()
    assert [row[:1] + row[3:5] for row in _rows("Metrics")] == sorted(_families(page), key=_place)


def _families(page: str) -> Iterator[list[str]]:
    """Name, labels and meaning of each metric of a page that is ours."""
    for family in text_string_to_metric_families(page):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.startswith(("process_", "python_")) or name.endswith("_created"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        yield [f"`{name}`", ", ".join(sorted(labels, key=_LABELS.index)), family.documentation]


_LABELS = (
    "grpc_type", "grpc_service", "grpc_method", "grpc_code", "model", "version", "label", "reason", "result", "dataset",
    "precision", "sha256", "provider", "runtime",
)  # fmt: skip


def _place(row: list[str]) -> int:
    """Where the table has a metric; at its end, if it has none."""
    names = [known[0] for known in _rows("Metrics")]
    return names.index(row[0]) if row[0] in names else len(names)


@pytest.mark.parametrize(
    ("file", "extras"), [("cpu", ("cpu", "tracing")), ("gpu", ("gpu", "tracing")), ("training", ("cpu", "export"))]
)
def test_what_an_image_installs_is_pinned_with_digests_and_is_what_the_project_asks_for(
    file: str, extras: tuple[str, ...]
) -> None:
    text = (ROOT / "deploy" / "requirements" / f"{file}.txt").read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())
    pinned: dict[str, str] = {}
    for block in blocks:
        match = re.match(r"([a-z0-9-]+)(?:\[[^\]]*\])?==(\S+)", block)
        assert match, block
        assert "--hash=sha256:" in block, block
        pinned[match[1]] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    pending = list(extras)
    while pending:
        for line in project["optional-dependencies"][pending.pop()]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                pending += requirement.extras
            else:
                wanted.append(line)
    for line in wanted:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), f"{line}; run: make requirements"


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    result = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
