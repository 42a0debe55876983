"""Any folder of images as a data set: a sub-folder a class, images of any size, grey or in colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from serving.files.images import to_pixels
from training.data.datasets import Dataset, DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SCALED_SIZE = 32  # of images that come in several sizes, if no other is asked for
_TEST_EVERY = 5

Labelled = list[tuple[Path, int]]


def load_folder(
    folder: Path, image_size: int | None = None, image_channels: int | None = None, *, progress: bool = True
) -> Dataset:
    """Read ``folder/CLASS/*.png`` (and other image files) into memory.

    Of each class, by file name, every fifth image is for the test; or, where the folder holds ``train/CLASS`` and
    ``test/CLASS``, the split is that. image_size: height and width to scale all images to; by default their own,
    where all have the same and are square, and else 32. image_channels: 1 or 3; by default 3 where one image at
    least has colours.

    The data set's name is ``folder:NAME``. Raises DatasetError, naming the folder or the file that is wrong.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        labels = _classes(folder / "train")
        if extra := set(_classes(folder / "test")) - set(labels):
            raise DatasetError(f"{folder / 'test'}: has classes that train has not: {', '.join(sorted(extra))}")
        train, test = _list(folder / "train", labels), _list(folder / "test", labels)
    else:
        labels = _classes(folder)
        train, test = [], []
        for index, label in enumerate(labels):
            files = _list(folder, [label])
            # The second of five and not the first, so that a class of one image has it to train on.
            test += [(path, index) for path, _ in files[1::_TEST_EVERY]]
            train += [(path, index) for number, (path, _) in enumerate(files) if number % _TEST_EVERY != 1]
    for part, images in (("to train on", train), ("for the test", test)):
        if not images:
            raise DatasetError(f"{folder}: no images {part}; expected {folder}/CLASS/*.png, several of each class")
    if image_size is None or image_channels is None:
        size, channels = _common_shape([path for path, _ in train + test])
        image_size, image_channels = image_size or size, image_channels or channels
    (train_images, train_labels), (test_images, test_labels) = (
        _read(part, image_size, image_channels, progress) for part in (train, test)
    )
    name = f"folder:{folder.resolve().name}"
    return Dataset(name, tuple(labels), train_images, train_labels, test_images, test_labels)


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list(folder: Path, labels: Sequence[str]) -> Labelled:
    """The image files of these classes, with their label's index, in the order of class and name."""
    return [
        (path, index)
        for index, label in enumerate(labels)
        for path in sorted((folder / label).iterdir() if (folder / label).is_dir() else ())
        if path.suffix.lower() in SUFFIXES
    ]


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: not a readable image") from error


def _common_shape(paths: Sequence[Path]) -> tuple[int, int]:
    """The size that all images have if they are square and of one size, else SCALED_SIZE; and their channels."""
    sizes, colour = set(), False
    for path in paths:
        with _open(path) as image:
            sizes.add(image.size)
            colour = colour or Image.getmodebase(image.mode) == "RGB"
    width, height = next(iter(sizes))
    return (width if len(sizes) == 1 and width == height else SCALED_SIZE), (3 if colour else 1)


def _read(files: Labelled, size: int, channels: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""
    images = np.empty((len(files), channels, size, size), np.uint8)
    for index, (path, _) in enumerate(tqdm(files, "reading images", unit="file", disable=not progress, leave=False)):
        with _open(path) as image:
            try:
                images[index] = to_pixels(image, channels, (size, size))
            except Exception as error:  # damaged files make Pillow raise almost anything
                raise DatasetError(f"{path}: a damaged or cut-off image") from error
    return torch.from_numpy(images), torch.tensor([label for _, label in files])
