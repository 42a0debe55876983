"""A batch: its inputs are joined and computed by one call of the runtime."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching.queue import Part
from serving.runtime import Array, Arrays, Run, rows

#: A function of a batch's outputs that returns which rows are good, (B,), or None if all are good. It raises if the
#: batch as a whole is wrong; its members are then computed again one by one.
Check = Callable[[Arrays], NDArray[np.bool_] | None]
#: A function of a batch's checked inputs and outputs that returns further outputs, with a row for each of the batch.
Derive = Callable[[Arrays, Arrays], Arrays]
#: A function that gets the outputs of the rows that clients sent, if all rows of their batch are good.
Observe = Callable[[Arrays], object]

_MAX_JOINED_WITH_LOCK_BYTES = 2**20

_logger = logging.getLogger(__name__)


def derive_nothing(inputs: Arrays, outputs: Arrays) -> Arrays:
    """Return no further outputs."""
    return {}


def observe_nothing(outputs: Arrays) -> None:
    """Ignore the outputs of a batch."""


class Hooks(NamedTuple):
    """The functions of a graph that follow the computation of each batch, on the thread that computes."""

    check: Check
    derive: Derive = derive_nothing
    observe: Observe = observe_nothing


class Batch(NamedTuple):
    """Requests that are computed together. again: True for a single part of a failed batch."""

    parts: list[Part]
    again: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows of all parts."""
        return sum([part.stop - part.start for part in self.parts])


class Inputs(NamedTuple):
    """The joined inputs of a batch, or the error of joining them. seconds: the time that it took.

    sent: True for each row that a client sent, (B,); None if clients sent all of them.
    """

    arrays: Arrays | Exception
    seconds: float
    sent: NDArray[np.bool_] | None = None


class Outcome(NamedTuple):
    """The result of a batch: its outputs or an error, and the seconds that it took. good: None if all rows are good."""

    outputs: Arrays | Exception
    good: NDArray[np.bool_] | None
    input_time: float
    infer_time: float


def stack(batch: Batch) -> Inputs:
    """Join the inputs of a batch. An exception becomes a result, since it must not end the thread."""
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
    return Inputs(arrays, time.perf_counter() - start, _sent(parts))


def compute(inputs: Inputs, run: Run, hooks: Hooks) -> Outcome:
    """Compute a batch by one call of the runtime. An exception becomes a result, since it must not end the thread."""
    arrays, input_time, sent = inputs
    if isinstance(arrays, Exception):
        return Outcome(arrays, None, input_time, 0.0)
    size, start = rows(arrays), time.perf_counter()
    try:
        outputs = run(arrays)
        infer_time = time.perf_counter() - start
        if any([not array.ndim or len(array) != size for array in outputs.values()]):
            shapes = {name: array.shape for name, array in outputs.items()}
            raise ValueError(f"{size} rows were answered with arrays of the shapes {shapes}")
        good = hooks.check(outputs)
        if good is None:
            derived = hooks.derive(arrays, outputs)
            hooks.observe(outputs if sent is None else {name: array[sent] for name, array in outputs.items()})
        else:
            with np.errstate(all="ignore"):
                derived = hooks.derive(arrays, outputs)
        if derived:
            outputs = {**outputs, **derived}
    except Exception as error:
        _logger.exception("a batch of %d rows failed", size)
        return Outcome(error, None, input_time, time.perf_counter() - start)
    return Outcome(outputs, good, input_time, infer_time)


def _sent(parts: list[Part]) -> NDArray[np.bool_] | None:
    if not any([part.ticket.probe for part in parts]):
        return None
    return np.repeat([not part.ticket.probe for part in parts], [part.stop - part.start for part in parts])


def _joined(parts: list[Array]) -> Array:
    """Join contiguous arrays of one type along their first axis.

    ``np.concatenate`` releases Python's lock for each part; the event loop would take the lock each time, and the batch
    would wait for it. So small arrays are joined without releasing the lock. Large arrays release it, so that the event
    loop can run during the copy.
    """
    if sum([part.nbytes for part in parts]) > _MAX_JOINED_WITH_LOCK_BYTES:
        return np.concatenate(parts)
    data = b"".join([part.data for part in parts])
    return np.frombuffer(data, parts[0].dtype).reshape(-1, *parts[0].shape[1:])
