"""``python -m benchmarks.accuracy RUN...``: add finished runs to ``results/accuracy.csv`` and print the table."""

import argparse
import csv
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
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
# Flags that a row leaves out of its command: folders and sources change no result, and the seed has its own column.
_OMITTED_FLAGS = ("--seed", "--out", "--data-dir", "--source")
# Student's t, two-sided 95 %, by degrees of freedom.
_T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Row = dict[str, str]


def row(path: Path) -> Row:
    """Return the figures of a finished run, as texts. path: its folder or its checkpoint.

    ``parameters`` counts the served network, without the decoder. Raises CheckpointError.
    """
    trained = checkpoint.load(checkpoint_path(path))
    figures, recipe = trained.figures, trained.recipe
    missing = {"command", "commit", "device"} - figures.keys()
    if missing:
        raise CheckpointError(f"{path}: does not say its {', '.join(sorted(missing))}")
    known = figures | recipe | {"dataset": trained.dataset, "parameters": _served_parameters(trained.model())}
    return {name: str(known.get(name, "")) for name in COLUMNS} | {"command": plain(figures["command"])}


def plain(command: str) -> str:
    """Return a command without its flags for seed, folders and sources."""
    words = shlex.split(command)
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _OMITTED_FLAGS:
            skip = True
        elif word != "--resume" and word.partition("=")[0] not in _OMITTED_FLAGS:
            kept.append(word)
    return shlex.join(kept)


def read(path: Path = RESULTS) -> list[Row]:
    """Return the rows of a results file, or none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def add(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Add rows to a results file. A new row replaces the row with the same command, network size and seed."""
    by_run = {(one["command"], one["parameters"], one["seed"]): one for one in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_run.values())


def table(rows: Iterable[Row]) -> str:
    """Return Markdown: a line for each command and network, best first, with the mean test error of its seeds.

    From two seeds on, the mean has its 95 % interval (Student's t).
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for one in rows:
        groups.setdefault((one["command"], one["parameters"]), []).append(one)
    lines = [
        "| data set | parameters | test error | each seed | device | command |",
        "|---|---|---|---|---|---|",
    ]
    for (command, parameters), runs in sorted(groups.items(), key=lambda item: (item[1][0]["dataset"], _mean(item[1]))):
        percents = _percents(runs)
        error = f"**{percents[0]:.2f} %**"
        if len(runs) > 1:
            margin = _T_QUANTILES[len(runs) - 1] * statistics.stdev(percents) / math.sqrt(len(runs))
            error = f"**{statistics.mean(percents):.3f} %** ± {margin:.3f}"
        seeds = ", ".join(f"{run['seed']}: {percent:.2f}" for run, percent in zip(runs, percents, strict=True))
        told = f"{runs[0]['dataset']} | {int(parameters):,} | {error} | {seeds} | {runs[0]['device']}"
        lines.append(f"| {told} | `{command}` |")
    return "\n".join(lines) + "\n"


def _percents(runs: Sequence[Row]) -> list[float]:
    return [100 * int(run["test_errors"]) / int(run["test_images"]) for run in runs]


def _mean(runs: Sequence[Row]) -> float:
    return statistics.mean(_percents(runs))


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
