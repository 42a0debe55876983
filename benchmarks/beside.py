"""``python -m benchmarks.beside TREE...``: the servers of several source trees, such as worktrees of earlier commits.

They run side by side, and the load takes turns between them. The first one is the base of all ratios.
"""

import argparse
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.figures import origin, write
from benchmarks.load import LoadError
from benchmarks.server import serve, write_bodies
from benchmarks.tricks import CASES, Figures, Subject, add_sampling, parse_sampling, sizes
from benchmarks.without import FEW, LARGE, MANY, STREAMS
from serving.artifact import ArtifactError, find
from serving.artifact import load as load_artifact
from serving.settings import DEFAULT_MODEL, embedded_models

_RESAMPLES = 4000


def measure(folder: Path, options: argparse.Namespace) -> list[list[Figures]]:
    """Return the figures of each tree, one for each round. Raises LoadError."""
    case = CASES[options.load]
    shape = load_artifact(find(options.models, options.model)).image_shape
    bodies = write_bodies(folder, shape, [case])
    models, flags = options.models.resolve(), [f"--model={options.model}", *shlex.split(options.settings)]
    found: list[list[Figures]] = [[] for _ in options.trees]
    with ExitStack() as stack:
        subjects = []
        for number, tree in enumerate(options.trees):
            own = folder / str(number)
            own.mkdir()
            served = stack.enter_context(serve(models, options.precision, flags, own, tree=tree.resolve()))
            subjects.append(Subject(served, bodies))
            subjects[-1].warm([options.load])
        size = sizes(subjects[0], [options.load], options.seconds)[options.load]
        turns = list(range(len(subjects)))
        for _ in range(options.rounds):
            random.shuffle(turns)
            for turn in turns:
                found[turn].append(subjects[turn].measure(options.load, size))
        for subject in subjects:
            subject.check()
    return found


def row(tree: Path, own: Sequence[Figures], base: Sequence[Figures]) -> dict[str, str]:
    """Return the medians of a tree, and those of its ratios to the base, with 95 % intervals."""
    shown = {
        "tree": str(tree),
        "per_second": f"{statistics.median(one.per_second for one in own):.4g}",
        "cpu_us": f"{1e6 * statistics.median(one.cpu for one in own):.4g}",
    }
    generator = np.random.default_rng(0)
    for name, field in (("throughput", "per_second"), ("cpu", "cpu")):
        ratios = np.array([getattr(one, field) / getattr(its, field) for one, its in zip(own, base, strict=True)])
        medians = np.median(generator.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        shown |= {name: f"{np.median(ratios):.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}
    return shown


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__)
    command.add_argument("trees", nargs="+", type=Path, metavar="TREE", help="source trees; one may come twice")
    command.add_argument("--models", type=Path, default=embedded_models(), metavar="FOLDER", help="model repository")
    command.add_argument("--model", default=DEFAULT_MODEL, help=f"the model to serve (default: {DEFAULT_MODEL})")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument("--load", choices=(FEW, MANY, LARGE, STREAMS), default=MANY, help=f"(default: {MANY})")
    add_sampling(command, rounds=24, of_rounds="samples of each tree", seconds=1.0)
    options = parse_sampling(command, arguments)
    if options is None:
        return 2
    with tempfile.TemporaryDirectory() as name:
        try:
            found = measure(Path(name), options)
        except (LoadError, ArtifactError) as error:
            print(error, file=sys.stderr)
            return 1
    rows = [row(tree, own, found[0]) for tree, own in zip(options.trees, found, strict=True)]
    for one in rows:
        ratios = (f"{name} {one[name]} ({one[f'{name}_low']}-{one[f'{name}_high']})" for name in ("throughput", "cpu"))
        print(f"{one['tree']:<28}", f"{one['per_second']} a second, {one['cpu_us']} us", *ratios, sep="  ")
    if options.out:
        how = {"load": options.load, "model": options.model, "rounds": options.rounds, "seconds": options.seconds}
        write(options.out, [one | how | origin() for one in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
