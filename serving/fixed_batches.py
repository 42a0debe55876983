"""Sessions of one graph that each compute batches of one size, for ONNX Runtime's CUDA provider."""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_STEP = 8  # each size is so many times the one before: on a GPU 8 rows take hardly longer than 1


class Session(Protocol):
    """Computes a graph, as ``onnxruntime.InferenceSession`` does."""

    def run(
        self, output_names: list[str], inputs: "dict[str, NDArray[np.generic]]", /
    ) -> "list[NDArray[np.generic]]": ...


class _Sized(NamedTuple):
    """A session, and the lock of whoever computes on it."""

    session: Session
    lock: threading.Lock


class FixedBatches:
    """Fills each batch up to 1, 8, 64, 512, … rows and computes it on the session of that size.

    ONNX Runtime's CUDA provider plans every convolution anew for a batch of another size than the one before: 36 ms
    where the batch itself takes 0.5. And of calls at the same time on one session some answers were not finite. Both
    are in benchmarks/results/gpu-served-h200.csv. So no session ever sees a second size or a second call at once.

    open_session: makes a session; called for each size when it is first needed.
    """

    def __init__(self, open_session: Callable[[], Session]) -> None:
        self._open = open_session
        self._sessions: dict[int, _Sized] = {}
        self._opening = threading.Lock()

    def run(self, output_names: list[str], inputs: "dict[str, NDArray[np.generic]]", /) -> "list[NDArray[np.generic]]":
        """Compute the outputs of at least one row. Blocks while another batch of the same size is computed."""
        count = len(next(iter(inputs.values())))
        size = 1
        while size < count:
            size *= _STEP
        sized = self._of_size(size)
        with sized.lock:
            outputs = sized.session.run(output_names, {name: _filled(rows, size) for name, rows in inputs.items()})
        return [output[:count] for output in outputs]

    def _of_size(self, size: int) -> _Sized:
        with self._opening:
            if size not in self._sessions:
                self._sessions[size] = _Sized(self._open(), threading.Lock())
            return self._sessions[size]


def _filled(rows: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """Return the rows with zeros after them, ``size`` in all."""
    if len(rows) == size:
        return rows
    filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled
