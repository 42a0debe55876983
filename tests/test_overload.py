"""Tests with more requests than the model can compute: refusals, their errors, and no waste of capacity.

The model is slowed to a known rate, far below the machine's, so that the figures do not depend on the machine.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.batching.admission import BatchPolicy
from serving.batching.batch import Hooks
from serving.batching.batcher import Batcher
from serving.batching.cost import BatchCost
from serving.metrics.registry import Metrics, ModelMetrics
from serving.repository.classifier import finite_rows
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from tests.conftest import Running
from tests.predictions import Prediction, as_run
from tests.test_batcher import submit
from tests.test_pipeline import Gate, detail, image, later, refusal, trailers, under_way, until, value, with_predict

BATCH = 8
BATCH_SECONDS = 0.1
CAPACITY = BATCH / BATCH_SECONDS
SECONDS = 2.0


def slow(model: ServedModel) -> None:
    """Make each batch take the same time, whatever its size."""
    run = model.classify.batcher._run

    def slowly(arrays: Arrays) -> Arrays:
        begin = time.perf_counter()
        answer = run(arrays)
        time.sleep(max(0.0, BATCH_SECONDS - (time.perf_counter() - begin)))
        return answer

    model.classify.batcher._run = slowly


@dataclass
class Load:
    """The results of requests sent at a steady rate. longest: the longest queue, in images."""

    outcomes: Counter[grpc.StatusCode] = field(default_factory=Counter)
    refused_by_the_server: int = 0
    slowest_refusal: float = 0.0
    longest: int = 0
    answered_in_time: int = 0


def send(running: Running, rate: float, timeout: float | None) -> Load:
    """Send single images for ``SECONDS``, each with this deadline."""
    load, lock, under = Load(), threading.Lock(), threading.Semaphore(0)
    request = pb.ClassifyRequest(images=[image()])
    begin = time.monotonic()
    count = round(rate * SECONDS)

    def ended(call: Any, sent: float) -> None:
        seconds, code = time.monotonic() - sent, call.code()
        with lock:
            load.outcomes[code] += 1
            if code is grpc.StatusCode.OK:
                load.answered_in_time += sent + seconds <= begin + SECONDS + (timeout or 1)
            elif str(call.details()).startswith(("deadline: ", "the queue holds ")):
                load.refused_by_the_server += 1
                load.slowest_refusal = max(load.slowest_refusal, seconds)
        under.release()

    calls = []  # grpc cancels a call without references
    for index in range(count):
        time.sleep(max(0.0, begin + index / rate - time.monotonic()))
        calls.append(running.stub.Classify.future(request, timeout=timeout))
        calls[-1].add_done_callback(partial(ended, sent=time.monotonic()))
        load.longest = max(load.longest, running.model.classify.batcher.queued)
    for _ in range(count):
        assert under.acquire(timeout=20)
    return load


def _has_come(running: Running, images: int) -> bool:
    return under_way(running) == images


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


@pytest.fixture
def slowed(start: Callable[..., Running]) -> Callable[..., Running]:
    """Return a function that starts a server of ``CAPACITY``, which has measured the time of its batches."""

    def begin(**chosen: object) -> Running:
        running = start(slow, max_batch=BATCH, runtimes=1, **chosen)
        for _ in range(200):
            for size in (1, BATCH):
                running.model.classify.cost.learn(size, BATCH_SECONDS)
        return running

    return begin


def test_at_three_times_the_capacity_with_deadlines_nearly_all_of_it_is_answered_in_time(
    slowed: Callable[..., Running],
) -> None:
    running = slowed()
    before = value(running, "capsnet_batch_size_images_sum")
    load = send(running, 3 * CAPACITY, timeout=1.0)
    answered = load.outcomes[grpc.StatusCode.OK]
    assert set(load.outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert answered >= 0.85 * CAPACITY * SECONDS
    computed = value(running, "capsnet_batch_size_images_sum") - before
    assert computed - answered <= 0.01 * computed, "computed for nobody, since the deadline had passed"
    assert load.longest <= CAPACITY + 2 * BATCH, "no more waits than can be answered in time"
    # The server ended the others, not their own timers.
    assert load.refused_by_the_server >= 0.99 * load.outcomes[grpc.StatusCode.DEADLINE_EXCEEDED]


def test_at_three_times_the_capacity_without_deadlines_the_queue_is_bounded_and_the_rest_refused_at_once(
    slowed: Callable[..., Running],
) -> None:
    running = slowed(max_queue=32, max_images_per_request=32)
    load = send(running, 3 * CAPACITY, timeout=None)
    assert set(load.outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert load.outcomes[grpc.StatusCode.OK] >= 0.85 * CAPACITY * SECONDS
    assert load.longest <= 32
    assert load.refused_by_the_server == load.outcomes[grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert load.slowest_refusal < 1
    assert len(running.classify(image()).results) == 1, "it is well afterwards"


def test_below_the_capacity_nothing_is_refused(slowed: Callable[..., Running]) -> None:
    load = send(slowed(), 0.7 * CAPACITY, timeout=1.0)
    assert load.outcomes[grpc.StatusCode.OK] >= 0.99 * load.outcomes.total()


def test_a_full_queue_tells_when_to_try_again_for_clients_of_every_kind(
    start: Callable[..., Running],
) -> None:
    gate = Gate()
    limits = {"max_batch": 4, "runtimes": 1, "max_queue": 6, "max_images_per_request": 6}
    running = start(with_predict(gate), **limits)
    calls = [later(running)]
    gate.wait()
    calls.append(later(running, *[image()] * 4))
    until(partial(_has_come, running, 5), "the request that waits")
    error = refusal(lambda: running.classify(*[image()] * 3))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "the queue holds 4 images, 3 more would pass its limit of 6; try again later"
    milliseconds = int(trailers(error)["grpc-retry-pushback-ms"])
    detail(error, info := RetryInfo())
    assert info.retry_delay.ToMilliseconds() == milliseconds
    assert 1 <= milliseconds < 5000
    assert value(running, "capsnet_refused_total", reason="queue_full") == 1
    gate.go.set()
    assert [len(call.result().results) for call in calls] == [1, 4]


def test_a_client_that_retries_after_the_given_time_is_answered(slowed: Callable[..., Running]) -> None:
    running = slowed(max_queue=BATCH, max_images_per_request=BATCH)
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "20s",'
        ' "maxBackoff": "20s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}'
    )
    with grpc.insecure_channel(running.address, options=[("grpc.service_config", policy)]) as channel:
        retrying = type(running.stub)(channel)
        retrying.GetModel(pb.GetModelRequest(), timeout=20)
        with_predict(gate := Gate())(running.model)
        calls = [later(running, *[image()] * BATCH)]
        gate.wait()
        calls.append(later(running, *[image()] * BATCH))
        until(partial(_has_come, running, 2 * BATCH), "the request that waits")
        retried = retrying.Classify.future(pb.ClassifyRequest(images=[image()] * BATCH), timeout=10)
        until(lambda: value(running, "capsnet_refused_total", reason="queue_full") >= 1, "the refusal")
        gate.go.set()
        assert len(retried.result().results) == BATCH, "long before the 20 s of its own"
        assert [len(call.result().results) for call in calls] == [BATCH] * 2
    assert value(running, "capsnet_refused_total", reason="queue_full") >= 1


def test_of_a_thousand_clients_half_of_whom_leave_only_the_others_images_are_computed(
    start: Callable[..., Running],
) -> None:
    gate = Gate()
    running = start(with_predict(gate), max_batch=8, runtimes=1)
    first = later(running)
    gate.wait()
    calls = []
    for number in range(20):  # with fewer calls a connection than gRPC's own server takes
        channel = grpc.insecure_channel(running.address, [("grpc.use_local_subchannel_pool", 1), ("number", number)])
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        calls += [stub.Classify.future(pb.ClassifyRequest(images=[image()]), timeout=60) for _ in range(50)]
        until(partial(_has_come, running, 1 + len(calls)), "all")
    for call in calls[::2]:
        assert call.cancel()
    until(lambda: running.model.classify.batcher.queued <= 500, "the end of those that left")
    until(lambda: value(running, "capsnet_cancelled_images_total") >= 500, "the end of those that left")
    gate.go.set()
    assert len(first.result().results) == 1
    assert all(len(call.result().results) == 1 for call in calls[1::2])
    computed, cancelled = (
        value(running, "capsnet_batch_size_images_sum"),
        value(running, "capsnet_cancelled_images_total"),
    )
    assert computed == 501
    assert computed + cancelled == 1001
    assert sum(gate.sizes) == computed
    assert value(running, "nv_inference_request_failure", reason="CANCELED") == 500
    assert value(running, "grpc_server_handled_total", grpc_method="Classify", grpc_code="CANCELLED") == 500


def test_a_request_that_is_given_up_just_when_its_time_runs_out_harms_no_other() -> None:
    go, begun = threading.Event(), threading.Event()

    def predict(images: NDArray[np.uint8]) -> Prediction:
        begun.set()
        assert go.wait(10)
        return Prediction(np.ones((len(images), 1), np.float32), np.ones((len(images), 1, 1), np.float32))

    async def main() -> None:
        metrics = ModelMetrics(Metrics(), "m", "1", ["only"])
        cost = BatchCost([(1, 0.0001), (4, 0.0004)])
        batcher = Batcher(
            as_run(predict), Hooks(finite_rows), metrics, BatchPolicy(4, 4, 100, timeout=10, ageing=1), cost, slots=1
        )
        images = np.zeros((1, 1, 1, 1), np.uint8)
        first = asyncio.create_task(submit(batcher, images))
        assert await asyncio.to_thread(begun.wait, 10)
        late = asyncio.create_task(submit(batcher, images, deadline=time.monotonic() + 0.05))
        kept = asyncio.create_task(submit(batcher, images))
        await asyncio.sleep(0.06)
        go.set()
        time.sleep(0.1)  # the event loop is blocked: the batch ends meanwhile, and its end is the loop's next event
        late.cancel()
        await asyncio.wait_for(asyncio.gather(first, kept), 5)
        assert batcher.queued == 0
        await batcher.close()

    asyncio.run(main())
