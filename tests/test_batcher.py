"""Tests of the batcher with a fake predict function and no server."""

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batching.admission import BatchPolicy
from serving.batching.batch import Hooks
from serving.batching.batcher import Batcher
from serving.batching.cost import BatchCost
from serving.batching.ticket import Share, State, Ticket, settle
from serving.errors import DeadlineUnmeetable, Draining, InferenceFailed, QueueFull
from serving.metrics.registry import Metrics, ModelMetrics
from serving.repository.classifier import finite_rows
from serving.repository.tuning import good_batch
from serving.runtime import Array, Arrays
from tests.predictions import Prediction, as_run

POISON = 255
NOT_FINITE = 254
BOTH_INFINITE = 253  # infinities of both signs: their sum is not a number, and numpy warns
MISSHAPEN = 252
WIDE = 251  # answered with poses of another size
POISON_FREE = 250
QUICK = BatchCost([(1, 0.0001), (4, 0.0004)])


class FakeModel:
    """A fake model that computes from first pixels. A test can hold it up, and the pixel POISON makes it fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        values = images[:, 0, 0, 0].astype(np.float32)
        self.batches.append([int(value) for value in values])
        self.begun.set()
        assert self.go.wait(10)
        if (values == POISON).any():
            raise RuntimeError("poisoned")
        poses = values[:, None, None]
        if (values == WIDE).any():
            poses = np.tile(poses, (1, 1, 3))
        if (values == MISSHAPEN).any():
            return Prediction(values[:, None], poses[:, 0])
        if (values == BOTH_INFINITE).any():
            poses = np.tile(poses, (1, 1, 2))
            poses[values == BOTH_INFINITE] = [np.inf, -np.inf]
        values[values == NOT_FINITE] = np.nan
        return Prediction(values[:, None], poses)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    def hold(self) -> None:
        self.go.clear()
        self.begun.clear()


@dataclass
class Setting:
    """A running batcher, its fake model and its metrics."""

    batcher: Batcher
    model: FakeModel
    metrics: Metrics = field(default_factory=Metrics)

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model": "m", "version": "1", "graph": "classify"})

    async def occupy(self) -> "asyncio.Task[Share]":
        """Hold the model up in a batch of one image, 0."""
        self.model.hold()
        task = asyncio.create_task(submit(self.batcher, _images(0)))
        assert await asyncio.to_thread(self.model.begun.wait, 10)
        return task

    async def until_begun(self, batches: int) -> None:
        """Wait until this number of batches has begun."""
        end = time.monotonic() + 10
        while len(self.model.batches) < batches:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)

    async def queue(self, *values: int, urgent: bool = False, client: str = "") -> "asyncio.Task[Share]":
        task = asyncio.create_task(submit(self.batcher, _images(*values), urgent=urgent, client=client))
        await asyncio.sleep(0.001)
        return task


async def submit(
    batcher: Batcher,
    images: NDArray[np.uint8],
    deadline: float | None = None,
    urgent: bool = False,
    client: str = "",
) -> Share:
    answer: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
    ticket = batcher.enqueue({"images": images}, then=settle(answer), deadline=deadline, urgent=urgent, client=client)
    try:
        return await answer
    except asyncio.CancelledError:
        batcher.give_up(ticket)
        raise


def _slow() -> BatchCost:
    """Return a cost of 0.1 seconds an image."""
    return BatchCost([(1, 0.1), (2, 0.2)])


def _images(*values: int) -> NDArray[np.uint8]:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def _values(share: Share) -> list[int]:
    return [int(value) for value in share["probabilities"][:, 0]]


def _run(
    test: Callable[[Setting], Awaitable[None]],
    max_batch: int = 4,
    max_queue: int = 100,
    timeout: float = 10,
    ageing: float = 10,
    slots: int = 1,
    cost: BatchCost = QUICK,
    good_batch: int = 0,
) -> FakeModel:
    """Run a test's coroutine with a batcher, and close the batcher after it. good_batch: 0 for ``max_batch``."""
    model = FakeModel()

    async def main() -> None:
        metrics = Metrics()
        policy = BatchPolicy(max_batch, good_batch or max_batch, max_queue, timeout, ageing)
        batcher = Batcher(
            as_run(model.predict), Hooks(finite_rows), ModelMetrics(metrics, "m", "1", ["only"]), policy, cost, slots
        )
        try:
            await test(Setting(batcher, model, metrics))
        finally:
            model.go.set()
            await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 20))
    return model


def test_an_idle_runtime_takes_a_single_request_at_once() -> None:
    async def test(setting: Setting) -> None:
        assert _values(await submit(setting.batcher, _images(7))) == [7]

    assert _run(test).sizes == [1]


def test_half_of_the_requests_that_gathered_while_the_only_slot_computed_are_left_for_the_next_batch() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(value) for value in range(1, 13)]
        setting.model.go.set()
        assert [_values(answer) for answer in await asyncio.gather(*tasks)] == [[value] for value in range(13)]

    assert _run(test, max_batch=8, good_batch=2).sizes == [1, 6, 6]


def test_two_slots_share_the_waiting_requests() -> None:
    async def test(setting: Setting) -> None:
        setting.model.hold()
        tasks = [asyncio.create_task(submit(setting.batcher, _images(value))) for value in range(8)]
        await setting.until_begun(2)
        setting.model.go.set()
        await asyncio.gather(*tasks)

    assert sorted(_run(test, max_batch=8, good_batch=4, slots=2, cost=_slow()).sizes) == [4, 4]


def test_good_batches_are_no_larger_than_they_need_to_be_and_no_smaller() -> None:
    assert good_batch(BatchCost([(1, 0.0201), (2, 0.0401)]), 8) == 1
    assert good_batch(BatchCost([(1, 0.0014), (2, 0.0024)]), 64) == 6  # 1 ms an image, 0.4 ms a batch
    assert good_batch(BatchCost([(1, 0.01), (2, 0.0101)]), 64) == 64


def test_the_error_that_any_request_would_get_is_known_before_it_arrives() -> None:
    async def test(setting: Setting) -> None:
        batcher = setting.batcher
        assert batcher.refusal(None, False, 0) is None and batcher.refusal(0.5, False, 0) is None
        assert isinstance(batcher.refusal(0.5, False, 3), DeadlineUnmeetable), "those that come first take their time"
        assert batcher.refusal(0.5, True, 3) is None
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(1, 2, 3)]
        error = batcher.refusal(0.6, False, 0)
        assert isinstance(error, DeadlineUnmeetable) and "deadline: the answer may take" in str(error)
        assert batcher.refusal(0.6, False, 0) is error, "so that its bytes are made once"
        assert batcher.refusal(0.6, True, 0) is None, "urgent ones go ahead"
        error = batcher.refusal(0.6, True, 1)
        assert isinstance(error, QueueFull) and error.retry_after > 0.35, "but not beyond the queue's limit"
        assert batcher.refusal(10.0, False, 0) is None
        assert isinstance(batcher.refusal(10.0, False, 1), QueueFull)
        tasks += [await setting.queue(4)]
        error = batcher.refusal(None, True, 0)
        assert isinstance(error, QueueFull) and error.retry_after > 0
        assert str(error) == "the queue holds 4 images, its limit; try again later"
        setting.model.go.set()
        await asyncio.gather(*tasks)

    _run(test, max_batch=8, max_queue=4, cost=_slow())


def test_an_answer_is_delivered_at_once_and_once() -> None:
    async def test(setting: Setting) -> None:
        told: list[Ticket] = []
        setting.model.hold()
        first = setting.batcher.enqueue({"images": _images(1)}, then=told.append)
        given_up = setting.batcher.enqueue({"images": _images(2)}, then=told.append)
        soon = time.monotonic() + 0.5
        late = setting.batcher.enqueue({"images": _images(3)}, then=told.append, deadline=soon)
        setting.batcher.give_up(given_up)
        assert told == [given_up] and given_up.state is State.GIVEN_UP
        setting.batcher.give_up(given_up)
        await asyncio.sleep(soon - time.monotonic())
        setting.model.go.set()
        while len(told) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # for what is delivered twice
        assert set(map(id, told[1:])) == {id(first), id(late)} and len(told) == 3
        assert first.state is State.ANSWERED and _values(first.result()) == [1]

    _run(test, max_batch=1)


def test_requests_that_come_together_are_computed_together_even_when_the_runtime_is_idle() -> None:
    async def test(setting: Setting) -> None:
        await asyncio.gather(*(submit(setting.batcher, _images(value)) for value in range(4)))

    assert _run(test).sizes == [4]


def test_requests_that_wait_while_the_runtime_computes_share_batches_and_split_to_fill_them() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(*values) for values in ([1, 2, 3], [4, 5], [6, 7])]
        setting.model.go.set()
        answers = await asyncio.gather(*tasks)
        assert [_values(answer) for answer in answers] == [[0], [1, 2, 3], [4, 5], [6, 7]]

    assert _run(test).batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_request_larger_than_a_batch_is_split_and_joined_in_order() -> None:
    async def test(setting: Setting) -> None:
        assert _values(await submit(setting.batcher, _images(*range(10)))) == list(range(10))

    assert _run(test).sizes == [4, 4, 2]


def test_two_slots_share_the_waiting_requests_and_answer_split_ones_in_order() -> None:
    async def test(setting: Setting) -> None:
        setting.model.hold()
        first = asyncio.create_task(submit(setting.batcher, _images(*range(6))))
        await setting.until_begun(2)
        setting.model.go.set()
        assert _values(await first) == list(range(6))
        tasks = [await setting.queue(*range(start, start + 9)) for start in range(0, 90, 9)]
        answers = [_values(answer) for answer in await asyncio.gather(*tasks)]
        assert answers == [list(range(start, start + 9)) for start in range(0, 90, 9)]

    model = _run(test, slots=2, cost=_slow())
    assert sorted(model.batches[:2]) == [[0, 1, 2], [3, 4, 5]]


def test_a_slot_takes_its_next_batch_by_itself_while_the_event_loop_is_held_up() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks.append(await setting.queue(1, 2, 3, 4))
        tasks.append(await setting.queue(5))
        assert setting.batcher.queued == 5
        setting.model.go.set()
        end = time.monotonic() + 10
        while len(setting.model.batches) < 3 and time.monotonic() < end:
            time.sleep(0.001)  # not asyncio.sleep: the event loop must be blocked
        assert setting.model.batches == [[0], [1, 2, 3, 4], [5]]
        assert setting.batcher.queued == 0
        assert [_values(answer) for answer in await asyncio.gather(*tasks)] == [[0], [1, 2, 3, 4], [5]]

    _run(test)


def test_a_request_beyond_the_queue_is_refused_at_once_with_a_hint_and_no_other_is_harmed() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        waiting = await setting.queue(1, 2, 3)
        with pytest.raises(QueueFull, match="holds 3 images, 3 more would pass its limit of 5") as caught:
            await submit(setting.batcher, _images(4, 5, 6))
        assert caught.value.retry_after == pytest.approx(QUICK(3), rel=0.5)
        setting.model.go.set()
        assert _values(await first) + _values(await waiting) == [0, 1, 2, 3]
        assert _values(await submit(setting.batcher, _images(4, 5, 6))) == [4, 5, 6]

    _run(test, max_queue=5)


def test_a_full_queue_takes_a_request_of_a_client_with_less_than_its_share() -> None:
    async def test(setting: Setting) -> None:
        batcher = setting.batcher
        first = await setting.occupy()
        many = [await setting.queue(value, value, client="many") for value in (1, 2, 3)]
        assert isinstance(batcher.refusal(None, False, 0, "many"), QueueFull)
        assert batcher.refusal(None, False, 0, "few") is None
        few = [await setting.queue(value, client="few") for value in (7, 8, 9)]
        with pytest.raises(QueueFull, match="this client has more than its share") as caught:
            await many[2]
        assert caught.value.retry_after > 0
        with pytest.raises(QueueFull):
            await many[1]
        assert isinstance(batcher.refusal(None, False, 1, "few"), QueueFull), "it has half of the queue"
        with pytest.raises(QueueFull, match="the queue holds"):
            await submit(batcher, _images(10, 11), client="many")
        assert batcher.queued == 5
        setting.model.go.set()
        assert _values(await first) + _values(await many[0]) == [0, 1, 1]
        assert [_values(await one) for one in few] == [[7], [8], [9]]

    assert _run(test, max_queue=6, max_batch=2).batches == [[0], [1, 1], [7, 8], [9]]


def test_a_deadline_is_judged_by_the_turns_of_the_client_and_not_by_the_whole_queue() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        many = [await setting.queue(*range(8), client="many") for _ in range(10)]
        soon = time.monotonic() + 5
        with pytest.raises(DeadlineUnmeetable):
            await submit(setting.batcher, _images(1), soon, client="many")
        few = asyncio.create_task(submit(setting.batcher, _images(99), soon, client="few"))
        await asyncio.sleep(0.01)
        assert not few.done()
        setting.model.go.set()
        assert _values(await few) == [99]
        await asyncio.gather(first, *many)

    assert _run(test, cost=_slow()).batches[1:3] == [[0, 1, 2, 3], [99, 4, 5, 6]]


def test_a_stream_does_not_wait_behind_another_client_that_has_more_than_its_share() -> None:
    async def test(setting: Setting) -> None:
        batcher = setting.batcher
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(1, 2, 3, client="many") for _ in range(2)]
        greedy = asyncio.create_task(batcher.room_for({"images": _images(4, 4)}, "many"))
        await asyncio.sleep(0.01)
        await asyncio.wait_for(batcher.room_for({"images": _images(5)}, "few"), 10)
        assert not greedy.done()
        setting.model.go.set()
        await asyncio.gather(greedy, *tasks)

    _run(test, max_queue=8)


def test_clients_take_turns_while_their_streams_wait_for_room() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        order: list[str] = []
        answers: list[asyncio.Future[Share]] = []

        async def patient(client: str) -> None:
            arrays = {"images": _images(1, 1)}
            await setting.batcher.room_for(arrays, client)
            answers.append(asyncio.get_running_loop().create_future())
            setting.batcher.enqueue(arrays, then=settle(answers[-1]), client=client, patient=True)
            order.append(client)

        full = [await setting.queue(1, 1, 1, 1, client=client) for client in ("many", "few", "many", "few")]
        waiting = [asyncio.create_task(patient("many")) for _ in range(4)]
        await asyncio.sleep(0)
        given_up = asyncio.create_task(patient("few"))
        waiting += [asyncio.create_task(patient("few")) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not order
        given_up.cancel()
        setting.model.go.set()
        await asyncio.gather(first, *full, *waiting)
        await asyncio.gather(*answers)
        assert order == ["many", "few", "many", "few", "many", "many"]

    _run(test, max_queue=16)


def test_streams_wait_for_half_the_queue_in_the_order_they_came() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        order: list[int] = []

        async def patient(value: int) -> Share:
            answer: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
            arrays = {"images": _images(value, value, value)}
            await setting.batcher.room_for(arrays)
            setting.batcher.enqueue(arrays, then=settle(answer))
            order.append(value)
            return await answer

        tasks += [asyncio.create_task(patient(value)) for value in range(1, 6)]
        await asyncio.sleep(0.01)
        assert order == [1], "the second would fill more than half of the queue"
        tasks.append(await setting.queue(9, 9, 9))  # a request that need not wait still has room
        setting.model.go.set()
        await asyncio.gather(*tasks)
        assert order == [1, 2, 3, 4, 5]

    _run(test, max_queue=8)


def test_a_cancelled_request_is_never_computed_and_leaves_its_room_to_others() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        cancelled = await setting.queue(1, 2)
        kept = await setting.queue(3)
        cancelled.cancel()
        await asyncio.sleep(0)
        assert setting.batcher.queued == 1
        setting.model.go.set()
        assert _values(await first) + _values(await kept) == [0, 3]
        assert setting.value("capsnet_cancelled_images_total") == 2

    assert _run(test).batches == [[0], [3]]


def test_half_of_a_thousand_cancelled_requests_are_not_computed() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [asyncio.create_task(submit(setting.batcher, _images(1))) for _ in range(1000)]
        await asyncio.sleep(0.01)
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.sleep(0)
        setting.model.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert sum(_run(test, max_queue=2000).sizes) == 501


def test_a_request_that_cannot_make_its_deadline_is_refused_at_the_door() -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(DeadlineUnmeetable, match=r"deadline: (49|50) ms are left, the answer may take 442 ms"):
            await submit(setting.batcher, _images(1, 2, 3, 4), deadline=time.monotonic() + 0.05)
        assert _values(await submit(setting.batcher, _images(5), deadline=time.monotonic() + 0.15)) == [5]

    assert _run(test, cost=_slow()).batches == [[5]]


def test_waiting_requests_count_towards_a_deadline_but_not_for_an_urgent_request() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(1, 2, 3)]
        with pytest.raises(DeadlineUnmeetable):
            await submit(setting.batcher, _images(4), deadline=time.monotonic() + 0.65)
        tasks.append(asyncio.create_task(submit(setting.batcher, _images(5), time.monotonic() + 0.65, urgent=True)))
        await asyncio.sleep(0)
        setting.model.go.set()
        await asyncio.gather(*tasks)

    _run(test, cost=_slow())


def test_a_request_whose_time_ran_out_in_the_queue_is_dropped_with_an_error() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        late = asyncio.create_task(submit(setting.batcher, _images(1), deadline=time.monotonic() + 0.05))
        kept = asyncio.create_task(submit(setting.batcher, _images(2)))
        await asyncio.sleep(0.06)
        setting.model.go.set()
        await asyncio.gather(first, kept)
        with pytest.raises(DeadlineUnmeetable):
            await late
        assert setting.value("capsnet_expired_images_total") == 1
        assert setting.batcher.queued == 0

    assert _run(test).batches == [[0], [2]]


def test_urgent_requests_go_first_until_another_has_waited_long_enough() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy(), await setting.queue(9)]
        tasks.append(await setting.queue(1))
        tasks.append(await setting.queue(2, urgent=True))
        setting.model.go.set()
        await asyncio.gather(*tasks)
        tasks = [await setting.occupy(), await setting.queue(9)]
        tasks.append(await setting.queue(3))
        await asyncio.sleep(0.06)
        tasks.append(await setting.queue(4, urgent=True))
        tasks.append(await setting.queue(5, urgent=True))
        setting.model.go.set()
        await asyncio.gather(*tasks)

    assert _run(test, max_batch=1, ageing=0.05).batches == [[0], [2], [9], [1], [0], [9], [3], [4], [5]]


def test_one_poisoned_member_fails_alone() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        others = [await setting.queue(value if value != 5 else POISON) for value in range(32)]
        setting.model.go.set()
        await first
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(answers[5], InferenceFailed)
        values = [_values(answer) for answer in answers if isinstance(answer, Share)]
        assert values == [[value] for value in range(32) if value != 5]
        assert _values(await submit(setting.batcher, _images(50))) == [50]
        assert setting.value("capsnet_inference_failures_total") == 2
        assert setting.value("capsnet_inference_retries_total") == 32

    _run(test, max_batch=32)


@pytest.mark.parametrize("value", [NOT_FINITE, BOTH_INFINITE])
def test_an_answer_that_is_not_finite_fails_alone_and_nothing_is_computed_again(value: int) -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(one) for one in (1, value, 3)]
        setting.model.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[2], InferenceFailed)
        assert [_values(answer) for answer in answers if isinstance(answer, Share)] == [[0], [1], [3]]
        assert setting.value("capsnet_non_finite_images_total") == 1

    assert _run(test).batches == [[0], [1, value, 3]]


def test_an_answer_of_another_shape_fails_alone() -> None:
    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        tasks += [await setting.queue(one) for one in (1, MISSHAPEN, 3)]
        setting.model.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[2], InferenceFailed)
        assert [_values(answer) for answer in answers if isinstance(answer, Share)] == [[0], [1], [3]]

    _run(test)


def test_a_runtime_that_hangs_is_given_up_and_others_are_computed() -> None:
    async def test(setting: Setting) -> None:
        hanging = await setting.occupy()
        ahead = await setting.queue(1, 2, 3, 4)
        behind = await setting.queue(5)
        with pytest.raises(InferenceFailed):
            await hanging
        setting.model.go.set()
        assert _values(await ahead) + _values(await behind) == [1, 2, 3, 4, 5]
        assert setting.value("capsnet_inference_hangs_total") == 1
        await asyncio.sleep(0.05)  # the abandoned thread returns, and its answer does no harm
        assert _values(await submit(setting.batcher, _images(6))) == [6]

    _run(test, timeout=0.2)


def test_an_exception_in_the_code_that_answers_one_member_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def fail(ticket: Ticket) -> None:
        raise RuntimeError("a fault of one service")

    async def test(setting: Setting) -> None:
        tasks = [await setting.occupy()]
        faulty = setting.batcher.enqueue({"images": _images(1)}, then=fail)
        tasks += [await setting.queue(2), await setting.queue(3, 4)]
        setting.model.go.set()
        assert [_values(answer) for answer in await asyncio.gather(*tasks)] == [[0], [2], [3, 4]]
        assert faulty.state is State.ANSWERED
        assert setting.value("capsnet_batch_size_images_count") == 2, "and the batch is counted"

    assert _run(test).batches == [[0], [1, 2, 3, 4]]
    assert "a fault of one service" in caplog.text


def test_an_exception_in_the_callback_of_a_lost_deadline_harms_no_other_request() -> None:
    def fail(ticket: Ticket) -> None:
        raise RuntimeError("a fault of one service")

    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        setting.batcher.enqueue({"images": _images(1)}, then=fail, deadline=time.monotonic() + 0.02)
        kept = await setting.queue(2)
        await asyncio.sleep(0.03)
        setting.model.go.set()
        assert _values(await first) + _values(await kept) == [0, 2]

    _run(test)


def test_outputs_that_cannot_be_joined_fail_alone() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        split, other = await setting.queue(1, 2, 3, 4, WIDE), await setting.queue(6)
        setting.model.go.set()
        with pytest.raises(InferenceFailed):
            await split
        assert _values(await first) + _values(await other) == [0, 6]

    assert _run(test).batches == [[0], [1, 2, 3, 4], [WIDE, 6]]


def test_an_abandoned_request_is_freed_at_once_even_if_no_other_call_comes() -> None:
    async def test(setting: Setting) -> None:
        first = await setting.occupy()
        told: list[Ticket] = []
        for _ in range(10):
            images = _images(1, 2, 3)
            alive = weakref.ref(images)
            ticket = setting.batcher.enqueue({"images": images}, then=told.append)
            del images
            await asyncio.sleep(0)
            assert alive() is not None and (setting.batcher.queued, setting.batcher.pending) == (3, 1)
            setting.batcher.give_up(ticket)
            assert alive() is None
            assert (setting.batcher.queued, setting.batcher.pending) == (0, 0)
        assert len(told) == 10 and setting.value("capsnet_cancelled_images_total") == 30
        setting.model.go.set()
        await first

    assert _run(test, max_queue=4).batches == [[0]]


def test_a_request_that_has_ended_holds_its_images_no_longer() -> None:
    async def test(setting: Setting) -> None:
        images = _images(1, 2)
        alive = weakref.ref(images)
        told: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        ticket = setting.batcher.enqueue({"images": images}, then=settle(told))
        del images
        assert _values(await told) == [1, 2]
        await submit(setting.batcher, _images(3))  # the slot has released its batch
        assert ticket.state is State.ANSWERED and alive() is None

    _run(test)


def test_a_request_that_is_given_up_between_its_batches_is_not_computed_any_further() -> None:
    async def test(setting: Setting) -> None:
        setting.model.hold()
        told: list[Ticket] = []
        ticket = setting.batcher.enqueue({"images": _images(1, 2, 3, 4, 5, 6)}, then=told.append)
        await setting.until_begun(1)
        assert setting.batcher.queued == 2
        setting.batcher.give_up(ticket)
        assert setting.batcher.queued == 0 and setting.value("capsnet_cancelled_images_total") == 2
        setting.model.go.set()
        assert _values(await submit(setting.batcher, _images(7))) == [7]
        assert told == [ticket]

    assert _run(test).batches == [[1, 2, 3, 4], [7]]


@pytest.mark.parametrize("in_flight", [1, 64, 256])
@pytest.mark.parametrize("slots", [1, 3])
def test_none_of_many_requests_at_once_is_lost_mixed_up_or_answered_twice(in_flight: int, slots: int) -> None:
    total, given_up = 2000, 0

    async def test(setting: Setting) -> None:
        nonlocal given_up
        random = np.random.default_rng(in_flight)
        told: dict[int, int] = {}
        wrong: list[int] = []
        done = asyncio.Event()

        def begin(number: int) -> None:
            nonlocal given_up
            if number >= total:
                return
            values = [(number + row) % POISON_FREE for row in range(int(random.integers(1, 7)))]

            def then(ticket: Ticket) -> None:
                told[number] = told.get(number, 0) + 1
                if ticket.state is not State.GIVEN_UP and _values(ticket.result()) != values:
                    wrong.append(number)
                asyncio.get_running_loop().call_soon(begin, number + in_flight)
                if len(told) == total:
                    done.set()

            ticket = setting.batcher.enqueue(
                {"images": _images(*values)}, then=then, urgent=bool(random.integers(2)), deadline=time.monotonic() + 60
            )
            if random.integers(10) == 0:
                given_up += 1
                asyncio.get_running_loop().call_soon(setting.batcher.give_up, ticket)

        for number in range(in_flight):
            begin(number)
        await done.wait()
        assert set(told.values()) == {1} and len(told) == total and not wrong
        assert (setting.batcher.queued, setting.batcher.pending) == (0, 0)

    _run(test, max_batch=16, good_batch=4, max_queue=10_000, slots=slots)
    assert 0 < given_up < total


def test_any_named_inputs_and_outputs_go_through_and_large_ones_are_joined_too() -> None:
    def run(arrays: Arrays) -> Arrays:
        poses, classes = np.asarray(arrays["pose"], np.float32), np.asarray(arrays["class"], np.int64)
        return {"scaled": poses * classes[:, None], "class": classes}

    async def main() -> None:
        metrics = ModelMetrics(Metrics(), "m", "1", ["only"])
        batcher = Batcher(run, Hooks(lambda outputs: None), metrics, BatchPolicy(8, 8, 100, 10, 1), QUICK, slots=1)
        requests: list[dict[str, Array]] = [
            {"pose": np.full((rows, 2**17), rows, np.float32), "class": np.arange(rows, dtype=np.int64)}
            for rows in (1, 3, 2)
        ]
        answers: list[asyncio.Future[Share]] = []
        for arrays in requests:
            answers.append(asyncio.get_running_loop().create_future())
            batcher.enqueue(arrays, then=settle(answers[-1]))
        for arrays, share in zip(requests, await asyncio.gather(*answers), strict=True):
            assert len(share) == len(arrays["class"])
            np.testing.assert_array_equal(np.asarray(share["class"], np.int64), arrays["class"])
            np.testing.assert_array_equal(
                np.asarray(share["scaled"], np.float32),
                np.asarray(arrays["pose"], np.float32) * np.arange(len(share))[:, None],
            )
        await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_closing_answers_waiting_requests_and_refuses_new_ones() -> None:
    async def test(setting: Setting) -> None:
        setting.model.hold()
        tasks = [asyncio.create_task(submit(setting.batcher, _images(value))) for value in range(6)]
        assert await asyncio.to_thread(setting.model.begun.wait, 10)
        closing = asyncio.create_task(setting.batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await submit(setting.batcher, _images(9))
        setting.model.go.set()
        assert [_values(answer) for answer in await asyncio.gather(*tasks)] == [[value] for value in range(6)]
        await closing

    _run(test)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (3,), (8,)], ids=str)
def test_the_cost_of_a_batch_is_learned_from_any_sizes(sizes: tuple[int, ...]) -> None:
    cost = BatchCost((images, 0.001 * images + 0.002) for images in (1, 2, 4, 8, 16))
    assert cost.per_image == pytest.approx(0.001)
    assert cost.per_batch == pytest.approx(0.002)
    for _ in range(500):  # the machine has become twice as slow
        for images in sizes:
            cost.learn(images, 0.002 * images + 0.004)
    for images in sizes:
        assert cost(images) == pytest.approx(0.002 * images + 0.004, rel=0.02)
    assert cost(16) > 1.3 * (0.001 * 16 + 0.002), "sizes that do not come any more are known to be slower too"


def test_a_batch_gets_derived_outputs_and_shows_only_the_rows_that_clients_sent() -> None:
    go, observed = threading.Event(), list[float]()

    def run(arrays: Arrays) -> Arrays:
        assert go.wait(10)
        return {"doubled": 2 * np.asarray(arrays["numbers"], np.float32)}

    def derive(inputs: Arrays, outputs: Arrays) -> Arrays:
        return {"sum": np.asarray(inputs["numbers"], np.float32) + np.asarray(outputs["doubled"], np.float32)}

    def observe(outputs: Arrays) -> None:
        observed.extend(np.asarray(outputs["doubled"], np.float32).tolist())

    async def main() -> None:
        metrics = ModelMetrics(Metrics(), "m", "1", ["only"])
        hooks = Hooks(lambda outputs: None, derive, observe)
        batcher = Batcher(run, hooks, metrics, BatchPolicy(8, 8, 100, 10, 1), QUICK, slots=1)
        answers: list[asyncio.Future[Share]] = []
        for numbers, probe in (([1], False), ([2, 3], False), ([4, 5], True), ([6], False)):
            answers.append(asyncio.get_running_loop().create_future())
            arrays: Arrays = {"numbers": np.array(numbers, np.float32)}
            batcher.enqueue(arrays, then=settle(answers[-1]), probe=probe)
            await asyncio.sleep(0)
        go.set()
        sums = [(await answer)["sum"].tolist() for answer in answers]
        assert sums == [[3], [6, 9], [12, 15], [18]]
        await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert sorted(observed) == [2, 4, 6, 12]
