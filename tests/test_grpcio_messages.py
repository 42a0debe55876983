"""Tests of the messages that gRPC's own server gets compressed."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from serving.transport import grpcio_server
from serving.transport.grpcio_calls import Call
from serving.transport.grpcio_messages import MessageInflater
from serving.transport.headers import Status
from serving.transport.memory import Memory
from serving.transport.messages import MessageError
from serving.transport.methods import Context, StreamMethod, TransportLimits

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


def test_a_client_that_goes_while_an_answer_is_sent_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC then fails to send, and says so by an error of its own."""

    class Gone:
        """The context of a call whose client has gone."""

        def invocation_metadata(self) -> None: ...
        def time_remaining(self) -> None: ...
        def peer(self) -> str:
            return "unknown"

        async def read(self) -> object:
            return grpc.aio.EOF

        async def write(self, answer: bytes) -> None:
            raise grpc.aio.InternalError("Failed")

    async def answers(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        yield b"1"

    async def main() -> Status:
        handlers = grpcio_server._Handlers(TransportLimits(1000, "", 1000, ""), Memory(1000))
        return await handlers._streamed(StreamMethod(answers), Call("/a/B", Gone()), Gone())

    assert asyncio.run(main()).code is grpc.StatusCode.CANCELLED
    assert caplog.records == []
