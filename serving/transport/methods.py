"""The method table: the typed contract between a transport and the handlers of methods.

A table maps a method's path, ``/service/method``, to one of three kinds of method. Both transports serve the same one.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc

from serving.transport.headers import Metadata, Status
from serving.transport.memory import STALL_SECONDS


class Abort(Exception):
    """Raised by a handler to end its call with a status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.text)
        self.status = status


class Context(Protocol):
    """A call, as its handler sees it. Only the event loop's thread may use it.

    given_up: called once when nobody waits for the answer any longer, before there is one.
    """

    given_up: Callable[[], object] | None

    @property
    def deadline(self) -> float | None:
        """Return the deadline by the clock of ``time.monotonic``, or None."""

    @property
    def expired(self) -> bool:
        """Tell if the deadline, and not the client, has ended the call."""

    @property
    def over(self) -> bool:
        """Tell if nobody waits for anything from the handler."""

    def invocation_metadata(self) -> Metadata:
        """Return the client's metadata."""

    def answer(self, data: bytes) -> None:
        """Send the only answer of a unary call, and that all went well."""

    def finish(self, code: grpc.StatusCode, text: str = "", metadata: Metadata = ()) -> None:
        """Send the status, after all that waits to be sent."""


#: Asked as soon as a call's headers are there, with its timeout in seconds or None, its metadata, and how many calls
#: were let in before it and have yet to come in full. Returns what the call is refused with, or None to let it in.
Door = Callable[[float | None, Metadata, int], Status | None]


@dataclass(frozen=True, slots=True)
class UnaryMethod:
    """One request, one answer, by a coroutine.

    answer: returns the answer's bytes, or None after it has called ``answer`` or ``finish`` of the context. Raises
    Abort.
    """

    answer: Callable[[bytes, Context], Awaitable[bytes | None]]
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class CallbackMethod:
    """One request, one answer, without a task of asyncio's.

    begin: takes note of the request and returns at once; ``answer`` or ``finish`` of the context is called then or
    later; raises Abort.
    """

    begin: Callable[[bytes, Context], None]
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class StreamMethod:
    """Any number of requests and of answers.

    answers: takes an iterator of the requests and returns the answers, as an asynchronous generator. Raises Abort.
    """

    answers: Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]
    door: Door | None = None


#: Transports that serve a table: this package's own, and gRPC's own server.
TRANSPORTS = ("native", "grpcio")

Method = UnaryMethod | CallbackMethod | StreamMethod
Table = Mapping[str, Method]


def table(service: str, methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return the part of a method table that a service's methods make, by their names."""
    return {f"/{service}/{name}": method for name, method in methods.items()}


#: Told of each call that the transport itself refuses: its path, its metadata, the code and the text.
Refused = Callable[[str, Metadata, grpc.StatusCode, str], None]


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Bounds of what clients may send.

    message_bytes: of the largest message. message_text and memory_text: told to clients that exceed a limit.
    bytes_under_way: of all requests under way and of answers that are not read. stall_seconds: time without progress
    after which a call that waits for its client is given up.
    """

    message_bytes: int
    message_text: str
    bytes_under_way: int
    memory_text: str
    refused: Refused = lambda *_: None
    stall_seconds: float = STALL_SECONDS


class TransportServer(Protocol):
    """A server of a method table, whichever transport it is."""

    def add_methods(self, methods: Table) -> None:
        """Serve these methods too; before ``start``."""

    async def listen(self, host: str, port: int) -> int:
        """Open a port, 0 for any free one, and return it. Raises OSError."""

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket, in the place of one that nobody listens on. Raises OSError."""

    async def start(self) -> None:
        """Take connections."""

    async def drain(self, grace: float) -> None:
        """Take no further connection or call; those under way go on for ``grace`` seconds at most."""

    async def stop(self, grace: float) -> None:
        """Drain, and wait for the calls under way, for at most ``grace`` seconds; then end them."""
