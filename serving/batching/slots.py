"""The threads that compute batches, and the state that they share with the event loop."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
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
# Factor of the remembered crowd at each batch: it is forgotten after about 50 batches.
_CROWD_KEPT = 0.98
# Time without a batch after which the known cost of a batch may be wrong.
_COST_STALE_SECONDS = 10.0


class Computed(NamedTuple):
    """A batch and its outcome."""

    batch: Batch
    outcome: Outcome


class Late(NamedTuple):
    """A request that would be answered too late, the number of its waiting rows, and its error."""

    ticket: Ticket
    rows: int
    error: DeadlineUnmeetable


class Taken(NamedTuple):
    """The next batch of a slot, or None, and the requests that were dropped while it was chosen."""

    batch: Batch | None
    late: list[Late]


class SlotState(Enum):
    """The states of a slot."""

    IDLE = auto()
    #: The slot was idle and will look for a batch now.
    WOKEN = auto()
    COMPUTING = auto()
    #: The batch took too long. Its result will be thrown away.
    ABANDONED = auto()
    CLOSED = auto()


class Slot:
    """The state of a thread that computes one batch after the other. The lock of ``Slots`` guards it."""

    def __init__(self) -> None:
        self.state = SlotState.IDLE
        self.batch: Batch | None = None
        #: The start and the expected end of its batch, as times of ``time.monotonic``.
        self.began = 0.0
        self.free_at = 0.0
        #: The signal for which its thread waits while it is idle.
        self.signal: SimpleQueue[None] = SimpleQueue()

    @property
    def idle(self) -> bool:
        return self.state in (SlotState.IDLE, SlotState.WOKEN)

    @property
    def over(self) -> bool:
        """Return True if it will take no further batch."""
        return self.state in (SlotState.ABANDONED, SlotState.CLOSED)

    def wake(self) -> None:
        """Make an idle slot look for a batch."""
        self.state = SlotState.WOKEN
        self.signal.put(None)

    def begin(self, batch: Batch, now: float, free_at: float) -> None:
        """Note its new batch."""
        self.state, self.batch, self.began, self.free_at = SlotState.COMPUTING, batch, now, free_at

    def rest(self) -> None:
        """Note that it has no batch."""
        self.state, self.batch = SlotState.IDLE, None

    def abandon(self) -> None:
        """Leave its thread behind with the batch in computation."""
        self.state, self.batch = SlotState.ABANDONED, None

    def close(self) -> None:
        """End its thread when the thread has no batch."""
        self.state, self.batch = SlotState.CLOSED, None
        self.signal.put(None)


class Slots:
    """The threads that compute, the queue that they share with the event loop, and the lock around both.

    compute: called on the threads.
    deliver: called on a thread with the computed batch, or None, and with the dropped requests. It passes them to the
        event loop and raises RuntimeError if the event loop has ended.
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
        #: True while a caller waits for room in the queue.
        self.room_wanted = False
        self._lock = threading.Lock()
        self._queue = TicketQueue(policy.ageing)
        self._again: deque[Part] = deque()  # parts of failed batches, to be computed one by one
        self._crowd = 0.0  # the most rows that waited or were computed at the same time; older values fade
        self._under_way = 0  # batches whose outcome the event loop has not handled yet
        self._computed_at = time.monotonic()  # the start of the latest batch
        self._slots = [self._start() for _ in range(count)]

    @property
    def rows(self) -> int:
        """Return the number of rows that wait."""
        return self._queue.rows

    @property
    def requests(self) -> int:
        """Return the number of requests that wait."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Return True while a request waits or is computed, or an outcome is not handled yet."""
        with self._lock:
            again = any(not part.ticket.ended for part in self._again)
            return bool(self._queue.rows or again or self._under_way)

    def push(self, ticket: Ticket) -> None:
        """Queue a request. Raises QueueFull or DeadlineUnmeetable.

        In a full queue, a client that has less than its share takes the places of others, whose requests fail. Call it
        on the event loop.
        """
        now, size, displaced = ticket.queued_at, ticket.size, list[Ticket]()
        with self._lock:
            excess = self._queue.rows + size - self._policy.max_queue
            if excess > 0 and not self.within_share(ticket.client, size, self._policy.max_queue):
                self._queue.refused(ticket.client)
                self._admission.check_room(size, self._queue.rows)
            if ticket.deadline is not None:
                load = self._load(now, ticket.client, size, ticket.urgent)
                self._admission.check_deadline(size, ticket.deadline - now, load)
            if excess > 0:
                displaced = self._queue.displace(excess)
                self._admission.check_room(size, self._queue.rows)
            self._queue.push(ticket)
        for other in displaced:
            other.fail(self._admission.displaced(self._queue.rows))

    def within_share(self, client: Hashable, rows: int, room: int) -> bool:
        """Return True if a client with ``rows`` more rows has at most its share of ``room`` rows.

        The clients that wait have equal shares.
        """
        return self._queue.shares.allow(client, rows, room)

    def refusal(
        self, left: float | None, urgent: bool, expected: int, client: Hashable
    ) -> QueueFull | DeadlineUnmeetable | None:
        """Return the error that a request of one row would get now, or None if it would be accepted.

        left: seconds until its deadline, or None without one. expected: requests that will be queued before it.
        """
        full = self._admission.full(self._queue.rows + expected)
        if full and not self.within_share(client, expected + 1, self._policy.max_queue):
            self._queue.refused(client)
            return full
        if left is None:
            return None
        load = self._load(time.monotonic(), client, 1, urgent)
        return self._admission.hopeless(left, 0 if urgent else expected, load)

    def hold_back(self, client: Hashable, rows: float) -> None:
        """Let a client that is known wait for so many rows of each other one; a negative number takes them back."""
        if self._queue.knows(client):
            with self._lock:
                self._queue.hold_back(client, rows)

    def remove(self, ticket: Ticket) -> int:
        """Remove a request from the queue and return the number of its waiting rows."""
        with self._lock:
            return self._queue.remove(ticket)

    def retry(self, parts: Iterable[Part]) -> None:
        """Compute the parts of a failed batch again, one by one."""
        with self._lock:
            self._again.extend(parts)
        self.wake()

    def wake(self) -> None:
        """Wake as many idle slots as have work."""
        with self._lock:
            waiting = len(self._again) + self._queue.rows
            for slot in self._slots:
                if waiting and slot.state is SlotState.IDLE:
                    slot.wake()
                    waiting -= 1

    def dealt_with(self) -> None:
        """Note that the event loop has ended the requests of a computed batch."""
        with self._lock:
            self._under_way -= 1

    def abandon(self, now: float) -> list[Batch]:
        """Replace the slots whose batches have taken too long, and return these batches.

        The new slots are idle: the requests of these batches may have further rows, which are not worth computing.
        """
        hung = []
        with self._lock:
            for index, slot in enumerate(self._slots):
                if slot.batch and now >= slot.began + self._policy.timeout:
                    hung.append(slot.batch)
                    slot.abandon()
                    self._under_way -= 1
                    self._slots[index] = self._start()
        return hung

    def look_again_in(self, now: float) -> float | None:
        """Return the seconds until a batch may have taken too long, or None while all slots are idle."""
        with self._lock:
            if all(slot.state is SlotState.IDLE for slot in self._slots):
                return None
            begun = [slot.began for slot in self._slots if slot.batch]
            return max(0.0, min(begun, default=now) + self._policy.timeout - now)

    def close(self) -> None:
        """End all threads. No batch may be in computation."""
        with self._lock:
            for slot in self._slots:
                slot.close()

    def _load(self, now: float, client: Hashable, size: int, urgent: bool) -> Load:
        """Return the present load for a request of ``size`` rows."""
        queue, free_at = self._queue, min([slot.free_at for slot in self._slots])
        ahead = queue.ahead(client, size, urgent, self._policy.max_batch)
        return Load(queue.rows, ahead, max(0.0, free_at - now), self._outdated(now))

    def _outdated(self, now: float) -> bool:
        """Return True if nothing was computed lately, so that the cost of a batch may have changed."""
        return now - self._computed_at > _COST_STALE_SECONDS and all(slot.idle for slot in self._slots)

    def _start(self) -> Slot:
        """Start a thread. It is a daemon, so that a hanging thread does not keep the process alive."""
        slot = Slot()
        threading.Thread(target=self._work, args=(slot,), name="inference", daemon=True).start()
        return slot

    def _work(self, slot: Slot) -> None:
        """Compute one batch after the other. Runs on the slot's thread."""
        # A lower priority: the event loop has short tasks and must not wait for a core until a batch ends.
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
        """Take the next batch for a slot. Return None if the slot must end."""
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
        """Return the next part of a failed batch as a batch, or None. The lock must be held."""
        while self._again:
            part = self._again.popleft()
            if not part.ticket.ended:
                return Batch([part], again=True)
        return None

    def _from_queue(self, now: float, late: list[Late]) -> Batch | None:
        """Take the next batch from the queue, and put requests that would be late into ``late``. Needs the lock."""
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
        """Return the rows that a free slot takes now, and the most rows, so that other free slots get as many."""
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
