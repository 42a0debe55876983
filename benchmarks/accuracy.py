"""``python -m benchmarks.accuracy RUN...``: add finished runs to ``results/accuracy.csv`` and print the table."""

import argparse
import csv
import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from training import checkpoint
from training.checkpoint import CheckpointError
from training.model import CapsNet
from training.run_folder import checkpoint_path

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
COLUMNS = (
    "dataset", "parameters", "seed", "epochs", "selected_epoch", "held_out_errors", "held_out_images",
    "test_errors", "test_images", "seconds", "device", "torch", "commit", "command",
)  # fmt: skip
# What a row leaves out of its command: where files lie changes no result, and the seed has a column.
ASIDE = ("--seed", "--out", "--data-dir")
# Sabour, Frosst and Hinton 2017, table 1 and section 6: the mean of three trials of their networks.
PUBLISHED = {
    "mnist": "0.25 % with 6,804,224 parameters",
    "multimnist": "5.2 % with 11.36 million, of 10 million other pairs",
}

Row = dict[str, str]


def row(path: Path) -> Row:
    """The figures of a finished run, of its folder or its checkpoint; all texts.

    ``parameters`` counts what is served, without the decoder. Raises CheckpointError.
    """
    trained = checkpoint.load(checkpoint_path(path))
    figures, recipe = trained.figures, trained.recipe
    missing = {"command", "commit", "device"} - figures.keys()
    if missing:
        raise CheckpointError(f"{path}: does not say its {', '.join(sorted(missing))}")
    known = figures | recipe | {"dataset": trained.dataset, "parameters": _served_parameters(trained.model())}
    return {name: str(known.get(name, "")) for name in COLUMNS} | {"command": plain(figures["command"])}


def plain(command: str) -> str:
    """A command without its flags for seed and folders."""
    words = shlex.split(command)
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ASIDE:
            skip = True
        elif word != "--resume" and word.partition("=")[0] not in ASIDE:
            kept.append(word)
    return shlex.join(kept)


def read(path: Path = RESULTS) -> list[Row]:
    """The rows of a results file, none where it is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def add(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Write rows to a results file beside those it has, in place of those of the same command and seed."""
    by_run = {(one["command"], one["seed"]): one for one in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_run.values())


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each command, with the mean test error of its seeds, and their deviation from two on."""
    groups: dict[str, list[Row]] = {}
    for one in rows:
        groups.setdefault(one["command"], []).append(one)
    lines = [
        "| data set | parameters | test error | each seed | the paper | command |",
        "|---|---|---|---|---|---|",
    ]
    for command, runs in groups.items():
        percents = [100 * int(run["test_errors"]) / int(run["test_images"]) for run in runs]
        mean = f"**{percents[0]:.2f} %**"
        if len(runs) > 1:
            mean = f"**{statistics.mean(percents):.3f} %** ± {statistics.stdev(percents):.3f}"
        seeds = ", ".join(f"{run['seed']}: {percent:.2f}" for run, percent in zip(runs, percents, strict=True))
        parameters = f"{int(runs[0]['parameters']):,}"
        count = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        dataset = runs[0]["dataset"]
        published = PUBLISHED.get(dataset, "not measured")
        lines.append(f"| {dataset} | {parameters} | {mean}, {count} | {seeds} | {published} | `{command}` |")
    return "\n".join(lines) + "\n"


def _served_parameters(model: CapsNet) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if not name.startswith("decoder"))


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    command.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a finished run's folder")
    command.add_argument("--results", type=Path, default=RESULTS, help="the results file")
    options = command.parse_args(arguments)
    try:
        add([row(path) for path in options.runs], options.results)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(read(options.results)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
