"""Sessions of one graph for ONNX Runtime's CUDA provider. Each computes batches of one size."""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_SIZE_FACTOR = 8  # between two sizes: on a GPU, 8 rows take hardly longer than 1


class Session(Protocol):
    """The method of ``onnxruntime.InferenceSession`` that computes a graph."""

    def run(
        self, output_names: list[str], inputs: "dict[str, NDArray[np.generic]]", /
    ) -> "list[NDArray[np.generic]]": ...


class _Sized(NamedTuple):
    """A session of one size, and the lock that each call holds."""

    session: Session
    lock: threading.Lock


class FixedBatches:
    """A runtime that pads each batch to 1, 8, 64, 512, … rows and computes it on the session of that size.

    On one GPU, one session for all sizes took 36 ms for a batch of another size than the batch before, and the batch
    itself takes 0.5 ms. Some answers were not finite while two calls shared the session. Both figures are in
    benchmarks/results/gpu-served-h200.csv. The provider's convolutions keep a plan for the last size alone, which
    explains the first. That the shared session causes the second is likely, and not proven. So each session sees one
    size, and one call at a time.

    open_session: makes a session. It is called for each size when the size is first needed.
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
            size *= _SIZE_FACTOR
        sized = self._of_size(size)
        with sized.lock:
            outputs = sized.session.run(output_names, {name: _padded(rows, size) for name, rows in inputs.items()})
        return [output[:count] for output in outputs]

    def _of_size(self, size: int) -> _Sized:
        with self._opening:
            if size not in self._sessions:
                self._sessions[size] = _Sized(self._open(), threading.Lock())
            return self._sessions[size]


def _padded(rows: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """Return the rows followed by rows of zeros, ``size`` rows in all."""
    if len(rows) == size:
        return rows
    filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled
