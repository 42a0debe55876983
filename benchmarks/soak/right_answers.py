"""The right answers, computed with ONNX Runtime before the server starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.artifact import load
from serving.files.idx import read_idx
from serving.runtime import Runtime

#: Largest difference of a probability or a pose's component: batches of other sizes differ in rounding.
TOLERANCE = 1e-4
_DATA = Path(__file__).parents[2] / "tests" / "data"


class Version(NamedTuple):
    """A version of a model."""

    name: str
    number: str


@dataclass(frozen=True)
class Numbers:
    """The answers of one version to all digits: probabilities (N, J), poses (N, J, E), labels by class."""

    probabilities: NDArray[np.float32]
    poses: NDArray[np.float32]
    labels: tuple[str, ...]


def digits(count: int) -> NDArray[np.uint8]:
    """Return real digits: (count, 28, 28)."""
    return read_idx((_DATA / "t10k-images-idx3-ubyte.gz").read_bytes())[:count]


def as_png(image: NDArray[np.uint8]) -> bytes:
    """Return an image (H, W) as a PNG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def right_answers(folders: Sequence[Path], images: NDArray[np.uint8]) -> Mapping[Version, Numbers]:
    """Return the answers of each version's graph to images (N, 28, 28), computed image by image in one thread."""
    found = {}
    for folder in folders:
        artifact = load(folder)
        runtime = Runtime(artifact.file(), "cpu", 1)
        outputs = [runtime.run({"images": image[None, None]}) for image in images]
        numbers = [np.concatenate([np.asarray(one[name]) for one in outputs]) for name in ("probabilities", "poses")]
        found[Version(artifact.name, artifact.version)] = Numbers(numbers[0], numbers[1], artifact.labels)
    return found


def difference(
    expected: Numbers, places: Sequence[int], probabilities: NDArray[np.float32], poses: NDArray[np.float32]
) -> str:
    """Return how an answer differs from the right one, or "" if it is right.

    places: the digits of the request. probabilities: (n, J). poses: (n, J, E).
    """
    for name, came, right in (
        ("probabilities", probabilities, expected.probabilities[list(places)]),
        ("poses", poses, expected.poses[list(places)]),
    ):
        if came.shape != right.shape:
            return f"{name} of the shape {came.shape}; expected {right.shape}"
        distance = float(np.abs(came - right).max())
        if not distance <= TOLERANCE:  # NaN is no answer either
            return f"{name} that differ by {distance:.3g}"
    return ""
