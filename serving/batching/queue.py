"""The rule that makes batches: it selects the waiting requests, and the rows of each, that are computed next.

The rule uses no deadlines, threads, clocks or metrics.
"""

from collections.abc import Callable, Hashable
from math import ceil
from typing import NamedTuple

from serving.batching.ticket import Ticket
from serving.batching.turns import Shares, Turns
from serving.runtime import Arrays

# The rows that a refusal counts for. A client that is refused a few times for each answer hardly notices it.
_ROWS_A_REFUSAL = 1 / 4


class Part(NamedTuple):
    """The rows of a request in one batch: rows ``start`` to ``stop`` of ``arrays``, without ``stop``."""

    ticket: Ticket
    arrays: Arrays
    start: int
    stop: int


class TicketQueue:
    """The waiting requests. Clients take turns by rows.

    ageing: an urgent request overtakes requests that came at most this many seconds before it: those of its own client,
    and those of clients with the same turn.
    """

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._turns: Turns[Ticket] = Turns()
        #: The waiting rows of the clients, and those of urgent requests.
        self.shares = Shares()
        self.urgent = Shares()

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._turns)

    @property
    def rows(self) -> int:
        """Return the number of rows that wait."""
        return self.shares.total

    def push(self, ticket: Ticket) -> None:
        """Add a request."""
        client, urgent, queued_at = ticket.client, ticket.urgent, ticket.queued_at
        self._turns.push(client, ticket, queued_at - self._ageing if urgent else queued_at, urgent)
        self.shares.add(client, ticket.size)
        if urgent:
            self.urgent.add(client, ticket.size)

    def remove(self, ticket: Ticket) -> int:
        """Remove a request and return the number of its waiting rows, or 0 if it does not wait."""
        if not self._turns.remove(ticket.client, ticket):
            return 0
        left = ticket.left
        ticket.taken = ticket.size
        self.shares.add(ticket.client, -left)
        if ticket.urgent:
            self.urgent.add(ticket.client, -left)
        return left

    def refused(self, client: Hashable) -> None:
        """Note a request that is refused since its client has more than its share. A flood of them costs turns.

        Any thread may call it.
        """
        self._turns.fine(client, _ROWS_A_REFUSAL)

    def knows(self, client: Hashable) -> bool:
        """Return True if a client waits, or has not come to the end of its turn. Any thread may call it."""
        return self._turns.knows(client)

    def hold_back(self, client: Hashable, rows: float) -> None:
        """Let a client that is known wait for so many rows of each other one; a negative number takes them back."""
        self._turns.hold_back(client, rows)

    def displace(self, rows: int) -> list[Ticket]:
        """Remove the newest requests of the clients with the most waiting rows, until ``rows`` rows are free.

        Requests that waited for room, or that are in a batch already, stay. Returns nothing if the others do not do.
        """

        def size(ticket: Ticket) -> int:
            return 0 if ticket.patient or ticket.taken else ticket.size

        chosen = self.shares.displaced(rows, [self._turns], size)
        for ticket in chosen:
            self.remove(ticket)
        return chosen

    def ahead(self, client: Hashable, rows: int, urgent: bool, limit: int) -> int:
        """Return the waiting rows that are computed before a new request of ``rows`` rows, in batches of ``limit``."""
        total = self.shares[client]
        own = self.urgent[client] if urgent else total
        # While a client gets its rows, each of the others gets as many, and one of them a whole batch at a time.
        turns = self.shares.clients_with(client) * (own + rows) + limit
        return min(self.rows - total + own, turns)

    def take(self, room: int, limit: int, drops: Callable[[Ticket], bool]) -> list[Part]:
        """Take about ``room`` rows in turn, and at most ``limit``. A request is split only if it exceeds the limit.

        drops: called with each next request. If it returns True, it has removed the request.
        """
        batch: list[Part] = []
        turns = self._turns
        while room > 0 and (ticket := turns.first()):
            if drops(ticket):
                continue
            taken = ticket.taken
            left = ticket.size - taken
            count = left if left <= limit else min(room, left)
            batch.append(Part(ticket, ticket.arrays, taken, taken + count))
            ticket.taken = taken + count
            turns.give(count, count == left)
            self.shares.add(ticket.client, -count)
            if ticket.urgent:
                self.urgent.add(ticket.client, -count)
            room -= count
            limit -= count
        return batch


def batch_room(waiting: int, crowd: float, slots: int, good_batch: int, limit: int) -> int:
    """Return the number of waiting rows that a free slot takes, at most ``limit``.

    crowd: the most rows that waited or were computed at the same time lately. Each slot gets an equal part of them, and
    one part is left: rows whose answers go out, or whose next requests come in, while the slots compute. A batch is
    smaller than a good batch only if fewer rows wait, or at the limit.
    """
    return min(limit, waiting, max(good_batch, ceil(crowd / (slots + 1))))
