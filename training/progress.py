"""The progress of a run: a row of figures for each epoch, and on a terminal a bar with the time that is left."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

#: The columns of a row: its name, the figure of Lightning's that it shows, and the format.
_FIGURES = (
    ("loss", "classification_loss_epoch", "{:.4f}"),
    ("held-out loss", "held_out_loss", "{:.4f}"),
    ("held-out error", "held_out_error_percent", "{:.2f} %"),
)
_MIN_COLUMN_WIDTH = 9
_UNKNOWN = "-"


class ShowProgress(Callback):
    """Write a row to standard error for each epoch, and on a terminal show a bar below the rows.

    Epochs count from 1. The time left is that of all remaining epochs, by the mean time of the steps since the start
    or the resumption. Where standard error is no terminal, the rows are plain lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = self._epoch_began = 0.0
        self._first_step = self._steps = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._began = self._epoch_began = time.monotonic()
        self._first_step = trainer.global_step
        self._steps = int(trainer.estimated_stepping_batches)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                TextColumn("step {task.completed:,} of {task.total:,}"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("left {task.fields[left]}"),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=self._steps, **self._state(trainer))
            self._bar.start()
        if self._first_step:
            self._say(f"resumed: {self._first_step:,} of {self._steps:,} steps are done")
        self._say(_row(["epoch", *(name for name, *_ in _FIGURES), "time", "time left"]))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self._bar:
            self._bar.update(self._task, **self._state(trainer))

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        figures = [_figure(trainer.callback_metrics, name, form) for _, name, form in _FIGURES]
        times = [_clock(now - self._epoch_began), self._left(trainer.global_step)]
        self._say(_row([_epoch(trainer), *figures, *times]))
        self._epoch_began = now

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _state(self, trainer: lightning.Trainer) -> dict[str, Any]:
        """Return the fields of the bar."""
        return {
            "completed": trainer.global_step,
            "epoch": _epoch(trainer),
            "loss": _figure(trainer.callback_metrics, "classification_loss", "{:.4f}"),
            "left": self._left(trainer.global_step),
        }

    def _left(self, step: int) -> str:
        """Return the time that the remaining steps take, as text."""
        done = step - self._first_step
        return _clock((time.monotonic() - self._began) / done * max(0, self._steps - step)) if done else _UNKNOWN

    def _say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _epoch(trainer: lightning.Trainer) -> str:
    # After the last epoch Lightning's number is one too many.
    return f"{min(trainer.current_epoch + 1, trainer.max_epochs or sys.maxsize)}/{trainer.max_epochs}"


def _figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(float(figures[name])) if name in figures else _UNKNOWN


def _row(cells: list[str]) -> str:
    """Return the cells of a row, each as wide as the name of its column."""
    names = ["epoch", *(name for name, *_ in _FIGURES), "time", "time left"]
    return "  ".join(f"{cell:>{max(_MIN_COLUMN_WIDTH, len(name))}}" for cell, name in zip(cells, names, strict=True))


def _clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
