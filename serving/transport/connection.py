"""One client's connection: its frames, its streams and what both sides may send (RFC 9113, sections 3 to 6)."""

import asyncio
import logging
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import grpc

from serving.transport import frames, headers
from serving.transport.call import ENCODINGS, WINDOW, Call, Limits, Method
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.headers import HeaderReader, MalformedRequest, RequestHead

#: Calls that a client may have open on one connection.
MOST_CALLS = 4096
#: Bytes that a client may send on a connection ahead of what is read.
_WINDOW = 2**24
_MOST_BLOCK = headers.MOST_BYTES_READ  # bytes of a header block
_MOST_CONTINUATIONS = 8
# Frames that bring no call further, in so many seconds; no client in good faith comes near.
_MOST_IDLE_FRAMES = 10_000
_PINGS_AN_ANSWER = 2  # that do not count, since some clients measure the network with them
_CALLS_AN_IDLE_FRAME = 16  # whose windows are changed with the work of such a frame
_IDLE_FRAMES_SECONDS = 10.0
_HANDSHAKE_SECONDS = 20.0
# A client whose system takes no more bytes for that long is cut off.
_STALL_SECONDS = 60.0
_PING_SECONDS = 2.0
_MOST_BUFFERED = 2**20
# Seconds of silence before the first probe, and between probes; and how many may stay unanswered.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}
_HEAD_BYTES = frames.HEAD.size
_TABLE_BYTES = 4096  # that HPACK's table has if nobody says otherwise
_CLOSE_SECONDS = 5.0  # for the last bytes to leave
_GOING = b"drain\0\0\0"
_NOT_BLOCK_ALONE = frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY
_KNOWN_ENCODINGS = (headers.IDENTITY, *ENCODINGS)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every connection of a server.

    find: the method with a path. opened and lost: told of each connection. age: seconds after which a connection is
    renewed, 0 for never. grace: seconds that calls then get to finish.
    """

    find: Callable[[str], Method | None]
    limits: Limits
    opened: Callable[["Connection"], None]
    lost: Callable[["Connection"], None]
    age: float
    grace: float


class Connection(asyncio.Protocol):
    """Reads frames as they come and writes what a turn of the event loop has brought in one piece."""

    def __init__(self, terms: Terms, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: The client's system takes no more bytes for now.
        self.paused = False
        #: Bytes that the client lets this side send.
        self.window = frames.DEFAULT_WINDOW
        #: By stream, calls with bytes that wait for the client to let them be sent.
        self.blocked: dict[int, Call] = {}
        self._terms = terms
        self._reader: HeaderReader[Method] = HeaderReader(terms.find)
        self._calls: dict[int, Call] = {}
        self._rest = b""
        self._greeted = False  # the preface has come
        #: The client's table for answers' headers is to be smaller, which it has yet to be told.
        self.shrinks_table = False
        self._settled = False  # the client's first settings have come
        self._last_stream = 0
        self._stream_window = frames.DEFAULT_WINDOW
        self._may_receive = _WINDOW
        self._block: tuple[int, int, bytearray, int] | None = None  # stream, flags, header block, continuations so far
        # Of the bytes that are being read: streams that a door has let in, and streams that are answered already, while
        # the client has yet to send the rest.
        self._expected: set[int] = set()
        self._unwanted: set[int] = set()
        self._idle_frames = 0
        self._idle_since = loop.time()
        self._out: list[bytes] = []
        self._draining = False
        self._ending = False  # the client has been told of the last stream that is answered
        #: Done once it has, or has gone.
        self.told: asyncio.Future[None] = loop.create_future()
        self._closing = False
        self._timers: list[asyncio.TimerHandle] = []
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.set_write_buffer_limits(_MOST_BUFFERED)
        self._keep_alive()
        self._terms.opened(self)
        self._timers.append(self.loop.call_later(_HANDSHAKE_SECONDS, self._check_settled))
        if self._terms.age:  # spread, so that clients that came together do not come back together
            age = self._terms.age * random.uniform(0.9, 1.1)
            self._timers.append(self.loop.call_later(age, self.drain, self._terms.grace))
        self.send(
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: MOST_CALLS,
                    frames.INITIAL_WINDOW_SIZE: WINDOW,
                    frames.MAX_HEADER_LIST_SIZE: headers.MOST_BYTES,
                }
            )
        )
        self.send(frames.window_update(0, _WINDOW - frames.DEFAULT_WINDOW))

    def _keep_alive(self) -> None:
        """Have the system notice a client that is gone without a word."""
        link = self._transport.get_extra_info("socket")
        if link is None or link.family not in (socket.AF_INET, socket.AF_INET6):
            return
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if option := getattr(socket, name, None):  # by the system
                link.setsockopt(socket.IPPROTO_TCP, option, value)

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        for timer in self._timers:
            timer.cancel()
        if self._stall:
            self._stall.cancel()
        for call in list(self._calls.values()):
            call.abandon()
        self._is_told()
        self._terms.lost(self)

    def pause_writing(self) -> None:
        # What is not read is not answered either, so a client that only sends cannot fill the memory.
        self.paused = True
        self._transport.pause_reading()
        self._stall = self.loop.call_later(_STALL_SECONDS, self._transport.abort)

    def resume_writing(self) -> None:
        self.paused = False
        if self._stall:
            self._stall.cancel()
        if not self._closing:
            self._transport.resume_reading()
        for call in list(self._calls.values()):
            call.wake_writer()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        try:
            if not self._greeted:
                if not data.startswith(frames.PREFACE[:end]):
                    self._transport.abort()
                    return
                if end < len(frames.PREFACE):
                    self._rest = data
                    return
                self._greeted = True
                at = len(frames.PREFACE)
            unpack = frames.HEAD.unpack_from
            while end - at >= _HEAD_BYTES:
                high, low, kind, flags, stream = unpack(data, at)
                length = high << 8 | low
                if length > frames.MOST_BYTES:
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                begin = at + _HEAD_BYTES
                at = begin + length
                if at > end:
                    at = begin - _HEAD_BYTES
                    break
                if self._block and kind != frames.CONTINUATION:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "headers that another frame interrupts")
                stream &= frames.MOST_WINDOW
                if kind == frames.DATA:
                    self._data(flags, stream, data[begin:at])
                elif kind == frames.HEADERS:
                    if flags & _NOT_BLOCK_ALONE == frames.END_HEADERS:
                        self._open(flags, stream, data[begin:at])
                    else:
                        self._headers(flags, stream, data[begin:at])
                else:
                    self._read(kind, flags, stream, data[begin:at])
            # More may never come, and others are not to be refused for it.
            self._expected.clear()
            if self._unwanted:
                self._stop_unwanted()
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except Exception:  # a fault of this server's must not leave a connection that nobody reads
            _logger.exception("a connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "")
        self._rest = data[at:]

    def send(self, data: bytes) -> None:
        """Send with all else that this turn of the event loop brings."""
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out.append(data)

    def send_headers(self, stream: int, block: bytes, end_stream: bool) -> None:
        if self.shrinks_table:
            self.shrinks_table = False
            block = headers.NO_TABLE + block
        self.send(frames.header_frames(stream, block, end_stream))

    def reset(self, call: Call, code: ErrorCode) -> None:
        """End a call without an answer."""
        self.send(frames.reset(call.stream, code))
        call.abandon()

    def forget(self, stream: int) -> None:
        """A call is over."""
        self._calls.pop(stream, None)
        self.blocked.pop(stream, None)
        self._expected.discard(stream)
        if self._ending and not self._calls:
            self._close()

    def drain(self, grace: float) -> None:
        """Let the client open no more calls, and close once those that are open are over; at latest after ``grace``."""
        if self._closing or self._draining:
            return
        self._draining = True
        # Calls that are on their way already are taken: only after an answer to a ping is the last one known.
        self.send(frames.go_away(frames.MOST_STREAMS, ErrorCode.NO_ERROR))
        self.send(frames.frame(frames.PING, 0, 0, _GOING))
        self._timers.append(self.loop.call_later(_PING_SECONDS, self._end))
        self._timers.append(self.loop.call_later(grace, self.cut_off))

    def cut_off(self) -> None:
        """End the calls that are open, and close."""
        for call in list(self._calls.values()):
            call.refuse(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
        self._end()
        self._close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _flush(self) -> None:
        out, self._out = self._out, []
        self._idle_frames = max(0, self._idle_frames - _PINGS_AN_ANSWER)
        if not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def _read(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Any frame but DATA and HEADERS."""
        if not self._settled and kind != frames.SETTINGS:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        elif kind == frames.WINDOW_UPDATE:
            self._window_update(stream, frames.read_number(payload, "WINDOW_UPDATE"))
        elif kind == frames.RST_STREAM:
            frames.read_number(payload, "RST_STREAM")
            self._check_opened(stream)
            self._unwanted.discard(stream)
            if call := self._calls.get(stream):
                call.abandon()
        elif kind == frames.CONTINUATION:
            self._continuation(flags, stream, payload)
        else:
            self._idle()
            self._control(kind, flags, stream, payload)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY) and stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame about the connection on a stream")
        if kind == frames.SETTINGS:
            self._settings(flags, payload)
        elif kind == frames.PING:
            if len(payload) != len(_GOING):
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
            if not flags & frames.ACK:
                self.send(frames.frame(frames.PING, frames.ACK, 0, payload))
            elif payload == _GOING:
                self._end()
        elif kind == frames.PRIORITY and len(payload) != 5:
            self.send(frames.reset(stream, ErrorCode.FRAME_SIZE_ERROR))
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        # Others mean nothing here: a priority, that the client takes no streams of the server's, what is not known.

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self._may_receive -= size
        if self._may_receive < _WINDOW // 2:
            if self._may_receive < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more bytes than the connection's window")
            self.send(frames.window_update(0, _WINDOW - self._may_receive))
            self._may_receive = _WINDOW
        call = self._calls.get(stream)
        if call is None:
            if stream not in self._unwanted:
                self._check_opened(stream)
            elif flags & frames.END_STREAM:
                self._unwanted.discard(stream)
            return
        if flags & frames.END_STREAM:
            self._expected.discard(stream)
        elif not size:
            self._idle()
        call.receive(frames.without_padding(flags, payload), size, bool(flags & frames.END_STREAM))

    def _headers(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & (frames.PADDED | frames.HAS_PRIORITY):
            payload = frames.without_padding(flags, payload)
            if flags & frames.HAS_PRIORITY:
                if len(payload) < 5:
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS shorter than their priority")
                payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._open(flags, stream, payload)
        else:
            self._block = stream, flags, bytearray(payload), 0

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        if not self._block or self._block[0] != stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, block, count = self._block
        block += payload
        if len(block) > _MOST_BLOCK or count == _MOST_CONTINUATIONS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers without end")
        self._block = stream, first_flags, block, count + 1
        if flags & frames.END_HEADERS:
            self._block = None
            self._open(first_flags, stream, bytes(block))

    def _open(self, flags: int, stream: int, block: bytes) -> None:
        """All headers of a stream have come: of a new one, or a client's trailers."""
        if not self._settled:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        if stream <= self._last_stream:
            self._reader.skip(block)
            if flags & frames.END_STREAM:
                self._expected.discard(stream)
                self._unwanted.discard(stream)
            if call := self._calls.get(stream):
                if call.ended or not flags & frames.END_STREAM:
                    self.reset(call, ErrorCode.STREAM_CLOSED if call.ended else ErrorCode.PROTOCOL_ERROR)
                else:
                    call.end()
            elif not stream % 2:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's stream {stream}")
            return
        if not stream % 2:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's stream {stream}")
        if self._ending:
            self._reader.skip(block)
            return
        self._last_stream = stream
        if len(self._calls) >= MOST_CALLS:
            self._reader.skip(block)
            self.send(frames.reset(stream, ErrorCode.REFUSED_STREAM))
            return
        try:
            head = self._reader.read(block)
        except MalformedRequest:
            self._idle()
            self.send(frames.reset(stream, ErrorCode.PROTOCOL_ERROR))
            return
        known = head.encoding in _KNOWN_ENCODINGS and head.size <= headers.MOST_BYTES
        if (method := head.method) is None or head.http_status != 200 or not known:
            self._turn_away(stream, head, bool(flags & frames.END_STREAM))
            return
        if method.door:
            if (refusal := method.door(head, len(self._expected))) is not None:
                self._refuse(stream, refusal, bool(flags & frames.END_STREAM))
                return
            self._expected.add(stream)
        call = self._calls[stream] = Call(self, stream, head, method, self._terms.limits, self._stream_window)
        call.begin()
        if flags & frames.END_STREAM:
            call.end()

    def _turn_away(self, stream: int, head: RequestHead[Method], ended: bool) -> None:
        """Answer a request that no method can take."""
        if head.http_status != 200:
            block = headers.write([(":status", str(head.http_status))])
        else:
            more: tuple[tuple[str, str], ...] = ()
            if head.size > headers.MOST_BYTES:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                text = f"metadata: {head.size} bytes; the limit is {headers.MOST_BYTES} bytes"
            elif head.method is None:
                code, text = grpc.StatusCode.UNIMPLEMENTED, "Method not found!"
            else:
                code, text = grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding: not one of grpc-accept-encoding"
                more = (("grpc-accept-encoding", ",".join(_KNOWN_ENCODINGS)),)
            self._terms.limits.refused(head.path, head.metadata, code, text)
            block = headers.status_block(code, text, more)
        self._refuse(stream, block, ended)

    def _refuse(self, stream: int, block: bytes, ended: bool) -> None:
        """Answer with a header block alone; what the client still sends is not wanted."""
        self.send_headers(stream, block, end_stream=True)
        if not ended:  # the rest has mostly come with the headers
            self._unwanted.add(stream)

    def _stop_unwanted(self) -> None:
        """Tell the client that it need not send the rest of requests that are answered."""
        for stream in self._unwanted:
            self.send(frames.reset(stream, ErrorCode.NO_ERROR))
        self._unwanted.clear()

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set")
            return
        window = self._stream_window
        for setting, value in frames.read_settings(payload):
            if setting == frames.INITIAL_WINDOW_SIZE:
                if value > frames.MOST_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                window = value
            elif setting == frames.HEADER_TABLE_SIZE:
                self.shrinks_table = value < _TABLE_BYTES
            elif (setting == frames.ENABLE_PUSH and value > 1) or (
                setting == frames.MAX_FRAME_SIZE and not frames.MOST_BYTES <= value < 2**24
            ):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"setting {setting} of {value}")
        if window != self._stream_window:
            self._idle(1 + len(self._calls) // _CALLS_AN_IDLE_FRAME)
            for call in list(self._calls.values()):
                call.window += window - self._stream_window
                if call.window > frames.MOST_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {call.window} bytes")
        self._settled = True
        # Before what the new windows allow: until then the old ones hold for the client.
        self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if window > self._stream_window:
            for call in list(self._calls.values()):
                call.pump_more()
        self._stream_window = window

    def _window_update(self, stream: int, more: int) -> None:
        if stream == 0:
            if not more:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            was_shut = self.window <= 0
            self.window += more
            if self.window > frames.MOST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {self.window} bytes")
            if was_shut:
                self._pump()
            return
        self._check_opened(stream)
        if call := self._calls.get(stream):
            call.window += more
            if not more or call.window > frames.MOST_WINDOW:
                code = ErrorCode.FLOW_CONTROL_ERROR if more else ErrorCode.PROTOCOL_ERROR
                self.reset(call, code)
            else:
                call.pump_more()

    def _pump(self) -> None:
        for call in list(self.blocked.values()):
            if self.window <= 0:
                return
            call.pump()

    def _check_opened(self, stream: int) -> None:
        """Raises ConnectionFault for a stream that the client never opened; one that is over is no fault."""
        if not stream % 2 or (stream > self._last_stream and not self._ending):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream}, which is not open")

    def _idle(self, cost: int = 1) -> None:
        self._idle_frames += cost
        if self._idle_frames > _MOST_IDLE_FRAMES:
            now = self.loop.time()
            if now - self._idle_since < _IDLE_FRAMES_SECONDS:
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that bring no call further")
            self._idle_frames, self._idle_since = 0, now

    def _check_settled(self) -> None:
        if not self._settled:
            self._fail(ErrorCode.SETTINGS_TIMEOUT, "no settings")

    def _end(self) -> None:
        """Tell the client the last call that is answered; those that it opens later it may try elsewhere."""
        if self._ending or self._closing:
            return
        self._ending = True
        self._is_told()
        self.send(frames.go_away(self._last_stream, ErrorCode.NO_ERROR))
        if not self._calls:
            self._close()

    def _is_told(self) -> None:
        if not self.told.done():
            self.told.set_result(None)

    def _fail(self, code: ErrorCode, text: str) -> None:
        _logger.debug("a connection is closed: %s, %s", code.name, text)
        for call in list(self._calls.values()):
            call.abandon()
        self.send(frames.go_away(self._last_stream, code, text))
        self._close()

    def _close(self) -> None:
        """Close once what waits is sent."""
        if not self._closing:
            self._closing = True
            self._is_told()
            self._timers.append(self.loop.call_later(_CLOSE_SECONDS, self._transport.abort))
            self.loop.call_soon(self._transport.close)  # after _flush, which is scheduled already
