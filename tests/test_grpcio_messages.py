"""Tests of the messages that gRPC's own server gets compressed."""

import asyncio
import gzip
import zlib
from collections.abc import Callable

import grpc
import pytest

from serving.transport.grpcio_messages import MessageInflater
from serving.transport.messages import MessageError

MAX_BYTES = 2**20
LARGE = bytes(range(256)) * 1024  # beyond what is inflated at once


def inflated(data: bytes) -> bytes:
    async def run() -> bytes:
        inflater = MessageInflater(MAX_BYTES, "the limit is said here")
        try:
            return await inflater.inflated(data, "a connection")
        finally:
            inflater.close()

    return asyncio.run(run())


@pytest.mark.parametrize("message", [b"", b"small", LARGE, b"\x1f", b"x"], ids=len)
@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, bytes], ids=["gzip", "deflate", "not"])
def test_a_message_is_read_as_it_was_before_its_compression(message: bytes, compress: type[bytes]) -> None:
    assert inflated(compress(message)) == message


@pytest.mark.parametrize("level", [1, 6, 9])
def test_every_level_of_zlib_is_known_by_its_first_bytes(level: int) -> None:
    assert inflated(zlib.compress(LARGE, level)) == LARGE


@pytest.mark.parametrize(
    ("make", "code", "text"),
    [
        (lambda: gzip.compress(b"cut off")[:-4], grpc.StatusCode.INVALID_ARGUMENT, "are not a message in gzip"),
        (lambda: gzip.compress(LARGE)[:-4], grpc.StatusCode.INVALID_ARGUMENT, "are not a message in gzip"),
        (lambda: gzip.compress(b"more") + b"!", grpc.StatusCode.INVALID_ARGUMENT, "are not a message in gzip"),
        (lambda: gzip.compress(bytes(MAX_BYTES + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED, "the limit is said here"),
        (lambda: gzip.compress(bytes(100 * MAX_BYTES)), grpc.StatusCode.RESOURCE_EXHAUSTED, "the limit is said here"),
    ],
    ids=["cut-off", "cut-off-large", "more-behind", "too-large", "bomb"],
)
def test_what_cannot_be_inflated_or_is_too_large_is_refused(
    make: Callable[[], bytes], code: grpc.StatusCode, text: str
) -> None:
    with pytest.raises(MessageError, match=text) as caught:
        inflated(make())
    assert caught.value.code is code


def test_a_call_that_ends_gives_up_its_inflation() -> None:
    async def run() -> None:
        inflater = MessageInflater(MAX_BYTES, "")
        waiting = [asyncio.create_task(inflater.inflated(gzip.compress(LARGE), number)) for number in range(8)]
        await asyncio.sleep(0)
        for task in waiting[:-1]:
            task.cancel()
        assert await waiting[-1] == LARGE, "the others hold it up no longer"
        assert all(task.cancelled() for task in (await asyncio.wait(waiting[:-1]))[0])
        inflater.close()

    asyncio.run(run())
