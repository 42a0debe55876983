"""The native transport's limits: of messages, and of the memory that clients take together."""

import gzip
import struct
import threading
import time
import weakref
from collections.abc import Iterator

import grpc
import pytest

from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.messages import Inflation
from serving.transport.receiving import WINDOW, StreamCall
from tests.raw_client import Raw, data, failure, framed, headers, wait_for
from tests.transport_methods import BYTES_UNDER_WAY, MAX_BYTES, Serving, serve


def test_requests_that_nobody_reads_are_held_back_at_the_client(serving: Serving) -> None:
    sent = 0

    def requests() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(10_000)

    with serving.channel as channel:
        call = channel.stream_stream("/test.Test/NeverRead")(requests())
        wait_for(lambda: serving.memory.used > WINDOW // 2)
        time.sleep(0.3)
        assert serving.memory.used <= 1.1 * WINDOW
        call.cancel()
        wait_for(lambda: serving.memory.used == 0)


def test_a_message_above_the_limit_is_refused_as_soon_as_its_size_is_known(serving: Serving, raw: Raw) -> None:
    raw.send(headers(1, raw.block()) + data(1, struct.pack(">BI", 0, MAX_BYTES + 1) + bytes(100), 0))
    answer = raw.read(1)
    assert answer.headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert answer.headers["grpc-message"] == f"request: {MAX_BYTES + 1} bytes; too large"
    raw.read_until(lambda: answer.reset is not None)
    assert answer.reset == ErrorCode.NO_ERROR  # the rest is not wanted


def test_what_unpacks_to_more_than_the_limit_is_refused(serving: Serving, raw: Raw) -> None:
    bomb = gzip.compress(bytes(100 * MAX_BYTES))
    assert len(bomb) < MAX_BYTES
    raw.send(headers(1, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))))
    raw.send_data(1, framed(bomb, compressed=True))
    assert raw.read(1).headers["grpc-message"] == f"request: more than {MAX_BYTES} bytes once decompressed; too large"


def test_requests_of_too_many_bytes_at_once_are_refused_until_others_are_over(serving: Serving) -> None:
    half = struct.pack(">BI", 0, MAX_BYTES) + bytes(WINDOW - 5)
    clients = [Raw(serving.port) for _ in range(2)]
    for client in clients:
        for stream in range(1, 21, 2):
            client.send(headers(stream, client.block()))
            client.send_data(stream, half, last=False)
    wait_for(lambda: serving.memory.used > BYTES_UNDER_WAY - WINDOW)
    for client in clients:
        client.socket.settimeout(0.5)
        try:
            while True:
                client.read_some()
        except TimeoutError:
            pass
    refused = [answer for client in clients for answer in client.answers.values() if answer.ended]
    assert refused and all(answer.headers["grpc-status"] == "8" for answer in refused)
    assert "bytes (too many); try again later" in refused[0].headers["grpc-message"]
    for client in clients:
        client.socket.close()
    wait_for(lambda: serving.memory.used == 0)
    with serving.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


def test_messages_that_never_come_in_full_cannot_keep_others_out(serving: Serving) -> None:
    parked = Raw(serving.port)
    for stream in range(1, 2 * BYTES_UNDER_WAY // WINDOW + 20, 2):
        parked.send(headers(stream, parked.block()) + data(stream, struct.pack(">BI", 0, MAX_BYTES), 0))
        for _ in range(WINDOW // 16384 - 1):
            parked.send(data(stream, bytes(16384), 0))
        while parked.updates[0] < (stream // 2 - 60) * WINDOW:
            parked.read_some()
    with serving.channel as channel:
        for _ in range(20):
            assert channel.unary_unary("/test.Test/Echo")(bytes(MAX_BYTES), timeout=10) == bytes(MAX_BYTES)
    assert parked.read(1).headers["grpc-status"] == "8"
    parked.socket.close()


def test_answers_that_are_not_taken_are_given_up() -> None:
    with serve(stall_seconds=0.3) as serving:
        raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
        raw.call(1, bytes(1000))
        assert raw.read(1).reset == ErrorCode.CANCEL
        assert serving.memory.used == 0
        raw.socket.close()


def test_what_is_read_after_a_call_is_over_is_not_released_twice(serving: Serving, raw: Raw) -> None:
    raw.send(frames.window_update(0, 2**30))  # for what is echoed before the client gives up
    for stream in range(1, 100, 2):
        many = b"".join(framed(bytes(1000)) for _ in range(10))
        raw.send(headers(stream, raw.block("/test.Test/EchoAll")) + data(stream, many, 0))
        raw.send(frames.reset(stream, ErrorCode.CANCEL))
    raw.call(101, b"a")
    assert raw.read(101).messages == [b"a"]
    wait_for(lambda: serving.memory.used == 0)


def test_a_call_that_is_over_keeps_no_half_message(serving: Serving, raw: Raw) -> None:
    half = framed(bytes(WINDOW - 5))[:-1]
    for stream, method in ((1, "NeverRead"), (3, "Echo")):
        raw.send(headers(stream, raw.block(f"/test.Test/{method}")))
        raw.send_data(stream, half, last=False)
    wait_for(lambda: serving.memory.used > 2 * len(half))
    (connection,) = serving.server._connections
    calls = list(connection.calls.values())
    raw.send(frames.reset(1, ErrorCode.CANCEL) + frames.reset(3, ErrorCode.CANCEL))
    wait_for(lambda: [call._reader for call in calls] == [None, None])


@pytest.mark.parametrize("after_a_step", [True, False])
def test_a_stream_that_is_cancelled_lives_on_in_no_cycle(
    serving: Serving, raw: Raw, no_collection: None, after_a_step: bool
) -> None:
    opening, end = headers(1, raw.block("/test.Test/NeverRead")), frames.reset(1, ErrorCode.CANCEL)
    calls: list[weakref.ref[StreamCall]] = []
    original = StreamCall.begin

    def begin(call: StreamCall) -> None:
        calls.append(weakref.ref(call))
        original(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamCall, "begin", begin)
        raw.send(opening if after_a_step else opening + end)
        wait_for(lambda: calls)
        if after_a_step:
            time.sleep(0.05)
            raw.send(end)
        wait_for(lambda: calls[0]() is None)


def test_headers_count_as_well(serving: Serving, raw: Raw) -> None:
    for stream in range(1, 200, 2):
        raw.send(headers(stream, raw.block("/test.Test/Echo", ("key", "v" * 2000))))
    wait_for(lambda: serving.memory.used > 100 * 2000)


def test_the_transport_says_what_it_refuses_for_its_metadata(serving: Serving) -> None:
    with serving.channel as channel:
        error = failure(channel.unary_unary("/test.Test/Echo"), b"", metadata=(("key", "v" * 17_000),))
    assert (error.details() or "").startswith("metadata: 17")
    [(path, code, text)] = serving.refused
    assert (path, code) == ("/test.Test/Echo", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert text == error.details()


def _fill_windows(client: Raw, stream: int, path: str, message: bytes, *more: tuple[str, str]) -> None:
    """Open a stream with as much of this as its window lets through at first."""
    client.send(headers(stream, client.block(path, *more)))
    client.send_data(stream, message[:WINDOW], last=False)


def _calls_of_others_are_answered(serving: Serving) -> None:
    with serving.channel as channel:
        for _ in range(10):
            assert channel.unary_unary("/test.Test/Echo")(bytes(MAX_BYTES), timeout=10) == bytes(MAX_BYTES)


def test_streams_whose_client_never_reads_cannot_keep_others_out(serving: Serving) -> None:
    parked = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
    many = framed(bytes(30_000)) * 8
    for stream in range(1, 81, 2):
        # Their deadline is far away, so that it does not end them.
        _fill_windows(parked, stream, "/test.Test/EchoAll", many, ("grpc-timeout", "9H"))
    wait_for(lambda: serving.memory.used > BYTES_UNDER_WAY - WINDOW)
    _calls_of_others_are_answered(serving)
    parked.read_until(lambda: parked.answers[1].reset is not None)
    assert parked.answers[1].reset == ErrorCode.ENHANCE_YOUR_CALM
    parked.socket.close()


def test_half_messages_that_come_while_another_is_inflated_cannot_keep_others_out(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest, go_on = Inflation.rest, threading.Event()

    def wait(inflation: Inflation) -> bytes | None:
        go_on.wait(20)
        return rest(inflation)

    monkeypatch.setattr(Inflation, "rest", wait)
    parked = Raw(serving.port)
    compressed = framed(gzip.compress(bytes(200_000)), compressed=True)
    half = struct.pack(">BI", 0, MAX_BYTES) + bytes(WINDOW - len(compressed) - 5)
    for stream in range(1, 41, 2):
        # In a frame of its own, so that nothing of the next message is there when the server begins to inflate.
        _fill_windows(parked, stream, "/test.Test/EchoAll", compressed, ("grpc-encoding", "gzip"))
        parked.send_data(stream, half, last=False)
    wait_for(lambda: serving.memory.used > BYTES_UNDER_WAY - WINDOW)
    _calls_of_others_are_answered(serving)
    assert parked.read(1).headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    go_on.set()
    parked.socket.close()


def test_whole_messages_whose_request_never_ends_cannot_keep_others_out(serving: Serving) -> None:
    parked = Raw(serving.port)
    for stream in range(1, 41, 2):
        _fill_windows(parked, stream, "/test.Test/Echo", framed(bytes(WINDOW - 5)))
    wait_for(lambda: serving.memory.used > BYTES_UNDER_WAY - WINDOW)
    _calls_of_others_are_answered(serving)
    assert parked.read(1).headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    parked.socket.close()


@pytest.mark.parametrize("body", [b"", framed(b"abc")[:-1], framed(b"abc")])
def test_a_request_that_comes_no_further_is_given_up_long_before_its_deadline(body: bytes) -> None:
    with serve(stall_seconds=0.3) as serving:
        raw = Raw(serving.port)
        raw.send(headers(1, raw.block("/test.Test/Echo", ("grpc-timeout", "9H"))) + data(1, body, 0))
        answer = raw.read(1)
        assert answer.headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert answer.headers["grpc-message"] == "the request has not come further for 0.3 seconds"
        assert serving.memory.used == 0
        raw.socket.close()


def test_answers_of_a_stream_that_are_not_taken_are_given_up_long_before_its_deadline() -> None:
    with serve(stall_seconds=0.3) as serving:
        raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 10})
        raw.call(1, b"9 1000", "/test.Test/Repeat", ("grpc-timeout", "9H"))
        assert raw.read(1).reset == ErrorCode.CANCEL
        assert len(raw.answers[1].data) == 10
        wait_for(lambda: serving.memory.used == 0)
        raw.socket.close()


def test_streams_that_are_merely_silent_are_not_given_up() -> None:
    with serve(stall_seconds=0.2) as serving:
        raw = Raw(serving.port)
        raw.send(headers(1, raw.block("/test.Test/EchoAll")) + data(1, framed(b"a"), 0))
        raw.read_until(lambda: raw.answers[1].messages == [b"a"])
        raw.call(3, b"0.8", "/test.Test/Wait")  # a handler that takes its time is the server's doing
        assert raw.read(3).messages == [b"awake"]
        raw.send(data(1, framed(b"b")))
        assert raw.read(1).messages == [b"a", b"b"]
        raw.socket.close()


def test_messages_reserve_their_memory_before_they_are_inflated_and_release_it_with_their_call(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    rest = Inflation.rest

    def wait(inflation: Inflation) -> bytes | None:
        go_on.wait(20)
        return rest(inflation)

    monkeypatch.setattr(Inflation, "rest", wait)
    raw = Raw(serving.port)
    bomb = framed(gzip.compress(bytes(MAX_BYTES)), compressed=True)
    for stream in range(1, 20, 2):
        raw.send(headers(stream, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))) + data(stream, bomb))
    wait_for(lambda: serving.memory.used > 2 * MAX_BYTES)
    time.sleep(0.1)
    assert serving.memory.used < 3 * MAX_BYTES, "only those that have a thread reserve it"
    for stream in range(1, 20, 2):
        raw.send(frames.reset(stream, ErrorCode.CANCEL))
    wait_for(lambda: serving.memory.used == 0)
    go_on.set()
    raw.send(headers(21, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))) + data(21, bomb))
    raw.send(frames.window_update(0, 2**21) + frames.window_update(21, 2**21))
    assert raw.read(21).messages == [bytes(MAX_BYTES)]
    raw.socket.close()


def test_a_handler_that_ends_before_its_request_is_inflated_leaves_nothing_behind(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, rest = threading.Event(), Inflation.rest

    def wait(inflation: Inflation) -> bytes | None:
        go_on.wait(20)
        return rest(inflation)

    monkeypatch.setattr(Inflation, "rest", wait)
    raw = Raw(serving.port)
    small, large = framed(b"1 1"), framed(gzip.compress(bytes(MAX_BYTES)), compressed=True)
    raw.send(headers(1, raw.block("/test.Test/Repeat", ("grpc-encoding", "gzip"))) + data(1, small + large, 0))
    answer = raw.read(1)
    assert (answer.messages, answer.headers["grpc-status"]) == ([b"\0"], "0")
    assert serving.memory.used == 0
    go_on.set()
    raw.socket.close()
