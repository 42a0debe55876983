"""The effort of the rows of attacks: the attacked images, and the sizes of the attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.claims.attacks import RESTARTS, STEPS
from training.claims.bench import Bench
from training.claims.store import Arrays

KINDS = ("K3", "K1", "C0", "C0r")
#: The largest changes of a pixel, whose values are from 0 to 1.
BOUNDS = (0.1, 0.2, 0.3)
_SAMPLE_SEED = 17


@dataclass(frozen=True)
class Effort:
    """The numbers of attacked images by row, and the sizes of the attacks.

    Attributes:
        white_box, one_pixel, detection: Images of each network in a row.
        steps, restarts: Of projected gradient descent.
        apgd_steps: Of APGD, with one start, on the images that still stand.
        queries: Of the Square attack.
        ddn_steps: Of DDN.
    """

    white_box: int
    one_pixel: int
    detection: int
    steps: int = STEPS
    restarts: int = RESTARTS
    apgd_steps: int = 100
    queries: int = 500
    ddn_steps: int = 100


EFFORTS = {
    "quick": Effort(40, 10, 20, steps=10, restarts=2, apgd_steps=10, queries=30, ddn_steps=20),
    "full": Effort(150, 80, 50),
}


def sample(bench: Bench, count: int) -> tuple[Tensor, Tensor]:
    """Return test digits chosen at random, the same for all networks: pixels (N, 1, 28, 28), and labels (N,)."""
    test = bench.images.test
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(_SAMPLE_SEED))[:count]
    return test.pixels[chosen], test.labels[chosen]


def by_network(bench: Bench, row: str, measure: Callable[[str, int], Arrays]) -> dict[str, list[Arrays]]:
    """Return what ``measure`` finds for each kind and seed, by kind, or what an earlier run found."""
    return {
        kind: [bench.kept(f"{row}-{kind}-{seed}", partial(measure, kind, seed)) for seed in bench.seeds]
        for kind in KINDS
    }
