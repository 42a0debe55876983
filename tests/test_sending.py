"""Tests of the data that waits for a peer's windows and the data that goes out, without a socket."""

import random
import struct
import tracemalloc

import pytest

from serving.transport import frames, headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.sending import Buffers, PeerWindow, Sending, only_answer


def read(buffers: Buffers | None) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each frame."""
    data, found = b"".join(buffers or []), []
    while data:
        high, low, kind, flags, stream = frames.HEAD.unpack_from(data)
        end = 9 + (high << 8 | low)
        assert end <= len(data) and end <= 9 + frames.MAX_FRAME_BYTES
        found.append((kind, flags, stream, data[9:end]))
        data = data[end:]
    return found


def payload(buffers: Buffers | None) -> bytes:
    return b"".join(one[3] for one in read(buffers) if one[0] == frames.DATA)


def prefixed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def peer(left: int = 2**30, initial: int = 2**30) -> PeerWindow:
    window = PeerWindow()
    window.left, window.initial = left, initial
    return window


SIZES = [0, 1, 784, 16378, 16379, 16380, 16384, 32763, 32768, 50_000, 300_000]


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_answer_is_headers_its_message_and_trailers(size: int) -> None:
    message, window = random.Random(size).randbytes(size), peer()
    sent = read(only_answer(window, 7, message))
    assert sent[0] == (frames.HEADERS, frames.END_HEADERS, 7, headers.ANSWER)
    assert sent[-1] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 7, headers.OK)
    assert {one[:3] for one in sent[1:-1]} == {(frames.DATA, 0, 7)}
    assert b"".join(one[3] for one in sent[1:-1]) == prefixed(message)
    assert window.left == 2**30 - size - 5


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_several_goes_at_once_where_the_windows_are_open(size: int) -> None:
    message, window = random.Random(size).randbytes(size), peer()
    sending = Sending(window, 3)
    assert payload(sending.message(message)) == prefixed(message)
    assert sending.window == window.left == 2**30 - size - 5


@pytest.mark.parametrize("left,initial", [(104, 1000), (1000, 104)])
def test_nothing_of_a_message_goes_at_once_that_a_window_is_too_small_for(left: int, initial: int) -> None:
    window = peer(left, initial)
    assert only_answer(window, 1, bytes(100)) is None and Sending(window, 1).message(bytes(100)) is None
    assert (window.left, window.initial) == (left, initial)
    assert only_answer(window, 1, bytes(99)) is not None


@pytest.mark.parametrize("step", [1, 3, 5, 7, 1000, 16384, 20_000])
def test_what_waits_goes_as_the_windows_open_in_its_order(step: int) -> None:
    messages = [b"", b"abc", b"", random.Random(step).randbytes(3000), b"end"]
    sending = Sending(peer(initial=0), 1)
    for message in messages:
        assert sending.message(message) is None
        sending.put(message)
    expected = b"".join(map(prefixed, messages))
    assert sending.size == len(expected) and sending.take() == []
    went = b""
    while sending.size:
        sending.window += step
        went += payload(sending.take())
        assert sending.size == len(expected) - len(went)
    assert went == expected


def test_a_message_does_not_overtake_those_that_wait() -> None:
    sending = Sending(peer(initial=0), 1)
    sending.put(b"first")
    sending.window = 1000
    assert sending.message(b"second") is None
    sending.put(b"second")
    assert payload(sending.take()) == prefixed(b"first") + prefixed(b"second")


def test_the_connections_window_holds_for_all_streams_together() -> None:
    window = peer(left=150)
    one, other = Sending(window, 1), Sending(window, 3)
    one.put(bytes(95))
    other.put(bytes(95))
    assert len(payload(one.take())) == 100 and len(payload(other.take())) == 50 and window.left == 0
    assert window.widen(1)
    assert len(payload(other.take())) == 1
    assert other.size == 49


def test_a_window_below_nothing_lets_nothing_go() -> None:
    sending = Sending(peer(initial=10), 1)
    sending.put(bytes(20))
    assert len(payload(sending.take())) == 10
    sending.window -= 5  # by a smaller initial window
    assert sending.take() == []
    sending.window += 6
    assert len(payload(sending.take())) == 1


def test_what_is_dropped_does_not_go() -> None:
    sending = Sending(peer(initial=0), 1)
    sending.put(bytes(20))
    sending.drop()
    sending.window = 1000
    assert sending.size == 0 and sending.take() == []


def test_a_window_tells_when_it_opens_and_cannot_grow_without_end() -> None:
    window = peer(left=0)
    assert window.widen(5) and not window.widen(5) and window.left == 10
    for more, code in ((0, ErrorCode.PROTOCOL_ERROR), (2**31 - 1, ErrorCode.FLOW_CONTROL_ERROR)):
        with pytest.raises(ConnectionFault) as caught:
            window.widen(more)
        assert caught.value.code == code


def test_many_small_messages_that_wait_take_little_more_memory_than_their_bytes() -> None:
    messages = [bytes([number % 251]) * (number % 100) for number in range(10_000)]
    sending = Sending(peer(left=0), 1)
    tracemalloc.start()
    try:
        for message in messages:
            sending.put(message)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * sending.size


@pytest.mark.parametrize("piece", [1, 7, 5000])
def test_small_and_large_messages_that_wait_leave_in_their_order(piece: int) -> None:
    sizes = random.Random(piece).choices((0, 1, 100, 4095, 4096, 5000), k=60)
    messages = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    window, sent = peer(left=0), b""
    sending = Sending(window, 1)
    for message in messages:
        sending.put(message)
        window.left = min(piece, sending.size)
        sent += payload(sending.take())
    window.left = sending.size
    sent += payload(sending.take())
    assert sent == b"".join(map(prefixed, messages))
    assert sending.size == 0
