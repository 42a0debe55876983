"""``python -m benchmarks.overlap``: overlapping digits through a server, and ``results/overlap-cpu.csv``.

The pairs are new ones of MNIST's test digits, composed as in training. A pair is right if its two longest capsules are
those of its digits. The measure is the intersection over the union (IoU) of bright pixels, above half of white: of each
true digit, alone on its place, with what the server draws for its class. This is the part of the image that belongs to
the class (``layer``), and the bare reconstruction.

Axes: N pairs, H W of an image.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.figures import origin, write
from benchmarks.server import serve
from serving.client import CapsNetClient, Classification, Verdict
from serving.files.idx import read_idx
from training.data.compose import combine, members, place

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "overlap-cpu.csv"
DIGITS, LABELS = (ROOT / "tests" / "data" / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
MODEL = "capsnet-multimnist"
_CANVAS = 36
_SEED = 2
_BRIGHT = 127  # a pixel above it is bright

Pixels = NDArray[np.uint8]


class Pair(NamedTuple):
    """Two digits on one image. image: (H, W). parts: each digit alone on its place, (2, H, W)."""

    image: Pixels
    parts: Pixels
    labels: tuple[str, str]


class Drawn(NamedTuple):
    """The drawings of a right pair: the IoU of both layers and of both reconstructions, and a verdict.

    verdict: with the reconstruction error.
    """

    layers: tuple[float, float]
    reconstructions: tuple[float, float]
    verdict: Verdict


def pairs() -> Iterator[Pair]:
    """Yield a pair for each of MNIST's test digits, the same pairs each time."""
    images, labels = (torch.from_numpy(read_idx(file.read_bytes()).copy()) for file in (DIGITS, LABELS))
    generator = torch.Generator().manual_seed(_SEED)
    chosen = members(labels.to(torch.int64), 2, generator)
    placed = place(images[chosen.flatten(), None], _CANVAS, generator)
    parts = placed.reshape(len(images), 2, 1, _CANVAS, _CANVAS)
    for both, alone, two in zip(combine(parts), parts, labels[chosen].tolist(), strict=True):
        yield Pair(both[0].numpy(), alone[:, 0].numpy(), (str(two[0]), str(two[1])))


def overlap(first: Pixels, second: Pixels) -> float:
    """Return the intersection over the union of the bright pixels of two images; 0 if both have none."""
    one, other = first > _BRIGHT, second > _BRIGHT
    return float((one & other).sum() / max(1, (one | other).sum()))


def longest_two(found: Classification) -> tuple[str, str]:
    """Return the labels of the two longest capsules, in alphabetical order."""
    first, second = sorted(found.labels[index] for index in np.argsort(found.probabilities)[-2:])
    return first, second


def draw(client: CapsNetClient, pair: Pair) -> Drawn:
    """Let the server draw both digits of a pair."""
    drawn = {one.label: one for one in client.reconstruct(pair.image, classes=pair.labels)}
    layers, reconstructions = [], []
    for label, part in zip(pair.labels, pair.parts, strict=True):
        layer = drawn[label].layer
        assert layer is not None
        layers.append(overlap(layer[0], part))
        reconstructions.append(overlap(drawn[label].image[0], part))
    found = drawn[pair.labels[0]].classification
    assert found
    return Drawn((layers[0], layers[1]), (reconstructions[0], reconstructions[1]), found.verdict)


def measure(client: CapsNetClient, wanted: int) -> dict[str, Any]:
    """Return the figures of the first right pairs, and of the pairs that were asked for until there were so many."""
    answers: list[tuple[Pair, Classification]] = []
    drawn: list[Drawn] = []
    for pair in pairs():
        [found] = client.classify(pair.image)
        answers.append((pair, found))
        if longest_two(found) == tuple(sorted(pair.labels)):
            drawn.append(draw(client, pair))
        if len(drawn) == wanted:
            break
    present = [set(found.present) == set(pair.labels) for pair, found in answers]
    several = [found.verdict is Verdict.SEVERAL for _, found in answers]
    return {
        "pairs": len(answers),
        "right": len(drawn),
        "present_exactly": f"{np.mean(present):.4f}",
        "verdict_several": f"{np.mean(several):.4f}",
        "right_verdict_several": f"{_share(drawn, Verdict.SEVERAL):.4f}",
        "right_verdict_suspicious": f"{_share(drawn, Verdict.SUSPICIOUS):.4f}",
        **_figures("layer", [one for two in drawn for one in two.layers]),
        **_figures("reconstruction", [one for two in drawn for one in two.reconstructions]),
    }


def _share(drawn: Sequence[Drawn], verdict: Verdict) -> float:
    return float(np.mean([one.verdict is verdict for one in drawn]))


def _figures(name: str, overlaps: Sequence[float]) -> dict[str, str]:
    low, median = np.quantile(overlaps, [0.05, 0.5])
    return {
        f"{name}_iou": f"{np.mean(overlaps):.4f}",
        f"{name}_iou_median": f"{median:.4f}",
        f"{name}_iou_p5": f"{low:.4f}",
    }


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    command.add_argument("--right", type=int, default=1000, metavar="N", help="right pairs (default: %(default)s)")
    command.add_argument("--results", type=Path, default=RESULTS, help="the results file")
    options = command.parse_args(arguments)
    flags = ["--model", MODEL, "--threads=1", "--runtimes=1", "--max-batch=16"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(ROOT / "models", "fp32", flags, Path(folder)) as served,
        CapsNetClient(served.targets["tcp"], model=MODEL) as client,
    ):
        known = {"model": MODEL, "version": client.get_model().version}
        row = known | measure(client, options.right)
    write(options.results, [row | origin()])
    print(*[f"{name} {value}" for name, value in row.items()], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
