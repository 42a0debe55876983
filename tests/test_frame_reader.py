"""Frames of one connection without a socket: how much of them is read before other connections have their turn."""

import asyncio
import struct
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from typing import Any, cast

import pytest
from hpack import Encoder

from serving.transport import frames, receiving, turn_clock
from serving.transport.connection import Connection
from serving.transport.connection_limits import UNREAD
from serving.transport.frame_reader import FrameReader
from serving.transport.frames import ConnectionFault
from serving.transport.memory import Memory
from serving.transport.methods import Context, StreamMethod, TransportLimits
from serving.transport.rounds import TURN_SECONDS
from serving.transport.sending import Buffers
from serving.transport.streams import Shared
from serving.transport.terms import Terms
from serving.transport.unpacking import Unpacker
from tests.raw_client import HEADERS, data, framed, headers, literal

CALLS = 50


PINGS = 2000
LIMITS = TransportLimits(2**20, "", 2**28, "")


class FakeLink:
    """Counts what is sent, and forgets it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sent = 0

    def send(self, data: bytes) -> None:
        self.sent += 1

    def send_all(self, buffers: Buffers) -> None: ...

    def read_on(self) -> None: ...

    def drained(self) -> None: ...

    def all_over(self) -> None: ...


async def nothing(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


def find(path: str) -> StreamMethod | None:
    return StreamMethod(nothing) if path == "/test.Test/Echo" else None


def new_reader(link: FakeLink) -> FrameReader:
    """Return a reader after the client's greeting."""
    reader = FrameReader(link, find, Shared(LIMITS, Memory(LIMITS.bytes_under_way), Unpacker()))
    reader.receive(frames.PREFACE + frames.settings({}))
    while reader.unread:
        reader.begin_turn()
        reader.receive(b"")
    link.sent = 0
    return reader


def steps(reader: FrameReader, sent: bytes, measured: Callable[[], int]) -> list[int]:
    """Return how much each turn adds to a figure."""
    values = [measured()]
    reader.receive(sent)
    values.append(measured())
    while reader.unread:
        reader.begin_turn()
        reader.receive(b"")
        values.append(measured())
    return [after - before for before, after in pairwise(values)]


def test_a_turn_with_a_long_step_has_an_overdraft_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        reader = new_reader(FakeLink())
        for clock in ("perf_counter", "thread_time"):
            monkeypatch.setattr(turn_clock, clock, partial(next, iter([0.0, *[0.05] * 20])))
        reader.begin_turn()
        reader.receive(frames.settings({}) * 2)
        assert reader.unread
        assert reader.clock.overdraft == pytest.approx(0.05 - 2 * TURN_SECONDS)
        reader.begin_turn()
        assert reader.clock.overdraft == 0.0
        reader.receive(b"")
        assert (reader.unread, reader.clock.overdraft) == (False, 0.0)

    asyncio.run(main())


def test_many_headers_are_read_in_turns_and_all_in_their_order() -> None:
    encoder = Encoder()
    calls = [
        headers(stream, encoder.encode([*HEADERS, ("key", str(stream))]) + literal("a", "b") * 100)
        for stream in range(1, 2 * CALLS, 2)
    ]

    async def main() -> None:
        reader = new_reader(FakeLink())
        reader.receive(b"".join(calls))
        opened = [len(reader.streams.calls)]
        while reader.unread:
            reader.begin_turn()
            reader.receive(b"")
            opened.append(len(reader.streams.calls))
        assert opened[-1] == CALLS
        assert max(after - before for before, after in zip([0, *opened[:-1]], opened, strict=True)) <= 12
        assert list(reader.streams.calls) == list(range(1, 2 * CALLS, 2))
        for call in reader.streams:
            call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_large_data_are_read_in_turns_of_half_a_megabyte_at_most() -> None:
    message, encoder = framed(bytes(250_000)), Encoder()
    sent = b""
    for stream in range(1, 16, 2):
        sent += headers(stream, encoder.encode(HEADERS))
        sent += b"".join(data(stream, message[at : at + 16384], 0) for at in range(0, len(message), 16384))

    async def main() -> None:
        reader = new_reader(FakeLink())
        memory = reader.streams.memory
        read = steps(reader, sent, lambda: memory.used)
        assert len(read) >= 4 and max(read) <= 2**19
        assert memory.used >= 8 * 250_000
        for call in reader.streams:
            call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_small_frames_are_read_in_turns_and_all_are_answered() -> None:
    async def main() -> None:
        link = FakeLink()
        answered = steps(new_reader(link), frames.frame(frames.PING, 0, 0, bytes(8)) * PINGS, lambda: link.sent)
        assert sum(answered) == PINGS and max(answered) <= 200

    asyncio.run(main())


def test_a_turn_ends_after_two_milliseconds_whatever_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(turn_clock, name, lambda: next(clock) * 0.0003)

    async def main() -> None:
        link = FakeLink()
        answered = steps(new_reader(link), frames.frame(frames.PING, 0, 0, bytes(8)) * 30, lambda: link.sent)
        assert sum(answered) == 30 and max(answered) <= 7

    asyncio.run(main())


def test_a_turn_ends_after_a_frame_of_many_messages() -> None:
    sent = headers(1, Encoder().encode(HEADERS))
    sent += data(1, framed(bytes(59)) * 256, 0) * 12

    async def main() -> None:
        reader = new_reader(FakeLink())
        read = steps(reader, sent, lambda: reader.streams.memory.used)
        assert len(read) >= 12
        [call] = reader.streams
        call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_frame_that_takes_several_turns_is_followed_by_as_many_of_the_others() -> None:
    """So a connection gets no more than its turns, although a frame is read whole."""
    sent = headers(1, Encoder().encode(HEADERS)) + data(1, framed(bytes(35)) * 400, 0) * 4

    async def main() -> None:
        reader = new_reader(FakeLink())
        grown = steps(reader, sent, lambda: reader.streams.memory.used)
        assert sum(one > 0 for one in grown) <= 5
        assert sum(one == 0 for one in grown) > 20
        [call] = reader.streams
        call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_handler_leaves_the_loop_to_others_after_two_milliseconds_of_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, read = count(), 0
    monkeypatch.setattr(receiving, "perf_counter", lambda: next(clock) * 0.0003)

    async def reading(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        nonlocal read
        async for _ in requests:
            read += 1
        yield b""

    async def main() -> None:
        nonlocal read
        method, link = StreamMethod(reading), FakeLink()
        reader = FrameReader(link, lambda _: method, Shared(LIMITS, Memory(LIMITS.bytes_under_way), Unpacker()))
        reader.receive(frames.PREFACE + frames.settings({}) + headers(1, Encoder().encode(HEADERS)))
        reader.receive(data(1, framed(bytes(50)) * 100))
        while reader.unread:
            reader.begin_turn()
            reader.receive(b"")
        a_turn = []
        while read < 100:
            before = read
            await asyncio.sleep(0)
            a_turn.append(read - before)
        assert max(a_turn) <= 8

    asyncio.run(main())


def test_messages_that_are_too_small_for_a_request_end_the_connection_in_the_end() -> None:
    encoder = Encoder()

    async def main() -> None:
        reader = new_reader(FakeLink())
        with pytest.raises(ConnectionFault, match="too many frames that bring no call further"):
            for stream in range(1, 20, 2):
                reader.receive(headers(stream, encoder.encode(HEADERS)))
                for _ in range(16):  # as many as a window takes
                    reader.receive(data(stream, framed(b"") * 3200, 0))
                    while reader.unread:
                        reader.begin_turn()
                        reader.receive(b"")
        for call in reader.streams:
            call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_request_whose_rest_is_read_in_a_later_turn_does_not_wait_for_its_client() -> None:
    block = Encoder().encode(HEADERS)
    half = data(1, struct.pack(">BI", 0, 100_000) + bytes(100), 0)

    async def main() -> None:
        reader = new_reader(FakeLink())
        reader.receive(headers(1, block) + half + frames.frame(frames.PING, 0, 0, bytes(8)) * PINGS + half[:20])
        turns = 0
        while reader.unread:
            turns += 1
            reader.begin_turn()
            reader.receive(b"")
        assert turns > 5
        reader.receive(half[20:])  # a frame whose beginning waited in an earlier turn's bytes
        [call] = reader.streams
        assert cast(Any, call).held > 200
        call.abandon()
        await asyncio.sleep(0)

    asyncio.run(main())


class FakeTransport:
    """Notes whether reading is paused. unsent: the bytes in its write buffer."""

    def __init__(self) -> None:
        self.reading = True
        self.turns = self.unsent = 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.turns += 1

    def abort(self) -> None:
        self.unsent = 0

    def close(self) -> None: ...


def connected(lost: Callable[[Connection], None], limits: TransportLimits = LIMITS) -> tuple[Connection, FakeTransport]:
    """Return a connection after the client's greeting, and its transport."""
    memory = Memory(limits.bytes_under_way)
    terms: Terms[Connection] = Terms(limits, memory, Unpacker(), find, lambda *_: True, lost, 600.0, 0.0)
    connection, transport = Connection(terms, asyncio.get_running_loop()), FakeTransport()
    connection.connection_made(cast(asyncio.Transport, transport))
    connection.data_received(frames.PREFACE + frames.settings({}))
    return connection, transport


def test_a_connection_is_not_read_from_until_all_that_came_has_had_its_turn() -> None:
    async def main() -> None:
        lost: list[object] = []
        connection, transport = connected(lost.append)
        await asyncio.sleep(0)
        assert transport.reading
        connection.data_received(frames.frame(frames.PING, 0, 0, bytes(8)) * PINGS)
        assert not transport.reading
        transport.turns = turns = 0
        while not transport.reading:
            turns += 1
            await asyncio.sleep(0)
        assert transport.turns >= turns - 1 > 5, "others had their turn between, and answers left meanwhile"
        connection.connection_lost(None)
        assert lost == [connection]

    asyncio.run(main())


def test_of_a_client_that_sends_on_and_reads_nothing_it_is_noted_that_it_does_not_read() -> None:
    async def main() -> None:
        noted: list[str] = []
        limits = replace(LIMITS, bytes_under_way=2**17, limited=noted.append)
        connection, transport = connected(lambda _: None, limits)
        connection.data_received(frames.frame(frames.PING, 0, 0, bytes(8)) * PINGS)
        assert not transport.reading
        transport.unsent = 2**18
        connection.pause_writing()
        assert noted == [UNREAD]
        connection.connection_lost(None)

    asyncio.run(main())


@pytest.mark.parametrize("end", ["quiet", "with an open call", "while data waits to be sent", "after a fault"])
def test_a_lost_connection_goes_without_the_garbage_collector(no_collection: None, end: str) -> None:
    async def main() -> None:
        connection, transport = connected(lambda _: None)
        gone = weakref.ref(connection), weakref.ref(transport)
        if end == "with an open call":
            connection.data_received(headers(1, Encoder().encode(HEADERS)))
        elif end == "after a fault":
            connection.data_received(frames.frame(frames.PING, 0, 1, bytes(8)))
        if end != "while data waits to be sent":
            await asyncio.sleep(0)
        connection.connection_lost(None)
        del connection, transport
        for _ in range(10):  # the handler of an open call ends, and the timers of the event loop
            await asyncio.sleep(0)
        assert [reference() for reference in gone] == [None, None]

    asyncio.run(main())


def test_what_a_handler_keeps_counts_and_ends_its_call_if_there_is_no_room() -> None:
    contexts: list[Context] = []

    async def keeping(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        contexts.append(context)
        async for request in requests:
            yield request

    async def main() -> None:
        memory = Memory(2**20)
        reader = FrameReader(FakeLink(), lambda _: StreamMethod(keeping), Shared(LIMITS, memory, Unpacker()))
        reader.receive(frames.PREFACE + frames.settings({}))
        reader.receive(headers(1, Encoder().encode(HEADERS)))
        await asyncio.sleep(0.01)
        before = memory.used
        contexts[0].keep(2**19)
        assert memory.used == before + 2**19
        contexts[0].keep(-(2**18))
        assert memory.used == before + 2**18
        contexts[0].keep(2**20)
        assert contexts[0].over
        assert memory.used == 0
        contexts[0].keep(-(2**18))
        assert memory.used == 0
        await asyncio.sleep(0)

    asyncio.run(main())


def test_the_bytes_that_are_left_for_later_turns_are_known_and_can_be_forgotten() -> None:
    async def main() -> None:
        reader = new_reader(FakeLink())
        reader.begin_turn()
        sent = frames.frame(frames.PING, 0, 0, bytes(8)) * PINGS
        reader.receive(sent)
        before = reader.unread_bytes
        assert 0 < before < len(sent)
        reader.begin_turn()
        reader.receive(b"")
        assert 0 < reader.unread_bytes < before
        reader.forget_unread()
        reader.begin_turn()
        reader.receive(b"")
        assert (reader.unread_bytes, reader.unread) == (0, False)

    asyncio.run(main())
