"""The threads that compute batches, and what they share with the event loop."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum, auto
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.batching.admission import Admission, BatchPolicy, Load
from serving.batching.cost import BatchCost
from serving.batching.queue import Part, TicketQueue, batch_room
from serving.batching.ticket import Ticket
from serving.errors import DeadlineUnmeetable
from serving.runtime import Array, Arrays, Run, rows

#: Looks at a batch's outputs: which rows are good, (B,), or None where all are. Raises where the batch as a whole is
#: wrong; its members are then computed again, each by itself.
Check = Callable[[Arrays], NDArray[np.bool_] | None]

_NICENESS = 5
_MIN_ROW_SECONDS = 1e-6
# Time after which the cost of a batch may be another.
_COST_STALE_SECONDS = 10.0
_MAX_JOINED_WITH_LOCK_BYTES = 2**20

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Requests that are computed together. again: it is one part of a batch that failed, by itself."""

    parts: list[Part]
    again: bool = False

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(part.stop - part.start for part in self.parts)


class Outcome(NamedTuple):
    """Result of a batch: its outputs or what went wrong; which rows are good, None for all; and the seconds it took."""

    outputs: Arrays | Exception
    good: NDArray[np.bool_] | None
    input_time: float
    infer_time: float


class Computed(NamedTuple):
    """A batch and what came of it."""

    batch: Batch
    outcome: Outcome


class Late(NamedTuple):
    """A request that can only be answered too late, how many of its rows waited, and its error."""

    ticket: Ticket
    rows: int
    error: DeadlineUnmeetable


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
    """A thread that takes one batch after the other by itself; a daemon, so that one that hangs lets the process end.

    turn: called on the thread with what it has computed, None for nothing; returns the next batch, None for nothing.
    All but the thread itself is changed under the lock of ``Slots``.
    """

    def __init__(
        self, turn: Callable[["Slot", Computed | None], Batch | None], compute: Callable[[Batch], Outcome]
    ) -> None:
        self._turn = turn
        self._compute = compute
        self._wake: SimpleQueue[None] = SimpleQueue()
        self.state = SlotState.IDLE
        self.batch: Batch | None = None
        #: When its batch began, and when it is expected to end, by the clock of ``time.monotonic``.
        self.began = 0.0
        self.free_at = 0.0
        threading.Thread(target=self._work, name="inference", daemon=True).start()

    @property
    def idle(self) -> bool:
        return self.state in (SlotState.IDLE, SlotState.WOKEN)

    @property
    def over(self) -> bool:
        """It takes no batch any more."""
        return self.state in (SlotState.ABANDONED, SlotState.CLOSED)

    def begin(self, batch: Batch, now: float, free_at: float) -> None:
        """Note the batch that the thread has just taken."""
        self.state, self.batch, self.began, self.free_at = SlotState.COMPUTING, batch, now, free_at

    def rest(self) -> None:
        """Note that the thread has no batch."""
        self.state, self.batch = SlotState.IDLE, None

    def wake(self) -> None:
        """Let an idle slot look for a batch."""
        self.state = SlotState.WOKEN
        self._wake.put(None)

    def abandon(self) -> None:
        """Leave the thread behind with the batch that it computes."""
        self.state, self.batch = SlotState.ABANDONED, None

    def close(self) -> None:
        """End the thread, once it has no batch."""
        self.state, self.batch = SlotState.CLOSED, None
        self._wake.put(None)

    def _work(self) -> None:
        # The event loop, which has little to do at a time, need not wait for a core until a batch is computed.
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        computed: Computed | None = None
        while not self.over:
            if computed is None:
                self._wake.get()
            batch = self._turn(self, computed)
            computed = Computed(batch, self._compute(batch)) if batch else None


class Slots:
    """The threads that compute, the queue that they share with the event loop, and the lock around both.

    deliver: called on a thread with what was computed, None for nothing, and with the requests that were dropped; it
    passes them to the event loop, and raises RuntimeError where that has ended.
    """

    def __init__(
        self,
        count: int,
        policy: BatchPolicy,
        cost: BatchCost,
        compute: Callable[[Batch], Outcome],
        deliver: Callable[[Computed | None, list[Late]], object],
    ) -> None:
        self._policy = policy
        self._cost = cost
        self._compute = compute
        self._deliver = deliver
        self._lock = threading.Lock()
        self._queue = TicketQueue(policy.ageing)
        self._again: deque[Part] = deque()  # of batches that failed, each to be computed by itself
        self._under_way = 0  # batches that were taken, and whose outcome the event loop has not dealt with
        self._computed_at = time.monotonic()  # when a batch last began
        self.admission = Admission(policy, cost, count)
        #: Somebody waits for room in the queue.
        self.room_wanted = False
        self._slots = [Slot(self._next_batch, compute) for _ in range(count)]

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
        return bool(self._queue.rows or self._again or self._under_way)

    def load(self, now: float) -> Load:
        """Return what there is to compute."""
        free_at = min([slot.free_at for slot in self._slots])
        stale = now - self._computed_at > _COST_STALE_SECONDS
        outdated = stale and all(slot.idle for slot in self._slots)
        return Load(self._queue.rows, self._queue.urgent_rows, max(0.0, free_at - now), outdated)

    def push(self, ticket: Ticket) -> None:
        """Queue a request. Raises QueueFull or DeadlineUnmeetable."""
        now = ticket.queued_at
        left = None if ticket.deadline is None else ticket.deadline - now
        with self._lock:
            self.admission.admit(ticket.size, left, ticket.urgent, self.load(now))
            self._queue.push(ticket)

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
                    self._slots[index] = Slot(self._next_batch, self._compute)
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

    def _next_batch(self, slot: Slot, computed: Computed | None) -> Batch | None:
        """Hand over what a slot has computed, and return what it computes next, None for nothing; on its thread."""
        late: list[Late] = []
        with self._lock:
            if slot.over:
                return None
            slot.rest()
            now = time.monotonic()
            if batch := self._take(slot, now, late):
                self._computed_at = now
                self._under_way += 1
                slot.begin(batch, now, now + self._cost(batch.rows))
        if computed or late or (batch and self.room_wanted):
            try:
                self._deliver(computed, late)
            except RuntimeError:
                slot.close()
                return None
        return batch

    def _take(self, slot: Slot, now: float, late: list[Late]) -> Batch | None:
        """Take the next batch, None for none, and drop into ``late`` the requests met on the way that can only be late.

        Under the lock.
        """
        while self._again:
            part = self._again.popleft()
            if not part.ticket.ended:
                return Batch([part], again=True)
        if not self._queue.rows:
            return None
        load = self.load(now)
        ahead = [self._rows_ahead(other, now) for other in self._slots if other is not slot]
        room = batch_room(load.rows, ahead, self._policy.good_batch, self._policy.max_batch)

        def drops(ticket: Ticket) -> bool:
            if ticket.deadline is not None and (
                error := self.admission.expiry(ticket.left, ticket.deadline - now, room, load)
            ):
                late.append(Late(ticket, self._queue.remove(ticket), error))
                return True
            if not ticket.taken:
                ticket.waited = now - ticket.queued_at
            return False

        parts = self._queue.take(room, drops)
        return Batch(parts) if parts else None

    def _rows_ahead(self, slot: Slot, now: float) -> float:
        """Rows that a slot has yet to compute, estimated from the time that it still needs; one at least if any."""
        return 0.0 if slot.idle else max(1.0, (slot.free_at - now) / max(self._cost(1), _MIN_ROW_SECONDS))


def compute(batch: Batch, run: Run, check: Check) -> Outcome:
    """Compute a batch by one call of the runtime. An exception is a result here: it must not end the thread."""
    start = stacked = time.perf_counter()
    try:
        arrays = _stacked(batch.parts)
        stacked = time.perf_counter()
        outputs = run(arrays)
        done = time.perf_counter()
        size = rows(arrays)
        if any(not array.ndim or len(array) != size for array in outputs.values()):
            shapes = {name: array.shape for name, array in outputs.items()}
            raise ValueError(f"{size} rows were answered with arrays of the shapes {shapes}")
        good = check(outputs)
    except Exception as error:
        _logger.exception("a batch of %d rows failed", batch.rows)
        return Outcome(error, None, stacked - start, time.perf_counter() - stacked)
    return Outcome(outputs, good, stacked - start, done - stacked)


def _stacked(parts: list[Part]) -> Arrays:
    """Return the inputs of a batch."""
    if len(parts) == 1:
        _, arrays, start, stop = parts[0]
        return {name: array[start:stop] for name, array in arrays.items()}
    return {name: _joined([arrays[name][start:stop] for _, arrays, start, stop in parts]) for name in parts[0].arrays}


def _joined(parts: list[Array]) -> Array:
    """Join arrays, each contiguous and all of one type, along their first axis.

    Small ones, unlike by ``np.concatenate``, with Python's lock kept: the event loop would take it, and a batch's
    computation wait for it, as often as there are parts. While large ones are copied, the event loop is to go on.
    """
    if sum(part.nbytes for part in parts) > _MAX_JOINED_WITH_LOCK_BYTES:
        return np.concatenate(parts)
    data = b"".join([part.data for part in parts])
    return np.frombuffer(data, parts[0].dtype).reshape(-1, *parts[0].shape[1:])
