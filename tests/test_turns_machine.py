"""The queue in any order of events: no client gets more than its turns while another one waits."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.batching.queue import TicketQueue
from serving.batching.ticket import Ticket
from serving.batching.turns import Turns
from tests.machines import search

CLIENTS = ("a", "b", "c", "d")
FLOODING = "d"
MAX_BATCH = 4
AGEING_SECONDS = 1.0


@dataclass
class Wait:
    """The time for which a client has waited without a pause.

    lead: by other client, the rows that it got in this time, less those of the waiting client. lowest: the least lead.
    """

    lead: Counter[str] = field(default_factory=Counter)
    lowest: Counter[str] = field(default_factory=Counter)

    def note(self, rows: Counter[str], client: str) -> None:
        """Note the rows of one part, or check that nobody's lead has grown by more than two parts."""
        for other in CLIENTS:
            self.lead[other] += rows[other] - rows[client]
            self.lowest[other] = min(self.lowest[other], self.lead[other])
            assert self.lead[other] - self.lowest[other] <= 2 * MAX_BATCH, f"{client} waits while {other} is served"


class Clients(RuleBasedStateMachine):
    """Requests of several clients, cancels, displacements and batches in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = TicketQueue(AGEING_SECONDS)
        self.now = 0.0
        self.open: dict[str, list[Ticket]] = defaultdict(list)
        self.waits: dict[str, Wait] = {}

    @rule(
        client=st.sampled_from(CLIENTS), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), urgent=st.booleans()
    )
    def push(self, client: str, sizes: list[int], urgent: bool) -> None:
        for size in sizes:
            arrays = {"x": np.zeros((size, 1), np.uint8)}
            ticket = Ticket(arrays, lambda ticket: None, None, urgent, self.now, client)
            self.queue.push(ticket)
            self.open[client].append(ticket)
        self.waits.setdefault(client, Wait())

    @rule(client=st.sampled_from(CLIENTS), choice=st.integers(0, 50), everything=st.booleans())
    def cancel(self, client: str, choice: int, everything: bool) -> None:
        open_now = self.open[client]
        for ticket in open_now.copy() if everything else open_now[choice : choice + 1]:
            assert self.queue.remove(ticket) > 0
            self.close(ticket)

    @rule(client=st.sampled_from(CLIENTS), size=st.integers(1, 9), times=st.integers(1, 4))
    def send_all_again(self, client: str, size: int, times: int) -> None:
        for _ in range(times):
            self.cancel(client, 0, everything=True)
            self.push(client, [size], urgent=False)
            self.take(MAX_BATCH, 1)

    @rule(rows=st.integers(1, 6))
    def displace(self, rows: int) -> None:
        for ticket in self.queue.displace(rows):
            self.close(ticket)

    @rule(times=st.integers(1, 100))
    def refuse(self, times: int) -> None:
        """Refuse requests of one client, which then gets less: its waits are not checked."""
        for _ in range(times):
            self.queue.refused(FLOODING)

    @precondition(lambda self: self.queue.rows)
    @rule(room=st.integers(1, MAX_BATCH), late=st.integers(0, 9))
    def take(self, room: int, late: int) -> None:
        """Take a batch, in which the first request may be late."""
        dropped: list[Ticket] = []

        def drops(ticket: Ticket) -> bool:
            if late or dropped:
                return False
            dropped.append(ticket)
            return self.queue.remove(ticket) > 0

        begun = set(self.waits)
        parts = self.queue.take(room, MAX_BATCH, drops)
        for ticket in dropped:
            self.close(ticket)
        for part in parts:
            ticket = part.ticket
            client = str(ticket.client)
            assert self.due(ticket) == min(self.due(one) for one in self.open[client])
            for waiting in begun & set(self.waits) - {FLOODING}:
                self.waits[waiting].note(Counter({client: part.stop - part.start}), waiting)
            if not ticket.left:
                self.close(ticket)

    @rule(seconds=st.sampled_from((0.01, 0.5, 3.0)))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def what_waits_is_counted(self) -> None:
        tickets = [ticket for open_now in self.open.values() for ticket in open_now]
        assert self.queue.rows == sum(ticket.left for ticket in tickets)
        assert len(self.queue) == len(tickets)

    def teardown(self) -> None:
        while self.queue.rows:
            self.take(MAX_BATCH, 1)
        assert not any(self.open.values())

    def close(self, ticket: Ticket) -> None:
        client = str(ticket.client)
        self.open[client].remove(ticket)
        if not self.open[client]:
            self.waits.pop(client, None)

    def due(self, ticket: Ticket) -> float:
        return ticket.queued_at - AGEING_SECONDS * ticket.urgent


def test_no_order_of_events_gives_a_client_more_than_its_turns_while_another_waits() -> None:
    search(Clients, examples=150, steps=40)


def test_clients_that_come_and_go_leave_a_bounded_heap() -> None:
    turns: Turns[int] = Turns()
    turns.push("patient", 0)
    assert turns.first() == 0
    turns.give(100_000, done=False)
    largest = 0
    for number in range(1, 30_000):
        turns.push(f"client {number}", number, due=1.0)
        turns.push(f"client {number}", -number, urgent=True)
        while turns.first() == 0:
            turns.give(100_000, done=False)
        assert turns.first() == -number
        assert turns.remove(f"client {number}", number)
        turns.give(10**6, done=True)
        largest = max(largest, len(turns._heap), len(turns._clients))
    assert largest < 5000
    assert (turns.first(), len(turns)) == (0, 1)
