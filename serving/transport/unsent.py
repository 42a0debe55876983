"""The bytes in a socket's write buffer, as a holder of memory."""

import asyncio

from serving.transport.connection_limits import UNREAD, note_limit
from serving.transport.streams import Streams


class Unsent:
    """The bytes that a client's system has not taken yet (see serving.transport.memory.Holder).

    They wait for the client. So the connection ends if they make no progress, or if there is no room for them.
    """

    waits = False

    def __init__(self, streams: Streams, transport: asyncio.WriteTransport) -> None:
        self.held = 0
        #: The connection.
        self.owner = streams
        self._transport = transport

    def measure(self) -> None:
        """Count the bytes that are left now of earlier writes. The connection may end if there is no room for them."""
        size = self._transport.get_write_buffer_size()
        if size or self.held:
            self._count(size)
            memory = self.owner.memory
            if memory.used > memory.max_bytes:
                memory.make_room(self)

    def evict(self, stalled: bool) -> None:
        """End the connection, unless its client has taken bytes since they were measured."""
        size = self._transport.get_write_buffer_size()
        if size < self.held:
            self._count(size)
            return
        self.gone()
        note_limit(UNREAD, self.owner.limits, self.owner.client)
        self._transport.abort()

    def gone(self) -> None:
        """Release all bytes."""
        self.owner.memory.leave(self)

    def _count(self, size: int) -> None:
        """Count bytes as held. If there are others than before, the client makes progress."""
        memory = self.owner.memory
        if size != self.held or not self.waits:
            memory.hold(self, size - self.held)
            if size:
                memory.waits(self, self.owner.loop.time())
            else:
                memory.works(self)
