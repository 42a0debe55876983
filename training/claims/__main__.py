"""``python -m training.claims [quick|full] [--rows 1 4 ...]``: measure the claims made for capsule networks.

Networks are trained first, and then the rows are measured. Both are kept in the folder of the run, so that the next
call goes on where the last one ended. The report at the end has all rows that were measured so far.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from serving.files.program import add_version
from training.claims.jobs import SCALES
from training.data.sources import add_file_flags, parse_folder


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m training.claims", description=__doc__, allow_abbrev=False)
    add_version(command)
    command.add_argument("scale", nargs="?", choices=SCALES, default="quick", help="(default: %(default)s)")
    command.add_argument("--rows", type=int, nargs="+", metavar="N", help="numbers of rows, 1 to 16 (default: all)")
    command.add_argument(
        "--out", type=parse_folder, metavar="FOLDER", help="folder of the run (default: runs/claims-SCALE)"
    )
    add_file_flags(command)
    command.add_argument(
        "--clothes-dir",
        type=parse_folder,
        metavar="FOLDER",
        help="a folder with Fashion-MNIST's files; --data-dir is for MNIST's",
    )
    part = command.add_mutually_exclusive_group()
    part.add_argument("--train-only", action="store_true", help="train the networks, and measure no row")
    part.add_argument("--no-training", action="store_true", help="measure the rows whose networks are trained")
    command.add_argument("--seconds", type=_seconds, help="begin no training that would end later than this")
    command.add_argument("--commit", default="", help="the commit of the source, where git cannot tell it")
    return command


def _seconds(text: str) -> float:
    """Return a number of seconds. Raises ArgumentTypeError if it is none, or below 0."""
    with suppress(ValueError):
        if (seconds := float(text)) >= 0:
            return seconds
    raise argparse.ArgumentTypeError(f"{text}; expected a number of 0 or more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if a network or a row was left out."""
    begin = time.perf_counter()
    command = parser()
    options = command.parse_args(arguments)
    try:
        return _run(command, options, begin)
    except KeyboardInterrupt:
        print("\ninterrupted; the next call goes on from here", file=sys.stderr)
        return 130


def _run(command: argparse.ArgumentParser, options: argparse.Namespace, begin: float) -> int:
    # The import of PyTorch takes seconds, so the flags are checked before.
    from training.claims import run
    from training.claims.store import RunFolderError
    from training.data.sources import DatasetError

    words = ["python", "-m", "training.claims", options.scale]
    try:
        settings = run.Settings(
            SCALES[options.scale],
            options.out or Path("runs") / f"claims-{options.scale}",
            tuple(options.rows or ()),
            options.data_dir,
            options.clothes_dir,
            options.source,
            None if options.seconds is None else begin + options.seconds,
            options.commit,
            shlex.join(words),
        )
    except ValueError as error:
        command.error(str(error))
    try:
        return run.run(settings, train_only=options.train_only, no_training=options.no_training)
    except (OSError, DatasetError, RunFolderError) as error:  # such as a full disk; what is complete stays
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
