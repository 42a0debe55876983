"""Fairness between clients: their turns at something that they wait for, and their shares of a limit."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

# Size of the heap at which the turns of clients that do not wait are forgotten. It grows with the clients that wait.
_MIN_TIDY_SIZE = 4096
# The most by which a new client is ahead of the mean of those that wait, in multiples of the largest cost of late, and
# the part of that cost that is left after the next one.
_MAX_LEAD, _DECAY = 2, 0.99
# The most of a fine, as a multiple of what the client gets: so it still gets a sixteenth of the turns of the others.
_MAX_FINE = 15


class _Client(Generic[Item]):
    """A client that waits, or whose turn has not been passed yet.

    turn: the turn of its next item. due: the due time that orders it among equal turns, infinite if nothing has come
    since its last turn. fine: a cost that is added to its next turn. held_back: the part of its turn that it has not
    waited for yet and that may be taken back. number: the number of its entry in the heap;
    entries with other numbers are outdated.
    """

    __slots__ = ("due", "fine", "held_back", "key", "number", "others", "turn", "urgent")

    def __init__(self, key: Hashable, turn: float) -> None:
        self.key = key
        self.turn = turn
        self.due = inf
        self.fine = self.held_back = 0.0
        self.number = 0
        # Items and their due times. Each lane is in order.
        self.urgent: OrderedDict[Item, float] = OrderedDict()
        self.others: OrderedDict[Item, float] = OrderedDict()

    @property
    def waits(self) -> bool:
        """Return True if it has items."""
        return bool(self.urgent or self.others)

    def lane(self) -> OrderedDict[Item, float]:
        """Return the lane of the next item."""
        urgent, others = self.urgent, self.others
        if not urgent or (others and others[next(iter(others))] < urgent[next(iter(urgent))]):
            return others
        return urgent


class Turns(Generic[Item]):
    """Waiting items. Their clients take turns by the cost of the items.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): a client's turn moves on by the cost of what it gets, and the
    client with the earliest turn is next. A client that did not wait begins at the turn of the present client, or at
    the end of its own last turn if that is later: to cancel what waits, and to send it again, gains nothing. But if new
    clients come all the time, the turn of the present client hardly moves, and those that have got something would wait
    for ever. So a client that did not wait begins a little before the mean of all that is got, at the earliest.

    Due times order the items of a client, and clients with equal turns. So an urgent item with an earlier due time
    goes ahead of its client's other items, but its client gets no more than its turns.
    """

    def __init__(self) -> None:
        self._clients: dict[Hashable, _Client[Item]] = {}
        # Turns, due times and numbers. The numbers order what is equal. One entry of each client is valid.
        self._heap: list[tuple[float, float, int, _Client[Item]]] = []
        self._tidy_size = _MIN_TIDY_SIZE
        self._now = 0.0  # no turn is earlier
        self._mean = 0.0  # the turn of a client that has got as much as those that wait, in the mean
        self._largest = 0.0  # the largest cost of late
        self._waiting = 0  # the clients that wait
        self._number = 0
        self._count = 0
        self._lane: OrderedDict[Item, float] = OrderedDict()  # the lane of the item that ``first`` returned last

    def __len__(self) -> int:
        """Return the number of items that wait."""
        return self._count

    def push(self, key: Hashable, item: Item, due: float = 0.0, urgent: bool = False) -> None:
        """Add an item of a client. The due times of its urgent items, and those of the others, must not fall."""
        client = self._clients.get(key)
        if client is None:
            start = max(self._now, self._mean - _MAX_LEAD * self._largest)
            client = self._clients[key] = _Client(key, start)
        self._waiting += not client.waits
        if urgent:
            client.urgent[item] = due
        else:
            client.others[item] = due
        self._count += 1
        if due < client.due:
            client.due = due
            self._enter(client)

    def first(self) -> Item | None:
        """Return the next item."""
        while self._count:
            turn, _, number, client = self._heap[0]
            if number == client.number:
                lane = client.lane() if client.urgent else client.others
                if lane:
                    self._lane = lane
                    return next(iter(lane))
                # Those that come from now on begin here, so the end of this client's turn is passed.
                del self._clients[client.key]
                self._now = turn
            heappop(self._heap)
        return None

    def give(self, cost: float, done: bool) -> float:
        """Note that the next item gets something. It must be known by ``first``. Returns its turn.

        done: it got all that it waits for, so it is removed.
        """
        turn, _, _, client = self._heap[0]
        self._now = turn
        self._count_cost(turn, cost)
        if done:
            self._lane.popitem(last=False)
            self._count -= 1
            self._waiting -= not client.waits
        lane = client.lane() if client.urgent else client.others
        client.turn = end = turn + cost + min(client.fine, _MAX_FINE * cost)
        client.fine = client.held_back = 0.0
        client.due = due = lane[next(iter(lane))] if lane else inf
        client.number = self._number = number = self._number + 1
        heapreplace(self._heap, (end, due, number, client))
        return turn

    def charge(self, key: Hashable, turn: float, cost: float) -> None:
        """Add a cost that was not known when a client got something at this turn."""
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = _Client(key, turn)
        client.turn = max(self._now, client.turn + cost)
        self._count_cost(self._now, cost)
        self._enter(client)

    def knows(self, key: Hashable) -> bool:
        """Return True if a client waits, or has not come to the end of its turn. Any thread may call it."""
        return key in self._clients

    def hold_back(self, key: Hashable, cost: float) -> None:
        """Let a client that is known wait for the others; a negative cost takes back what it has not waited for yet."""
        if client := self._clients.get(key):
            if cost < 0:
                cost = max(cost, -client.held_back, self._now - client.turn)
            client.turn += cost
            client.held_back += cost
            self._enter(client)

    def fine(self, key: Hashable, cost: float) -> None:
        """Let a client's next turn cost more, if it waits: for work that it causes beyond what it gets.

        Any thread may call it. Two calls at once may count as one.
        """
        if client := self._clients.get(key):
            client.fine += cost

    def remove(self, key: Hashable, item: Item) -> bool:
        """Remove an item of a client, and return True if it was there. The client keeps its turn."""
        if client := self._clients.get(key):
            for lane in (client.others, client.urgent):
                if item in lane:
                    del lane[item]
                    self._count -= 1
                    self._waiting -= not client.waits
                    return True
        return False

    def newest(self, key: Hashable) -> Iterator[Item]:
        """Yield the items of a client, the newest first, and the urgent ones last."""
        if client := self._clients.get(key):
            yield from reversed(client.others)
            yield from reversed(client.urgent)

    def _count_cost(self, turn: float, cost: float) -> None:
        """Move the mean by a client's cost. It stays near the turns of those that wait, whatever others got before."""
        self._largest = largest = max(cost, _DECAY * self._largest)
        mean = self._mean + cost / max(1, self._waiting)
        self._mean = min(max(turn, mean), turn + (_MAX_LEAD + 1) * largest)

    def _enter(self, client: _Client[Item]) -> None:
        client.number = self._number = self._number + 1
        heappush(self._heap, (client.turn, client.due, client.number, client))
        if len(self._heap) > self._tidy_size:
            self._tidy()

    def _tidy(self) -> None:
        """Drop outdated entries, and clients that do not wait if there are many."""
        heap = [entry for entry in self._heap if entry[2] == entry[3].number]
        if len(heap) > self._tidy_size // 2:
            heap = [entry for entry in heap if entry[3].lane()]
            self._clients = {entry[3].key: entry[3] for entry in heap}
        heapify(heap)
        self._heap, self._tidy_size = heap, max(_MIN_TIDY_SIZE, 2 * len(heap))


class Shares:
    """The amounts of a limited thing that clients have. Those that have any have equal shares of the limit."""

    def __init__(self) -> None:
        self.total = 0
        self._amounts: dict[Hashable, int] = {}

    def __getitem__(self, client: Hashable) -> int:
        """Return the amount that a client has."""
        return self._amounts.get(client, 0)

    def add(self, client: Hashable, amount: int) -> None:
        """Give a client more, or less if the amount is negative."""
        self.total += amount
        own = self._amounts.get(client, 0) + amount
        if own:
            self._amounts[client] = own
        else:
            self._amounts.pop(client, None)

    def clients_with(self, client: Hashable) -> int:
        """Return the number of clients that have any, this one included."""
        return len(self._amounts) + (client not in self._amounts)

    def allow(self, client: Hashable, amount: int, limit: int) -> bool:
        """Return True if a client has at most its share of the limit with this amount in addition."""
        return self[client] + amount <= limit // self.clients_with(client)

    def displaced(self, amount: int, waiting: Sequence[Turns[Item]], size: Callable[[Item], int]) -> list[Item]:
        """Return the newest items of the clients that have most, as many as make up this amount.

        size: returns an item's amount, or 0 if it keeps its place. Returns nothing if the items do not do.
        """
        chosen: list[Item] = []
        for client in sorted(self._amounts, key=self._amounts.__getitem__, reverse=True):
            for turns in waiting:
                for item in turns.newest(client):
                    if items_size := size(item):
                        chosen.append(item)
                        amount -= items_size
                        if amount <= 0:
                            return chosen
        return []
