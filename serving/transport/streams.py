"""The calls of one connection, their sending, and the limits for useless frames of their client."""

import asyncio
from collections.abc import Iterator, Reversible
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import grpc

from serving.transport import frames, headers
from serving.transport.counts import Counts
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.memory import Holder, Memory
from serving.transport.methods import Peer, TransportLimits
from serving.transport.patience import Patience
from serving.transport.rounds import Place, Rounds
from serving.transport.sending import Buffers, PeerWindow, Sending
from serving.transport.unpacking import Unpacker

#: The most work of a connection's turn on the event loop: about 1 ms. Most turns end by it and not by the clock, so
#: that a machine that is busy does not cut them into more.
WORK_A_TURN = 2**16
# Frames that advance no call: the most at once, and the most a second. No honest client comes near these limits.
_MAX_IDLE_FRAMES = 10_000
_IDLE_FRAMES_A_SECOND = 1000
# Calls that a client cancels beyond the number of answered ones: the most at once, and the most a second.
_MAX_CANCELLED = 1000
_CANCELLED_A_SECOND = 33
_FRAMES_AN_ANSWER = 2  # not counted as idle: two updates of windows, the stream's and the connection's, or a ping
_BYTES_A_FRAME = 4096  # sent bytes for which one more frame is not counted as idle
_MIN_MESSAGE_BYTES = 32  # the fewest bytes of a message with an image
_SMALL_MESSAGES_AN_IDLE_FRAME = 16
_MESSAGE_WORK = 2048  # of each further message of a frame
_WINDOW_WORK = 32  # of each call whose window is changed
_PUMP_WORK = 384  # of each call that may send since windows are opened together
_CALLS_AN_IDLE_FRAME = 16  # calls whose windows are changed with the work of one idle frame
_SETTINGS_BYTES_AN_IDLE_FRAME = 96  # bytes of settings that take the work of one idle frame
_TABLE_BYTES = 4096  # HPACK's default size of the table
_MAX_RESETS_KNOWN = 128  # the latest streams that were reset; frames of them may be on their way


class StreamState(Enum):
    """The states of a stream (RFC 9113, section 5.1) that a call can have.

    A half-closed (local) stream is reset at once, since its client's data is not needed, so it is closed.
    """

    OPEN = 1
    HALF_CLOSED_REMOTE = 2
    CLOSED = 3


class ConnectionState(Enum):
    """The states of a connection: from its preface (RFC 9113, section 3.4) to its GOAWAY (section 6.8)."""

    #: The client's preface is not complete.
    PREFACE = 1
    #: The client's first SETTINGS frame has not come.
    SETTINGS = 2
    OPEN = 3
    #: GOAWAY was sent, with the last stream that is answered. Later streams are ignored.
    GOING_AWAY = 4
    CLOSED = 5


class Link(Protocol):
    """The connection that carries the frames."""

    loop: asyncio.AbstractEventLoop

    def send(self, data: bytes, /) -> None:
        """Send data together with the other data of this turn of the event loop."""

    def send_all(self, buffers: Buffers, /) -> None:
        """Send several buffers in their order."""

    def read_on(self) -> None:
        """Read what was left for a later turn."""

    def drained(self) -> None:
        """Note the answer to the drain's ping."""

    def all_over(self) -> None:
        """Note that the last call after a GOAWAY has ended."""


class SendingCall(Protocol):
    """The sending side of a call."""

    stream: int

    @property
    def sending(self) -> Sending:
        """Return the data that waits to be sent."""

    def pump(self) -> None:
        """Send waiting data, as far as the client's windows allow."""

    def abandon(self) -> None:
        """Note that the client has gone, or must not be sent anything else."""


class OpenCall(SendingCall, Holder, Protocol):
    """The part of an open call that its connection uses."""

    state: StreamState

    def receive(self, data: bytes, size: int, end: bool, /) -> None:
        """Take what the client sent; size: bytes of it that count for flow control; end: it is all."""

    def end(self) -> None:
        """Note the end of the client's data, which came without data."""

    def wait_for_client(self) -> None:
        """Note that the request is not complete yet."""

    def wake_writer(self) -> None:
        """Resume a handler that waits for the client to read."""

    def refuse(self, code: grpc.StatusCode, text: str, /) -> None:
        """End the call with an error, whatever its handler does."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The things that the connections of a server share."""

    limits: TransportLimits
    memory: Memory
    unpacker: Unpacker
    counts: Counts = field(default_factory=Counts, kw_only=True)
    rounds: Rounds = field(default_factory=Rounds, kw_only=True)


class Streams:
    """The calls of one connection by stream, and their common state."""

    def __init__(self, link: Link, shared: Shared) -> None:
        self.counts = shared.counts
        self.place = Place(shared.rounds, link.read_on)
        self.loop = link.loop
        self.send = link.send
        self.send_all = link.send_all
        self.limits = shared.limits
        self.memory = shared.memory
        self.unpacker = shared.unpacker
        self.peer = PeerWindow()
        #: The client, as far as the connection shows it.
        self.client = Peer("")
        self.state = ConnectionState.PREFACE
        #: The highest stream that the client has opened.
        self.last_stream = 0
        self.calls: dict[int, OpenCall] = {}
        #: The bytes that they hold; kept by Memory.
        self.held = 0
        #: Set while the client's system takes no bytes.
        self.paused = False
        #: The bytes of streamed answers that were sent in this turn of the event loop.
        self.sent_this_turn = 0
        #: True until the client was told of a smaller table for the headers of answers, which it asked for.
        self.shrinks_table = False
        self._all_over = link.all_over
        self._blocked: dict[int, SendingCall] = {}  # calls that wait only for the connection's window
        self._resets: dict[int, None] = {}  # the latest streams that were reset, oldest first
        now = self.loop.time()
        #: Work beside that of each frame since the frames' reader looked. A turn of a millisecond has WORK_A_TURN.
        self.further_work = 0
        self._idle_frames = Patience(_MAX_IDLE_FRAMES, _IDLE_FRAMES_A_SECOND, now)
        self._cancelled = Patience(_MAX_CANCELLED, _CANCELLED_A_SECOND, now)
        #: Bytes sent since the last frame that advanced no call.
        self.sent_bytes = 0
        self._answered = 0  # all messages and calls so far
        self._counted = [0, 0]  # the value of _answered at the last idle frame, and at the last cancelled call

    @property
    def holders(self) -> Reversible[OpenCall]:
        """Return the open calls, for Memory."""
        return self.calls.values()

    def __iter__(self) -> Iterator[OpenCall]:
        """Yield the calls that are open now. They may end during the iteration."""
        return iter(list(self.calls.values()))

    def leave(self) -> None:
        """Forget the connection, which has ended. Nothing is sent from now on."""
        self.send = self.send_all = self._all_over = _nothing
        self.place.leave()

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
        self.counts.resets_sent += 1
        self._resets[stream] = None
        if len(self._resets) > _MAX_RESETS_KNOWN:
            del self._resets[next(iter(self._resets))]
        self.send(frames.reset(stream, code))

    def reset(self, call: SendingCall, code: ErrorCode) -> None:
        """End a call without an answer."""
        self.send_reset(call.stream, code)
        call.abandon()

    def reset_faulty(self, call: SendingCall, code: ErrorCode) -> None:
        """End a call for a fault of its client. It counts as a cancelled call. Raises ConnectionFault."""
        self.reset(call, code)
        self.count_cancelled()

    def go_away(self, code: ErrorCode, text: str = "") -> None:
        """Tell the client the last call that will be answered. Later calls are ignored."""
        self.counts.goaways[code] += 1
        self.send(frames.go_away(self.last_stream, code, text))
        self.state = ConnectionState.GOING_AWAY

    def forget(self, stream: int) -> None:
        """Note that a call has ended."""
        self.calls.pop(stream, None)
        if self._blocked:
            self._blocked.pop(stream, None)
        if not self.calls and self.state is ConnectionState.GOING_AWAY:
            self._all_over()

    def block(self, call: SendingCall) -> None:
        """Note a call that waits for the connection's window and not for its own, or that waits for neither."""
        if call.sending.size and call.sending.window > 0:
            self._blocked[call.stream] = call
        else:
            self._blocked.pop(call.stream, None)

    def check_opened(self, stream: int) -> None:
        """Raise ConnectionFault for a stream that the client never opened. A stream that is over is no fault."""
        if not stream % 2 or (stream > self.last_stream and self.state is not ConnectionState.GOING_AWAY):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream}, which is not open")

    def refuse_late(self, stream: int) -> None:
        """Reset a stream that its client ended before this frame (section 5.1). Raises ConnectionFault.

        Frames after a reset are ignored, since the client may not have read it when it sent them. So are those after a
        GOAWAY.
        """
        if stream not in self._resets and stream <= self.last_stream:
            self.send_reset(stream, ErrorCode.STREAM_CLOSED)
            self.count_idle()

    def widen(self, more: int) -> None:
        """Widen the connection's window by ``more`` bytes. Raises ConnectionFault."""
        if self.peer.widen(more):
            for call in list(self._blocked.values()):
                if self.peer.left <= 0:
                    return
                self.further_work += _PUMP_WORK
                call.pump()

    def widen_call(self, call: SendingCall, more: int) -> None:
        """Widen a call's window by ``more`` bytes. Reset the call if ``more`` is 0 or the window gets too large."""
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
            elif setting == frames.HEADER_TABLE_SIZE and value < _TABLE_BYTES:
                self.shrinks_table = True  # also if it grows again at once (RFC 7541, section 4.2)
        self.set_initial_window(window)
        if self.state is ConnectionState.SETTINGS:
            self.state = ConnectionState.OPEN
        # Before the data that the new windows allow: until then the old windows hold for the client.
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if window > old:
            self.pump()

    def set_initial_window(self, window: int) -> None:
        """Set the window of new calls, and change all others by the difference (section 6.9.2).

        Raises ConnectionFault.
        """
        change = window - self.peer.initial
        if not change:
            return
        self.count_idle(1 + len(self.calls) // _CALLS_AN_IDLE_FRAME)
        self.further_work += _WINDOW_WORK * len(self.calls)
        open_now = [call.sending for call in self]  # a call without any gets it here, with the earlier initial window
        self.peer.initial = window
        for sending in open_now:
            sending.window += change
            if sending.window > frames.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {sending.window} bytes")

    def pump(self) -> None:
        """Send the waiting data that the windows allow now."""
        for call in self:
            if call.sending.size:
                self.further_work += _PUMP_WORK
                call.pump()

    def count_idle(self, cost: int = 1) -> None:
        """Count a frame that advances no call. Raises ConnectionFault if there are too many."""
        answered = self._answered - self._counted[0]
        self._idle_frames.earn(_FRAMES_AN_ANSWER * answered + self.sent_bytes // _BYTES_A_FRAME)
        self._counted[0], self.sent_bytes = self._answered, 0
        if not self._idle_frames.spend(cost, self.loop.time()):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring no call further")

    def count_messages(self, received: list[bytes]) -> None:
        """Count the messages of one frame. Raises ConnectionFault if too many are too small for a request."""
        self.further_work += _MESSAGE_WORK * (len(received) - 1)
        small = sum(len(message) < _MIN_MESSAGE_BYTES for message in received)
        if small >= _SMALL_MESSAGES_AN_IDLE_FRAME:
            self.count_idle(small // _SMALL_MESSAGES_AN_IDLE_FRAME)

    def count_cancelled(self) -> None:
        """Count a call that the client has cancelled. Raises ConnectionFault if there are too many."""
        self._cancelled.earn(self._answered - self._counted[1])
        self._counted[1] = self._answered
        if not self._cancelled.spend(1, self.loop.time()):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many calls that are cancelled")


def _nothing(*_: object) -> None:
    """Do nothing."""
