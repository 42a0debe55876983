"""``python -m benchmarks.relevance``: compare maps of relevance by deletion, and write ``results/relevance-cpu.csv``.

A map names a tenth of the ink of a digit, the pixels above the ground. These become ground. The measure is how far the
pose of the class then falls behind on its undisturbed direction. A length would not do, since it is the same for a pose
and for its negative. Deleted random ink, the mean of several draws, is the yardstick of each digit.

Axes: N digits, H W of an image, J classes, E dimensions of a pose.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import origin, write
from serving.artifact import Artifact, ReceptiveField, find, load
from serving.files.idx import read_idx
from serving.files.occlusion import PATCH_SHARE, Occlusion, drops_of, ground_of
from serving.repository.further_graph import CONTRIBUTIONS, COUPLINGS
from serving.runtime import Arrays, Runtime
from serving.services.graphs import EXPLAIN
from training.model import Field
from training.relevance import DELETED_SHARE, Map, Pixels, capsule_map, without_ink

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "relevance-cpu.csv"
DIGITS = ROOT / "tests" / "data" / "t10k-images-idx3-ubyte.gz"
MODEL = "capsnet-mnist"
#: Sides of a patch that are compared, in pixels of a digit.
PATCHES = (3, 4, 5, 7)
# The digits that choose the patch are others than those of the result.
_FIRST_CHOOSING = 9000
_CHOOSING = 100
_RANDOM_DRAWS = 10
_RESAMPLES = 10_000
_SIDE = 28
_BATCH = 64


class Digit(NamedTuple):
    """A digit, (1, H, W), its class with the longest capsule, and its row of the outputs of ``explain``."""

    image: Pixels
    winner: int
    outputs: Arrays


class Drops(NamedTuple):
    """The drops of the projections of digits, (N,), after a map's ink and after random ink was deleted."""

    named: NDArray[np.float64]
    random: NDArray[np.float64]


class Networks:
    """The graphs of a model, without a server."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        explain = artifact.graphs[EXPLAIN]
        self._classify = Runtime(artifact.file(), "cpu")
        self._explain = Runtime(artifact.folder / explain.file, "cpu", weights=artifact.weights(explain))

    def digits(self, images: Pixels) -> list[Digit]:
        """Return digits for images (N, 1, H, W)."""
        outputs = self._explain.run({"images": images})
        winners = np.asarray(outputs["probabilities"]).argmax(1)
        rows = [{name: array[index] for name, array in outputs.items()} for index in range(len(images))]
        return [Digit(*one) for one in zip(images, winners.tolist(), rows, strict=True)]

    def poses(self, images: Pixels) -> NDArray[np.float32]:
        """Return the poses (N, J, E) of images."""
        parts = [images[begin : begin + _BATCH] for begin in range(0, len(images), _BATCH)]
        return np.concatenate([np.asarray(self._classify.run({"images": part})["poses"], np.float32) for part in parts])


def occlusion_map(networks: Networks, patch: float) -> Callable[[Digit], Map]:
    """Return the function that the server uses for relevance, with patches of a share of the image's side."""
    occlusion = Occlusion(_SIDE, _SIDE, patch)

    def make(digit: Digit) -> Map:
        ground = ground_of(digit.image, networks.artifact.preparation.polarity)
        masked = occlusion.masked(digit.image, ground)
        maps: Map = occlusion.relevance(networks.poses(masked.images), masked.places, [digit.winner])[0]
        return maps

    return make


def deletion(networks: Networks, digits: Sequence[Digit], make: Callable[[Digit], Map]) -> Drops:
    """Delete the ink that a map names, and random ink, of each digit."""
    generator = np.random.default_rng(0)
    named, random = [], []
    for digit in digits:
        orders = [make(digit), *(generator.random((_SIDE, _SIDE), np.float32) for _ in range(_RANDOM_DRAWS))]
        images = np.stack([digit.image, *(without_ink(digit.image, order, generator) for order in orders)])
        drops = drops_of(networks.poses(images), [digit.winner])[:, 0]
        named.append(float(drops[0]))
        random.append(float(drops[1:].mean()))
    return Drops(np.array(named), np.array(random))


def row(name: str, patch: int | str, drops: Drops) -> dict[str, Any]:
    """Return the figures of a map: mean drops, and the paired difference with its 95 % interval by bootstrap."""
    differences = drops.named - drops.random
    chosen = np.random.default_rng(0).integers(0, len(differences), (_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(1), [0.025, 0.975])
    return {
        "map": name,
        "patch": patch,
        "digits": len(differences),
        "deleted_share": DELETED_SHARE,
        "drop": f"{drops.named.mean():.4f}",
        "random_drop": f"{drops.random.mean():.4f}",
        "difference": f"{differences.mean():.4f}",
        "low": f"{low:.4f}",
        "high": f"{high:.4f}",
        "larger_than_random": f"{(differences > 0).mean():.3f}",
    }


def measure(networks: Networks, images: Pixels, count: int, choosing: int) -> list[dict[str, Any]]:
    """Return the rows of all maps for the first digits, and before them those that compare patches on other digits.

    images: (N, 1, H, W). count, choosing: the numbers of digits.
    """
    field = networks.artifact.graphs[EXPLAIN].receptive_field
    assert field
    others = networks.digits(images[_FIRST_CHOOSING : _FIRST_CHOOSING + choosing]) if choosing else []
    rows = [
        row("relevance, to choose the patch", patch, deletion(networks, others, occlusion_map(networks, patch / _SIDE)))
        for patch in PATCHES
        if others
    ]
    digits = networks.digits(images[:count])
    maps: dict[str, Callable[[Digit], Map]] = {
        "relevance": occlusion_map(networks, PATCH_SHARE),
        "ink": lambda digit: digit.image[0].astype(np.float32),
        "contributions": lambda digit: _of_capsules(_of_winner(digit, CONTRIBUTIONS), field),
        "couplings": lambda digit: _of_capsules(_of_winner(digit, COUPLINGS), field),
    }
    for name, make in maps.items():
        patch = round(PATCH_SHARE * _SIDE) if name == "relevance" else ""
        rows.append(row(name, patch, deletion(networks, digits, make)))
    return rows


def _of_capsules(values: NDArray[np.float32], field: ReceptiveField) -> Map:
    """Return the map of the primary capsules' numbers (I,)."""
    grid = values.reshape(field.types, field.grid, field.grid)
    return capsule_map(grid, Field(field.stride, field.size, field.offset), _SIDE)


def _of_winner(digit: Digit, name: str) -> NDArray[np.float32]:
    """Return the numbers of the primary capsules (I,) for the digit's class, of the last iteration."""
    numbers = np.asarray(digit.outputs[name], np.float32)
    chosen: NDArray[np.float32] = numbers[-1, digit.winner] if numbers.ndim == 3 else numbers[digit.winner]
    return chosen


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.relevance", description=__doc__)
    command.add_argument("--digits", type=int, default=500, help="test digits that compare the maps")
    command.add_argument(
        "--choosing", type=int, default=_CHOOSING, help="other digits that compare patches; 0 for none"
    )
    command.add_argument("--results", type=Path, default=RESULTS, help="the results file")
    options = command.parse_args(arguments)
    networks = Networks(load(find(ROOT / "models", MODEL)))
    images = read_idx(DIGITS.read_bytes())[:, np.newaxis]
    known = {"model": MODEL, "version": networks.artifact.version}
    rows = [known | one | origin() for one in measure(networks, images, options.digits, options.choosing)]
    write(options.results, rows)
    for one in rows:
        print(*[f"{name} {one[name]}" for name in ("map", "patch", "digits", "drop", "random_drop", "low", "high")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
