"""The training run: the Lightning module, the run from data set to finished network, and the final test."""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training.callbacks import AveragedWeights, KeepBest, StopBetweenSteps, WholeFiles
from training.checkpoint import Checkpoint, CheckpointError, load, save
from training.data.augment import Augmentation
from training.data.batches import FIRST_STEP_NUMBER, Batches, steps_per_pass
from training.data.batches import generator as seeded
from training.data.compose import combine, place, scenes
from training.data.datasets import Dataset, per_class, split
from training.data.non_objects import non_objects
from training.data.specs import NONE
from training.evaluate import mean_lengths, mistakes, predict, wrong
from training.loss import distillation_loss, margin_loss, presence_loss, reconstruction_loss
from training.model import CapsNet, CapsNetConfig, lengths, to_pixels
from training.optimization import cosine_factor, exponential_factor, parameter_groups
from training.precision import avoid_matrix_tiles, default_precision, subnormals_flushed
from training.progress import ShowProgress
from training.provenance import process_count, provenance
from training.recipe import HELD_OUT_SHARE, Recipe
from training.run_folder import BEST_FILE, CHECKPOINT_FILE, RESUME_FILE, checkpoint_path
from training.tracking import tracker

EVALUATION_BATCH_SIZE = 500

Labelled = tuple[Tensor, Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on. The text says why. The resume file of the last whole epoch is kept."""


class Result(NamedTuple):
    """A finished run: its checkpoint, and the probabilities (M, J) that the network gives the test images."""

    checkpoint: Checkpoint
    probabilities: Tensor


class Training(lightning.LightningModule):
    """The network with its losses, optimizer and schedule, as a module of Lightning.

    steps_per_epoch: of the ``recipe.epochs`` epochs. canvas: of composed images, see ``Dataset``. teachers: networks
    whose mean lengths are learned too.
    """

    def __init__(
        self,
        config: CapsNetConfig,
        recipe: Recipe,
        steps_per_epoch: int,
        canvas: int = 0,
        teachers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.canvas = canvas
        model = CapsNet(config, recipe.vote_blocks)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.augment: Callable[[Tensor, Tensor, torch.Generator], Tensor] = Augmentation(
            recipe.augment or "affine", recipe.shift_share, recipe.flip, recipe.elastic, recipe.erasing
        )
        # In a function, so that the teachers are neither learned nor averaged nor saved.
        self.targets = (lambda pixels: _targets(teachers, pixels)) if teachers else None

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        parts, labels, pixels = self._images(*batch)
        count = len(labels)
        # Every process makes the whole batch and takes its share of it, so that their number changes no result.
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        share = slice(rank, None, processes) if rank < count else slice(1)
        weight = len(range(rank, count, processes)) * processes / count  # the mean over processes is the batch's mean
        parts, labels, pixels = parts[share], labels[share], pixels[share]

        poses = self.model(pixels).float()
        probabilities = lengths(poses)
        loss = weight * self._classification_loss(probabilities, labels)
        self._log("classification_loss", loss, count, prog_bar=True, on_epoch=True)
        if self.targets is not None:
            distillation = weight * self.recipe.distil_weight * distillation_loss(probabilities, self.targets(pixels))
            self._log("distillation_loss", distillation, count, on_epoch=True)
            loss = loss + distillation
        if self.model.decoder is not None:
            reconstruction = weight * self._reconstruction_loss(self.model.decoder, poses, parts, labels)
            self._log("reconstruction_loss", reconstruction, count, on_epoch=True)
            loss = loss + reconstruction
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.global_step}; try a lower learning rate")
        return loss

    def _images(self, images: Tensor, labels: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a step's objects (B, K, C, H, W), their labels (B, K), and the images of them (B, C, H, W), as pixels.

        images: (B, K, C, H, W) uint8; labels: (B, K); turns: (B,). Images of none of the classes are added, as many as
        the recipe says.
        """
        count, objects = labels.shape
        # The seed depends on the step, not on earlier draws, so that a resumed run draws the same numbers.
        generator = seeded(self.recipe.seed, FIRST_STEP_NUMBER + self.global_step)
        parts = self.augment(to_pixels(images.flatten(0, 1)), turns.repeat_interleave(objects), generator)
        if self.canvas:
            parts = place(parts, self.canvas, generator)
        parts = parts.reshape(count, objects, *parts.shape[1:])
        pixels = combine(parts)
        if added := round(count * self.recipe.none / (1 - self.recipe.none)):
            drawn = (255 * pixels[:added]).round().to(torch.uint8).cpu()
            others = to_pixels(non_objects(drawn, generator)).to(pixels.device)
            pixels = torch.cat([pixels, others])
            parts = torch.cat([parts, others.unsqueeze(1).expand(-1, objects, -1, -1, -1)])
            labels = torch.cat([labels, labels.new_full((len(others), objects), NONE)])
        return parts, labels, pixels

    def _reconstruction_loss(self, decoder: nn.Module, poses: Tensor, parts: Tensor, labels: Tensor) -> Tensor:
        """Return the reconstruction loss, averaged over all images. Images of none of the classes add nothing."""
        result = poses.new_zeros(())
        known = labels[:, 0] != NONE
        if not known.any():
            return result
        share = 1.0
        if not known.all():
            poses, parts, labels, share = poses[known], parts[known], labels[known], float(known.float().mean())
        for part, label in zip(parts.unbind(1), labels.unbind(1), strict=True):
            result = result + reconstruction_loss(decoder(poses, label), part, self.recipe.pixel_weight)
        return share * result

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        probabilities = lengths(self.model(to_pixels(images)).float())
        self._log("held_out_loss", self._classification_loss(probabilities, labels), len(labels))
        errors = wrong(probabilities, labels).float().mean()
        self._log("held_out_error_percent", 100 * errors, len(labels), prog_bar=True)

    def _log(self, name: str, value: Tensor, count: int, **options: Any) -> None:
        self.log(name, value, batch_size=count, sync_dist=self.trainer.world_size > 1, **options)

    def _classification_loss(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        if self.model.config.classes == 1:
            return presence_loss(probabilities, labels)
        return margin_loss(probabilities, labels)

    def configure_optimizers(self) -> Any:
        warmup = max(1, round(self.recipe.warmup_epochs * self.steps_per_epoch))
        total = self.recipe.epochs * self.steps_per_epoch

        def factor(step: int) -> float:
            if self.recipe.schedule == "exponential":
                return exponential_factor(step, warmup, self.recipe.learning_rate)
            return cosine_factor(step, warmup, total)

        optimizer: torch.optim.Optimizer
        if self.recipe.optimizer == "adamw":
            groups = parameter_groups(self.model, self.recipe.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=self.recipe.learning_rate)
        else:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def _targets(teachers: Sequence[nn.Module], pixels: Tensor) -> Tensor:
    return mean_lengths([teacher.to(pixels.device) for teacher in teachers], pixels)


def load_teachers(recipe: Recipe, config: CapsNetConfig, labels: Sequence[str]) -> list[nn.Module]:
    """Read the networks to learn from.

    Raises TrainingError, with the file's name, if a file is no checkpoint or has other images or classes.
    """
    teachers: list[nn.Module] = []
    for path in recipe.distil:
        try:
            teacher = load(checkpoint_path(Path(path)))
            if teacher.config.image_shape != config.image_shape or tuple(teacher.labels) != tuple(labels):
                raise CheckpointError(f"{path}: trained on other images or classes")
            teachers.append(teacher.model().requires_grad_(False))
        except CheckpointError as error:
            raise TrainingError(f"distil: {error}") from error
    return teachers


def _check_resumable(path: Path) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        whole = isinstance(content, dict) and {"pytorch-lightning_version", "averaging_state"} <= content.keys()
    except Exception as error:  # torch.load raises many kinds of errors for other files
        raise TrainingError(f"{path}: damaged or cut off; it cannot be resumed") from error
    if not whole:
        raise TrainingError(f"{path}: not a file that training wrote to resume from")


@subnormals_flushed()
def run(
    config: CapsNetConfig,
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    track: str | None = None,
) -> Result | None:
    """Train, select on the held-out images, test once, and write ``folder/capsnet.pt``.

    The averaged weights of the epoch with the lowest held-out loss are kept; with ``held_out=0``, those of the last
    epoch. Under ``torchrun`` the processes train together, each on its share of every batch, and only the first
    returns a result; the others return None. track: one of TRACKERS to log to as well, or None. Raises TrainingError
    if a loss is not a number, Interrupted after a signal, and KeyboardInterrupt if it comes before the first step.
    """
    if resume:
        _check_resumable(folder / RESUME_FILE)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(recipe.seed, verbose=False)
    recipe = _chosen(recipe, dataset)
    train, held_out = _parts(dataset, recipe)
    batch_size = recipe.batch_size - round(recipe.none * recipe.batch_size)
    recipe, steps_per_epoch = _schedule(recipe, steps_per_pass(len(train), batch_size))
    selection = _held_out_images(dataset, held_out, recipe.seed)
    batches = Batches(
        dataset.train_images[train],
        dataset.train_labels[train],
        batch_size,
        recipe.seed,
        lambda: module.global_step,
        dataset.objects,
        steps_per_epoch,
    )
    module = Training(config, recipe, len(batches), dataset.canvas, load_teachers(recipe, config, dataset.labels))
    if recipe.compile:
        module.model.compile()
    timer = Timer()  # goes on counting after an interruption
    keep_best = KeepBest(folder / BEST_FILE) if selection else None
    trackers = [tracker(track, folder, asdict(recipe))] if track else []
    trainer = _trainer(recipe, folder, timer, keep_best, progress, trackers)
    origin = provenance(trainer.strategy.root_device)  # before training, while the files are still the running source
    _fit(trainer, module, batches, selection, folder / RESUME_FILE if resume else None)
    if not trainer.is_global_zero:
        return None

    kept = _kept(keep_best, folder, recipe)
    module.load_state_dict(kept["state_dict"])
    model = module.model.eval()
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "train_images": len(train)}
    if selection:
        figures |= _selection_figures(model, selection, kept["epoch"] + 1)
    probabilities, tested = _test(model, dataset)
    figures |= {**tested, "seconds": round(timer.time_elapsed("train"), 1), **origin}
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    checkpoint = Checkpoint(config, dataset.name, dataset.labels, asdict(recipe), figures, state)
    save(checkpoint, folder / CHECKPOINT_FILE)
    return Result(checkpoint, probabilities)


def _kept(keep_best: KeepBest | None, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the trainer's checkpoint of the kept epoch. Raises TrainingError if no epoch had a loss.

    It is read from the file: in memory, the averaged weights are in place only when training has just ended.
    """
    if keep_best and not keep_best.kept:
        raise TrainingError(
            f"the held-out loss was a finite number in none of the {recipe.epochs} epochs; try a lower learning rate"
        )
    path = keep_best.path if keep_best else folder / RESUME_FILE
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _chosen(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe with its open choices filled in from the data set and the device."""
    return replace(
        recipe,
        augment=recipe.augment or ("none" if dataset.canvas else "affine"),
        precision=recipe.precision or default_precision(),
    )


def _schedule(recipe: Recipe, one_pass: int) -> tuple[Recipe, int]:
    """Return the recipe with the run's number of epochs, and the steps of an epoch. one_pass: the steps of a pass."""
    if recipe.steps is None:
        return recipe, max(one_pass, recipe.min_epoch_steps)
    steps_per_epoch = math.ceil(recipe.steps / recipe.epochs)
    return replace(recipe, epochs=math.ceil(recipe.steps / steps_per_epoch)), steps_per_epoch


def _held_out_images(dataset: Dataset, held_out: Tensor, seed: int) -> Labelled | None:
    """Return the held-out images in the form for the network, with their labels, or None if there are none."""
    if not len(held_out):
        return None
    images, labels = dataset.train_images[held_out], dataset.train_labels[held_out]
    if not dataset.canvas:
        return images, labels
    return scenes(images, labels, dataset.objects, dataset.canvas, seeded(seed, -1))


def _selection_figures(model: CapsNet, selection: Labelled, epoch: int) -> dict[str, int]:
    """Return the figures of the selection of an epoch, counted from 1, on the held-out images."""
    errors = len(mistakes(model, *selection))
    return {"selected_epoch": epoch, "held_out_errors": errors, "held_out_images": len(selection[1])}


def _fit(
    trainer: lightning.Trainer,
    module: Training,
    batches: Batches,
    selection: Labelled | None,
    resume_from: Path | None,
) -> None:
    """Train with Lightning.

    Raises TrainingError if memory runs out, and KeyboardInterrupt on a Ctrl-C that comes before the first step.
    """
    with warnings.catch_warnings():
        # Advice on worker processes and logging intervals does not apply to data in memory.
        warnings.filterwarnings("ignore", module="lightning")
        try:
            trainer.fit(
                module,
                batches,
                DataLoader(TensorDataset(*selection), batch_size=EVALUATION_BATCH_SIZE) if selection else None,
                ckpt_path=resume_from,
                weights_only=True,
            )
        except SystemExit as error:  # Lightning turns KeyboardInterrupt into it
            raise KeyboardInterrupt from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise TrainingError(f"--compile failed: {str(error).strip().splitlines()[0]}") from error
            if not _is_out_of_memory(error):
                raise
            raise TrainingError(
                "out of memory; a smaller --batch-size, --vote-blocks 8 or --precision bf16-mixed take less"
            ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Return True if PyTorch or Python found no memory. On a CPU only PyTorch's text says so."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _test(model: CapsNet, dataset: Dataset) -> tuple[Tensor, dict[str, Any]]:
    """Run the finished network once over the test images. Return probabilities (M, J), and the figures."""
    probabilities, _ = predict(model, dataset.test_images)
    test_mistakes = wrong(probabilities, dataset.test_labels).nonzero().flatten().tolist()
    others = dataset.none_test_images
    none: dict[str, Any] = {}
    if others is not None:
        lengths_of_others, _ = predict(model, others)
        errors = wrong(lengths_of_others, torch.full((len(others),), NONE))
        none = {"none_test_errors": int(errors.sum()), "none_test_images": len(others)}
    return probabilities, none | {
        "test_errors": len(test_mistakes),
        "test_mistakes": test_mistakes,
        "test_images": len(dataset.test_images),
    }


def _parts(dataset: Dataset, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the indices of the training images and of the held-out images."""
    labels = dataset.train_labels
    count = len(labels)
    held_out_count = count // HELD_OUT_SHARE if recipe.held_out is None else recipe.held_out
    if held_out_count >= count:
        raise TrainingError(f"held_out: {held_out_count}; {dataset.name} has {count} images to train on")
    train, held_out = split(count, held_out_count, recipe.seed)
    if recipe.per_class is not None:
        train = train[per_class(labels[train], recipe.per_class, recipe.seed)]
    if len(dataset.labels) == 1 and not (labels[train] == NONE).any():
        raise TrainingError(f"{dataset.name}: one class alone; it takes images without it to learn what it is not")
    for part, name in ((train, "learned from"), (held_out, "held out")):
        if dataset.objects > 1 and len(part) and len(set(labels[part].tolist())) == 1:
            raise TrainingError(f"held_out: {held_out_count}; the images {name} are of one class, and pairs need two")
    return train, held_out


def _trainer(
    recipe: Recipe,
    folder: Path,
    timer: Timer,
    keep_best: KeepBest | None,
    progress: bool,
    trackers: Sequence[Logger] = (),
) -> lightning.Trainer:
    """Make Lightning's trainer for the number of processes that torchrun has started, else for one."""
    avoid_matrix_tiles()
    processes, here = process_count(), process_count("LOCAL_WORLD_SIZE")
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.precision == "16-mixed" and accelerator == "cpu":
        raise TrainingError("precision: 16-mixed needs a GPU; bf16-mixed runs on a CPU too")
    callbacks: list[Callback] = [
        timer,
        AveragedWeights(recipe.ema_decay),
        StopBetweenSteps(folder / RESUME_FILE),
        ModelCheckpoint(folder, Path(RESUME_FILE).stem, enable_version_counter=False, save_on_train_epoch_end=True),
    ]
    if keep_best:
        callbacks.append(keep_best)
    if progress:
        callbacks.append(ShowProgress())
    csv = CSVLogger(folder, name="logs")
    return lightning.Trainer(
        accelerator=accelerator,
        devices=here,
        num_nodes=processes // here,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        precision=recipe.precision,  # type: ignore[arg-type]
        gradient_clip_val=recipe.gradient_clip or None,
        deterministic=recipe.deterministic,
        max_epochs=recipe.epochs,
        callbacks=callbacks,
        logger=[csv, TensorBoardLogger(folder, name="logs", version=csv.version), *trackers],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[WholeFiles()],
        log_every_n_steps=50,
    )
