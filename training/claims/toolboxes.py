"""Attacks of two public toolboxes, so that the verdict does not rest on our own attacks alone.

Adversarial Robustness Toolbox: APGD (Croce and Hein, arXiv 2003.01690) and the Square attack (arXiv 1912.00049), which
sees no gradient. Foolbox: DDN (arXiv 1811.09600), the smallest change by its Euclidean norm. Both are in the extra
``claims``, and are imported when an attack begins. Axes and bounds as in ``training.claims.attacks``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.claims.attacks import PARALLEL_IMAGES, Scores, parts, within
from training.claims.row import CannotMeasure

EXTRA = "capsnet-serving[claims]"
PACKAGES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox"}
APGD_STEP_BOUNDS = 2.0  # its first step, in bounds, as its authors have it; it halves the step itself


class MissingToolboxError(CannotMeasure):
    """A toolbox is not installed. The text says which, and how to install it."""


def toolbox(name: str) -> ModuleType:
    """Import a module of a toolbox. Raises MissingToolboxError if it, or a package that it needs, is not installed."""
    package = PACKAGES[name.partition(".")[0]]
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingToolboxError(f"{package} cannot be imported; install it with: pip install '{EXTRA}'") from error


def check_toolboxes() -> None:
    """Raise MissingToolboxError if a toolbox is missing, before hours of other attacks."""
    for name in PACKAGES:
        toolbox(name)


def apgd(scores: Scores, images: Tensor, labels: Tensor, bound: float, seed: int, steps: int, restarts: int) -> Tensor:
    """Return images (B, C, H, W) changed by APGD on the ratio of logit differences (DLR); scores without saturation."""
    with _seeded(seed):
        attack = toolbox("art.attacks.evasion").AutoProjectedGradientDescent(
            _classifier(scores, images),
            norm=np.inf,
            eps=bound,
            eps_step=APGD_STEP_BOUNDS * bound,
            max_iter=steps,
            nb_random_init=restarts,
            batch_size=PARALLEL_IMAGES,
            loss_type="difference_logits_ratio",
            verbose=False,
        )
        return _generated(attack, images, labels, bound)


def square(scores: Scores, images: Tensor, labels: Tensor, bound: float, seed: int, queries: int) -> Tensor:
    """Return images (B, C, H, W) changed by the Square attack after so many queries, without any gradient."""
    with _seeded(seed):
        attack = toolbox("art.attacks.evasion").SquareAttack(
            _classifier(scores, images),
            norm=np.inf,
            eps=bound,
            max_iter=queries,
            nb_restarts=1,
            batch_size=PARALLEL_IMAGES,
            verbose=False,
        )
        return _generated(attack, images, labels, bound)


def ddn(scores: Scores, images: Tensor, labels: Tensor, seed: int, steps: int) -> Tensor:
    """Return the nearest fooling images (B, C, H, W) that DDN finds by the Euclidean norm of the change."""
    foolbox = toolbox("foolbox")
    model = foolbox.PyTorchModel(_Scorer(scores).eval(), bounds=(0, 1), device=images.device)
    changed = []
    with _seeded(seed):
        for part, answers in parts(images, labels):
            found, _, _ = foolbox.attacks.DDNAttack(steps=steps)(model, part, answers, epsilons=None)
            changed.append(found)
    return torch.cat(changed).detach()


class _Scorer(nn.Module):
    """A module for the toolboxes, which ask for one."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scores(pixels)


def _classifier(scores: Scores, images: Tensor) -> Any:
    with torch.no_grad():
        classes = scores(images[:1]).shape[1]
    return toolbox("art.estimators.classification").PyTorchClassifier(
        _Scorer(scores).eval(),
        loss=None,
        input_shape=tuple(images.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.device.type == "cuda" else "cpu",
    )


def _generated(attack: Any, images: Tensor, labels: Tensor, bound: float) -> Tensor:
    changed = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
    # The toolbox rounds the bound to single precision at other places than we do.
    return within(torch.from_numpy(changed).to(images), images, bound)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which the toolboxes draw from, and set them back at the end."""
    before = np.random.get_state()
    with torch.random.fork_rng():
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)
