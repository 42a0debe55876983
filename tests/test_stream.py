"""Streams without a transport: what they keep of requests that are answered."""

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import grpc

from serving.errors import InvalidRequest
from serving.services.stream import Stream

REQUESTS = 8


class WrongQuery:
    """A request that is answered with an error."""

    size = 1

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.error = InvalidRequest("request", "wrong")

    def encode_error(self, code: grpc.StatusCode, text: str) -> bytes:
        return text.encode()


def test_a_stream_that_waits_for_its_client_keeps_nothing_of_requests_that_are_answered() -> None:
    kept: weakref.WeakSet[WrongQuery] = weakref.WeakSet()

    def parse(data: bytes) -> Any:
        query = WrongQuery(data)
        kept.add(query)
        return query

    async def messages(read: asyncio.Event, end: asyncio.Event) -> AsyncIterator[bytes]:
        for _ in range(REQUESTS):
            yield bytes(1000)
        read.set()
        await end.wait()

    async def main() -> None:
        read, end = asyncio.Event(), asyncio.Event()
        call: Any = SimpleNamespace(traced=False, keep=lambda _: None, in_turns=lambda work: work)
        stream = Stream(call, lambda error, *_: (grpc.StatusCode.INVALID_ARGUMENT, str(error)), REQUESTS + 1)
        answers = stream.answers(messages(read, end), parse, lambda *_: None)  # type: ignore[arg-type]
        async with aclosing(answers):
            assert await anext(answers) == b"request: wrong"
            await asyncio.wait_for(read.wait(), 10)
            assert len(kept) == 0
            end.set()
            assert len([answer async for answer in answers]) == REQUESTS - 1

    asyncio.run(main())


def test_the_bytes_of_answers_that_wait_are_told_to_the_call() -> None:
    kept = 0

    def keep(size: int) -> None:
        nonlocal kept
        kept += size

    async def main() -> None:
        call: Any = SimpleNamespace(traced=False, keep=keep, in_turns=lambda work: work)
        text = "x" * 10_000
        stream = Stream(call, lambda *_: (grpc.StatusCode.INVALID_ARGUMENT, text), REQUESTS + 1)

        async def messages() -> AsyncIterator[bytes]:
            for _ in range(REQUESTS):
                yield b""

        async with aclosing(stream.answers(messages(), WrongQuery, lambda *_: None)) as answers:  # type: ignore[arg-type]
            await anext(answers)
            assert 0.9 * len(text) * (REQUESTS - 1) < kept <= len(text) * (REQUESTS - 1)
            assert len([answer async for answer in answers]) == REQUESTS - 1
        assert kept == 0

    asyncio.run(main())
