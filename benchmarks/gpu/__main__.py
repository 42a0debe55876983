"""``python -m benchmarks.gpu --minutes 9``: all measurements on one GPU, each part with a time limit of its own.

In this order: ONNX Runtime's CUDA provider on the shipped graphs, networks on MNIST and MultiMNIST, the server under
load, and training steps eager, compiled and recorded. The next call does not repeat a finished part. A
stopped part keeps the files that it wrote. Without a GPU all parts run on the CPU, ``--miniature`` in a minute.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from serving.artifact import find
from serving.settings import DEFAULT_MODEL, embedded_models
from training.data.sources import add_file_flags

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
SPARE_SECONDS = 20  # of each part besides its limit: to start a process and to read files
_DONE = "done"  # this file marks a finished part


class Part(NamedTuple):
    """A command, and its share of the time."""

    name: str
    share: float
    command: list[str]


def parts(out: Path, files: Sequence[str], seconds: float, miniature: bool) -> list[Part]:
    """Return the parts in their order. The trainings fit their epochs into their share.

    files: the flags of the data set's files. seconds: for all parts.
    """
    model = find(embedded_models(), DEFAULT_MODEL)
    graphs = [
        word
        for name, file in (("fp32", "model.onnx"), ("fp16", "fp16.onnx"), ("explain", "explain.onnx"))
        if (model / file).exists()
        for word in ("--graph", f"{model.parent.name}-{name}={model / file}={model / 'model.onnx'}")
    ]
    trained = out / "trained"
    small = ["--limit=16", "--epochs=1", "--eager", "--batch=16", "--pair-batch=2"] if miniature else []

    def training(phase: str, share: float, *flags: str) -> Part:
        given = [phase, "--seconds", f"{share * seconds:.0f}", "--out", str(trained), *files, *flags, *small]
        return Part(phase, share, ["benchmarks.gpu.training", *given])

    cases = ["fast:8"] if miniature else ["accurate:128", "fast:128", "paper:128", "pairs:1024"]
    steps = [word for case in cases for word in ("--case", case)] + (
        ["--steps", "2", "--way", "eager"] if miniature else []
    )
    served = ["--seconds", "0.05", "--warm-up", "2"] if miniature else ["--seconds", "1"]
    measured = ["--config", "fast"] if miniature else ["--config", "paper", "--config", "accurate", "--config", "fast"]
    onnx = [*graphs, *measured, "--out", str(out / "onnx"), *files]
    onnx += ["--seconds", "0.002", "--max-batch", "8"] if miniature else ["--seconds", "0.1"]
    seeds = ["--seeds", "1"] if miniature else []
    chunks = [] if miniature else ["--epochs", "4000"]
    return [
        Part("onnx", 0.13, ["benchmarks.gpu.onnx_cuda", *onnx]),
        training("teachers", 0.20, *seeds),
        training("students", 0.22, *seeds),
        training("pairs", 0.25, *chunks),
        training("paper", 0.08, *([] if miniature else ["--epochs", "60"])),
        Part("served", 0.06, ["benchmarks.gpu.served", "--device", "auto", *served, "--out", str(out / "served")]),
        Part("steps", 0.06, ["benchmarks.gpu.steps", *steps, "--out", str(out / "steps")]),
    ]


def run(part: Part, seconds: float, out: Path) -> str:
    """Run a part within its time limit, and return its result: done, stopped or failed."""
    log = out / f"{part.name}.log"
    with log.open("w") as written:
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *part.command],
                stdout=written,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                cwd=Path(__file__).parents[2],
            )
        except subprocess.TimeoutExpired:
            return "stopped at the end of its time"
    if ended.returncode:
        return f"failed, see {log}"
    (out / f"{part.name}.{_DONE}").touch()
    return "done"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results/gpu)"
    )
    add_file_flags(parser)
    parser.add_argument("--miniature", action="store_true", help="a few images and steps of each part, to try it out")
    parser.add_argument("--again", action="store_true", help="forget what has finished")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: {options.minutes}; expected a number above 0")
    if options.again and options.out.exists():
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    failed = False
    files = ["--data-dir", str(options.data_dir)] if options.data_dir else []
    files += ["--source", ",".join(options.source)] if options.source else []
    todo = parts(options.out, files, 60 * options.minutes, options.miniature)
    for part in todo:
        if (options.out / f"{part.name}.{_DONE}").exists():
            print(f"{part.name}: finished before", flush=True)
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"{part.name}: no time left", flush=True)
            continue
        begin = time.monotonic()
        box = 1.5 * part.share * 60 * options.minutes + SPARE_SECONDS
        outcome = run(part, min(left, box), options.out)
        failed |= outcome.startswith("failed")
        print(f"{part.name}: {outcome} after {time.monotonic() - begin:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
