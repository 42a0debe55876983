"""Tests of training runs: learning, selection, test and files. An interrupted run loses nothing."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning
import pytest
import torch
from torch import Tensor

import training.data.datasets
import training.evaluate
import training.report
import training.train
from serving.files.options import option_of
from tests.conftest import ROOT
from tests.trainings import (
    CONFIG,
    DATASET,
    MISLABELLED,
    RECIPE,
    STEPS_PER_EPOCH,
    PowerCut,
    act_at,
    assert_same,
    cut_power,
    epoch_figures,
    interrupt,
    process_state,
    train,
    train_until,
)
from training import checkpoint as checkpoints
from training import recipe as recipe_choices
from training.__main__ import main
from training.callbacks import AveragedWeights, Interrupted, StopBetweenSteps
from training.checkpoint import Checkpoint, CheckpointError
from training.data.augment import AUGMENTATIONS
from training.data.batches import Batches
from training.data.compose import scenes
from training.data.datasets import Dataset, split
from training.data.sources import DatasetError
from training.data.specs import NONE
from training.evaluate import mistakes, predict
from training.loss import margin_loss
from training.model import CONFIGS, CapsNet, CapsNetConfig, lengths, to_pixels
from training.recipe import NetworkChanges, Recipe
from training.report import write_report
from training.run_folder import BEST_FILE, CHECKPOINT_FILE, REPORT_FILE, RESUME_FILE
from training.train import Training, TrainingError

__all__ = ["process_state"]  # a fixture that surrounds every run
FLAGS = [
    "--config=compact",
    *(
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(RECIPE).items()
        if value is not None and not isinstance(value, bool | tuple)
    ),
]


class RecordedDataset(Dataset):
    """A data set that records the reading of its test images and labels."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("test_"):
            object.__getattribute__(self, "__dict__")["events"].append(name)
        return super().__getattribute__(name)


def log_held_out_losses(patch: pytest.MonkeyPatch, losses: list[float]) -> None:
    remaining = iter(losses)
    patch.setattr(Training, "validation_step", lambda self, *_: self.log("held_out_loss", next(remaining)))


def held_out_examples() -> tuple[Tensor, Tensor]:
    assert RECIPE.held_out is not None
    _, held_out = split(len(DATASET.train_images), RECIPE.held_out, RECIPE.seed)
    return DATASET.train_images[held_out], DATASET.train_labels[held_out]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, process_state: None) -> tuple[Checkpoint, Path]:
    """An undisturbed run: its checkpoint and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    return train(folder), folder


@pytest.fixture(scope="module")
def finished_on_all(tmp_path_factory: pytest.TempPathFactory, process_state: None) -> tuple[Checkpoint, Path]:
    """An undisturbed run that holds nothing out: its checkpoint and its folder."""
    folder = tmp_path_factory.mktemp("finished-on-all")
    return train(folder, replace(RECIPE, held_out=0)), folder


def test_a_network_learns(finished: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = finished
    margin = epoch_figures(folder, "classification_loss_epoch")
    reconstruction = epoch_figures(folder, "reconstruction_loss_epoch")
    assert len(margin) == len(reconstruction) == RECIPE.epochs
    assert margin[-1] < 0.5 * margin[0]
    assert reconstruction[-1] < reconstruction[0]
    assert checkpoint.figures["test_mistakes"] == MISLABELLED


def test_a_run_writes_the_checkpoint_that_it_returns(finished: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = finished

    loaded = checkpoints.load(folder / CHECKPOINT_FILE)

    assert_same(loaded, checkpoint)
    assert loaded.config == CONFIG
    assert loaded.dataset == "tiny"
    assert loaded.labels == DATASET.labels
    assert loaded.recipe == asdict(RECIPE)


def test_the_figures_of_a_run_are_those_of_the_network_that_is_kept(finished: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = finished
    model = checkpoints.load(folder / CHECKPOINT_FILE).model()
    figures = checkpoint.figures

    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["test_mistakes"] == mistakes(model, DATASET.test_images, DATASET.test_labels)
    assert figures["test_errors"] == len(figures["test_mistakes"])
    assert figures["test_images"] == 60
    assert figures["held_out_errors"] == len(mistakes(model, *held_out_examples()))
    assert figures["held_out_images"] == 20
    assert figures["torch"] == torch.__version__
    assert figures["seconds"] >= 0


def test_the_averaged_weights_of_the_epoch_with_the_lowest_held_out_loss_are_kept(
    finished: tuple[Checkpoint, Path],
) -> None:
    checkpoint, folder = finished
    losses, error_percents = (epoch_figures(folder, f"held_out_{name}") for name in ("loss", "error_percent"))
    best = losses.index(min(losses))
    assert checkpoint.figures["selected_epoch"] == best + 1

    images, labels = held_out_examples()
    with torch.no_grad():
        loss = margin_loss(lengths(checkpoint.model()(to_pixels(images))), labels)

    assert loss.item() == pytest.approx(min(losses), rel=1e-5)
    assert error_percents[best] == pytest.approx(100 * checkpoint.figures["held_out_errors"] / 20)
    kept = torch.load(folder / BEST_FILE, weights_only=True)
    assert checkpoint.state_dict["weight"].equal(kept["state_dict"]["model.weight"])
    assert not checkpoint.state_dict["weight"].equal(kept["current_model_state"]["model.weight"])


def test_an_early_epoch_is_kept_when_the_later_ones_are_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_held_out_losses(monkeypatch, [0.5, 0.1, 0.3])
    assert train(tmp_path).figures["selected_epoch"] == 2


def test_without_held_out_images_the_averaged_weights_of_the_last_epoch_are_kept(
    finished_on_all: tuple[Checkpoint, Path],
) -> None:
    checkpoint, folder = finished_on_all
    last = torch.load(folder / RESUME_FILE, weights_only=True)

    assert last["epoch"] == RECIPE.epochs - 1
    assert checkpoint.state_dict["weight"].equal(last["state_dict"]["model.weight"])
    assert not checkpoint.state_dict["weight"].equal(last["current_model_state"]["model.weight"])
    assert not (folder / BEST_FILE).exists()
    assert not {"held_out_errors", "held_out_images", "selected_epoch"} & checkpoint.figures.keys()
    assert checkpoint.figures["test_images"] == 60


def test_one_training_image_in_twelve_is_held_out_by_default(tmp_path: Path) -> None:
    assert train(tmp_path, replace(RECIPE, epochs=1, held_out=None)).figures["held_out_images"] == 140 // 12


def test_a_network_of_one_class_learns_where_it_is_there_and_where_not(tmp_path: Path) -> None:
    config = replace(CONFIG, classes=1)
    present = DATASET.test_labels == 0
    present[MISLABELLED] = False
    shown, others = DATASET.test_images[present], DATASET.test_images[DATASET.test_labels == 2]
    dataset = replace(
        DATASET,
        labels=("lying",),
        train_labels=torch.where(DATASET.train_labels == 0, 0, NONE),
        test_images=shown,
        test_labels=torch.zeros(len(shown), dtype=torch.int64),
        none_test_images=others,
    )

    checkpoint = train(tmp_path, replace(RECIPE, epochs=8), dataset=dataset, config=config)

    losses = epoch_figures(tmp_path, "held_out_loss")
    assert losses[-1] < 0.5 * losses[0]
    assert predict(checkpoint.model(), shown)[0].min() > 0.5
    assert checkpoint.figures["test_errors"] == 0
    assert checkpoint.figures["none_test_images"] == len(others)
    assert checkpoint.figures["none_test_errors"] <= 2
    assert checkpoint.figures["held_out_errors"] <= 1


def test_one_class_without_images_of_none_is_refused(tmp_path: Path) -> None:
    dataset = replace(
        DATASET,
        labels=("thing",),
        train_labels=torch.zeros_like(DATASET.train_labels),
        test_labels=torch.zeros_like(DATASET.test_labels),
    )
    with pytest.raises(TrainingError, match="one class alone; it takes images without it"):
        train(tmp_path, dataset=dataset, config=replace(CONFIG, classes=1))


def test_few_images_are_learned_in_fifty_steps_by_the_default_recipe(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, per_class=10, held_out=20)
    checkpoint = train(tmp_path, recipe)
    assert torch.load(tmp_path / RESUME_FILE, weights_only=True)["global_step"] == 50
    assert checkpoint.figures["train_images"] == 30
    assert checkpoint.figures["test_errors"] <= len(MISLABELLED) + 2


def test_the_decay_of_the_averaged_weights_grows_with_the_steps() -> None:
    module = lightning.LightningModule()
    module.layer = layer = torch.nn.BatchNorm1d(1)
    callback = AveragedWeights(0.5)
    callback.setup(Mock(), module, "fit")
    average = 0.0
    for step in range(1, 21):
        torch.nn.init.constant_(layer.weight, step)
        layer.running_mean = torch.full((1,), float(step))
        layer.num_batches_tracked = torch.tensor(step)
        callback.on_train_batch_end(Mock(global_step=step), module, None, None, 0)
        decay = 0 if step == 1 else min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        assert callback._average_model is not None
        averaged = callback._average_model.module.state_dict()
        assert averaged["layer.weight"].item() == pytest.approx(average, rel=1e-5)
        assert averaged["layer.running_mean"].item() == pytest.approx(average, rel=1e-5)
        assert averaged["layer.num_batches_tracked"] == step


def test_the_test_images_are_read_once_and_only_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    dataset = RecordedDataset(**asdict(DATASET))
    dataset.__dict__["events"] = events
    fit = lightning.Trainer.fit

    def recorded_fit(*arguments: Any, **options: Any) -> None:
        events.append("fit begins")
        fit(*arguments, **options)
        events.append("fit ends")

    def recorded_predict(model: CapsNet, images: Tensor) -> tuple[Tensor, Tensor]:
        events.append(f"prediction of {len(images)}")
        return predict(model, images)

    monkeypatch.setattr(lightning.Trainer, "fit", recorded_fit)
    for module in (training.train, training.evaluate):
        monkeypatch.setattr(module, "predict", recorded_predict)

    train(tmp_path, replace(RECIPE, epochs=1), dataset=dataset)

    assert events[:3] == ["fit begins", "fit ends", "prediction of 20"]
    assert events.count("prediction of 60") == 1
    assert set(events[3:]) == {"test_images", "test_labels", "prediction of 60"}


def test_a_run_is_repeated_exactly_by_its_seed_and_changed_by_another(
    tmp_path: Path, finished: tuple[Checkpoint, Path]
) -> None:
    torch.rand(5)  # earlier random numbers must not matter
    assert_same(train(tmp_path / "again"), finished[0])
    other = train(tmp_path / "other", replace(RECIPE, epochs=1, seed=4))
    assert not other.state_dict["weight"].equal(finished[0].state_dict["weight"])


@pytest.mark.parametrize("step", [1, 3, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH - 1, 3 * STEPS_PER_EPOCH - 1])
def test_a_run_interrupted_in_mid_epoch_and_resumed_ends_as_an_undisturbed_one(
    tmp_path: Path, finished: tuple[Checkpoint, Path], step: int
) -> None:
    train_until(step, tmp_path)
    assert torch.load(tmp_path / RESUME_FILE, weights_only=True)["global_step"] == step
    assert not (tmp_path / CHECKPOINT_FILE).exists()

    assert_same(train(tmp_path, resume=True), finished[0])
    assert epoch_figures(tmp_path, "held_out_loss") == epoch_figures(finished[1], "held_out_loss")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_interrupted_in_the_last_step_of_an_epoch_and_resumed_evaluates_that_epoch_too(
    tmp_path: Path, finished: tuple[Checkpoint, Path], epoch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, epoch * STEPS_PER_EPOCH, interrupt)
        try:
            checkpoint = train(tmp_path)
        except Interrupted:
            checkpoint = train(tmp_path, resume=True)
        else:
            assert epoch == 3  # no step is left to interrupt

    assert_same(checkpoint, finished[0])
    assert epoch_figures(tmp_path, "held_out_loss") == epoch_figures(finished[1], "held_out_loss")


def test_a_run_of_one_step_an_epoch_can_be_interrupted_and_resumed(tmp_path: Path) -> None:
    recipe = replace(RECIPE, batch_size=1000)
    undisturbed = train(tmp_path / "undisturbed", recipe)
    train_until(2, tmp_path / "halved", recipe)
    assert torch.load(tmp_path / "halved" / RESUME_FILE, weights_only=True)["global_step"] == 2
    assert_same(train(tmp_path / "halved", recipe, resume=True), undisturbed)


def test_a_run_can_be_interrupted_and_resumed_again_and_again(
    tmp_path: Path, finished: tuple[Checkpoint, Path]
) -> None:
    train_until(3, tmp_path)
    for step in (4, STEPS_PER_EPOCH + 2):
        with pytest.MonkeyPatch.context() as patch:
            act_at(patch, step, interrupt)
            with pytest.raises(Interrupted):
                train(tmp_path, resume=True)

    assert_same(train(tmp_path, resume=True), finished[0])


@pytest.mark.parametrize("step", [2, 9, 12])
def test_a_run_whose_epochs_pass_over_few_images_several_times_is_resumed_as_exactly(tmp_path: Path, step: int) -> None:
    recipe = replace(RECIPE, epochs=2, min_epoch_steps=7)
    undisturbed = train(tmp_path / "undisturbed", recipe)
    train_until(step, tmp_path / "halved", recipe)
    resumed = train(tmp_path / "halved", recipe, resume=True)
    assert torch.load(tmp_path / "halved" / RESUME_FILE, weights_only=True)["global_step"] == 14
    assert_same(resumed, undisturbed)


@pytest.mark.parametrize("step", [4, STEPS_PER_EPOCH + 2])
def test_a_run_that_holds_nothing_out_is_resumed_as_exactly(
    tmp_path: Path, finished_on_all: tuple[Checkpoint, Path], step: int
) -> None:
    recipe = replace(RECIPE, held_out=0)
    train_until(step, tmp_path, recipe)
    assert_same(train(tmp_path, recipe, resume=True), finished_on_all[0])


def test_a_termination_signal_interrupts_a_run_as_ctrl_c_does(
    tmp_path: Path, finished: tuple[Checkpoint, Path]
) -> None:
    train_until(5, tmp_path, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert_same(train(tmp_path, resume=True), finished[0])


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH + 3])
def test_a_run_that_a_power_cut_ended_is_resumed_from_its_last_whole_epoch_and_ends_as_an_undisturbed_one(
    tmp_path: Path, finished: tuple[Checkpoint, Path], step: int
) -> None:
    train_until(step, tmp_path, act=cut_power)
    assert_same(train(tmp_path, resume=True), finished[0])


def test_a_run_resumed_after_a_power_cut_still_knows_its_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_held_out_losses(monkeypatch, [0.5, 0.1])
    train_until(2 * STEPS_PER_EPOCH + 1, tmp_path, act=cut_power)

    log_held_out_losses(monkeypatch, [0.3])
    assert train(tmp_path, resume=True).figures["selected_epoch"] == 2


def test_a_run_resumed_in_a_folder_that_was_moved_still_knows_its_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_held_out_losses(monkeypatch, [0.1, 0.5])
    train_until(2 * STEPS_PER_EPOCH + 1, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")

    log_held_out_losses(monkeypatch, [0.3])
    assert train(tmp_path / "new", resume=True).figures["selected_epoch"] == 1


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, held_out=0)
    checkpoint = train(tmp_path, recipe)
    assert_same(train(tmp_path, recipe, resume=True), checkpoint)


def test_a_second_signal_reaches_the_handler_from_before_the_run(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        callback = StopBetweenSteps(tmp_path / RESUME_FILE)
        callback.on_train_start(Mock(), Mock())
        interrupt()
        assert callback.requested
        assert not received
        interrupt()
        assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_signals_are_handled_only_while_training(tmp_path: Path, end: str) -> None:
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    callback = StopBetweenSteps(tmp_path / RESUME_FILE)

    callback.on_train_start(Mock(), Mock())
    assert all(signal.getsignal(name) not in before for name in names)
    if end == "on_train_end":
        callback.on_train_end(Mock(), Mock())
    else:
        callback.on_exception(Mock(), Mock(), PowerCut())

    assert [signal.getsignal(name) for name in names] == before


def test_no_run_leaves_its_signal_handlers_behind(tmp_path: Path) -> None:
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    one_epoch = replace(RECIPE, epochs=1)

    train(tmp_path / "finished", one_epoch)
    assert [signal.getsignal(name) for name in names] == before
    train_until(2, tmp_path / "interrupted", one_epoch)
    assert [signal.getsignal(name) for name in names] == before
    train_until(2, tmp_path / "failed", one_epoch, act=cut_power)
    assert [signal.getsignal(name) for name in names] == before


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_at(
        monkeypatch, 3, lambda: monkeypatch.setattr(training.train, "margin_loss", lambda *_: torch.tensor(torch.nan))
    )
    with pytest.raises(TrainingError, match="the loss is nan at step 3; try a lower learning rate"):
        train(tmp_path)
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_a_learning_rate_far_too_high_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at step 1; try a lower learning rate"):
        train(tmp_path, replace(RECIPE, learning_rate=1e30))


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine_to_zero() -> None:
    module = Training(CONFIG, replace(RECIPE, epochs=3, warmup_epochs=1, learning_rate=0.1), steps_per_epoch=10)
    optimizers = module.configure_optimizers()
    optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    assert optimizers["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(31):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    assert rates[:10] == pytest.approx([0.01 * step for step in range(1, 11)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[20] == pytest.approx(0.05)
    assert rates[30] == pytest.approx(0, abs=1e-12)
    assert all(earlier > later for earlier, later in pairwise(rates[10:]))


def test_the_training_loss_is_the_margin_loss_plus_the_reconstruction_of_the_true_class() -> None:
    module = Training(CONFIG, replace(RECIPE, augment="none", pixel_weight=0.01), STEPS_PER_EPOCH)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(4)  # so that the reconstructions of two classes differ clearly
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.trainer = Mock(global_rank=0, world_size=1, global_step=0)
    images, labels = DATASET.train_images[:8], DATASET.train_labels[:8]

    loss = module.training_step((images[:, None], labels[:, None], torch.arange(8)), 0)

    pixels = images / 255
    poses = module.model(pixels)
    assert module.model.decoder is not None
    errors = (module.model.decoder(poses, labels) - pixels).square().sum((1, 2, 3))
    torch.testing.assert_close(logged["classification_loss"], margin_loss(poses.norm(dim=-1), labels))
    torch.testing.assert_close(logged["reconstruction_loss"], 0.01 * errors.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, logged["classification_loss"] + logged["reconstruction_loss"])


def test_a_network_without_a_decoder_is_trained_on_the_margin_loss_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, decoder_widths=())
    checkpoint = train(tmp_path, replace(RECIPE, epochs=1), config=config)
    assert checkpoints.load(tmp_path / CHECKPOINT_FILE).model().decoder is None
    assert not any(name.startswith("decoder") for name in checkpoint.state_dict)


def test_the_training_loss_of_pairs_has_a_reconstruction_of_each_digit_from_its_own_pose() -> None:
    config = replace(CONFIG, image_size=24, decoder_widths=(5,))
    module = Training(config, replace(RECIPE, augment="none", pixel_weight=0.01), STEPS_PER_EPOCH, canvas=24)
    module.trainer = Mock(global_rank=0, world_size=1, global_step=0)
    seen: list[Tensor] = []

    class Painter(torch.nn.Module):
        """A decoder that paints an image as bright as the class is high, whatever the poses."""

        def forward(self, poses: Tensor, classes: Tensor) -> Tensor:
            seen.append(poses)
            return (classes / 10).reshape(-1, 1, 1, 1).expand(-1, 1, 24, 24)

    module.model.decoder = Painter()
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    digits = torch.stack([torch.full((4, 1, 20, 20), 100), torch.full((4, 1, 20, 20), 200)], 1).to(torch.uint8)
    labels = torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2]])

    module.training_step((digits, labels, torch.arange(4)), 0)

    pixels, around = 20 * 20, 24 * 24 - 20 * 20
    expected = torch.zeros(4)
    for column, brightness in ((0, 100 / 255), (1, 200 / 255)):
        shown = labels[:, column] / 10
        expected += pixels * (shown - brightness).square() + around * shown.square()
    torch.testing.assert_close(logged["reconstruction_loss"], 0.01 * expected.mean(), rtol=1e-5, atol=0)
    assert seen[0] is seen[1]
    torch.testing.assert_close(logged["classification_loss"], margin_loss(lengths(seen[0]), labels))


def test_pairs_are_put_to_other_places_in_each_step() -> None:
    config = replace(CONFIG, image_size=40, decoder_widths=())
    module = Training(config, replace(RECIPE, augment="none"), STEPS_PER_EPOCH, canvas=40)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    shown: list[Tensor] = []
    module.model.register_forward_pre_hook(lambda model, inputs: shown.append(inputs[0]))
    batch = DATASET.train_images[:8].reshape(4, 2, 1, 20, 20), DATASET.train_labels[:8].reshape(4, 2), torch.arange(4)
    for step in (0, 1, 0):
        module.trainer = Mock(global_rank=0, world_size=1, global_step=step)
        module.training_step(batch, 0)
    assert shown[0].shape == (4, 1, 40, 40)
    assert not shown[0].equal(shown[1])
    assert shown[0].equal(shown[2])


def test_the_objects_of_an_image_share_its_turn() -> None:
    module = Training(replace(CONFIG, image_size=24, decoder_widths=()), RECIPE, STEPS_PER_EPOCH, canvas=24)
    module.trainer = Mock(global_rank=0, world_size=1, global_step=0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    given: list[Tensor] = []

    def augment(images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
        given.append(turns)
        return images

    module.augment = augment
    images = DATASET.train_images[:4].reshape(2, 2, 1, 20, 20)
    module.training_step((images, DATASET.train_labels[:4].reshape(2, 2), torch.tensor([7, 9])), 0)
    assert given[0].tolist() == [7, 7, 9, 9]


def test_the_second_of_a_pair_is_another_in_each_epoch_and_never_of_the_same_class() -> None:
    seconds = []
    for epoch in range(2):
        labels = torch.arange(23) % 3
        batches = Batches(torch.arange(23), labels, 5, 1, Mock(return_value=5 * epoch), objects=2)
        firsts: dict[int, int] = {}
        for images, classes, _ in batches:
            assert classes.equal(labels[images])
            assert (classes[:, 0] != classes[:, 1]).all()
            firsts |= dict(images.tolist())
        assert sorted(firsts) == list(range(23))
        seconds.append([firsts[image] for image in range(23)])
    assert sum(one != other for one, other in zip(*seconds, strict=True)) > 10


PAIRS = replace(DATASET, objects=2, canvas=24, test_images=torch.zeros(6, 1, 24, 24, dtype=torch.uint8),
                test_labels=torch.tensor([[0, 1]] * 6))  # fmt: skip


def test_held_out_pairs_are_made_of_held_out_images_alone_and_the_images_are_not_augmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[Tensor] = []

    def recorded(images: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        composed.append(images)
        return scenes(images, *rest)

    monkeypatch.setattr(training.train, "scenes", recorded)
    config, recipe = replace(CONFIG, image_size=24), replace(RECIPE, augment=None)

    checkpoint = train(tmp_path / "whole", recipe, dataset=PAIRS, config=config)

    assert len(composed) == 1
    assert composed[0].equal(held_out_examples()[0])
    assert checkpoint.recipe["augment"] == "none"
    assert checkpoint.figures["held_out_images"] == 20
    with monkeypatch.context() as patch:
        act_at(patch, STEPS_PER_EPOCH + 3, interrupt)
        with pytest.raises(Interrupted):
            train(tmp_path / "halved", recipe, dataset=PAIRS, config=config)
    assert_same(train(tmp_path / "halved", recipe, resume=True, dataset=PAIRS, config=config), checkpoint)


def test_the_error_of_impossible_pairs_names_the_setting(tmp_path: Path) -> None:
    recipe = replace(RECIPE, held_out=1)
    with pytest.raises(TrainingError, match="held_out: 1; the images held out are of one class, and pairs need two"):
        train(tmp_path, recipe, dataset=PAIRS, config=replace(CONFIG, image_size=24))


def test_a_run_on_few_images_learns_from_so_many_of_each_class_and_holds_out_others(tmp_path: Path) -> None:
    checkpoint = train(tmp_path, replace(RECIPE, epochs=1, per_class=5))
    assert checkpoint.figures["train_images"] == 15
    assert checkpoint.figures["held_out_images"] == 20


def test_images_of_none_of_the_classes_count_as_a_class_where_few_are_learned_from(tmp_path: Path) -> None:
    dataset = replace(DATASET, train_labels=torch.where(DATASET.train_labels == 2, NONE, DATASET.train_labels))
    recipe = replace(RECIPE, epochs=1, per_class=5)
    assert train(tmp_path / "few", recipe, dataset=dataset).figures["train_images"] == 15
    with pytest.raises(ValueError, match="per_class: 100; none of the classes has"):
        train(tmp_path / "many", replace(recipe, per_class=100), dataset=dataset)


def test_a_report_that_cannot_be_written_leaves_the_network_and_its_error(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (command / REPORT_FILE).mkdir(parents=True)
    monkeypatch.setattr(training.report, "write_report", write_report)
    assert main([*FLAGS, "--epochs=1", f"--out={command}"]) == 0
    assert f"{command / REPORT_FILE} could not be written: " in caplog.text
    output = capsys.readouterr().out
    assert "test error" in output
    assert output.endswith(f"wrote {command / CHECKPOINT_FILE}\n")


def numbered(count: int, batch_size: int, seed: int = 1, steps_done: int = 0) -> Batches:
    return Batches(torch.arange(count), torch.arange(count) * 10, batch_size, seed, lambda: steps_done)


def order(batches: Batches) -> list[int]:
    """Return the images of the next epoch, or of the rest of this one."""
    return [image for images, _, _ in batches for image in images.flatten().tolist()]


def test_every_epoch_has_every_image_once_with_its_label_in_another_order() -> None:
    epochs = []
    for epoch in range(3):
        batches = numbered(23, 5, steps_done=5 * epoch)
        assert len(batches) == 5
        drawn = list(batches)
        assert [len(images) for images, _, _ in drawn] == [5, 5, 5, 5, 3]
        assert all(labels.equal(images * 10) for images, labels, _ in drawn)
        assert all(turns.equal(images[:, 0] + epoch) for images, _, turns in drawn)
        epochs.append([image for images, _, _ in drawn for image in images[:, 0].tolist()])

    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_epoch_of_few_images_passes_over_them_until_it_has_its_steps() -> None:
    seen: list[tuple[int, int]] = []
    for epoch in range(3):
        batches = Batches(torch.arange(6), torch.arange(6), 5, 1, Mock(return_value=5 * epoch), steps_per_epoch=5)
        drawn = list(batches)
        assert len(drawn) == len(batches) == 5
        seen += [(image, turn) for images, _, turns in drawn for image, turn in zip(images[:, 0], turns, strict=True)]
    assert len(seen) == 7 * 6 + 5
    for number in range(7):
        one_pass = seen[6 * number : 6 * number + 6]
        assert sorted(int(image) for image, _ in one_pass) == list(range(6))
        assert all(turn == image + number for image, turn in one_pass)
    for done in range(5, 10):
        batches = Batches(torch.arange(6), torch.arange(6), 5, 1, Mock(return_value=done), steps_per_epoch=5)
        assert len(list(batches)) == 10 - done


def test_the_order_is_decided_by_seed_and_epoch_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = order(numbered(23, 5))
        torch.manual_seed(2)
        assert order(numbered(23, 5)) == first
    assert order(numbered(23, 7)) == first
    assert order(numbered(23, 5, seed=2)) != first


@pytest.mark.parametrize("done", range(10))
def test_batches_go_on_with_those_that_the_steps_done_have_not_had(done: int) -> None:
    epoch = order(numbered(23, 5, steps_done=done // 5 * 5))
    assert order(numbered(23, 5, steps_done=done)) == epoch[done % 5 * 5 :]


def test_predictions_come_in_the_images_order_whatever_the_batch_size() -> None:
    model = CapsNet(CONFIG).eval()
    images = DATASET.test_images[:11]

    probabilities, poses = predict(model, images)

    assert probabilities.shape == (11, 3)
    assert poses.shape == (11, 3, 16)
    torch.testing.assert_close(probabilities, poses.norm(dim=-1))
    for batch_size in (1, 4, 11):
        torch.testing.assert_close(predict(model, images, batch_size)[1], poses)
    with torch.no_grad():
        torch.testing.assert_close(poses, model(images / 255))


def test_mistakes_are_the_images_that_get_another_class_than_their_label() -> None:
    model = CapsNet(CONFIG).eval()
    images = DATASET.test_images[:11]
    labels = predict(model, images)[0].argmax(1)
    labels[[7, 2]] += 1
    assert mistakes(model, images, labels % 3) == [2, 7]
    assert mistakes(model, images[:2], labels[:2]) == []


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up ``python -m training`` with a tiny network and data set. Return the folder for its run."""
    monkeypatch.setitem(CONFIGS, "compact", CONFIG)
    monkeypatch.setattr(training.data.datasets, "load", lambda name, *_, **__: replace(DATASET, name=name))
    monkeypatch.setattr(training.report, "write_report", lambda folder, *_: (folder / REPORT_FILE).touch())
    return tmp_path / "runs" / "tiny"


def test_the_command_trains_and_prints_the_test_error_and_the_path_of_the_network(
    command: Path,
    finished: tuple[Checkpoint, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training.report, "write_report", write_report)
    assert main([*FLAGS, f"--out={command}"]) == 0

    expected = replace(finished[0], dataset="mnist")
    assert_same(checkpoints.load(command / CHECKPOINT_FILE), expected)
    errors = expected.figures["test_errors"]
    output = capsys.readouterr().out
    assert f"test error {errors / 0.6:.2f} % ({errors} of 60 images)" in output
    assert f"wrote {command / CHECKPOINT_FILE} and {command / REPORT_FILE}\n" in output
    assert "test error" in (command / REPORT_FILE).read_text()


def test_the_command_trains_in_a_folder_named_after_dataset_network_and_seed(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FLAGS, "--epochs=1", "--dataset=fashion-mnist"]) == 0
    checkpoint = checkpoints.load(tmp_path / "runs" / "fashion-mnist-compact-3" / CHECKPOINT_FILE)
    assert checkpoint.dataset == "fashion-mnist"


def test_the_command_says_how_to_go_on_when_interrupted_and_goes_on_with_resume(
    command: Path, finished: tuple[Checkpoint, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, STEPS_PER_EPOCH + 3, interrupt)
        assert main([*FLAGS, f"--out={command}"]) == 130
    error = capsys.readouterr().err
    assert "--resume" in error
    assert str(command / RESUME_FILE) in error

    assert main([*FLAGS, f"--out={command}", "--resume"]) == 0
    assert_same(checkpoints.load(command / CHECKPOINT_FILE), replace(finished[0], dataset="mnist"))


@pytest.mark.parametrize("held", [RESUME_FILE, CHECKPOINT_FILE])
def test_the_command_refuses_a_folder_that_holds_a_run(
    command: Path, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    command.mkdir(parents=True)
    (command / held).write_text("a run")

    assert main([*FLAGS, f"--out={command}"]) == 2

    error = capsys.readouterr().err
    assert str(command) in error
    assert "--resume" in error
    assert {path.name: path.read_text() for path in command.iterdir()} == {held: "a run"}


@pytest.mark.parametrize("exists", [False, True])
def test_the_command_refuses_to_resume_without_a_run_to_resume(
    command: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    if exists:
        command.mkdir(parents=True)
    assert main([*FLAGS, f"--out={command}", "--resume"]) == 2
    assert f"{command}: nothing to resume" in capsys.readouterr().err
    assert command.exists() == exists


@pytest.mark.parametrize("flag", ["--epochs=4", "--seed=4", "--augment=none", "--config=paper"])
def test_the_command_refuses_to_resume_with_other_settings(
    command: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, 2, interrupt)
        assert main([*FLAGS, f"--out={command}"]) == 130
    before = (command / RESUME_FILE).read_bytes()
    capsys.readouterr()

    assert main([*FLAGS, f"--out={command}", "--resume", flag]) == 2

    assert "the settings differ" in capsys.readouterr().err
    assert (command / RESUME_FILE).read_bytes() == before


def test_the_command_refuses_to_resume_a_run_without_its_settings(
    command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.mkdir(parents=True)
    (command / RESUME_FILE).write_text("a run")
    assert main([*FLAGS, f"--out={command}", "--resume"]) == 2
    assert "settings" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DatasetError("no source"), TrainingError("the loss is nan at step 7")])
def test_the_command_prints_an_error_without_a_traceback(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(training.train, "run", Mock(side_effect=error))
    assert main([*FLAGS, f"--out={command}"]) == 1
    assert capsys.readouterr().err == f"{error}\n"


@pytest.mark.parametrize(
    ("flag", "status"),
    [
        ("--epochs=0", 2),
        ("--epochs=-1", 2),
        ("--min-epoch-steps=-1", 2),
        ("--batch-size=0", 2),
        ("--learning-rate=0", 2),
        ("--learning-rate=nan", 2),
        ("--learning-rate=inf", 2),
        ("--warmup-epochs=-1", 2),
        ("--warmup-epochs=nan", 2),
        ("--ema-decay=1", 2),
        ("--ema-decay=-0.1", 2),
        ("--augment=flip", 2),
        ("--pixel-weight=-1", 2),
        ("--pixel-weight=inf", 2),
        ("--steps=0", 2),
        ("--optimizer=sgd", 2),
        ("--weight-decay=-1", 2),
        ("--schedule=linear", 2),
        ("--shift-share=1", 2),
        ("--flip=1.5", 2),
        ("--elastic=-0.1", 2),
        ("--erasing=1.1", 2),
        ("--none=0.6", 2),
        ("--none=-0.1", 2),
        ("--distil-weight=-1", 2),
        ("--distil=nowhere.pt", 1),
        ("--gradient-clip=nan", 2),
        ("--primary-divisor=inf", 2),
        ("--gradient-clip=-1", 2),
        ("--precision=16-mixed", 1),
        ("--precision=8", 2),
        ("--vote-blocks=0", 2),
        ("--per-class=0", 2),
        ("--per-class=100", 1),
        ("--normalization=sigmoid", 2),
        ("--routing-iterations=0", 2),
        ("--decoder-widths=5,0", 2),
        ("--decoder-widths=5,,6", 2),
        ("--held-out=-1", 2),
        ("--held-out=140", 1),
        ("--held-out=141", 1),
        ("--seed=-1", 2),
        ("--seed=1.5", 2),
    ],
)
def test_the_command_names_a_setting_that_no_run_can_be_made_with(
    command: Path, capsys: pytest.CaptureFixture[str], flag: str, status: int
) -> None:
    try:
        result: Any = main([*FLAGS, f"--out={command}", flag])
    except SystemExit as exit_:
        result = exit_.code
    assert result == status
    name = flag[2:].split("=")[0].replace("-", "_")
    assert f"{name}: " in capsys.readouterr().err.replace("-", "_")


def test_the_help_names_every_setting_of_a_recipe_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in text
        shown = option_of(field).shown
        assert f"(default: {field.default if shown is None else shown})" in text
    from_data = {"image_channels", "image_size", "classes"}
    of_network = [field.name for field in fields(NetworkChanges)]
    assert of_network == [field.name for field in fields(CapsNetConfig) if field.name not in from_data]
    for name in of_network:
        assert f"--{name.replace('_', '-')}" in text


def test_the_choices_that_are_known_before_pytorch_is_imported_are_those_of_the_code() -> None:
    assert tuple(CONFIGS) == recipe_choices.CONFIG_NAMES
    assert tuple(AUGMENTATIONS) == recipe_choices.AUGMENTATION_NAMES


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_wrong_flags_are_refused_before_pytorch_is_imported(tmp_path: Path) -> None:
    for name in ("finished", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "finished" / CHECKPOINT_FILE).touch()
    (tmp_path / "begun" / RESUME_FILE).touch()
    (tmp_path / "data" / "empty").mkdir(parents=True)
    refused = [
        (2, "--image-size=-5 --data=.", "image_size: -5; expected 1 or more"),
        (2, "--image-size=0 --data=.", "image_size: 0; expected 1 or more"),
        (2, "--image-size=28", "--image-size goes with --data"),
        (2, "--epoch=3", "unrecognized arguments: --epoch=3"),
        (2, "--data=. --dataset=mnist", "--data takes the place of --dataset"),
        (2, "--data=. --data-dir=.", "--data-dir has a data set's files, --data your own images"),
        (2, "--data-dir=. --source=npm", "--source goes without --data and --data-dir"),
        (2, "--data=. --source=npm", "--source goes without --data and --data-dir"),
        (2, "--config=big", "config: 'big'; expected one of paper, authors, compact"),
        (2, "--dataset=cifar", "dataset: 'cifar'; expected one of mnist"),
        (2, "--augment=flip", "augment: 'flip'; expected one of affine"),
        (2, "--learning-rate=inf", "learning_rate: inf; expected a finite number"),
        (2, "--ema-decay=1", "ema_decay: 1.0; expected a number below 1"),
        (2, "--routing-iterations=0", "routing_iterations: 0; expected 1 or more"),
        (2, f"--out={tmp_path}/finished", "holds a finished run; --resume with more --epochs goes on"),
        (2, f"--out={tmp_path}/begun", "holds a run; --resume continues it"),
        (2, f"--out={tmp_path}/none --resume", "nothing to resume"),
        (1, f"--data={tmp_path}/nowhere", "no such folder"),
        (1, f"--data={tmp_path}/data", "there is no image in empty"),
    ]
    code = """if True:
        import sys
        from training.__main__ import main
        for flags in sys.argv[1:]:
            try:
                status = main(flags.split())
            except SystemExit as error:
                status = error.code
            print("status", status, file=sys.stderr)
        sys.exit("torch" in sys.modules)
    """
    result = run_python(code, *(flags for _, flags, _ in refused))
    assert result.returncode == 0, result.stderr
    answers = re.split(r"status (\d)\n", result.stderr)
    for (status, flags, text), answer, found in zip(refused, answers[::2], answers[1::2], strict=False):
        assert (flags, int(found)) == (flags, status)
        assert text in answer
        assert "Traceback" not in answer


@pytest.mark.parametrize("imported", ["framework", "numpy", "argparse", "{}.command"])
@pytest.mark.parametrize("command_line", ["training --epochs=1", "export {} models", "serving.client {}"])
def test_ctrl_c_in_any_import_is_one_line(tmp_path: Path, command_line: str, imported: str) -> None:
    checkpoint = tmp_path / CHECKPOINT_FILE
    checkpoint.touch()
    code = """if True:
        import importlib.abc, os, runpy, signal, sys

        class Interrupting(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == imported:
                    os.kill(os.getpid(), signal.SIGINT)

        imported, folder, module, *sys.argv[1:] = sys.argv[1:]
        sys.meta_path.insert(0, Interrupting())
        os.chdir(folder)
        runpy.run_module(module, run_name="__main__")
    """
    words = command_line.format(checkpoint).split()
    imported = imported.replace("framework", "grpc" if "client" in command_line else "torch")
    result = run_python(code, imported.format(words[0]), str(tmp_path), *words)
    assert result.returncode == 130, result.stderr
    assert [line.partition(";")[0] for line in result.stderr.split("\n") if line] == ["interrupted"]
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_ctrl_c_before_the_first_step_is_one_line(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Training, "configure_optimizers", lambda self: interrupt())
    try:
        assert main([*FLAGS, f"--out={command}"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert capsys.readouterr().err == "\ninterrupted\n"
    monkeypatch.undo()


def test_ctrl_c_while_the_report_is_written_says_that_the_network_is_trained(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.report, "write_report", Mock(side_effect=KeyboardInterrupt))
    assert main([*FLAGS, f"--out={command}"]) == 130
    told = f"interrupted; the network is trained, python -m training.report {command} writes its report\n"
    assert capsys.readouterr().err.endswith(f"\n{told}")
    assert (command / CHECKPOINT_FILE).exists()


def test_the_command_prints_the_notes_on_the_data(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = replace(DATASET, notes=("images are scaled", "few images"))
    monkeypatch.setattr(training.data.datasets, "load", lambda *_, **__: noted)
    monkeypatch.setattr(training.train, "run", Mock(return_value=None))
    assert main([*FLAGS, f"--out={command}"]) == 0
    assert capsys.readouterr().err == "note: images are scaled\nnote: few images\n"


def test_a_held_out_loss_that_is_never_a_number_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_held_out_losses(monkeypatch, [math.nan, math.inf, math.nan])
    with pytest.raises(TrainingError, match="held-out loss was a finite number in none of the 3 epochs"):
        train(tmp_path)
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_a_finished_run_goes_on_with_more_epochs_and_keeps_its_first_network(
    command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, f"--out={command}"]
    assert main([*flags, "--epochs=1"]) == 0
    first = checkpoints.load(command / CHECKPOINT_FILE)
    assert main([*flags, "--epochs=1", "--resume"]) == 2
    assert "this run is finished" in capsys.readouterr().err
    settings = (command / "settings.json").read_text()
    (command / "settings.json").write_text("not ours")
    assert main([*flags, "--epochs=2", "--resume"]) == 2
    assert "the settings differ" in capsys.readouterr().err
    (command / "settings.json").write_text(settings)
    assert main([*flags, "--epochs=2", "--seed=4", "--resume"]) == 2
    assert "the settings differ" in capsys.readouterr().err

    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, STEPS_PER_EPOCH + 2, interrupt)
        assert main([*flags, "--epochs=2", "--resume"]) == 130
    assert_same(checkpoints.load(command / "capsnet-1.pt"), first)
    assert main([*flags, "--epochs=2", "--resume"]) == 0

    last = torch.load(command / RESUME_FILE, weights_only=True)
    assert last["global_step"] == 2 * STEPS_PER_EPOCH
    assert len(epoch_figures(command, "held_out_loss")) == 2
    assert checkpoints.load(command / CHECKPOINT_FILE).recipe["epochs"] == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_error_of_exhausted_memory_names_the_flags_that_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(training.train, "margin_loss", Mock(side_effect=error))
    with pytest.raises(TrainingError, match="out of memory; a smaller --batch-size, --vote-blocks 8 or --precision"):
        train(tmp_path)
    monkeypatch.setattr(training.train, "margin_loss", Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        train(tmp_path / "another")


def test_the_resume_file_is_no_checkpoint_to_export(finished: tuple[Checkpoint, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not a .* not a trainer's last\.ckpt"):
        checkpoints.load(finished[1] / RESUME_FILE)


def test_a_disk_that_fills_up_leaves_the_last_whole_resume_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Checkpoint, Path]
) -> None:
    real = torch.save

    def save(content: dict[str, Any], path: Path) -> None:
        real(content, path)
        if content.get("global_step") == 2 * STEPS_PER_EPOCH and RESUME_FILE in str(path):
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path)
    assert torch.load(tmp_path / RESUME_FILE, weights_only=True)["global_step"] == STEPS_PER_EPOCH
    assert_same(train(tmp_path, resume=True), finished[0])


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"hello" * 100])
def test_a_damaged_resume_file_is_reported_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    train_until(3, tmp_path)
    path = tmp_path / RESUME_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match=r"last\.ckpt: damaged or cut off"):
        train(tmp_path, resume=True)


def test_another_file_in_the_place_of_the_resume_file_is_refused(tmp_path: Path) -> None:
    train_until(3, tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / RESUME_FILE)
    with pytest.raises(TrainingError, match=r"last\.ckpt: not a file that training wrote"):
        train(tmp_path, resume=True)
