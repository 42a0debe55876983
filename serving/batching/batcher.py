"""Dynamic batching: requests that wait together are computed together, and an idle runtime never waits."""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching.cost import BatchCost
from serving.batching.ticket import Share, Ticket
from serving.errors import DeadlineUnmeetable, Draining, InferenceFailed, QueueFull
from serving.metrics.registry import ModelMetrics
from serving.runtime import Array, Arrays, Run, rows

#: Looks at a batch's outputs: for each row whether its answer is good, None where all are. Raises where the batch as a
#: whole is wrong; its members are then computed again, each by itself.
Check = Callable[[Arrays], NDArray[np.bool_] | None]

_NICE = 5
_AHEAD = 2  # batches that a slot may have, with the one that it computes
_STALE = 10.0  # seconds after which the cost of a batch may be another
# What is expected to be only just in time is too late: the answer has yet to go through the event loop.
_MARGIN = 1.1
# And more of what waits before a request, since what comes later delays it too: to refuse a request at once costs far
# less than to find later on that it was taken in vain.
_QUEUE_MARGIN = 1.25
_LAG_SECONDS = 0.002
_JOINED_AT_ONCE = 2**20  # bytes
_ERRORS = 1024  # that are kept to be used again

_logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Rows of a request that are in one batch."""

    ticket: Ticket
    start: int
    stop: int


class _Outcome(NamedTuple):
    """The outputs of a batch, or what went wrong; which rows are good, None for all; and the seconds that it took."""

    outputs: Arrays | Exception
    good: NDArray[np.bool_] | None
    input_time: float
    infer_time: float


@dataclass(frozen=True)
class Limits:
    """max_batch: images in a batch. good_batch: images from which on a larger batch takes hardly less time an image.

    max_queue: images that wait. timeout: seconds after which a batch is given up. ageing: seconds by which an urgent
    request overtakes others; one that has waited longer is not overtaken.
    """

    max_batch: int
    good_batch: int
    max_queue: int
    timeout: float
    ageing: float


class Batcher:
    """One queue, and as many threads that compute as ``slots``.

    When a slot is free it takes of what waits, at once and up to ``max_batch`` images; there is no timer. While all
    compute, requests gather for the next batch; once there are ``good_batch``, it is handed to a slot ahead, so that it
    does not idle while answers go out and the next requests come in.
    Lives on one event loop; only ``run`` is called from the threads.
    """

    def __init__(
        self, run: Run, check: Check, metrics: ModelMetrics, limits: Limits, cost: BatchCost, slots: int
    ) -> None:
        self._run = run
        self._check = check
        self._metrics = metrics
        self._limits = limits
        self._cost = cost
        self._waiting: tuple[deque[Ticket], deque[Ticket]] = (deque(), deque())  # others, urgent
        self._again: deque[_Part] = deque()  # of batches that failed, each to be computed by itself
        #: Images that wait.
        self.queued = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._closing = False
        self._computed_at = time.monotonic()  # when a batch was last handed to a slot
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._slots = [_Slot(self._compute, self._loop, self._finish) for _ in range(slots)]
        self._empty = asyncio.Event()

    def enqueue(
        self,
        arrays: Arrays,
        *,
        then: Callable[[Ticket], None],
        deadline: float | None = None,
        urgent: bool = False,
    ) -> Ticket:
        """Queue the inputs of a request, contiguous and of one row at least, for one or several batches.

        deadline: by the clock of ``time.monotonic``; a request that would be answered later is refused, or dropped
        once that shows. then: called with the ticket once, at its end, on the event loop; must not raise. Raises
        QueueFull, DeadlineUnmeetable or Draining; the ticket may end with DeadlineUnmeetable or InferenceFailed.
        """
        if self._closing:
            raise Draining
        now, count = time.monotonic(), rows(arrays)
        if self.queued + count > self._limits.max_queue:
            raise QueueFull(
                f"the queue holds {self.queued} images, {count} more would pass its limit of {self._limits.max_queue}; "
                "try again later",
                self._time_for(self.queued),
            )
        if deadline is not None:
            needed = self._needed(count, urgent, now)
            if now + needed > deadline and not self._is_probe(now):
                raise _unmeetable(needed, deadline - now)
        ticket = Ticket(arrays, then, deadline, urgent, now)
        self._waiting[urgent].append(ticket)
        self._count(count)
        # Not at once: what else has arrived in this turn of the event loop belongs in the same batch.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)
        return ticket

    def refusal(self, timeout: float | None, urgent: bool, expected: int) -> QueueFull | DeadlineUnmeetable | None:
        """What a request of one image would be refused with now; timeout: the seconds that it has.

        expected: requests that are about to be queued before it, taken to be not urgent. The numbers of the refusal
        are rounded, so that under overload the same error serves many requests.
        """
        now = time.monotonic()
        if self.queued + expected >= self._limits.max_queue:
            return _full(self._limits.max_queue, _rounded(self._time_for(self.queued + expected)))
        if timeout is None or now - self._computed_at > _STALE:
            return None
        needed = self._needed(1, urgent, now, 0 if urgent else expected)
        return _hopeless(_rounded(needed)) if needed > timeout else None

    def give_up(self, ticket: Ticket) -> None:
        """Forget a request whose client has gone: what of it is not in a batch yet is never computed."""
        if ticket.ended:
            return
        ticket.give_up()
        if left := ticket.left:
            ticket.taken = ticket.size
            self._metrics.cancelled.inc(left)
            self._count(-left)

    async def enqueue_patiently(
        self, arrays: Arrays, *, then: Callable[[Ticket], None], deadline: float | None = None, urgent: bool = False
    ) -> Ticket:
        """As ``enqueue``, but wait, first come first served, until half of the queue stays free, or it is empty.

        For streams, which can simply be read more slowly, and leave the other half to those that cannot.
        """
        async with self._turn:
            while self.queued and self.queued + rows(arrays) > self._limits.max_queue // 2:
                self._room.clear()
                await self._room.wait()
            return self.enqueue(arrays, then=then, deadline=deadline, urgent=urgent)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        # A copy, since the metrics page asks from its own thread; those at the head may be all in batches already.
        return sum(ticket.left > 0 for queue in self._waiting for ticket in tuple(queue))

    async def close(self) -> None:
        """Refuse new requests from now on, and return once those in the queue are answered."""
        self._closing = True
        while self.queued or self._again or any(slot.batches for slot in self._slots):
            self._empty.clear()
            await self._empty.wait()
        for slot in self._slots:
            slot.end()

    def _count(self, images: int) -> None:
        self.queued += images
        if images < 0:
            self._room.set()
            self._empty.set()

    def _is_probe(self, now: float) -> bool:
        """Whether a request is computed, however late it is expected: what is expected may itself be out of date."""
        return now - self._computed_at > _STALE and not any(slot.batches for slot in self._slots)

    def _urgent_ahead(self) -> int:
        """Images that are computed before an urgent request that comes now."""
        return sum(ticket.left for ticket in self._waiting[True])

    def _needed(self, images: int, urgent: bool, now: float, expected: int = 0) -> float:
        """Seconds that a request which comes now, of so many images, may take until it is answered.

        expected: images that will be queued before it, and computed before it.
        """
        queued = self.queued + expected
        batch = max(images, min(queued + images, self._limits.max_batch))  # with others, or several by itself
        ahead = (self._urgent_ahead() if urgent else self.queued) + expected
        free_at = max(now, min([slot.free_at for slot in self._slots]))
        return _at_most(free_at - now + _QUEUE_MARGIN * self._time_for(ahead) + self._time_for(batch))

    def _time_for(self, images: int) -> float:
        """Seconds that so many images take, all slots computing."""
        batches = -(-images // self._limits.max_batch)
        seconds = self._cost(images, batches)
        return seconds / min(batches, len(self._slots)) if batches > 1 else seconds

    def _dispatch(self) -> None:
        """Hand batches to slots: whatever waits to those that are idle, and good ones ahead to the others."""
        self._scheduled = False
        good = self._limits.good_batch
        idle = [slot for slot in self._slots if not slot.batches]
        takers = sum(len(slot.batches) < _AHEAD for slot in self._slots)
        while idle and (self._again or self.queued):
            self._start(idle[-1], max(self._share(takers), min(good, self._share(len(idle)))))
            idle.pop()
            takers -= 1
        for slot in self._slots:
            if len(slot.batches) == 1 and (self._again or self.queued >= good):
                self._start(slot, max(good, self._share(takers)))
                takers -= 1

    def _share(self, slots: int) -> int:
        """Of what waits, for each of so many slots."""
        return min(self._limits.max_batch, -(-self.queued // max(1, slots)))

    def _start(self, slot: "_Slot", size: int) -> None:
        now = time.monotonic()
        begin = max(now, slot.free_at) if slot.batches else now
        if batch := [self._again.popleft()] if self._again else self._collect(size, now, begin):
            self._computed_at = now
            slot.start(batch, begin + self._cost(_size(batch)))
            if len(slot.batches) == 1:
                self._watch(slot)

    def _collect(self, size: int, now: float, begin: float) -> list[_Part]:
        """The next batch: up to ``size`` images in order, without those of requests given up or too late.

        begin: when it will be computed.
        """
        batch: list[_Part] = []
        room = size
        while room and (ticket := self._next()):
            left = ticket.left
            if ticket.deadline is not None:
                needed = self._cost(min(size, self.queued))
                if left > size:
                    needed = max(needed, self._time_for(left))
                needed = _at_most(begin - now + needed)
                if now + needed > ticket.deadline and not self._is_probe(now):
                    ticket.taken = ticket.size
                    ticket.fail(_unmeetable(needed, ticket.deadline - now))
                    self._metrics.expired.inc(left)
                    self._count(-left)
                    continue
            if not ticket.taken:
                ticket.waited = now - ticket.queued_at
                self._metrics.queue_time.observe(ticket.waited)
            count = min(room, left)
            batch.append(_Part(ticket, ticket.taken, ticket.taken + count))
            ticket.taken += count
            room -= count
        if room < size:
            self._count(room - size)
        return batch

    def _next(self) -> Ticket | None:
        """The first request with images to take: an urgent one, unless another has waited longer by ``ageing``."""
        for queue in self._waiting:
            while queue and not queue[0].left:
                queue.popleft()
        others, urgent = self._waiting
        if urgent and not (others and others[0].queued_at + self._limits.ageing < urgent[0].queued_at):
            return urgent[0]
        return others[0] if others else None

    def _compute(self, batch: list[_Part]) -> _Outcome:
        """On a slot's thread: one call of the runtime. An exception is a result here: it must not end the thread."""
        start = stacked = time.perf_counter()
        try:
            arrays = _stacked(batch)
            stacked = time.perf_counter()
            outputs = self._run(arrays)
            done = time.perf_counter()
            size = rows(arrays)
            if any(not array.ndim or len(array) != size for array in outputs.values()):
                shapes = {name: array.shape for name, array in outputs.items()}
                raise ValueError(f"{size} rows were answered with {shapes}")
            good = self._check(outputs)
        except Exception as error:
            _logger.exception("a batch of %d rows failed", _size(batch))
            return _Outcome(error, None, stacked - start, time.perf_counter() - stacked)
        return _Outcome(outputs, good, stacked - start, done - stacked)

    def _finish(self, slot: "_Slot", batch: list[_Part], outcome: _Outcome) -> None:
        """Answer each member of a batch, once its slot has the next."""
        if slot not in self._slots:  # given up before
            return
        slot.batches.popleft()
        slot.timer.cancel()
        if slot.batches:
            self._watch(slot)
        self._dispatch()
        outputs, size = outcome.outputs, _size(batch)
        if isinstance(outputs, Exception):
            self._fail(batch)
        else:
            self._cost.learn(size, outcome.input_time + outcome.infer_time)
            self._answer(batch, outcome, outputs)
            self._metrics.batch(size, outcome.input_time, outcome.infer_time)
        self._empty.set()

    def _answer(self, batch: list[_Part], outcome: _Outcome, outputs: Arrays) -> None:
        end = 0
        for ticket, start, stop in batch:
            begin, end = end, end + stop - start
            if ticket.ended:
                continue
            if outcome.good is not None and not outcome.good[begin:end].all():
                _logger.error("an answer held values that are not finite")
                self._metrics.non_finite.inc(end - begin - int(outcome.good[begin:end].sum()))
                self._refuse(ticket)
                continue
            ticket.input_time += outcome.input_time
            ticket.infer_time += outcome.infer_time
            ticket.answer(start, Share(outputs, begin, end))

    def _fail(self, batch: list[_Part]) -> None:
        """Members of a batch that failed are computed again one by one, so that one bad member fails alone."""
        self._metrics.failures.inc()
        if len(batch) == 1:
            self._refuse(batch[0].ticket)
            return
        self._metrics.retries.inc(len(batch))
        self._again.extend(part for part in batch if not part.ticket.ended)
        self._dispatch()

    def _refuse(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        ticket.fail(InferenceFailed())
        if left := ticket.left:
            ticket.taken = ticket.size
            self._count(-left)

    def _watch(self, slot: "_Slot") -> None:
        """Give the batch that a slot begins up, and its thread with it, when it is not computed in time."""
        slot.timer = self._loop.call_later(self._limits.timeout, self._give_up_slot, slot)

    def _give_up_slot(self, slot: "_Slot") -> None:
        _logger.error("a batch was not computed within %g s; its thread is left behind", self._limits.timeout)
        self._metrics.hangs.inc()
        self._slots[self._slots.index(slot)] = _Slot(self._compute, self._loop, self._finish)
        slot.end(at_once=True)
        hanging, *ahead = slot.batches
        for batch in ahead:
            self._again.extend(batch)
        for part in hanging:
            self._refuse(part.ticket)
        self._dispatch()
        self._empty.set()


class _Slot:
    """A thread that computes one batch after the other; a daemon, so that one that hangs does not keep the process."""

    def __init__(
        self,
        compute: Callable[[list[_Part]], _Outcome],
        loop: asyncio.AbstractEventLoop,
        finish: Callable[["_Slot", list[_Part], _Outcome], None],
    ) -> None:
        self._compute = compute
        self._loop = loop
        self._finish = finish
        #: Those handed to it and not finished; the first is computed.
        self.batches: deque[list[_Part]] = deque()
        #: When it will have computed all, by the clock of ``time.monotonic``.
        self.free_at = 0.0
        #: Runs out when the first has taken too long.
        self.timer: asyncio.TimerHandle
        self._inbox: SimpleQueue[list[_Part] | None] = SimpleQueue()
        self._ended = False
        threading.Thread(target=self._work, name="inference", daemon=True).start()

    def start(self, batch: list[_Part], free_at: float) -> None:
        self.batches.append(batch)
        self.free_at = free_at
        self._inbox.put(batch)

    def end(self, at_once: bool = False) -> None:
        """End the thread after what was handed to it, or after what it computes."""
        self._ended = at_once
        self._inbox.put(None)

    def _work(self) -> None:
        # The event loop, which has little to do at a time, need not wait for a core until a batch is computed.
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (batch := self._inbox.get()) is not None and not self._ended:
            outcome = self._compute(batch)
            try:
                self._loop.call_soon_threadsafe(self._finish, self, batch, outcome)
            except RuntimeError:  # the loop was closed while this hung
                return


def _size(batch: list[_Part]) -> int:
    """Images in a batch."""
    return sum(part.stop - part.start for part in batch)


def _rounded(seconds: float) -> int:
    """In steps of 10 ms."""
    return int(100 * seconds) + 1


@lru_cache(_ERRORS)
def _full(most: int, hundredths: int) -> QueueFull:
    return QueueFull(f"the queue holds {most} images, its limit; try again later", hundredths / 100)


@lru_cache(_ERRORS)
def _hopeless(hundredths: int) -> DeadlineUnmeetable:
    return DeadlineUnmeetable(f"deadline: the answer may take {10 * hundredths} ms")


def _stacked(batch: list[_Part]) -> Arrays:
    """Return the inputs of a batch."""
    if len(batch) == 1:
        ticket, start, stop = batch[0]
        return {name: array[start:stop] for name, array in ticket.arrays.items()}
    return {
        name: _joined([part.ticket.arrays[name][part.start : part.stop] for part in batch])
        for name in batch[0].ticket.arrays
    }


def _joined(parts: list[Array]) -> Array:
    """Join arrays, each contiguous and all of one type, along their first axis.

    Small ones, unlike by ``np.concatenate``, with Python's lock kept: the event loop would take it, and a batch's
    computation wait for it, as often as there are parts. While large ones are copied, the event loop is to go on.
    """
    if sum(part.nbytes for part in parts) > _JOINED_AT_ONCE:
        return np.concatenate(parts)
    data = b"".join([part.data for part in parts])
    return np.frombuffer(data, parts[0].dtype).reshape(-1, *parts[0].shape[1:])


def _at_most(expected: float) -> float:
    """Seconds that may be needed for what is expected to take so many."""
    return _MARGIN * expected + _LAG_SECONDS


def _unmeetable(needed: float, left: float) -> DeadlineUnmeetable:
    return DeadlineUnmeetable(
        f"deadline: {max(left, 0) * 1000:.0f} ms are left, the answer may take {needed * 1000:.0f} ms"
    )
