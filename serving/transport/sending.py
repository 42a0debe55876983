"""Answers on their way to the peer: what its windows let go, and what waits (RFC 9113, section 5.2).

Pure: it returns the frames that may be sent now.
"""

from collections import deque

from serving.transport import frames, headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.messages import PREFIX

#: What is to be sent, in its order.
Buffers = list[bytes | memoryview]


class PeerWindow:
    """Bytes that a peer lets one connection send.

    left: of all streams together. initial: of each new stream.
    """

    __slots__ = ("initial", "left")

    def __init__(self) -> None:
        self.left = self.initial = frames.DEFAULT_WINDOW

    def widen(self, more: int) -> bool:
        """Return whether a WINDOW_UPDATE opens what was shut. Raises ConnectionFault."""
        if not more:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        was_shut = self.left <= 0
        self.left += more
        if self.left > frames.MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {self.left} bytes")
        return was_shut and self.left > 0


class Sending:
    """The answers of one stream, and the trailers that end it.

    window: bytes that the peer lets the stream send; it may be below 0 (section 6.9.2). size: bytes that wait.
    trailers: a header block to be sent once nothing waits.
    """

    __slots__ = ("_peer", "_stream", "_waiting", "size", "trailers", "window")

    def __init__(self, peer: PeerWindow, stream: int) -> None:
        self._peer = peer
        self._stream = stream
        self._waiting: deque[memoryview] | None = None  # since few answers have to wait
        self.window = peer.initial
        self.size = 0
        self.trailers: bytes | None = None

    def message(self, data: bytes) -> Buffers | None:
        """Return a message in DATA frames, if nothing waits before it and the windows let all of it go."""
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
        """Let a message wait behind those that wait already."""
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(memoryview(PREFIX.pack(0, len(data))))
        self._waiting.append(memoryview(data))
        self.size += len(data) + PREFIX.size

    def take(self) -> Buffers:
        """Return the DATA frames of what the windows let go now; they wait no longer."""
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
        """Forget all that waits."""
        self._waiting = None
        self.size = 0

    def _cut(self, size: int, parts: Buffers) -> None:
        """Move the first so many bytes that wait to ``parts``."""
        waiting = self._waiting
        assert waiting is not None
        while size:
            view = waiting[0]
            if len(view) <= size:
                parts.append(waiting.popleft())
                size -= len(view)
            else:
                parts.append(view[:size])
                waiting[0] = view[size:]
                size = 0
        while waiting and not len(waiting[0]):  # an empty message, whose prefix has gone
            waiting.popleft()


def only_answer(peer: PeerWindow, stream: int, data: bytes) -> Buffers | None:
    """Return the frames of a call that goes well: headers, its only message, trailers; None if a window is too small.

    Nothing may have been sent on the stream, and its window must be the initial one.
    """
    size = len(data) + PREFIX.size
    if size > peer.initial or size > peer.left:
        return None
    peer.left -= size
    before = frames.header_frames(stream, headers.ANSWER, end_stream=False)
    after = frames.header_frames(stream, headers.OK, end_stream=True)
    if size > frames.MAX_FRAME_BYTES:
        return [before, *_large(stream, data), after]
    return [b"".join((before, frames.head(frames.DATA, 0, stream, size), PREFIX.pack(0, len(data)), data, after))]


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
