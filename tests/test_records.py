"""Tests of the look at TLS records: many bytes with little content are seen, and large uploads may go on."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
import uvloop

from serving.transport.records import Records

MANY = 400_000


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's and a server's end of a connection over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
        with closing(client), closing(server):
            yield client, server


def read(server: socket.socket, size: int) -> None:
    while size:
        size -= len(server.recv(size))


def test_many_bytes_with_little_content_are_seen(link: tuple[socket.socket, socket.socket]) -> None:
    client, server = link
    records = Records(server)
    client.sendall(bytes(MANY))
    read(server, MANY)
    assert records.are_tiny(1000)
    assert records.are_empty()


def test_bytes_that_the_server_has_not_read_yet_may_have_any_content(
    link: tuple[socket.socket, socket.socket],
) -> None:
    client, server = link
    records = Records(server)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MANY)
    client.sendall(bytes(MANY))
    read(server, 1000)
    assert not records.are_tiny(1000)
    assert not records.are_empty()
    assert not Records(None).are_tiny(1000)


def test_an_ended_connection_has_no_records() -> None:
    """The look at all connections may come between the end of one and the call that tells it."""

    async def end() -> tuple[bool, bool]:
        made = asyncio.get_running_loop().create_future()

        class Ending(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)

        server = await asyncio.get_running_loop().create_server(Ending, "127.0.0.1", 0)
        with closing(socket.create_connection(server.sockets[0].getsockname())):
            transport = await made
            records = Records(transport.get_extra_info("socket"))
            transport.abort()
            await asyncio.sleep(0)
            server.close()
            return records.are_empty(), records.are_tiny(2**20)

    assert uvloop.run(end()) == (False, False)
    assert asyncio.run(end()) == (False, False)
