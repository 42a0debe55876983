"""The data of a trained network, checked against the network."""

from collections.abc import Collection
from pathlib import Path

from training.checkpoint import Checkpoint, CheckpointError
from training.data import datasets
from training.data.datasets import Dataset
from training.data.sources import DatasetError, check_places
from training.data.specs import NAMES


def load_matching(
    trained: Checkpoint,
    data: Path | None = None,
    data_dir: Path | None = None,
    name: str | None = None,
    source: Collection[str] = (),
) -> Dataset:
    """Load the data that a checkpoint was trained and tested on, in the size that its network takes.

    data: a folder of images, which ``folder:`` checkpoints need. data_dir: the folder with a data set's files. name: a
    data set to use instead of the checkpoint's own. source: the package managers that may be asked. Raises DatasetError
    if the data is not available, or has other labels or another size than the network, or if two places are given,
    and CheckpointError for an unknown data set.
    """
    try:
        check_places(data, data_dir, source)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    name = name or trained.dataset
    config = trained.config
    if data is not None:
        dataset = datasets.load_folder(data, config.image_size, config.image_channels)
    elif name in NAMES:
        dataset = datasets.load(name, data_dir, source)
    elif name.startswith("folder:"):
        raise DatasetError(f"trained on {name}; give it with --data FOLDER")
    else:
        raise CheckpointError(f"unknown data set {name!r}")
    if dataset.labels != trained.labels:
        raise DatasetError(
            f"the network's labels are {', '.join(trained.labels)}; those of the data {', '.join(dataset.labels)}"
        )
    found = dataset.image_shape
    if found != config.image_shape:
        given, expected = (" x ".join(map(str, sizes)) for sizes in (found, config.image_shape))
        raise DatasetError(f"{dataset.name} has images of {given}; the network takes {expected}")
    return dataset
