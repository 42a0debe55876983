"""Row 9: primary capsules that choose one parent, as in a parse tree, and capsules that never or always answer.

Axes: B N images, S seeds, I primary capsules, J classes.
"""

import numpy as np
import torch
from torch import Tensor

from training.claims.batches import in_batches
from training.claims.bench import Bench
from training.claims.drawing import COLOURS, axes, png
from training.claims.evidence import Comparison, Evidence
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet
from training.claims.row import Claim, Row
from training.claims.store import Arrays
from training.evaluate import PRESENT_LENGTH
from training.model import lengths
from training.routing_figures import ABSENT_LENGTH, PRIMARY_PRESENT_LENGTH

CLAIM = Claim(
    number=9,
    title="Hierarchy",
    sentence="Each part of the image is assigned to one whole, so that the capsules form a tree.",
    paper="No figure: each active capsule chooses a capsule in the layer above as its parent (Sabour et al. 2017, 1)",
    counter="Mitterreiter et al. 2023: capsule networks have no parse tree, and many capsules starve in training",
    decides="primary capsules with one coupling above 0.5, in percentage points, less one half of them",
    enough=25,
    limits="Two layers of capsules, so that the tree has parts and digits alone.",
)
KIND = "K3"
CHOSEN = 0.5  # a coupling above it leaves less to all other parents together
TREE_SHARE = 50  # %: with fewer, most parts have no parent
MAX_IMAGES = 2000
BINS = 50


def couplings_of(net: CapsuleNet, images: Tensor) -> Tensor:
    """Return the largest coupling of each primary capsule after the last iteration, and its length: (B, I, 2)."""
    u = net.primary_capsules(images)
    _, couplings = net.routed(u, net.config.routing_iterations)
    return torch.stack([couplings.amax(1), lengths(u)], 2)


def shares(largest: Tensor, length: Tensor) -> Arrays:
    """Return the figures of primary capsules, from their largest couplings (N, I) and their lengths (N, I).

    chosen: the share of an image's primary capsules with one coupling above CHOSEN, in %, (N,); present: the same of
    those that are longer than PRESENT_LENGTH alone, 0 if none is. dead, saturated: the share of the capsules that are
    shorter than ABSENT_LENGTH, or longer than PRIMARY_PRESENT_LENGTH, in all images, in %, (1,). histogram: of the
    largest couplings, in BINS bins from 0 to 1, as shares. length, coupling: means, (1,).
    """
    one = largest > CHOSEN
    there = length > PRESENT_LENGTH
    counted = np.histogram(largest.numpy(), bins=BINS, range=(0, 1))[0]
    return {
        "chosen": 100 * one.double().mean(1).numpy(),
        "present": (100 * (one & there).sum(1).double() / there.sum(1).clamp_min(1)).numpy(),
        "dead": np.array([100 * float((length < ABSENT_LENGTH).all(0).double().mean())]),
        "saturated": np.array([100 * float((length > PRIMARY_PRESENT_LENGTH).all(0).double().mean())]),
        "histogram": counted / largest.numel(),
        "length": np.array([float(length.double().mean())]),
        "coupling": np.array([float(largest.double().mean())]),
    }


def jobs(scale: Scale) -> list[Job]:
    return scale.base([KIND])


def measure(bench: Bench) -> Evidence:
    images = bench.images.test.first(MAX_IMAGES).pixels
    found = []
    for seed in bench.seeds:
        net = bench.net(bench.base(KIND, seed))
        assert isinstance(net, CapsuleNet)
        found.append(shares(*in_batches(lambda part, net=net: couplings_of(net, part), images).unbind(2)))
    return evidence(found)


def evidence(found: list[Arrays]) -> Evidence:
    """Return the evidence from the ``shares`` of each seed's network."""

    def by_seed(name: str) -> list[float]:
        return [round(float(one[name].astype(np.float64).mean()), 4) for one in found]

    chosen, present = (np.stack([one[name] for one in found]).astype(np.float64) for name in ("chosen", "present"))
    dead, saturated = (float(np.mean(by_seed(name))) for name in ("dead", "saturated"))
    return Evidence(
        comparisons=(
            Comparison.to_value("primary capsules with one parent", KIND, chosen, TREE_SHARE, "%"),
            Comparison.to_value("… of those that are present", KIND, present, TREE_SHARE, "%"),
        ),
        figures={
            "primary capsules with one coupling above 0.5, in % by seed": by_seed("chosen"),
            "mean largest coupling by seed; 0.1 if all ten are equal": by_seed("coupling"),
            "mean length of the primary capsules by seed": by_seed("length"),
            "dead primary capsules (below 0.1 in all images), in % by seed": by_seed("dead"),
            "saturated primary capsules (above 0.9 in all images), in % by seed": by_seed("saturated"),
        },
        pictures={"The strongest tie of a part": picture(found)},
        said=(
            f"Of 100 parts, {chosen.mean():.1f} give more than half of themselves to one digit; {dead:.0f} % of the "
            f"parts are never seen and {saturated:.0f} % are seen in every image."
        ),
    )


def picture(found: list[Arrays]) -> bytes:
    """Draw how strong the largest coupling of a primary capsule is, of all seeds together."""
    heights = 100 * np.mean([one["histogram"] for one in found], 0)
    figure, panel = axes("How much of a part goes to its favourite digit", "largest of ten couplings", "% of the parts")
    panel.bar((np.arange(BINS) + 0.5) / BINS, heights, width=1 / BINS, color=COLOURS[KIND])
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.25 * heights.max())
    for place, text in ((0.1, "all digits alike"), (CHOSEN, "a tree begins here")):
        panel.axvline(place, color="black", linestyle=":", linewidth=1)
        panel.text(place + 0.01, 1.22 * heights.max(), text, va="top", fontsize=8)
    return png(figure)


ROW = Row(CLAIM, jobs, measure)
