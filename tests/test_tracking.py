"""Tests of the services that a training logs to beside its folder."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch.loggers
import pytest

from tests.trainings import CONFIG, DATASET, RECIPE, process_state
from training import tracking
from training.__main__ import main
from training.train import run

__all__ = ["process_state"]  # a fixture that surrounds every run


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_in_one_line_that_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    assert main([f"--out={tmp_path / 'run'}", f"--track={name}"]) == 2
    error = capsys.readouterr().err
    assert f"the package {name} is not installed; pip install '.[{name}]' installs it" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_tracker_gets_the_name_of_the_run_and_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Mock()
    monkeypatch.setattr(lightning.pytorch.loggers, kind, made)
    logged: Any = tracking.tracker(name, tmp_path / "my-run", {"epochs": 3})
    assert logged is made.return_value
    assert "my-run" in made.call_args.kwargs.values()
    assert made.return_value.log_hyperparams.call_args.args == ({"epochs": 3},)


def test_a_folder_with_the_name_of_a_tracker_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed" in tracking.missing("some_tracker")


def test_a_tracker_that_does_not_take_the_run_ends_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Mock(side_effect=RuntimeError("no key\nlog in"))
    monkeypatch.setattr(lightning.pytorch.loggers, "WandbLogger", made)
    with pytest.raises(tracking.TrackerError, match=r"^--track wandb: no key log in$"):
        tracking.tracker("wandb", tmp_path, {})


def test_the_figures_of_a_run_reach_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="tracked")
    monkeypatch.setattr("training.train.tracker", lambda *_: logger)
    run(CONFIG, DATASET, RECIPE, tmp_path / "run", progress=False, track="wandb")
    (figures,) = tmp_path.glob("tracked/*/metrics.csv")
    assert "held_out_error_percent" in figures.read_text()
