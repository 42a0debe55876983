"""The calls of gRPC's own server: the turns in which they ask for messages, and the room that they have in memory."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from serving.transport import grpcio_calls
from serving.transport.counts import EVICTIONS
from serving.transport.grpcio_calls import Call, Holdings, Requests
from serving.transport.grpcio_messages import MessageInflater
from serving.transport.memory import Memory
from serving.transport.messages import MessageError
from serving.transport.methods import Peer, TransportLimits
from tests.transport_methods import serve

MIB = 2**20


class Core:
    """gRPC's context of a call whose messages the test sends. asked: True while a message is waited for."""

    def __init__(self, client: str) -> None:
        self._peer = f"ipv4:{client}:1"
        self._message: asyncio.Future[bytes] | None = None
        self.asked = False

    def invocation_metadata(self) -> None: ...
    def time_remaining(self) -> None: ...
    def auth_context(self) -> dict[str, Any]:
        return {}

    def peer(self) -> str:
        return self._peer

    async def read(self) -> bytes:
        self.asked = True
        self._message = asyncio.get_running_loop().create_future()
        try:
            return await self._message
        finally:
            self.asked = False

    def send(self, message: bytes) -> None:
        assert self._message
        self._message.set_result(message)


class Client:
    """Calls of one client, each of which keeps its latest message for ever."""

    def __init__(self, holdings: Holdings, address: str = "10.0.0.1") -> None:
        self.holdings = holdings
        self._address = address
        self.cores: list[Core] = []
        self.calls: list[asyncio.Task[None]] = []

    def call(self, count: int = 1, patient: bool = False) -> None:
        """Begin calls."""
        for _ in range(count):
            core = Core(self._address)
            self.cores.append(core)
            self.calls.append(asyncio.create_task(self._handle(core, patient)))

    async def _handle(self, core: Core, patient: bool) -> None:
        call = Call("/a/B", core)
        requests = Requests(call, self.holdings, patient)
        try:
            await requests.next()
            call.begun = True
            await asyncio.get_running_loop().create_future()
        finally:
            requests.close()

    @property
    def asked(self) -> list[int]:
        """Return the numbers of the calls that have asked for a message and not got one."""
        return [number for number, core in enumerate(self.cores) if core.asked]


def run(test: Callable[[Holdings], Coroutine[Any, Any, None]], max_bytes: int = 64 * MIB) -> None:
    """Run a test with a memory of this size, and see that nothing is held after it."""

    async def main() -> None:
        limits = TransportLimits(max_bytes, "", max_bytes, "setting")
        inflater = MessageInflater(max_bytes, "")
        holdings = Holdings(limits, Memory(max_bytes), inflater, dict.fromkeys(EVICTIONS, 0))
        await test(holdings)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        inflater.close()
        assert (holdings.bytes, holdings.memory.used, holdings._connections) == (0, 0, {})

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_large_messages_of_a_connection_come_one_after_the_other_and_small_ones_together() -> None:
    async def test(holdings: Holdings) -> None:
        client, other = Client(holdings), Client(holdings, "10.0.0.2")
        client.call(6)
        await settle()
        assert client.asked == [0, 1, 2, 3], "of an unknown size"
        client.cores[0].send(bytes(6 * MIB))
        await settle()
        assert client.asked == [1, 2, 3]
        for core in client.cores[1:4]:
            core.send(bytes(6 * MIB))
        await settle()
        assert client.asked == [4]
        other.call(4)
        await settle()
        assert other.asked == [0, 1, 2, 3], "each connection has turns of its own"
        client.cores[4].send(b"x")
        await settle()
        client.call(30)
        await settle()
        for number in range(5, 13):
            client.cores[number].send(b"x")
            await settle()
        assert client.asked == list(range(13, 36))

    run(test)


def test_a_call_whose_message_does_not_come_leaves_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpcio_calls, "_TURN_SECONDS", 0.05)

    async def test(holdings: Holdings) -> None:
        client = Client(holdings)
        client.call(10)
        await settle()
        assert client.asked == [0, 1, 2, 3]
        client.calls[4].cancel()
        while client.asked != [0, 1, 2, 3, 5, 6, 7, 8]:
            await asyncio.sleep(0.01)
        client.calls[5].cancel()
        await settle()
        assert client.asked == [0, 1, 2, 3, 6, 7, 8, 9]

    run(test)


def test_streams_wait_for_room_and_unary_calls_are_refused() -> None:
    async def test(holdings: Holdings) -> None:
        client = Client(holdings)
        client.call()
        await settle()
        client.cores[0].send(bytes(6 * MIB))
        await settle()
        client.call(patient=True)
        await settle()
        assert client.asked == []
        client.calls[0].cancel()
        await settle()
        assert client.asked == [1]
        client.cores[1].send(bytes(6 * MIB))
        client.call()
        await settle()
        client.cores[2].send(bytes(6 * MIB))
        await settle()
        error = client.calls[2].exception()
        assert isinstance(error, MessageError)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not client.calls[1].done()

    run(test, 10 * MIB)


def test_the_client_that_holds_most_makes_room_for_another() -> None:
    async def test(holdings: Holdings) -> None:
        large, small = Client(holdings), Client(holdings, "10.0.0.2")
        large.call(2)
        await settle()
        for core in large.cores:
            core.send(bytes(4 * MIB))
        small.call()
        await settle()
        small.cores[0].send(bytes(3 * MIB))
        await settle()
        assert [call.cancelled() for call in large.calls] == [False, True], "the newest one goes"
        assert not small.calls[0].done()
        assert (holdings.evicted["memory"], holdings.memory.used) == (1, 7 * MIB)

    run(test, 10 * MIB)


def test_a_call_that_makes_room_ends_with_a_status_and_its_handler_with_it() -> None:
    dropped: list[tuple[str, Peer]] = []
    limits = {"bytes_under_way": 1000, "dropped": lambda text, peer: dropped.append((text, peer))}
    with serve("grpcio", limits=limits) as serving, serving.channel as channel:
        other: Any = grpc.insecure_channel(f"127.0.0.1:{serving.port}", [("grpc.use_local_subchannel_pool", 1)])
        kept = channel.unary_unary("/test.Test/KeepAtOnce").future(bytes(900), timeout=20)
        assert serving.handlers.started.wait(10)
        with other:
            assert other.unary_unary("/test.Test/Echo")(bytes(500), timeout=10) == bytes(500)
        assert kept.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert serving.handlers.cancelled.wait(10)
        text = "requests of 1400 bytes are under way; the limit is 1000 bytes"
        assert kept.details().startswith(text)
        assert [(one.startswith(f"a call is ended: {text}"), peer.address) for one, peer in dropped] == [
            (True, "127.0.0.1")
        ]
