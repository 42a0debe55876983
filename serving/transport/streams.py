"""The calls of one connection, what they send, and how patient the server is with their client."""

import asyncio
from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import grpc

from serving.transport import frames, headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.memory import Memory
from serving.transport.methods import TransportLimits
from serving.transport.patience import Patience
from serving.transport.sending import Buffers, PeerWindow, Sending

# Frames that bring no call further: how many at once, and how many a second; no client in good faith comes near.
_MAX_IDLE_FRAMES = 10_000
_IDLE_FRAMES_A_SECOND = 1000
# Calls that a client cancels, beside as many as were answered: how many at once, and how many a second.
_MAX_CANCELLED = 200
_CANCELLED_A_SECOND = 33
_FRAMES_AN_ANSWER = 2  # that are no idle ones: a window of the stream's and of the connection's, or a ping
_BYTES_A_FRAME = 4096  # of answers, for whose windows a frame is no idle one
_CALLS_AN_IDLE_FRAME = 16  # whose windows are changed with the work of such a frame
_SETTINGS_BYTES_AN_IDLE_FRAME = 96  # which are read with the work of such a frame
_TABLE_BYTES = 4096  # that HPACK's table has if nobody says otherwise


class StreamState(Enum):
    """States of a stream (RFC 9113, section 5.1), as far as a call has them.

    One that is half-closed (local) is reset at once, since nothing more is wanted of its client, and so is closed.
    """

    OPEN = 1
    HALF_CLOSED_REMOTE = 2
    CLOSED = 3


class ConnectionState(Enum):
    """States of a connection: from its preface (RFC 9113, section 3.4) to its GOAWAY (section 6.8)."""

    #: The client's preface has not come in full.
    PREFACE = 1
    #: The client's first SETTINGS frame has not come.
    SETTINGS = 2
    OPEN = 3
    #: GOAWAY with the last stream that is answered is sent; later ones are ignored.
    GOING_AWAY = 4
    CLOSED = 5


class Link(Protocol):
    """The connection that carries the frames."""

    loop: asyncio.AbstractEventLoop

    def send(self, data: bytes, /) -> None:
        """Send with all else that this turn of the event loop brings."""

    def send_all(self, buffers: Buffers, /) -> None:
        """Send several in their order."""

    def drained(self) -> None:
        """Take note that the answer to the drain's ping has come."""

    def all_over(self) -> None:
        """Take note that no call is left after a GOAWAY."""


class SendingCall(Protocol):
    """A call that has something to send."""

    stream: int

    @property
    def sending(self) -> Sending:
        """Return what waits to be sent."""

    def pump(self) -> None:
        """Send what waits, as far as the client lets it."""

    def abandon(self) -> None:
        """Take note that the client has gone, or is to be sent nothing more."""


class OpenCall(SendingCall, Protocol):
    """A call of a stream that is not closed, as its connection sees it."""

    state: StreamState

    def receive(self, data: bytes | memoryview, size: int, end: bool, /) -> None:
        """Take what the client sent; size: bytes of it that count for flow control; end: it is all."""

    def end(self) -> None:
        """Take note that the client has sent all, and said so without data."""

    def settle(self) -> None:
        """Keep no view of bytes that came together with others."""

    def wait_for_client(self) -> None:
        """Take note that what the client is to send has not come in full."""

    def wake_writer(self) -> None:
        """Let a handler go on that waits for the client to read."""

    def refuse(self, code: grpc.StatusCode, text: str, /) -> None:
        """End the call with an error, whatever its handler does."""


class Streams:
    """The streams of one connection that have a call, by number, and what holds for all of them."""

    def __init__(self, link: Link, limits: TransportLimits, memory: Memory) -> None:
        self.loop = link.loop
        self.send = link.send
        self.send_all = link.send_all
        self.limits = limits
        self.memory = memory
        self.peer = PeerWindow()
        self.state = ConnectionState.PREFACE
        #: The highest stream that the client has opened.
        self.last_stream = 0
        self.calls: dict[int, OpenCall] = {}
        #: Set while the client's system takes no bytes.
        self.paused = False
        #: The client's table for answers' headers is to be smaller, which it has yet to be told.
        self.shrinks_table = False
        self._link = link
        self._blocked: dict[int, SendingCall] = {}  # calls that wait for the connection's window alone
        now = self.loop.time()
        self._idle_frames = Patience(_MAX_IDLE_FRAMES, _IDLE_FRAMES_A_SECOND, now)
        self._cancelled = Patience(_MAX_CANCELLED, _CANCELLED_A_SECOND, now)
        #: Bytes that were sent since the last frame that brought no call further.
        self.sent_bytes = 0
        self._answered = 0  # messages and calls, in all
        self._counted = [0, 0]  # of them: when the last idle frame came, and when the last call was cancelled

    def __iter__(self) -> Iterator[OpenCall]:
        """Yield the calls that are open now, which may end meanwhile."""
        return iter(list(self.calls.values()))

    def send_answer(self, buffers: Buffers) -> None:
        """Send a message, or a whole answer."""
        self._answered += 1
        self.send_all(buffers)

    def send_trailers(self, stream: int, block: bytes) -> None:
        """End a stream with its status."""
        self._answered += 1
        self.send_headers(stream, block, end_stream=True)

    def send_headers(self, stream: int, block: bytes, end_stream: bool) -> None:
        """Send a header block."""
        if self.shrinks_table:
            self.shrinks_table = False
            block = headers.NO_TABLE + block
        self.send(frames.header_frames(stream, block, end_stream))

    def send_reset(self, stream: int, code: ErrorCode) -> None:
        """Send a RST_STREAM frame."""
        self.send(frames.reset(stream, code))

    def reset(self, call: SendingCall, code: ErrorCode) -> None:
        """End a call without an answer."""
        self.send_reset(call.stream, code)
        call.abandon()

    def reset_faulty(self, call: SendingCall, code: ErrorCode) -> None:
        """End a call for what its client did, which counts as a call that is cancelled. Raises ConnectionFault."""
        self.reset(call, code)
        self.count_cancelled()

    def go_away(self, code: ErrorCode, text: str = "") -> None:
        """Tell the client the last call that is answered; those that it opens later are ignored."""
        self.send(frames.go_away(self.last_stream, code, text))
        self.state = ConnectionState.GOING_AWAY

    def forget(self, stream: int) -> None:
        """Take note that a call is over."""
        self.calls.pop(stream, None)
        if self._blocked:
            self._blocked.pop(stream, None)
        if not self.calls and self.state is ConnectionState.GOING_AWAY:
            self._link.all_over()

    def block(self, call: SendingCall) -> None:
        """Take note whether a call waits for the connection's window; one that waits for its own is left alone."""
        if call.sending.size and call.sending.window > 0:
            self._blocked[call.stream] = call
        else:
            self._blocked.pop(call.stream, None)

    def check_opened(self, stream: int) -> None:
        """Raise ConnectionFault for a stream that the client never opened; one that is over is no fault."""
        if not stream % 2 or (stream > self.last_stream and self.state is not ConnectionState.GOING_AWAY):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream}, which is not open")

    def widen(self, more: int) -> None:
        """Let the connection send so many bytes more. Raises ConnectionFault."""
        if self.peer.widen(more):
            for call in list(self._blocked.values()):
                if self.peer.left <= 0:
                    return
                call.pump()

    def widen_call(self, call: SendingCall, more: int) -> None:
        """Let a call send so many bytes more; one that may then send too many, or none more, is reset."""
        call.sending.window += more
        if not more:
            self.reset_faulty(call, ErrorCode.PROTOCOL_ERROR)
        elif call.sending.window > frames.MAX_WINDOW:
            self.reset_faulty(call, ErrorCode.FLOW_CONTROL_ERROR)
        elif call.sending.size:
            call.pump()

    def take_settings(self, flags: int, payload: bytes) -> None:
        """Take the client's settings (section 6.5). Raises ConnectionFault."""
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set")
            return
        self.count_idle(len(payload) // _SETTINGS_BYTES_AN_IDLE_FRAME)
        old = window = self.peer.initial
        for setting, value in frames.read_settings(payload):
            frames.check_setting(setting, value)
            if setting == frames.INITIAL_WINDOW_SIZE:
                window = value
            elif setting == frames.HEADER_TABLE_SIZE:
                self.shrinks_table = value < _TABLE_BYTES
        self.set_initial_window(window)
        if self.state is ConnectionState.SETTINGS:
            self.state = ConnectionState.OPEN
        # Before what the new windows allow: until then the old ones hold for the client.
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if window > old:
            self.pump()

    def set_initial_window(self, window: int) -> None:
        """Change the windows of all calls by as much as that of new ones (section 6.9.2). Raises ConnectionFault."""
        change = window - self.peer.initial
        if not change:
            return
        self.peer.initial = window
        self.count_idle(1 + len(self.calls) // _CALLS_AN_IDLE_FRAME)
        for call in self:
            call.sending.window += change
            if call.sending.window > frames.MAX_WINDOW:
                text = f"a window of {call.sending.window} bytes"
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, text)

    def pump(self) -> None:
        """Send what the calls' windows allow now."""
        for call in self:
            if call.sending.size:
                call.pump()

    def count_idle(self, cost: int = 1) -> None:
        """Count a frame that brings no call further. Raises ConnectionFault when there are too many."""
        answered = self._answered - self._counted[0]
        self._idle_frames.earn(_FRAMES_AN_ANSWER * answered + self.sent_bytes // _BYTES_A_FRAME)
        self._counted[0], self.sent_bytes = self._answered, 0
        if not self._idle_frames.spend(cost, self.loop.time()):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring no call further")

    def count_cancelled(self) -> None:
        """Count a call that the client has cancelled. Raises ConnectionFault when there are too many."""
        self._cancelled.earn(self._answered - self._counted[1])
        self._counted[1] = self._answered
        if not self._cancelled.spend(1, self.loop.time()):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many calls that are cancelled")
