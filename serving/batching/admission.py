"""Admission: which requests are refused, since the queue is full or since their answer would come too late."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from serving.batching.cost import BatchCost
from serving.errors import DeadlineUnmeetable, QueueFull

# What is expected to be only just in time is too late: the answer has yet to go through the event loop.
_MARGIN = 1.1
_LAG_SECONDS = 0.002
# And more for what waits before a request, since what comes later delays it too: to refuse a request at once costs far
# less than to find later on that it was taken in vain.
_QUEUE_MARGIN = 1.25
_MAX_KEPT_ERRORS = 1024


@dataclass(frozen=True)
class BatchPolicy:
    """How requests are batched.

    max_batch: rows in a batch. good_batch: rows from which on a larger batch takes hardly less time a row. max_queue:
    rows that wait. timeout: seconds after which a batch is given up. ageing: seconds by which an urgent request
    overtakes others; one that came earlier by more is not overtaken.
    """

    max_batch: int
    good_batch: int
    max_queue: int
    timeout: float
    ageing: float


class Load(NamedTuple):
    """What there is to compute at one moment.

    rows: those that wait. urgent_rows: those of urgent requests among them. free_in: seconds until a slot is expected
    to be free. outdated: nothing was computed lately, so that what a batch costs may have changed.
    """

    rows: int
    urgent_rows: int
    free_in: float
    outdated: bool


class Admission:
    """Tells how long requests will take, and refuses those that cannot be answered in time."""

    def __init__(self, policy: BatchPolicy, cost: BatchCost, slots: int) -> None:
        self._policy = policy
        self._cost = cost
        self._slots = slots
        # Errors to be used again.
        self._full = lru_cache(_MAX_KEPT_ERRORS)(_full)
        self._hopeless = lru_cache(_MAX_KEPT_ERRORS)(_hopeless)

    def check_room(self, rows: int, waiting: int) -> None:
        """Raise QueueFull where a request of so many rows does not fit into a queue in which ``waiting`` rows wait."""
        if waiting + rows > self._policy.max_queue:
            raise QueueFull(
                f"the queue holds {waiting} images, {rows} more would pass its limit of {self._policy.max_queue}; "
                "try again later",
                self._seconds(waiting),
            )

    def check_deadline(self, rows: int, left: float, urgent: bool, load: Load) -> None:
        """Raise DeadlineUnmeetable where a request of so many rows may take longer than the seconds that are left.

        Where the load is outdated it does not: computing is the only way to learn what a batch takes now.
        """
        if not load.outdated:
            needed = self._needed(rows, urgent, load)
            if needed > left:
                raise _unmeetable(needed, left)

    def full(self, waiting: int) -> QueueFull | None:
        """Return the error that a request of one row gets behind ``waiting`` rows, None where it fits.

        The numbers in it are rounded, so that under overload the same error serves many requests.
        """
        if waiting < self._policy.max_queue:
            return None
        return self._full(self._policy.max_queue, _hundredths(self._seconds(waiting)))

    def hopeless(self, left: float, urgent: bool, expected: int, load: Load) -> DeadlineUnmeetable | None:
        """Return the error that a request of one row gets for its deadline, rounded as above, or None.

        expected: requests that are about to be queued before it, taken to be not urgent.
        """
        if load.outdated:
            return None
        needed = self._needed(1, urgent, load, 0 if urgent else expected)
        return self._hopeless(_hundredths(needed)) if needed > left else None

    def expiry(self, rows: int, left: float, batch: int) -> DeadlineUnmeetable | None:
        """Return the error for a request that would be answered too late if it were computed from now on, or None.

        rows: those of it that wait. left: seconds until its deadline. batch: rows of the batch that begins now.
        """
        needed = self._cost(batch)
        if rows > batch:
            needed = max(needed, self._seconds(rows))
        needed = _upper_estimate(needed)
        return _unmeetable(needed, left) if needed > left else None

    def _needed(self, rows: int, urgent: bool, load: Load, expected: int = 0) -> float:
        """Upper estimate of the seconds until a request of so many rows that comes now is answered.

        expected: rows that will be queued before it, and computed before it.
        """
        waiting = load.rows + expected
        batch = max(rows, min(waiting + rows, self._policy.max_batch))  # with others, or several by itself
        ahead = (load.urgent_rows if urgent else load.rows) + expected
        return _upper_estimate(load.free_in + _QUEUE_MARGIN * self._seconds(ahead) + self._seconds(batch))

    def _seconds(self, rows: int) -> float:
        """Seconds that so many rows take, with all slots computing."""
        batches = -(-rows // self._policy.max_batch)
        seconds = self._cost(rows, batches)
        return seconds / min(batches, self._slots) if batches > 1 else seconds


def _upper_estimate(seconds: float) -> float:
    """Upper estimate of a duration that is expected to take so many seconds."""
    return _MARGIN * seconds + _LAG_SECONDS


def _hundredths(seconds: float) -> int:
    """Round a duration up to steps of 10 ms."""
    return int(100 * seconds) + 1


def _unmeetable(needed: float, left: float) -> DeadlineUnmeetable:
    return DeadlineUnmeetable(
        f"deadline: {max(left, 0) * 1000:.0f} ms are left, the answer may take {needed * 1000:.0f} ms"
    )


def _full(limit: int, hundredths: int) -> QueueFull:
    return QueueFull(f"the queue holds {limit} images, its limit; try again later", hundredths / 100)


def _hopeless(hundredths: int) -> DeadlineUnmeetable:
    return DeadlineUnmeetable(f"deadline: the answer may take {10 * hundredths} ms")
