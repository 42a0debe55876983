"""The server: methods, listening sockets, and a stop that loses no call."""

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import grpc

from serving.transport.call import Limits, Method
from serving.transport.connection import Connection, Terms
from serving.transport.sockets import BACKLOG, UnixSocket, listen_tcp

_LAST_SECONDS = 0.2  # after the grace, for the last bytes to leave


class _Details(NamedTuple):
    """What a generic handler is asked with."""

    method: str
    invocation_metadata: tuple[()] = ()


class GrpcServer:
    """Serves gRPC without encryption. Handlers are added as to a ``grpc.aio.Server``, before ``start``.

    One of a unary method may also be no coroutine: it is called at once, returns nothing, and answers then or later by
    ``answer`` or ``finish`` of the call; where the call's ``given_up`` is set, it is told if nobody waits any more. Its
    attribute ``door``, where it has one, can refuse calls by their headers alone, at a fraction of the cost.

    connection_age: seconds after which a client's connection is renewed, 0 for never; grace: seconds that its calls
    then get to finish.
    """

    def __init__(self, limits: Limits, connection_age: float = 0.0, grace: float = 0.0) -> None:
        self._methods: dict[str, Method] = {}
        self._generic: list[grpc.GenericRpcHandler[Any, Any]] = []
        self._connections: set[Connection] = set()
        self._listening: list[asyncio.AbstractServer] = []
        self._unix_sockets: list[UnixSocket] = []
        self._empty = asyncio.Event()
        self._terms = Terms(self._find, limits, self._opened, self._lost, connection_age, grace)

    def add_generic_rpc_handlers(self, handlers: "Iterable[grpc.GenericRpcHandler[Any, Any]]") -> None:
        self._generic += handlers

    def add_registered_method_handlers(
        self, service: str, handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """The same methods as those of a generic handler, by their names."""
        self._methods |= {f"/{service}/{name}": _method(handler) for name, handler in handlers.items()}

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError.

        It is this server's at once; connections that come before ``start`` wait for it.
        """
        opened = listen_tcp(host, port)
        bound: int = opened[0].getsockname()[1]
        for one in opened:
            self._listening.append(
                await self._loop.create_server(self._connection, sock=one, backlog=BACKLOG, start_serving=False)
            )
        return bound

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, in the place of one that nobody listens on. Raises OSError."""
        opened = UnixSocket(path)
        self._unix_sockets.append(opened)
        self._listening.append(
            await self._loop.create_unix_server(
                self._connection, sock=opened.socket, backlog=BACKLOG, start_serving=False
            )
        )

    async def start(self) -> None:
        for listening in self._listening:
            await listening.start_serving()

    async def drain(self, grace: float) -> None:
        """Take no connection any more, and let clients open no more calls; returns once they know, and others are gone.

        Calls that were on their way are taken, and those under way go on, for ``grace`` seconds at most. What a client
        calls later it may send elsewhere, which gRPC's clients do by themselves.
        """
        for listening in self._listening:
            listening.close()
        while self._unix_sockets:
            self._unix_sockets.pop().unlink()
        connections = list(self._connections)
        for connection in connections:
            connection.drain(grace)
        await asyncio.gather(*(connection.told for connection in connections))

    async def stop(self, grace: float) -> None:
        """Drain, and wait for the calls under way, for at most ``grace`` seconds; then end them."""
        draining = asyncio.create_task(self.drain(grace))
        await asyncio.sleep(0)  # it closes what listens, so that no connection is added
        if self._connections:
            self._empty.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for connection in list(self._connections):
            connection.cut_off()
        if self._connections:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), _LAST_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        await draining

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _connection(self) -> Connection:
        return Connection(self._terms, self._loop)

    def _opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _find(self, path: str) -> Method | None:
        if path not in self._methods:
            details: Any = _Details(path)
            for generic in self._generic:
                if handler := generic.service(details):
                    self._methods[path] = _method(handler)
                    break
            else:  # not remembered: clients could ask for any number
                return None
        return self._methods[path]


def _method(handler: "grpc.RpcMethodHandler[Any, Any]") -> Method:
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }
    many = bool(handler.request_streaming), bool(handler.response_streaming)
    behaviour = kinds[many]
    at_once = many == (False, False) and not inspect.iscoroutinefunction(behaviour)
    return Method(
        behaviour,
        *many,
        handler.request_deserializer,
        handler.response_serializer,
        at_once,
        getattr(behaviour, "door", None),
    )
