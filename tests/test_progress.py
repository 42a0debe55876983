"""Tests of the progress that a training shows."""

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from training.progress import ShowProgress

FIGURES = {"classification_loss_epoch": 0.12345, "held_out_loss": 0.05, "held_out_error_percent": 1.234}


def run(progress: ShowProgress, first_step: int = 0, epochs: int = 2, steps: int = 4, **state: Any) -> None:
    """Call a callback as Lightning does, from a step on."""
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        global_step=first_step,
        current_epoch=first_step // steps,
        max_epochs=epochs,
        estimated_stepping_batches=epochs * steps,
        callback_metrics={},
    )
    vars(trainer).update(state)
    module: Any = None
    progress.on_train_start(trainer, module)
    for step in range(first_step + 1, epochs * steps + 1):
        trainer.global_step = step
        trainer.callback_metrics = {"classification_loss": 0.5}
        progress.on_train_batch_end(trainer, module, None, None, 0)
        if step % steps == 0:
            trainer.callback_metrics = FIGURES
            progress.on_train_epoch_end(trainer, module)
            trainer.current_epoch += 1
    progress.on_train_end(trainer, module)


def test_without_a_terminal_each_epoch_is_a_plain_line_and_epochs_count_from_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr("training.progress.time.monotonic", lambda: next(clock))
    run(ShowProgress(Console(file=io.StringIO())))
    head, first, last = capsys.readouterr().err.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        "epoch",
        "loss",
        "held-out loss",
        "held-out error",
        "time",
        "time left",
    ]
    assert first.split() == ["1/2", "0.1235", "0.0500", "1.23", "%", "0:01:00", "0:02:00"]
    assert last.split() == ["2/2", "0.1235", "0.0500", "1.23", "%", "0:02:00", "0:00:00"]
    assert len(head) == len(first) == len(last)


def test_after_a_resumption_the_time_left_is_that_of_the_steps_since(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0, 100, 100, 100, 100, 100])
    monkeypatch.setattr("training.progress.time.monotonic", lambda: next(clock))
    run(ShowProgress(Console(file=io.StringIO())), first_step=6, epochs=3)
    told, _, row, _ = capsys.readouterr().err.splitlines()
    assert told == "resumed: 6 of 12 steps are done"
    assert row.split()[0] == "2/3"
    assert row.split()[-1] == "0:03:20"  # two steps took 100 s, and four are left


def test_on_a_terminal_a_bar_shows_the_step_the_loss_and_the_total_time_left() -> None:
    screen = io.StringIO()
    run(ShowProgress(Console(file=screen, force_terminal=True, width=120)))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"epoch 1/2 .* step 0 of 8 +loss - +left -", shown)
    assert "held-out error" in shown and "1.23 %" in shown
    assert "\x1b[?25h" in screen.getvalue()  # the cursor is back


def test_only_the_first_process_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    run(ShowProgress(Console(file=io.StringIO())), is_global_zero=False)
    assert capsys.readouterr().err == ""
