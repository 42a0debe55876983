"""Floods and other faults that end a stream or a connection of the native transport, beside those of RFC 9113."""

import random
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

import pytest
from hpack import Encoder

from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.receiving import WINDOW
from tests.raw_client import HEADERS, Raw, data, framed, headers, literal
from tests.transport_methods import Serving


def _continued(raw: Raw) -> bytes:
    return headers(1, b"", 0) + frames.frame(frames.CONTINUATION, 0, 1, b"") * 20


def _cancelled(raw: Raw, streams: range) -> bytes:
    """Calls that are cancelled at once."""
    return b"".join(
        headers(stream, raw.block("/test.Test/Wait")) + frames.reset(stream, ErrorCode.CANCEL) for stream in streams
    )


FAULTS: dict[str, tuple[Any, ErrorCode]] = {
    "headers without end": (_continued, ErrorCode.ENHANCE_YOUR_CALM),
    "nothing but settings": (lambda raw: frames.settings({}) * 20_000, ErrorCode.ENHANCE_YOUR_CALM),
    "nothing but windows": (lambda raw: frames.window_update(0, 1) * 20_000, ErrorCode.ENHANCE_YOUR_CALM),
    "nothing but windows of a stream": (
        lambda raw: headers(1, raw.block("/test.Test/Wait")) + frames.window_update(1, 1) * 20_000,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but resets of a call that is over": (
        lambda raw: headers(1, raw.block("/nothing"), 0x05) + frames.reset(1, ErrorCode.CANCEL) * 20_000,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but calls that are cancelled": (
        lambda raw: _cancelled(raw, range(1, 80_001, 2)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but calls that are wrong": (
        lambda raw: b"".join(
            headers(stream, raw.block("/test.Test/Wait")) + frames.window_update(stream, 0)
            for stream in range(1, 5001, 2)
        ),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "a header block of more than a megabyte": (
        lambda raw: (
            headers(1, b"", 0) + b"".join(frames.frame(frames.CONTINUATION, 0, 1, bytes(16384)) for _ in range(65))
        ),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but long settings": (
        lambda raw: frames.frame(frames.SETTINGS, 0, 0, (b"\0\4" + bytes(4)) * 2700) * 500,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but small pieces of a message": (
        lambda raw: headers(1, raw.block()) + data(1, b"\0\0\1\0\0", 0) + data(1, b"a", 0) * 20_000,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but padding": (
        lambda raw: headers(1, raw.block()) + data(1, b"\xff" + bytes(255), frames.PADDED) * 20_000,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but headers of a call that is over": (
        lambda raw: headers(1, raw.block("/nothing"), 0x05) + headers(1, literal("a", "b") * 1000, 0x05) * 200,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but many headers that are wrong": (
        lambda raw: b"".join(headers(stream, literal("a", "b") * 1000, 0x05) for stream in range(1, 401, 2)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "nothing but calls with many headers": (
        lambda raw: b"".join(
            headers(stream, raw.block("/nothing") + literal("a", str(stream)) * 400, 0x05)
            for stream in range(1, 401, 2)
        ),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
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


def test_a_stream_that_is_reset_for_its_priority_is_answered_no_further(serving: Serving, raw: Raw) -> None:
    wrong = frames.frame(frames.PRIORITY, 0, 1, b"abc")
    raw.send(headers(1, raw.block("/test.Test/EchoAll")) + wrong + data(1, framed(b"a")))
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]
    assert (raw.answers[1].reset, raw.answers[1].headers) == (ErrorCode.FRAME_SIZE_ERROR, {})


def test_calls_that_are_cancelled_end_their_connection_before_they_cost_much(serving: Serving, raw: Raw) -> None:
    raw.send(_cancelled(raw, range(1, 2001, 2)))
    raw.call(2001, b"a")
    assert raw.read(2001).messages == [b"a"], "a client may give up 1,000 calls at once"
    with suppress(ConnectionError):
        raw.send(_cancelled(raw, range(2003, 82_003, 2)))
    raw.read()
    assert raw.closed
    assert all(code == ErrorCode.ENHANCE_YOUR_CALM and last < 10_000 for last, code, _ in raw.went_away)


def test_a_client_that_cancels_as_many_calls_as_are_answered_is_not_hurt(serving: Serving, raw: Raw) -> None:
    for first in range(1, 4001, 4):
        raw.send(_cancelled(raw, range(first, first + 1)))
        raw.call(first + 2, b"a")
        assert raw.read(first + 2).messages == [b"a"]


def test_a_client_that_opens_a_window_for_each_answer_is_not_hurt(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.transport.streams._MAX_IDLE_FRAMES", 100)
    monkeypatch.setattr("serving.transport.streams._IDLE_FRAMES_A_SECOND", 0)
    raw = Raw(serving.port)
    for stream in range(1, 2001, 2):
        raw.call(stream, b"a" * 100)
        assert raw.read(stream).messages == [b"a" * 100]
        raw.send(frames.window_update(0, 105) + frames.window_update(stream, 105))
    raw.send(frames.window_update(0, 2**20))
    for stream in range(2001, 2021, 2):
        raw.call(stream, b"0 0", "/test.Test/Repeat")
        raw.read(stream)
    raw.socket.close()


@pytest.mark.parametrize("length", [0, 5, 7, 100])
@pytest.mark.parametrize("last", [b"a", b""])
def test_a_request_that_is_not_as_long_as_it_says_is_reset(
    serving: Serving, raw: Raw, length: int, last: bytes
) -> None:
    block = raw.block("/test.Test/Echo", ("content-length", str(length)))
    message = framed(b"a")
    cut = len(message) - len(last)
    raw.send(headers(1, block) + data(1, message[:cut], 0) + data(1, message[cut:]))
    assert raw.read(1).reset == ErrorCode.PROTOCOL_ERROR
    raw.call(3, b"b", "/test.Test/Echo", ("content-length", "6"))
    assert raw.read(3).messages == [b"b"]


def test_a_request_that_ends_with_trailers_must_be_as_long_as_it_says(serving: Serving, raw: Raw) -> None:
    for stream, length in ((1, "6"), (3, "7")):
        block = raw.block("/test.Test/Echo", ("content-length", length))
        raw.send(headers(stream, block) + data(stream, framed(b"a"), 0))
        raw.send(headers(stream, raw.encoder.encode([("x", "y")]), 0x05))
        raw.read(stream)
    assert raw.answers[1].messages == [b"a"]
    assert raw.answers[3].reset == ErrorCode.PROTOCOL_ERROR


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


def test_a_client_of_http_1_is_told_what_this_is(serving: Serving) -> None:
    url = f"http://127.0.0.1:{serving.port}/metrics"
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(url, timeout=10):
        pass
    assert caught.value.code == 400
    assert b"gRPC" in caught.value.read()
    caught.value.close()


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
