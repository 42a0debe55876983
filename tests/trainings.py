"""A tiny network, a tiny data set that it learns in seconds, and runs of it that are left alone or interrupted."""

import csv
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from training.callbacks import Interrupted, StopBetweenSteps
from training.checkpoint import Checkpoint
from training.data.datasets import Dataset
from training.model import CapsNetConfig
from training.recipe import Recipe
from training.train import run

CONFIG = CapsNetConfig(image_size=20, classes=3, conv_channels=8, primary_types=2, decoder_widths=(16,))
RECIPE = Recipe(
    epochs=3,
    min_epoch_steps=0,
    batch_size=32,
    learning_rate=2e-2,
    warmup_epochs=0.5,
    ema_decay=0.7,
    augment="affine",
    precision="32-true",
    held_out=20,
    seed=3,
)
STEPS_PER_EPOCH = 4  # of 140 - 20 images


@pytest.fixture(scope="module", autouse=True)
def process_state() -> Iterator[None]:
    """Undo what a run changes for the whole process, and keep it to one thread: sums then come out alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield
    torch.set_num_threads(threads)


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bar at the top, a bar at the left or a square at the bottom right, by class."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=source)
    images = torch.randint(0, 60, (count, 1, 20, 20), generator=source)
    images[labels == 0, :, 3:9, 3:17] += 190
    images[labels == 1, :, 3:17, 3:9] += 190
    images[labels == 2, :, 10:17, 10:17] += 190
    return images.to(torch.uint8), labels


def make_dataset() -> Dataset:
    test_images, test_labels = bars(60, seed=2)
    test_labels[MISLABELLED] = (test_labels[MISLABELLED] + 1) % 3
    return Dataset("tiny", ("lying", "standing", "square"), *bars(140, seed=1), test_images, test_labels)


MISLABELLED = [4, 17, 50]
DATASET = make_dataset()


def train(
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    resume: bool = False,
    dataset: Dataset = DATASET,
    config: CapsNetConfig = CONFIG,
) -> Checkpoint:
    result = run(config, dataset, recipe, folder, resume=resume, progress=False)
    assert result is not None
    return result.checkpoint


class PowerCut(Exception):
    """Stop a run from outside."""


def cut_power() -> None:
    raise PowerCut


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def act_at(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Call a function during the given optimizer step, counted from 1."""
    original = StopBetweenSteps.on_train_batch_end

    def on_train_batch_end(
        self: StopBetweenSteps,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
    ) -> None:
        if trainer.global_step == step:
            act()
        original(self, trainer, module, outputs, batch, index)

    patch.setattr(StopBetweenSteps, "on_train_batch_end", on_train_batch_end)


def train_until(step: int, folder: Path, recipe: Recipe = RECIPE, act: Callable[[], None] = interrupt) -> None:
    """Train until the action of the given step stops the run."""
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, step, act)
        with pytest.raises((Interrupted, PowerCut)):
            train(folder, recipe)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for name, value in other.state_dict.items():
        assert one.state_dict[name].equal(value), name
    for checkpoint in (one, other):
        checkpoint.figures["seconds"] = 0
    assert replace(one, state_dict={}) == replace(other, state_dict={})


def epoch_figures(folder: Path, name: str) -> list[float]:
    """One of the figures that were logged, by epoch."""
    found: dict[int, float] = {}
    for log in sorted(folder.glob("logs/*/metrics.csv")):
        with log.open() as lines:
            found |= {int(row["epoch"]): float(row[name]) for row in csv.DictReader(lines) if row[name]}
    return [found[epoch] for epoch in sorted(found)]
