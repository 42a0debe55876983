"""Tests of the bytes that wait to be read: how they count, and what they cost their connection."""

import asyncio
from collections.abc import Callable

from serving.transport.backlog import Backlog
from serving.transport.memory import Memory
from tests.test_memory import Holder, Named, Owner

FEW, MANY = 16_000, 100_000


def run(test: Callable[[], None]) -> None:
    """Run a test in an event loop, whose time a backlog takes."""

    async def main() -> None:
        test()

    asyncio.run(main())


def test_few_bytes_do_not_count_and_many_count_until_they_are_read() -> None:
    def test() -> None:
        memory, owner = Memory(2 * MANY), Owner()
        backlog = Backlog(memory, owner, lambda: None)
        backlog.measure(FEW)
        assert (memory.used, backlog.waits) == (0, False)
        backlog.measure(MANY)
        assert (memory.used, owner.held, backlog.waits) == (MANY, MANY, True)
        backlog.measure(FEW)
        assert (memory.used, owner.held, backlog.waits) == (0, 0, False)
        backlog.measure(MANY)
        backlog.gone()
        assert (memory.used, backlog.waits) == (0, False)

    run(test)


def test_without_room_the_connection_with_the_most_bytes_ends() -> None:
    def test() -> None:
        memory, ended = Memory(2 * MANY), list[str]()
        large = Backlog(memory, Owner(), lambda: ended.append("large"))
        small = Backlog(memory, Owner(), lambda: ended.append("small"))
        large.measure(MANY + 1)
        small.measure(MANY)
        assert ended == ["large"]
        assert (memory.used, large.held) == (MANY, 0)

    run(test)


def test_bytes_that_wait_for_long_do_not_end_their_connection() -> None:
    def test() -> None:
        memory, ended = Memory(2 * MANY), list[str]()
        backlog = Backlog(memory, Owner(), lambda: ended.append("it"))
        backlog.measure(MANY)
        memory.evict_stalled(asyncio.get_running_loop().time() + 1000)
        assert ended == []
        assert memory.used == MANY
        backlog.gone()
        assert memory.used == 0

    run(test)


def test_half_messages_of_a_connection_end_before_it_does() -> None:
    def test() -> None:
        memory, ended = Named(3 * MANY), list[str]()
        backlog = Backlog(memory, memory.names["a client"], lambda: ended.append("the connection"))
        backlog.measure(MANY)
        halves = [Holder(memory, name, MANY) for name in ("first", "second")]
        for half in halves:
            memory.waits(half, asyncio.get_running_loop().time())
        memory.hold(halves[-1], 1)
        memory.make_room(halves[-1])
        assert ([one.evicted for one in halves], ended) == ([False, None], [])
        memory.limit(MANY - 1)
        assert ([one.evicted for one in halves], ended) == ([False, False], ["the connection"])
        assert memory.used == 0

    run(test)
