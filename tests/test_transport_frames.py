"""Frames that are allowed, sent by hand to the native transport, and a strict peer."""

import socket
import time
from collections import defaultdict
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, TrailersReceived

from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.receiving import WINDOW
from tests.raw_client import HEADERS, Raw, data, framed, headers, literal, wait_for
from tests.transport_methods import MAX_BYTES, Serving, serve


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


def test_calls_with_many_headers_are_all_answered(serving: Serving, raw: Raw) -> None:
    calls = [
        headers(stream, raw.block("/test.Test/Echo", (f"key-{stream}", "v")) + literal("a", "b") * 99)
        + data(stream, framed(str(stream).encode()))
        for stream in range(1, 401, 2)
    ]
    raw.send(b"".join(calls))
    for stream in range(1, 401, 2):
        assert raw.read(stream).messages == [str(stream).encode()]


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
    message = bytes(MAX_BYTES)
    for stream in range(1, 60, 2):
        raw.send(headers(stream, raw.block("/test.Test/Join")))
        sent, window, total = framed(message), WINDOW, 0
        for at in range(0, len(sent), 16384):
            while total + 16384 > window + raw.updates[stream]:
                raw.read_some()
            raw.send(data(stream, sent[at : at + 16384], 0))
            total += 16384
        raw.send(frames.reset(stream, ErrorCode.CANCEL))
    assert raw.updates[0] > 20 * MAX_BYTES


def test_a_client_that_wants_a_smaller_table_for_headers_gets_it(serving: Serving) -> None:
    raw = Raw(serving.port, settings={frames.HEADER_TABLE_SIZE: 0})
    raw.decoder.max_allowed_table_size = 0  # raises where the server does not say that it keeps to it
    for stream in (1, 3):
        raw.call(stream, b"a")
        assert raw.read(stream).messages == [b"a"]
    raw.socket.close()


def test_a_client_whose_table_shrinks_and_grows_at_once_is_told_of_the_smaller_one(serving: Serving, raw: Raw) -> None:
    size = frames.HEADER_TABLE_SIZE
    raw.send(frames.settings({size: 0}) + frames.settings({size: 4096}))
    raw.read_until(lambda: True)
    raw.decoder.max_allowed_table_size = 0
    raw.call(1, b"a")
    raw.read_until(lambda: raw.answers[1].ended)
    assert raw.decoder.header_table_size == 0
    raw.decoder.max_allowed_table_size = 4096
    raw.call(3, b"a")
    assert raw.read(3).messages == [b"a"]


def test_a_ping_with_every_call_is_no_flood(serving: Serving, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.streams._MAX_IDLE_FRAMES", 50)
    for stream in range(1, 600, 2):
        raw.call(stream, b"a")
        raw.send(frames.frame(frames.PING, 0, 0, bytes(8)))
        assert raw.read(stream).messages == [b"a"]


def test_windows_that_stay_shut_cost_others_nothing() -> None:
    calls = 4096
    with serve(limits={"calls_per_connection": calls, "bytes_under_way": 2**26}) as serving:
        raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
        for stream in range(1, 2 * calls, 2):
            raw.call(stream, b"a")
        wait_for(lambda: serving.memory.used > calls * 4096)
        raw.send(frames.window_update(0, 1) * 3000)
        with serving.channel as channel:
            begin = time.monotonic()
            assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
            assert time.monotonic() - begin < 3
        raw.socket.close()


def test_pings_are_answered(serving: Serving, raw: Raw) -> None:
    raw.send(frames.frame(frames.PING, 0, 0, b"12345678"))
    raw.read_until(lambda: raw.pings == [b"12345678"])


def test_frames_of_unknown_kinds_and_late_frames_harm_no_other_call(serving: Serving, raw: Raw) -> None:
    raw.send(frames.frame(99, 0, 0, b"?") + frames.frame(frames.PRIORITY, 0, 9, bytes(5)))
    raw.call(1, b"a")
    raw.read(1)
    raw.send(data(1, b"late") + frames.window_update(1, 5) + frames.reset(1, ErrorCode.CANCEL))
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


def test_more_calls_than_are_allowed_can_be_tried_elsewhere() -> None:
    with serve(limits={"calls_per_connection": 100}) as serving:
        raw = Raw(serving.port)
        for stream in range(1, 200, 2):
            raw.send(headers(stream, raw.block()))
        raw.send(headers(201, raw.block()))
        assert raw.read(201).reset == ErrorCode.REFUSED_STREAM
        raw.send(data(1, framed(b"a")))
        assert raw.read(1).messages == [b"a"]
        raw.socket.close()
