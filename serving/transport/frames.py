"""HTTP/2's frames as bytes (RFC 9113, sections 4 and 6)."""

import struct
from enum import IntEnum
from functools import lru_cache

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Most bytes in a frame that anyone may send without asking; this server asks for no more.
MOST_BYTES = 16384
#: Bytes that both sides may send at first, on a connection and on each stream.
DEFAULT_WINDOW = 65535
MOST_WINDOW = 2**31 - 1
MOST_STREAMS = 2**31 - 1

# Plain numbers, since comparing members of an enumeration for every frame is slow.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x01
END_HEADERS = 0x04
PADDED = 0x08
HAS_PRIORITY = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

#: Of a frame: length in two parts, 16 and 8 bits, type, flags, stream.
HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFault(Exception):
    """What a peer did that ends its connection."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@lru_cache(1024)
def head_of(kind: int, flags: int, size: int) -> bytes:
    """A frame's head but for the stream."""
    return HEAD.pack(size >> 8, size & 255, kind, flags, 0)[:5]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return head_of(kind, flags, len(payload)) + stream.to_bytes(4) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*value) for value in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Raises ConnectionFault."""
    if len(payload) % _SETTING.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    return list(_SETTING.iter_unpack(payload))


def window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, _NUMBER.pack(more))


def reset(stream: int, code: ErrorCode) -> bytes:
    return frame(RST_STREAM, 0, stream, _NUMBER.pack(code))


def go_away(last_stream: int, code: ErrorCode, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, _NUMBER.pack(last_stream) + _NUMBER.pack(code) + text.encode())


def read_number(payload: bytes, name: str) -> int:
    """The one number of 31 bits that a frame holds. Raises ConnectionFault."""
    if len(payload) != _NUMBER.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"{name} of {len(payload)} bytes")
    number: int = _NUMBER.unpack(payload)[0]
    return number & MOST_WINDOW


def without_padding(flags: int, payload: bytes) -> bytes:
    """Raises ConnectionFault."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def header_frames(stream: int, block: bytes, end_stream: bool) -> bytes:
    """A header block in a HEADERS frame, and as many CONTINUATION frames as it needs."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= MOST_BYTES:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    pieces = [block[at : at + MOST_BYTES] for at in range(0, len(block), MOST_BYTES)]
    frames = [frame(HEADERS, flags, stream, pieces[0])]
    frames += [frame(CONTINUATION, 0, stream, piece) for piece in pieces[1:-1]]
    return b"".join((*frames, frame(CONTINUATION, END_HEADERS, stream, pieces[-1])))
