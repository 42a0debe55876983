"""The bytes of a connection that have come and are not read yet, as a holder of memory."""

import asyncio
from collections.abc import Callable

from serving.transport.memory import Memory, Owner

# Fewer do not count: they are as many as a connection takes beside them, and most requests have no more.
_MIN_BYTES = 16384


class Backlog:
    """The bytes that a server has taken from its system and leaves for later (see serving.transport.memory.Holder).

    Others have their turn first, or the client must read answers first, or it has sent a request before the answer to
    its last one. The connection ends if there is no room for them, after its calls that wait for its client.

    owner: the connection. end: ends it.
    """

    waits = False

    def __init__(self, memory: Memory, owner: Owner, end: Callable[[], object]) -> None:
        self.held = 0
        self.owner = owner
        self._memory = memory
        self._end = end

    def measure(self, size: int) -> None:
        """Count the bytes that wait now. The connection may end if there is no room for them."""
        counted = size if size >= _MIN_BYTES else 0
        if counted == self.held:
            return
        memory = self._memory
        memory.hold(self, counted - self.held)
        if not counted:
            memory.works(self)
            return
        memory.waits(self, asyncio.get_running_loop().time())
        if memory.used > memory.max_bytes:
            memory.make_room(self)

    def evict(self, stalled: bool) -> None:
        """End the connection for want of room, unless something else of it waits for its client, and goes first.

        What waits for long may wait for an answer that takes long.
        """
        if stalled:
            return
        if self._memory.any_waits(self.owner):
            self._memory.waits(self, asyncio.get_running_loop().time())
            return
        self.gone()
        self._end()

    def gone(self) -> None:
        """Release all bytes."""
        self._memory.leave(self)
