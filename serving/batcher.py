"""Dynamic batching: requests that wait together are computed together, and an idle runtime never waits."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import Draining, InferenceFailed, QueueFull
from serving.metrics import Metrics
from serving.runtime import Prediction

Images = NDArray[np.uint8]
Predict = Callable[[Images], Prediction]

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Item:
    """A request, or a part of one, of at most a batch; its future travels with it."""

    images: Images  # (n, C, H, W)
    future: "asyncio.Future[Prediction]"
    queued_at: float


class Batcher:
    """One queue, one worker thread.

    When the runtime is free it takes what waits, at once and up to ``max_batch`` images; there is no timer. While it
    computes, requests gather for the next batch. The queue holds up to ``max_queue`` images; what does not fit is
    refused at the door. A request whose client has gone is dropped before it is computed.
    """

    def __init__(self, predict: Predict, metrics: Metrics, max_batch: int, max_queue: int) -> None:
        self._predict = predict
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue: deque[_Item] = deque()
        self._queued_images = 0
        self._arrival = asyncio.Event()
        self._room = asyncio.Event()
        self._closing = False
        self._worker = ThreadPoolExecutor(1, "inference")

    async def submit(self, images: Images, patient: bool = False) -> Prediction:
        """Compute images (n, C, H, W), n at least 1, in one or several batches.

        patient: wait until the queue is at most half full, where others are refused once it is full; for streams,
        which can simply be read more slowly, and leave the other half to those that cannot.

        Raises QueueFull, Draining, or InferenceFailed.
        """
        while patient and self._queued_images and self._queued_images + len(images) > self._max_queue // 2:
            self._room.clear()
            await self._room.wait()
        if self._closing:
            raise Draining
        if self._queued_images + len(images) > self._max_queue:
            raise QueueFull(
                f"the queue holds {self._queued_images} images, {len(images)} more would pass its limit of "
                f"{self._max_queue}; try again later"
            )
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        parts = [
            _Item(images[start : start + self._max_batch], loop.create_future(), now)
            for start in range(0, len(images), self._max_batch)
        ]
        self._queue.extend(parts)
        self._queued_images += len(images)
        self._metrics.queued.set(self._queued_images)
        self._arrival.set()
        if len(parts) == 1:
            return await parts[0].future
        predictions = await asyncio.gather(*(part.future for part in parts))
        return Prediction(*(np.concatenate(arrays) for arrays in zip(*predictions, strict=True)))

    async def run(self) -> None:
        """Compute batches until ``close`` was called and the queue is empty."""
        loop = asyncio.get_running_loop()
        finished: tuple[list[_Item], Prediction | Exception] | None = None
        while True:
            batch = self._collect()
            if not batch:
                if finished:
                    await self._deliver(*finished)
                    finished = None
                elif self._closing:
                    self._worker.shutdown()
                    return
                else:
                    self._arrival.clear()
                    await self._arrival.wait()
                continue
            computation = loop.run_in_executor(self._worker, self._compute, batch)
            if finished:  # handed out only now, while the next batch computes
                await self._deliver(*finished)
            finished = (batch, await computation)

    def close(self) -> None:
        """Refuse new requests from now on; ``run`` returns once those in the queue are answered."""
        self._closing = True
        self._arrival.set()

    def _collect(self) -> list[_Item]:
        """Take the next batch off the queue: whole items, in order, as many as fit, without those given up."""
        batch: list[_Item] = []
        room = self._max_batch
        now = time.perf_counter()
        while self._queue and len(self._queue[0].images) <= room:
            item = self._queue.popleft()
            self._queued_images -= len(item.images)
            if not item.future.done():
                room -= len(item.images)
                self._metrics.queue_time.observe(now - item.queued_at)
                batch.append(item)
        self._metrics.queued.set(self._queued_images)
        self._room.set()
        return batch

    def _compute(self, batch: list[_Item]) -> Prediction | Exception:
        """On the worker thread: one call of the runtime. An exception is a result here: it must not end ``run``."""
        images = batch[0].images if len(batch) == 1 else np.concatenate([item.images for item in batch])
        start = time.perf_counter()
        try:
            prediction = self._predict(images)
        except Exception as error:
            _logger.exception("a batch of %d images failed", len(images))
            self._metrics.failures.inc()
            return error
        self._metrics.inference_time.observe(time.perf_counter() - start)
        self._metrics.batch_size.observe(len(images))
        if not (np.isfinite(prediction.probabilities).all() and np.isfinite(prediction.poses).all()):
            _logger.error("a batch of %d images gave values that are not finite", len(images))
            self._metrics.failures.inc()
            return FloatingPointError("values that are not finite")
        return prediction

    async def _deliver(self, batch: list[_Item], outcome: Prediction | Exception) -> None:
        """Answer each member. Members of a batch that failed are computed again one by one, so that one bad member
        fails alone."""
        if isinstance(outcome, Exception):
            for item in batch:
                if len(batch) > 1 and not item.future.done():
                    loop = asyncio.get_running_loop()
                    alone = await loop.run_in_executor(self._worker, self._compute, [item])
                else:
                    alone = outcome
                if item.future.done():
                    continue
                if isinstance(alone, Exception):
                    item.future.set_exception(InferenceFailed("the model could not compute this request"))
                else:
                    item.future.set_result(alone)
            return
        start = 0
        for item in batch:
            end = start + len(item.images)
            if not item.future.done():
                item.future.set_result(Prediction(outcome.probabilities[start:end], outcome.poses[start:end]))
            start = end
