"""A folder of images as a data set: one sub-folder for each class, images of any size, grey or in colour.

This module does not import PyTorch, so that a folder that is no data set is refused at once.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from serving.files.images import UnknownRange, to_pixels
from training.data.sources import DatasetError
from training.data.specs import NONE, Arrays

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
DEFAULT_SCALED_SIZE = 32  # pixels, for images of several sizes
FEW_IMAGES = 10  # a note reports classes with fewer training images
TEST_EVERY = 5
NONE_FOLDER = "none"  # the folder of images that show none of the classes
HIDDEN_FOLDERS = ("__MACOSX",)  # and all names that begin with a dot

Labelled = list[tuple[Path, int]]


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder, each with the index of its label, in the order of class and path.

    train: ends with the images of none of the classes, which have the label NONE. none_test: the images of none of the
    classes for the test. notes: sentences on the choice of files.
    """

    labels: tuple[str, ...]
    train: Labelled
    test: Labelled
    none_test: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


class ClassFiles(NamedTuple):
    """The image files of one class."""

    label: str
    train: list[Path]
    test: list[Path]


class FolderData(NamedTuple):
    """The images of a folder, its class names, and notes on it, a sentence each.

    none_test: (N, C, H, W) uint8, images of none of the classes for the test.
    """

    labels: tuple[str, ...]
    arrays: Arrays
    none_test: NDArray[np.uint8]
    notes: tuple[str, ...]


def find_images(folder: Path) -> ImageFiles:
    """List the images of ``folder/CLASS`` and its sub-folders, without opening files. Hidden files are left out.

    In each class, every fifth image by path is for the test. If the folder has ``train/CLASS`` and ``test/CLASS``,
    these are the split. The folder ``none`` is no class: its images show none of the classes. Raises
    DatasetError, naming the folder that is wrong.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    parts = {part: folder / part for part in ("train", "test") if (folder / part).is_dir()}
    if len(parts) == 2:
        train, test = (_find_classes(part) for part in parts.values())
        if extra := set(test) - set(train):
            raise DatasetError(f"{folder / 'test'}: has classes that train has not: {', '.join(sorted(extra))}")
        classes = [ClassFiles(label, files, test.get(label, [])) for label, files in train.items()]
    else:
        for part, path in parts.items():  # a class may have this name
            if not any(_is_image(file) for file in path.iterdir()):
                raise DatasetError(f"{folder}: has {part} alone of train and test; expected both, or CLASS/*.png")
        # The second of five and not the first, so that a class with one image has a training image.
        classes = [
            ClassFiles(label, [file for n, file in enumerate(files) if n % TEST_EVERY != 1], files[1::TEST_EVERY])
            for label, files in _find_classes(folder).items()
        ]
    shown = [one for one in classes if one.label != NONE_FOLDER]
    others = [one for one in classes if one.label == NONE_FOLDER]
    result = ImageFiles(
        tuple(one.label for one in shown),
        [(path, index) for index, one in enumerate(shown) for path in one.train]
        + [(path, NONE) for one in others for path in one.train],
        [(path, index) for index, one in enumerate(shown) for path in one.test],
        tuple(path for one in others for path in one.test),
        tuple(_notes_on_files(folder, list(parts.values()) if len(parts) == 2 else [folder], classes)),
    )
    if not shown:
        raise DatasetError(f"{folder}: no images to train on; expected {folder}/CLASS/*.png, several of each class")
    for part, images in (("to train on", result.train), ("for the test", result.test)):
        if not images:
            raise DatasetError(f"{folder}: no images {part}; expected {folder}/CLASS/*.png, several of each class")
    return result


def require_negatives(folder: Path, files: ImageFiles) -> None:
    """Raise DatasetError if there is only one class, and no training image without it."""
    if len(files.labels) == 1 and not any(label == NONE for _, label in files.train):
        raise DatasetError(
            f"{folder}: one class alone, {files.labels[0]}; a network that sees nothing else learns to find it "
            f"everywhere. Put images without it beside it, into a folder {NONE_FOLDER}, as many as you have"
        )


def read_folder(
    folder: Path, image_size: int | None = None, image_channels: int | None = None, *, progress: bool = True
) -> FolderData:
    """Read the images that ``find_images`` lists into memory.

    image_size: height and width to scale all images to; by default their own, where all have the same and are square,
    and else 32. image_channels: 1 or 3; by default 3 where one image at least has colours. Raises DatasetError, naming
    the folder or the file that is wrong.
    """
    files = find_images(folder)
    sizes, colour = _look_at([*(path for path, _ in files.train + files.test), *files.none_test])
    width, height = next(iter(sizes))
    own_size = width if len(sizes) == 1 and width == height else DEFAULT_SCALED_SIZE
    size, channels = image_size or own_size, image_channels or (3 if colour else 1)
    train, test = (_read([path for path, _ in part], size, channels, progress) for part in (files.train, files.test))
    train_labels, test_labels = (np.array([label for _, label in part]) for part in (files.train, files.test))
    arrays = Arrays(train, train_labels, test, test_labels)
    none_test = _read(files.none_test, size, channels, progress)
    return FolderData(files.labels, arrays, none_test, (*files.notes, *_notes_on_sizes(folder, sizes, size)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN_FOLDERS


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its sub-folders, hidden ones left out, in the order of their paths."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(parent, name) for name in names if not _is_hidden(name)]
    yield from sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not _is_hidden(path.name)


def _find_classes(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class, in the order of the classes.

    Raises DatasetError if a sub-folder has no image, or is a folder of classes itself.
    """
    classes = {name: [path for path in _files(folder / name) if _is_image(path)] for name in _folders(folder)}
    if odd := [name for name in classes if not name.isprintable()]:
        raise DatasetError(
            f"{folder}: a class's name has printable characters alone, unlike {', '.join(map(repr, odd))}"
        )
    if empty := [name for name, files in classes.items() if not files]:
        raise DatasetError(
            f"{folder}: each folder in it is a class, and there is no image in {', '.join(empty)}; expected files that "
            f"end in {', '.join(SUFFIXES)}, or the folder elsewhere"
        )
    if len(classes) == 1:
        ((name, files),) = classes.items()
        inner = {path.relative_to(folder / name).parts[0] for path in files}
        if len(inner) > 1 and not any((folder / name / one).is_file() for one in inner):
            raise DatasetError(
                f"{folder}: its only folder {name} has folders of images itself ({', '.join(sorted(inner))}); if these "
                f"are the classes, give {folder / name}"
            )
    return classes


def _notes_on_files(folder: Path, tops: list[Path], classes: list[ClassFiles]) -> Iterator[str]:
    """Return notes on files that are left out or in sub-folders, and on classes with few images.

    tops: the folders with the folders of classes.
    """
    if others := [name for name in _folders(folder) if folder not in tops and folder / name not in tops]:
        yield f"{folder}: beside train and test, left out: {', '.join(others)}"
    if loose := [path for top in {folder, *tops} for path in top.iterdir() if path.is_file() and _is_image(path)]:
        yield f"{folder}: images that are in no class's folder are left out: {len(loose)}"
    files = [path for top in tops for label in _folders(top) for path in _files(top / label)]
    if other := Counter(path.suffix.lower() or "no ending" for path in files if not _is_image(path)):
        yield f"{folder}: files that are no images by their ending are left out: {_counted(other)}"
    nested = Counter(
        one.label
        for one in classes
        for path in (*one.train, *one.test)
        if path.parent not in [top / one.label for top in tops]
    )
    if nested:
        yield f"{folder}: images in sub-folders of a class are read as that class's: {_counted(nested)}"
    if few := Counter({one.label: len(one.train) for one in classes if len(one.train) < FEW_IMAGES}):
        tested = sum(len(one.test) for one in classes)
        yield (
            f"{folder}: few images to learn from: {_counted(few)}; a network needs {FEW_IMAGES} of each class, "
            f"better 100, and an error that is measured on {tested} test images says little"
        )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _notes_on_sizes(folder: Path, sizes: set[tuple[int, int]], size: int) -> Iterator[str]:
    """Return notes on scaled images and on lost proportions."""
    if sizes == {(size, size)}:
        return
    by_area = sorted(sizes, key=lambda one: (one[0] * one[1], one))
    least, greatest = (f"{width} x {height}" for width, height in (by_area[0], by_area[-1]))
    found = least if len(sizes) == 1 else f"{least} to {greatest}"
    lost = "" if all(width == height for width, height in sizes) else "; what is not square is squashed"
    yield (f"{folder}: images of {found} pixels are scaled to {size} x {size}{lost}; --image-size chooses another size")


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{path}: an image of too many pixels") from error
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DatasetError(f"{path}: not a readable image") from error


def _look_at(paths: Sequence[Path]) -> tuple[set[tuple[int, int]], bool]:
    """Return the sizes (width, height) of the images, and True if one has colours, from their headers."""
    sizes, colour = set(), False
    for path in paths:
        with _open(path) as image:
            sizes.add(image.size)
            colour = colour or Image.getmodebase(image.mode) == "RGB"
    return sizes, colour


def _read(paths: Sequence[Path], size: int, channels: int, progress: bool) -> NDArray[np.uint8]:
    """Read images as (N, C, H, W) uint8."""
    images = np.empty((len(paths), channels, size, size), np.uint8)
    for index, path in enumerate(
        tqdm(paths, "reading images", unit="file", disable=None if progress else True, leave=False)
    ):
        with _open(path) as image:
            try:
                images[index] = to_pixels(image, channels, (size, size))
            except UnknownRange as error:
                raise DatasetError(f"{path}: {error}") from error
            except Exception as error:  # Pillow raises many kinds of errors for damaged files
                raise DatasetError(f"{path}: a damaged or cut-off image") from error
    return images
