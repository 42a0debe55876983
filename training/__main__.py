"""``python -m training``: train a capsule network, test it once, and write its checkpoint."""

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from training.augment import AUGMENTATIONS
from training.datasets import DATASETS, DatasetError, load
from training.folder import load_folder
from training.model import CONFIGS
from training.train import CHECKPOINT_FILE, HELD_OUT_SHARE, RESUME_FILE, Interrupted, Recipe, TrainingError, run

HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "learning_rate": "peak of Adam's learning rate; a linear warm-up leads to it and half a cosine down to 0",
    "warmup_epochs": "length of the warm-up",
    "ema_decay": "decay a step of the averaged weights, the ones that are evaluated and kept",
    "augment": "random changes to the training images: affine, or the paper's shift, or none",
    "pixel_weight": "weight of the sum of squared pixel errors in the loss; the authors' code amounts to 0.01",
    "held_out": "training images held out to select the epoch, 0 to train on all and keep the last epoch",
    "seed": "seed of initialisation, order, augmentation and split",
}

DEFAULTS = {"held_out": f"one in {HELD_OUT_SHARE}"}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a capsule network, test it once, and write its checkpoint.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    result.add_argument("--config", choices=CONFIGS, default="compact", help="the network (default: compact)")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=DATASETS, default="mnist", help="what it learns (default: mnist)")
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
    for field in fields(Recipe):
        result.add_argument(
            "--" + field.name.replace("_", "-"),
            type=int if field.default is None else type(field.default),
            default=field.default,
            metavar="{" + ",".join(AUGMENTATIONS) + "}" if field.name == "augment" else "N",
            help=f"{HELP[field.name]} (default: {DEFAULTS.get(field.name, field.default)})",
        )
    return result


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    try:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    except ValueError as error:
        command.error(str(error))
    if options.image_size is not None and options.data is None:
        command.error("--image-size goes with --data; the data sets have a size of their own")
    name = options.data.resolve().name if options.data else options.dataset
    folder: Path = options.out or Path("runs") / f"{name}-{options.config}-{recipe.seed}"
    chosen = {"config": options.config, "dataset": str(options.data or name), "image_size": options.image_size}
    settings = json.dumps(chosen | {"recipe": asdict(recipe)}, indent=2)
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
    try:
        if options.data:
            dataset = load_folder(options.data, options.image_size)
        else:
            dataset = load(options.dataset, options.data_dir)
        channels, size, _ = dataset.train_images.shape[1:]
        config = replace(CONFIGS[options.config], image_channels=channels, image_size=size, classes=len(dataset.labels))
        folder.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(settings)
        checkpoint = run(config, dataset, recipe, folder, resume=options.resume)
    except (DatasetError, TrainingError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted:
        print(f"\ninterrupted; the same command with --resume continues from {folder / RESUME_FILE}", file=sys.stderr)
        return 130
    figures = checkpoint.figures
    percent = 100 * figures["test_errors"] / figures["test_images"]
    print(f"test error {percent:.2f} % ({figures['test_errors']} of {figures['test_images']} images)")
    print(f"wrote {folder / CHECKPOINT_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
