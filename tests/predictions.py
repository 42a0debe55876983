"""Substitutes for the classifying graph."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching.batcher import Batcher
from serving.runtime import Arrays, Run


class Prediction(NamedTuple):
    """probabilities: (B, J) float32; poses: (B, J, E) float32."""

    probabilities: NDArray[np.float32]
    poses: NDArray[np.float32]


Predict = Callable[[NDArray[np.uint8]], Prediction]


def as_run(predict: Predict) -> Run:
    """Return a runtime's call for a function of images (B, C, H, W)."""

    def run(arrays: Arrays) -> Arrays:
        return predict(np.asarray(arrays["images"], np.uint8))._asdict()

    return run


def as_predict(run: Run) -> Predict:
    """Return a function of images (B, C, H, W) for a runtime's call."""

    def predict(images: NDArray[np.uint8]) -> Prediction:
        outputs = run({"images": images})
        return Prediction(*(np.asarray(outputs[name], np.float32) for name in Prediction._fields))

    return predict


def change_predict(batcher: Batcher, change: Callable[[Predict], Predict]) -> None:
    """Replace the function with which a batcher computes by one that is made from it."""
    batcher._run = as_run(change(as_predict(batcher._run)))
