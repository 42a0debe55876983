"""The batching rule, with a predict function of the test's own and no server."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batcher import Batcher
from serving.errors import Draining, InferenceFailed, QueueFull
from serving.metrics import Metrics
from serving.runtime import Prediction

POISON = 255


class FakeModel:
    """Answers each image's first pixel. It can be held up, and fails where an image's first pixel is POISON."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        self.batches.append(len(images))
        self.begun.set()
        assert self.go.wait(10)
        values = images[:, 0, 0, 0].astype(np.float32)
        if (values == POISON).any():
            raise RuntimeError("poisoned")
        return Prediction(values[:, None], values[:, None, None])

    def hold(self) -> None:
        self.go.clear()
        self.begun.clear()


def _images(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def _values(prediction: Prediction) -> list[int]:
    return [int(value) for value in prediction.probabilities[:, 0]]


def _run(test: Callable[[Batcher, FakeModel], Awaitable[None]], max_batch: int = 4, max_queue: int = 100) -> FakeModel:
    """Run a test's coroutine beside a batcher, and close the batcher after it."""
    model = FakeModel()

    async def main() -> None:
        batcher = Batcher(model.predict, Metrics(), max_batch, max_queue)
        computing = asyncio.create_task(batcher.run())
        try:
            await test(batcher, model)
        finally:
            model.go.set()
            batcher.close()
            await computing

    asyncio.run(asyncio.wait_for(main(), 20))
    return model


async def _begun(model: FakeModel) -> None:
    assert await asyncio.to_thread(model.begun.wait, 10)


def test_an_idle_runtime_takes_a_single_request_at_once() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        assert _values(await batcher.submit(_images(7))) == [7]

    assert _run(test).batches == [1]


def test_requests_that_wait_are_computed_together_up_to_the_limit() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        first = asyncio.create_task(batcher.submit(_images(0)))
        await _begun(model)
        others = [asyncio.create_task(batcher.submit(_images(value))) for value in range(1, 7)]
        await asyncio.sleep(0)
        model.go.set()
        assert _values(await first) == [0]
        assert [_values(answer) for answer in await asyncio.gather(*others)] == [[value] for value in range(1, 7)]

    assert _run(test).batches == [1, 4, 2]


def test_the_limit_counts_images_and_not_requests() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        requests = [_images(0), _images(1, 2, 3), _images(4, 5), _images(6, 7)]
        tasks = [asyncio.create_task(batcher.submit(request)) for request in requests[:1]]
        await _begun(model)
        tasks += [asyncio.create_task(batcher.submit(request)) for request in requests[1:]]
        await asyncio.sleep(0)
        model.go.set()
        answers = await asyncio.gather(*tasks)
        assert [_values(answer) for answer in answers] == [[0], [1, 2, 3], [4, 5], [6, 7]]

    assert _run(test).batches == [1, 3, 4]


def test_a_request_larger_than_a_batch_is_split_and_joined_in_order() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        assert _values(await batcher.submit(_images(*range(10)))) == list(range(10))

    assert _run(test).batches == [4, 4, 2]


def test_what_the_queue_cannot_hold_is_refused_at_once_and_nothing_else_is_harmed() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        first = asyncio.create_task(batcher.submit(_images(0)))
        await _begun(model)
        waiting = asyncio.create_task(batcher.submit(_images(1, 2, 3)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="holds 3 images, 3 more would pass its limit of 5"):
            await batcher.submit(_images(4, 5, 6))
        model.go.set()
        assert _values(await first) + _values(await waiting) == [0, 1, 2, 3]
        assert _values(await batcher.submit(_images(4, 5, 6))) == [4, 5, 6]

    _run(test, max_queue=5)


def test_a_cancelled_request_is_never_computed() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        first = asyncio.create_task(batcher.submit(_images(0)))
        await _begun(model)
        cancelled = asyncio.create_task(batcher.submit(_images(1, 2)))
        kept = asyncio.create_task(batcher.submit(_images(3)))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        model.go.set()
        assert _values(await first) + _values(await kept) == [0, 3]

    assert _run(test).batches == [1, 1]


def test_one_poisoned_member_fails_alone() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        first = asyncio.create_task(batcher.submit(_images(0)))
        await _begun(model)
        others = [asyncio.create_task(batcher.submit(_images(value))) for value in (1, POISON, 2)]
        await asyncio.sleep(0)
        model.go.set()
        await first
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(answers[1], InferenceFailed)
        assert [_values(answer) for answer in (answers[0], answers[2]) if isinstance(answer, Prediction)] == [[1], [2]]
        assert _values(await batcher.submit(_images(5))) == [5]

    _run(test)


def test_values_that_are_not_finite_are_a_failure_and_no_answer() -> None:
    def predict(images: NDArray[np.uint8]) -> Prediction:
        return Prediction(np.full((len(images), 1), np.nan, np.float32), np.zeros((len(images), 1, 1), np.float32))

    async def main() -> None:
        metrics = Metrics()
        batcher = Batcher(predict, metrics, 4, 10)
        computing = asyncio.create_task(batcher.run())
        with pytest.raises(InferenceFailed):
            await batcher.submit(_images(1))
        batcher.close()
        await computing
        assert metrics.registry.get_sample_value("capsnet_inference_failures_total") == 1

    asyncio.run(main())


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    async def test(batcher: Batcher, model: FakeModel) -> None:
        model.hold()
        tasks = [asyncio.create_task(batcher.submit(_images(value))) for value in range(6)]
        await _begun(model)
        batcher.close()
        with pytest.raises(Draining):
            await batcher.submit(_images(9))
        model.go.set()
        assert [_values(answer) for answer in await asyncio.gather(*tasks)] == [[value] for value in range(6)]

    _run(test)
