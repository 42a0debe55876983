"""The command ``python -m training``: its flags, its refusals, and the run with its report.

The import of PyTorch takes seconds, so all checks that do not need it come first.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.files.options import add_flags, read
from serving.files.program import add_version, command_of, parse_flags, reason_of
from training.data.folder import find_images, require_negatives
from training.data.sources import DatasetError
from training.recipe import NetworkChanges, Recipe, RunOptions
from training.run_folder import CHECKPOINT_FILE, REPORT_FILE, RESUME_FILE, SETTINGS_FILE
from training.tracking import TrackerError, missing

if TYPE_CHECKING:
    from training.data.datasets import Dataset
    from training.train import Result

_logger = logging.getLogger(__name__)


class Refused(Exception):
    """The run cannot start: its folder or a package cannot be used. The text says why."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training",
        allow_abbrev=False,
        usage="%(prog)s [--config NAME] [--dataset NAME | --data FOLDER] [--out FOLDER] [--resume] [--help] ...",
        description="Train a capsule network, test it once, and write its checkpoint.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    add_version(result)
    add_flags(result, RunOptions)
    add_flags(result.add_argument_group("recipe"), Recipe)
    add_flags(result.add_argument_group("network", "what differs from --config"), NetworkChanges)
    return result


def run_command(arguments: list[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's, and return its exit status."""
    command = parser()
    parsed = parse_flags(command, arguments)
    try:
        options, recipe, changes = read(RunOptions, parsed), read(Recipe, parsed), read(NetworkChanges, parsed)
    except ValueError as error:
        command.error(str(error))
    folder = options.out or Path("runs") / f"{options.data_name}-{options.config}-{recipe.seed}"
    try:
        settings = _settings(options, recipe, changes)
        _check_folder(folder, settings, options.resume)
        if options.track and (reason := missing(options.track)):
            raise Refused(reason)
        if options.data is not None:
            require_negatives(options.data, find_images(options.data))
        return _train(command, options, recipe, changes, folder, settings)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + _way_on(folder), file=sys.stderr)
        return 130


def _way_on(folder: Path) -> str:
    """Return the words that tell how to go on after an interruption."""
    if (folder / CHECKPOINT_FILE).exists():
        return f"; the network is trained, {command_of('training.report')} {folder} writes its report"
    return "; --resume goes on from the last whole epoch" if (folder / RESUME_FILE).exists() else ""


def _settings(options: RunOptions, recipe: Recipe, changes: NetworkChanges) -> str:
    """Return the settings of a run as JSON. A run can be resumed only with the same settings."""
    chosen = {
        "config": options.config,
        "dataset": str(options.data or options.data_name),
        "image_size": options.image_size,
        "network": _given(changes),
        "recipe": asdict(recipe),
    }
    return json.dumps(chosen, indent=2)


def _given(changes: NetworkChanges) -> dict[str, object]:
    return {name: value for name, value in asdict(changes).items() if value is not None}


def _check_folder(folder: Path, settings: str, resume: bool) -> None:
    """Raise Refused if the folder holds another run, or nothing to resume with these settings."""
    finished, begun = (folder / CHECKPOINT_FILE).exists(), (folder / RESUME_FILE).exists()
    written = folder / SETTINGS_FILE
    if not resume:
        if finished:
            raise Refused(
                f"{folder}: holds a finished run; --resume with more --epochs goes on, --out chooses another folder"
            )
        if begun:
            raise Refused(f"{folder}: holds a run; --resume continues it, --out chooses another folder")
    elif not begun:
        raise Refused(f"{folder}: nothing to resume, there is no {RESUME_FILE}")
    elif finished and written.exists() and written.read_text() == settings:
        raise Refused(
            f"{folder}: this run is finished, {CHECKPOINT_FILE} is there; nothing to resume, but more --epochs go on"
        )
    elif not written.exists() or (written.read_text() != settings and not (finished and _goes_on(written, settings))):
        raise Refused(f"--resume: the settings differ from those in {written}; give the same ones")


def _goes_on(written: Path, settings: str) -> bool:
    """Return True if the settings are those of a run's folder with more epochs."""
    try:
        before, now = (_without_epochs(text) for text in (written.read_text(), settings))
    except (KeyError, TypeError, ValueError):  # a file that training did not write
        return False
    # With more epochs, the parts of a schedule in steps would have other lengths.
    return before[0] < now[0] and before[1] == now[1] and now[1]["recipe"].get("steps") is None


def _without_epochs(settings: str) -> tuple[int, dict[str, Any]]:
    content = json.loads(settings)
    return content["recipe"].pop("epochs"), content


def _set_aside(folder: Path) -> None:
    """Rename a finished run's network by its number of epochs, so that the run counts as unfinished again."""
    epochs, _ = _without_epochs((folder / SETTINGS_FILE).read_text())
    (folder / CHECKPOINT_FILE).rename(folder / f"capsnet-{epochs}.pt")


def _train(
    command: argparse.ArgumentParser,
    options: RunOptions,
    recipe: Recipe,
    changes: NetworkChanges,
    folder: Path,
    settings: str,
) -> int:
    """Train with PyTorch, print the figures, and write the report. Return the command's exit status."""
    from training import train
    from training.callbacks import Interrupted
    from training.data import datasets
    from training.model import CONFIGS

    first = os.environ.get("RANK", "0") == "0"  # only the first process of torchrun prints
    try:
        config = replace(CONFIGS[options.config], **_given(changes))  # type: ignore[arg-type]
        if options.image_size is not None:
            config = replace(config, image_size=options.image_size)
    except ValueError as error:
        command.error(str(error))
    try:
        if options.data:
            dataset = datasets.load_folder(options.data, options.image_size, progress=first)
        else:
            dataset = datasets.load(options.data_name, options.data_dir, options.source, progress=first)
        for note in dataset.notes if first else ():
            print(f"note: {note}", file=sys.stderr)
        channels, size, _ = dataset.image_shape
        config = replace(config, image_channels=channels, image_size=size, classes=len(dataset.labels))
        folder.mkdir(parents=True, exist_ok=True)
        if first:
            if options.resume and (folder / CHECKPOINT_FILE).exists():
                _set_aside(folder)
            (folder / SETTINGS_FILE).write_text(settings)
        result = train.run(config, dataset, recipe, folder, resume=options.resume, track=options.track)
    except (DatasetError, TrackerError, train.TrainingError, ValueError, OSError) as error:
        print(reason_of(error), file=sys.stderr)
        return 1
    except Interrupted:
        if first:
            print(
                f"\ninterrupted; the same command with --resume continues from {folder / RESUME_FILE}", file=sys.stderr
            )
        return 130
    if result is None:
        return 0
    _tell(folder, result, dataset)
    return 0


def _tell(folder: Path, result: "Result", dataset: "Dataset") -> None:
    """Print the test error, and write the report."""
    from training import report

    figures = result.checkpoint.figures
    percent = 100 * figures["test_errors"] / figures["test_images"]
    print(f"test error {percent:.2f} % ({figures['test_errors']} of {figures['test_images']} images)")
    if others := figures.get("none_test_images"):
        print(f"of {others} test images of none of the classes, {figures['none_test_errors']} are taken for one")
    written = [folder / CHECKPOINT_FILE]
    try:
        report.write_report(folder, result.checkpoint, dataset, result.probabilities)
        written.append(folder / REPORT_FILE)
    except Exception as error:  # drawing can fail in many ways, and the important files are written
        _logger.warning("%s could not be written: %s", folder / REPORT_FILE, error)
    print(f"wrote {' and '.join(map(str, written))}")
