"""Tests of the places for requests that wait."""

import asyncio
from collections.abc import Callable, Coroutine

from serving.services.places import Places
from tests.test_request import PATIENCE


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


async def settled(tasks: list["asyncio.Task[int]"]) -> list[int]:
    """Return the numbers of the tasks that have their places."""
    for _ in range(3):
        await asyncio.sleep(0)
    return [number for number, task in enumerate(tasks) if task.done() and not task.cancelled()]


def test_clients_take_turns_at_the_places() -> None:
    async def test() -> None:
        places = Places(2)
        tasks = [asyncio.create_task(places.take("many", 1)) for _ in range(6)]
        assert await settled(tasks) == [0, 1]
        tasks.append(asyncio.create_task(places.take("few", 1)))
        assert await settled(tasks) == [0, 1]
        for _ in range(2):
            places.leave(1)
        assert await settled(tasks) == [0, 1, 2, 6]

    run(test)


def test_a_request_of_more_images_than_places_takes_all_of_them() -> None:
    async def test() -> None:
        places = Places(4)
        assert await places.take("one", 1) == 1
        large, small = (asyncio.create_task(places.take("one", images)) for images in (1000, -5))
        assert await settled([large, small]) == []  # in their order
        places.leave(1)
        assert await settled([large, small]) == [0]
        places.leave(large.result())
        assert await small == 1

    run(test)


def test_a_request_that_is_given_up_frees_its_places() -> None:
    async def test() -> None:
        places = Places(1)
        await places.take("one", 1)
        waits, has_places, last = (asyncio.create_task(places.take("one", 1)) for _ in range(3))
        await settled([waits])
        waits.cancel()
        await settled([waits])
        places.leave(1)
        has_places.cancel()  # before it knows that it has them
        assert await settled([has_places]) == []
        assert await last == 1

    run(test)
