"""The training run: batches, the Lightning module, interruption and resumption, and the final test."""

import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, Timer, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoint import CHECKPOINT_FILE, Checkpoint, save, write_whole
from training.data.augment import AUGMENTATIONS
from training.data.compose import combine, members, place, scenes
from training.data.datasets import Dataset, per_class, split
from training.evaluate import mistakes, predict, wrong
from training.loss import PIXEL_WEIGHT, margin_loss, presence_loss, reconstruction_loss
from training.model import CapsNet, CapsNetConfig, lengths, to_pixels
from training.provenance import process_count, provenance
from training.report import REPORT_FILE, write_report

RESUME_FILE = "last.ckpt"
BEST_FILE = "best.ckpt"
HELD_OUT_SHARE = 12  # MNIST's 60,000 training images hold out 5,000
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Every field is a flag of ``python -m training``. Raises ValueError on a wrong one.

    augment: None for the data set's own: ``none`` where images are composed of objects at random places, as they are
    in the papers, else ``affine``.
    """

    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_epochs: float = 1.0
    ema_decay: float = 0.999
    augment: str | None = None
    pixel_weight: float = PIXEL_WEIGHT
    gradient_clip: float = 0.0
    precision: str = "32-true"
    vote_blocks: int = 1
    per_class: int | None = None  # None: all images
    held_out: int | None = None  # None: one in HELD_OUT_SHARE
    seed: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("warmup_epochs", 0),
            ("seed", 0),
            ("pixel_weight", 0),
            ("gradient_clip", 0),
            ("vote_blocks", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: {getattr(self, name)}; expected {least} or more")
        if self.held_out is not None and self.held_out < 0:
            raise ValueError(f"held_out: {self.held_out}; expected 0 or more")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class: {self.per_class}; expected 1 or more")
        if self.seed >= 2**31:
            raise ValueError(f"seed: {self.seed}; expected less than 2147483648")
        for name in ("warmup_epochs", "pixel_weight", "gradient_clip"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)}; expected a finite number")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate}; expected a number above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay}; expected 0 or more, and below 1")
        if self.augment not in (None, *AUGMENTATIONS):
            raise ValueError(f"augment: {self.augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: {self.precision!r}; expected one of {', '.join(PRECISIONS)}")


class TrainingError(RuntimeError):
    """Training cannot go on; the text says why. The resume file of the last whole epoch is kept."""


class Interrupted(Exception):
    """The user stopped the run; a checkpoint to resume from was written.

    Not a KeyboardInterrupt, which Lightning turns into SystemExit.
    """


# A run's generators are numbered: those of the epochs from 0 on, those of the steps from here on.
_STEPS = 10_000


def _generator(seed: int, number: int) -> torch.Generator:
    """One of a run's sequence of generators; neighbouring seeds share none within a million."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


class Batches:
    """Shuffled batches of one epoch after another, each of images (B, K, C, H, W), labels (B, K) and turns (B,).

    An image's K objects are the one whose turn in the epoch it is and, for pairs, another of another class. Turns are
    for the augmentations. What comes next is a function of the seed and of how many steps are done, and of nothing
    else: a run resumed anywhere sees the batches that an undisturbed one would have seen.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        steps_done: Callable[[], int],
        objects: int = 1,
    ) -> None:
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.steps_done = steps_done
        self.objects = objects

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rest of the epoch that the steps done lead into."""
        epoch, position = divmod(self.steps_done(), len(self))
        generator = _generator(self.seed, epoch)
        order = torch.randperm(len(self.images), generator=generator)
        together = members(self.labels, self.objects, generator)[order]
        for chosen in torch.split(together, self.batch_size)[position:]:
            yield self.images[chosen], self.labels[chosen], chosen[:, 0] + epoch


class Training(lightning.LightningModule):
    """The network with its losses, optimizer and schedule, as Lightning drives it.

    canvas: of composed images, see ``Dataset``.
    """

    def __init__(self, config: CapsNetConfig, recipe: Recipe, steps_per_epoch: int, canvas: int = 0) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.canvas = canvas
        model = CapsNet(config, recipe.vote_blocks)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.augment = AUGMENTATIONS[recipe.augment or "affine"]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels, turns = batch
        count, objects = labels.shape
        # Seeded by the step, not by what was drawn before, so that a resumed run draws the same.
        generator = _generator(self.recipe.seed, _STEPS + self.global_step)
        parts = self.augment(to_pixels(images.flatten(0, 1)), turns.repeat_interleave(objects), generator)
        if self.canvas:
            parts = place(parts, self.canvas, generator)
        # Every process makes the whole batch and takes its share of it, so that their number changes no result.
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        share = slice(rank, None, processes) if rank < count else slice(1)
        weight = len(range(rank, count, processes)) * processes / count  # the mean over processes is the batch's mean
        parts, labels = parts.reshape(count, objects, *parts.shape[1:])[share], labels[share]

        poses = self.model(combine(parts))
        loss = weight * self._classification_loss(lengths(poses), labels)
        self._log("classification_loss", loss, count, prog_bar=True, on_epoch=True)
        if self.model.decoder is not None:
            reconstruction = torch.zeros_like(loss)
            for part, label in zip(parts.unbind(1), labels.unbind(1), strict=True):
                reconstructed = self.model.decoder(poses, label)
                reconstruction = reconstruction + reconstruction_loss(reconstructed, part, self.recipe.pixel_weight)
            self._log("reconstruction_loss", weight * reconstruction, count, on_epoch=True)
            loss = loss + weight * reconstruction
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.global_step}; try a lower learning rate")
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        probabilities = lengths(self.model(to_pixels(images)))
        self._log("held_out_loss", self._classification_loss(probabilities, labels), len(labels))
        errors = wrong(probabilities, labels).float().mean()
        self._log("held_out_error_percent", 100 * errors, len(labels), prog_bar=True)

    def _log(self, name: str, value: Tensor, count: int, **options: Any) -> None:
        self.log(name, value, batch_size=count, sync_dist=self.trainer.world_size > 1, **options)

    def _classification_loss(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        if self.model.config.classes == 1:
            return presence_loss(probabilities)
        return margin_loss(probabilities, labels)

    def configure_optimizers(self) -> Any:
        warmup = max(1, round(self.recipe.warmup_epochs * self.steps_per_epoch))
        total = self.recipe.epochs * self.steps_per_epoch

        def factor(step: int) -> float:
            """Linear from 0, then half a cosine down to 0."""
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))

        optimizer = torch.optim.Adam(self.parameters(), lr=self.recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        loss = float(trainer.callback_metrics["held_out_loss"])
        if loss < self.loss:
            self.loss = loss
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss = state_dict["loss"]


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints under their names only once they are whole, so that a full disk leaves the last good one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_whole(checkpoint, Path(path))


def _check_resumable(path: Path) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        whole = isinstance(content, dict) and {"pytorch-lightning_version", "averaging_state"} <= content.keys()
    except Exception as error:  # bytes of another kind make torch.load raise almost anything
        raise TrainingError(f"{path}: damaged or cut off; it cannot be resumed") from error
    if not whole:
        raise TrainingError(f"{path}: not a file that training wrote to resume from")


def run(
    config: CapsNetConfig,
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Checkpoint | None:
    """Train, select on the held-out images, test once, and write ``folder/capsnet.pt`` and the report beside it.

    The averaged weights of the epoch with the lowest held-out loss are kept; with ``held_out=0``, those of the last
    epoch. Started by ``torchrun``, the processes train together, each on its share of every batch, and all but the
    first return None. Raises TrainingError on a loss that is no number, Interrupted when stopped by a signal.
    """
    if resume:
        _check_resumable(folder / RESUME_FILE)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_flush_denormal(True)  # subnormal gradients of settled capsules slow a CPU down many times
    lightning.seed_everything(recipe.seed, verbose=False)
    if recipe.augment is None:
        recipe = replace(recipe, augment="none" if dataset.canvas else "affine")
    train, held_out = _parts(dataset, recipe)
    held_out_images, held_out_labels = dataset.train_images[held_out], dataset.train_labels[held_out]
    if dataset.canvas and len(held_out):
        fixed = _generator(recipe.seed, -1)
        held_out_images, held_out_labels = scenes(
            held_out_images, held_out_labels, dataset.objects, dataset.canvas, fixed
        )
    batches = Batches(
        dataset.train_images[train],
        dataset.train_labels[train],
        recipe.batch_size,
        recipe.seed,
        lambda: module.global_step,
        dataset.objects,
    )
    module = Training(config, recipe, len(batches), dataset.canvas)
    timer = Timer()  # goes on counting after an interruption
    callbacks: list[Callback] = [
        timer,
        EMAWeightAveraging(decay=recipe.ema_decay),
        StopBetweenSteps(folder / RESUME_FILE),
        ModelCheckpoint(folder, Path(RESUME_FILE).stem, enable_version_counter=False, save_on_train_epoch_end=True),
    ]
    if len(held_out):
        callbacks.append(KeepBest(folder / BEST_FILE))
    if progress:
        callbacks.append(TQDMProgressBar(leave=True))
    trainer = _trainer(recipe, folder, callbacks, progress)
    origin = provenance(trainer.strategy.root_device)  # before training, while the source is what it runs
    with warnings.catch_warnings():
        # Advice on worker processes and logging intervals, which data held in memory has no use for.
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(
            module,
            batches,
            DataLoader(TensorDataset(held_out_images, held_out_labels), batch_size=500) if len(held_out) else None,
            ckpt_path=folder / RESUME_FILE if resume else None,
            weights_only=True,
        )
    if not trainer.is_global_zero:
        return None

    # From the file, since in memory the averaged weights are in place only when training has just ended.
    kept = torch.load(folder / (BEST_FILE if len(held_out) else RESUME_FILE), map_location="cpu", weights_only=True)
    module.load_state_dict(kept["state_dict"])
    model = module.model.eval()
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(train),
    }
    if len(held_out):
        figures |= {
            "selected_epoch": kept["epoch"] + 1,
            "held_out_errors": len(mistakes(model, held_out_images, held_out_labels)),
            "held_out_images": len(held_out),
        }
    probabilities, _ = predict(model, dataset.test_images)
    test_mistakes = wrong(probabilities, dataset.test_labels).nonzero().flatten().tolist()
    figures |= {
        "test_errors": len(test_mistakes),
        "test_mistakes": test_mistakes,
        "test_images": len(dataset.test_images),
        "seconds": round(timer.time_elapsed("train"), 1),
        **origin,
    }
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    checkpoint = Checkpoint(config, dataset.name, dataset.labels, asdict(recipe), figures, state)
    save(checkpoint, folder / CHECKPOINT_FILE)
    try:
        write_report(folder, checkpoint, dataset, probabilities)
    except Exception as error:  # drawing can fail in many ways, and what counts is written
        _logger.warning("%s could not be written: %s", folder / REPORT_FILE, error)
    return checkpoint


def _parts(dataset: Dataset, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The indices of the training images to learn from and of those held out."""
    labels = dataset.train_labels
    count = len(labels)
    held_out_count = count // HELD_OUT_SHARE if recipe.held_out is None else recipe.held_out
    if held_out_count >= count:
        raise TrainingError(f"held_out: {held_out_count}; {dataset.name} has {count} images to train on")
    train, held_out = split(count, held_out_count, recipe.seed)
    if recipe.per_class is not None:
        train = train[per_class(labels[train], recipe.per_class, recipe.seed)]
    for part, name in ((train, "learned from"), (held_out, "held out")):
        if dataset.objects > 1 and len(part) and len(set(labels[part].tolist())) == 1:
            raise TrainingError(f"held_out: {held_out_count}; the images {name} are of one class, and pairs need two")
    return train, held_out


def _trainer(recipe: Recipe, folder: Path, callbacks: list[Callback], progress: bool) -> lightning.Trainer:
    """Lightning's trainer, on as many processes as torchrun says it has started, else on one."""
    processes, here = process_count(), process_count("LOCAL_WORLD_SIZE")
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.precision == "16-mixed" and accelerator == "cpu":
        raise TrainingError("precision: 16-mixed needs a GPU; bf16-mixed runs on a CPU too")
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
        logger=[csv, TensorBoardLogger(folder, name="logs", version=csv.version)],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[WholeFiles()],
        log_every_n_steps=50,
    )
