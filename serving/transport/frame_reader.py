"""The reader of one connection's frames, which passes their content to the calls (RFC 9113, sections 3 to 6)."""

from typing import Any

from serving.transport import frames, headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.headers import HeaderBlock, HeaderReader, MalformedRequest
from serving.transport.methods import Method
from serving.transport.receiving import WINDOW
from serving.transport.reception import Reception
from serving.transport.streams import ConnectionState, Link, Streams, StreamState
from serving.transport.terms import Terms

#: The most calls that a client may have open on one connection.
MAX_CALLS = 4096
#: The payload of a drain's ping. Its answer shows that all calls sent before have arrived.
DRAIN_PING = b"drain\0\0\0"
_TEXT = b"This port speaks gRPC (HTTP/2 without TLS), not HTTP/1.1.\n"
#: The answer to a client of HTTP/1.
HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
    % (len(_TEXT), _TEXT)
)
_WINDOW = 2**24  # bytes that a client may send on a connection before the server reads them
_LOW_WINDOW = _WINDOW // 2  # the window is refilled below this
_BLOCK_BYTES_AN_IDLE_FRAME = 256  # of a header block that is too large
_HEAD_BYTES = frames.HEAD.size
_MAX_BYTES_DECODED = headers.MAX_BYTES_DECODED
_TABLE_BYTES = 4096  # that HPACK's table has if nobody says otherwise
_NOT_BLOCK_ALONE = frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY


class NotHttp2(Exception):
    """The client speaks another protocol. answer: the bytes to send before closing if it speaks HTTP/1, else empty."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("not HTTP/2")
        self.answer = answer


class FrameReader:
    """The reader of a connection. link: carries the answers."""

    def __init__(self, link: Link, terms: Terms[Any]) -> None:
        self.streams = Streams(link, terms)
        self._link = link
        self._send = link.send
        self._header_reader: HeaderReader[Method] = HeaderReader(terms.find)
        self._rest = b""  # the received part of an incomplete frame
        self._block: HeaderBlock | None = None
        self._may_receive = _WINDOW
        self._reception = Reception(self.streams)

    def receive(self, data: bytes) -> None:
        """Read received bytes. Raises ConnectionFault or NotHttp2; after that, nothing else can be read."""
        at = 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self.streams.state is ConnectionState.PREFACE:
            if not self._greet(data):
                return
            at = len(frames.PREFACE)
        at = self._read(data, at)
        self._rest = data[at:]
        self._reception.all_read()

    def _greet(self, data: bytes) -> bool:
        """Answer the client's preface. Return False if it is not complete yet. Raises NotHttp2."""
        if not data.startswith(frames.PREFACE[: len(data)]):
            raise NotHttp2(HTTP1_ANSWER if data[:3].isalpha() and data[:3].isupper() else b"")
        if len(data) < len(frames.PREFACE):
            self._rest = data
            return False
        self.streams.state = ConnectionState.SETTINGS
        values = {
            frames.MAX_CONCURRENT_STREAMS: MAX_CALLS,
            frames.INITIAL_WINDOW_SIZE: WINDOW,
            frames.MAX_HEADER_LIST_SIZE: headers.MAX_BYTES,
        }
        self._send(frames.settings(values))
        self._send(frames.window_update(0, _WINDOW - frames.DEFAULT_WINDOW))
        return True

    def _read(self, data: bytes, at: int) -> int:
        """Read all complete frames from ``at`` on. Return the position of the rest. Raises ConnectionFault."""
        end = len(data)
        while end - at >= _HEAD_BYTES:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(data, at)
            length = high << 8 | low
            if length > frames.MAX_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            begin = at + _HEAD_BYTES
            if begin + length > end:
                break
            at = begin + length
            if self._block and kind != frames.CONTINUATION:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "headers that another frame interrupts")
            stream &= frames.MAX_STREAM
            if kind == frames.DATA:
                self._data(flags, stream, data[begin:at])
            elif kind == frames.HEADERS:
                if flags & _NOT_BLOCK_ALONE == frames.END_HEADERS:
                    self._headers(flags, stream, data[begin:at])
                else:
                    self._begin_block(flags, stream, data[begin:at])
            else:
                self._other(kind, flags, stream, data[begin:at])
        return at

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Read any frame but DATA and HEADERS."""
        if self.streams.state is ConnectionState.SETTINGS and kind != frames.SETTINGS:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY) and stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame about the connection on a stream")
        if kind == frames.CONTINUATION:
            self._continuation(flags, stream, payload)
            return
        if kind == frames.RST_STREAM:
            self._rst_stream(stream, payload)
            return
        self.streams.count_idle()
        if kind == frames.WINDOW_UPDATE:
            self._window_update(stream, frames.read_number(payload, "WINDOW_UPDATE"))
        elif kind == frames.SETTINGS:
            self._settings(flags, payload)
        elif kind == frames.PING:
            self._ping(flags, payload)
        elif kind == frames.PRIORITY:
            if not stream:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY of the connection")
            if len(payload) != 5:
                self.streams.send_reset(stream, ErrorCode.FRAME_SIZE_ERROR)
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        # Other frames are ignored: those that concern streams of the server, and unknown ones.

    def _ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != len(DRAIN_PING):
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if not flags & frames.ACK:
            self._send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == DRAIN_PING:
            self._link.drained()

    def _rst_stream(self, stream: int, payload: bytes) -> None:
        frames.read_number(payload, "RST_STREAM")
        self._check_opened(stream)
        self._reception.came_in_full(stream)
        if call := self.streams.calls.get(stream):
            call.abandon()
            self.streams.count_cancelled()
        else:
            self.streams.count_idle()

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self._may_receive -= size
        if self._may_receive < _LOW_WINDOW:
            if self._may_receive < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more bytes than the connection's window")
            self._send(frames.window_update(0, _WINDOW - self._may_receive))
            self._may_receive = _WINDOW
        end = flags & frames.END_STREAM
        if end:
            self._reception.came_in_full(stream)
        elif not size:
            self.streams.count_idle()
        call = self.streams.calls.get(stream)
        if call is None:
            self._check_opened(stream)
            return
        if flags & frames.PADDED:
            payload = frames.without_padding(flags, payload)
        call.receive(payload, size, bool(end))

    def _begin_block(self, flags: int, stream: int, payload: bytes) -> None:
        """Read a HEADERS frame with padding or priority, or with only a part of its header block."""
        if flags & (frames.PADDED | frames.HAS_PRIORITY):
            payload = frames.without_padding(flags, payload)
            if flags & frames.HAS_PRIORITY:
                if len(payload) < 5:
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS shorter than their priority")
                payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._headers(flags, stream, payload)
        else:
            self._block = HeaderBlock(stream, flags, payload)

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        block = self._block
        if not block or block.stream != stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        block.add(payload)
        if flags & frames.END_HEADERS:
            self._block = None
            self._headers(block.flags, stream, block.data)

    def _headers(self, flags: int, stream: int, block: bytes) -> None:
        """Read a complete header block: the headers of a new stream, or a client's trailers."""
        streams, end = self.streams, bool(flags & frames.END_STREAM)
        if len(block) > _MAX_BYTES_DECODED:
            streams.count_idle(len(block) // _BLOCK_BYTES_AN_IDLE_FRAME)
        new = stream > streams.last_stream and stream % 2
        if new and streams.state is ConnectionState.OPEN and len(streams.calls) < MAX_CALLS:
            streams.last_stream = stream
            try:
                head = self._header_reader.read(block)
            except MalformedRequest:
                streams.send_reset(stream, ErrorCode.PROTOCOL_ERROR)
                streams.count_idle()
            else:
                self._reception.open(stream, head, end)
            return
        if streams.state is ConnectionState.SETTINGS:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        if not stream % 2:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's stream {stream}")
        if stream <= streams.last_stream:
            self._trailers(stream, block, end)
            return
        self._header_reader.skip(block)
        if streams.state is ConnectionState.OPEN:
            streams.last_stream = stream
            streams.count_idle()
            streams.send_reset(stream, ErrorCode.REFUSED_STREAM)

    def _trailers(self, stream: int, block: bytes, end: bool) -> None:
        """Read the headers of a stream that is not new."""
        self._header_reader.skip(block)
        if end:
            self._reception.came_in_full(stream)
        if call := self.streams.calls.get(stream):
            if call.state is not StreamState.OPEN:
                self.streams.reset_faulty(call, ErrorCode.STREAM_CLOSED)
            elif not end:
                self.streams.reset_faulty(call, ErrorCode.PROTOCOL_ERROR)
            else:
                call.end()

    def _settings(self, flags: int, payload: bytes) -> None:
        streams = self.streams
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set")
            return
        old = window = streams.peer.initial
        for setting, value in frames.read_settings(payload):
            frames.check_setting(setting, value)
            if setting == frames.INITIAL_WINDOW_SIZE:
                window = value
            elif setting == frames.HEADER_TABLE_SIZE:
                streams.shrinks_table = value < _TABLE_BYTES
        streams.set_initial_window(window)
        if streams.state is ConnectionState.SETTINGS:
            streams.state = ConnectionState.OPEN
        # Before what the new windows allow: until then the old ones hold for the client.
        self._send(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if window > old:
            streams.pump()

    def _window_update(self, stream: int, more: int) -> None:
        if not stream:
            self.streams.widen(more)
            return
        self._check_opened(stream)
        if call := self.streams.calls.get(stream):
            self.streams.widen_call(call, more)

    def _check_opened(self, stream: int) -> None:
        """Raise ConnectionFault for a stream that the client never opened. A closed stream is no fault."""
        streams = self.streams
        if not stream % 2 or (stream > streams.last_stream and streams.state is not ConnectionState.GOING_AWAY):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a frame for stream {stream}, which is not open")
