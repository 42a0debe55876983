"""Compressed messages of gRPC's own server, inflated here: its core would inflate any number of them at once."""

import asyncio
from collections.abc import Hashable

from serving.transport.messages import Inflation
from serving.transport.unpacking import Job, Unpacker

# No message of the services begins like a file of gzip, which would be a field of an impossible type, or like one of
# zlib, which would be a field 15.
_FIRST_BYTES = {b"\x1f\x8b": "gzip"} | dict.fromkeys((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), "deflate")


class MessageInflater:
    """The inflation of messages: small ones at once, large ones in few threads, in turns of the connections.

    A waiting message keeps its compressed bytes alone.

    max_bytes: the largest message, in bytes. limit_text: the text for a client that exceeds it. Only the event loop's
    thread may use it.
    """

    def __init__(self, max_bytes: int, limit_text: str) -> None:
        self._max_bytes = max_bytes
        self._limit_text = limit_text
        self._unpacker = Unpacker()

    async def inflated(self, data: bytes, connection: Hashable) -> bytes:
        """Return a message as it was before its compression. Raises MessageError."""
        encoding = _FIRST_BYTES.get(data[:2])
        if encoding is None:
            return data
        inflation = Inflation(data, encoding, self._max_bytes)
        rest = None if inflation.done else await self._rest(inflation, connection)
        return inflation.message(rest, self._limit_text)

    def close(self) -> None:
        """Give up all inflations, and end the threads."""
        self._unpacker.close()

    async def _rest(self, inflation: Inflation, connection: Hashable) -> bytes | None:
        """Inflate a large message in a thread. If the caller is cancelled, the thread stops soon."""
        outcome: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def done(rest: "asyncio.Future[bytes | None]") -> None:
            if not outcome.done():
                outcome.set_result(None if rest.cancelled() or rest.exception() else rest.result())

        job = Job(inflation, lambda: None, done)
        self._unpacker.unpack(connection, job)
        try:
            return await outcome
        finally:
            if not outcome.done() or outcome.cancelled():
                self._unpacker.give_up(connection, job)
