"""The limits of connections: their number, their time without calls, and headers that do not end."""

import asyncio
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import cast

import pytest

from serving.transport import frames
from serving.transport.connection import Connection
from serving.transport.connection_limits import CLIENT, FLOOD, FULL, IDLE, UNREAD, ConnectionLimits
from serving.transport.frames import ErrorCode
from serving.transport.handshakes import TlsContexts, TlsListener
from serving.transport.methods import TransportLimits
from serving.transport.sockets import listen_tcp
from tests.raw_client import Raw, headers, wait_for
from tests.transport_methods import serve


def limits_of(connections: int = 0, per_client: int = 0) -> ConnectionLimits:
    return ConnectionLimits(
        TransportLimits(1000, "", 1000, "", connections=connections, connections_per_client=per_client)
    )


def test_connections_are_refused_above_the_limit_of_all_and_of_their_address() -> None:
    numbers = limits_of(5, 2)
    for address in ("10.0.0.1", "10.0.0.1", "2001:db8::1"):
        assert numbers.refusal(address) == ""
        numbers.enter(address)
    assert (numbers.refusal("10.0.0.1"), numbers.refusal("2001:db8::1")) == (CLIENT, "")
    for address in ("127.0.0.1", "10.0.0.2"):
        numbers.enter(address)
    assert {numbers.refusal(address) for address in ("10.0.0.3", "127.0.0.1", "unix")} == {FULL}
    numbers.leave("10.0.0.1")
    assert numbers.refusal("10.0.0.1") == ""


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "unix"])
def test_this_machine_and_its_proxies_may_take_all_connections(address: str) -> None:
    numbers = limits_of(100, 1)
    for _ in range(99):
        assert numbers.refusal(address) == ""
        numbers.enter(address)


def test_no_limit_means_any_number() -> None:
    numbers = limits_of()
    for _ in range(10_000):
        numbers.enter("10.0.0.1")
    assert numbers.refusal("10.0.0.1") == ""


def test_an_address_is_forgotten_with_its_last_connection() -> None:
    numbers = limits_of(10, 10)
    for index in range(1000):
        numbers.refusal(f"10.0.0.{index}")
        numbers.enter("10.1.1.1")
        numbers.leave("10.1.1.1")
    assert not numbers._by_address


def test_a_connection_above_the_limit_is_closed_at_once_and_others_are_served() -> None:
    noted: Counter[str] = Counter()
    with serve(limits={"connections": 3, "limited": lambda limit: noted.update([limit])}) as serving:
        served = [Raw(serving.port) for _ in range(3)]
        for client in served:
            client.call(1, b"a")
            assert client.read(1).messages == [b"a"]
        for _ in range(20):
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", serving.port), 10) as refused:
                refused.sendall(frames.PREFACE)
                assert refused.recv(100) == b""
        assert noted == {FULL: 20}
        served.pop().socket.close()
        wait_for(lambda: len(serving.server._connections) == 2)
        served.append(Raw(serving.port))
        for client in served:
            client.call(3, b"b")
            assert client.read(3).messages == [b"b"]
            client.socket.close()


def test_a_connection_without_calls_is_closed_after_a_time_with_a_goaway() -> None:
    noted: Counter[str] = Counter()
    with serve(limits={"idle_seconds": 0.4, "limited": lambda limit: noted.update([limit])}) as serving:
        busy, idle = Raw(serving.port), Raw(serving.port)
        busy.call(1, b"2", "/test.Test/Wait")
        idle.call(1, b"a")
        assert idle.read(1).messages == [b"a"]
        assert idle.why_closed() == ErrorCode.NO_ERROR
        assert noted == {IDLE: 1}
        assert busy.read(1).messages == [b"awake"], "a call in flight is no idle time"
        assert busy.why_closed() == ErrorCode.NO_ERROR
        for client in (busy, idle):
            client.socket.close()


def test_grpcs_own_server_closes_idle_connections_too() -> None:
    with serve("grpcio", limits={"idle_seconds": 0.5}) as serving:
        raw = Raw(serving.port)
        raw.call(1, b"a")
        assert raw.read(1).messages == [b"a"]
        raw.read()
        assert raw.closed and [last for last, *_ in raw.went_away][-1:] == [1], "the call is known to be answered"
        raw.socket.close()


def test_a_refused_client_of_a_port_with_tls_is_closed_before_its_handshake() -> None:
    async def main() -> None:
        asked: list[str] = []

        def refuses(address: str) -> bool:
            asked.append(address)
            return True

        def connect() -> Connection:
            raise AssertionError("no connection is made")

        [listening] = listen_tcp("127.0.0.1", 0)
        listener = TlsListener(listening, cast(TlsContexts, None), connect, lambda _: None, refuses)
        await listener.start_serving()
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        assert await reader.read() == b""
        assert asked == ["127.0.0.1"]
        writer.close()
        listener.close()

    asyncio.run(main())


def test_a_connection_with_calls_now_and_then_stays() -> None:
    with serve(limits={"idle_seconds": 1.0}) as serving:
        raw = Raw(serving.port)
        for stream in range(1, 40, 2):
            raw.call(stream, b"a")
            assert raw.read(stream).messages == [b"a"]
            time.sleep(0.1)
        assert not raw.went_away
        raw.socket.close()


def test_headers_that_do_not_end_end_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.frame_reader.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("serving.transport.server.HEADER_SECONDS", 0.3)
    noted: Counter[str] = Counter()
    with serve(limits={"limited": lambda limit: noted.update([limit])}) as serving:
        slow, other = Raw(serving.port), Raw(serving.port)
        slow.send(headers(1, slow.block(), 0))
        assert slow.why_closed() == ErrorCode.ENHANCE_YOUR_CALM
        assert noted == {FLOOD: 1}
        other.call(1, b"a")
        assert other.read(1).messages == [b"a"], "a connection that waits for its client is no fault"
        for client in (slow, other):
            client.socket.close()


def test_a_client_that_reads_nothing_is_cut_off_when_its_answers_fill_the_memory() -> None:
    noted: Counter[str] = Counter()
    cut_off = threading.Event()

    def limited(limit: str) -> None:
        noted.update([limit])
        cut_off.set()

    with serve(limits={"limited": limited, "bytes_under_way": 2**21, "message_bytes": 2**24}) as serving:
        raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 2**30})
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(frames.window_update(0, 2**30))
        stream = 1
        with suppress(OSError):
            while not cut_off.is_set() and stream < 4000:
                raw.call(stream, b"1 1000000", "/test.Test/Repeat")
                stream += 2
        assert cut_off.wait(10)
        assert noted == {UNREAD: 1}
        wait_for(lambda: serving.memory.used == 0)
        with serving.channel as channel:
            assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
        raw.socket.close()
