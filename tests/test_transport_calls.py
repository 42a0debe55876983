"""Calls, streams, codes, details, deadlines and cancellation by gRPC's own client, on both transports."""

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from serving.transport.grpcio_server import _Handlers
from serving.transport.headers import Metadata, Status
from serving.transport.memory import Memory
from serving.transport.methods import TransportLimits
from tests.raw_client import Raw, failure, wait_for
from tests.transport_methods import MAX_BYTES, Serving


@pytest.mark.parametrize("size", [0, 1, 784, 16379, 16380, 65530, 65536, 300_000, MAX_BYTES])
def test_messages_of_every_size_come_back_whole(served: Serving, size: int) -> None:
    message = random.Random(size).randbytes(size)
    with served.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(message, timeout=10) == message


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_read(served: Serving, compression: grpc.Compression) -> None:
    with served.channel as channel:
        assert channel.unary_unary("/test.Test/Echo")(bytes(5000), compression=compression, timeout=10) == bytes(5000)


@pytest.mark.parametrize("size", [60_000, 70_000, 900_000])
def test_compressed_messages_keep_their_order_though_large_ones_are_unpacked_in_a_thread(
    served: Serving, size: int
) -> None:
    requests = [b"%d " % index * (size // 8 if index % 3 == 0 else 3) for index in range(20)]
    with served.channel as channel:
        answers = channel.stream_stream("/test.Test/EchoAll")(
            iter(requests), compression=grpc.Compression.Gzip, timeout=20
        )
        assert list(answers) == requests
        echo = channel.unary_unary("/test.Test/Echo")
        assert echo(requests[3], compression=grpc.Compression.Gzip, timeout=10) == requests[3]


def test_metadata_and_the_deadline_reach_the_handler(served: Serving) -> None:
    metadata = (("key", "value"), ("key-bin", b"\0\xff,"), ("empty", ""))
    with served.channel as channel:
        for _ in range(3):  # the headers are remembered from the second call on
            channel.unary_unary("/test.Test/Echo")(b"", metadata=metadata, timeout=10)
            assert served.handlers.metadata.items() >= dict(metadata).items()
            assert served.handlers.remaining and 8 < served.handlers.remaining < 10.5  # gRPC rounds it up
    assert "te" not in served.handlers.metadata and "content-type" not in served.handlers.metadata


def test_a_handler_refuses_with_text_and_metadata(served: Serving) -> None:
    with served.channel as channel:
        error = failure(channel.unary_unary("/test.Test/Refuse"), b"")
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "ünknown\n100 %")
    metadata: Any = error.trailing_metadata()
    assert dict(metadata).items() >= {"key": "value", "key-bin": b"\0\xff"}.items()


@pytest.mark.parametrize("method", ["Answer", "AnswerAtOnce"])
def test_a_handler_may_answer_by_itself(served: Serving, caplog: pytest.LogCaptureFixture, method: str) -> None:
    with served.channel as channel:
        assert channel.unary_unary(f"/test.Test/{method}")(b"a", timeout=10) == b"a"
    assert not caplog.text


def test_who_answers_later_is_told_when_nobody_waits_any_more(served: Serving) -> None:
    with served.channel as channel:
        assert channel.unary_unary("/test.Test/AnswerLater")(b"0.1", timeout=10) == b"awake"
        assert not served.handlers.cancelled.is_set()
        error = failure(channel.unary_unary("/test.Test/AnswerLater"), b"0.5", timeout=0.2)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert served.handlers.cancelled.wait(10)
        served.handlers.cancelled.clear()
        served.handlers.started.clear()
        call = channel.unary_unary("/test.Test/AnswerLater").future(b"0.5")
        assert served.handlers.started.wait(10)
        call.cancel()
        assert served.handlers.cancelled.wait(10)
        time.sleep(0.6)  # an answer that is too late harms nothing
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


@pytest.mark.parametrize("method", ["Fail", "FailAtOnce"])
def test_what_a_handler_raises_stays_in_the_log(served: Serving, caplog: pytest.LogCaptureFixture, method: str) -> None:
    with served.channel as channel:
        error = failure(channel.unary_unary(f"/test.Test/{method}"), b"")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "secret" in caplog.text


def test_unknown_methods_and_services_are_unimplemented(served: Serving) -> None:
    with served.channel as channel:
        for path in ("/test.Test/Nothing", "/nothing.Nothing/Nothing", "/"):
            assert failure(channel.unary_unary(path), b"").code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_deadline_ends_a_call_and_its_handler(served: Serving) -> None:
    with served.channel as channel:
        error = failure(channel.unary_unary("/test.Test/Wait"), b"60", timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.handlers.cancelled.wait(10)


def test_a_call_that_the_client_cancels_ends_its_handler(served: Serving) -> None:
    with served.channel as channel:
        call = channel.unary_unary("/test.Test/Wait").future(b"60")
        assert served.handlers.started.wait(10)
        call.cancel()
        assert served.handlers.cancelled.wait(10)


def test_a_connection_that_is_lost_ends_its_handlers(served: Serving) -> None:
    client = Raw(served.port)
    client.call(1, b"60", "/test.Test/Wait")
    assert served.handlers.started.wait(10)
    client.socket.close()
    assert served.handlers.cancelled.wait(10)


@pytest.mark.parametrize("count,size", [(0, 0), (1, 100), (1000, 100), (40, 50_000), (3, 1_000_000)])
def test_many_answers_come_in_full(served: Serving, count: int, size: int) -> None:
    with served.channel as channel:
        answers = list(channel.unary_stream("/test.Test/Repeat")(b"%d %d" % (count, size), timeout=20))
    assert [len(answer) for answer in answers] == [size] * count


def test_many_requests_make_one_answer(served: Serving) -> None:
    parts = [bytes([index]) * 9000 for index in range(100)]
    with served.channel as channel:
        assert channel.stream_unary("/test.Test/Join")(iter(parts), timeout=10) == b"".join(parts)


def test_a_stream_answers_each_request_in_order(served: Serving) -> None:
    requests = [random.Random(index).randbytes(index * 37 % 40_000) for index in range(1000)]
    with served.channel as channel:
        assert list(channel.stream_stream("/test.Test/EchoAll")(iter(requests), timeout=30)) == requests


def test_a_client_that_reads_slowly_holds_up_its_own_stream_alone(served: Serving) -> None:
    with served.channel as channel, served.channel as other:
        answers = channel.unary_stream("/test.Test/Repeat")(b"400 100000", timeout=30)
        next(answers)
        time.sleep(0.3)
        assert other.unary_unary("/test.Test/Echo")(b"a", timeout=5) == b"a"
        assert sum(1 for _ in answers) == 399


@pytest.mark.parametrize("method", ["Keep", "KeepAtOnce", "KeepOne"])
def test_a_request_counts_until_its_handler_ends_and_the_handler_alone_keeps_its_bytes(
    served: Serving, method: str
) -> None:
    handlers, held = served.handlers, served.server.figures.held_bytes
    with served.channel as channel:
        call = channel.stream_stream(f"/test.Test/{method}")(iter([bytes(100_000)]))
        assert handlers.started.wait(10)
        assert held() >= 100_000
        wait_for(lambda: sys.getrefcount(handlers.kept[0]) == 2)
        call.cancel()
        wait_for(lambda: held() == 0)


def test_a_thousand_calls_at_once_on_one_connection_are_answered(served: Serving) -> None:
    with served.channel as channel:
        echo = channel.unary_unary("/test.Test/Echo")
        futures = [echo.future(b"%d" % index, timeout=20) for index in range(1000)]
        assert [future.result() for future in futures] == [b"%d" % index for index in range(1000)]


def test_metadata_above_the_limit_is_refused_and_harms_no_other_call(served: Serving) -> None:
    with served.channel as channel:
        waiting = channel.unary_unary("/test.Test/Wait").future(b"0.5", timeout=10)
        assert served.handlers.started.wait(10)
        error = failure(channel.unary_unary("/test.Test/Echo"), b"", metadata=(("key", "v" * 17_000),))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert waiting.result() == b"awake"


@pytest.mark.parametrize("size", [17_000, 70_000, 200_000])
def test_a_call_with_too_much_metadata_ends_alone(served: Serving, size: int) -> None:
    metadata = (("key", "v" * size),)
    with served.channel as channel:
        waiting = channel.unary_unary("/test.Test/Wait").future(b"0.5", timeout=20)
        assert served.handlers.started.wait(10)
        for _ in range(3):
            error = failure(channel.unary_unary("/test.Test/Echo"), b"", metadata=metadata)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert waiting.result() == b"awake"
        # The tables of both sides are still equal.
        channel.unary_unary("/test.Test/Echo")(b"", metadata=(("key", "value"), ("other", "one")), timeout=10)
        assert served.handlers.metadata.items() >= {"key": "value", "other": "one"}.items()


def test_a_coroutine_that_does_not_look_like_one_is_awaited(served: Serving) -> None:
    with served.channel as channel:
        assert channel.unary_unary("/test.Test/Hidden")(b"a", timeout=10) == b"a"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("method", ["HiddenAtOnce", "ForgetToAnswer", "FailInStream"])
def test_a_handler_that_does_not_keep_its_contract_leaves_nobody_waiting(
    served: Serving, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with served.channel as channel:
        error = failure(channel.unary_unary(f"/test.Test/{method}"), b"a")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "a handler failed" in caplog.text
    assert "secret" not in (error.details() or "")


def test_a_handler_that_is_cancelled_by_itself_leaves_nobody_waiting(served: Serving) -> None:
    with served.channel as channel:
        error = failure(channel.unary_unary("/test.Test/CancelItself"), b"a")
    assert error.code() is grpc.StatusCode.CANCELLED


def test_a_stream_is_refused_after_its_answers_with_text_and_metadata(served: Serving) -> None:
    with served.channel as channel:
        answers = channel.stream_stream("/test.Test/RefuseStream")(iter([b"a", b"b"]), timeout=10)
        assert next(answers) == b"a"
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "ünknown\n100 %")
    assert dict(error.trailing_metadata()).items() >= {"key": "value", "key-bin": b"\0\xff"}.items()


def test_the_deadline_ends_a_stream_and_its_handler(served: Serving) -> None:
    with served.channel as channel:
        answers = channel.stream_stream("/test.Test/EchoAll")(_endless(), timeout=0.5)
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.handlers.ended.wait(10)


def test_a_stream_that_the_client_cancels_ends_its_handler(served: Serving) -> None:
    with served.channel as channel:
        answers = channel.stream_stream("/test.Test/EchoAll")(_endless())
        assert next(answers) == b"a"
        answers.cancel()
        assert served.handlers.ended.wait(10)


def test_a_message_above_the_limit_is_refused(served: Serving) -> None:
    with served.channel as channel:
        assert len(channel.unary_unary("/test.Test/Echo")(bytes(MAX_BYTES), timeout=10)) == MAX_BYTES
        error = failure(channel.unary_unary("/test.Test/Echo"), bytes(MAX_BYTES + 1))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert channel.unary_unary("/test.Test/Echo")(b"a", timeout=10) == b"a"


def test_requests_of_too_many_bytes_under_way_are_refused(served: Serving) -> None:
    with served.channel as channel:
        wait = channel.unary_unary("/test.Test/Wait")
        waiting = [wait.future(b"1".ljust(MAX_BYTES), timeout=20) for _ in range(8)]
        codes = [one.code() for one in waiting]
        assert codes.count(grpc.StatusCode.OK) >= 3
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert channel.unary_unary("/test.Test/Echo")(bytes(MAX_BYTES), timeout=10) == bytes(MAX_BYTES)


def test_a_door_refuses_and_says_when_to_come_back(served: Serving) -> None:
    with served.channel as channel:
        guarded = channel.unary_unary("/test.Test/Guarded")
        assert guarded(b"a", timeout=10) == b"a"
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        served.handlers.door = Status(code, "full", (("grpc-retry-pushback-ms", "70"),))
        error = failure(guarded, b"a")
        assert (error.code(), error.details()) == (code, "full")
        metadata: Any = error.trailing_metadata()
        assert dict(metadata)["grpc-retry-pushback-ms"] == "70"
        served.handlers.door = None
        assert guarded(b"b", timeout=10) == b"b"


def _endless() -> Iterator[bytes]:
    """One message, and then nothing for long."""
    yield b"a"
    time.sleep(2)


def test_a_status_that_grpc_can_no_longer_send_ends_the_call_without_a_word() -> None:
    class Gone:
        """The context of a call that is over, of which gRPC's core knows and grpc.aio does not yet."""

        async def abort(self, code: grpc.StatusCode, text: str, metadata: Metadata) -> None:
            raise RuntimeError("ExecuteBatchError")

    handlers = _Handlers(TransportLimits(1, "", 1, ""), Memory(1))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(handlers._end(Gone(), Status(grpc.StatusCode.NOT_FOUND, "not here")))
