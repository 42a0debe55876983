"""Callbacks around the steps of a run: interruption, the best epoch, and complete files."""

import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from training.checkpoint import write_whole
from training.optimization import ema_decay


class Interrupted(Exception):
    """The user stopped the run. A checkpoint for ``--resume`` was written.

    It is no KeyboardInterrupt, because Lightning turns that into SystemExit.
    """


class StopBetweenSteps(Callback):
    """On SIGINT or SIGTERM, finish the step, write the resume file, and raise Interrupted.

    Stopping only between steps keeps weights, averages, optimizer and position in the data consistent; stopping in
    mid-epoch only lets every epoch have its evaluation. A second signal stops at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requested = False
        self.previous: dict[signal.Signals, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)
        self.previous = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.previous = {name: signal.signal(name, self._request) for name in (signal.SIGINT, signal.SIGTERM)}

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        # The signal came in the last step of an epoch: the end of the epoch has written the resume file.
        if trainer.global_step and trainer.strategy.reduce_boolean_decision(self.requested, all=False):
            raise Interrupted

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        # A signal may reach several processes in different steps; they must stop in the same one.
        requested = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        if requested and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            raise Interrupted

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()


class KeepBest(Callback):
    """Keep the averaged weights of the epoch with the lowest held-out loss.

    Its state has no path in it, so a run's folder may be moved between interruption and resumption.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loss = math.inf

    @property
    def kept(self) -> bool:
        """Return True if an epoch had a finite loss, and so was kept."""
        return self.loss < math.inf

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        loss = float(trainer.callback_metrics["held_out_loss"])
        if loss < self.loss:
            self.loss = loss
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss = state_dict["loss"]


class AveragedWeights(WeightAveraging):
    """Exponential moving averages of weights and statistics, with the warm-up of ``ema_decay``.

    The number of steps averaged is part of the resume file, so a resumed run averages as an undisturbed one.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay

    @torch.no_grad()
    def _update(self, averages: list[Tensor], values: list[Tensor], averaged: Tensor) -> None:
        """Move the averages. averaged: the earlier steps; the weights of the first step were copied."""
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, float(1 - ema_decay(averaged + 1, self.decay)))
            return
        for average, value in zip(averages, values, strict=True):  # counters of batch normalization
            average.copy_(value)


class WholeFiles(TorchCheckpointIO):
    """The writer of checkpoints. A file gets its name when it is complete, so a full disk keeps the last good one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_whole(checkpoint, Path(path))
