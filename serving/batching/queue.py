"""The rule that makes batches: it selects the waiting requests, and the rows of each, that are computed next.

The rule uses no deadlines, threads, clocks or metrics.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from serving.batching.ticket import Ticket
from serving.runtime import Arrays


class Part(NamedTuple):
    """The rows of a request in one batch: rows ``start`` to ``stop`` of ``arrays``, without ``stop``."""

    ticket: Ticket
    arrays: Arrays
    start: int
    stop: int


class TicketQueue:
    """The waiting requests in two lanes, urgent and other ones, each in order of arrival.

    ageing: an urgent request overtakes requests that came at most this many seconds before it.
    """

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._urgent: OrderedDict[Ticket, None] = OrderedDict()
        self._others: OrderedDict[Ticket, None] = OrderedDict()
        #: The rows that wait, and the waiting rows of urgent requests.
        self.rows = 0
        self.urgent_rows = 0

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._urgent) + len(self._others)

    def push(self, ticket: Ticket) -> None:
        """Add a request."""
        (self._urgent if ticket.urgent else self._others)[ticket] = None
        self._count(ticket, ticket.left)

    def remove(self, ticket: Ticket) -> int:
        """Remove a request and return the number of its waiting rows, or 0 if it does not wait."""
        lane = self._urgent if ticket.urgent else self._others
        if ticket not in lane:
            return 0
        del lane[ticket]
        left = ticket.left
        ticket.taken = ticket.size
        self._count(ticket, -left)
        return left

    def first(self) -> Ticket | None:
        """Return the next request: the first urgent one, unless another one has waited for too long."""
        urgent, other = next(iter(self._urgent), None), next(iter(self._others), None)
        if urgent and not (other and other.queued_at + self._ageing < urgent.queued_at):
            return urgent
        return other

    def take(self, room: int, limit: int, drops: Callable[[Ticket], bool]) -> list[Part]:
        """Take about ``room`` rows in turn, and at most ``limit``. A request is split only if it exceeds the limit.

        drops: called with each next request. If it returns True, it has removed the request.
        """
        batch: list[Part] = []
        while room > 0 and (ticket := self.first()):
            if drops(ticket):
                continue
            count = ticket.left if ticket.left <= limit else min(room, ticket.left)
            batch.append(Part(ticket, ticket.arrays, ticket.taken, ticket.taken + count))
            if count == ticket.left:
                self.remove(ticket)
            else:
                ticket.taken += count
                self._count(ticket, -count)
            room -= count
            limit -= count
        return batch

    def _count(self, ticket: Ticket, rows: int) -> None:
        self.rows += rows
        if ticket.urgent:
            self.urgent_rows += rows


def batch_room(waiting: int, crowd: float, slots: int, good_batch: int, limit: int) -> int:
    """Return the number of waiting rows that a free slot takes, at most ``limit``.

    crowd: the most rows that waited or were computed at the same time lately. Each slot gets an equal part of them, and
    one part is left: rows whose answers go out, or whose next requests come in, while the slots compute. A batch is
    smaller than a good batch only if fewer rows wait, or at the limit.
    """
    return min(limit, waiting, max(good_batch, ceil(crowd / (slots + 1))))
