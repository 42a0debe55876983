"""The rule that makes batches: which of the requests that wait are computed next, and how many of their rows.

Nothing here knows of deadlines, threads, clocks or metrics.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from serving.batching.ticket import Ticket
from serving.runtime import Arrays


class Part(NamedTuple):
    """Rows of a request that are in one batch: of ``arrays``, from ``start`` to before ``stop``."""

    ticket: Ticket
    arrays: Arrays
    start: int
    stop: int


class TicketQueue:
    """Requests that wait, in the order of their arrival in each of two lanes: urgent ones, and the others.

    ageing: seconds by which an urgent request overtakes others; one that came earlier by more is not overtaken.
    """

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._urgent: OrderedDict[Ticket, None] = OrderedDict()
        self._others: OrderedDict[Ticket, None] = OrderedDict()
        #: Rows that wait, and those of urgent requests among them.
        self.rows = 0
        self.urgent_rows = 0

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._urgent) + len(self._others)

    def push(self, ticket: Ticket) -> None:
        """Let a request wait."""
        (self._urgent if ticket.urgent else self._others)[ticket] = None
        self._count(ticket, ticket.left)

    def remove(self, ticket: Ticket) -> int:
        """Take a request out, and return how many of its rows waited; 0 where it does not wait."""
        lane = self._urgent if ticket.urgent else self._others
        if ticket not in lane:
            return 0
        del lane[ticket]
        left = ticket.left
        ticket.taken = ticket.size
        self._count(ticket, -left)
        return left

    def first(self) -> Ticket | None:
        """Return the request whose turn it is: the first urgent one, unless another has waited for too long."""
        urgent, other = next(iter(self._urgent), None), next(iter(self._others), None)
        if urgent and not (other and other.queued_at + self._ageing < urgent.queued_at):
            return urgent
        return other

    def take(self, room: int, limit: int, drops: Callable[[Ticket], bool]) -> list[Part]:
        """Take about ``room`` rows in turn, ``limit`` at most. A request is split only where it passes the limit.

        drops: called with each request whose turn comes; where it returns True, it has removed the request.
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
    """Return how many of the rows that wait a free slot takes, ``limit`` at most.

    crowd: the most rows that waited or were computed at one time lately. Of these each slot gets a part, and one part
    is left over: those whose answers go out, or whose next requests come in, while the slots compute. A batch is
    smaller than a good one only where no more waits, or at the limit.
    """
    return min(limit, waiting, max(good_batch, ceil(crowd / (slots + 1))))
