"""Data sets in memory: fetched once, verified by SHA-256 and kept in a folder, or generated, or read from a folder."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from serving.files.cache import cache_folder
from serving.files.idx import decompress
from training.data.compose import affnist_spec, scenes
from training.data.folder import read_folder
from training.data.sources import SOURCE_ERRORS, DatasetError, Folder, asked, package_manager, read_verified
from training.data.specs import DATASETS, GENERATED, NAMES, NONE, Arrays, DatasetSpec, GeneratedSpec

_TEST_SEED = 0  # for composed test images

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: The name that it was loaded by.
        labels: The class names; label ``i`` is named ``labels[i]``.
        train_images: ``(N, C, H, W)`` uint8, 0 to 255; for MNIST ``(60000, 1, 28, 28)``, 0 for background.
        train_labels: ``(N,)`` int64; NONE for an image that shows none of the classes.
        test_images: ``(M, C, S, S)`` uint8; for MNIST 10,000 images.
        test_labels: ``(M,)`` int64, or ``(M, K)`` where each image has ``K`` objects.
        objects: ``K``, the number of ``train_images`` of different classes in one image of the training: 1 or 2.
        canvas: Height and width of the images that training composes by putting each object anywhere; 0 if
            ``train_images`` are taken as they are.
        none_test_images: ``(L, C, S, S)`` uint8 that show none of the classes, for the test; None for no such images.
        notes: Facts to know before training, such as scaled images. One sentence each.
    """

    name: str
    labels: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    objects: int = 1
    canvas: int = 0
    none_test_images: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, S, S) of a network's input for this data set."""
        channels, height, width = self.test_images.shape[1:]
        return channels, height, width


def load(name: str, folder: Path | None = None, source: Collection[str] = (), *, progress: bool = True) -> Dataset:
    """Load a data set from the first source with all its files and the right digests, or generate it from another one.

    If ``folder`` is given, it must have the files, and nothing else is asked. Else they are searched in the cache
    (``$XDG_CACHE_HOME/capsnet/<name>``, or ``~/.cache/capsnet/<name>``) and then in the sources that the data set
    lists; of the package managers npm and apt, only those that ``source`` names are asked. The files are kept,
    uncompressed, in the cache, where they replace files of the same name with wrong content. ``progress`` shows a
    progress bar for each download.

    Raises:
        ValueError: There is no data set of that name.
        DatasetError: ``folder`` does not have the files, or no source has; the message gives each one's reason.
    """
    if name in GENERATED:
        return generate(name, load(GENERATED[name].original, folder, source, progress=progress))
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(sorted(NAMES))}")
    spec = DATASETS[name]
    arrays = _fetch(name, spec, source, progress) if folder is None else _read(name, spec, folder)
    return _dataset(name, spec.labels, arrays)


def load_present(name: str) -> Dataset:
    """Load a data set of DATASETS whose files are on this machine. Nothing is downloaded and nothing is stored.

    Raises DatasetError if the files are neither in the cache nor in a folder that the data set lists.
    """
    spec = DATASETS[name]
    places = [Folder(cache_folder() / name), *(source for source in spec.sources if isinstance(source, Folder))]
    for place in places:
        try:
            files = read_verified(place, spec.digests, spec.unpack, False)
        except SOURCE_ERRORS:
            continue
        return _dataset(name, spec.labels, spec.read(files))
    raise DatasetError(f"the data set {name} is not on this machine")


def load_folder(
    folder: Path, image_size: int | None = None, image_channels: int | None = None, *, progress: bool = True
) -> Dataset:
    """Load a folder of images as the data set ``folder:NAME``; see ``read_folder``, also for what it raises."""
    images = read_folder(folder, image_size, image_channels, progress=progress)
    dataset = _dataset(f"folder:{folder.resolve().name}", images.labels, images.arrays)
    none_test = torch.from_numpy(images.none_test) if len(images.none_test) else None
    return replace(dataset, none_test_images=none_test, notes=images.notes)


def _dataset(name: str, labels: tuple[str, ...], arrays: Arrays) -> Dataset:
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, arrays)
    return Dataset(name, labels, train_images, train_labels, test_images, test_labels)


def _read(name: str, spec: DatasetSpec, folder: Path) -> Arrays:
    """Read a data set from the user's folder. Raises DatasetError if it does not have the files."""
    try:
        if not folder.is_dir():
            raise NotADirectoryError("there is no such folder")
        return spec.read(read_verified(Folder(folder), spec.digests, spec.unpack, False))
    except SOURCE_ERRORS as error:
        raise DatasetError(
            f"the folder {folder} does not have the data set {name}: {' '.join(str(error).split())}; "
            f"expected the files {_names(spec)}"
        ) from error


def _fetch(name: str, spec: DatasetSpec, managers: Collection[str], progress: bool) -> Arrays:
    cache = Folder(cache_folder() / name)
    failures = []
    for source in (cache, *asked(spec.sources, managers)):
        try:
            files = read_verified(source, spec.digests, spec.unpack, progress)
        except SOURCE_ERRORS as error:
            failures.append(f"  {source}: {' '.join(str(error).split())}")
            continue
        if source != cache:
            _store(cache.path, files)
        return spec.read(files)
    raise DatasetError(
        "\n".join(
            (
                f"could not get the data set {name} from any of its sources:",
                *failures,
                *_ways_out(spec, managers),
            )
        )
    )


def _ways_out(spec: DatasetSpec, managers: Collection[str]) -> Iterator[str]:
    """Yield what the user can do where no source has the files. managers: the package managers that may be asked."""
    having = [found for source in spec.sources if (found := package_manager(source))]
    for manager in managers:
        if manager not in having:
            yield f"No package of {manager} has it."
    for other in having:
        if other not in managers:
            yield f"--source {other} asks {other} for a package with them too."
    yield f"Put the files {_names(spec)} in a folder and give --data-dir FOLDER."


def _names(spec: DatasetSpec) -> str:
    """Return the names that a data set's files may have in a folder."""
    return ", ".join(spec.digests) + (" (or the same with .gz)" if spec.unpack is decompress else "")


def generate(name: str, original: Dataset) -> Dataset:
    """Compose a data set of GENERATED from its original data set.

    The test images are always the same, so that all results are on one test set.
    """
    spec = GENERATED[name]
    generator = torch.Generator().manual_seed(_TEST_SEED)
    rounds = [_test_round(spec, original, generator) for _ in range(spec.test_rounds)]
    images, labels = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*rounds, strict=True))
    return Dataset(
        name, original.labels, original.train_images, original.train_labels, images, labels, spec.objects, spec.canvas
    )


def _test_round(spec: GeneratedSpec, original: Dataset, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compose one test image for each of the original's; return the images and their labels."""
    images, labels = original.test_images, original.test_labels
    if spec.distorted_test:
        return affnist_spec(images, spec.canvas, generator), labels
    return scenes(images, labels, spec.objects, spec.canvas, generator)


def split(count: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``range(count)`` at random into indices to train on and ``held_out`` indices to validate on.

    Returns two sorted int64 tensors of shapes ``(count - held_out,)`` and ``(held_out,)``, the same for the same
    arguments.

    Raises:
        ValueError: ``held_out`` is not between 0 and ``count``.
    """
    if not 0 <= held_out <= count:
        raise ValueError(f"cannot hold out {held_out} of {count} examples, expected 0 to {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` examples of each class at random: their indices, ascending, int64.

    labels: (N,) int64. The same for the same arguments, and with a larger count the smaller choice is among them.

    Raises:
        ValueError: A class has fewer.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels[order] == label]
        if len(of_class) < count:
            named = "none of the classes" if label == NONE else f"class {label}"
            raise ValueError(f"per_class: {count}; {named} has {len(of_class)} images to train on")
        chosen.append(of_class[:count])
    return torch.cat(chosen).sort().values


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Keep the files for the next run. If the folder cannot be written, training goes on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            try:
                temporary.write_bytes(content)
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("the data set is not kept in %s: %s", folder, error)
