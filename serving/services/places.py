"""The places of requests that wait for their computation and are not refused: those of streams."""

import asyncio
from collections.abc import Hashable

from serving.batching.turns import Turns


class _Waiting:
    """A request without a place. come: done once it has one."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.come: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Places:
    """A limited number of places for images, at which clients take turns.

    limit: the most images that have places; a request of more takes all places.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._line: Turns[_Waiting] = Turns()

    async def take(self, client: Hashable, images: int) -> int:
        """Wait for places for a client's images. Return the number of places, for ``leave``."""
        waiting = _Waiting(min(max(1, images), self._limit))
        self._line.push(client, waiting)
        self._go_on()
        try:
            await waiting.come
        except asyncio.CancelledError:
            self._line.remove(client, waiting)
            # It may have got its places in the same turn of the event loop.
            self.leave(0 if waiting.come.cancelled() else waiting.images)
            raise
        return waiting.images

    def leave(self, places: int) -> None:
        """Free places."""
        self._taken -= places
        self._go_on()

    def _go_on(self) -> None:
        """Give places to the next ones, as far as they are free."""
        while (waiting := self._line.first()) and self._taken + waiting.images <= self._limit:
            self._line.give(waiting.images, done=True)
            if not waiting.come.done():
                self._taken += waiting.images
                waiting.come.set_result(None)
