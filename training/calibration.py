"""Calibration of a network's numbers: a temperature that makes them confidences, and the error that is left.

Axes: N images, K objects an image, J classes.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 10.0
_SEARCH_STEPS = 60
_DIGITS = 4  # of a temperature, after the decimal point

Floats = NDArray[np.float32]


#: From numbers (N, J), a temperature and K, to the logarithm (N,) of the sum of the weights
#: exp(number / temperature), added over the classes of a set, of all sets of K classes.
LogWeight = Callable[[NDArray[np.floating], float, int], NDArray[np.floating]]


def log_weight(found: NDArray[np.floating], temperature: float, objects: int) -> NDArray[np.floating]:
    """Return the logarithm of the sum of ``exp(found / temperature)`` over the classes, (N,); see LogWeight.

    Raises ValueError for more than one object.
    """
    if objects != 1:
        raise ValueError(f"objects: {objects}; expected 1")
    scaled = found.astype(np.float64) / temperature
    top = scaled.max(1)
    total: NDArray[np.float64] = top + np.log(np.exp(scaled - top[:, None]).sum(1))
    return total


def fit_temperature(
    found: NDArray[np.floating], labels: NDArray[np.int64], log_weight: LogWeight = log_weight
) -> float:
    """Return the temperature for which the sets of the images' labels are the most probable.

    It minimises the cross-entropy of the sets, which is convex in 1 / temperature. found: (N, J), lengths, logits or
    other evidence for the classes. labels: (N, K), of K different classes an image. log_weight: by default for K = 1,
    where the temperature is that of ``softmax(found / temperature)``. A share of 1 / (N + 2) of the targets goes to the
    other classes (Platt, "Probabilistic Outputs for Support Vector Machines", 1999), so that images without a mistake
    do not lead to a temperature of 0.
    """
    (count, classes), objects = found.shape, labels.shape[1]
    others = classes - objects
    if not count or others < 1:
        return 1.0
    targets = np.full(found.shape, objects / (count + 2) / others)
    np.put_along_axis(targets, labels, (count + 1) / (count + 2), 1)
    linear = float((targets * found).sum(1).mean())

    def loss(inverse: float) -> float:
        return float(log_weight(found, 1 / inverse, objects).mean()) - inverse * linear

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_SEARCH_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return round(2 / (low + high), _DIGITS)


def confidences(lengths: Floats, temperature: float) -> NDArray[np.float64]:
    """Return ``softmax(lengths / temperature)``, (N, J)."""
    scaled = lengths.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return result


def bins_of(predicted: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the bin of each prediction from 0 to 1, (N,): ECE_BINS bins of equal width."""
    return np.minimum((predicted * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def expected_calibration_error(predicted: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """Return the mean distance, over images, between the predictions in a bin and the share of right ones in it.

    predicted: (N,), from 0 to 1, in the bins of ``bins_of``. right: (N,), from 0 to 1. Source: Guo et al., "On
    Calibration of Modern Neural Networks" (2017), section 2.
    """
    gaps = np.bincount(bins_of(predicted), weights=right - predicted, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(predicted))
