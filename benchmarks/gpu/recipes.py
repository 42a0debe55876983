"""``python -m benchmarks.gpu.recipes``: compare networks and training recipes on held-out training images.

Each network is trained with each recipe once a fold, all of them side by side, and judged on the fold's images, which
it never saw. The test images are not read.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import load_or_exit
from training.data.sources import add_file_flags
from training.evaluate import predict, wrong
from training.model import CONFIGS, CapsNet, CapsNetConfig
from training.provenance import commit
from training.recorded.chunks import Chunk, Digits, Distortion
from training.recorded.learner import Hyperparameters, Learner, learn, total_loss, training_device

PROBED_EPOCHS = 2  # their time decides how many fit
FOLD = 10_000  # images; the first fold is the data set's first images, the second the next ones
#: The networks for single digits.
DIGIT_CONFIGS = [name for name, config in CONFIGS.items() if config.image_size == CapsNetConfig().image_size]
JUDGED_SEED = 123  # of the distorted copies of the held-out images


@dataclass(frozen=True)
class Recipe:
    """A training recipe: the distortion of the images, and the settings of the training."""

    distortion: Distortion
    settings: Hyperparameters


_PLAIN = Recipe(Distortion(), Hyperparameters())
RECIPES = {
    "plain": _PLAIN,
    "pixels": replace(_PLAIN, settings=Hyperparameters(pixel_weight=0.005)),
    "wide": replace(_PLAIN, distortion=Distortion(shift=4, rotation=20, shear=0.2, scale=(0.8, 1.2))),
    "erasing": replace(_PLAIN, distortion=Distortion(erasing=0.5)),
    "elastic": replace(_PLAIN, distortion=Distortion(elastic=0.5)),
    "decay": replace(_PLAIN, settings=Hyperparameters(weight_decay=0.1)),
    "decay-pixels": replace(_PLAIN, settings=Hyperparameters(weight_decay=0.1, pixel_weight=0.005)),
    "all": Recipe(
        Distortion(shift=3, rotation=18, shear=0.18, scale=(0.82, 1.18), elastic=0.3, erasing=0.25),
        Hyperparameters(pixel_weight=0.002, weight_decay=0.05),
    ),
}


@dataclass
class Trial:
    """One network and recipe on one fold."""

    config: str
    name: str
    fold: int
    data: Digits
    chunk: Chunk
    learner: Learner[CapsNet]


def compare(
    names: Sequence[str],
    images: Tensor,
    labels: Tensor,
    configs: Sequence[str],
    folds: int,
    epochs: int,
    batch: int,
    device: torch.device,
    compiled: bool,
    held_out: int = FOLD,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """Train every network with every recipe on every fold, side by side, and return a row of figures for each.

    seconds: for the epochs; if they do not fit, all recipes get fewer.
    """
    images, labels = images.to(device), labels.to(device)
    trials = []
    for fold in range(folds):
        kept = torch.ones(len(images), dtype=torch.bool, device=device)
        kept[fold * held_out : (fold + 1) * held_out] = False
        for config, name in itertools.product(configs, names):
            recipe = RECIPES[name]
            data = Digits(images[kept], labels[kept], batch, fold, recipe.distortion, True)
            build = partial(CapsNet, CONFIGS[config])
            steps = epochs * data.steps
            learner = Learner(build, total_loss, fold + 1, recipe.settings, steps, device, compiled=compiled)
            chunk = data()
            learner.prepare(chunk, graph=compiled)
            trials.append(Trial(config, name, fold, data, chunk, learner))
            print(f"{config} {name} {fold} prepared", flush=True)
    begin = time.perf_counter()
    epoch = 0
    while epoch < epochs:
        for trial in trials:
            trial.chunk.fill(trial.data())
            trial.learner.loss.zero_()
        learn([trial.learner for trial in trials], trials[0].data.steps, device)
        epoch += 1
        took = time.perf_counter() - begin
        if epoch == PROBED_EPOCHS and took / epoch * epochs > seconds:
            epochs = max(epoch, int(seconds * epoch / took))
            for trial in trials:
                trial.learner.shorten(epochs * trial.data.steps)
        if epoch % 10 == PROBED_EPOCHS or epoch == epochs:
            print(f"epoch {epoch} of {epochs}: {took:.0f} s", flush=True)
    return [_judged(trial, images, labels, held_out) | {"epochs": epochs} for trial in trials]


def _judged(trial: Trial, images: Tensor, labels: Tensor, held_out: int) -> dict[str, Any]:
    part = slice(trial.fold * held_out, (trial.fold + 1) * held_out)
    model = trial.learner.averaged()
    recipe = RECIPES[trial.name]
    generator = torch.Generator(images.device).manual_seed(JUDGED_SEED)
    still, moved = images[part], Distortion()(images[part], generator)
    found = {}
    for name, judged in (("clean", still), ("distorted", moved)):
        probabilities, _ = predict(model, judged, 2000)
        found[name] = wrong(probabilities, labels[part].cpu())
    return {
        "config": trial.config,
        "recipe": trial.name,
        "fold": trial.fold,
        "errors": int(found["clean"].sum()),
        "distorted_errors": int(found["distorted"].sum()),
        "images": len(still),
        "mistakes": found["clean"].nonzero().flatten().tolist(),
        "distortion": asdict(recipe.distortion),
        "settings": asdict(recipe.settings),
        "loss": float(trial.learner.loss),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.recipes", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="(default: all)")
    parser.add_argument("--config", action="append", choices=DIGIT_CONFIGS, help="(default: accurate)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the epochs (default: no limit)")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=int, help="use the first N images alone and hold out a fifth of them")
    parser.add_argument("--eager", action="store_true", help="neither compile nor record the step")
    add_file_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    device = training_device()
    torch.backends.cudnn.allow_tf32 = False
    mnist = load_or_exit("mnist", options)
    images, labels = mnist.train_images[: options.limit], mnist.train_labels[: options.limit]
    held_out = FOLD if options.limit is None else options.limit // 5
    names, configs = options.recipe or list(RECIPES), options.config or ["accurate"]
    begin = time.perf_counter()
    rows = compare(
        names,
        images,
        labels,
        configs,
        options.folds,
        options.epochs,
        options.batch,
        device,
        not options.eager,
        held_out,
        options.seconds,
    )
    written = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "commit": commit(),
        "batch": options.batch,
        "seconds": round(time.perf_counter() - begin, 1),
        "trials": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")
    for config, name in itertools.product(configs, names):
        mine = [row for row in rows if (row["config"], row["recipe"]) == (config, name)]
        print(config, name, [(row["errors"], row["distorted_errors"]) for row in mine], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
