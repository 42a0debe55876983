"""The limits of connections: their number, their time without calls, and headers that do not end."""

import asyncio
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import grpc
import pytest

from serving.transport import frames
from serving.transport.connection import Connection
from serving.transport.connection_limits import CLIENT, FLOOD, FULL, IDLE, REPLACED, UNREAD, ConnectionLimits
from serving.transport.frames import ErrorCode
from serving.transport.handshakes import TlsListener
from serving.transport.listener import Listener
from serving.transport.methods import TransportLimits
from serving.transport.sockets import listen_tcp
from tests.raw_client import Raw, data, framed, headers, wait_for
from tests.transport_methods import Serving, serve


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


def test_a_network_of_ipv6_is_one_client_and_an_ipv4_address_is_one_however_it_is_written() -> None:
    numbers = limits_of(1000, 3)
    for address in ("2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff::3"):
        assert numbers.refusal(address) == ""
        numbers.enter(address)
    assert (numbers.refusal("2001:db8:1:2::4"), numbers.refusal("2001:db8:1:3::4")) == (CLIENT, "")
    for address in ("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1"):
        numbers.enter(address)
    assert numbers.refusal("::ffff:10.0.0.1") == numbers.refusal("10.0.0.1") == CLIENT
    numbers.leave("2001:db8:1:2::2")
    assert numbers.refusal("2001:db8:1:2::4") == ""


@dataclass(eq=False)
class Waiting:
    """A connection that may be replaced."""

    client: str
    seconds: float

    def idle_seconds(self, now: float) -> float:
        return self.seconds


def full_of(*connections: Waiting) -> ConnectionLimits:
    numbers = limits_of(len(connections))
    for connection in connections:
        numbers.enter(connection.client)
    return numbers


def test_the_connection_that_has_been_idle_for_the_longest_time_is_replaced() -> None:
    busy, short, long, longest = (Waiting(f"10.0.0.{index}", index * 15.0) for index in range(4))
    numbers = full_of(busy, short, long, longest)
    assert numbers.replaceable("10.0.0.9", (busy, short, longest, long), 0.0) is longest
    assert numbers.replaceable("10.0.0.9", (busy, short), 0.0) is short
    assert numbers.replaceable("10.0.0.9", (busy,), 0.0) is None
    assert numbers.replaceable("10.0.0.9", (short,), 0.05) is None, "a flood of clients does not search each time"
    assert numbers.replaceable("10.0.0.9", (short,), 0.2) is short


def test_a_connection_that_was_used_a_moment_ago_is_not_replaced() -> None:
    connections = [Waiting(f"10.0.0.{index}", 9.0) for index in range(4)]
    assert full_of(*connections).replaceable("10.0.0.9", connections, 0.0) is None


def test_of_a_crowd_of_idle_connections_one_is_replaced_before_an_honest_clients_only_one() -> None:
    honest, crowd = Waiting("10.0.0.1", 500.0), [Waiting("10.6.6.6", 1.0 + index) for index in range(7)]
    numbers = full_of(honest, *crowd)
    assert numbers.replaceable("10.0.0.2", (honest, *crowd), 0.0) is crowd[-1]


def test_a_client_with_more_than_its_share_gets_nobodys_place() -> None:
    honest, crowd = Waiting("10.0.0.1", 500.0), [Waiting("2001:db8::/64", 500.0) for _ in range(7)]
    numbers = full_of(honest, *crowd)
    assert numbers.replaceable("2001:db8::99", (honest, *crowd), 0.0) is None


def test_a_client_with_just_its_share_gets_the_place_of_its_own_idle_connection() -> None:
    others, own = [Waiting("10.0.0.1", 500.0) for _ in range(4)], [Waiting("10.0.0.2", 20.0 + n) for n in range(4)]
    assert full_of(*others, *own).replaceable("10.0.0.2", (*others, *own), 0.0) is own[-1]
    assert full_of(*own).replaceable("10.0.0.2", own, 0.0) is own[-1], "as behind a proxy"


def test_few_connections_are_replaced_before_the_earlier_ones_have_ended() -> None:
    connections = [Waiting(f"10.0.0.{index}", 60.0) for index in range(32)]
    numbers = full_of(*connections)
    for _ in range(2):
        assert numbers.replaceable("10.0.0.99", connections, 0.0)
        numbers.replaced += 1
    assert numbers.replaceable("10.0.0.99", connections, 0.0) is None
    numbers.replaced -= 1
    assert numbers.replaceable("10.0.0.99", connections, 0.0)


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
    assert not numbers._by_client


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


def test_grpcs_own_server_closes_a_connection_above_the_limit_too() -> None:
    with serve("grpcio", limits={"connections": 2}) as serving:
        served = [Raw(serving.port) for _ in range(2)]
        for client in served:
            client.call(1, b"a")
            assert client.read(1).messages == [b"a"]
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", serving.port), 10) as refused:
            refused.sendall(frames.PREFACE)
            assert refused.recv(100) == b""
        for client in served:
            client.call(3, b"b")
            assert client.read(3).messages == [b"b"]
            client.socket.close()


@pytest.mark.parametrize(("calls", "told"), [(1024, 100), (7, 7)])
def test_grpcs_own_server_tells_a_client_how_many_calls_it_may_open_and_refuses_none_of_them(
    calls: int, told: int
) -> None:
    with (
        serve("grpcio", limits={"calls_per_connection": calls}) as serving,
        socket.create_connection(("127.0.0.1", serving.port), 10) as link,
    ):
        received = link.recv(4096)
        high, low, kind, _, _ = frames.HEAD.unpack_from(received)
        payload = received[frames.HEAD.size : frames.HEAD.size + (high << 8 | low)]
        assert kind == frames.SETTINGS
        assert dict(frames.read_settings(payload))[frames.MAX_CONCURRENT_STREAMS] == told
        with serving.channel as channel:
            echo = channel.unary_unary("/test.Test/Echo")
            waiting = [echo.future(b"a", timeout=20) for _ in range(600)]
            assert {one.code() for one in waiting} == {grpc.StatusCode.OK}


def test_an_idle_connection_gives_its_place_to_a_new_one_with_a_goaway_and_without_losing_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.transport.connection_limits.MIN_REPLACED_SECONDS", 0.2)
    noted: Counter[str] = Counter()
    limits = {"connections": 3, "limited": lambda limit: noted.update([limit])}
    with serve(stall_seconds=0.4, limits=limits) as serving:
        waiting, first, second = (Raw(serving.port) for _ in range(3))
        waiting.call(1, b"", "/test.Test/EchoAll")
        waiting.send(headers(3, waiting.block("/test.Test/EchoAll")))
        for client, idle_before in ((first, 1), (second, 2)):
            client.call(1, b"a")
            assert client.read(1).messages == [b"a"]
            wait_for(lambda count=idle_before: len(idle(serving, 0.3)) == count)
        new = Raw(serving.port)
        new.call(1, b"new")
        assert new.read(1).messages == [b"new"]
        assert first.why_closed() == ErrorCode.NO_ERROR
        assert noted == {REPLACED: 1}
        second.call(3, b"still there")
        assert second.read(3).messages == [b"still there"]
        waiting.send_data(3, framed(b"b"))
        assert waiting.read(3).messages == [b"b"], "a connection with an open call stays"
        for client in (waiting, first, second, new):
            client.socket.close()
        wait_for(lambda: not serving.server._connections)
        assert (serving.server._numbers.replaced, serving.server._numbers._all) == (0, 0)


def idle(serving: Serving, seconds: float) -> list[Connection]:
    """Return the connections that have had calls, and none for some seconds."""
    connections: list[Connection] = list(serving.server._connections)
    now = serving.loop.time()
    return [one for one in connections if one._idleness._last_stream and one.idle_seconds(now) > seconds]


def test_idle_connections_from_few_addresses_cannot_keep_a_new_client_out() -> None:
    noted: Counter[str] = Counter()
    limits = {"connections": 20, "limited": lambda limit: noted.update([limit])}
    with serve(limits=limits) as serving, ExitStack() as stack:

        def connect(address: str) -> Raw:
            link = socket.create_connection(("127.0.0.1", serving.port), 10, source_address=(address, 0))
            raw = Raw.__new__(Raw)
            raw.take(stack.enter_context(link))
            return raw

        for address in 5 * (2, 3, 4, 5):
            connect(f"127.0.0.{address}")
        wait_for(lambda: len(serving.server._connections) == 20)
        honest = connect("127.0.0.6")
        honest.call(1, b"a")
        assert honest.read(1).messages == [b"a"]
        assert noted == {REPLACED: 1}
        for address in 2 * (2, 3, 4, 5):
            with suppress(ConnectionError):
                connect(f"127.0.0.{address}")
        wait_for(lambda: noted[FULL] == 8)
        honest.call(3, b"b")
        assert honest.read(3).messages == [b"b"]
        assert noted[REPLACED] == 1


def test_a_call_on_its_way_to_a_connection_that_is_replaced_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.transport.connection_limits.MIN_REPLACED_SECONDS", 0.1)
    with serve(stall_seconds=0.4, limits={"connections": 1}) as serving:
        old = Raw(serving.port)
        old.call(1, b"a")
        assert old.read(1).messages == [b"a"]
        wait_for(lambda: idle(serving, 0.2))
        new = Raw(serving.port)
        new.call(1, b"new")
        assert new.read(1).messages == [b"new"]
        old.call(3, b"on its way")  # before the client has read the GOAWAY
        assert old.read(3).messages == [b"on its way"]
        assert old.why_closed() == ErrorCode.NO_ERROR
        for client in (old, new):
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
        listener = TlsListener(listening, ssl.create_default_context, connect, TransportLimits(1, "", 1, ""), refuses)
        listener.start_serving()
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        assert await reader.read() == b""
        assert asked == ["127.0.0.1"]
        writer.close()
        listener.close()

    asyncio.run(main())


def test_many_connections_are_accepted_a_few_at_a_time() -> None:
    async def main() -> None:
        made: list[asyncio.Protocol] = []
        [listening] = listen_tcp("127.0.0.1", 0)
        with ExitStack() as clients:
            for _ in range(40):
                clients.enter_context(socket.create_connection(listening.getsockname()))

            def connect() -> asyncio.Protocol:
                made.append(asyncio.Protocol())
                return made[-1]

            listener = Listener(listening, connect, lambda _: False)
            listener.start_serving()
            a_turn = []
            while len(made) < 40:
                before = len(made)
                await asyncio.sleep(0)
                a_turn.append(len(made) - before)
            listener.close()
            assert max(a_turn) <= 4

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


def calls_of(raw: Raw, path: str, streams: Iterable[int], message: bytes) -> bytes:
    """Return the frames of whole calls with the same message."""
    return b"".join(headers(stream, raw.block(path)) + data(stream, framed(message)) for stream in streams)


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
                streams = range(stream, stream + 32, 2)  # at once: a paused connection reads no later calls
                raw.send(calls_of(raw, "/test.Test/Repeat", streams, b"1 1000000"))
                stream += 32
        assert cut_off.wait(10)
        assert noted == {UNREAD: 1}
        wait_for(lambda: serving.memory.used == 0)
        with serving.channel as channel:
            assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
        raw.socket.close()
