"""``python -m training``: train a capsule network, test it once, and write its checkpoint."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from training.checkpoint import CHECKPOINT_FILE
from training.data.augment import AUGMENTATIONS
from training.data.datasets import NAMES, DatasetError, load
from training.data.folder import load_folder
from training.model import AGREEMENTS, CONFIGS, INITIALIZATIONS, NORMALIZATIONS, CapsNetConfig
from training.report import REPORT_FILE
from training.train import (
    HELD_OUT_SHARE,
    PRECISIONS,
    RESUME_FILE,
    Interrupted,
    Recipe,
    TrainingError,
    run,
)

HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a step, of all processes together",
    "learning_rate": "peak of Adam's learning rate; a linear warm-up leads to it and half a cosine down to 0",
    "warmup_epochs": "length of the warm-up",
    "ema_decay": "decay a step of the averaged weights, the ones that are evaluated and kept",
    "augment": "random changes to the training images: affine; shift by up to two pixels, the paper's; all-shifts, "
    "the 25 of them in turn, the authors'; or none",
    "pixel_weight": "weight of the sum of squared pixel errors in the loss; the authors' code amounts to 0.01",
    "gradient_clip": "largest norm of the gradient, longer ones are shortened to it; 0 for any",
    "precision": "32-true, or mixed: bf16-mixed, or 16-mixed on a GPU",
    "vote_blocks": "blocks of primary capsules that are routed one after the other, without storing the votes: less "
    "memory, more time, the same result",
    "per_class": "images of each class to learn from, chosen at random; those held out are others",
    "held_out": "training images held out to select the epoch, 0 to train on all and keep the last epoch",
    "seed": "seed of initialisation, order, augmentation and split",
    "deterministic": "only operations that give the same result each time, or an error where PyTorch has none",
}
NETWORK_HELP = {
    "conv_channels": "channels of the first convolution",
    "primary_types": "types of primary capsules",
    "primary_dim": "dimension of the primary capsules",
    "digit_dim": "dimension of the digit capsules, the poses",
    "routing_iterations": "iterations of the routing; 1 is uniform coupling",
    "decoder_widths": "layers of the decoder, as 512,1024, or none to train without reconstruction",
    "digit_bias": "a bias on each digit capsule's sum of votes (the authors' code)",
    "primary_divisor": "what the primary convolution's output is divided by before its bias is added (authors: 32)",
    "initialization": "of the convolutions",
    "agreement": "of a vote with a pose",
    "normalization": "of the routing logits to couplings",
    "routing_gradient": "let gradients flow through the couplings (the authors' code)",
}
DEFAULTS = {
    "augment": "affine, or none where the data set composes its images",
    "per_class": "all",
    "held_out": f"one in {HELD_OUT_SHARE}",
}
CHOICES: dict[str, Collection[str]] = {
    "augment": AUGMENTATIONS,
    "precision": PRECISIONS,
    "initialization": INITIALIZATIONS,
    "agreement": AGREEMENTS,
    "normalization": NORMALIZATIONS,
}


def _widths(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(int(width) for width in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers, as 512,1024, or none") from error


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any], help_: str, default: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    if isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_)
        return
    kind: Callable[[str], Any]
    metavar, kind = "N", int if field.default is None else type(field.default)
    if field.name in CHOICES:
        metavar, kind = "{" + ",".join(CHOICES[field.name]) + "}", str
    elif field.name == "decoder_widths":
        kind = _widths
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=help_)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training",
        usage="%(prog)s [--config NAME] [--dataset NAME | --data FOLDER] [--out FOLDER] [--resume] [--help] ...",
        description="Train a capsule network, test it once, and write its checkpoint.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    result.add_argument("--config", choices=CONFIGS, default="compact", help="the network (default: compact)")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=NAMES, default="mnist", help="what it learns (default: mnist)")
    source.add_argument(
        "--data", type=Path, metavar="FOLDER", help="or a folder of your own images, FOLDER/CLASS/*.png, of any size"
    )
    result.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="with --data: height and width to scale all images to (default: their own if all have one, else 32)",
    )
    result.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="a folder with the dataset's files, or to store them in"
    )
    result.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run's folder (default: runs/DATASET-CONFIG-SEED)"
    )
    result.add_argument("--resume", action="store_true", help="continue the interrupted run in the run's folder")
    recipe = result.add_argument_group("recipe")
    for field in fields(Recipe):
        shown = DEFAULTS.get(field.name, field.default)
        _add_flag(recipe, field, f"{HELP[field.name]} (default: {shown})", field.default)
    network = result.add_argument_group("network", "what differs from --config")
    for field in fields(CapsNetConfig):
        if field.name in NETWORK_HELP:
            _add_flag(network, field, NETWORK_HELP[field.name], None)
    return result


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    changes = {name: getattr(options, name) for name in NETWORK_HELP if getattr(options, name) is not None}
    try:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
        config = replace(CONFIGS[options.config], **changes)
    except ValueError as error:
        command.error(str(error))
    if options.image_size is not None and options.data is None:
        command.error("--image-size goes with --data; the data sets have a size of their own")
    name = options.data.resolve().name if options.data else options.dataset
    folder: Path = options.out or Path("runs") / f"{name}-{options.config}-{recipe.seed}"
    chosen = {"config": options.config, "dataset": str(options.data or name), "image_size": options.image_size}
    settings = json.dumps(chosen | {"network": changes, "recipe": asdict(recipe)}, indent=2)
    settings_file = folder / "settings.json"
    if options.resume:
        if (folder / CHECKPOINT_FILE).exists():
            print(f"{folder}: this run is finished, {CHECKPOINT_FILE} is there; nothing to resume", file=sys.stderr)
            return 2
        if not (folder / RESUME_FILE).exists():
            print(f"{folder}: nothing to resume, there is no {RESUME_FILE}", file=sys.stderr)
            return 2
        if not settings_file.exists() or settings_file.read_text() != settings:
            print(f"--resume: the settings differ from those in {settings_file}; give the same ones", file=sys.stderr)
            return 2
    elif (folder / RESUME_FILE).exists() or (folder / CHECKPOINT_FILE).exists():
        print(f"{folder}: holds a run; --resume continues it, --out chooses another folder", file=sys.stderr)
        return 2
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun has started; the others are silent
    try:
        if options.data:
            dataset = load_folder(options.data, options.image_size, progress=first)
        else:
            dataset = load(options.dataset, options.data_dir, progress=first)
        channels, size, _ = dataset.image_shape
        config = replace(config, image_channels=channels, image_size=size, classes=len(dataset.labels))
        folder.mkdir(parents=True, exist_ok=True)
        if first and not options.resume:
            settings_file.write_text(settings)
        checkpoint = run(config, dataset, recipe, folder, resume=options.resume)
    except (DatasetError, TrainingError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted:
        if first:
            print(
                f"\ninterrupted; the same command with --resume continues from {folder / RESUME_FILE}", file=sys.stderr
            )
        return 130
    if checkpoint is None:
        return 0
    figures = checkpoint.figures
    percent = 100 * figures["test_errors"] / figures["test_images"]
    print(f"test error {percent:.2f} % ({figures['test_errors']} of {figures['test_images']} images)")
    written = [path for path in (folder / CHECKPOINT_FILE, folder / REPORT_FILE) if path.is_file()]
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
