"""A batch: its inputs brought together, and computed by one call of the runtime."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching.queue import Part
from serving.runtime import Array, Arrays, Run, rows

#: Looks at a batch's outputs: which rows are good, (B,), or None where all are. Raises where the batch as a whole is
#: wrong; its members are then computed again, each by itself.
Check = Callable[[Arrays], NDArray[np.bool_] | None]

_MAX_JOINED_WITH_LOCK_BYTES = 2**20

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Requests that are computed together. again: it is one part of a batch that failed, by itself."""

    parts: list[Part]
    again: bool = False

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum([part.stop - part.start for part in self.parts])


class Inputs(NamedTuple):
    """The inputs of a batch, or why they could not be brought together, and the seconds that it took."""

    arrays: Arrays | Exception
    seconds: float


class Outcome(NamedTuple):
    """Result of a batch: its outputs or what went wrong; which rows are good, None for all; and the seconds it took."""

    outputs: Arrays | Exception
    good: NDArray[np.bool_] | None
    input_time: float
    infer_time: float


def stack(batch: Batch) -> Inputs:
    """Bring the inputs of a batch together. An exception is a result here: it must not end the thread."""
    start = time.perf_counter()
    parts = batch.parts
    arrays: Arrays | Exception
    try:
        if len(parts) == 1:
            _, whole, begin, end = parts[0]
            arrays = {name: array[begin:end] for name, array in whole.items()}
        else:
            arrays = {
                name: _joined([whole[name][begin:end] for _, whole, begin, end in parts]) for name in parts[0].arrays
            }
    except Exception as error:
        _logger.exception("a batch of %d rows could not be brought together", batch.rows)
        arrays = error
    return Inputs(arrays, time.perf_counter() - start)


def compute(inputs: Inputs, run: Run, check: Check) -> Outcome:
    """Compute a batch by one call of the runtime. An exception is a result here: it must not end the thread."""
    arrays, input_time = inputs
    if isinstance(arrays, Exception):
        return Outcome(arrays, None, input_time, 0.0)
    size, start = rows(arrays), time.perf_counter()
    try:
        outputs = run(arrays)
        infer_time = time.perf_counter() - start
        if any([not array.ndim or len(array) != size for array in outputs.values()]):
            shapes = {name: array.shape for name, array in outputs.items()}
            raise ValueError(f"{size} rows were answered with arrays of the shapes {shapes}")
        good = check(outputs)
    except Exception as error:
        _logger.exception("a batch of %d rows failed", size)
        return Outcome(error, None, input_time, time.perf_counter() - start)
    return Outcome(outputs, good, input_time, infer_time)


def _joined(parts: list[Array]) -> Array:
    """Join arrays, each contiguous and all of one type, along their first axis.

    Small ones, unlike by ``np.concatenate``, with Python's lock kept: the event loop would take it, and a batch's
    computation wait for it, as often as there are parts. While large ones are copied, the event loop is to go on.
    """
    if sum([part.nbytes for part in parts]) > _MAX_JOINED_WITH_LOCK_BYTES:
        return np.concatenate(parts)
    data = b"".join([part.data for part in parts])
    return np.frombuffer(data, parts[0].dtype).reshape(-1, *parts[0].shape[1:])
