"""Admission: the decision which requests to refuse because the queue is full or their answer would be late."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from serving.batching.cost import BatchCost
from serving.errors import DeadlineUnmeetable, QueueFull

# An answer that is expected just in time will be late: it must still pass through the event loop.
_ESTIMATE_MARGIN = 1.1
_LAG_SECONDS = 0.002
# The queue before a request gets a further margin, since later requests delay it too. A refusal at once costs far less
# than a request that is accepted and dropped later.
_QUEUE_MARGIN = 1.25
_MAX_KEPT_ERRORS = 1024


@dataclass(frozen=True)
class BatchPolicy:
    """The limits of batches and of the queue.

    max_batch: the most rows in a batch.
    good_batch: the rows above which a larger batch hardly takes less time for each row.
    max_queue: the most rows that wait.
    timeout: seconds after which a batch is given up.
    ageing: an urgent request overtakes requests that came at most this many seconds before it.
    """

    max_batch: int
    good_batch: int
    max_queue: int
    timeout: float
    ageing: float


class Load(NamedTuple):
    """The work before a new request at one moment.

    rows: the waiting rows. ahead: those that are computed before it.
    free_in: the expected seconds until a slot is free.
    outdated: True if nothing was computed lately, so that the cost of a batch may have changed.
    """

    rows: int
    ahead: int
    free_in: float
    outdated: bool


class Admission:
    """The estimate of the time that requests will take, and the refusal of those that would be late."""

    def __init__(self, policy: BatchPolicy, cost: BatchCost, slots: int) -> None:
        self._policy = policy
        self._cost = cost
        self._slots = slots
        # The same errors serve many requests.
        self._full = lru_cache(_MAX_KEPT_ERRORS)(_full)
        self._hopeless = lru_cache(_MAX_KEPT_ERRORS)(_hopeless)

    def check_room(self, rows: int, waiting: int) -> None:
        """Raise QueueFull if a request of ``rows`` rows does not fit into a queue with ``waiting`` rows."""
        if waiting + rows > self._policy.max_queue:
            raise QueueFull(
                f"the queue holds {waiting} images, {rows} more would pass its limit of {self._policy.max_queue}; "
                "try again later",
                self._seconds(waiting),
            )

    def check_deadline(self, rows: int, left: float, load: Load) -> None:
        """Raise DeadlineUnmeetable if a request of ``rows`` rows may take longer than ``left`` seconds.

        With an outdated load no request is refused: only a new batch shows the present cost.
        """
        if not load.outdated:
            needed = self._needed(rows, load)
            if needed > left:
                raise _unmeetable(needed, left)

    def full(self, waiting: int) -> QueueFull | None:
        """Return the error that a request of one row gets behind ``waiting`` rows, or None if it fits.

        The error's numbers are rounded, so that under overload the same error serves many requests.
        """
        if waiting < self._policy.max_queue:
            return None
        return self._full(self._policy.max_queue, _hundredths(self._seconds(waiting)))

    def displaced(self, waiting: int) -> QueueFull:
        """Return the error of a request that lost its place in a queue of ``waiting`` rows."""
        return QueueFull(
            "the queue is full, and this client has more than its share of it; try again later", self._seconds(waiting)
        )

    def hopeless(self, left: float, expected: int, load: Load) -> DeadlineUnmeetable | None:
        """Return the error that a request of one row gets for its deadline, or None. Its numbers are rounded too.

        expected: requests that will be queued and computed before it.
        """
        if load.outdated:
            return None
        needed = self._needed(1, load, expected)
        return self._hopeless(_hundredths(needed)) if needed > left else None

    def expiry(self, rows: int, left: float, batch: int) -> DeadlineUnmeetable | None:
        """Return the error for a request that would be late even if its computation began now, or None.

        rows: its waiting rows. left: seconds until its deadline. batch: rows of the batch that begins now.
        """
        needed = self._cost(batch)
        if rows > batch:
            needed = max(needed, self._seconds(rows))
        needed = _upper_estimate(needed)
        return _unmeetable(needed, left) if needed > left else None

    def _needed(self, rows: int, load: Load, expected: int = 0) -> float:
        """Return an upper estimate of the seconds until the answer of a request that arrives now.

        rows: its rows. expected: rows that will be queued and computed before it.
        """
        waiting = load.rows + expected
        batch = max(rows, min(waiting + rows, self._policy.max_batch))  # a shared batch, or several batches of its own
        before = self._seconds(load.ahead + expected)
        return _upper_estimate(load.free_in + _QUEUE_MARGIN * before + self._seconds(batch))

    def _seconds(self, rows: int) -> float:
        """Return the seconds that ``rows`` rows take if all slots compute."""
        batches = -(-rows // self._policy.max_batch)
        seconds = self._cost(rows, batches)
        return seconds / min(batches, self._slots) if batches > 1 else seconds


def _upper_estimate(seconds: float) -> float:
    """Return an upper estimate of a duration, from its expected seconds."""
    return _ESTIMATE_MARGIN * seconds + _LAG_SECONDS


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
