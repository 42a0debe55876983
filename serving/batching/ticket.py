"""A request in the batcher, and its share of a batch's outputs."""

import asyncio
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from serving.runtime import Array, Arrays, rows

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Share:
    """The rows of a batch's outputs for one request: rows ``start`` to ``stop`` of ``batch``, without ``stop``."""

    batch: Arrays
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start

    def __getitem__(self, name: str) -> Array:
        """Return the rows of one output. Raises KeyError."""
        return self.batch[name][self.start : self.stop]


class State(Enum):
    """The states of a ticket. It leaves OPEN once, for one of the others."""

    OPEN = auto()
    ANSWERED = auto()
    FAILED = auto()
    GIVEN_UP = auto()


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the batcher: its input arrays, its state and its times.

    arrays: empty after the end.
    then: called once with the ticket, at its end.
    deadline, queued_at: times of ``time.monotonic``.
    client: a key of its client. patient: True if it waited for room in the queue, so that it keeps its place.
    probe: True if the server made its rows, so that their outputs are no answers.
    size: the number of its rows. taken: the number of its rows in batches.
    waited: seconds until a batch took its first row.
    input_time, infer_time: seconds of its batches.
    error: the error with which it ended, or None.
    """

    arrays: Arrays
    then: "Callable[[Ticket], None] | None"
    deadline: float | None
    urgent: bool
    queued_at: float
    client: Hashable = ""
    patient: bool = False
    probe: bool = False
    size: int = field(init=False)
    taken: int = field(default=0, init=False)
    state: State = field(default=State.OPEN, init=False)
    waited: float = field(default=0.0, init=False)
    input_time: float = field(default=0.0, init=False)
    infer_time: float = field(default=0.0, init=False)
    error: Exception | None = field(default=None, init=False)
    _shares: list[tuple[int, Share]] = field(default_factory=list, init=False)  # by their first row
    _result: Share | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.size = rows(self.arrays)

    @property
    def ended(self) -> bool:
        return self.state is not State.OPEN

    @property
    def left(self) -> int:
        """Return the number of rows that are in no batch yet."""
        return self.size - self.taken

    def result(self) -> Share:
        """Return the outputs of a ticket that has ended.

        Raises the error with which it ended, or asyncio.CancelledError if it was given up.
        """
        if self.state is State.GIVEN_UP:
            raise asyncio.CancelledError
        if self.error:
            raise self.error
        assert self._result
        return self._result

    def answer(self, start: int, share: Share) -> None:
        """Add the outputs of the rows from ``start`` on. The ticket ends when all rows have outputs."""
        if len(share) == self.size:
            self._result = share
        else:
            self._shares.append((start, share))
            if sum(len(part) for _, part in self._shares) < self.size:
                return
            parts = [part for _, part in sorted(self._shares, key=lambda entry: entry[0])]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in share.batch}
            self._result = Share(joined, 0, self.size)
        self._end(State.ANSWERED)

    def fail(self, error: Exception) -> None:
        """End the ticket with an error."""
        self.error = error
        self._end(State.FAILED)

    def give_up(self) -> None:
        """End the ticket because no client waits for its answer."""
        self._end(State.GIVEN_UP)

    def _end(self, state: State) -> None:
        self.state = state
        self.arrays = {}
        self._shares.clear()
        then, self.then = self.then, None  # otherwise the ticket and its owner would keep each other alive
        assert then
        try:
            then(self)
        except Exception:  # a fault in the code that answers one request must not reach the others of its batch
            _logger.exception("the end of a request could not be passed to its owner")


def settle(future: "asyncio.Future[Share]") -> Callable[[Ticket], None]:
    """Return a callback that passes the end of a ticket to a future, unless the future is already done."""

    def then(ticket: Ticket) -> None:
        if future.done():
            return
        if ticket.state is State.GIVEN_UP:
            future.cancel()
        elif ticket.error:
            # It is not raised: its traceback would know this frame, the frame the future, and the future the error.
            future.set_exception(ticket.error)
            future.exception()  # otherwise asyncio would log it if no task awaits the future
        else:
            future.set_result(ticket.result())

    return then
