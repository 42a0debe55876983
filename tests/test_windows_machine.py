"""Flow control in any order of events: what is sent, as a client counts it (RFC 9113, sections 5.2 and 6.9)."""

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
from hpack import Decoder, Encoder
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.transport import frames
from serving.transport.frame_reader import FrameReader
from serving.transport.frames import ErrorCode
from serving.transport.memory import Memory
from serving.transport.methods import CallbackMethod, Context, Method, StreamMethod, TransportLimits
from serving.transport.sending import Buffers
from serving.transport.streams import Shared
from serving.transport.unpacking import Unpacker
from tests.machines import search
from tests.raw_client import HEADERS, data, framed, headers

LIMITS = TransportLimits(2**22, "", 2**26, "")
SIZES = st.sampled_from((0, 1, 4, 5, 100, 16379, 16380, 40_000, 70_000, 150_000))
WINDOWS = st.sampled_from((0, 1, 5, 6, 105, 16384, 65535, 2**18))


@dataclass
class Stream:
    """A stream as its client sees it.

    window: may be below 0. expected: None for an answer that is not made yet. many: True for a stream of answers.
    """

    window: int
    expected: bytes | None
    many: bool = False
    received: bytes = b""
    status: str | None = None
    reset: bool = False
    context: Context | None = None

    @property
    def over(self) -> bool:
        return self.reset or self.status is not None


class Link:
    """A connection without a socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sent = b""

    def send(self, data: bytes) -> None:
        self.sent += data

    def send_all(self, buffers: Buffers) -> None:
        self.sent += b"".join(buffers)

    def read_on(self) -> None: ...

    def drained(self) -> None: ...

    def all_over(self) -> None: ...


async def repeat(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    count, size = map(int, (await anext(requests)).split())
    for number in range(count):
        yield content(number, size)


def content(number: int, size: int) -> bytes:
    return bytes((number + 1,)) * size


class Windows(RuleBasedStateMachine):
    """A client that opens calls and windows in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.link = Link(self.loop)
        self.memory = Memory(LIMITS.bytes_under_way)
        methods: dict[str, Method] = {
            "/at-once": CallbackMethod(lambda request, context: context.answer(content(0, int(request)))),
            "/later": CallbackMethod(self.keep),
            "/repeat": StreamMethod(repeat),
        }
        self.reader = FrameReader(self.link, methods.get, Shared(LIMITS, self.memory, Unpacker()))
        self.encoder, self.decoder = Encoder(), Decoder()
        self.streams: dict[int, Stream] = {}
        self.left = self.initial = frames.DEFAULT_WINDOW
        self.kept: list[Context] = []

    def keep(self, request: bytes, context: Context) -> None:
        self.kept.append(context)

    @initialize(window=WINDOWS)
    def greet(self, window: int) -> None:
        self.initial = window
        self.receive(frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: window}))

    @rule(size=SIZES)
    def call(self, size: int) -> None:
        self.open("/at-once", str(size), framed(content(0, size)))

    @rule()
    def call_for_later(self) -> None:
        self.open("/later", "", None)
        self.open_streams()[-1].context = self.kept[-1]

    @rule(count=st.integers(0, 4), size=SIZES)
    def stream(self, count: int, size: int) -> None:
        expected = b"".join(framed(content(number, size)) for number in range(count))
        self.open("/repeat", f"{count} {size}", expected, many=True)

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        """Take no bytes from the server's system, or take them again."""
        self.reader.streams.paused = paused
        self.run()

    @precondition(lambda self: self.waiting())
    @rule(choice=st.integers(0, 50), size=SIZES, fails=st.booleans())
    def answer(self, choice: int, size: int, fails: bool) -> None:
        waiting = self.waiting()
        stream = waiting[choice % len(waiting)]
        assert stream.context
        if fails:
            stream.expected = b""
            stream.context.finish(grpc.StatusCode.NOT_FOUND)
        else:
            stream.expected = framed(content(0, size))
            stream.context.answer(content(0, size))
        self.run()

    @rule(window=WINDOWS)
    def set_initial_window(self, window: int) -> None:
        for stream in self.streams.values():
            stream.window += window - self.initial
        self.initial = window
        self.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: window}))

    @precondition(lambda self: self.open_streams())
    @rule(choice=st.integers(0, 50), more=WINDOWS.filter(bool))
    def widen(self, choice: int, more: int) -> None:
        number = self.choose(choice)
        self.streams[number].window += more
        self.receive(frames.window_update(number, more))

    @rule(more=WINDOWS.filter(bool))
    def widen_connection(self, more: int) -> None:
        self.left += more
        self.receive(frames.window_update(0, more))

    @precondition(lambda self: self.open_streams())
    @rule(choice=st.integers(0, 50), wrongly=st.booleans())
    def reset(self, choice: int, wrongly: bool) -> None:
        number = self.choose(choice)
        self.streams[number].reset = True
        self.receive(frames.window_update(number, 0) if wrongly else frames.reset(number, ErrorCode.CANCEL))

    @invariant()
    def all_is_sent_that_the_windows_allow(self) -> None:
        for stream in self.open_streams():
            if stream.many and self.reader.streams.paused:
                continue  # its next answer is not made before the client takes the ones that were sent
            if stream.expected is not None and len(stream.received) < len(stream.expected):
                assert min(stream.window, self.left) <= 0
            else:
                assert stream.expected is None, "an answer whose data have gone is not ended"

    @invariant()
    def what_is_held_is_counted(self) -> None:
        held = sum(call.held for call in self.reader.streams)
        assert self.memory.used == held >= 0
        assert len(self.reader.streams.calls) == len(self.open_streams())

    def teardown(self) -> None:
        for stream in self.waiting():
            assert stream.context
            stream.expected = framed(b"at last")
            stream.context.answer(b"at last")
        self.pause(False)
        self.widen_connection(2**24)
        self.set_initial_window(2**22)
        assert not self.open_streams() and not self.memory.used
        for stream in self.streams.values():
            assert stream.reset or stream.received == stream.expected
        self.loop.close()

    def open(self, path: str, request: str, expected: bytes | None, many: bool = False) -> None:
        number = 2 * len(self.streams) + 1
        self.streams[number] = Stream(self.initial, expected, many)
        fields = [(name, path if name == ":path" else value) for name, value in HEADERS]
        self.receive(headers(number, self.encoder.encode(fields)) + data(number, framed(request.encode())))

    def open_streams(self) -> list[Stream]:
        return [stream for stream in self.streams.values() if not stream.over]

    def waiting(self) -> list[Stream]:
        return [stream for stream in self.open_streams() if stream.expected is None]

    def choose(self, choice: int) -> int:
        """Return the number of an open stream."""
        numbers = [number for number, stream in self.streams.items() if not stream.over]
        return numbers[choice % len(numbers)]

    def receive(self, sent: bytes) -> None:
        self.reader.begin_turn()
        self.reader.receive(sent)
        while self.reader.unread:
            self.reader.begin_turn()
            self.reader.receive(b"")
        self.run()

    def run(self) -> None:
        """Give the server some turns of its event loop, and read what it has sent."""
        before = -1
        while len(self.link.sent) > before:
            before = len(self.link.sent)
            for _ in range(4):
                self.loop.run_until_complete(asyncio.sleep(0))
            self.reader.streams.sent_this_turn = 0
            for call in self.reader.streams:
                call.wake_writer()
        sent, self.link.sent = self.link.sent, b""
        while sent:
            high, low, kind, flags, number = frames.HEAD.unpack_from(sent)
            end = 9 + (high << 8 | low)
            self.read(kind, flags, number, sent[9:end])
            sent = sent[end:]

    def read(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Read a frame of the server."""
        assert kind != frames.GOAWAY and len(payload) <= frames.MAX_FRAME_BYTES
        if not number:
            return
        stream = self.streams[number]
        if kind == frames.RST_STREAM:
            assert struct.unpack(">I", payload)[0] in (ErrorCode.NO_ERROR, ErrorCode.PROTOCOL_ERROR)
            return
        assert not stream.over, "a frame of a stream that is over"
        if kind == frames.DATA:
            assert payload and stream.expected is not None
            stream.window -= len(payload)
            self.left -= len(payload)
            assert stream.window >= 0 and self.left >= 0
            stream.received += payload
            assert stream.expected.startswith(stream.received)
        elif kind == frames.HEADERS:
            fields = {str(name): str(value) for name, value in self.decoder.decode(payload)}
            if flags & frames.END_STREAM:
                stream.status = fields["grpc-status"]
                assert stream.received == stream.expected


def test_no_order_of_calls_and_windows_breaks_flow_control() -> None:
    search(Windows, examples=40)
