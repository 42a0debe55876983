"""Tests of listening sockets: the owner of a port or a path, and the moment from which it has it."""

import asyncio
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from serving.transport.frames import PREFACE
from serving.transport.methods import TransportLimits
from serving.transport.server import GrpcServer
from serving.transport.sockets import UnixSocket, listen_tcp

LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]


def grpc_server() -> GrpcServer:
    return GrpcServer(TransportLimits(2**20, "", 2**20, ""))


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_port_is_taken_from_when_it_is_opened_and_not_only_once_it_is_served(loop: Any) -> None:
    async def main() -> None:
        first, second = grpc_server(), grpc_server()
        port = await first.listen("127.0.0.1", 0)
        with pytest.raises(OSError) as caught:
            await second.listen("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE
        await first.stop(0)
        assert await second.listen("127.0.0.1", port) == port, "a server that never started gives its port back"
        await second.stop(0)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_who_connects_before_the_start_is_served_from_then_on(loop: Any) -> None:
    async def main() -> None:
        server = grpc_server()
        port = await server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PREFACE)
        greeting = asyncio.create_task(reader.read(1))
        try:
            await asyncio.sleep(0.1)
            assert not greeting.done()
            await server.start()
            assert await asyncio.wait_for(greeting, 10)
        finally:
            writer.close()
            await server.stop(0)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_of_servers_that_open_a_port_at_the_same_moment_one_gets_it() -> None:
    for _ in range(20):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        together = threading.Barrier(4)

        def open_it(port: int = port, together: threading.Barrier = together) -> list[socket.socket]:
            together.wait(10)
            try:
                return listen_tcp("127.0.0.1", port)
            except OSError as error:
                assert error.errno == errno.EADDRINUSE
                return []

        with ThreadPoolExecutor(4) as pool:
            opened = [one for work in [pool.submit(open_it) for _ in range(4)] for one in work.result()]
        assert len(opened) == 1
        opened[0].close()


def test_all_addresses_of_a_host_have_the_same_free_port() -> None:
    opened = listen_tcp("localhost", 0)
    assert len({one.getsockname()[1] for one in opened}) == 1
    for one in opened:
        one.close()


def test_the_empty_host_means_every_interface_and_leaves_nothing_open_if_one_address_fails() -> None:
    opened = listen_tcp("", 0)
    port = opened[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    with pytest.raises(OSError):
        listen_tcp("", port)
    for one in opened:
        one.close()
    for one in listen_tcp("", port):
        one.close()


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_server_that_stops_leaves_its_successors_socket_alone(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def main() -> None:
        first, second = grpc_server(), grpc_server()
        await first.listen_unix(str(path))
        await first.start()
        await first.drain(5)
        assert not path.exists()
        await second.listen_unix(str(path))
        await second.start()
        await first.stop(0)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(PREFACE)
        assert await asyncio.wait_for(reader.read(1), 10), "the successor greets"
        writer.close()
        await second.stop(0)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    assert not path.exists()


def test_a_socket_that_somebody_else_put_in_its_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = UnixSocket(str(path))
    path.unlink()
    second = UnixSocket(str(path))
    first.unlink()
    assert path.exists()
    second.unlink()
    assert not path.exists()
    second.unlink()
    first.socket.close()
    second.socket.close()


def test_a_socket_in_use_and_a_file_that_is_no_socket_are_not_replaced(tmp_path: Path) -> None:
    running = UnixSocket(str(tmp_path / "socket"))
    (tmp_path / "file").write_text("precious")
    for name in ("socket", "file"):
        with pytest.raises(OSError) as caught:
            UnixSocket(str(tmp_path / name))
        assert caught.value.errno == errno.EADDRINUSE
    assert (tmp_path / "file").read_text() == "precious"
    assert os.path.exists(tmp_path / "socket")
    running.socket.close()


def test_of_servers_that_replace_a_socket_at_the_same_moment_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    together = threading.Barrier(4)

    def open_it() -> UnixSocket | None:
        together.wait(10)
        try:
            return UnixSocket(str(path))
        except OSError as error:
            assert error.errno == errno.EADDRINUSE
            return None

    with ThreadPoolExecutor(4) as pool:
        opened = [work.result() for work in [pool.submit(open_it) for _ in range(4)]]
    (won,) = [one for one in opened if one]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    won.socket.close()


def test_a_server_that_hangs_with_a_full_queue_is_not_waited_for(tmp_path: Path) -> None:
    path, clients = tmp_path / "socket", []
    with ExitStack() as opened:
        hanging = opened.enter_context(socket.socket(socket.AF_UNIX))
        hanging.bind(str(path))
        hanging.listen(0)
        while True:
            client = opened.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            clients.append(client)
            if client.connect_ex(str(path)):
                break
        errors: list[int | None] = []

        def open_it() -> None:
            with pytest.raises(OSError) as caught:
                UnixSocket(str(path))
            errors.append(caught.value.errno)

        thread = threading.Thread(target=open_it, daemon=True)
        thread.start()
        thread.join(10)
        assert errors == [errno.EADDRINUSE]


def test_a_folder_that_another_program_has_locked_is_no_reason_to_wait(tmp_path: Path) -> None:
    opened: list[UnixSocket] = []
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: opened.append(UnixSocket(str(tmp_path / "socket"))), daemon=True)
        thread.start()
        thread.join(20)
        assert len(opened) == 1
        opened[0].unlink()
        opened[0].socket.close()
    finally:
        os.close(descriptor)
