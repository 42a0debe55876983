"""Row 8: routing as the finding of parts: what couplings say of an answer, and of the image.

Axes: B N images, S seeds, I primary capsules, T their types, G their grid, D their dimension, J classes, E pose
dimension, H W of an image.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.files.occlusion import Occlusion, drops_of
from training.claims.batches import in_batches
from training.claims.bench import Bench
from training.claims.drawing import tiles
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.images import Labelled
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet
from training.claims.row import Claim, Row
from training.claims.store import Arrays
from training.model import lengths, to_pixels, votes
from training.relevance import Map, Pixels, capsule_map, without_ink
from training.routing_figures import routing_figures

CLAIM = Claim(
    number=8,
    title="Routing as parts",
    sentence="Routing by agreement finds the parts of the image that make up a digit.",
    paper="No figure: a part is sent to the whole that its vote agrees with, a parallel attention (Sabour et al. 2017)",
    counter=(
        "Gu and Tresp 2020: routing contributes neither to generalization nor to affine robustness; Paik et al. 2019: "
        "routing is often no better than equal couplings"
    ),
    decides="correlation with the map of occlusion, on the ink: of the couplings, less that of the ink's brightness",
    enough=0.05,
    limits=(
        "A primary capsule sees a patch of the image, so that maps of capsules are blurred and reach beyond the ink; "
        "the deciding comparison looks at the ink alone."
    ),
)
KIND = "K3"
DELETED_SHARE = 0.2  # of the primary capsules: 58 of the 288 of an earlier network
RANDOM_DRAWS = 5
OCCLUSION, INK = "occlusion", "ink"
#: Maps of the primary capsules' last couplings, of what they add to the pose, and of what they would add if all
#: couplings were equal.
COUPLINGS, CONTRIBUTIONS, VOTES = "couplings", "contributions", "votes, without routing"
COMPARED = (INK, COUPLINGS, CONTRIBUTIONS, VOTES)
#: How primary capsules are chosen for deletion: by the last couplings, by what they add to the pose, by what they would
#: add if all couplings were equal, and at random.
BY_COUPLING, BY_CONTRIBUTION, BY_VOTE, AT_RANDOM = "coupling", "contribution", "vote, without routing", "at random"
_SEED = 0
_SHOWN = 6  # digits in the picture
_MAPS_SHARE = 2  # one in so many of the costly images gets maps


def scores_of_capsules(net: CapsuleNet, images: Tensor) -> Tensor:
    """Return, for each primary capsule, its last coupling with the winner, its contribution, and its vote: (B, 3, I).

    contribution: the part of the winner's sum of weighted votes along the pose. vote: the same with equal couplings, as
    if nothing were routed. images: (B, C, H, W), 0 to 1.
    """
    u = net.primary_capsules(images)
    u_hat = votes(u, net.weight)  # (B, J, I, E)
    poses, couplings = net.routed(u, net.config.routing_iterations)
    alone, _ = net.routed(u, 1)
    rows, winner = torch.arange(len(u)), lengths(poses).argmax(1)
    mine = u_hat[rows, winner]  # (B, I, E)
    along, along_alone = (
        (mine @ unit(one[rows, winner]).unsqueeze(2)).squeeze(2) for one in (poses, alone)
    )  # (B, I) each
    coupling = couplings[rows, winner]
    return torch.stack([coupling, coupling * along, along_alone], 1)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors with a length of 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def deleted(net: CapsuleNet, images: Tensor, order: Tensor) -> Tensor:
    """Delete the primary capsules with the largest numbers in an order (B, I), and route again.

    Returns, (B, 3): the share of the pose's length that is lost along its undisturbed direction (1: all of it, 2: the
    pose is turned around), the length that is left, and the cosine between both poses.
    """
    u = net.primary_capsules(images)
    rows = torch.arange(len(u))
    before = net.routed(u, net.config.routing_iterations)[0]
    winner = lengths(before).argmax(1)
    pose = before[rows, winner]
    gone = order.topk(round(DELETED_SHARE * u.shape[1]), dim=1).indices
    left = u.scatter(1, gone.unsqueeze(2).expand(-1, -1, u.shape[2]), 0.0)
    after = net.routed(left, net.config.routing_iterations)[0][rows, winner]
    cosine = (unit(pose) * unit(after)).sum(1)
    length = lengths(after)
    lost = 1 - cosine * length / lengths(pose).clamp_min(1e-9)
    return torch.stack([lost, length, cosine], 1)


def deletions(net: CapsuleNet, images: Tensor) -> Arrays:
    """Return what ``deleted`` returns by the way of choosing, (N, 3) each."""
    scores = in_batches(lambda part: scores_of_capsules(net, part), images)
    random = torch.rand(scores[:, 0].shape, generator=torch.Generator().manual_seed(_SEED))
    orders = dict(zip((BY_COUPLING, BY_CONTRIBUTION, BY_VOTE, AT_RANDOM), (*scores.unbind(1), random), strict=True))
    return {
        name: in_batches(lambda *part: deleted(net, *part), images, order).double().numpy()
        for name, order in orders.items()
    }


def maps_of(net: CapsuleNet, image: Pixels, numbers: NDArray[np.float32], occlusion: Occlusion) -> dict[str, Map]:
    """Return maps of relevance (H, W) for an image's winner. image: (1, H, W); numbers: of ``scores_of_capsules``."""
    masked = occlusion.masked(image, np.zeros(len(image), np.uint8))
    poses = poses_of(net, masked.images)
    winner = int(np.linalg.norm(poses[0], axis=-1).argmax())
    config, side = net.config, image.shape[-1]
    grid = (config.primary_types, config.primary_grid, config.primary_grid)
    capsules = [capsule_map(values.reshape(grid), config.receptive_field, side) for values in numbers]
    return {
        OCCLUSION: occlusion.relevance(poses, masked.places, [winner])[0],
        INK: image[0].astype(np.float32),
        **dict(zip((COUPLINGS, CONTRIBUTIONS, VOTES), capsules, strict=True)),
    }


def poses_of(net: CapsuleNet, images: Pixels) -> NDArray[np.float32]:
    """Return the poses (N, J, E) of images (N, 1, H, W)."""
    return in_batches(lambda part: net.poses(to_pixels(part)), torch.from_numpy(images)).numpy()


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the correlation of two maps, or of a part of both; 0 if one of them is even."""
    a, b = (one.ravel() - one.mean(dtype=np.float64) for one in (first, second))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def inked(net: CapsuleNet, image: Pixels, maps: dict[str, Map], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return how far the winner's pose falls behind without the ink that each map names, less without random ink.

    One number for each map; a tenth of the ink goes.
    """
    orders = [*maps.values(), *(generator.random(image.shape[1:], np.float32) for _ in range(RANDOM_DRAWS))]
    poses = poses_of(net, np.stack([image, *(without_ink(image, order, generator) for order in orders)]))
    winner = int(np.linalg.norm(poses[0], axis=-1).argmax())
    drops = drops_of(poses, [winner])[:, 0].astype(np.float64)
    beyond: NDArray[np.float64] = drops[: len(maps)] - drops[len(maps) :].mean()
    return beyond


def jobs(scale: Scale) -> list[Job]:
    return scale.base([KIND])


def measure(bench: Bench) -> Evidence:
    test = bench.images.test

    def of_net(seed: int) -> Arrays:
        bench.progress(f"seed {seed}")
        net = bench.net(bench.base(KIND, seed))
        assert isinstance(net, CapsuleNet)
        return measured(net, test, bench.scale.costly)

    return evidence([bench.kept(f"routing-parts-{seed}", partial(of_net, seed)) for seed in bench.seeds])


def measured(net: CapsuleNet, test: Labelled, costly: int) -> Arrays:
    """Return what is measured of one network.

    entropies: by iteration, (R,). changed: answers changed by routing, in %, (1,). right: 100 for a right answer with
    one iteration and with all, (2, N). By way of choosing, deletions (M, 3). alike: correlations with occlusion of the
    COMPARED maps, (4, K); on_ink: the same on the ink alone. ink: as ``inked``, (5, K), in the order of ``maps_of``.
    shown: maps (_SHOWN, 5, H, W).
    """
    known = routing_figures(net, test.images)

    def answers(images: Tensor) -> Tensor:
        u = net.primary_capsules(images)
        counts = (1, net.config.routing_iterations)
        return torch.stack([lengths(net.routed(u, count)[0]).argmax(1) for count in counts], 1)

    right = 100.0 * (in_batches(answers, test.pixels) == test.labels.unsqueeze(1)).T.numpy()
    few = test.first(costly)
    result: Arrays = {
        "entropies": np.array(known.entropies),
        "changed": np.array([100 * known.changed / known.images]),
        "right": right,
        **deletions(net, few.pixels),
    }
    mapped = test.images[: max(_SHOWN, costly // _MAPS_SHARE)]
    numbers = in_batches(lambda part: scores_of_capsules(net, to_pixels(part)), mapped).numpy()
    occlusion = Occlusion(*mapped.shape[2:])
    generator = np.random.default_rng(_SEED)
    alike: list[list[float]] = []
    on_ink: list[list[float]] = []
    ink: list[NDArray[np.float64]] = []
    shown: list[NDArray[np.float32]] = []
    for image, row in zip(mapped.numpy(), numbers, strict=True):
        maps = maps_of(net, image, row, occlusion)
        where = maps[INK] > 0
        alike.append([correlation(maps[name], maps[OCCLUSION]) for name in COMPARED])
        on_ink.append([correlation(maps[name][where], maps[OCCLUSION][where]) for name in COMPARED])
        ink.append(inked(net, image, maps, generator))
        if len(shown) < _SHOWN:
            shown.append(np.stack(list(maps.values())))
    maps_found: Arrays = {"alike": np.array(alike).T, "on_ink": np.array(on_ink).T, "ink": np.array(ink).T}
    return result | maps_found | {"shown": np.stack(shown)}


def evidence(found: list[Arrays]) -> Evidence:
    """Return the evidence from what was measured of each seed's network."""

    def all_of(name: str) -> NDArray[np.float64]:
        return np.stack([one[name] for one in found]).astype(np.float64)

    alike, on_ink = (dict(zip(COMPARED, all_of(name).swapaxes(0, 1), strict=True)) for name in ("alike", "on_ink"))
    ink = dict(zip((OCCLUSION, *COMPARED), all_of("ink").swapaxes(0, 1), strict=True))
    right = all_of("right")
    choices = {name: all_of(name) for name in (BY_COUPLING, BY_CONTRIBUTION, BY_VOTE, AT_RANDOM)}
    lost: dict[str, Outcomes] = {name: values[:, :, 0] for name, values in choices.items()}
    iterated = {"three iterations": right[:, 1], "one": right[:, 0]}
    entropies = all_of("entropies").mean(0).round(5).tolist()
    changed = all_of("changed").mean()
    return Evidence(
        comparisons=(
            Comparison.between("map like that of occlusion, on the ink", COUPLINGS, INK, on_ink, "correlation"),
            Comparison.between("… with and without routing", CONTRIBUTIONS, VOTES, on_ink, "correlation"),
            Comparison.between("map like that of occlusion, on all pixels", COUPLINGS, INK, alike, "correlation"),
            Comparison.between(
                "pose that is lost without a fifth of the capsules", BY_COUPLING, AT_RANDOM, lost, "of the length"
            ),
            Comparison.between("… chosen with and without routing", BY_CONTRIBUTION, BY_VOTE, lost, "of the length"),
            Comparison.between(
                "pose that is lost without a tenth of the ink, beyond random ink", COUPLINGS, INK, ink, "length"
            ),
            Comparison.between("answers of the same networks", "three iterations", "one", iterated, "% right"),
        ),
        figures={
            "entropy of the couplings by iteration; 1 if all are equal": entropies,
            "answers that routing changes, in %": round(float(changed), 4),
            "correlation with occlusion": {
                where: {name: round(float(values.mean()), 4) for name, values in side.items()}
                for where, side in (("on the ink", on_ink), ("on all pixels", alike))
            },
            "pose lost without a tenth of the ink, beyond random ink": {
                name: round(float(values.mean()), 4) for name, values in ink.items()
            },
            "without a fifth of the capsules": {
                name: dict(
                    zip(("pose lost", "length left", "cosine"), values.mean((0, 1)).round(4).tolist(), strict=True)
                )
                for name, values in choices.items()
            },
        },
        pictures={"Where the answer comes from": picture(found[0]["shown"])},
        said=(
            f"The couplings agree with what matters in a digit by {on_ink[COUPLINGS].mean():.2f}, the mere brightness "
            f"of its ink by {on_ink[INK].mean():.2f}, votes without any routing by {on_ink[VOTES].mean():.2f} (1 would "
            f"be exactly); routing changes {changed:.2f} % of the answers."
        ),
    )


def picture(shown: NDArray[np.generic]) -> bytes:
    """Draw some digits with their maps, each from its own smallest to its own largest number. shown: (K, 5, H, W)."""
    occlusion, ink, couplings, _, alone = np.swapaxes(shown, 0, 1).astype(np.float64)
    names = ("digit", "what matters\n(occlusion)", "couplings", "votes,\nno routing")
    rows = [list(map(_stretched, row)) for row in (ink, occlusion, couplings, alone)]
    return tiles("Where the answer comes from", rows, names)


def _stretched(one: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (one - one.min()) / max(1e-9, float(np.ptp(one)))
    return result


ROW = Row(CLAIM, jobs, measure)
