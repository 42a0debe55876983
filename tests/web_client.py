"""A client of the HTTP port, and a server of a table of the tests' own methods."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from serving.errors import ServingError
from serving.metrics.registry import Metrics
from serving.transport.memory import Memory
from serving.transport.methods import Peer, Table, TransportLimits
from serving.web.server import WebServer, web_server
from tests.conftest import settings

PATIENCE = 20.0


@dataclass(frozen=True)
class Answer:
    """An answer: status, fields by name in lower case, and body."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    path: str,
    body: bytes | str | None = None,
    verb: str = "",
    **headers: str,
) -> Answer:
    """Send a request, POST if it has a body. headers: with _ in place of -."""
    return sent_over(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE), path, body, verb, **headers)


def sent_over(
    connection: http.client.HTTPConnection, path: str, body: bytes | str | None = None, verb: str = "", **headers: str
) -> Answer:
    """Send a request over a connection, and close it."""
    with closing(connection):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(verb or ("GET" if body is None else "POST"), path, body, named)
        return answer_of(connection)


def answer_of(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def form(*parts: tuple[str, bytes | str]) -> tuple[bytes, str]:
    """Return a multipart form, and its content type."""
    lines = b""
    for name, value in parts:
        data = value.encode() if isinstance(value, str) else value
        lines += b'--edge\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
    return lines + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@dataclass
class Web:
    """A server of a table, and its event loop."""

    server: WebServer
    port: int
    metrics: Metrics
    refusals: list[str]
    loop: asyncio.AbstractEventLoop
    memory: Memory

    def requests(self) -> dict[tuple[str, ...], int]:
        """Return the counted requests by route and status."""
        [family] = [one for one in self.metrics.collect() if one.name == "capsnet_http_requests"]
        return {(one.labels["route"], one.labels["code"]): int(one.value) for one in family.samples}


@contextmanager
def serving(table: Table, refusal: ServingError | None = None, **chosen: object) -> Iterator[Web]:
    """Serve a table over HTTP, in a thread. refusal: the error of every token that a door does not know."""
    made: list[Web] = []
    started, stopping = threading.Event(), asyncio.Event()

    async def admit(authorization: str | None, peer: Peer) -> None:
        assert refusal, "no door of these methods is undecided"
        raise refusal

    async def main() -> None:
        metrics, refusals = Metrics(), list[str]()
        limits = TransportLimits(
            1, "", 1, "", lambda path, peer, metadata, code, text: refusals.append(text),
            connections=int(str(chosen.pop("connections", 0))), limited=refusals.append,
            idle_seconds=settings(**chosen).idle_seconds,
        )  # fmt: skip
        memory = Memory(settings(**chosen).max_bytes_under_way)
        server = web_server(settings(**chosen), metrics, table, limits, lambda: "", None, admit, memory)
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        made.append(Web(server, port, metrics, refusals, asyncio.get_running_loop(), memory))
        started.set()
        await stopping.wait()
        await server.stop(PATIENCE)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(PATIENCE)
    try:
        yield made[0]
    finally:
        made[0].loop.call_soon_threadsafe(stopping.set)
        thread.join()
