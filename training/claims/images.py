"""The images of the claims: MNIST's digits and Fashion-MNIST's clothes, to train on, held out, and for the test."""

import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from serving.files.idx import read_idx
from training.claims.jobs import Scale
from training.data.datasets import load, split
from training.data.sources import DatasetError
from training.data.specs import TEST_IMAGES, TEST_LABELS

HELD_OUT_SEED = 0
#: The only digits of a fresh clone, for a quick run without MNIST's training images.
CLONED_DIGITS = Path(__file__).parents[2] / "tests" / "data"


@dataclass(frozen=True)
class Labelled:
    """Images (N, 1, 28, 28) uint8, and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "Labelled":
        """Return the first images."""
        return Labelled(self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> "Labelled":
        """Return the images on a device."""
        return Labelled(self.images.to(device), self.labels.to(device))

    @property
    def pixels(self) -> Tensor:
        """Return the images as float32 pixels from 0 to 1."""
        return self.images.to(torch.float32) / 255


@dataclass(frozen=True)
class Images:
    """The images of a run.

    train: to train on. held_out: digits of MNIST's training set that no network trains on, to choose and to calibrate.
    test: MNIST's test digits. other_train, other_test: clothes, for backgrounds and for images of none of the classes.
    """

    train: Labelled
    held_out: Labelled
    test: Labelled
    other_train: Labelled
    other_test: Labelled

    def to(self, device: torch.device) -> "Images":
        """Return the images on a device."""
        return Images(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def load_images(
    scale: Scale, digits: Path | None = None, clothes: Path | None = None, source: Collection[str] = ()
) -> Images:
    """Load the images of a run, in the numbers that its scale says.

    digits, clothes: folders with the files of MNIST and of Fashion-MNIST, by default the cache or a download. source:
    the package managers that may be asked. Without network, files and folders, a quick run takes its digits from
    MNIST's test set alone, of which a clone has a copy, and shuffled digits for clothes, and says so on stderr. Raises
    DatasetError if a given folder does not have its files, or if another run finds none.
    """
    pool, test = _labelled("mnist", digits, source, scale) or _cloned(scale)
    others = _labelled("fashion-mnist", clothes, source, scale) or (_scrambled(pool), _scrambled(test))
    train, held_out = (
        Labelled(pool.images[chosen], pool.labels[chosen])
        for chosen in split(len(pool), min(scale.held_out, len(pool) // 5), HELD_OUT_SEED)
    )
    clothes_train, clothes_test = others
    return Images(
        train.first(scale.train),
        held_out,
        test.first(scale.test),
        clothes_train.first(scale.train),
        clothes_test.first(scale.test),
    )


def _labelled(
    name: str, folder: Path | None, source: Collection[str], scale: Scale
) -> tuple[Labelled, Labelled] | None:
    """Return the training and the test images of a data set, or None if a quick run must do without it."""
    try:
        found = load(name, folder, source, progress=False)
    except DatasetError as error:
        if folder is not None:
            raise
        if scale.name != "quick":
            flag = "--data-dir" if name == "mnist" else "--clothes-dir"
            raise DatasetError(str(error).replace("--data-dir", flag)) from error
        print(f"{name} is not available; this quick run takes digits of the clone instead", file=sys.stderr)
        return None
    return Labelled(found.train_images, found.train_labels), Labelled(found.test_images, found.test_labels)


def _cloned(scale: Scale) -> tuple[Labelled, Labelled]:
    """Return the clone's digits: all but the last ones, and the last ones for the test."""
    files = [CLONED_DIGITS / f"{name}.gz" for name in (TEST_IMAGES, TEST_LABELS)]
    images, labels = (torch.from_numpy(read_idx(file.read_bytes())) for file in files)
    both = Labelled(images[:, None], labels.to(torch.int64))
    rest = len(both) - scale.test
    return both.first(rest), Labelled(both.images[rest:], both.labels[rest:])


def _scrambled(digits: Labelled) -> Labelled:
    """Return digits whose rows are in another order, the same for all, which shows no digit."""
    order = torch.randperm(digits.images.shape[-2], generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    return replace(digits, images=digits.images[:, :, order])
