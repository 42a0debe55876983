"""Length-prefixed messages: bytes in, messages out, without a socket."""

import gzip
import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterable

import grpc
import pytest

from benchmarks.attacks.packed import empty_gzip
from serving.transport import messages
from serving.transport.messages import Inflation, MessageError, MessageReader, whole

MAX_BYTES = 2**20


def framed(message: bytes, compressed: bool = False) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def reader(encoding: str = "identity") -> MessageReader:
    return MessageReader(MAX_BYTES, "too large", encoding)


def fed(to: MessageReader, pieces: Iterable[bytes]) -> list[bytes]:
    """Return the messages of the pieces; every inflation ends before the next piece comes."""
    found = []
    for piece in pieces:
        found += to.feed(piece)
        while to.inflation:
            found += to.inflated(to.inflation.rest())
    return found


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


MESSAGES = [b"", b"a", bytes(784), b"", random.Random(1).randbytes(40_000), b"\0\0\0\0\0", b"end"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 100, 16384, 100_000])
def test_messages_come_out_whole_however_their_bytes_are_cut(size: int) -> None:
    to = reader()
    data = b"".join(map(framed, MESSAGES))
    assert fed(to, pieces(data, size)) == MESSAGES
    assert to.buffered == 0


@pytest.mark.parametrize("encoding,compress", [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_compressed_messages_come_out_in_their_order(encoding: str, compress: object, size: int) -> None:
    assert callable(compress)
    expected = [*MESSAGES, bytes(300_000), b"after"]
    data = b"".join(
        framed(compress(message), True) if index % 2 else framed(message) for index, message in enumerate(expected)
    )
    assert fed(reader(encoding), pieces(data, size)) == expected


def test_what_comes_while_a_message_is_inflated_waits_for_it() -> None:
    to = reader("gzip")
    large = framed(gzip.compress(bytes(300_000)), True)
    assert to.feed(framed(b"before") + large + framed(b"after")[:3]) == [b"before"]
    assert to.inflation and to.buffered == len(large) - 5 + 3
    assert to.feed(framed(b"after")[3:]) == [] and to.feed(framed(b"last") + b"\0") == []
    assert to.inflated(to.inflation.rest()) == [bytes(300_000), b"after", b"last"]
    assert to.inflation is None and to.buffered == 1


def test_many_small_messages_that_inflate_to_much_are_not_all_inflated_at_once() -> None:
    to = reader("gzip")
    bomb = framed(gzip.compress(bytes(60_000)), True)
    at_once = to.feed(bomb * 100)
    assert at_once == [bytes(60_000)]
    assert to.inflation and 0 < to.inflation.spent <= 6000 and not to.inflation.done
    found, count = at_once, 0
    while to.inflation:
        assert to.inflation.max_rest <= MAX_BYTES + 1
        more = to.inflated(to.inflation.rest())
        assert len(more) <= 3
        found, count = found + more, count + 1
    assert found == [bytes(60_000)] * 100 and count >= 40


@pytest.mark.parametrize("limit", [1, 1000, 2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("more", [-1, 0, 1, 2, 100_000])
def test_a_limit_below_what_is_inflated_at_once_is_kept_to_the_byte(limit: int, more: int) -> None:
    to = MessageReader(limit, "too large", "deflate")
    message = random.Random(1).randbytes(1) * (limit + more)
    data = framed(zlib.compress(message), True)
    if len(data) > limit:  # refused for its size before
        return
    if more <= 0:
        assert fed(to, [data]) == [message]
    else:
        assert refusal(to, data).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_of_compressed_bytes_that_give_nothing_few_are_read_at_once() -> None:
    for size, at_once in ((15_000, True), (17_000, False)):
        inflation = Inflation(empty_gzip(size), "gzip", MAX_BYTES)
        assert (inflation.done, inflation.ended) == (at_once, at_once)
        assert 2**16 - 6000 < inflation.spent <= 2**16
        assert inflation.rest() == b"" and inflation.ended


def test_a_message_that_takes_too_long_to_inflate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = empty_gzip(300_000)
    assert fed(reader("gzip"), [framed(data, True)]) == [b""]
    monkeypatch.setattr(messages, "_MAX_SECONDS", 0.0)
    error = refusal(reader("gzip"), framed(data, True))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(error) == f"request: {len(data)} bytes that take too long to decompress"


@pytest.mark.parametrize("data", [gzip.compress(bytes(2**20)), empty_gzip(2**20)], ids=["much", "nothing"])
def test_an_inflation_that_nobody_waits_for_ends_soon(data: bytes) -> None:
    inflation = Inflation(data, "gzip", MAX_BYTES)
    inflation.given_up = True
    assert inflation.rest() is None


def test_a_message_that_waits_for_its_inflation_takes_little_more_memory_than_its_compressed_bytes() -> None:
    compressed = gzip.compress(bytes(2**20))
    tracemalloc.start()
    try:
        waiting = [Inflation(compressed + b"", "gzip", 2**21) for _ in range(50)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not any(one.done for one in waiting)
    assert held < 50 * (len(compressed) + 1000)
    assert waiting[0].rest() == bytes(2**20)


def test_what_is_kept_is_counted() -> None:
    to = reader()
    assert to.feed(framed(bytes(1000)) + framed(b"abcdef")[:8]) == [bytes(1000)]
    assert to.buffered == 3, "the prefix is read, and what it says is known"
    assert to.feed(b"def") == [b"abcdef"]


def refusal(to: MessageReader, *data: bytes) -> MessageError:
    with pytest.raises(MessageError) as caught:
        fed(to, data)
    return caught.value


def test_a_message_above_the_limit_is_refused_by_its_prefix_alone() -> None:
    error = refusal(reader(), struct.pack(">BI", 0, MAX_BYTES + 1))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(error) == f"request: {MAX_BYTES + 1} bytes; too large"
    assert len(fed(reader(), [framed(bytes(MAX_BYTES))])) == 1


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 50 * MAX_BYTES])
def test_a_message_that_inflates_beyond_the_limit_is_refused(size: int) -> None:
    error = refusal(reader("gzip"), framed(gzip.compress(bytes(size)), True))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(error) == f"request: more than {MAX_BYTES} bytes once decompressed; too large"


@pytest.mark.parametrize(
    "body",
    [b"abc", b"", zlib.compress(b"abc"), gzip.compress(b"abc")[:-1], gzip.compress(b"") * 2, b"\x1f\x8b" * 40_000],
)
def test_bytes_that_are_not_compressed_as_they_say_are_refused(body: bytes) -> None:
    error = refusal(reader("gzip"), framed(body, True))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error) == f"{len(body)} bytes that are not a message in gzip"


@pytest.mark.parametrize("flag,encoding", [(1, "identity"), (2, "gzip"), (255, "deflate")])
def test_a_flag_that_says_nothing_is_refused(flag: int, encoding: str) -> None:
    assert refusal(reader(encoding), struct.pack(">BI", flag, 3)).code is grpc.StatusCode.INTERNAL


def test_only_bytes_that_are_one_message_are_whole() -> None:
    assert whole(framed(b"abc")) == b"abc" and whole(framed(b"")) == b""
    for data in (b"", b"\0\0\0\0", framed(b"abc")[:-1], framed(b"abc") + b"d", framed(b"abc", True)):
        assert whole(data) is None


def test_a_message_that_comes_in_small_pieces_takes_little_more_memory_than_its_bytes() -> None:
    to, data = reader(), framed(bytes(range(256)) * 1000)
    tracemalloc.start()
    try:
        for piece in pieces(data[:-1], 64):
            assert to.feed(piece) == []
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 1.5 * to.buffered
    assert to.feed(data[-1:]) == [data[5:]]
