"""The gRPC server of serving/transport by itself: gRPC's client on one side, frames made by hand on the other."""

import asyncio
import gzip
import random
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, TrailersReceived
from hpack import Decoder, Encoder

from serving.transport import call as calls
from serving.transport import frames
from serving.transport.call import WINDOW, Budget, Limits
from serving.transport.connection import MOST_CALLS
from serving.transport.frames import ErrorCode
from serving.transport.headers import RequestHead, status_block
from serving.transport.server import GrpcServer

MOST_BYTES = 2**20
BUDGET = 4 * 2**20
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Test/Echo"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


class Handlers:
    """What the tests call. cancelled: set when a handler is. metadata: of the last call."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.started = threading.Event()
        self.metadata: dict[str, str | bytes] = {}
        self.remaining: float | None = None

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.deadline and context.deadline - time.monotonic()
        return request

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.started.set()
        try:
            await asyncio.sleep(float(request))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b"awake"

    async def answer(self, request: bytes, context: Any) -> None:
        await asyncio.sleep(0)
        context.answer(request)

    def answer_at_once(self, request: bytes, context: Any) -> None:
        context.answer(request)

    def answer_later(self, request: bytes, context: Any) -> None:
        context.given_up = self.cancelled.set
        asyncio.get_running_loop().call_later(float(request), lambda: context.answer(b"awake"))
        self.started.set()

    def fail_at_once(self, request: bytes, context: Any) -> None:
        raise RuntimeError("/a/secret/path")

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("/a/secret/path")

    async def refuse(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "ünknown\n100 %", (("key", "value"), ("key-bin", b"\0\xff")))
        raise AssertionError

    async def repeat(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, _, size = request.partition(b" ")
        for _ in range(int(count)):
            yield bytes(int(size))

    async def repeat_by_writing(self, request: bytes, context: Any) -> None:
        for _ in range(3):
            await context.write(request)

    async def join(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def echo_all(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.started.set()
        try:
            async for request in requests:
                yield request
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def never_read(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    def generic(self) -> "grpc.GenericRpcHandler[bytes, bytes]":
        self.door: bytes | None = None
        self.expected: list[int] = []

        def guarded(request: bytes, context: Any) -> None:
            context.answer(request)

        def door(head: RequestHead[Any], expected: int) -> bytes | None:
            self.expected.append(expected)
            return self.door

        guarded.door = door  # type: ignore[attr-defined]
        unary, many = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            "test.Test",
            {
                "Echo": unary(self.echo),
                "Wait": unary(self.wait),
                "Answer": unary(self.answer),
                "AnswerAtOnce": unary(self.answer_at_once),
                "AnswerLater": unary(self.answer_later),
                "Guarded": unary(guarded),
                "Fail": unary(self.fail),
                "FailAtOnce": unary(self.fail_at_once),
                "Refuse": unary(self.refuse),
                "Parse": unary(self.echo, request_deserializer=lambda data: bytes([int(data)])),
                "Repeat": grpc.unary_stream_rpc_method_handler(self.repeat),
                "RepeatByWriting": grpc.unary_stream_rpc_method_handler(self.repeat_by_writing),
                "Join": grpc.stream_unary_rpc_method_handler(self.join),
                "EchoAll": many(self.echo_all),
                "NeverRead": many(self.never_read),
            },
        )


class Serving(NamedTuple):
    server: GrpcServer
    handlers: Handlers
    port: int
    loop: asyncio.AbstractEventLoop
    budget: Budget
    refused: list[tuple[str, grpc.StatusCode, str]]

    @property
    def channel(self) -> Any:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def stop(self, grace: float) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop).result(20)


@contextmanager
def serve(**options: float) -> Iterator[Serving]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    budget = Budget(BUDGET)

    async def start() -> Serving:
        refused: list[tuple[str, grpc.StatusCode, str]] = []
        limits = Limits(
            MOST_BYTES, "too large", budget, "too many", lambda path, _, code, text: refused.append((path, code, text))
        )
        server, handlers = GrpcServer(limits, **options), Handlers()
        server.add_generic_rpc_handlers((handlers.generic(),))
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        return Serving(server, handlers, port, loop, budget, refused)

    try:
        serving = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield serving
        serving.stop(0)
        assert budget.used == 0, "bytes of calls that are over still count"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def serving() -> Iterator[Serving]:
    with serve() as running:
        yield running


class Answer:
    """What came for one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.data):
            (size,) = struct.unpack_from(">I", self.data, at + 1)
            found.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return found


class Raw:
    """A client that sends what it is told to, right or wrong."""

    def __init__(self, port: int, preface: bytes = frames.PREFACE, settings: dict[int, int] | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.went_away: list[tuple[int, ErrorCode, bytes]] = []
        self.pings: list[bytes] = []
        self.updates: dict[int, int] = defaultdict(int)
        self.closed = False
        self._received = b""
        self.send(preface + frames.settings(settings or {}))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def block(self, path: str = "/test.Test/Echo", *more: tuple[str, str], without: tuple[str, ...] = ()) -> bytes:
        named = dict(more)
        fields = [(name, named.pop(name, value)) for name, value in HEADERS if name not in without]
        fields = [(name, path if name == ":path" else value) for name, value in fields]
        block: bytes = self.encoder.encode([*fields, *named.items()])
        return block

    def call(self, stream: int, message: bytes, path: str = "/test.Test/Echo", *more: tuple[str, str]) -> None:
        self.send(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, self.block(path, *more)))
        self.send_data(stream, framed(message))

    def send_data(self, stream: int, sent: bytes) -> None:
        """As the last data of the stream."""
        for at in range(0, len(sent), frames.MOST_BYTES):
            last = at + frames.MOST_BYTES >= len(sent)
            self.send(data(stream, sent[at : at + frames.MOST_BYTES], frames.END_STREAM if last else 0))

    def read(self, stream: int | None = None) -> Answer:
        """Until the stream, or else the connection, has ended."""
        while not self.closed and not (
            stream and (self.answers[stream].ended or self.answers[stream].reset is not None)
        ):
            self.read_some()
        return self.answers[stream or 0]

    def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.closed, self.went_away
            self.read_some()

    def read_some(self) -> None:
        try:
            data = self.socket.recv(2**16)
        except ConnectionResetError:
            data = b""
        self.closed = not data
        self._received += data
        while len(self._received) >= 9:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(self._received)
            end = 9 + (high << 8 | low)
            if len(self._received) < end:
                break
            payload, self._received = self._received[9:end], self._received[end:]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        answer = self.answers[stream] if stream else Answer()
        if kind == frames.HEADERS:
            assert flags & frames.END_HEADERS
            answer.headers |= {str(name): str(value) for name, value in self.decoder.decode(payload)}
        elif kind == frames.DATA:
            answer.data += payload
        elif kind == frames.RST_STREAM:
            answer.reset = frames.read_number(payload, "RST_STREAM")
        elif kind == frames.GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            self.went_away.append((last, ErrorCode(code), payload[8:]))
        elif kind == frames.PING:
            self.pings.append(payload)
            if not flags & frames.ACK:
                self.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.WINDOW_UPDATE:
            self.updates[stream] += frames.read_number(payload, "WINDOW_UPDATE")
        if kind in (frames.HEADERS, frames.DATA) and flags & frames.END_STREAM:
            answer.ended = True

    def why_closed(self) -> ErrorCode:
        self.read()
        return self.went_away[-1][1]


@pytest.fixture
def raw(serving: Serving) -> Iterator[Raw]:
    client = Raw(serving.port)
    yield client
    client.socket.close()


def framed(message: bytes, compressed: bool = False) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def headers(stream: int, block: bytes, flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream, block)


def data(stream: int, payload: bytes, flags: int = frames.END_STREAM) -> bytes:
    return frames.frame(frames.DATA, flags, stream, payload)


def failure(call: Any, request: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=options.pop("timeout", 10), **options)
    error: grpc.RpcError = caught.value
    return error


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)


# gRPC's own client


@pytest.mark.parametrize("size", [0, 1, 784, 16379, 16380, 65530, 65536, 300_000, MOST_BYTES])
def test_messages_of_every_size_come_back_whole(serving: Serving, size: int) -> None:
    message = random.Random(size).randbytes(size)
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(message, timeout=10) == message


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_read(serving: Serving, compression: grpc.Compression) -> None:
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(bytes(5000), compression=compression, timeout=10) == bytes(5000)


@pytest.mark.parametrize("size", [60_000, 70_000, 900_000])
def test_compressed_messages_keep_their_order_though_large_ones_are_unpacked_in_a_thread(
    serving: Serving, size: int
) -> None:
    requests = [b"%d " % index * (size // 8 if index % 3 == 0 else 3) for index in range(20)]
    with serving.channel as channel:
        answers = channel.stream_stream("/test.Test/EchoAll")(
            iter(requests), compression=grpc.Compression.Gzip, timeout=20
        )
        assert list(answers) == requests
        echo = channel.unary_unary("/test.Test/Echo")
        assert echo(requests[3], compression=grpc.Compression.Gzip, timeout=10) == requests[3]


def test_a_large_message_that_comes_with_the_end_is_not_lost(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    inflate = calls._inflate

    def slowly(*arguments: Any) -> bytes | None:
        if threading.current_thread().name.startswith("asyncio"):
            time.sleep(0.1)
        return inflate(*arguments)

    monkeypatch.setattr(calls, "_inflate", slowly)
    messages = [b"a", bytes(300_000), b"b", bytes(200_000)]
    sent = b"".join(framed(gzip.compress(message), compressed=True) for message in messages)
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 2**20})
    raw.send(frames.window_update(0, 2**20))
    raw.send(headers(1, raw.block("/test.Test/EchoAll", ("grpc-encoding", "gzip"))) + data(1, sent))
    assert raw.read(1).messages == messages
    assert raw.answers[1].headers["grpc-status"] == "0"
    raw.socket.close()


@pytest.mark.parametrize("method", ["Echo", "EchoAll"])
def test_a_fault_while_a_message_is_unpacked_ends_the_call(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    inflate = calls._inflate

    def fail(*arguments: Any) -> bytes | None:
        if threading.current_thread().name.startswith("asyncio"):
            raise MemoryError("inner text")
        return inflate(*arguments)

    monkeypatch.setattr(calls, "_inflate", fail)
    raw = Raw(serving.port)
    sent = framed(gzip.compress(bytes(300_000)), compressed=True)
    raw.send(headers(1, raw.block(f"/test.Test/{method}", ("grpc-encoding", "gzip"))) + data(1, sent))
    assert raw.read(1).headers["grpc-status"] == str(grpc.StatusCode.INTERNAL.value[0])
    assert "inner text" not in raw.answers[1].headers["grpc-message"]
    assert "inner text" in caplog.text
    raw.call(3, b"a")
    assert raw.read(3).messages == [b"a"]
    raw.socket.close()


def test_metadata_and_the_deadline_reach_the_handler(serving: Serving) -> None:
    metadata = (("key", "value"), ("key-bin", b"\0\xff,"), ("empty", ""))
    with serving.channel as channel:
        for _ in range(3):  # the headers are remembered from the second call on
            channel.unary_unary("/test.Test/Echo")(b"", metadata=metadata, timeout=10)
            assert serving.handlers.metadata.items() >= dict(metadata).items()
            assert serving.handlers.remaining and 8 < serving.handlers.remaining < 10.5  # gRPC rounds it up
    assert "te" not in serving.handlers.metadata and "content-type" not in serving.handlers.metadata


def test_a_handler_refuses_with_text_and_metadata(serving: Serving) -> None:
    with serving.channel as channel:
        error = failure(channel.unary_unary("/test.Test/Refuse"), b"")
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "ünknown\n100 %")
    metadata: Any = error.trailing_metadata()
    assert dict(metadata).items() >= {"key": "value", "key-bin": b"\0\xff"}.items()


@pytest.mark.parametrize("method", ["Answer", "AnswerAtOnce"])
def test_a_handler_may_answer_by_itself(serving: Serving, caplog: pytest.LogCaptureFixture, method: str) -> None:
    with serving.channel as channel:
        assert channel.unary_unary(f"/test.Test/{method}")(b"a", timeout=10) == b"a"
    assert not caplog.text


def test_a_call_is_refused_at_the_door_unread(serving: Serving, raw: Raw) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    with serving.channel as channel:
        guarded = channel.unary_unary("/test.Test/Guarded")
        assert guarded(b"a", timeout=10) == b"a"
        serving.handlers.door = status_block(code, "full", (("grpc-retry-pushback-ms", "70"),))
        error = failure(guarded, bytes(MOST_BYTES))
        assert (error.code(), error.details()) == (code, "full")
        metadata: Any = error.trailing_metadata()
        assert dict(metadata)["grpc-retry-pushback-ms"] == "70"
        raw.call(1, b"a", "/test.Test/Guarded")
        assert raw.read(1).headers["grpc-status"] == "8"
        raw.call(3, b"a")
        assert raw.read(3).messages == [b"a"]
        serving.handlers.door = None
        assert guarded(b"b", timeout=10) == b"b"


def test_of_what_is_refused_at_the_door_only_what_has_not_come_in_full_is_told_to_stop(
    serving: Serving, raw: Raw
) -> None:
    serving.handlers.door = status_block(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    blocks = [headers(stream, raw.block("/test.Test/Guarded")) for stream in (1, 3, 5, 7)]
    message = framed(b"a")
    # Answers in an order other than that of the calls, in several pieces, and one that ends with its headers.
    parts = [data(3, message[:2], 0), data(1, message), data(5, message, 0), data(3, message[2:])]
    trailers = frames.END_HEADERS | frames.END_STREAM
    parts.append(headers(9, raw.block("/test.Test/Guarded")) + headers(9, raw.encoder.encode([("a", "b")]), trailers))
    ended = headers(11, raw.block("/test.Test/Guarded"), frames.END_HEADERS | frames.END_STREAM)
    cancelled = headers(13, raw.block("/test.Test/Guarded")) + frames.reset(13, ErrorCode.CANCEL)
    raw.send(b"".join((*blocks, *parts, ended, cancelled)))
    raw.read_until(lambda: all(raw.answers[stream].reset is not None for stream in (5, 7)))
    raw.send(data(5, b"") + data(7, message))  # were on their way
    raw.call(15, b"a")
    assert raw.read(15).messages == [b"a"]
    for stream in (1, 3, 5, 7, 9, 11, 13):
        reset = ErrorCode.NO_ERROR if stream in (5, 7) else None
        assert raw.answers[stream].ended and raw.answers[stream].headers["grpc-status"] == "8"
        assert raw.answers[stream].reset == reset


def test_a_door_is_told_how_many_calls_are_let_in_and_have_yet_to_come(serving: Serving, raw: Raw) -> None:
    def opened(stream: int, *more: tuple[str, str]) -> bytes:
        return headers(stream, raw.block("/test.Test/Guarded", *more))

    message = framed(b"a")
    sent = [
        opened(1), opened(3), data(1, message),
        opened(5), data(5, message, 0),  # not its end
        opened(7), headers(5, raw.encoder.encode([("a", "b")]), frames.END_HEADERS | frames.END_STREAM),
        frames.reset(7, ErrorCode.CANCEL), opened(9, ("grpc-timeout", "soon")),  # which is refused
        opened(11),
    ]  # fmt: skip
    raw.send(b"".join(sent))
    raw.read_until(lambda: raw.answers[9].ended)
    assert serving.handlers.expected == [0, 1, 1, 2, 1, 1]
    raw.send(opened(13) + data(13, message))
    assert raw.read(13).messages == [b"a"]
    assert serving.handlers.expected[6:] == [0], "what does not come at once may never come"
    raw.send(data(3, message) + data(11, message))
    assert raw.read(3).messages == raw.read(11).messages == [b"a"]


def test_who_answers_later_is_told_when_nobody_waits_any_more(serving: Serving) -> None:
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/AnswerLater")(b"0.1", timeout=10) == b"awake"
        assert not serving.handlers.cancelled.is_set()
        error = failure(channel.unary_unary("/test.Test/AnswerLater"), b"0.5", timeout=0.2)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert serving.handlers.cancelled.wait(10)
        serving.handlers.cancelled.clear()
        serving.handlers.started.clear()
        call = channel.unary_unary("/test.Test/AnswerLater").future(b"0.5")
        assert serving.handlers.started.wait(10)
        call.cancel()
        assert serving.handlers.cancelled.wait(10)
        time.sleep(0.6)  # an answer that is too late harms nothing
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


@pytest.mark.parametrize("method", ["Fail", "FailAtOnce"])
def test_what_a_handler_raises_stays_in_the_log(
    serving: Serving, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with serving.channel as channel:
        error = failure(channel.unary_unary(f"/test.Test/{method}"), b"")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "secret" in caplog.text


def test_bytes_that_a_method_cannot_read_are_the_clients_fault(serving: Serving) -> None:
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Parse")(b"7", timeout=10) == b"\7"
        error = failure(channel.unary_unary("/test.Test/Parse"), b"seven")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_methods_and_services_are_unimplemented(serving: Serving) -> None:
    with serving.channel as channel:
        for path in ("/test.Test/Nothing", "/nothing.Nothing/Nothing", "/"):
            assert failure(channel.unary_unary(path), b"").code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_deadline_ends_a_call_and_its_handler(serving: Serving) -> None:
    with serving.channel as channel:
        error = failure(channel.unary_unary("/test.Test/Wait"), b"60", timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert serving.handlers.cancelled.wait(10)


def test_a_call_that_the_client_cancels_ends_its_handler(serving: Serving) -> None:
    with serving.channel as channel:
        call = channel.unary_unary("/test.Test/Wait").future(b"60")
        assert serving.handlers.started.wait(10)
        call.cancel()
        assert serving.handlers.cancelled.wait(10)


def test_a_connection_that_is_lost_ends_its_handlers(serving: Serving) -> None:
    client = Raw(serving.port)
    client.call(1, b"60", "/test.Test/Wait")
    assert serving.handlers.started.wait(10)
    client.socket.close()
    assert serving.handlers.cancelled.wait(10)


@pytest.mark.parametrize("count,size", [(0, 0), (1, 100), (1000, 100), (40, 50_000), (3, 1_000_000)])
def test_many_answers_come_in_full(serving: Serving, count: int, size: int) -> None:
    with serving.channel as channel:
        answers = list(channel.unary_stream("/test.Test/Repeat")(b"%d %d" % (count, size), timeout=20))
    assert [len(answer) for answer in answers] == [size] * count


def test_a_handler_may_write_its_answers(serving: Serving) -> None:
    with serving.channel as channel:
        assert list(channel.unary_stream("/test.Test/RepeatByWriting")(b"a", timeout=10)) == [b"a"] * 3


def test_many_requests_make_one_answer(serving: Serving) -> None:
    parts = [bytes([index]) * 9000 for index in range(100)]
    with serving.channel as channel:
        assert channel.stream_unary("/test.Test/Join")(iter(parts), timeout=10) == b"".join(parts)


def test_a_stream_answers_each_request_in_order(serving: Serving) -> None:
    requests = [random.Random(index).randbytes(index * 37 % 40_000) for index in range(1000)]
    with serving.channel as channel:
        assert list(channel.stream_stream("/test.Test/EchoAll")(iter(requests), timeout=30)) == requests


def test_a_client_that_reads_slowly_holds_up_its_own_stream_alone(serving: Serving) -> None:
    with serving.channel as channel, serving.channel as other:
        answers = channel.unary_stream("/test.Test/Repeat")(b"400 100000", timeout=30)
        next(answers)
        time.sleep(0.3)
        assert other.unary_unary("/test.Test/Echo")(b"a", timeout=5) == b"a"
        assert sum(1 for _ in answers) == 399


def test_requests_that_nobody_reads_are_held_back_at_the_client(serving: Serving) -> None:
    sent = 0

    def requests() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(10_000)

    with serving.channel as channel:
        call = channel.stream_stream("/test.Test/NeverRead")(requests())
        wait_for(lambda: serving.budget.used > WINDOW // 2)
        time.sleep(0.3)
        assert serving.budget.used <= 1.1 * WINDOW
        call.cancel()
        wait_for(lambda: serving.budget.used == 0)


def test_a_thousand_calls_at_once_on_one_connection_are_answered(serving: Serving) -> None:
    with serving.channel as channel:
        echo = channel.unary_unary("/test.Test/Echo")
        futures = [echo.future(b"%d" % index, timeout=20) for index in range(1000)]
        assert [future.result() for future in futures] == [b"%d" % index for index in range(1000)]


def test_a_message_above_the_limit_is_refused_as_soon_as_its_size_is_known(serving: Serving, raw: Raw) -> None:
    raw.send(headers(1, raw.block()) + data(1, struct.pack(">BI", 0, MOST_BYTES + 1) + bytes(100), 0))
    answer = raw.read(1)
    assert answer.headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert answer.headers["grpc-message"] == f"request: {MOST_BYTES + 1} bytes; too large"
    raw.read_until(lambda: answer.reset is not None)
    assert answer.reset == ErrorCode.NO_ERROR  # the rest is not wanted


def test_what_unpacks_to_more_than_the_limit_is_refused(serving: Serving, raw: Raw) -> None:
    bomb = gzip.compress(bytes(100 * MOST_BYTES))
    assert len(bomb) < MOST_BYTES
    raw.send(headers(1, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))))
    raw.send_data(1, framed(bomb, compressed=True))
    assert raw.read(1).headers["grpc-message"] == f"request: more than {MOST_BYTES} bytes once decompressed; too large"


def test_requests_of_too_many_bytes_at_once_are_refused_until_others_are_over(serving: Serving) -> None:
    half = struct.pack(">BI", 0, MOST_BYTES) + bytes(WINDOW - 5)
    clients = [Raw(serving.port) for _ in range(2)]
    for client in clients:
        for stream in range(1, 21, 2):
            client.send(headers(stream, client.block()))
            for at in range(0, len(half), 16384):
                client.send(data(stream, half[at : at + 16384], 0))
    wait_for(lambda: serving.budget.used > BUDGET - WINDOW)
    for client in clients:
        client.socket.settimeout(0.5)
        try:
            while True:
                client.read_some()
        except TimeoutError:
            pass
    refused = [answer for client in clients for answer in client.answers.values() if answer.ended]
    assert refused and all(answer.headers["grpc-status"] == "8" for answer in refused)
    assert "too many; try again later" in refused[0].headers["grpc-message"]
    for client in clients:
        client.socket.close()
    wait_for(lambda: serving.budget.used == 0)
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


def test_messages_that_never_come_in_full_cannot_keep_others_out(serving: Serving) -> None:
    parked = Raw(serving.port)
    for stream in range(1, 2 * BUDGET // WINDOW + 20, 2):
        parked.send(headers(stream, parked.block()) + data(stream, struct.pack(">BI", 0, MOST_BYTES), 0))
        for _ in range(WINDOW // 16384 - 1):
            parked.send(data(stream, bytes(16384), 0))
        while parked.updates[0] < (stream // 2 - 60) * WINDOW:
            parked.read_some()
    with serving.channel as channel:
        for _ in range(20):
            assert channel.unary_unary("/test.Test/Echo")(bytes(MOST_BYTES), timeout=10) == bytes(MOST_BYTES)
    assert parked.read(1).headers["grpc-status"] == "8"
    parked.socket.close()


def test_answers_that_are_not_taken_are_given_up(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.call._UNREAD_SECONDS", 0.3)
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
    raw.call(1, bytes(1000))
    assert raw.read(1).reset == ErrorCode.CANCEL
    assert serving.budget.used == 0
    raw.socket.close()


def test_what_is_read_after_a_call_is_over_is_not_released_twice(serving: Serving, raw: Raw) -> None:
    raw.send(frames.window_update(0, 2**30))  # for what is echoed before the client gives up
    for stream in range(1, 100, 2):
        many = b"".join(framed(bytes(1000)) for _ in range(10))
        raw.send(headers(stream, raw.block("/test.Test/EchoAll")) + data(stream, many, 0))
        raw.send(frames.reset(stream, ErrorCode.CANCEL))
    raw.call(101, b"a")
    assert raw.read(101).messages == [b"a"]
    wait_for(lambda: serving.budget.used == 0)


def test_headers_count_as_well(serving: Serving, raw: Raw) -> None:
    for stream in range(1, 200, 2):
        raw.send(headers(stream, raw.block("/test.Test/Echo", ("key", "v" * 2000))))
    wait_for(lambda: serving.budget.used > 100 * 2000)


def test_metadata_above_the_limit_is_refused_and_harms_no_other_call(serving: Serving) -> None:
    with serving.channel as channel:
        waiting = channel.unary_unary("/test.Test/Wait").future(b"0.5", timeout=10)
        assert serving.handlers.started.wait(10)
        error = failure(channel.unary_unary("/test.Test/Echo"), b"", metadata=(("key", "v" * 17_000),))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (error.details() or "").startswith("metadata: 17")
        assert waiting.result() == b"awake"
    [(path, code, text)] = serving.refused
    assert (path, code) == ("/test.Test/Echo", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert text == error.details()


# A strict peer


def test_a_strict_peer_finds_nothing_wrong(serving: Serving) -> None:
    link = H2Connection(H2Configuration(header_encoding="utf-8"))
    link.initiate_connection()
    with socket.create_connection(("127.0.0.1", serving.port), 10) as peer:
        for _ in range(50):
            stream = link.get_next_available_stream_id()
            link.send_headers(stream, HEADERS)
            link.send_data(stream, framed(b"hello"), end_stream=True)
        peer.sendall(link.data_to_send())
        seen: dict[int, list[Any]] = defaultdict(list)
        while sum(isinstance(event, StreamEnded) for events in seen.values() for event in events) < 50:
            for event in link.receive_data(peer.recv(2**16)):  # raises where the server breaks a rule
                if isinstance(event, ResponseReceived | DataReceived | TrailersReceived | StreamEnded):
                    seen[event.stream_id or 0].append(event)
            peer.sendall(link.data_to_send())
    kinds = [ResponseReceived, DataReceived, TrailersReceived, StreamEnded]
    assert all([type(event) for event in events] == kinds for events in seen.values())
    first = seen[1]
    assert dict(first[0].headers) == {":status": "200", "content-type": "application/grpc"}
    assert first[1].data == framed(b"hello")
    assert dict(first[2].headers) == {"grpc-status": "0"}


# Frames made by hand: what is allowed


def test_bytes_may_come_one_by_one(serving: Serving, raw: Raw) -> None:
    block = raw.block()
    for byte in headers(1, block) + data(1, framed(b"abc")):
        raw.send(bytes([byte]))
    assert raw.read(1).messages == [b"abc"]


def test_a_message_may_come_in_many_frames_padded_or_empty(serving: Serving, raw: Raw) -> None:
    raw.send(headers(1, b"\x03" + bytes(5) + raw.block() + bytes(3), 0x04 | frames.PADDED | frames.HAS_PRIORITY))
    for byte in framed(b"abcdef"):
        raw.send(data(1, b"", 0) + data(1, b"\x02" + bytes([byte]) + b"\0\0", frames.PADDED))
    raw.send(data(1, b""))
    assert raw.read(1).messages == [b"abcdef"]


def test_headers_may_be_continued(serving: Serving, raw: Raw) -> None:
    block = raw.block()
    raw.send(headers(1, block[:5], 0) + frames.frame(frames.CONTINUATION, 0, 1, block[5:9]))
    raw.send(frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[9:]) + data(1, framed(b"a")))
    assert raw.read(1).messages == [b"a"]


def test_a_client_may_end_with_trailers(serving: Serving, raw: Raw) -> None:
    raw.send(headers(1, raw.block()) + data(1, framed(b"a"), 0))
    raw.send(headers(1, raw.encoder.encode([("x", "y")]), frames.END_HEADERS | frames.END_STREAM))
    assert raw.read(1).messages == [b"a"]
    raw.call(3, b"b")  # what the trailers put into the table is there
    assert raw.read(3).messages == [b"b"]


def test_headers_are_told_apart_however_the_table_changes(serving: Serving, raw: Raw) -> None:
    for stream in range(1, 400, 2):
        if stream % 50 == 1:
            raw.encoder.header_table_size = 4096 if stream % 100 == 1 else 128
        value = f"{stream * 7919 % 13}"
        raw.call(stream, b"a", "/test.Test/Echo", ("x-value", value))
        assert raw.read(stream).messages == [b"a"]
        assert serving.handlers.metadata["x-value"] == value


def test_answers_wait_for_the_clients_windows(serving: Serving) -> None:
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 10})
    raw.call(1, b"x" * 95)
    raw.read_until(lambda: len(raw.answers[1].data) == 10)
    raw.send(frames.window_update(1, 20))
    raw.read_until(lambda: len(raw.answers[1].data) == 30)
    raw.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 60}))
    raw.read_until(lambda: len(raw.answers[1].data) == 80)
    raw.send(frames.window_update(1, 1000))
    assert raw.read(1).messages == [b"x" * 95]
    assert raw.answers[1].headers["grpc-status"] == "0"
    raw.socket.close()


def test_the_connections_window_holds_for_all_streams_together(serving: Serving) -> None:
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 2**20})
    for stream in (1, 3, 5):
        raw.call(stream, b"x" * 30_000)
    raw.read_until(lambda: sum(len(one.data) for one in raw.answers.values()) == 65535)
    raw.call(7, b"", "/test.Test/Refuse")  # a status needs no window
    assert raw.read(7).headers["grpc-status"] == "5"
    raw.send(frames.window_update(0, 2**20))
    for stream in (1, 3, 5):
        assert raw.read(stream).messages == [b"x" * 30_000]
    raw.socket.close()


def test_the_windows_are_filled_up_again(serving: Serving, raw: Raw) -> None:
    message = bytes(MOST_BYTES)
    for stream in range(1, 60, 2):
        raw.send(headers(stream, raw.block("/test.Test/Join")))
        sent, window, total = framed(message), WINDOW, 0
        for at in range(0, len(sent), 16384):
            while total + 16384 > window + raw.updates[stream]:
                raw.read_some()
            raw.send(data(stream, sent[at : at + 16384], 0))
            total += 16384
        raw.send(frames.reset(stream, ErrorCode.CANCEL))
    assert raw.updates[0] > 20 * MOST_BYTES


def test_a_client_that_wants_a_smaller_table_for_headers_gets_it(serving: Serving) -> None:
    raw = Raw(serving.port, settings={frames.HEADER_TABLE_SIZE: 0})
    raw.decoder.max_allowed_table_size = 0  # raises where the server does not say that it keeps to it
    for stream in (1, 3):
        raw.call(stream, b"a")
        assert raw.read(stream).messages == [b"a"]
    raw.socket.close()


def test_a_ping_with_every_call_is_no_flood(serving: Serving, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.connection._MOST_IDLE_FRAMES", 50)
    for stream in range(1, 600, 2):
        raw.call(stream, b"a")
        raw.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        assert raw.read(stream).messages == [b"a"]


def test_windows_that_stay_shut_cost_others_nothing(serving: Serving) -> None:
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
    for stream in range(1, 2 * MOST_CALLS, 2):
        raw.call(stream, b"a")
    wait_for(lambda: serving.budget.used > MOST_CALLS * 100)
    raw.send(frames.window_update(0, 1) * 3000)
    with serving.channel as channel:
        begin = time.monotonic()
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
        assert time.monotonic() - begin < 3
    raw.socket.close()


def test_pings_are_answered(serving: Serving, raw: Raw) -> None:
    raw.send(frames.frame(frames.PING, 0, 0, b"12345678"))
    raw.read_until(lambda: raw.pings == [b"12345678"])


def test_frames_of_unknown_kinds_and_late_frames_are_let_pass(serving: Serving, raw: Raw) -> None:
    raw.send(frames.frame(99, 0, 0, b"?") + frames.frame(frames.PRIORITY, 0, 9, bytes(5)))
    raw.call(1, b"a")
    raw.read(1)
    raw.send(data(1, b"late") + frames.window_update(1, 5) + frames.reset(1, ErrorCode.CANCEL))
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


def test_more_calls_than_are_allowed_can_be_tried_elsewhere(serving: Serving, raw: Raw) -> None:
    for stream in range(1, 2 * MOST_CALLS + 1, 2):
        raw.send(headers(stream, raw.block()))
    raw.send(headers(2 * MOST_CALLS + 1, raw.block()))
    assert raw.read(2 * MOST_CALLS + 1).reset == ErrorCode.REFUSED_STREAM
    raw.send(data(1, framed(b"a")))
    assert raw.read(1).messages == [b"a"]


# Requests that are no gRPC calls, or wrong ones

REFUSED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "a GET": ({":method": "GET"}, {":status": "405"}),
    "another content type": ({"content-type": "application/json"}, {":status": "415"}),
    "a content type that only begins alike": ({"content-type": "application/grpcs"}, {":status": "415"}),
    "an encoding that is not known": (
        {"grpc-encoding": "snappy"},
        {"grpc-status": "12", "grpc-accept-encoding": "identity,gzip,deflate"},
    ),
    "a timeout without a unit": ({"grpc-timeout": "100"}, {"grpc-status": "13"}),
    "a timeout with too many digits": ({"grpc-timeout": "123456789S"}, {"grpc-status": "13"}),
    "a deadline that has passed": ({"grpc-timeout": "0n"}, {"grpc-status": "4"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_call_is_answered(serving: Serving, raw: Raw, name: str) -> None:
    given, expected = REFUSED[name]
    raw.call(1, b"60", "/test.Test/Wait" if "deadline" in name else "/test.Test/Echo", *given.items())
    assert raw.read(1).headers.items() >= expected.items()
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


@pytest.mark.parametrize("content", ["application/grpc+proto", "application/grpc;charset=utf-8"])
def test_other_spellings_of_the_content_type_are_taken(serving: Serving, raw: Raw, content: str) -> None:
    raw.call(1, b"a", "/test.Test/Echo", ("content-type", content))
    assert raw.read(1).messages == [b"a"]


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "no path": [field for field in HEADERS if field[0] != ":path"],
    "two paths": [*HEADERS[:3], *HEADERS[2:]],
    "a pseudo-header after others": [*HEADERS[1:], HEADERS[0]],
    "an answer's pseudo-header": [*HEADERS[:4], (":status", "200"), *HEADERS[4:]],
    "a header of HTTP/1": [*HEADERS, ("connection", "close")],
    "another te": [*HEADERS[:-1], ("te", "gzip")],
    "a capital letter": [*HEADERS, ("X-Key", "value")],
    "a line break": [*HEADERS, ("x-key", "a\r\nb: c")],
    "bytes that are no base64": [*HEADERS, ("key-bin", "?")],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_reset_their_stream_alone(serving: Serving, raw: Raw, name: str) -> None:
    raw.call(1, b"a")
    for stream in (3, 5):  # the second time from memory, if it were remembered
        block = b"".join(_literal(field, value) for field, value in MALFORMED[name])
        raw.send(headers(stream, block) + data(stream, framed(b"a")))
        assert raw.read(stream).reset == ErrorCode.PROTOCOL_ERROR
    raw.call(7, b"b")
    assert raw.read(7).messages == [b"b"]


def _literal(name: str, value: str) -> bytes:
    """Written by hand, since the library makes names small."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


BODIES: dict[str, tuple[str, bytes, int]] = {
    "none": ("Echo", b"", 12),
    "two": ("Echo", framed(b"a") + framed(b"b"), 12),
    "half of one": ("Echo", framed(b"abc")[:-1], 3),
    "half of a prefix": ("Echo", b"\0\0", 3),
    "one and a half in a stream": ("EchoAll", framed(b"a") + framed(b"abc")[:-1], 3),
    "compressed, without saying how": ("Echo", framed(b"abc", compressed=True), 13),
    "a flag that means nothing": ("Echo", b"\2" + framed(b"abc")[1:], 13),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_not_the_messages_expected_are_refused(serving: Serving, raw: Raw, name: str) -> None:
    method, body, status = BODIES[name]
    raw.send(headers(1, raw.block(f"/test.Test/{method}")) + data(1, body))
    assert raw.read(1).headers["grpc-status"] == str(status)


@pytest.mark.parametrize(
    "body", [b"abc", b"", zlib.compress(b"abc"), gzip.compress(b"abc")[:-1], gzip.compress(b"") * 2]
)
def test_bytes_that_are_not_compressed_as_they_say_are_refused(serving: Serving, raw: Raw, body: bytes) -> None:
    raw.send(headers(1, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))) + data(1, framed(body, True)))
    assert raw.read(1).headers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


# What ends a connection


def _continued(raw: Raw) -> bytes:
    return headers(1, b"", 0) + frames.frame(frames.CONTINUATION, 0, 1, b"") * 20


FAULTS: dict[str, tuple[Any, ErrorCode]] = {
    "a frame too large": (lambda raw: frames.frame(frames.DATA, 0, 1, bytes(16385)), ErrorCode.FRAME_SIZE_ERROR),
    "data for no stream": (lambda raw: data(0, b"a"), ErrorCode.PROTOCOL_ERROR),
    "data before headers": (lambda raw: data(1, b"a"), ErrorCode.PROTOCOL_ERROR),
    "a window for a stream before headers": (lambda raw: frames.window_update(1, 5), ErrorCode.PROTOCOL_ERROR),
    "a reset before headers": (lambda raw: frames.reset(1, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of no stream": (lambda raw: frames.reset(0, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of two bytes": (lambda raw: frames.frame(frames.RST_STREAM, 0, 1, b"12"), ErrorCode.FRAME_SIZE_ERROR),
    "a stream of the server's": (lambda raw: headers(2, raw.block()), ErrorCode.PROTOCOL_ERROR),
    "headers for no stream": (lambda raw: headers(0, raw.block()), ErrorCode.PROTOCOL_ERROR),
    "headers that are interrupted": (lambda raw: headers(1, b"", 0) + headers(3, b""), ErrorCode.PROTOCOL_ERROR),
    "headers continued elsewhere": (
        lambda raw: headers(1, b"", 0) + frames.frame(frames.CONTINUATION, 4, 3),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (lambda raw: frames.frame(frames.CONTINUATION, 4, 1), ErrorCode.PROTOCOL_ERROR),
    "headers without end": (_continued, ErrorCode.ENHANCE_YOUR_CALM),
    "headers that cannot be read": (lambda raw: headers(1, b"\xff\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "headers far too large": (
        lambda raw: headers(1, _literal("a", "b" * 100) + b"\x40\x01c\x7f\xa1\x1e" + b"d" * 4000 + b"\xbe" * 50),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a table resized three times": (lambda raw: headers(1, b"\x20\x21\x22" + raw.block()), ErrorCode.COMPRESSION_ERROR),
    "windows too large by settings": (
        lambda raw: (
            headers(1, raw.block())
            + frames.window_update(1, 2**30)
            + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30})
        ),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "headers shorter than their priority": (lambda raw: headers(1, b"abc", 0x24), ErrorCode.FRAME_SIZE_ERROR),
    "padding longer than its frame": (
        lambda raw: headers(1, raw.block()) + data(1, b"\x05abc", frames.PADDED),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "padding without its length": (
        lambda raw: headers(1, raw.block()) + data(1, b"", frames.PADDED),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "settings on a stream": (lambda raw: frames.frame(frames.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings of five bytes": (lambda raw: frames.frame(frames.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "settings that acknowledge and set": (
        lambda raw: frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a setting for push of 2": (lambda raw: frames.settings({frames.ENABLE_PUSH: 2}), ErrorCode.PROTOCOL_ERROR),
    "a setting for small frames": (lambda raw: frames.settings({frames.MAX_FRAME_SIZE: 1}), ErrorCode.PROTOCOL_ERROR),
    "a setting for a huge window": (
        lambda raw: frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "a window of nothing": (lambda raw: frames.window_update(0, 0), ErrorCode.PROTOCOL_ERROR),
    "a window too large": (lambda raw: frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "a ping of seven bytes": (lambda raw: frames.frame(frames.PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "a ping on a stream": (lambda raw: frames.frame(frames.PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "a push": (lambda raw: frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "nothing but settings": (lambda raw: frames.settings({}) * 20_000, ErrorCode.ENHANCE_YOUR_CALM),
    "nothing but empty data": (
        lambda raw: headers(1, raw.block("/test.Test/EchoAll")) + data(1, b"", 0) * 20_000,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_its_connection_alone(serving: Serving, raw: Raw, name: str) -> None:
    make, code = FAULTS[name]
    other = Raw(serving.port)
    with suppress(ConnectionError):  # the server may need no more of it
        raw.send(make(raw))
    raw.read()
    # What it said last may be lost where it closes while more is on its way.
    assert raw.went_away[-1][1] == code if raw.went_away or not name.startswith("nothing but") else raw.closed
    other.call(1, b"a")
    assert other.read(1).messages == [b"a"]
    other.socket.close()


STREAM_FAULTS: dict[str, tuple[Any, ErrorCode]] = {
    "headers twice": (lambda raw: headers(1, raw.block()), ErrorCode.PROTOCOL_ERROR),
    "a window of nothing": (lambda raw: frames.window_update(1, 0), ErrorCode.PROTOCOL_ERROR),
    "a window too large": (lambda raw: frames.window_update(1, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "a priority of three bytes": (lambda raw: frames.frame(frames.PRIORITY, 0, 1, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
    "trailers after the end": (
        lambda raw: data(1, framed(b"60")) + headers(1, raw.encoder.encode([("x", "y")]), 0x05),
        ErrorCode.STREAM_CLOSED,
    ),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_a_fault_on_a_stream_ends_it_alone(serving: Serving, raw: Raw, name: str) -> None:
    make, code = STREAM_FAULTS[name]
    raw.send(headers(1, raw.block("/test.Test/Wait")) + make(raw))
    assert raw.read(1).reset == code
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


def test_a_stream_with_more_than_its_window_is_reset(serving: Serving, raw: Raw) -> None:
    raw.send(headers(1, raw.block("/test.Test/NeverRead")))
    for _ in range(WINDOW // 16384 + 1):
        raw.send(data(1, framed(bytes(16379)), 0))
    assert raw.read(1).reset == ErrorCode.FLOW_CONTROL_ERROR
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


def test_data_after_the_end_resets_its_stream(serving: Serving, raw: Raw) -> None:
    raw.call(1, b"60", "/test.Test/Wait")
    assert serving.handlers.started.wait(10)
    raw.send(data(1, b"more"))
    assert raw.read(1).reset == ErrorCode.STREAM_CLOSED
    assert serving.handlers.cancelled.wait(10)


@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/1"]
)
def test_another_protocol_is_closed(serving: Serving, hello: bytes) -> None:
    with socket.create_connection(("127.0.0.1", serving.port), 10) as client:
        client.sendall(hello)
        try:
            while client.recv(1000):
                pass
        except ConnectionResetError:
            pass


def test_frames_before_the_clients_settings_end_the_connection(serving: Serving) -> None:
    raw = Raw(serving.port, preface=frames.PREFACE + frames.frame(frames.PING, 0, 0, bytes(8)))
    assert raw.why_closed() == ErrorCode.PROTOCOL_ERROR
    raw.socket.close()


def test_a_client_that_never_greets_is_closed(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.connection._HANDSHAKE_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", serving.port), 10) as client:
        while client.recv(1000):
            pass


def test_a_client_that_only_sends_does_not_fill_the_memory(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.connection._STALL_SECONDS", 0.5)
    raw = Raw(serving.port)
    raw.socket.settimeout(10)
    sent, pings = 0, frames.frame(99, 0, 0, bytes(8)) + frames.frame(frames.PING, 0, 0, bytes(8))
    block = raw.block("/nothing")
    stream = 1
    with pytest.raises(OSError):  # at last the server reads no more, and then closes
        while True:
            many = b"".join(headers(stream + 2 * index, block, 0x05) for index in range(500))
            raw.send(many + pings)
            block = raw.block("/nothing")
            stream += 1000
            sent += len(many)
            assert sent < 200 * 2**20
    raw.socket.close()
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


@pytest.mark.parametrize("seed", range(20))
def test_garbage_harms_nobody_else(serving: Serving, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(seed)
    raw, encoder = Raw(serving.port), Encoder()
    valid = (
        headers(1, encoder.encode(HEADERS))
        + data(1, framed(b"abc"))
        + frames.settings({4: 100})
        + frames.window_update(0, 9)
    )
    for _ in range(50):
        sent = bytearray(valid * 3)
        for _ in range(generator.randrange(1, 20)):
            sent[generator.randrange(len(sent))] = generator.randrange(256)
        client = Raw(serving.port)
        with suppress(ConnectionError):
            client.send(bytes(sent) + generator.randbytes(generator.randrange(200)))
        client.socket.close()
    raw.call(1, b"a")
    assert raw.read(1).messages == [b"a"]
    raw.socket.close()
    assert "failed" not in caplog.text, "a fault of the server's"


# Ends in good order


def test_a_stop_answers_what_is_under_way_and_takes_no_more() -> None:
    with serve() as serving, serving.channel as channel:
        call = channel.unary_unary("/test.Test/Wait").future(b"0.5", timeout=20)
        assert serving.handlers.started.wait(10)
        serving.stop(10)
        assert call.result() == b"awake"
        assert failure(channel.unary_unary("/test.Test/Echo"), b"").code() is grpc.StatusCode.UNAVAILABLE


def test_a_stop_takes_what_was_sent_before_the_client_knew() -> None:
    with serve() as serving:
        raw = Raw(serving.port)
        raw.call(1, b"a")
        raw.read(1)
        stopping = threading.Thread(target=serving.stop, args=(5,))
        stopping.start()
        while not raw.went_away:  # answers the server's ping, which comes with it, after this
            raw.socket.setblocking(True)
            first = raw.socket.recv(17 + 9 + 8, socket.MSG_PEEK | socket.MSG_WAITALL)
            assert first
            raw.call(3, b"b")
            raw.read_some()
        assert raw.went_away[0][:2] == (2**31 - 1, ErrorCode.NO_ERROR)
        assert raw.read(3).messages == [b"b"]
        raw.read()
        assert raw.went_away[-1][:2] == (3, ErrorCode.NO_ERROR)
        stopping.join()
        raw.socket.close()


def test_a_stop_ends_what_takes_longer_than_its_grace() -> None:
    with serve() as serving, serving.channel as channel:
        call = channel.unary_unary("/test.Test/Wait").future(b"60", timeout=20)
        assert serving.handlers.started.wait(10)
        begin = time.monotonic()
        serving.stop(0.2)
        assert time.monotonic() - begin < 3
        assert serving.handlers.cancelled.wait(10)
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_stop_does_not_wait_for_a_client_that_answers_nothing() -> None:
    with serve() as serving:
        raw = Raw(serving.port)
        raw.call(1, b"60", "/test.Test/Wait")
        assert serving.handlers.started.wait(10)
        begin = time.monotonic()
        serving.stop(0.2)
        assert time.monotonic() - begin < 3
        raw.socket.close()


def test_a_stop_does_not_wait_for_a_client_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.connection._CLOSE_SECONDS", 0.3)
    with serve() as serving:
        raw = Raw.__new__(Raw)
        raw.socket = socket.socket()
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.socket.connect(("127.0.0.1", serving.port))
        raw.encoder = Encoder()
        raw.send(frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}))
        raw.send(frames.window_update(0, 2**30))
        raw.call(1, b"200 10000", "/test.Test/Repeat")
        time.sleep(0.3)
        raw.send(frames.frame(frames.SETTINGS, 0, 0, bytes(5)))  # the server closes, and has much to send
        wait_for(lambda: not serving.server._connections)
        raw.socket.close()


def test_connections_are_renewed_without_a_call_lost() -> None:
    with serve(connection_age=0.2, grace=5) as serving, serving.channel as channel:
        echo = channel.unary_unary("/test.Test/Echo")
        for _ in range(200):
            assert echo(b"a", timeout=10) == b"a"
            time.sleep(0.005)


def test_a_unix_socket_goes_with_the_server(tmp_path: Any) -> None:
    path = tmp_path / "socket"

    async def serve_once() -> None:
        server = GrpcServer(Limits(MOST_BYTES, "", Budget(BUDGET), ""))
        server.add_generic_rpc_handlers((Handlers().generic(),))
        await server.listen_unix(str(path))
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{path}") as link:
            channel: Any = link
            assert await channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
        await server.stop(1)

    asyncio.run(serve_once())
    assert not path.exists()
