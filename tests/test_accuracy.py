"""Tests of the collection of measured accuracies, and of the table of them in the documentation."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from tests.conftest import ROOT
from training.checkpoint import Checkpoint, save
from training.model import CapsNet, CapsNetConfig

CONFIG = CapsNetConfig(image_size=20, conv_channels=2, primary_types=1, decoder_widths=(3,))
COMMAND = "python -m training --dataset mnist --epochs 2"
FIGURES = {
    "selected_epoch": 2,
    "held_out_errors": 3,
    "held_out_images": 50,
    "test_errors": 7,
    "test_images": 1000,
    "seconds": 12.5,
    "device": "a processor",
    "torch": "2",
    "commit": "abc",
}


def finish(folder: Path, seed: int, errors: int, command: str = COMMAND) -> Path:
    """Return the folder of a finished run."""
    folder.mkdir()
    figures = FIGURES | {"test_errors": errors, "command": f"{command} --seed {seed} --out {folder}"}
    recipe = {"seed": seed, "epochs": 2}
    model = CapsNet(CONFIG)
    save(Checkpoint(CONFIG, "mnist", tuple("0123456789"), recipe, figures, model.state_dict()), folder / "capsnet.pt")
    return folder


def test_a_run_becomes_a_row_without_its_folder(tmp_path: Path) -> None:
    row = accuracy.row(finish(tmp_path / "run", seed=3, errors=7))
    assert list(row) == list(accuracy.COLUMNS)
    assert row["command"] == COMMAND
    assert {name: row[name] for name in ("dataset", "seed", "test_errors", "seconds", "commit")} == {
        "dataset": "mnist", "seed": "3", "test_errors": "7", "seconds": "12.5", "commit": "abc",
    }  # fmt: skip
    weights = sum(value.numel() for name, value in CapsNet(CONFIG).named_parameters() if "decoder" not in name)
    assert row["parameters"] == str(weights)


@pytest.mark.parametrize("flags", ["--seed=4", "--seed 4", "--out=x --seed 4 --data-dir y", "--resume"])
def test_a_command_is_shown_without_seed_and_folders(flags: str) -> None:
    assert accuracy.plain(f"python -m training {flags} --config compact") == "python -m training --config compact"


def test_runs_are_added_to_those_there_and_take_the_place_of_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.csv"
    for number, (seed, errors) in enumerate([(1, 40), (2, 30), (2, 20)]):
        folder = finish(tmp_path / str(number), seed, errors)
        assert accuracy.main([str(folder), f"--results={results}"]) == 0
    assert [(row["seed"], row["test_errors"]) for row in accuracy.read(results)] == [("1", "40"), ("2", "20")]
    assert f"| **3.000 %** ± 12.706 | 1: 4.00, 2: 2.00 | a processor | `{COMMAND}` |" in capsys.readouterr().out


def test_networks_of_one_command_have_their_own_rows(tmp_path: Path) -> None:
    row = accuracy.row(finish(tmp_path / "run", seed=1, errors=7))
    results = tmp_path / "results.csv"
    accuracy.add([row, row | {"parameters": "17"}], results)
    assert [one["parameters"] for one in accuracy.read(results)] == [row["parameters"], "17"]


def test_each_command_has_a_line_and_one_seed_no_interval(tmp_path: Path) -> None:
    rows = [accuracy.row(finish(tmp_path / command, 1, 10, command)) for command in ("one", "other")]
    lines = accuracy.table(rows).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["**1.00 %**"] * 2


def test_a_run_without_its_origin_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: torch.zeros_like(value) for name, value in CapsNet(CONFIG).state_dict().items()}
    checkpoint = Checkpoint(CONFIG, "mnist", tuple("0123456789"), asdict(CONFIG), {"test_errors": 1}, state)
    save(checkpoint, tmp_path / "capsnet.pt")
    assert accuracy.main([str(tmp_path), f"--results={tmp_path / 'results.csv'}"]) == 1
    assert "does not say its command, commit, device" in capsys.readouterr().err


def test_the_documentation_shows_the_measured_accuracies() -> None:
    assert accuracy.table(accuracy.read()) in (ROOT / "docs" / "accuracy.md").read_text()
