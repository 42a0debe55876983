"""Length-prefixed messages (gRPC's PROTOCOL-HTTP2.md): conversion of a request's bytes to messages.

Pure: no socket, and no clock but that of the thread which inflates.
"""

import struct
import time
import zlib

import grpc

#: The encodings that a client may use, with zlib's parameter for each.
ENCODINGS = {"gzip": 31, "deflate": 15}
#: The prefix of each message: a flag for compression, and the length.
PREFIX = struct.Struct(">BI")
# Bytes that are inflated at once; the rest is left to a thread, since other calls would wait for it.
_MAX_INFLATED_AT_ONCE = 2**16
# The compressed bytes of these count four times: blocks of zlib's format may take time and give nothing.
_COST_A_COMPRESSED_BYTE = 4
_STEP_BYTES = 2**20  # that a thread inflates before it looks whether the call has ended
_STEP_COMPRESSED_BYTES = 2**16
_MAX_SECONDS = 0.25  # of a thread for a message; the largest one takes about 0.02
_MAX_RATIO = 1032  # of inflated bytes to compressed ones (the limit of zlib's format)
# Pieces of fewer bytes are joined at once, since each one takes some 60 bytes of its own, up to a piece of so many.
_SMALL_BYTES, _MAX_JOINED_BYTES = 4096, 2**16


class MessageError(Exception):
    """A request's bytes are not valid messages. The call ends with this code and text."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Inflation:
    """A compressed message. It is inflated at once, unless that takes more than ``at_once`` bytes.

    Then only the compressed bytes are kept: the beginning and zlib's state are much larger, and many messages may wait.
    """

    def __init__(self, data: bytes, encoding: str, max_bytes: int, at_once: int = _MAX_INFLATED_AT_ONCE) -> None:
        self.size = len(data)
        #: Set, by any thread, to end ``rest`` soon.
        self.given_up = False
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._compressed = data
        #: True if the message has ended exactly with the last byte.
        self.ended = False
        #: True if ``rest`` was given up since it takes too long.
        self.slow = False
        few = self._compressed[: at_once // _COST_A_COMPRESSED_BYTE]
        begin = self._inflate(few, min(at_once, max_bytes + 1), min(at_once, max_bytes + 1))
        size = len(begin or b"")
        #: What was inflated at once, as a part of ``at_once``.
        self.spent = max(size, _COST_A_COMPRESSED_BYTE * len(few))
        #: True if nothing is left to inflate, or the message is known to be refused.
        self.done = begin is None or self.ended or size > max_bytes
        self._message = begin if self.done else None

    @property
    def max_rest(self) -> int:
        """Return the most bytes of the message."""
        return min(self._max_bytes + 1, _MAX_RATIO * self.size)

    def rest(self) -> bytes | None:
        """Inflate the message, in any thread. Return None if it is corrupt, takes too long or the call has ended."""
        return self._inflate(self._compressed, self._max_bytes + 1, _STEP_BYTES)

    def message(self, rest: bytes | None, limit_text: str) -> bytes:
        """Return the whole message. rest: of ``rest``, or None if the message is ``done``. Raises MessageError."""
        message = self._message if self.done else rest
        if message is not None and len(message) > self._max_bytes:
            shown = f"more than {self._max_bytes} bytes once decompressed"
            raise MessageError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"request: {shown}; {limit_text}")
        if self.slow:
            text = f"request: {self.size} bytes that take too long to decompress"
            raise MessageError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if message is None or not self.ended:
            text = f"{self.size} bytes that are not a message in {self._encoding}"
            raise MessageError(grpc.StatusCode.INVALID_ARGUMENT, text)
        return message

    def _inflate(self, compressed: bytes, max_bytes: int, step: int) -> bytes | None:
        """Inflate at most ``max_bytes``. After each ``step`` bytes, look if the call has ended, and at the time."""
        reader, left, at = zlib.decompressobj(ENCODINGS[self._encoding]), max_bytes, 0
        parts: list[bytes] = []
        begin = time.thread_time()
        try:
            while left > 0 and not reader.eof:  # zlib takes 0 for no limit
                self.slow = time.thread_time() - begin > _MAX_SECONDS
                if self.given_up or self.slow:
                    return None
                piece = reader.unconsumed_tail
                if not piece:
                    piece = compressed[at : at + _STEP_COMPRESSED_BYTES]
                    at += len(piece)
                part = reader.decompress(piece, min(left, step))
                if not (part or piece):  # the message ends too early
                    break
                parts.append(part)
                left -= len(part)
        except zlib.error:
            return None
        self.ended = reader.eof and not reader.unused_data and at == self.size
        return parts[0] if len(parts) == 1 else b"".join(parts)


def whole(data: bytes) -> bytes | None:
    """Return the message of bytes that are exactly one, not compressed; None for any others."""
    size = len(data) - PREFIX.size
    if size < 0 or PREFIX.unpack_from(data) != (0, size):
        return None
    return data[PREFIX.size :]


class MessageReader:
    """The reader that cuts the bytes of one request into messages.

    max_bytes: the largest message, in bytes. limit_text: the text for a client that exceeds it. encoding: the encoding
    of compressed messages.
    """

    __slots__ = ("_encoding", "_flag", "_limit_text", "_max_bytes", "_missing", "_parts", "buffered", "inflation")

    def __init__(self, max_bytes: int, limit_text: str, encoding: str) -> None:
        self._max_bytes = max_bytes
        self._limit_text = limit_text
        self._encoding = encoding
        self._flag = 0  # of the message that has begun
        self._missing = -1  # bytes that it lacks; -1 while its prefix is not whole
        # Of the message, or of its prefix, or what came since an inflation began.
        self._parts: list[bytes | bytearray] = []
        #: Bytes that are kept, since they are no whole message yet, or since it is being inflated.
        self.buffered = 0
        #: The message that must be inflated before later bytes are read.
        self.inflation: Inflation | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that more bytes complete. Raises MessageError, after which nothing more can be read.

        During an ``inflation`` the bytes are kept, and ``inflated`` returns their messages.
        """
        if self.inflation or (self._missing < 0 and self._parts):
            self._keep(data)
            if self.inflation or self.buffered < PREFIX.size:
                return []
            data = self._take_kept()
        messages: list[bytes] = []
        at, end, at_once = 0, len(data), _MAX_INFLATED_AT_ONCE
        while True:
            if self._missing < 0:
                if end - at < PREFIX.size:
                    break
                self._begin(*PREFIX.unpack_from(data, at))
                at += PREFIX.size
            piece = data[at : at + self._missing]
            at += len(piece)
            self._missing -= len(piece)
            if self._missing:
                self._keep(piece)
                return messages
            message = self._joined(piece)
            self._missing = -1
            if self._flag:
                inflation = Inflation(message, self._encoding, self._max_bytes, at_once)
                at_once -= inflation.spent
                if not inflation.done:
                    self.inflation = inflation
                    self.buffered += inflation.size
                    break
                message = inflation.message(None, self._limit_text)
            messages.append(message)
        if at < end:
            self._keep(data[at:])
        return messages

    def inflated(self, rest: bytes | None) -> list[bytes]:
        """Return the inflated message and those after it. rest: from ``Inflation.rest``. Raises MessageError."""
        assert self.inflation
        message = self.inflation.message(rest, self._limit_text)
        self.inflation = None
        return [message, *self.feed(self._take_kept())]

    def _begin(self, flag: int, length: int) -> None:
        """Note the prefix of a message. Raises MessageError."""
        if length > self._max_bytes:
            text = f"request: {length} bytes; {self._limit_text}"
            raise MessageError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if flag and (flag != 1 or self._encoding not in ENCODINGS):
            text = "a message is compressed; grpc-encoding does not say how"
            raise MessageError(grpc.StatusCode.INTERNAL, text)
        self._flag, self._missing = flag, length

    def _keep(self, data: bytes) -> None:
        if not data:
            return
        self.buffered += len(data)
        last = self._parts[-1] if self._parts else None
        if len(data) >= _SMALL_BYTES:
            self._parts.append(data)
        elif isinstance(last, bytearray) and len(last) < _MAX_JOINED_BYTES:
            last += data
        else:
            self._parts.append(bytearray(data))

    def _take_kept(self) -> bytes:
        kept = b"".join(self._parts)
        self._parts.clear()
        self.buffered = 0
        return kept

    def _joined(self, last: bytes) -> bytes:
        """Return the message that a last piece completes, with one copy of what came before."""
        if not self._parts:
            return last
        message = b"".join((*self._parts, last))
        self._parts.clear()
        self.buffered = 0
        return message
