"""Confidences: the probabilities of an image's classes, from the lengths of their capsules.

An image is taken to show K objects of different classes. The weight of a set of K classes is the exponential of the sum
of their evidence, and the confidence of a class is the probability that an object of the image, chosen at random, is of
this class. With one object this is the softmax of the evidence. With several it is the inclusion probability of
conditional Poisson sampling, divided by K: two objects that are surely there have 0.5 each, whichever is longer.
Source: Chen, Dempster and Liu, "Weighted finite population sampling to maximize entropy" (1994).

Axes: B images, J classes.
"""

import numpy as np
from numpy.typing import NDArray

#: Numbers in single or double precision.
Floats = NDArray[np.floating]

# The longest length below 1 in single precision, and so the largest evidence, 8.7: arctanh(1) is infinite.
_MAX_LENGTH = 1 - 2.0**-24
# The largest distance of K weights' logarithms in all, since the products of small weights must not become 0.
_MAX_LOG_RANGE = 600.0


def evidence(lengths: Floats, arctanh: bool) -> Floats:
    """Return what the lengths of capsules (B, J) say for their classes, (B, J): arctanh(length), or the length itself.

    Unlike the length, its arctanh has no upper end, so it tells a capsule of 0.95 from one of 0.9 as well as one of 0.5
    from one of 0.2. Softmax of the lengths is surer of images that show no class.
    """
    return np.arctanh(np.minimum(lengths, _MAX_LENGTH)) if arctanh else lengths


def confidences(found: Floats, temperature: float, objects: int = 1) -> Floats:
    """Return the confidences of classes (B, J), which add up to 1, from their evidence. objects: K, up to J."""
    weights = _weights_of_sets(_weights(found, _largest(found), temperature, objects), objects)
    weights /= np.add.reduce(weights, 1, keepdims=True)
    return weights


def log_weight(found: Floats, temperature: float, objects: int = 1) -> Floats:
    """Return the logarithm of the sum of the weights exp(evidence / temperature) of all sets of K classes, (B,)."""
    largest = _largest(found)
    weights = _weights_of_sets(_weights(found, largest, temperature, objects), objects)
    # Each set is counted for each of its K classes.
    result: Floats = np.log(np.add.reduce(weights, 1) / objects) + objects * largest[:, 0] / temperature
    return result


def _largest(found: Floats) -> Floats:
    largest: Floats = np.maximum.reduce(found, 1, keepdims=True)
    return largest


def _weights(found: Floats, largest: Floats, temperature: float, objects: int) -> Floats:
    """Return exp(evidence / temperature) of classes (B, J), divided by the largest; in double precision for sets."""
    logarithms = (found - largest) * (1 / temperature)
    if objects > 1:
        logarithms = np.maximum(logarithms, -_MAX_LOG_RANGE / objects).astype(np.float64)
    return np.exp(logarithms)


def _weights_of_sets(weights: Floats, objects: int) -> Floats:
    """Return, for each class, the sum of the weights of the sets of K classes that it is in, (B, J).

    The weight of a set is the product of its classes' weights (B, J). No sum has a negative part, which would take the
    digits of classes that are much less likely than the first.
    """
    if objects == 1:
        return weights
    before = _sums_before(weights, objects)
    after = [sums[:, ::-1] for sums in _sums_before(weights[:, ::-1], objects)]
    others: Floats = np.add.reduce([before[count] * after[objects - 1 - count] for count in range(objects)])
    others *= weights
    return others


def _sums_before(weights: Floats, objects: int) -> list[Floats]:
    """Return, for each number of classes below K, the sum of the weights of their sets before each class, (B, J)."""
    sums = [np.ones_like(weights)]
    for _ in range(objects - 1):
        following = np.zeros_like(weights)
        np.add.accumulate((weights * sums[-1])[:, :-1], 1, out=following[:, 1:])
        sums.append(following)
    return sums
