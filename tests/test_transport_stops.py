"""Stops in good order, on both transports where gRPC's own client is on the other side."""

import asyncio
import errno
import socket
import threading
import time
from typing import Any

import grpc
import pytest
from hpack import Encoder

from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.methods import TransportLimits
from tests.raw_client import Raw, failure, wait_for
from tests.transport_methods import BYTES_UNDER_WAY, MAX_BYTES, Handlers, new_server, serve


def test_a_stop_answers_what_is_under_way_and_takes_no_more(transport: str) -> None:
    with serve(transport) as serving, serving.channel as channel:
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


def test_after_a_drain_every_call_that_grpcs_own_server_answers_is_in_its_handler() -> None:
    with serve("grpcio") as serving, serving.channel as channel:
        wait = channel.unary_unary("/test.Test/Wait")

        async def begin_and_drain() -> tuple[list[Any], int]:
            calls = [wait.future(b"0.5", timeout=20) for _ in range(20)]
            time.sleep(0.3)  # the event loop is blocked: a call has come, and Python has not seen it
            await serving.server.drain(10)
            return calls, len(serving.server._handlers._calls)

        calls, begun = asyncio.run_coroutine_threadsafe(begin_and_drain(), serving.loop).result(20)
        codes = [call.code() for call in calls]
        assert codes.count(grpc.StatusCode.OK) == begun > 0
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}


def test_a_stop_ends_what_takes_longer_than_its_grace(transport: str) -> None:
    with serve(transport) as serving, serving.channel as channel:
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


def test_connections_are_renewed_without_a_call_lost(transport: str) -> None:
    with serve(transport, connection_age=0.2, grace=5) as serving, serving.channel as channel:
        echo = channel.unary_unary("/test.Test/Echo")
        for _ in range(200):
            assert echo(b"a", timeout=10) == b"a"
            time.sleep(0.005)


def test_a_unix_socket_goes_with_the_server(transport: str, tmp_path: Any) -> None:
    path = tmp_path / "socket"

    async def serve_once() -> None:
        server = new_server(transport, TransportLimits(MAX_BYTES, "", BYTES_UNDER_WAY, ""))
        server.add_methods(Handlers().table())
        await server.listen_unix(str(path))
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{path}") as link:
            channel: Any = link
            assert await channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"
        await server.stop(1)

    asyncio.run(serve_once())
    assert not path.exists()


def test_a_server_that_never_started_gives_its_port_back(transport: str) -> None:
    async def main() -> None:
        limits = TransportLimits(MAX_BYTES, "", BYTES_UNDER_WAY, "")
        first, second = new_server(transport, limits), new_server(transport, limits)
        port = await first.listen("127.0.0.1", 0)
        with pytest.raises(OSError) as caught:
            await second.listen("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE
        await first.stop(0)
        assert await second.listen("127.0.0.1", port) == port
        await second.stop(0)

    asyncio.run(main())


def test_a_client_that_has_connected_and_not_greeted_is_told_of_a_drain() -> None:
    with serve() as serving, socket.create_connection(("127.0.0.1", serving.port), 10) as link:
        wait_for(lambda: serving.server._connections)
        draining = threading.Thread(target=serving.drain, args=(5,))
        draining.start()
        wait_for(lambda: all(connection._draining for connection in serving.server._connections))
        raw = Raw.__new__(Raw)
        raw.take(link)
        raw.call(1, b"a")
        assert raw.read(1).messages == [b"a"], "calls that were on their way are answered"
        assert raw.went_away[0][:2] == (2**31 - 1, ErrorCode.NO_ERROR)
        raw.read()
        assert raw.went_away[-1][:2] == (1, ErrorCode.NO_ERROR)
        draining.join()


def test_a_stop_ends_a_connection_that_never_greets() -> None:
    with serve() as serving, socket.create_connection(("127.0.0.1", serving.port), 10) as link:
        wait_for(lambda: serving.server._connections)
        serving.stop(0)
        assert link.recv(100) == b""
