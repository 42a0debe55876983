"""``python -m training``: train a capsule network, test it once, and write its checkpoint."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from training.augment import AUGMENTATIONS
from training.datasets import DATASETS, DatasetError, load
from training.model import CONFIGS
from training.train import CHECKPOINT_FILE, RESUME_FILE, Interrupted, Recipe, TrainingError, run

HELP = {
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "learning_rate": "peak of Adam's learning rate; a linear warm-up leads to it and half a cosine down to 0",
    "warmup_epochs": "length of the warm-up",
    "ema_decay": "decay a step of the averaged weights, the ones that are evaluated and kept",
    "augment": "random changes to the training images: affine, or the paper's shift, or none",
    "pixel_weight": "weight of the sum of squared pixel errors in the loss; the authors' code amounts to 0.01",
    "held_out": "training images held out to select the epoch; 0 trains on all and keeps the last epoch",
    "seed": "seed of initialisation, order, augmentation and split",
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training",
        description="Train a capsule network, test it once, and write its checkpoint.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    result.add_argument("--config", choices=CONFIGS, default="compact", help="the network (default: compact)")
    result.add_argument("--dataset", choices=DATASETS, default="mnist", help="what it learns (default: mnist)")
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
            type=type(field.default),
            default=field.default,
            metavar="{" + ",".join(AUGMENTATIONS) + "}" if field.name == "augment" else "N",
            help=f"{HELP[field.name]} (default: {field.default})",
        )
    return result


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    try:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    except ValueError as error:
        command.error(str(error))
    folder: Path = options.out or Path("runs") / f"{options.dataset}-{options.config}-{recipe.seed}"
    settings = json.dumps({"config": options.config, "dataset": options.dataset, "recipe": asdict(recipe)}, indent=2)
    settings_file = folder / "settings.json"
    if options.resume:
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
        dataset = load(options.dataset, options.data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(settings)
        checkpoint = run(CONFIGS[options.config], dataset, recipe, folder, resume=options.resume)
    except (DatasetError, TrainingError) as error:
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
