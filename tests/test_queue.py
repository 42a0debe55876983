"""Tests of the rule that makes batches, without threads, clock or deadlines."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from serving.batching.queue import Part, TicketQueue, batch_room
from serving.batching.ticket import Ticket
from serving.batching.turns import Turns


def _ticket(rows: int, queued_at: float = 0.0, urgent: bool = False, client: str = "", patient: bool = False) -> Ticket:
    return Ticket({"x": np.zeros((rows, 1))}, lambda ticket: None, None, urgent, queued_at, client, patient)


def _queue(*tickets: Ticket, ageing: float = 1.0) -> TicketQueue:
    queue = TicketQueue(ageing)
    for ticket in tickets:
        queue.push(ticket)
    return queue


def _keep(ticket: Ticket) -> bool:
    return False


def _take(queue: TicketQueue, room: int, limit: int = 0) -> list[tuple[Ticket, int, int]]:
    """Take from a queue; limit: 0 for the room."""
    return [(part.ticket, part.start, part.stop) for part in queue.take(room, limit or room, _keep)]


def test_requests_are_taken_in_the_order_they_came_until_the_room_is_full() -> None:
    first, second, third = (_ticket(2, queued_at) for queued_at in (0.0, 0.1, 0.2))
    queue = _queue(first, second, third)
    assert (len(queue), queue.rows) == (3, 6)
    assert _take(queue, 4) == [(first, 0, 2), (second, 0, 2)]
    assert (len(queue), queue.rows) == (1, 2)
    assert _take(queue, 4) == [(third, 0, 2)]
    assert _take(queue, 4) == []
    assert (len(queue), queue.rows) == (0, 0)


def test_a_request_larger_than_the_room_is_split_and_keeps_its_turn() -> None:
    large, small = _ticket(5), _ticket(1)
    queue = _queue(large, small)
    assert _take(queue, 2) == [(large, 0, 2)]
    assert (len(queue), queue.rows) == (2, 4)
    assert _take(queue, 2) == [(large, 2, 4)]
    assert _take(queue, 2) == [(large, 4, 5), (small, 0, 1)]
    assert queue.rows == 0


def test_a_request_that_fits_into_the_largest_batch_is_not_split() -> None:
    small, large, last = _ticket(1), _ticket(6), _ticket(4)
    queue = _queue(small, large, last)
    assert _take(queue, 3, limit=8) == [(small, 0, 1), (large, 0, 6)]
    assert _take(queue, 3, limit=3) == [(last, 0, 3)]
    assert _take(queue, 3, limit=3) == [(last, 3, 4)]


def test_clients_take_turns_by_rows() -> None:
    many = [_ticket(2, client="many") for _ in range(4)]
    few = [_ticket(1, client="few") for _ in range(3)]
    queue = _queue(*many, *few)
    taken = [ticket for ticket, _, _ in _take(queue, 20)]
    assert taken == [many[0], few[0], few[1], many[1], few[2], many[2], many[3]]
    assert (queue.rows, len(queue), queue.shares["many"], queue.shares.clients_with("few")) == (0, 0, 0, 1)


def test_a_client_that_comes_later_has_the_next_turn_and_no_more_for_its_wait() -> None:
    many = [_ticket(1, client="many") for _ in range(6)]
    queue = _queue(*many)
    assert [ticket for ticket, _, _ in _take(queue, 3)] == many[:3]
    late = [_ticket(1, client="late") for _ in range(3)]
    for ticket in late:
        queue.push(ticket)
    assert [ticket for ticket, _, _ in _take(queue, 4)] == [late[0], many[3], late[1], many[4]]


def test_a_client_with_one_large_request_after_the_other_gets_no_more_than_its_turns() -> None:
    small = [_ticket(1, client="small") for _ in range(20)]
    queue = _queue(_ticket(4, client="large"), *small)
    rows = {"large": 0, "small": 0}
    for _ in range(6):
        for ticket, start, stop in _take(queue, 4):
            rows[str(ticket.client)] += stop - start
        if not queue.shares["large"]:
            queue.push(_ticket(4, client="large"))
    assert rows == {"large": 12, "small": 12}


def test_a_client_that_stays_has_its_turns_beside_clients_that_are_new_each_time() -> None:
    queue, last = TicketQueue(1.0), [0]
    for batch in range(200):
        new = [_ticket(4, client=f"new {batch} {number}") for number in range(3)]  # more than there is room for
        for ticket in new:
            queue.push(ticket)
        if not queue.shares["stays"]:
            queue.push(_ticket(1, client="stays"))
        if any(ticket.client == "stays" for ticket, _, _ in _take(queue, 8)):
            last.append(batch)
        for ticket in new:
            queue.remove(ticket)
    assert max(np.diff([*last, 200])) <= 10


def test_a_new_client_does_not_wait_for_what_others_got_before() -> None:
    queue = TicketQueue(1.0)
    for batch in range(1000):
        queue.push(_ticket(1, client=f"one of two, {batch % 2}"))
        assert _take(queue, 1)
    queue.push(_ticket(1, client="new"))
    for batch in range(5):
        queue.push(_ticket(1, client=f"one of two, {batch % 2}"))
        [(ticket, _, _)] = _take(queue, 1)
        if ticket.client == "new":
            return
    raise AssertionError("the new client waits")


def test_costs_that_are_known_later_leave_a_client_that_stays_its_turns() -> None:
    turns, got = Turns[str](), 0
    for number in range(0, 1000, 2):
        new = [f"new {number}", f"new {number + 1}"]
        for name in (*new, "stays"):
            turns.remove(name, name)
            turns.push(name, name)
        first = turns.first()
        assert first
        turn = turns.give(0.0, done=True)
        turns.charge(first, turn, 1.0)
        got += first == "stays"
        for name in new:
            turns.remove(name, name)
    assert got > 100


def test_the_parts_of_a_large_request_alternate_with_another_client() -> None:
    large, small = _ticket(8, client="large"), [_ticket(1, client="small") for _ in range(3)]
    queue = _queue(large, *small)
    assert _take(queue, 2) == [(large, 0, 2)]
    assert _take(queue, 2) == [(small[0], 0, 1), (small[1], 0, 1)]
    assert _take(queue, 3) == [(large, 2, 5)]
    assert _take(queue, 4) == [(small[2], 0, 1), (large, 5, 8)]
    assert queue.rows == 0


def _serve(queue: TicketQueue, batches: int, size: int, refill: Callable[[str], list[Ticket]]) -> dict[str, int]:
    """Take batches of this size, and call ``refill`` before each for both clients. Return the rows that each got."""
    rows = {"greedy": 0, "modest": 0}
    for _ in range(batches):
        for client in rows:
            for ticket in refill(client):
                queue.push(ticket)
        for ticket, start, stop in _take(queue, size):
            rows[str(ticket.client)] += stop - start
    return rows


@pytest.mark.parametrize("urgent", [(True,), (True, False)], ids=["only urgent ones", "urgent ones and others"])
def test_urgent_requests_get_a_client_no_more_than_its_turns(urgent: tuple[bool, ...]) -> None:
    queue = _queue()

    def refill(client: str) -> list[Ticket]:
        own = urgent if client == "greedy" else (False,)
        return [_ticket(1, urgent=one, client=client) for one in own for _ in range(4)]

    assert _serve(queue, 10, 4, refill) == {"greedy": 20, "modest": 20}


def test_an_urgent_request_goes_ahead_of_those_of_clients_with_the_same_turn() -> None:
    others = [_ticket(1, number / 10, client=f"client {number}") for number in range(3)]
    late, urgent = _ticket(1, 0.9, client="late"), _ticket(1, 0.95, urgent=True, client="late")
    assert [ticket for ticket, _, _ in _take(_queue(*others, late, urgent), 9)] == [urgent, *others, late]


def test_an_urgent_request_does_not_overtake_another_client_that_has_waited_for_longer_than_the_ageing() -> None:
    early, later = _ticket(1, 0.0, client="early"), _ticket(1, 0.2, client="later")
    urgent = _ticket(1, 1.1, urgent=True, client="urgent")
    assert [ticket for ticket, _, _ in _take(_queue(early, later, urgent), 9)] == [early, urgent, later]


def test_a_client_that_is_refused_again_and_again_gets_fewer_turns() -> None:
    def served(refusals: int) -> dict[str, int]:
        queue = _queue()

        def refill(client: str) -> list[Ticket]:
            for _ in range(refusals * (client == "greedy")):
                queue.refused(client)
            return [_ticket(1, client=client)]

        return _serve(queue, 34, 1, refill)

    assert served(refusals=0) == {"greedy": 17, "modest": 17}
    assert served(refusals=1)["greedy"] >= 10
    assert served(refusals=1000) == {"greedy": 3, "modest": 31}


def test_a_refusal_counts_for_nothing_once_a_client_has_paid_or_does_not_wait() -> None:
    queue = _queue(*(_ticket(1, client="greedy") for _ in range(9)))
    for client in ("greedy", "modest") * 100:
        queue.refused(client)
    assert len(_take(queue, 1)) == 1
    for _ in range(16):
        queue.push(_ticket(1, client="modest"))
    assert [ticket.client for ticket, _, _ in _take(queue, 24)] == ["modest"] * 16 + ["greedy"] * 8


def test_a_client_that_cancels_and_sends_again_keeps_its_debt_of_turns() -> None:
    queue = _queue()
    waiting: list[Ticket] = []

    def refill(client: str) -> list[Ticket]:
        if client == "modest":
            return [_ticket(1, client=client) for _ in range(4)]
        for ticket in waiting:
            queue.remove(ticket)
        waiting[:] = [_ticket(4, client=client), _ticket(1, client=client)]
        return waiting

    assert _serve(queue, 10, 4, refill) == {"greedy": 20, "modest": 20}


def test_a_client_that_loses_its_place_keeps_its_debt_of_turns() -> None:
    large = [_ticket(4, client="greedy") for _ in range(2)]
    modest = [_ticket(1, client="modest") for _ in range(3)]
    queue = _queue(*large, *modest)
    assert _take(queue, 4) == [(large[0], 0, 4)]
    assert queue.displace(4) == [large[1]]
    queue.push(again := _ticket(4, client="greedy"))
    assert [ticket for ticket, _, _ in _take(queue, 20)] == [*modest, again]


def test_a_client_keeps_its_debt_of_turns_while_nobody_waits() -> None:
    first = _ticket(4, client="greedy")
    queue = _queue(first)
    assert _take(queue, 9) == [(first, 0, 4)]
    greedy = [_ticket(4, client="greedy") for _ in range(2)]
    modest = [_ticket(1, client="modest") for _ in range(6)]
    for ticket in (*greedy, *modest):
        queue.push(ticket)
    assert [ticket for ticket, _, _ in _take(queue, 20)] == [*modest[:4], greedy[0], *modest[4:], greedy[1]]


def test_a_client_that_is_held_back_waits_for_as_many_rows_of_the_others() -> None:
    held = [_ticket(1, client="held") for _ in range(2)]
    others = [_ticket(1, client="other") for _ in range(6)]
    queue = _queue(*held, *others)
    queue.hold_back("held", 4)
    order = [ticket for ticket, _, _ in _take(queue, 8)]
    assert order == [*others[:4], held[0], others[4], held[1], others[5]]


def test_a_client_that_is_held_back_no_longer_has_its_turns_as_before() -> None:
    held = [_ticket(1, client="held") for _ in range(2)]
    others = [_ticket(1, client="other") for _ in range(2)]
    queue = _queue(held[0], others[0], held[1], others[1])
    queue.hold_back("held", 100)
    queue.hold_back("held", -100)
    queue.hold_back("unknown", -100)
    order = [ticket for ticket, _, _ in _take(queue, 4)]
    assert sorted(map(order.index, held)) in ([0, 2], [1, 3])


def test_what_a_client_has_waited_for_is_not_given_back() -> None:
    queue = _queue(*(_ticket(1, client="held") for _ in range(4)), *(_ticket(1, client="other") for _ in range(4)))
    queue.hold_back("held", 2)
    _take(queue, 4)  # the other's first two, and one of each
    for _ in range(4):
        queue.push(_ticket(1, client="other"))
    queue.hold_back("held", -100)
    order = [ticket.client for ticket, _, _ in _take(queue, 6)]
    assert order.count("held") == 3
    assert order.index("held") <= 1
    assert order != ["held"] * 3 + ["other"] * 3


def test_a_client_that_is_not_known_is_not_held_back() -> None:
    queue = _queue(_ticket(1, client="known"))
    assert queue.knows("known")
    assert not queue.knows("unknown")
    queue.hold_back("unknown", 100)
    late = _ticket(1, client="unknown")
    queue.push(late)
    assert late in [ticket for ticket, _, _ in _take(queue, 2)]


def test_the_newest_requests_of_the_largest_client_are_displaced() -> None:
    many = [_ticket(2, client="many") for _ in range(4)]
    some = [_ticket(2, client="some") for _ in range(2)]
    queue = _queue(*many, *some)
    assert queue.displace(3) == [many[3], many[2]]
    assert (queue.rows, len(queue), queue.shares["many"]) == (8, 4, 4)
    assert [ticket for ticket, _, _ in _take(queue, 20)] == [many[0], some[0], many[1], some[1]]


def test_requests_that_waited_for_room_or_have_begun_are_not_displaced() -> None:
    patient = [_ticket(2, client="many", patient=True) for _ in range(3)]
    begun = _ticket(4, client="many", urgent=True)
    queue = _queue(*patient, begun)
    assert _take(queue, 2) == [(begun, 0, 2)]
    assert queue.displace(1) == []
    other = _ticket(1, client="few")
    queue.push(other)
    assert queue.displace(2) == []
    assert queue.displace(1) == [other]
    assert queue.rows == 8


def test_an_urgent_request_goes_ahead_of_the_others() -> None:
    other, urgent = _ticket(1, 0.0), _ticket(1, 0.9, urgent=True)
    queue = _queue(other, urgent)
    assert queue.urgent.total == 1
    assert [part[0] for part in _take(queue, 2)] == [urgent, other]
    assert queue.urgent.total == 0


def test_an_urgent_request_does_not_overtake_one_that_came_earlier_by_more_than_the_ageing() -> None:
    other, urgent = _ticket(1, 0.0), _ticket(1, 1.1, urgent=True)
    assert [part[0] for part in _take(_queue(other, urgent), 2)] == [other, urgent]


def test_an_urgent_request_does_not_wait_for_the_rest_of_one_that_is_split() -> None:
    other, urgent = _ticket(4, 0.0), _ticket(1, 0.5, urgent=True)
    queue = _queue(other)
    assert _take(queue, 2) == [(other, 0, 2)]
    queue.push(urgent)
    assert _take(queue, 2) == [(urgent, 0, 1), (other, 2, 3)]


def test_a_request_that_is_removed_leaves_nothing_behind() -> None:
    kept, removed = _ticket(2), _ticket(3)
    queue = _queue(removed, kept)
    assert queue.remove(removed) == 3
    assert queue.remove(removed) == 0, "once"
    assert (len(queue), queue.rows, removed.left) == (1, 2, 0)
    assert _take(queue, 9) == [(kept, 0, 2)]


def test_only_the_rows_in_no_batch_count_when_a_request_is_removed() -> None:
    ticket = _ticket(5, urgent=True)
    queue = _queue(ticket)
    _take(queue, 2)
    assert queue.urgent.total == 3
    assert queue.remove(ticket) == 3
    assert (queue.rows, queue.urgent.total) == (0, 0)


def test_requests_dropped_on_the_way_take_no_room() -> None:
    late, kept = _ticket(4), _ticket(2)
    queue = _queue(late, kept)

    def drops(ticket: Ticket) -> bool:
        return ticket is late and queue.remove(ticket) > 0

    assert queue.take(2, 2, drops) == [Part(kept, kept.arrays, 0, 2)]
    assert queue.rows == 0


@pytest.mark.parametrize(
    ("waiting", "crowd", "slots", "good", "limit", "expected"),
    [
        (1, 1.0, 1, 4, 8, 1),
        (3, 3.0, 1, 4, 8, 3),  # less than a good batch: all
        (12, 12.0, 1, 4, 16, 6),  # half of the waiting rows, so that the slot gets its next batch at once
        (6, 11.7, 1, 4, 16, 6),
        (100, 100.0, 1, 4, 16, 16),
        (8, 8.0, 2, 6, 4, 4),  # as much as another free slot can have
        (4, 64.0, 2, 6, 2, 2),
        (8, 16.0, 2, 4, 16, 6),  # a third of those in the server
        (8, 16.0, 2, 32, 16, 8),  # the fixed cost of a batch is high
        (40, 56.0, 2, 32, 16, 16),
    ],
)
def test_a_free_slot_takes_a_part_of_the_waiting_rows(
    waiting: int, crowd: float, slots: int, good: int, limit: int, expected: int
) -> None:
    assert batch_room(waiting, crowd, slots, good, limit) == expected


def test_requests_that_are_taken_one_by_one_leave_no_memory_behind() -> None:
    queue = _queue()

    def serve(count: int) -> int:
        for number in range(count):
            queue.push(_ticket(1, client=f"client {number % 3}"))
            assert len(_take(queue, 1)) == 1
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = serve(100)
        assert serve(2000) < before + 20_000
    finally:
        tracemalloc.stop()
