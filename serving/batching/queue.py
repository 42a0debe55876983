"""The rule that makes batches: it selects the waiting requests, and the rows of each, that are computed next.

The rule uses no deadlines, threads, clocks or metrics.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from heapq import heappop, heappush, heapreplace
from math import ceil
from typing import NamedTuple

from serving.batching.ticket import Ticket
from serving.runtime import Arrays

# Ends of turns that are kept before those are dropped that the present turn has passed.
_MAX_ENDED = 1024


class Part(NamedTuple):
    """The rows of a request in one batch: rows ``start`` to ``stop`` of ``arrays``, without ``stop``."""

    ticket: Ticket
    arrays: Arrays
    start: int
    stop: int


class _Waiting:
    """The waiting requests of a client in one lane."""

    __slots__ = ("client", "tickets")

    def __init__(self, client: Hashable) -> None:
        self.client = client
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()


class _Lane:
    """Waiting requests. Their clients take turns by rows, and the requests of one client keep their order.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): a client's turn moves on by the rows that it gets, and the
    client with the earliest turn is next. A client that did not wait begins at the turn of the present client, or at
    the end of its own last turn if that is later.
    """

    def __init__(self) -> None:
        self._clients: dict[Hashable, _Waiting] = {}
        # A heap of turns, in rows. The number orders equal turns. Clients without requests stay in it for a while,
        # at most until the lane is empty.
        self._turns: list[tuple[int, int, _Waiting]] = []
        self._now = 0
        self._number = 0
        self._ended: dict[Hashable, int] = {}  # the ends of the last turns of clients that do not wait

    def push(self, ticket: Ticket) -> None:
        waiting = self._clients.get(ticket.client)
        if waiting is None:
            waiting = self._clients[ticket.client] = _Waiting(ticket.client)
            self._number += 1
            turn = max(self._now, self._ended.pop(ticket.client, 0))
            heappush(self._turns, (turn, self._number, waiting))
        waiting.tickets[ticket] = None

    def first(self) -> Ticket | None:
        """Return the next request."""
        while self._turns:
            waiting = self._turns[0][2]
            if waiting.tickets:
                return next(iter(waiting.tickets))
            heappop(self._turns)
        return None

    def give(self, rows: int, all_rows: bool) -> None:
        """Note that the next request gets rows in a batch. all_rows: they are its last ones, so it is removed."""
        self._now, _, waiting = self._turns[0]
        if all_rows:
            waiting.tickets.popitem(last=False)
            if not waiting.tickets:
                heappop(self._turns)
                self._forget(waiting.client, self._now + rows)
                return
        self._number += 1
        heapreplace(self._turns, (self._now + rows, self._number, waiting))

    def remove(self, ticket: Ticket) -> bool:
        """Remove a request, and return True if it was there."""
        waiting = self._clients.get(ticket.client)
        if waiting is None or ticket not in waiting.tickets:
            return False
        del waiting.tickets[ticket]
        if not waiting.tickets:
            self._forget(ticket.client, self._now)
        return True

    def _forget(self, client: Hashable, turn: int) -> None:
        """Forget a client that does not wait any longer, but not the end of its turn while others wait."""
        del self._clients[client]
        if not self._clients:  # a client's next turn would begin before those that are left, so they would stay
            self._turns.clear()
            self._ended.clear()
        elif turn > self._now:
            self._ended[client] = turn
            if len(self._ended) > _MAX_ENDED:
                self._ended = {one: end for one, end in self._ended.items() if end > self._now}

    def newest(self, client: Hashable) -> Iterator[Ticket]:
        """Yield the requests of a client, the newest first."""
        if waiting := self._clients.get(client):
            yield from reversed(waiting.tickets)


class TicketQueue:
    """The waiting requests in two lanes, urgent and other ones. In each of them the clients take turns.

    ageing: an urgent request overtakes requests that came at most this many seconds before it.
    """

    def __init__(self, ageing: float) -> None:
        self._ageing = ageing
        self._urgent = _Lane()
        self._others = _Lane()
        self._count = 0
        self._rows_of: dict[Hashable, int] = {}
        #: The rows that wait, and the waiting rows of urgent requests.
        self.rows = 0
        self.urgent_rows = 0

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return self._count

    def rows_of(self, client: Hashable) -> int:
        """Return the number of waiting rows of a client."""
        return self._rows_of.get(client, 0)

    def clients_with(self, client: Hashable) -> int:
        """Return the number of clients that wait, this one included."""
        return len(self._rows_of) + (client not in self._rows_of)

    def push(self, ticket: Ticket) -> None:
        """Add a request."""
        self._lane(ticket).push(ticket)
        self._count += 1
        self._add(ticket, ticket.left)

    def remove(self, ticket: Ticket) -> int:
        """Remove a request and return the number of its waiting rows, or 0 if it does not wait."""
        if not self._lane(ticket).remove(ticket):
            return 0
        self._count -= 1
        left = ticket.left
        ticket.taken = ticket.size
        self._add(ticket, -left)
        return left

    def displace(self, rows: int) -> list[Ticket]:
        """Remove the newest requests of the clients with the most waiting rows, until ``rows`` rows are free.

        Requests that waited for room, or that are in a batch already, stay. Returns nothing if the others do not do.
        """
        chosen: list[Ticket] = []
        for client in sorted(self._rows_of, key=self._rows_of.__getitem__, reverse=True):
            for lane in (self._others, self._urgent):
                for ticket in lane.newest(client):
                    if not ticket.patient and not ticket.taken:
                        chosen.append(ticket)
                        rows -= ticket.size
                        if rows <= 0:
                            for one in chosen:
                                self.remove(one)
                            return chosen
        return []

    def first(self) -> Ticket | None:
        """Return the next request: the first urgent one, unless another one has waited for too long."""
        urgent, other = self._urgent.first(), self._others.first()
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
            taken = ticket.taken
            left = ticket.size - taken
            count = left if left <= limit else min(room, left)
            batch.append(Part(ticket, ticket.arrays, taken, taken + count))
            ticket.taken = taken + count
            self._lane(ticket).give(count, count == left)
            self._count -= count == left
            self._add(ticket, -count)
            room -= count
            limit -= count
        return batch

    def _lane(self, ticket: Ticket) -> _Lane:
        return self._urgent if ticket.urgent else self._others

    def _add(self, ticket: Ticket, rows: int) -> None:
        self.rows += rows
        if ticket.urgent:
            self.urgent_rows += rows
        total = self._rows_of.get(ticket.client, 0) + rows
        if total:
            self._rows_of[ticket.client] = total
        else:
            self._rows_of.pop(ticket.client, None)


def batch_room(waiting: int, crowd: float, slots: int, good_batch: int, limit: int) -> int:
    """Return the number of waiting rows that a free slot takes, at most ``limit``.

    crowd: the most rows that waited or were computed at the same time lately. Each slot gets an equal part of them, and
    one part is left: rows whose answers go out, or whose next requests come in, while the slots compute. A batch is
    smaller than a good batch only if fewer rows wait, or at the limit.
    """
    return min(limit, waiting, max(good_batch, ceil(crowd / (slots + 1))))
