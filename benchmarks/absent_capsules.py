"""``python -m benchmarks.absent_capsules``: train networks that let primary capsules be absent, and measure routing.

Everything is judged on the held-out images. The test images are not looked at.
"""

import argparse
import csv
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from benchmarks.absent_network import Change, ChangedCapsNet
from benchmarks.data import load_or_exit
from training.callbacks import AveragedWeights
from training.data.batches import Batches, generator
from training.data.datasets import Dataset, split
from training.data.non_objects import non_objects
from training.data.sources import add_file_flags
from training.evaluate import PRESENT_LENGTH
from training.model import CONFIGS, CapsNetConfig, lengths, to_pixels
from training.precision import avoid_matrix_tiles, default_precision, subnormals_flushed
from training.provenance import provenance
from training.recipe import HELD_OUT_SHARE, Recipe
from training.routing_figures import ABSENT_LENGTH, PRIMARY_PRESENT_LENGTH, coupling_entropies
from training.train import Training

RESULTS = Path(__file__).parent / "results" / "absent-capsules-cpu.csv"
RECIPE = Recipe(batch_size=128, optimizer="adamw", learning_rate=3e-3, warmup_epochs=0.5, none=0.125, augment="affine")
EVALUATION_BATCH_SIZE = 250
SWITCHING_SHARE = 0.05  # a capsule that is absent in so many images, and present in so many others, switches


@dataclass(frozen=True)
class Try:
    """One way to let primary capsules be absent.

    change: of the network; fields: of its config. penalty: the weight of the mean primary length in the loss;
    none_penalty: of that of the images of none of the classes alone. none: their share of a step's images.
    """

    reason: str
    change: Change = field(default_factory=Change)
    fields: Mapping[str, Any] = field(default_factory=dict)
    penalty: float = 0.0
    none_penalty: float = 0.0
    none: float = RECIPE.none

    def config(self, name: str) -> CapsNetConfig:
        """Return the network's config, that of this name with the changed fields."""
        return replace(CONFIGS[name], **self.fields)


TRIES = {
    "baseline": Try("what is shipped"),
    "scale 4": Try("the logits of agreement times 4", fields={"routing_scale": 4}),
    "penalty 1": Try("the mean primary length costs much", penalty=1.0),
    "20 longest": Try("only the 20 longest of 100 capsules remain", Change(longest=20)),
    "own gate": Try("a presence of its own for each capsule, at first 0.12", fields={"primary_gate": True}),
    "threshold": Try("a squash that is 0 up to a length of 1", Change(squash="threshold")),
    "scale 16": Try("the logits times 16", fields={"routing_scale": 16}),
    "batch norm": Try("batch normalization before the squash: no long drift", Change(normalization="batch")),
    "type norm": Try("positions of a type compete for its length", Change(normalization="type")),
    "types compete": Try("types at a position share one presence", Change(types_compete=True)),
    "scale 16, own gate": Try("both", fields={"routing_scale": 16, "primary_gate": True}),
    "scale 64": Try("the logits times 64", fields={"routing_scale": 64}),
    "scale 64, own gate": Try("both", fields={"routing_scale": 64, "primary_gate": True}),
    "scale 16, 20 longest": Try("both", Change(longest=20), {"routing_scale": 16}),
    "scale 16, types compete": Try("both", Change(types_compete=True), {"routing_scale": 16}),
    "scale 16, type norm": Try("both", Change(normalization="type"), {"routing_scale": 16}),
    "one iteration": Try("no routing at all, for comparison", fields={"routing_iterations": 1}),
    "no non-digits": Try("only digits are seen", none=0.0),
    "penalty 0.1": Try("the mean primary length costs", penalty=0.1),
    "exponential squash": Try("1 - exp(-|s|), with a gradient at 0", Change(squash="exponential")),
    "small start": Try("primary weights a tenth as large, no bias at first", Change(weights=0.1, bias=0.0)),
    "divisor 32": Try("the authors' divisor of the primary convolution", fields={"primary_divisor": 32.0}),
    "divisor 32, bias 0.5": Try(
        "the same, with a bias that makes capsules present at first", Change(bias=0.5), {"primary_divisor": 32.0}
    ),
    "learned scale": Try("the factor of the logits is learned", Change(learned_scale=True)),
    "non-digit penalty": Try("primary capsules are to be absent where there is no digit", none_penalty=0.1),
    "far squash": Try("|s|^2 / (10 + |s|^2)", Change(squash="far")),
    "scale 8": Try("the logits times 8", fields={"routing_scale": 8}),
    "scale 2": Try("the logits times 2", fields={"routing_scale": 2}),
    "penalty 0.01": Try("the mean primary length costs little", penalty=0.01),
}


class TryTraining(Training):
    """The training of one try: the usual one, with the try's network and penalties."""

    def __init__(self, one: Try, name: str, recipe: Recipe, steps_per_epoch: int) -> None:
        config = one.config(name)
        super().__init__(config, recipe, steps_per_epoch)
        torch.manual_seed(recipe.seed)
        self.one = one
        model = ChangedCapsNet(config, one.change)
        self.model: ChangedCapsNet = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        if self.one.penalty:
            loss = loss + self.one.penalty * self.model.primary_lengths.mean()
        if self.one.none_penalty:  # the images of none of the classes follow the others
            loss = loss + self.one.none_penalty * self.model.primary_lengths[len(batch[1]) :].mean()
        return loss


@torch.inference_mode()
def measure(model: ChangedCapsNet, images: Tensor, labels: Tensor, others: Tensor) -> dict[str, float | int]:
    """Return the figures of a network in evaluation mode, by their columns in the results.

    images: (N, C, H, W) uint8 with labels (N,); others: (M, C, H, W) uint8, which show none of the classes.
    """
    iterations = model.config.routing_iterations
    sums: dict[str, float] = {f"entropy_{number}": 0.0 for number in range(1, iterations + 1)}
    sums |= {"largest_coupling": 0.0, "present_entropy": 0.0}
    found, answers = [], []
    for part in torch.split(images, EVALUATION_BATCH_SIZE):
        u = model.primary_capsules(to_pixels(part))  # (B, I, D)
        found.append(lengths(u))
        each = []
        for count in range(1, iterations + 1):
            poses, couplings = model.routed(u, count)
            entropies = coupling_entropies(couplings)  # (B, I)
            sums[f"entropy_{count}"] += float(entropies.double().sum()) / u.shape[1]
            each.append(lengths(poses).argmax(1))
        sums["largest_coupling"] += float(couplings.amax(1).double().sum()) / u.shape[1]
        weighted = (entropies * found[-1]).double().sum(1) / found[-1].double().sum(1).clamp_min(1e-9)
        sums["present_entropy"] += float(weighted.sum())
        answers.append(torch.stack(each))
    lengths_found, all_answers = torch.cat(found), torch.cat(answers, 1)
    errors = (all_answers != labels).sum(1)  # by the number of iterations
    return {
        "held_out_errors": int(errors[-1]),
        "held_out_images": len(images),
        "one_iteration_errors": int(errors[0]),
        "one_iteration_changes": int((all_answers[0] != all_answers[-1]).sum()),
        **_primary_figures(lengths_found),
        **{name: total / len(images) for name, total in sums.items()},
        **_none_figures(model, others),
    }


def _primary_figures(found: Tensor) -> dict[str, float]:
    """Return the figures of primary lengths (N, I)."""
    absent, present = found < ABSENT_LENGTH, found > PRIMARY_PRESENT_LENGTH
    switching = (absent.float().mean(0) >= SWITCHING_SHARE) & (present.float().mean(0) >= SWITCHING_SHARE)
    return {
        "primary_length": float(found.double().mean()),
        "primary_absent": float(absent.double().mean()),
        "primary_present": float(present.double().mean()),
        "switching": float(switching.double().mean()),
    }


def _none_figures(model: ChangedCapsNet, others: Tensor) -> dict[str, float]:
    """Return the figures of images (M, C, H, W) that show none of the classes."""
    total, found = 0.0, 0
    for part in torch.split(others, EVALUATION_BATCH_SIZE):
        u = model.primary_capsules(to_pixels(part))
        total += float(lengths(u).double().mean(1).sum())
        poses, _ = model.routed(u, model.config.routing_iterations)
        found += int((lengths(poses).amax(1) > PRESENT_LENGTH).sum())
    return {"none_primary_length": total / len(others), "none_found": found / len(others)}


def train(one: Try, name: str, recipe: Recipe, dataset: Dataset, *, progress: bool = False) -> dict[str, Any]:
    """Train the network of a try and return its figures on the held-out images, from its averaged last weights."""
    lightning.seed_everything(recipe.seed, verbose=False)
    images, labels = dataset.train_images, dataset.train_labels
    chosen, held_out = split(len(images), recipe.held_out or len(images) // HELD_OUT_SHARE, recipe.seed)
    recipe = replace(recipe, none=one.none, precision=recipe.precision or default_precision())
    batch_size = recipe.batch_size - round(recipe.none * recipe.batch_size)
    batches = Batches(images[chosen], labels[chosen], batch_size, recipe.seed, lambda: module.global_step)
    module = TryTraining(one, name, recipe, len(batches))
    callbacks: list[Callback] = [AveragedWeights(recipe.ema_decay)]
    if progress:
        callbacks.append(TQDMProgressBar(leave=False))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=recipe.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, batches)
    seconds = time.process_time() - start
    kept = images[held_out]
    others = non_objects(kept, generator(recipe.seed, -1))
    figures = measure(module.model.eval(), kept, labels[held_out], others)
    return figures | {"precision": recipe.precision, "cpu_seconds": seconds}


COLUMNS = (
    "try", "config", "epochs", "seed", "held_out_errors", "held_out_images", "one_iteration_errors",
    "one_iteration_changes", "primary_length", "primary_absent", "primary_present", "switching", "entropy_1",
    "entropy_2", "entropy_3", "present_entropy", "largest_coupling", "none_primary_length", "none_found",
    "precision", "cpu_seconds", "device", "torch", "commit",
)  # fmt: skip
KEY = ("try", "config", "epochs", "seed")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def add(row: Mapping[str, Any], path: Path) -> None:
    """Add a row to a results file; numbers get five significant digits."""
    new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})


@subnormals_flushed()
def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.absent_capsules", description=__doc__)
    command.add_argument("--tries", nargs="+", choices=TRIES, default=list(TRIES), metavar="TRY", help="default: all")
    command.add_argument("--config", choices=CONFIGS, default="fast", help="network (default: fast)")
    command.add_argument("--epochs", type=int, default=2, help="of each training (default: 2)")
    command.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="N", help="default: 1")
    add_file_flags(command)
    command.add_argument(
        "--out", type=Path, default=RESULTS, metavar="CSV", help="a try whose row is in this file is not repeated"
    )
    options = command.parse_args(arguments)
    if options.epochs < 1 or min(options.seeds) < 0:
        command.error("--epochs takes 1 or more, --seeds 0 or more")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    avoid_matrix_tiles()
    dataset = load_or_exit("mnist", options)
    done = {tuple(row[name] for name in KEY) for row in read(options.out)}
    keys = [(name, options.config, options.epochs, seed) for name in options.tries for seed in options.seeds]
    for key in (bar := tqdm([key for key in keys if tuple(map(str, key)) not in done], unit="try")):
        name, config, epochs, seed = key
        bar.set_description(f"{name}, seed {seed}")
        figures = train(TRIES[name], config, replace(RECIPE, epochs=epochs, seed=seed), dataset)
        origin = {
            name: value
            for name, value in provenance(torch.device("cpu")).items()
            if name in ("device", "torch", "commit")
        }
        add(dict(zip(KEY, key, strict=True)) | figures | origin, options.out)
        tqdm.write(
            f"{name}: {figures['held_out_errors']} errors, primary length {figures['primary_length']:.3f}, "
            f"largest coupling {figures['largest_coupling']:.3f}, "
            f"one iteration changes {figures['one_iteration_changes']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
