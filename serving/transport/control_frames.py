"""The frames of a client that carry neither headers nor data (RFC 9113, section 6)."""

from serving.transport import frames
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.reception import Reception
from serving.transport.streams import Link, Streams

#: The payload of a drain's ping. Its answer shows that all calls sent before have arrived.
DRAIN_PING = b"drain\0\0\0"
_OF_CONNECTION = (frames.SETTINGS, frames.PING, frames.GOAWAY)
_PRIORITY_BYTES = 5
_MIN_GOAWAY_BYTES = 8


class ControlFrames:
    """The reader of control frames. link: carries the answers."""

    def __init__(self, streams: Streams, link: Link, reception: Reception) -> None:
        self._streams = streams
        self._link = link
        self._reception = reception

    def read(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Read a frame. Raises ConnectionFault."""
        if stream and kind in _OF_CONNECTION:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame about the connection on a stream")
        if kind == frames.RST_STREAM:
            self._rst_stream(stream, payload)
            return
        self._streams.count_idle()
        if kind == frames.WINDOW_UPDATE:
            self._window_update(stream, frames.read_number(payload, "WINDOW_UPDATE"))
        elif kind == frames.SETTINGS:
            self._streams.take_settings(flags, payload)
        elif kind == frames.PING:
            self._ping(flags, payload)
        elif kind == frames.PRIORITY:
            self._priority(stream, len(payload))
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        elif kind == frames.GOAWAY and len(payload) < _MIN_GOAWAY_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        # Other frames are ignored: those that concern streams of the server, and unknown ones.

    def _priority(self, stream: int, size: int) -> None:
        """Check a frame whose content is not used (section 6.3). Reset its stream if its size is wrong.

        Raises ConnectionFault if there is no stream to reset (section 5.1).
        """
        if not stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY of the connection")
        if size == _PRIORITY_BYTES:
            return
        if call := self._streams.calls.get(stream):
            self._streams.reset_faulty(call, ErrorCode.FRAME_SIZE_ERROR)
        elif stream > self._streams.last_stream:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY of {size} bytes")
        else:
            self._streams.send_reset(stream, ErrorCode.FRAME_SIZE_ERROR)

    def _ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != len(DRAIN_PING):
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if not flags & frames.ACK:
            self._link.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == DRAIN_PING:
            self._link.drained()

    def _rst_stream(self, stream: int, payload: bytes) -> None:
        frames.read_number(payload, "RST_STREAM")
        self._streams.check_opened(stream)
        self._streams.counts.resets_received += 1
        self._reception.came_in_full(stream)
        if call := self._streams.calls.get(stream):
            call.abandon()
            self._streams.count_cancelled()
        else:
            self._streams.count_idle()

    def _window_update(self, stream: int, more: int) -> None:
        if not stream:
            self._streams.widen(more)
            return
        self._streams.check_opened(stream)
        if call := self._streams.calls.get(stream):
            self._streams.widen_call(call, more)
