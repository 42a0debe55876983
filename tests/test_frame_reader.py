"""Frames of one connection without a socket: how much of them is read before other connections have their turn."""

import asyncio
from collections.abc import AsyncIterator

from hpack import Encoder

from serving.transport import frames
from serving.transport.frame_reader import FrameReader
from serving.transport.memory import Memory
from serving.transport.methods import Context, StreamMethod, TransportLimits
from serving.transport.sending import Buffers
from tests.raw_client import HEADERS, headers, literal

CALLS = 50


class FakeLink:
    """Takes what is sent, and forgets it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def send(self, data: bytes) -> None: ...

    def send_all(self, buffers: Buffers) -> None: ...

    def drained(self) -> None: ...

    def all_over(self) -> None: ...


async def nothing(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


def test_many_headers_are_read_in_turns_and_all_in_their_order() -> None:
    encoder = Encoder()
    calls = [
        headers(stream, encoder.encode([*HEADERS, ("key", str(stream))]) + literal("a", "b") * 100)
        for stream in range(1, 2 * CALLS, 2)
    ]

    async def main() -> None:
        limits = TransportLimits(2**20, "", 2**28, "")
        find = {"/test.Test/Echo": StreamMethod(nothing)}.get
        reader = FrameReader(FakeLink(), find, limits, Memory(limits.bytes_under_way))
        reader.receive(frames.PREFACE + frames.settings({}))
        assert not reader.unread
        reader.receive(b"".join(calls))
        opened = [len(reader.streams.calls)]
        while reader.unread:
            reader.receive(b"")
            opened.append(len(reader.streams.calls))
        assert opened[-1] == CALLS
        assert max(after - before for before, after in zip([0, *opened[:-1]], opened, strict=True)) <= 12
        assert list(reader.streams.calls) == list(range(1, 2 * CALLS, 2))
        for call in reader.streams:
            call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())
