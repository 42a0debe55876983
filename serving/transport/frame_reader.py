"""The reader of one connection's frames, which passes their content to the calls (RFC 9113, sections 3 to 6)."""

from collections.abc import Callable

from serving.transport import frames, headers
from serving.transport.control_frames import ControlFrames
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.headers import HeaderBlock, HeaderReader, MalformedRequest
from serving.transport.methods import Method
from serving.transport.receiving import WINDOW
from serving.transport.reception import Reception
from serving.transport.streams import WORK_A_TURN, ConnectionState, Link, Shared, Streams, StreamState
from serving.transport.turn_clock import TurnClock

#: Seconds within which a header block must come in full.
HEADER_SECONDS = 10.0
_TEXT = b"This port speaks gRPC (HTTP/2 without TLS), not HTTP/1.1.\n"
#: The answer to a client of HTTP/1.
HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
    % (len(_TEXT), _TEXT)
)
_HTTP1_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"PRI")
_WINDOW = 2**24  # bytes that a client may send on a connection before the server reads them
_LOW_WINDOW = _WINDOW // 2  # the window is refilled below this
_BLOCK_BYTES_AN_IDLE_FRAME = 256  # of a header block that is too large
_MIN_DATA_BYTES = 64  # the fewest bytes of a frame that advances a call without ending its request
_MAX_FIELDS = 128  # the fields of a call's headers; each further field counts as a frame that advances no call
_FRAME_WORK = 384  # of each frame; 64 small calls fit in a turn
_FIELD_WORK = 64  # of each decoded field
_BLOCK_BYTE_WORK = 8  # of each byte of a large header block and of its values
_BYTES_A_WORK = 8  # bytes of a frame, which are only copied
_HEAD_BYTES = frames.HEAD.size
_MAX_BYTES_DECODED = headers.MAX_BYTES_DECODED
_NOT_BLOCK_ALONE = frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY


class NotHttp2(Exception):
    """The client speaks another protocol. answer: the bytes to send before closing if it speaks HTTP/1, else empty."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("not HTTP/2")
        self.answer = answer


class FrameReader:
    """The reader of a connection's bytes. link: carries the answers. find: the method with a path."""

    def __init__(self, link: Link, find: Callable[[str], Method | None], shared: Shared) -> None:
        self.streams = Streams(link, shared)
        self._send = link.send
        self._max_calls = shared.limits.calls_per_connection
        self._header_reader: HeaderReader[Method] = HeaderReader(find)
        self._rest = b""  # of what has come: frames for the next turn, and a frame that is not whole
        self._at = 0  # the position in it from which on nothing is read yet
        self._block: HeaderBlock | None = None
        self._block_since = 0.0
        self._skipped = (0, 0)  # the streams between these two were never opened; only the latest ones are known
        self._may_receive = _WINDOW
        self._reception = Reception(self.streams)
        self._control = ControlFrames(self.streams, link, self._reception)
        self._turn, self._work_left = 0.0, WORK_A_TURN  # the event loop's time of the turn, and what is left of it
        self.clock = TurnClock()

    def receive(self, data: bytes) -> None:
        """Read what has come, as far as a turn allows. Raises ConnectionFault and NotHttp2, which end the reading.

        data: without any, what is left of earlier data is read.
        """
        at = 0
        if self._rest:
            if data:
                data = self._rest[self._at :] + data
            else:  # a copy for each turn would take longer than its frames
                data, at = self._rest, self._at
            self._rest, self._at = b"", 0
        if not self.unread:
            if self.streams.state is ConnectionState.PREFACE:
                if not self._greet(data):
                    return
                at = len(frames.PREFACE)
            self.clock.go_on()
            try:
                at = self._read(data, at)
            finally:
                self.clock.stop()
        if self.unread:
            self._rest, self._at = data, at
            return
        self._rest = data[at:]
        self._reception.all_read()

    def begin_turn(self) -> None:
        """Note that other connections have had their turn. What an earlier turn took too much is missing now."""
        self._work_left = WORK_A_TURN + min(0, self._work_left)
        self.clock.begin()

    def take_turn(self, now: float) -> None:
        """Begin a turn, unless it has begun, or keep what comes until there is time for it. now: of the event loop."""
        if not self.streams.place.may_go_on():
            self._work_left = -1
            self.clock.begin()
        elif now != self._turn:  # uvloop keeps the time for a turn, in which it may bring up to 32 reads
            self._turn = now
            self.begin_turn()

    @property
    def unread(self) -> bool:
        """Return True if other connections get their turn before ``receive`` reads the rest."""
        return self._work_left < 0

    @property
    def unread_bytes(self) -> int:
        """Return the bytes that ``receive`` has left for later."""
        return len(self._rest) - self._at

    def forget_unread(self) -> None:
        """Forget the bytes that were left for later, since the connection ends."""
        self._rest, self._at = b"", 0

    def leave(self) -> None:
        """Forget a header block whose end has not come."""
        if self._block:
            self._block.leave()
            self._block = None

    def check_headers(self, now: float) -> None:
        """Raise ConnectionFault for a header block that has not come in full in time. now: of the event loop."""
        if self._block and now - self._block_since >= HEADER_SECONDS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers that do not end")

    def _greet(self, data: bytes) -> bool:
        """Answer the client's preface. Return False if it is not complete yet. Raises NotHttp2."""
        if not data.startswith(frames.PREFACE[: len(data)]):
            raise NotHttp2(HTTP1_ANSWER if data.partition(b" ")[0] in _HTTP1_METHODS else b"")
        if len(data) < len(frames.PREFACE):
            self._rest = data
            return False
        self.streams.state = ConnectionState.SETTINGS
        self._send(_greeting(self._max_calls))
        return True

    def _read(self, data: bytes, at: int) -> int:
        """Read complete frames of one turn from ``at`` on. Return the position of the rest. Raises ConnectionFault."""
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
            self._work_left -= _FRAME_WORK + length // _BYTES_A_WORK
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
            if self.clock.is_over():
                self._work_left = min(self._work_left, -1)
            if self._work_left < 0:
                break
        return at

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Read any frame but DATA and HEADERS."""
        if self.streams.state is ConnectionState.SETTINGS and kind != frames.SETTINGS:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        if kind == frames.CONTINUATION:
            self._continuation(flags, stream, payload)
        else:
            self._control.read(kind, flags, stream, payload)
            self._count_further()

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self._may_receive -= size
        if self._may_receive < _LOW_WINDOW:
            if self._may_receive < 0:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more bytes than the connection's window")
            self._send(frames.window_update(0, _WINDOW - self._may_receive))
            self._may_receive = _WINDOW
        end = flags & frames.END_STREAM
        if flags & frames.PADDED:
            payload = frames.without_padding(flags, payload)
        if len(payload) < _MIN_DATA_BYTES and not end:
            self.streams.count_idle()
        call = self.streams.calls.get(stream)
        if call is None:
            self.streams.check_opened(stream)
            self._reception.late(stream)
        if end:
            self._reception.came_in_full(stream)
        if call:
            call.receive(payload, size, bool(end))
            self._count_further()

    def _begin_block(self, flags: int, stream: int, payload: bytes) -> None:
        """Read a HEADERS frame that is not a header block alone."""
        payload = frames.without_padding_and_priority(flags, payload)
        if flags & frames.END_HEADERS:
            self._headers(flags, stream, payload)
        else:
            self._block = HeaderBlock(self.streams, self.streams.memory, stream, flags, payload)
            self._block_since = self.streams.loop.time()

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        block = self._block
        if not block or block.stream != stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        block.add(payload, self.streams.loop.time())
        if flags & frames.END_HEADERS:
            self.leave()
            self._headers(block.flags, stream, block.data)

    def _headers(self, flags: int, stream: int, block: bytes) -> None:
        """Read a complete header block: the headers of a new stream, or a client's trailers."""
        streams, end = self.streams, bool(flags & frames.END_STREAM)
        if len(block) > _MAX_BYTES_DECODED:
            streams.count_idle(len(block) // _BLOCK_BYTES_AN_IDLE_FRAME)
        new = stream > streams.last_stream and stream % 2
        if new and streams.state is ConnectionState.OPEN and len(streams.calls) < self._max_calls:
            if stream > streams.last_stream + 2:
                self._skipped = (streams.last_stream, stream)
            streams.last_stream = stream
            try:
                head = self._header_reader.read(block)
            except MalformedRequest:
                streams.send_reset(stream, ErrorCode.PROTOCOL_ERROR)
                self._count_fields(-1)
            else:
                self._count_fields(_MAX_FIELDS)
                self._reception.open(stream, head, end)
                self._count_further()
            return
        if streams.state is ConnectionState.SETTINGS:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no settings at first")
        if not stream % 2:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's stream {stream}")
        if stream <= streams.last_stream:
            self._trailers(stream, block, end)
            return
        self._header_reader.skip(block)
        self._count_fields(-1)
        if streams.state is ConnectionState.OPEN:
            streams.last_stream = stream
            streams.send_reset(stream, ErrorCode.REFUSED_STREAM)

    def _trailers(self, stream: int, block: bytes, end: bool) -> None:
        """Read the headers of a stream that is not new."""
        if self._skipped[0] < stream < self._skipped[1]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream} after a higher one (section 5.1.1)")
        malformed = False
        try:
            self._header_reader.trailers(block)
        except MalformedRequest:
            malformed = True
        self._count_fields(-1)
        call = self.streams.calls.get(stream)
        if call is None:
            self._reception.late(stream)
        if end:
            self._reception.came_in_full(stream)
        if call:
            if call.state is not StreamState.OPEN:
                self.streams.reset_faulty(call, ErrorCode.STREAM_CLOSED)
            elif malformed or not end:
                self.streams.reset_faulty(call, ErrorCode.PROTOCOL_ERROR)
            else:
                call.end()

    def _count_further(self) -> None:
        """Count the work that a frame has caused beside its own."""
        if further := self.streams.further_work:
            self._work_left -= further
            self.streams.further_work = 0

    def _count_fields(self, allowed: int) -> None:
        """Count the decoded fields; each field above ``allowed`` counts as a frame that advances no call."""
        reader = self._header_reader
        fields, size, reader.fields, reader.bytes = reader.fields, reader.bytes, 0, 0
        self._work_left -= _FIELD_WORK * fields + _BLOCK_BYTE_WORK * size
        if fields > allowed:
            self.streams.count_idle(fields - allowed)


def _greeting(max_calls: int) -> bytes:
    """Return the first bytes of the server. max_calls: the most calls that the client may have open."""
    values = {
        frames.MAX_CONCURRENT_STREAMS: max_calls,
        frames.INITIAL_WINDOW_SIZE: WINDOW,
        frames.MAX_HEADER_LIST_SIZE: headers.MAX_BYTES,
    }
    return frames.settings(values) + frames.window_update(0, _WINDOW - frames.DEFAULT_WINDOW)
