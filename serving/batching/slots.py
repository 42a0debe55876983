"""The threads that compute batches, and what they share with the event loop."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum, auto
from math import ceil
from queue import SimpleQueue
from typing import NamedTuple

from serving.batching.admission import Admission, BatchPolicy, Load
from serving.batching.batch import Batch, Inputs, Outcome, stack
from serving.batching.cost import BatchCost
from serving.batching.queue import Part, TicketQueue, batch_room
from serving.batching.ticket import Ticket
from serving.errors import DeadlineUnmeetable, QueueFull

_ADDED_NICENESS = 5
# What remains of the memory of a crowd with each batch: it is forgotten after about 50.
_CROWD_KEPT = 0.98
# Time after which the cost of a batch may be another.
_COST_STALE_SECONDS = 10.0


class Computed(NamedTuple):
    """A batch and what came of it."""

    batch: Batch
    outcome: Outcome


class Late(NamedTuple):
    """A request that can only be answered too late, how many of its rows waited, and its error."""

    ticket: Ticket
    rows: int
    error: DeadlineUnmeetable


class Taken(NamedTuple):
    """The next batch of a slot, None for none, and the requests that were dropped on the way to it."""

    batch: Batch | None
    late: list[Late]


class SlotState(Enum):
    """Stages of a slot."""

    IDLE = auto()
    #: It was idle, and is about to look for a batch.
    WOKEN = auto()
    COMPUTING = auto()
    #: Its batch took too long: whatever comes of it is thrown away.
    ABANDONED = auto()
    CLOSED = auto()


class Slot:
    """The state of a thread that takes one batch after the other; under the lock of ``Slots``."""

    def __init__(self) -> None:
        self.state = SlotState.IDLE
        self.batch: Batch | None = None
        #: When its batch began, and when it is expected to end, by the clock of ``time.monotonic``.
        self.began = 0.0
        self.free_at = 0.0
        #: What its thread waits for while it is idle.
        self.signal: SimpleQueue[None] = SimpleQueue()

    @property
    def idle(self) -> bool:
        return self.state in (SlotState.IDLE, SlotState.WOKEN)

    @property
    def over(self) -> bool:
        """It takes no batch any more."""
        return self.state in (SlotState.ABANDONED, SlotState.CLOSED)

    def wake(self) -> None:
        """Let an idle slot look for a batch."""
        self.state = SlotState.WOKEN
        self.signal.put(None)

    def begin(self, batch: Batch, now: float, free_at: float) -> None:
        """Note the batch that it has taken."""
        self.state, self.batch, self.began, self.free_at = SlotState.COMPUTING, batch, now, free_at

    def rest(self) -> None:
        """Note that it has no batch."""
        self.state, self.batch = SlotState.IDLE, None

    def abandon(self) -> None:
        """Leave its thread behind with the batch that it computes."""
        self.state, self.batch = SlotState.ABANDONED, None

    def close(self) -> None:
        """End its thread, once that has no batch."""
        self.state, self.batch = SlotState.CLOSED, None
        self.signal.put(None)


class Slots:
    """The threads that compute, the queue that they share with the event loop, and the lock around both.

    compute: called on the threads. deliver: called on a thread with what was computed, None for nothing, and with the
    requests that were dropped; it passes them to the event loop, and raises RuntimeError where that has ended.
    """

    def __init__(
        self,
        count: int,
        policy: BatchPolicy,
        cost: BatchCost,
        compute: Callable[[Inputs], Outcome],
        deliver: Callable[[Computed | None, list[Late]], object],
    ) -> None:
        self._policy = policy
        self._cost = cost
        self._compute = compute
        self._deliver = deliver
        self._admission = Admission(policy, cost, count)
        #: Somebody waits for room in the queue.
        self.room_wanted = False
        self._lock = threading.Lock()
        self._queue = TicketQueue(policy.ageing)
        self._again: deque[Part] = deque()  # of batches that failed, each to be computed by itself
        self._crowd = 0.0  # the most rows that waited or were computed at one time, fading
        self._under_way = 0  # batches that were taken, and whose outcome the event loop has not dealt with
        self._computed_at = time.monotonic()  # when a batch last began
        self._slots = [self._start() for _ in range(count)]

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._queue.rows

    @property
    def requests(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Something waits, is computed, or was computed and not dealt with."""
        with self._lock:
            again = any(not part.ticket.ended for part in self._again)
            return bool(self._queue.rows or again or self._under_way)

    def push(self, ticket: Ticket) -> None:
        """Queue a request. Raises QueueFull or DeadlineUnmeetable."""
        now = ticket.queued_at
        with self._lock:
            self._admission.check_room(ticket.size, self._queue.rows)
            if ticket.deadline is not None:
                self._admission.check_deadline(ticket.size, ticket.deadline - now, ticket.urgent, self._load(now))
            self._queue.push(ticket)

    def refusal(self, left: float | None, urgent: bool, expected: int) -> QueueFull | DeadlineUnmeetable | None:
        """Return the error that a request of one row would get now, or None if it would be let in.

        left: seconds until its deadline, None for none. expected: requests that are about to be queued before it.
        """
        if full := self._admission.full(self._queue.rows + expected):
            return full
        return None if left is None else self._admission.hopeless(left, urgent, expected, self._load(time.monotonic()))

    def remove(self, ticket: Ticket) -> int:
        """Take a request out of the queue, and return how many of its rows waited."""
        with self._lock:
            return self._queue.remove(ticket)

    def retry(self, parts: Iterable[Part]) -> None:
        """Compute parts of a batch that failed again, each by itself."""
        with self._lock:
            self._again.extend(parts)
        self.wake()

    def wake(self) -> None:
        """Wake as many idle slots as there is work for."""
        with self._lock:
            waiting = len(self._again) + self._queue.rows
            for slot in self._slots:
                if waiting and slot.state is SlotState.IDLE:
                    slot.wake()
                    waiting -= 1

    def dealt_with(self) -> None:
        """Note that the event loop has ended the requests of a batch that was computed."""
        with self._lock:
            self._under_way -= 1

    def abandon(self, now: float) -> list[Batch]:
        """Leave slots behind whose batches have taken too long, put new ones in their place, and return the batches."""
        hung = []
        with self._lock:
            for index, slot in enumerate(self._slots):
                if slot.batch and now >= slot.began + self._policy.timeout:
                    hung.append(slot.batch)
                    slot.abandon()
                    self._under_way -= 1
                    self._slots[index] = self._start()
                    self._slots[index].wake()
        return hung

    def look_again_in(self, now: float) -> float | None:
        """Return the seconds until a batch may have taken too long, or None while all slots are idle."""
        with self._lock:
            if all(slot.state is SlotState.IDLE for slot in self._slots):
                return None
            begun = [slot.began for slot in self._slots if slot.batch]
            return max(0.0, min(begun, default=now) + self._policy.timeout - now)

    def close(self) -> None:
        """End all threads, once nothing is computed."""
        with self._lock:
            for slot in self._slots:
                slot.close()

    def _load(self, now: float) -> Load:
        """Return what there is to compute."""
        free_at = min([slot.free_at for slot in self._slots])
        return Load(self._queue.rows, self._queue.urgent_rows, max(0.0, free_at - now), self._outdated(now))

    def _outdated(self, now: float) -> bool:
        """Return True if nothing was computed lately, so that what a batch costs may have changed."""
        return now - self._computed_at > _COST_STALE_SECONDS and all(slot.idle for slot in self._slots)

    def _start(self) -> Slot:
        """Start a thread; a daemon, so that one that hangs lets the process end."""
        slot = Slot()
        threading.Thread(target=self._work, args=(slot,), name="inference", daemon=True).start()
        return slot

    def _work(self, slot: Slot) -> None:
        """Take and compute one batch after the other; on the slot's thread."""
        # The event loop, which has little to do at a time, need not wait for a core until a batch is computed.
        with suppress(AttributeError, OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _ADDED_NICENESS)
        computed: Computed | None = None
        while True:
            if computed is None:
                slot.signal.get()
            taken = self._next_batch(slot)
            if taken is None:
                return
            batch, late = taken
            if computed or late or (batch and self.room_wanted):
                try:
                    self._deliver(computed, late)
                except RuntimeError:
                    return
            computed = Computed(batch, self._compute(stack(batch))) if batch else None

    def _next_batch(self, slot: Slot) -> Taken | None:
        """Let a slot take its next batch; None once it is over."""
        late: list[Late] = []
        with self._lock:
            if slot.over:
                return None
            slot.rest()
            now = time.monotonic()
            batch = self._retried() or self._from_queue(now, late)
            if batch:
                self._computed_at = now
                self._under_way += 1
                slot.begin(batch, now, now + self._cost(batch.rows))
        return Taken(batch, late)

    def _retried(self) -> Batch | None:
        """Take the next part of a batch that failed; with the lock held."""
        while self._again:
            part = self._again.popleft()
            if not part.ticket.ended:
                return Batch([part], again=True)
        return None

    def _from_queue(self, now: float, late: list[Late]) -> Batch | None:
        """Take the next batch of those that wait, and drop into ``late`` what can only be late; with the lock held."""
        if not self._queue.rows:
            return None
        room, limit = self._room()
        outdated = self._outdated(now)

        def drops(ticket: Ticket) -> bool:
            error = None
            if ticket.deadline is not None and not outdated:
                error = self._admission.expiry(ticket.left, ticket.deadline - now, room)
            if error:
                late.append(Late(ticket, self._queue.remove(ticket), error))
                return True
            if not ticket.taken:
                ticket.waited = now - ticket.queued_at
            return False

        parts = self._queue.take(room, limit, drops)
        return Batch(parts) if parts else None

    def _room(self) -> tuple[int, int]:
        """Return how many rows a free slot takes now, and how many at most, so that other free ones have as many."""
        policy, slots, waiting = self._policy, self._slots, self._queue.rows
        computed, free = 0, 0
        for slot in slots:
            if slot.batch:
                computed += slot.batch.rows
            else:
                free += 1
        self._crowd = max(waiting + computed, self._crowd * _CROWD_KEPT)
        limit = min(policy.max_batch, ceil(waiting / free))
        return batch_room(waiting, self._crowd, len(slots), policy.good_batch, limit), limit
