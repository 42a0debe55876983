"""Answers on their way to the peer: frames that its windows allow, and data that waits (RFC 9113, section 5.2).

Pure: the functions return the frames that may be sent now.
"""

import struct
from collections import deque

from serving.transport import frames, headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.messages import PREFIX

_HEAD = frames.HEAD.format.removeprefix(">")
# The frames of a successful call: the headers and the beginning of its message, and its trailers.
_BEFORE = struct.Struct(f">{_HEAD}{len(headers.ANSWER)}s{_HEAD}{PREFIX.format.removeprefix('>')}")
_AFTER = struct.Struct(f">{_HEAD}{len(headers.OK)}s")
# Messages with fewer bytes wait in one piece, since each piece takes some 200 bytes of its own.
_SMALL_BYTES = 4096

#: What is to be sent, in its order.
Buffers = list[bytes | memoryview]


class PeerWindow:
    """The flow-control windows of a peer for one connection, in bytes.

    left: the window of the whole connection. initial: the window of each new stream.
    """

    __slots__ = ("initial", "left")

    def __init__(self) -> None:
        self.left = self.initial = frames.DEFAULT_WINDOW

    def widen(self, more: int) -> bool:
        """Add a WINDOW_UPDATE. Return True if it opens a closed window. Raises ConnectionFault."""
        if not more:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        was_shut = self.left <= 0
        self.left += more
        if self.left > frames.MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {self.left} bytes")
        return was_shut and self.left > 0


class Sending:
    """The answers of one stream, and the trailers that end it.

    window: the stream's window in bytes; it may be below 0 (section 6.9.2). size: the bytes that wait. trailers: the
    header block to send after the waiting data.
    """

    __slots__ = ("_peer", "_small", "_stream", "_waiting", "size", "trailers", "window")

    def __init__(self, peer: PeerWindow, stream: int) -> None:
        self._peer = peer
        self._stream = stream
        self._waiting: deque[memoryview] | None = None  # since few answers have to wait
        self._small = bytearray()  # the small messages behind these
        self.window = peer.initial
        self.size = 0
        self.trailers: bytes | None = None

    def message(self, data: bytes) -> Buffers | None:
        """Return a message in DATA frames, or None if data waits before it or a window is too small."""
        size = len(data) + PREFIX.size
        peer = self._peer
        if self.size or size > self.window or size > peer.left:
            return None
        self.window -= size
        peer.left -= size
        if size > frames.MAX_FRAME_BYTES:
            return _large(self._stream, data)
        return [b"".join((frames.head(frames.DATA, 0, self._stream, size), PREFIX.pack(0, len(data)), data))]

    def put(self, data: bytes) -> None:
        """Add a message to the waiting data."""
        self.size += len(data) + PREFIX.size
        if len(data) < _SMALL_BYTES:
            self._small += PREFIX.pack(0, len(data))
            self._small += data
            return
        waiting = self._pieces()
        if self._small:
            self._join_small(waiting)
        waiting.append(memoryview(PREFIX.pack(0, len(data))))
        waiting.append(memoryview(data))

    def take(self) -> Buffers:
        """Remove the waiting data that the windows allow now, and return it in DATA frames."""
        parts: Buffers = []
        while size := min(self.size, self.window, self._peer.left, frames.MAX_FRAME_BYTES):
            if size < 0:
                break
            self.window -= size
            self._peer.left -= size
            self.size -= size
            parts.append(frames.head(frames.DATA, 0, self._stream, size))
            self._cut(size, parts)
        return parts

    def drop(self) -> None:
        """Drop all waiting data."""
        self._waiting = None
        self._small = bytearray()
        self.size = 0

    def _pieces(self) -> deque[memoryview]:
        if self._waiting is None:
            self._waiting = deque()
        return self._waiting

    def _join_small(self, waiting: deque[memoryview]) -> None:
        """Let the small messages wait as one piece."""
        waiting.append(memoryview(self._small))
        self._small = bytearray()  # a view keeps the other one from growing

    def _cut(self, size: int, parts: Buffers) -> None:
        """Move the first ``size`` waiting bytes to ``parts``."""
        waiting = self._pieces()
        while size:
            if not waiting:
                self._join_small(waiting)
            view = waiting[0]
            if len(view) <= size:
                parts.append(waiting.popleft())
                size -= len(view)
            else:
                parts.append(view[:size])
                waiting[0] = view[size:]
                size = 0


def only_answer(peer: PeerWindow, stream: int, data: bytes) -> Buffers | None:
    """Return all frames of a successful call: headers, its only message, trailers. None if a window is too small.

    Nothing may have been sent on the stream, and its window must be the initial one.
    """
    size = len(data) + PREFIX.size
    if size > peer.initial or size > peer.left:
        return None
    peer.left -= size
    if size > frames.MAX_FRAME_BYTES:
        before = frames.header_frames(stream, headers.ANSWER, end_stream=False)
        return [before, *_large(stream, data), frames.header_frames(stream, headers.OK, end_stream=True)]
    before = _BEFORE.pack(
        0, len(headers.ANSWER), frames.HEADERS, frames.END_HEADERS, stream, headers.ANSWER,
        size >> 8, size & 255, frames.DATA, 0, stream, 0, len(data),
    )  # fmt: skip
    after = _AFTER.pack(0, len(headers.OK), frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream, headers.OK)
    return [b"".join((before, data, after))]


def _large(stream: int, data: bytes) -> Buffers:
    """Return the frames of a message that does not fit in one."""
    room, view = frames.MAX_FRAME_BYTES, memoryview(data)
    full = frames.head(frames.DATA, 0, stream, room)
    at = room - PREFIX.size
    parts: Buffers = [full + PREFIX.pack(0, len(data)), view[:at]]
    while len(data) - at >= room:
        parts += (full, view[at : at + room])
        at += room
    if at < len(data):
        parts += (frames.head(frames.DATA, 0, stream, len(data) - at), view[at:])
    return parts
