"""The repository's models with a calibration of round numbers, so that tests know what an answer must say."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.artifact import Calibration, find, load, write_manifest

MNIST, PAIRS = "capsnet-mnist", "capsnet-multimnist"
CALIBRATION = Calibration(temperature=0.1, presence=(0.5,) * 10, margin=0.1, reconstruction_error=0.06)


def calibrated_models(repository: Path, **changes: Any) -> Path:
    """Copy the models for single digits and for pairs into a folder, with a calibration, and return the folder.

    changes: of further fields of their artifacts, or of the calibration itself.
    """
    models = Path(__file__).parent.parent / "models"
    for name in (MNIST, PAIRS):
        source = find(models, name)
        folder = repository / name / source.name
        shutil.copytree(source, folder)
        write_manifest(replace(load(folder), **{"calibration": CALIBRATION, **changes}))
    return repository


def overlapped(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two digits, (28, 28) each, one over the other on (36, 36)."""
    return np.maximum(*on_canvas(first, second))


def on_canvas(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return two digits on their places of (36, 36)."""
    return np.pad(first, ((1, 7), (1, 7))), np.pad(second, ((7, 1), (7, 1)))
