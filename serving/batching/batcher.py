"""The batcher: requests come from the event loop, threads compute them in batches, and they end on the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable

from serving.batching.admission import BatchPolicy
from serving.batching.batch import Batch, Hooks, Inputs, Outcome, compute
from serving.batching.cost import BatchCost
from serving.batching.queue import Part
from serving.batching.slots import Computed, Late, Slots
from serving.batching.ticket import Share, Ticket
from serving.batching.turns import Turns
from serving.errors import DeadlineUnmeetable, Draining, InferenceFailed, QueueFull
from serving.metrics.registry import ModelMetrics
from serving.runtime import Arrays, Run, rows

_logger = logging.getLogger(__name__)


class Batcher:
    """One queue, and ``slots`` threads that compute.

    A free slot takes its next batch at once from the waiting requests, up to ``max_batch`` rows, without the event
    loop. There is no timer. While all slots compute, requests gather for the next batches. All methods must be called
    on one event loop; tickets end and metrics are written there. The threads only call ``run`` and the hooks.
    """

    def __init__(
        self, run: Run, hooks: Hooks, metrics: ModelMetrics, policy: BatchPolicy, cost: BatchCost, slots: int
    ) -> None:
        self._run = run
        self._hooks = hooks
        self._metrics = metrics
        self._policy = policy
        self._cost = cost
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._dispatching = False
        self._line: Turns[asyncio.Event] = Turns()  # the callers that wait for room in the queue
        self._progress = asyncio.Event()  # set when a request has left the queue or ended
        self._watchdog: asyncio.TimerHandle | None = None
        self._slots = Slots(slots, policy, cost, self._compute, self._deliver)

    @property
    def queued(self) -> int:
        """Return the number of rows that wait."""
        return self._slots.rows

    @property
    def pending(self) -> int:
        """Return the number of requests that wait."""
        return self._slots.requests

    def enqueue(
        self,
        arrays: Arrays,
        *,
        then: Callable[[Ticket], None],
        deadline: float | None = None,
        urgent: bool = False,
        client: Hashable = "",
        patient: bool = False,
        probe: bool = False,
    ) -> Ticket:
        """Queue the inputs of a request for one or several batches.

        arrays: contiguous, with at least one row.
        then: called once with the ticket, at its end, on the event loop.
        deadline: a time of ``time.monotonic``. A request that would be answered later is refused, or dropped as soon as
            that is clear.
        client: clients take turns by rows. If the queue is full, a client that has less than its share of it takes the
            places of the newest requests of the client that has most.
        patient: True after ``room_for``. Such a request keeps its place.
        probe: True if the server made the rows, such as disturbed images. They are not observed as answers.

        Raises QueueFull, DeadlineUnmeetable or Draining. The ticket may end with QueueFull, DeadlineUnmeetable or
        InferenceFailed.
        """
        if self._closing:
            raise Draining
        ticket = Ticket(arrays, then, deadline, urgent, time.monotonic(), client, patient, probe)
        self._slots.push(ticket)
        # Not at once: other requests of this turn of the event loop belong in the same batch.
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)
        return ticket

    async def room_for(self, arrays: Arrays, client: Hashable = "") -> None:
        """Wait until half of the queue stays free with these inputs, or the queue is empty. Clients take turns by rows.

        A client that has less than its share of this half does not wait. Streams call it, and ``enqueue`` at once after
        it. They can be read more slowly, so they leave half of the queue to calls that cannot wait.
        """
        size = rows(arrays)
        if self._slots.within_share(client, size, self._policy.max_queue // 2):
            return
        woken = asyncio.Event()
        self._line.push(client, woken)
        self._slots.room_wanted = True
        try:
            while self._line.first() is not woken or not self._has_room(client, size):
                woken.clear()
                await woken.wait()
            self._line.give(size, done=True)
        finally:
            self._line.remove(client, woken)
            self._slots.room_wanted = bool(self._line)
            self._wake_line()  # its task goes on after this one has called ``enqueue``

    def _has_room(self, client: Hashable, size: int) -> bool:
        room = self._policy.max_queue // 2
        return not self.queued or self.queued + size <= room or self._slots.within_share(client, size, room)

    def _wake_line(self) -> None:
        if woken := self._line.first():
            woken.set()

    def refusal(
        self, left: float | None, urgent: bool, expected: int, client: Hashable = ""
    ) -> QueueFull | DeadlineUnmeetable | None:
        """Return the error that a request of one row would get now, or None if it would be accepted.

        left: seconds until its deadline, or None without one. expected: requests that will be queued before it.
        """
        return self._slots.refusal(left, urgent, expected, client)

    def hold_back(self, client: Hashable, rows: float) -> None:
        """Let a client that is known wait for so many rows of each other one; a negative number takes them back."""
        self._slots.hold_back(client, rows)

    def give_up(self, ticket: Ticket) -> None:
        """End a request whose client has gone. Its rows that are in no batch yet are freed and never computed."""
        if not ticket.ended:
            self._metrics.cancelled.inc(self._slots.remove(ticket))
            ticket.give_up()
            self._note_progress()

    async def close(self) -> None:
        """Refuse new requests from now on, and return once the queued requests are answered."""
        self._closing = True
        while self._slots.busy:
            self._progress.clear()
            await self._progress.wait()
        if self._watchdog:
            self._watchdog.cancel()
        self._slots.close()
        # The batcher and its slots refer to each other, and a garbage collection may be hours away. So the model's
        # memory is not left to it.
        self._run = _run_closed

    def _compute(self, inputs: Inputs) -> Outcome:
        return compute(inputs, self._run, self._hooks)

    def _deliver(self, computed: Computed | None, late: list[Late]) -> None:
        """Pass results from a slot's thread to the event loop. Raises RuntimeError if the event loop was closed."""
        self._loop.call_soon_threadsafe(self._advance, computed, late)

    def _dispatch(self) -> None:
        self._dispatching = False
        self._slots.wake()
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._policy.timeout, self._watch)

    def _watch(self) -> None:
        """Give up the batches that have taken too long, and schedule the next check."""
        hung = self._slots.abandon(time.monotonic())
        for batch in hung:
            _logger.error("a batch was not computed within %g s; its thread is left behind", self._policy.timeout)
            self._metrics.hangs.inc()
            self._note_waiting(batch)
            for part in batch.parts:
                self._refuse(part.ticket)
            self._note_progress()
        if hung:
            self._slots.wake()
        seconds = self._slots.look_again_in(time.monotonic())
        self._watchdog = None if seconds is None else self._loop.call_later(seconds, self._watch)

    def _advance(self, computed: Computed | None, late: list[Late]) -> None:
        """End the requests of a computed batch, and the requests that would be late."""
        try:
            for ticket, left, error in late:
                self._metrics.expired.inc(left)
                if not ticket.ended:
                    ticket.fail(error)
            if computed:
                self._conclude(*computed)
        finally:
            if computed:
                self._slots.dealt_with()
            self._note_progress()

    def _conclude(self, batch: Batch, outcome: Outcome) -> None:
        outputs, size = outcome.outputs, batch.rows
        self._note_waiting(batch)
        if isinstance(outputs, Exception):
            self._fail(batch)
            return
        self._cost.learn(size, outcome.input_time + outcome.infer_time)
        end = 0
        for part in batch.parts:
            begin, end = end, end + part.stop - part.start
            if not part.ticket.ended:
                self._answer(part, Share(outputs, begin, end), outcome)
        self._metrics.batch(size, outcome.input_time, outcome.infer_time)

    def _answer(self, part: Part, share: Share, outcome: Outcome) -> None:
        """Give a request its part of a batch's outputs."""
        ticket = part.ticket
        good = outcome.good if outcome.good is None else outcome.good[share.start : share.stop]
        if good is not None and not good.all():
            _logger.error("an answer held values that are not finite")
            self._metrics.non_finite.inc(len(share) - int(good.sum()))
            self._refuse(ticket)
            return
        ticket.input_time += outcome.input_time
        ticket.infer_time += outcome.infer_time
        try:
            ticket.answer(part.start, share)
        except Exception:  # such as MemoryError
            _logger.exception("the outputs of a request could not be joined")
            self._refuse(ticket)

    def _note_progress(self) -> None:
        """Wake those who wait for room, or for the end, after a request has left the queue or ended."""
        self._progress.set()
        self._wake_line()

    def _note_waiting(self, batch: Batch) -> None:
        """Record the waiting time of each request whose first row is in this batch."""
        if not batch.again:
            for part in batch.parts:
                if not part.start:
                    self._metrics.queue_time.observe(part.ticket.waited)

    def _fail(self, batch: Batch) -> None:
        """Compute the members of a failed batch again one by one, so that a bad member fails alone."""
        self._metrics.failures.inc()
        if len(batch.parts) == 1:
            self._refuse(batch.parts[0].ticket)
            return
        self._metrics.retries.inc(len(batch.parts))
        self._slots.retry(part for part in batch.parts if not part.ticket.ended)

    def _refuse(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self._slots.remove(ticket)
            ticket.fail(InferenceFailed())


def _run_closed(arrays: Arrays) -> Arrays:
    raise RuntimeError("the batcher is closed")
