"""Tests of the choices of a recipe: what each changes in a run."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import lightning
import pytest
import torch
from torch import Tensor

import training.train
from tests.trainings import (
    CONFIG,
    DATASET,
    RECIPE,
    STEPS_PER_EPOCH,
    assert_same,
    epoch_figures,
    process_state,
    train,
    train_until,
)
from training.checkpoint import save
from training.data.specs import NONE
from training.evaluate import predict
from training.loss import margin_loss
from training.model import lengths, to_pixels
from training.recorded.learner import total_loss
from training.run_folder import CHECKPOINT_FILE, RESUME_FILE
from training.train import Training, TrainingError, load_teachers

__all__ = ["process_state"]  # a fixture that surrounds every run


def steps_of(folder: Path) -> int:
    steps: int = torch.load(folder / RESUME_FILE, weights_only=True)["global_step"]
    return steps


@pytest.mark.parametrize(("steps", "epochs", "expected", "parts"), [(6, 3, 6, 3), (10, 4, 12, 4), (2, 3, 2, 2)])
def test_a_schedule_that_is_said_in_steps_has_as_many_whatever_the_images(
    tmp_path: Path, steps: int, epochs: int, expected: int, parts: int
) -> None:
    checkpoint = train(tmp_path, replace(RECIPE, steps=steps, epochs=epochs))
    assert steps_of(tmp_path) == expected
    assert checkpoint.recipe["epochs"] == parts
    assert len(epoch_figures(tmp_path, "held_out_loss")) == parts


def test_a_run_of_so_many_steps_is_resumed_as_exactly(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=9, epochs=3)
    undisturbed = train(tmp_path / "undisturbed", recipe)
    train_until(5, tmp_path / "halved", recipe)
    assert_same(train(tmp_path / "halved", recipe, resume=True), undisturbed)


def test_the_exponential_schedule_and_adamw_are_what_the_optimizer_gets() -> None:
    recipe = replace(RECIPE, optimizer="adamw", weight_decay=0.25, schedule="exponential", warmup_epochs=0)
    optimizers = Training(CONFIG, recipe, 10).configure_optimizers()
    optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0]
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(RECIPE.learning_rate * 0.96**0.01)


def test_a_run_with_every_further_choice_learns_and_is_resumed_as_exactly(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE,
        optimizer="adamw",
        schedule="exponential",
        shift_share=0.05,
        flip=0.5,
        elastic=0.3,
        erasing=0.2,
        none=0.125,
        precision="bf16-mixed",
    )
    undisturbed = train(tmp_path / "undisturbed", recipe)
    losses = epoch_figures(tmp_path / "undisturbed", "classification_loss_epoch")
    assert losses[-1] < 0.6 * losses[0]
    train_until(STEPS_PER_EPOCH + 2, tmp_path / "halved", recipe)
    assert_same(train(tmp_path / "halved", recipe, resume=True), undisturbed)


def test_the_default_arithmetic_is_that_of_the_device_and_is_told_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.train, "default_precision", lambda: "bf16-mixed")
    made: list[str] = []
    trainer = lightning.Trainer

    def recorded(**options: object) -> lightning.Trainer:
        made.append(str(options["precision"]))
        return trainer(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(lightning, "Trainer", recorded)
    assert train(tmp_path, replace(RECIPE, epochs=1, precision=None)).recipe["precision"] == "bf16-mixed"
    assert made == ["bf16-mixed"]


def step_of(module: Training, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Run one step of a module, and return the values that it logged, such as the loss."""
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.trainer = Mock(global_rank=0, world_size=1, global_step=0)
    logged["loss"] = module.training_step((images[:, None], labels[:, None], torch.arange(len(labels))), 0)
    return logged


def test_one_image_in_eight_is_of_none_of_the_classes_and_adds_no_reconstruction() -> None:
    recipe = replace(RECIPE, augment="none", none=0.125, pixel_weight=0.01)
    module = Training(CONFIG, recipe, STEPS_PER_EPOCH)
    images, labels = DATASET.train_images[:14], DATASET.train_labels[:14]
    seen: list[Tensor] = []
    module.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))

    logged = step_of(module, images, labels)

    pixels = seen[0]
    assert pixels.shape == (16, 1, 20, 20)
    assert pixels[:14].equal(to_pixels(images))
    assert pixels[14:].min() >= 0
    assert pixels[14:].max() <= 1
    poses = module.model(pixels)
    probabilities = lengths(poses)
    with_none = torch.cat([labels, torch.full((2,), NONE)])
    torch.testing.assert_close(logged["classification_loss"], margin_loss(probabilities, with_none))
    assert module.model.decoder is not None
    errors = (module.model.decoder(poses[:14], labels) - pixels[:14]).square().sum((1, 2, 3))
    torch.testing.assert_close(logged["reconstruction_loss"], 0.01 * errors.sum() / 16, rtol=1e-5, atol=0)


def test_a_network_that_saw_images_of_none_of_the_classes_is_less_sure_of_a_blank(tmp_path: Path) -> None:
    blank = torch.stack([torch.full((1, 20, 20), level, dtype=torch.uint8) for level in (0, 90, 180, 255)])
    longest = []
    for none in (0.0, 0.25):
        recipe = replace(RECIPE, epochs=10, none=none)
        model = train(tmp_path / str(none), recipe).model()
        longest.append(predict(model, blank)[0].amax(1).mean().item())
    assert longest[1] < 0.75 * longest[0]


def test_the_mean_lengths_of_other_networks_are_learned_too(tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second" / CHECKPOINT_FILE]
    teachers = [
        train(tmp_path / name, replace(RECIPE, seed=seed, epochs=1)) for name, seed in (("first", 1), ("second", 2))
    ]
    recipe = replace(RECIPE, augment="none", distil=tuple(map(str, files)), distil_weight=0.5)
    module = Training(CONFIG, recipe, STEPS_PER_EPOCH, 0, load_teachers(recipe, CONFIG, DATASET.labels))
    images, labels = DATASET.train_images[:8], DATASET.train_labels[:8]

    logged = step_of(module, images, labels)

    with torch.no_grad():
        targets = torch.stack([lengths(one.model()(to_pixels(images))) for one in teachers]).mean(0)
        own = lengths(module.model(to_pixels(images)))
    torch.testing.assert_close(logged["distillation_loss"], 0.5 * (own - targets).square().sum(1).mean())
    parts = ("classification_loss", "reconstruction_loss", "distillation_loss")
    torch.testing.assert_close(logged["loss"], torch.stack([logged[name] for name in parts]).sum())
    assert not any("teacher" in name or "target" in name for name in module.state_dict())

    checkpoint = train(tmp_path / "student", replace(recipe, epochs=1))
    assert checkpoint.recipe["distil"] == tuple(map(str, files))
    assert len(epoch_figures(tmp_path / "student", "distillation_loss_epoch")) == 1


def test_a_teacher_of_other_images_or_classes_is_told_by_name(tmp_path: Path) -> None:
    checkpoint = train(tmp_path / "teacher", replace(RECIPE, epochs=1))
    recipe = replace(RECIPE, distil=(str(tmp_path / "teacher"),))
    with pytest.raises(TrainingError, match=r"distil: .*teacher: trained on other images or classes"):
        load_teachers(recipe, replace(CONFIG, image_size=24), DATASET.labels)
    with pytest.raises(TrainingError, match="trained on other images or classes"):
        load_teachers(recipe, CONFIG, ("a", "b", "c"))
    save(replace(checkpoint, state_dict={}), tmp_path / "bad.pt")
    for name, text in (("bad.pt", "the weights do not fit"), ("none.pt", "none.pt: no such file")):
        with pytest.raises(TrainingError, match=f"distil: .*{text}"):
            load_teachers(replace(RECIPE, distil=(str(tmp_path / name),)), CONFIG, DATASET.labels)


def test_a_compiled_network_learns_what_a_network_that_is_not_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's own code takes minutes of a small machine; the tracing before it is the same without.
    compiled: list[dict[str, object]] = []

    def compile_quickly(self: torch.nn.Module, **options: object) -> None:
        compiled.append(options)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    plain = train(tmp_path / "plain", replace(RECIPE, epochs=1))
    quick = train(tmp_path / "compiled", replace(RECIPE, epochs=1, compile=True))
    assert len(compiled) == 1
    assert quick.state_dict.keys() == plain.state_dict.keys()
    for name, value in plain.state_dict.items():
        torch.testing.assert_close(quick.state_dict[name], value, rtol=1e-3, atol=1e-4)


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")
    monkeypatch.setattr(training.train, "margin_loss", Mock(side_effect=error))
    with pytest.raises(TrainingError, match=r"--compile failed: no C\+\+ compiler$"):
        train(tmp_path)


def test_both_trainers_have_the_same_loss() -> None:
    """The trainer of GPU days and this one share their losses: margin, reconstruction and distillation, with NONE."""
    module = Training(CONFIG, replace(RECIPE, augment="none", none=0.125, distil_weight=0.5), STEPS_PER_EPOCH)
    module.targets = lambda pixels: pixels.mean((1, 2, 3), keepdim=True).flatten(1).expand(-1, 3)
    seen: list[Tensor] = []
    module.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    labels = DATASET.train_labels[:14]
    logged = step_of(module, DATASET.train_images[:14], labels)

    images = (255 * seen[0]).round().to(torch.uint8)
    with_none = torch.cat([labels, torch.full((2,), NONE)])[:, None]
    weights = torch.tensor([RECIPE.pixel_weight, 0.5])
    other = total_loss(module.model, images, images[:, None], with_none, module.targets(seen[0]), weights)
    torch.testing.assert_close(other, logged["loss"])
