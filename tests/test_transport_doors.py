"""The native transport's doors, and messages that are inflated in a thread."""

import gzip
import time
from typing import Any

import grpc
import pytest

from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.headers import Status
from serving.transport.messages import Inflation
from tests.raw_client import Raw, data, failure, framed, headers
from tests.transport_methods import MAX_BYTES, Serving


def test_a_large_message_that_comes_with_the_end_is_not_lost(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = Inflation.rest

    def slowly(inflation: Inflation) -> bytes | None:
        time.sleep(0.1)
        return rest(inflation)

    monkeypatch.setattr(Inflation, "rest", slowly)
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
    def fail(_: Inflation) -> bytes | None:
        raise MemoryError("inner text")

    monkeypatch.setattr(Inflation, "rest", fail)
    raw = Raw(serving.port)
    sent = framed(gzip.compress(bytes(300_000)), compressed=True)
    raw.send(headers(1, raw.block(f"/test.Test/{method}", ("grpc-encoding", "gzip"))) + data(1, sent))
    assert raw.read(1).headers["grpc-status"] == str(grpc.StatusCode.INTERNAL.value[0])
    assert "inner text" not in raw.answers[1].headers["grpc-message"]
    assert "inner text" in caplog.text
    raw.call(3, b"a")
    assert raw.read(3).messages == [b"a"]
    raw.socket.close()


def test_a_call_is_refused_at_the_door_unread(serving: Serving, raw: Raw) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    with serving.channel as channel:
        guarded = channel.unary_unary("/test.Test/Guarded")
        assert guarded(b"a", timeout=10) == b"a"
        serving.handlers.door = Status(code, "full", (("grpc-retry-pushback-ms", "70"),))
        error = failure(guarded, bytes(MAX_BYTES))
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
    serving.handlers.door = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
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
