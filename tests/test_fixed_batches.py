"""Tests of the sessions that each compute batches of one size."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.artifact import find, load
from serving.fixed_batches import FixedBatches, Session
from serving.runtime import onnxruntime
from tests.conftest import ROOT, Digits


class Doubling:
    """A session that doubles its input. It notes the sizes it saw, and if two calls overlapped."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self.overlapped = False
        self._busy = threading.Lock()

    def run(self, output_names: list[str], inputs: "dict[str, NDArray[np.generic]]", /) -> "list[NDArray[np.generic]]":
        self.overlapped |= not self._busy.acquire(blocking=False)
        values = inputs["x"].astype(np.float64)
        self.sizes.add(len(values))
        doubled = 2 * values
        if self._busy.locked():
            self._busy.release()
        return [doubled]


def test_a_batch_of_any_size_is_answered_row_by_row() -> None:
    batches = FixedBatches(Doubling)
    for count in (1, 2, 7, 8, 9, 63, 64, 65, 600):
        rows = np.arange(count, dtype=np.float64)
        [doubled] = batches.run(["y"], {"x": rows})
        assert (doubled == 2 * rows).all() and len(doubled) == count


def test_no_session_sees_a_second_size_or_a_second_call_at_once() -> None:
    opened: list[Doubling] = []

    def open_session() -> Doubling:
        opened.append(Doubling())
        return opened[-1]

    batches = FixedBatches(open_session)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda count: batches.run(["y"], {"x": np.ones(count)}), [1, 3, 8, 9, 40, 64, 65] * 60))
    assert sorted(size for session in opened for size in session.sizes) == [1, 8, 64, 512]
    assert all(len(session.sizes) == 1 and not session.overlapped for session in opened)


def test_a_session_is_opened_only_when_its_size_is_needed() -> None:
    opened: list[Doubling] = []

    def open_session() -> Doubling:
        opened.append(Doubling())
        return opened[-1]

    batches = FixedBatches(open_session)
    assert not opened
    batches.run(["y"], {"x": np.ones(5)})
    batches.run(["y"], {"x": np.ones(6)})
    assert len(opened) == 1


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_embedded_model_answers_the_same_in_a_filled_batch(digits: Digits, count: int) -> None:
    source = load(find(ROOT / "models", "capsnet-mnist")).file("fp32").read_bytes()
    ort = onnxruntime()

    def open_session() -> Session:
        session: Session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        return session

    images: dict[str, NDArray[np.generic]] = {"images": digits.images[:count, None]}
    [filled] = FixedBatches(open_session).run(["poses"], images)
    [plain] = open_session().run(["poses"], images)
    np.testing.assert_allclose(filled.astype(np.float64), plain.astype(np.float64), rtol=0, atol=1e-6)
