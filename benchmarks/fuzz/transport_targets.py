"""The readers of the transport: frames of a connection, header blocks, and messages."""

import asyncio
import logging
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from functools import cache
from urllib.parse import unquote

import grpc
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError

from benchmarks.fuzz.target import Parts, Target, pieces
from serving.transport import frames, headers, messages
from serving.transport.frame_reader import FrameReader, NotHttp2
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.headers import HeaderReader, MalformedRequest
from serving.transport.memory import Memory
from serving.transport.messages import MessageError, MessageReader
from serving.transport.methods import CallbackMethod, Context, Method, StreamMethod, TransportLimits, UnaryMethod
from serving.transport.sending import Buffers
from serving.transport.streams import Shared
from serving.transport.unpacking import Job, Unpacker

_LIMITS = TransportLimits(20_000, "too large", 200_000, "too many")
_FIELDS = [
    (":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "localhost"),
    ("content-type", "application/grpc"), ("te", "trailers"),
]  # fmt: skip
_KINDS = 12  # of frames, two of them unknown
# A field with a name of one byte and a value of 64 KiB. A decoder that takes it for fields finds an error at once.
_LARGE_FIELD = b"\0\1a\x7f\x81\xff\x03" + b"\x80" * headers.MAX_BYTES_DECODED
_TURNS = 3  # of the event loop, after which each handler has seen what came


class _Link:
    """A connection without a socket. sent: the bytes for the client."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sent: list[bytes | memoryview] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def send_all(self, buffers: Buffers) -> None:
        self.sent += buffers

    def read_on(self) -> None: ...

    def drained(self) -> None: ...

    def all_over(self) -> None: ...


class _InlineUnpacker(Unpacker):
    """An unpacker without threads, so that an input does the same at each run."""

    def unpack(self, connection: object, job: Job) -> None:
        job.ready()
        if not job.given_up:
            done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
            done.set_result(job.inflation.rest())
            job.done(done)


class _Faults(logging.Handler):
    """The faults that the transport logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


async def _echo_all(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _wait(request: bytes, context: Context) -> bytes:
    await asyncio.sleep(3600)
    return b""


_METHODS: dict[str, Method] = {
    "/a": CallbackMethod(lambda request, context: context.answer(request)),
    "/b": StreamMethod(_echo_all),
    "/c": UnaryMethod(_wait),
}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _faults() -> _Faults:
    faults, logger = _Faults(), logging.getLogger("serving.transport")
    logger.addHandler(faults)
    logger.propagate = False
    return faults


def _frames(parts: Parts) -> bytes:
    """Return frames whose lengths are right: type, flags, stream and length take a byte each."""
    made: list[bytes] = []
    while parts:
        kind, flags, stream = parts.number() % _KINDS, parts.number(), parts.number()
        made.append(frames.frame(kind, flags, stream, parts.take(parts.number())))
    return b"".join(made)


def run_frames(data: bytes) -> None:
    """Read the bytes of a client, and check what it is sent."""
    parts = Parts(data)
    mode, size = parts.number(), parts.number()
    sent = _frames(parts) if mode & 1 else parts.rest()
    if not mode & 2:
        sent = frames.PREFACE + frames.settings({}) + sent
    _loop().run_until_complete(_read(pieces(sent, size)))
    faults = _faults()
    found, faults.records = faults.records, []
    assert not found, found[0].getMessage()


async def _read(received: Sequence[bytes]) -> None:
    link, memory = _Link(asyncio.get_running_loop()), Memory(_LIMITS.bytes_under_way)
    reader = FrameReader(link, _METHODS.get, Shared(_LIMITS, memory, _InlineUnpacker()))
    try:
        for piece in received:
            reader.receive(piece)
            while reader.unread:
                reader.begin_turn()
                reader.receive(b"")
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        reader.check_headers(link.loop.time() + 3600)
    except (ConnectionFault, NotHttp2):
        pass
    assert memory.used == sum(getattr(call, "held", 0) for call in reader.streams)
    for call in reader.streams:
        call.abandon()
    await asyncio.sleep(0)
    assert not memory.used and not reader.streams.calls
    _check_frames(b"".join(link.sent))


def _check_frames(sent: bytes) -> None:
    """Check that a client can read what this server has sent."""
    decoder, ended = Decoder(), set[int]()
    while sent:
        high, low, kind, flags, stream = frames.HEAD.unpack_from(sent)
        end = frames.HEAD.size + (high << 8 | low)
        payload, sent = sent[frames.HEAD.size : end], sent[end:]
        assert len(payload) == (high << 8 | low) <= frames.MAX_FRAME_BYTES
        if kind in (frames.HEADERS, frames.DATA):
            assert stream % 2 and stream not in ended
            if kind == frames.HEADERS:
                assert flags & frames.END_HEADERS and decoder.decode(payload)
            if flags & frames.END_STREAM:
                ended.add(stream)
        elif kind == frames.RST_STREAM:
            ErrorCode(struct.unpack(">I", payload)[0])
            ended.add(stream)


def _seeds_of_frames() -> list[bytes]:
    encoder = Encoder()

    def call(stream: int, path: str, *more: tuple[str, str]) -> bytes:
        fields = [(name, path if name == ":path" else value) for name, value in _FIELDS]
        return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, encoder.encode([*fields, *more]))

    message = struct.pack(">BI", 0, 3) + b"abc"
    deflated = zlib.compress(bytes(5000))
    packed = struct.pack(">BI", 1, len(deflated)) + deflated
    end = frames.END_STREAM
    calls = [call(1, "/a"), frames.frame(frames.DATA, end, 1, message), call(3, "/b")]
    calls += [frames.frame(frames.DATA, 0, 3, message * 2), frames.settings({4: 3, 1: 0}), frames.window_update(3, 9)]
    calls += [call(5, "/a", ("grpc-encoding", "deflate")), frames.frame(frames.DATA, end, 5, packed), call(7, "/c")]
    calls += [frames.frame(frames.DATA, end, 7, message), frames.reset(7, ErrorCode.CANCEL), frames.window_update(0, 5)]
    calls += [frames.frame(frames.PING, 0, 0, b"12345678"), call(9, "/nothing"), frames.go_away(0, ErrorCode.NO_ERROR)]
    blocks = [bytes((1, 0x04, stream, len(block))) + block for stream, block in ((1, encoder.encode(_FIELDS)),)]
    compact = blocks[0] + bytes((0, 1, 1, 8)) + message + bytes((9, 4, 1, 0)) + bytes((8, 0, 0, 4, 0, 0, 0, 9))
    return [
        b"\0\0" + b"".join(calls),
        b"\0\7" + b"".join(calls[:5]),
        b"\2\0" + frames.PREFACE + frames.settings({}) + calls[0],
        b"\2\0GET / HTTP/1.1\r\n\r\n",
        b"\1\0" + compact,
    ]


def run_headers(data: bytes) -> None:
    """Read header blocks, and compare the table with that of another decoder. Write a text as a status."""
    parts = Parts(data)
    reader: HeaderReader[str] = HeaderReader({"/a": "a"}.get)
    full = Decoder(2**24)
    full_is_right = large = True
    while parts:
        mode = parts.number()
        block = parts.take(parts.number() << 8 | parts.number())
        if mode & 4:
            _check_status(block)
            continue
        if mode & 8 and large:  # so large that only the parts for the table are decoded; once, since it takes long
            large = False
            block += _LARGE_FIELD
        try:
            full.decode(block, raw=True)
        except HPACKError:
            full_is_right = False
        if not _read_block(reader, mode, block):
            return
        if full_is_right:
            mine, other = reader._decoder.header_table, full.header_table
            assert list(mine.dynamic_entries) == list(other.dynamic_entries) and mine.maxsize == other.maxsize


def _read_block(reader: HeaderReader[str], mode: int, block: bytes) -> bool:
    """Read a block in one of three ways. Return False if its connection ends."""
    try:
        if mode % 4 == 1:
            reader.skip(block)
        elif mode % 4 == 2:
            reader.trailers(block)
        else:
            head = reader.read(block)
            assert head.http_status in (200, 405, 415) and (not head.acceptable or head.path == "/a")
            assert head.timeout is None or 0 <= head.timeout < 1e12
    except MalformedRequest:
        pass
    except ConnectionFault:
        return False
    return True


def _check_status(text: bytes) -> None:
    """Check that any text can be a status, and comes out as it was."""
    shown = text.decode(errors="surrogateescape")
    block = headers.status_block(grpc.StatusCode.INTERNAL, shown)
    fields = dict(Decoder(2**24).decode(block, raw=True))
    message = fields.get(b"grpc-message", b"")
    assert not set(message) - set(range(0x20, 0x7F))
    if shown.isprintable():
        assert unquote(message.decode()) == shown


def _seeds_of_headers() -> list[bytes]:
    encoder = Encoder()

    def block(mode: int, *more: tuple[str, str], fields: Sequence[tuple[str, str]] = _FIELDS) -> bytes:
        coded = encoder.encode([*fields, *more])
        return bytes((mode, len(coded) >> 8, len(coded) & 255)) + coded

    seeds = [block(0, ("grpc-timeout", "10m"), ("key", "value"), ("key-bin", "AAE"))]
    seeds.append(block(0) + block(1, ("a", "b")) + block(2, ("x", "y"), fields=[]) + block(8, ("large", "one")))
    encoder.header_table_size = 100
    seeds.append(block(0, ("content-length", "5"), ("host", "localhost")) + b"\4\0\6caf\xc3\xa9%")
    return seeds


def run_messages(data: bytes) -> None:
    """Read messages at once and in pieces, with the same result."""
    parts = Parts(data)
    encoding = ("identity", "gzip", "deflate")[parts.number() % 3]
    size = parts.number() or 1
    body = b"".join(_bodies(parts, encoding))
    at_once, in_pieces = _messages([body], encoding), _messages(pieces(body, size), encoding)
    assert at_once[1:] == in_pieces[1:]
    assert at_once[0] == in_pieces[0] or at_once[1] is not None
    if (alone := messages.whole(body)) is not None and len(alone) <= _LIMITS.message_bytes:
        assert at_once[0] == [alone]


def _bodies(parts: Parts, encoding: str) -> list[bytes]:
    """Return the bytes of messages, right or wrong."""
    bodies: list[bytes] = []
    while parts:
        mode, content = parts.number() % 4, parts.take(parts.number())
        if mode == 0:
            bodies.append(content)
            continue
        if mode >= 2 and encoding != "identity":
            compressor = zlib.compressobj(wbits=messages.ENCODINGS[encoding])
            content = compressor.compress(content * (300 if mode == 3 else 1)) + compressor.flush()
        bodies.append(struct.pack(">BI", mode >= 2, len(content)) + content)
    return bodies


def _messages(received: Sequence[bytes], encoding: str) -> tuple[list[bytes], object, bool]:
    """Return the messages of bytes, the code of their error or None, and True if the last message is complete."""
    reader = MessageReader(_LIMITS.message_bytes, "too large", encoding)
    found: list[bytes] = []
    try:
        for piece in received:
            found += reader.feed(piece)
        while reader.inflation:
            inflation = reader.inflation
            rest = inflation.rest()
            assert rest is None or len(rest) <= inflation.max_rest + 1
            found += reader.inflated(rest)
    except MessageError as error:
        return found, error.code, False
    assert all(len(message) <= _LIMITS.message_bytes for message in found)
    return found, None, not reader.buffered


def _seeds_of_messages() -> list[bytes]:
    return [
        b"\0\3\1\5hello\1\0\0\4\0\0\0\0",
        b"\1\4\2\5hello\3\310" + bytes(200) + b"\1\3abc",
        b"\2\0\3\1a\3\377" + bytes(255),
        b"\1\0\0\5\1\0\0\0\2ab",
    ]


TARGETS = (
    Target("frames", run_frames, _seeds_of_frames),
    Target("headers", run_headers, _seeds_of_headers),
    Target("messages", run_messages, _seeds_of_messages),
)
