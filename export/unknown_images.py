"""Images that show none of a network's classes, or not as the training showed them, to measure what is detected.

Axes: N images, C channels, H W height and width.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.compose import combine, members, place
from training.data.datasets import Dataset, load_present
from training.data.non_objects import shuffled
from training.data.sources import DatasetError
from training.data.specs import DATASETS, preparation_of

KIND_IMAGES = 1_000
#: Data sets of other objects, and, by the name of a kind, their labels; None for all.
OTHERS: Mapping[str, Mapping[str, tuple[str, ...] | None]] = {
    "fashion-mnist": {
        "Fashion-MNIST, shoes": ("Sandal", "Sneaker", "Ankle boot"),
        "Fashion-MNIST, other clothes": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt", "Bag"),
    },
    "mnist": {"MNIST digits": None},
}

_MAX_SHIFT = 4  # pixels, of each of two objects in one frame


class Kind(NamedTuple):
    """Images of one kind, uint8 (N, C, H, W). trained: the training showed such images as none of the classes."""

    name: str
    images: Tensor
    trained: bool = False


class UnknownImages(NamedTuple):
    """The kinds that can be shown to a network, and by kind the reason why others cannot."""

    shown: tuple[Kind, ...]
    missing: Mapping[str, str]


def unknown_images(dataset: Dataset, recipe: Mapping[str, object], generator: torch.Generator) -> UnknownImages:
    """Return up to KIND_IMAGES images of each kind, made of a network's test images and of other data sets."""
    shown = [*_made(dataset, _learns_non_objects(dataset, recipe), generator), *_arranged(dataset, generator)]
    if dataset.none_test_images is not None:
        shown.append(Kind("the data's own images of none", dataset.none_test_images[:KIND_IMAGES], trained=True))
    missing = {}
    for name, kinds in OTHERS.items():
        if dataset.labels == DATASETS[name].labels:
            continue
        for kind, labels in kinds.items():
            try:
                shown.append(Kind(kind, _others(name, labels, dataset, generator)))
            except DatasetError as error:
                missing[kind] = str(error)
    return UnknownImages(tuple(shown), missing)


def _learns_non_objects(dataset: Dataset, recipe: Mapping[str, object]) -> bool:
    """Return True if the training showed ``non_objects`` to the network.

    The share of them is a number in a recipe of ``training``. The trainings of ``benchmarks.gpu`` have True there, and
    show them to networks of one object alone.
    """
    share = recipe.get("none", 0)
    return dataset.objects == 1 if share is True else bool(share)


def _made(dataset: Dataset, learned: bool, generator: torch.Generator) -> Iterator[Kind]:
    """Make images of nothing. learned: the training showed images like the first three kinds."""
    tests = dataset.test_images[:KIND_IMAGES]
    grey = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, *dataset.image_shape)
    noise = torch.randint(0, 256, tests.shape, dtype=torch.uint8, generator=generator)
    black_or_white = 255 * torch.randint(0, 2, tests.shape, dtype=torch.uint8, generator=generator)
    order = torch.randperm(tests[0, 0].numel(), generator=generator)
    yield Kind("one grey level", grey.contiguous(), learned)
    yield Kind("uniform noise", noise, learned)
    yield Kind("test images, patches shuffled", shuffled(tests, generator), learned)
    yield Kind("black and white noise", black_or_white)
    yield Kind("test images, pixels shuffled", tests.flatten(2)[:, :, order].reshape(tests.shape))
    yield Kind("test images, inverted", 255 - tests)


def _arranged(dataset: Dataset, generator: torch.Generator) -> Iterator[Kind]:
    """Make images of known objects, but of more or fewer than in the training."""
    if dataset.objects > 1:
        chosen = torch.randperm(len(dataset.train_images), generator=generator)[:KIND_IMAGES]
        yield Kind("one object alone", place(dataset.train_images[chosen], dataset.canvas, generator))
        return
    labels = dataset.test_labels
    if labels.ndim == 1 and bool((labels != labels[0]).any()) and _adds_up(dataset):
        chosen = members(labels, 2, generator)[:KIND_IMAGES]
        images = dataset.test_images[chosen.flatten()]
        if not dataset.canvas:
            edge = slice(_MAX_SHIFT, _MAX_SHIFT + images.shape[-1])
            images = place(images, images.shape[-1] + 2 * _MAX_SHIFT, generator)[:, :, edge, edge]
        yield Kind("two objects in one image", combine(images.reshape(*chosen.shape, *images.shape[1:])))


def _adds_up(dataset: Dataset) -> bool:
    """Return True if the sum of two images shows both objects."""
    return preparation_of(dataset.name).polarity == "bright-on-dark"


def _others(name: str, labels: tuple[str, ...] | None, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Return test images of another data set, of some of its classes, at random places in the network's image size.

    Raises DatasetError if its files are not here, or its images do not fit.
    """
    channels, height, _ = dataset.image_shape
    other = load_present(name)
    if channels != other.image_shape[0] or height < other.image_shape[1]:
        raise DatasetError(f"its images are {other.image_shape}, the network takes {dataset.image_shape}")
    wanted = torch.tensor([other.labels.index(label) for label in labels or other.labels])
    images = other.test_images[torch.isin(other.test_labels, wanted)][:KIND_IMAGES]
    return place(images, height, generator)
