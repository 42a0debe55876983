"""Conversion of arrays of any library to uint8, from 0 to 255."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.client.errors import ItemError, brief

_WHITE = 255
_ARRAY_METHODS = ("__array__", "__array_interface__", "__dlpack__", "__cuda_array_interface__")
_EXPECTED = "expected uint8 from 0 to 255, or floats from 0 to 1"


def is_array(item: object) -> bool:
    """Return True for a NumPy array, and for any object with one of the protocols for arrays."""
    return not isinstance(item, type) and any(hasattr(item, method) for method in _ARRAY_METHODS)


def is_nested(item: object) -> bool:
    """Return True for numbers in lists of lists, which are one array."""
    while isinstance(item, list | tuple) and item:
        item = item[0]
        if isinstance(item, int | float | np.number):
            return True
    return False


def array_of_names(item: Any) -> list[Any] | None:
    """Return the elements of a one-dimensional array of texts or objects, such as a column of paths; else None."""
    kind = getattr(getattr(item, "dtype", None), "kind", "")
    return list(item) if kind in ("U", "T", "O") and getattr(item, "ndim", 0) == 1 else None


def array_of(item: Any) -> NDArray[Any]:
    """Return an object with one of the protocols for arrays, or nested lists, as an array. Raises ItemError."""
    try:
        if hasattr(item, "__array__") or hasattr(item, "__array_interface__") or is_nested(item):
            return np.asarray(item)
        if hasattr(item, "__dlpack__"):
            return np.from_dlpack(item)
    except Exception as error:  # libraries raise many kinds of errors, such as for a tensor on a GPU
        raise ItemError(f"{type(item).__name__}; NumPy cannot read it ({brief(str(error))})") from error
    raise ItemError(f"{type(item).__name__}; expected an array in the computer's own memory")


def to_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an array with its values from 0 to 255. Raises ItemError unless its type and range tell white from black.

    Floats from 0 to 1 and truth values are scaled. Other integers are taken if they are from 0 to 255.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(_WHITE)
    if array.dtype.kind not in "fiu":
        raise ItemError(f"an array of {array.dtype}; {_EXPECTED}")
    if not array.size:
        return array.astype(np.uint8)
    low, high = array.min(), array.max()
    described = f"an array of {array.dtype} from {low:g} to {high:g}"
    if array.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also for numbers that are none
            raise ItemError(f"{described}; {_EXPECTED}")
        return np.rint(array.astype(np.float32) * _WHITE).astype(np.uint8)
    if low < 0 or high > _WHITE:
        raise ItemError(f"{described}; {_EXPECTED}")
    if high == 1:
        raise ItemError(f"{described}; {_EXPECTED} (a mask: 255 * images)")
    return array.astype(np.uint8)
