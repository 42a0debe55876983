"""Tests that the page for operators and the container's recipe agree with the code."""

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from PIL import PngImagePlugin

from serving import artifact
from serving.errors import REASONS
from serving.files import image_headers
from serving.files.image_headers import IMAGE_CAUSES
from serving.files.images import limit_metadata
from serving.files.options import option_of
from serving.metrics.registry import Metrics
from serving.settings import ENVIRONMENT_PREFIX, Settings
from serving.transport import frame_reader, headers
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
BIN = Path(sys.executable).parent


def _rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without the table's first two lines."""
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


def test_every_limit_on_input_is_in_the_table_of_limits() -> None:
    limits = " ".join(row[1] for row in _rows("What may come in"))
    kinds = ("max_", "image_", "client_calls", "client_rate", "stream_window", "batch_timeout")
    expected = {setting.name for setting in fields(Settings) if setting.name.startswith(kinds)} - {"max_batch"}
    assert {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", limits)} == expected
    limit_metadata()
    for constant in (
        image_headers.MAX_SMALL_PARTS, image_headers.SMALL_PART_BYTES,
        image_headers.MAX_SCANS, image_headers.MAX_EXIF_BYTES, image_headers.MAX_EXIF_ENTRIES,
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, headers.MAX_BYTES, frame_reader._MAX_FIELDS,
        artifact._MAX_MANIFEST_BYTES, artifact._MAX_NAME_CHARACTERS,
    ):  # fmt: skip
        assert re.search(rf"\b{constant}\b", limits), constant


def test_every_reason_and_cause_in_the_table_of_limits_is_counted() -> None:
    cells = " ".join(row[3] for row in _rows("What may come in"))
    named = {
        kind: set(re.findall(r"`(\w+)`", " ".join(re.findall(rf"{kind} (`\w+`(?: or `\w+`)?)", cells))))
        for kind in ("reason", "cause")
    }
    assert named["reason"] <= set(REASONS)
    assert named["cause"] == set(IMAGE_CAUSES)
    assert set(re.findall(r"`(capsnet_\w+)`", cells)) <= {metric.name for metric in Metrics().declarations}


def test_the_metrics_table_is_that_of_the_declared_metrics() -> None:
    expected = [
        [f"`{metric.name}`", metric.kind.value, metric.unit, ", ".join(metric.labels), metric.meaning]
        for metric in Metrics().declarations
    ]
    assert [row[:5] for row in _rows("Metrics")] == expected
    assert {len(row) for row in _rows("Metrics")} == {6}


def test_every_fault_has_a_promise_and_tests_that_exist() -> None:
    rows = _rows("Faults")
    assert len(rows) > 20
    for fault, promise, tests in rows:
        assert fault and promise
        named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        assert ", ".join(f"`{file}::{test}`" for file, test in named) == tests
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), test


@pytest.mark.parametrize(
    ("file", "extras"), [("cpu", ("cpu", "tracing")), ("gpu", ("gpu", "tracing")), ("training", ("cpu", "export"))]
)
def test_the_requirements_of_an_image_are_pinned_with_digests_and_match_the_project(
    file: str, extras: tuple[str, ...]
) -> None:
    files = [file, "torch-cpu"] if file == "training" else [file]
    text = "".join((ROOT / "deploy" / "requirements" / f"{name}.txt").read_text() for name in files)
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


def test_the_container_exports_with_the_images_that_it_was_trained_on() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["training"]
    [command] = service["command"]
    training, export = (part for part in command.split("&& ") if part.startswith("python"))
    assert "$$DATA" in training.split() and "$$DATA" in export.split()
    assert service["environment"]["DATA"] == "${CAPSNET_TRAINING_DATA:+--data /data}"
    assert "${CAPSNET_TRAINING_DATA:-training-runs}:/data:ro" in service["volumes"]
