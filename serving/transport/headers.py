"""Header blocks: decoding of requests, and encoding of answers (HPACK, RFC 7541)."""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar
from urllib.parse import quote_from_bytes

import grpc
from hpack import Decoder
from hpack.exceptions import HPACKError

from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.memory import Memory, Owner
from serving.transport.messages import ENCODINGS

Metadata = tuple[tuple[str, str | bytes], ...]

#: The most bytes of a request's headers, counted as in RFC 9113, section 6.5.2.
MAX_BYTES = 16384
#: The largest header block that is decoded in full, in bytes. Of a larger block only the parts for HPACK's table are
#: decoded.
MAX_BYTES_DECODED = MAX_BYTES
#: The largest header block that is read at all, in bytes. A larger one ends its connection.
MAX_BLOCK_BYTES = 2**20
# The most fields of a block that is not decoded in full. A block with more fields ends the connection.
_MAX_FIELDS_SKIPPED = 4096
# The most bytes that are decoded of such a block. A block with more of them ends the connection.
_MAX_BYTES_SKIPPED = 2**17
_MAX_DECODED_LIST_BYTES = 4 * MAX_BYTES  # of decoded fields, counted as MAX_BYTES; more end the connection
_FIELDS_WITH_PATH = 6  # the first fields of a block: table resizes and pseudo-headers
_MAX_CONTINUATIONS = 8  # without the pieces that are at least half full
_HALF_FRAME_BYTES = 8192
_FIELD_BYTES = 32
_OBJECT_BYTES = 160  # that Python takes for the name and value of a field, beyond these
_MAX_RESIZED = 2
IDENTITY = "identity"
KNOWN_ENCODINGS = (IDENTITY, *ENCODINGS)
_ENCODING = "grpc-encoding"
#: The prefix of an answer's first headers for a client that wants a smaller table: it sets the size 0.
NO_TABLE = b"\x20"
_CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")
_NAME = re.compile(rb":?[!#$%&'*+.^_`|~0-9a-z-]+")  # RFC 9110, section 5.6.2, in lower case
_NOT_IN_VALUE = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]|\A[ \t]|[ \t]\Z")  # RFC 9113, section 8.2.1
# Remembered headers, and their bytes with those of their blocks.
_MAX_KNOWN, _MAX_ALL_KNOWN_BYTES = 64, 2**14
_MAX_KNOWN_BYTES = 2048  # a larger block is not remembered, and its bytes count as work
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# Headers of the protocol, which are no metadata of a call.
_OF_PROTOCOL = {"te", "content-type", "grpc-timeout", _ENCODING, "grpc-accept-encoding"}
_OF_CONNECTION = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_SINGLE = {"content-type", "grpc-timeout", _ENCODING}  # which may come once
_DIGITS = re.compile("[0-9]{1,18}")
# The characters of a status message that are not escaped (PROTOCOL-HTTP2.md: Percent-Byte-Unencoded).
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

Method = TypeVar("Method")


class MalformedRequest(Exception):
    """The headers are not valid in an HTTP/2 request. The stream is reset (RFC 9113, section 8.1.1)."""


@dataclass(frozen=True, slots=True)
class RequestHead(Generic[Method]):
    """The headers of a request.

    http_status: 200, or the HTTP error if it is no gRPC request.
    method: None for an unknown method.
    timeout: in seconds. timeout_error: the header's value if it is not a timeout.
    encoding: the encoding of compressed messages.
    size: the bytes of all headers, counted as for MAX_BYTES.
    acceptable: True if a known method can take the request.
    content_length: the bytes of its data, if a header says so.
    """

    http_status: int
    path: str
    method: Method | None
    timeout: float | None
    timeout_error: str
    encoding: str
    metadata: Metadata
    size: int
    acceptable: bool
    content_length: int | None = None

    @property
    def held_bytes(self) -> int:
        """Return the bytes that it takes in memory, about."""
        return self.size + _OBJECT_BYTES * len(self.metadata)


class HeaderBlock:
    """A header block in a HEADERS frame and several CONTINUATION frames (RFC 9113, section 6.10).

    It holds memory until its end has come (see serving.transport.memory.Holder). owner: its connection. flags: the
    flags of the HEADERS frame.
    """

    __slots__ = (
        "_continuations", "_evicted", "_memory", "_pieces", "_size", "flags", "held", "owner", "stream", "waits",
    )  # fmt: skip

    def __init__(self, owner: Owner, memory: Memory, stream: int, flags: int, data: bytes) -> None:
        self.held, self.waits, self.owner = 0, False, owner
        self.stream = stream
        self.flags = flags
        self._memory = memory
        self._pieces = [data]
        self._size = len(data)
        self._continuations = 0
        self._evicted = False

    def add(self, data: bytes, now: float) -> None:
        """Add a piece. now: of the event loop.

        Raises ConnectionFault if the block is too large or has too many small pieces, or if there is no room for it.
        """
        self._size += len(data)
        self._continuations += 1
        allowed = _MAX_CONTINUATIONS + self._size // _HALF_FRAME_BYTES
        if not self._evicted:
            self._pieces.append(data)
            self._memory.hold(self, self._size - self.held)
            self._memory.waits(self, now)
            self._memory.make_room(self)
        if self._evicted or self._size > MAX_BLOCK_BYTES or self._continuations > allowed:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers without end")

    def evict(self, stalled: bool) -> None:
        """Release the memory, which others need. The next piece ends the connection, or its time does."""
        self._evicted = True
        self._pieces.clear()
        self.leave()

    def leave(self) -> None:
        """Note that nobody waits for the end of the block."""
        self._memory.leave(self)

    @property
    def data(self) -> bytes:
        """Return the received part of the block."""
        return b"".join(self._pieces)


class HeaderReader(Generic[Method]):
    """The reader of a connection's header blocks. find: returns the method of a path, or None.

    Most requests of a client have the same headers, and the same bytes once HPACK's table has the headers. So the
    reader remembers the content of a block until the table changes.
    """

    def __init__(self, find: Callable[[str], Method | None]) -> None:
        self._find = find
        self._decoder = Decoder(_MAX_DECODED_LIST_BYTES)
        self._known: dict[bytes, RequestHead[Method]] = {}
        self._known_bytes = 0
        #: The number of decoded fields, and the bytes of large blocks and of their values. The caller counts both and
        #: sets them back to 0.
        self.fields = self.bytes = 0

    def read(self, block: bytes) -> RequestHead[Method]:
        """Return the request of a block. A block above MAX_BYTES_DECODED gives neither method nor metadata.

        Raises MalformedRequest, or ConnectionFault, after which no further block can be read.
        """
        if head := self._known.get(block):
            return head
        if len(block) > MAX_BYTES_DECODED:
            return RequestHead(200, self._skip_large(block), None, None, "", IDENTITY, (), len(block), False)
        first, count, size = self._table()
        fields = self._decode(block)
        now = self._table()
        changed = now[0] is not first or now[1:] != (count, size)
        if changed:
            self._forget()
        head = _request(fields, self._find)
        self.fields += max(0, len(head.metadata) - len(fields))  # a binary header may have many values
        if not changed and max(len(block), head.size) <= _MAX_KNOWN_BYTES:
            self._remember(block, head)
        return head

    def skip(self, block: bytes) -> None:
        """Read a block only to update the table for later blocks. Raises ConnectionFault."""
        if block in self._known:
            return
        if len(block) > MAX_BYTES_DECODED:
            self._skip_large(block)
        else:
            self._decode(block)
            self._forget()

    def trailers(self, block: bytes) -> None:
        """Read the headers that end a request, whose content is not used.

        Raises MalformedRequest, or ConnectionFault, after which no further block can be read.
        """
        if block in self._known:  # a request's
            raise MalformedRequest
        if len(block) > MAX_BYTES_DECODED:
            self._skip_large(block)
            return
        fields = self._decode(block)
        self._forget()
        for name, value in fields:
            if name.startswith(b":"):
                raise MalformedRequest
            _check_field(name, value)

    def _remember(self, block: bytes, head: RequestHead[Method]) -> None:
        size = len(block) + head.held_bytes
        if len(self._known) >= _MAX_KNOWN or self._known_bytes + size > _MAX_ALL_KNOWN_BYTES:
            self._forget()
        self._known[block] = head
        self._known_bytes += size

    def _forget(self) -> None:
        self._known.clear()
        self._known_bytes = 0

    def _decode(self, block: bytes) -> Sequence[tuple[bytes, bytes]]:
        """Return the name and value of each header. Raises ConnectionFault."""
        if block[:1] and block[0] & 0xE0 == 0x20:
            _count_resizes(block)
        return self._decode_part(block)

    def _decode_part(self, part: bytes) -> Sequence[tuple[bytes, bytes]]:
        try:
            fields = list(self._decoder.decode(part, raw=True))
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "headers that cannot be read, or too many") from error
        self.fields += len(fields)
        # A few bytes may name large fields of the table, and Huffman's code may be longer than its text.
        if (size := len(part) + sum([len(value) for _, value in fields])) > _MAX_KNOWN_BYTES:
            self.bytes += size
        return fields

    def _skip_large(self, block: bytes) -> str:
        """Update the table from a large block, with as little decoding as possible. Return the path.

        Fields that do not enter the table are skipped. An entry larger than the table empties it (RFC 7541, section
        4.4). Raises ConnectionFault.
        """
        self._forget()
        resized = _count_resizes(block)
        path, table_bytes, decoded = "", self._decoder.header_table_size, 0
        for number, (begin, end, indexed) in enumerate(_fields(block)):
            if number == _MAX_FIELDS_SKIPPED:
                raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers without end")
            if number >= resized and block[begin] & 0xE0 == 0x20:
                raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "the table's size changes within headers")
            if indexed and (end - begin) * 8 // 30 > table_bytes:  # no symbol of the Huffman code has more than 30 bits
                self._decoder.header_table_size = 0
                self._decoder.header_table_size = table_bytes
            elif indexed or (number < _FIELDS_WITH_PATH and end - begin < MAX_BYTES):
                decoded += end - begin
                if decoded > _MAX_BYTES_SKIPPED:
                    raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "headers without end")
                for name, value in self._decode_part(block[begin:end]):
                    if name == b":path":
                        path = value.decode("latin-1")
                table_bytes = self._decoder.header_table_size
        return path

    def _table(self) -> tuple[object, int, int]:
        """Return a mark of the table's state: each change puts a new entry first, or leaves fewer entries."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return entries[0] if entries else None, len(entries), table.maxsize


def _count_resizes(block: bytes) -> int:
    """Return the number of changes of the table's size before a block's headers.

    Raises ConnectionFault if there are more than a block can need (RFC 7541, section 4.2).
    """
    at = count = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        _, at = _integer(block, at, 5)
        count += 1
    if count > _MAX_RESIZED:
        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "the table's size changes again and again")
    return count


def _fields(block: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield begin and end of each field of a block, and True if it may change the table (RFC 7541, section 6).

    Raises ConnectionFault if the block ends within a field.
    """
    at, end = 0, len(block)
    while at < end:
        begin, first = at, block[at]
        if first & 0x80:
            _, at = _integer(block, at, 7)
            yield begin, at, False
        elif first & 0xE0 == 0x20:
            _, at = _integer(block, at, 5)
            yield begin, at, True
        else:
            index, at = _integer(block, at, 6 if first & 0x40 else 4)
            for _ in range(1 if index else 2):
                size, at = _integer(block, at, 7)
                at += size
            if at > end:
                raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "headers that end within a field")
            yield begin, at, bool(first & 0x40)


def _integer(block: bytes, at: int, prefix: int) -> tuple[int, int]:
    """Return the integer at a position, and the position after it (RFC 7541, section 5.1). Raises ConnectionFault."""
    prefix_limit = (1 << prefix) - 1
    part = block[at : at + 6]  # four bytes after the prefix can express more than any block's size
    if not part:
        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "headers that end within a field")
    value = part[0] & prefix_limit
    if value < prefix_limit:
        return value, at + 1
    for shift, byte in enumerate(part[1:]):
        value += (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + 2 + shift
    raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a number without end")


def _request(fields: Iterable[tuple[bytes, bytes]], find: Callable[[str], Method | None]) -> RequestHead[Method]:
    """Return the request of decoded headers. Raises MalformedRequest."""
    pseudo: dict[str, str] = {}
    special: dict[str, str] = {}
    metadata: list[tuple[str, str | bytes]] = []
    size = 0
    for raw_name, raw_value in fields:
        _check_field(raw_name, raw_value)
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        size += len(raw_name) + len(raw_value) + _FIELD_BYTES
        if name.startswith(":"):
            if name in pseudo or special or metadata:
                raise MalformedRequest
            pseudo[name] = value
        elif name in _OF_PROTOCOL:
            if name in special and name in _SINGLE:
                raise MalformedRequest
            special[name] = value
        elif name.endswith("-bin"):
            size += _FIELD_BYTES * raw_value.count(b",")  # each value counts as a header
            if size <= MAX_BYTES:
                metadata += ((name, part) for part in _binary(raw_value))
        else:
            metadata.append((name, value))
    _check_pseudo(pseudo, metadata)
    path, content = pseudo[":path"], special.get("content-type", "")
    status = 200
    if pseudo[":method"] != "POST":
        status = 405
    elif content != "application/grpc" and not content.startswith(("application/grpc+", "application/grpc;")):
        status = 415
    timeout, given = None, special.get("grpc-timeout")
    if given and (match := _TIMEOUT.fullmatch(given)):
        timeout, given = int(match[1]) * _SECONDS[match[2]], None
    encoding, method = special.get(_ENCODING, IDENTITY), find(path)
    acceptable = status == 200 and method is not None and size <= MAX_BYTES and encoding in KNOWN_ENCODINGS
    length = _content_length(metadata)
    return RequestHead(status, path, method, timeout, given or "", encoding, tuple(metadata), size, acceptable, length)


def _check_field(name: bytes, value: bytes) -> None:
    """Raise MalformedRequest for a field that HTTP/2 does not allow (RFC 9113, sections 8.2.1 and 8.2.2)."""
    if not _NAME.fullmatch(name) or _NOT_IN_VALUE.search(value):
        raise MalformedRequest
    if name in _OF_CONNECTION or (name == b"te" and value != b"trailers"):
        raise MalformedRequest


def _check_pseudo(pseudo: dict[str, str], metadata: list[tuple[str, str | bytes]]) -> None:
    """Check the pseudo-headers of a request (RFC 9113, section 8.3.1). Raises MalformedRequest."""
    if not {":method", ":path", ":scheme"} <= pseudo.keys() <= {":method", ":path", ":scheme", ":authority"}:
        raise MalformedRequest
    if not pseudo[":path"].startswith(("/", "*")) or not pseudo[":scheme"] or not pseudo[":method"]:
        raise MalformedRequest
    authority = pseudo.get(":authority")
    if pseudo[":method"] == "CONNECT" or (authority and "@" in authority):  # which has neither path nor scheme
        raise MalformedRequest
    if authority is not None and any(name == "host" and value != authority for name, value in metadata):
        raise MalformedRequest


def _content_length(metadata: list[tuple[str, str | bytes]]) -> int | None:
    """Return the value of content-length, or None without one. Raises MalformedRequest."""
    found = {value for name, value in metadata if name == "content-length"}
    if not found:
        return None
    text = found.pop()
    if found or not isinstance(text, str) or not _DIGITS.fullmatch(text):
        raise MalformedRequest
    return int(text)


def _binary(value: bytes) -> list[bytes]:
    """Decode a ``-bin`` header: values in base64, with or without padding, separated by commas.

    Raises MalformedRequest.
    """
    try:
        return [base64.b64decode(part + b"=" * (-len(part) % 4), validate=True) for part in value.split(b",")]
    except binascii.Error as error:
        raise MalformedRequest from error


def write(fields: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Return a header block that does not depend on earlier ones: names and values in full.

    Raises ValueError for a name or text that is not allowed in a header.
    """
    block = bytearray()
    for name, value in fields:
        key = name.encode("ascii")
        if name.endswith("-bin"):
            text = base64.b64encode(value if isinstance(value, bytes) else value.encode()).rstrip(b"=")
        else:
            text = value if isinstance(value, bytes) else value.encode("latin-1")
        if not key or name != name.lower() or _CONTROL.search(key + text):
            raise ValueError(f"{name!r} cannot be a header with the value {value!r}")
        block += b"\x00" + _length(len(key)) + key + _length(len(text)) + text
    return bytes(block)


def _quoted(text: str) -> str:
    """Return a status message in the form of a header's value."""
    return quote_from_bytes(text.encode(errors="replace"), safe=_PLAIN)  # a file's name may be no text


def status_fields(
    code: grpc.StatusCode, text: str, metadata: Iterable[tuple[str, str | bytes]] = ()
) -> list[tuple[str, str | bytes]]:
    """Return the trailers of a call that ends with this status."""
    message = [("grpc-message", _quoted(text))] if text else []
    return [("grpc-status", str(code.value[0])), *message, *metadata]


def status_block(code: grpc.StatusCode, text: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> bytes:
    """Return the header block of an answer that has only a status."""
    return ANSWER + write(status_fields(code, text, metadata))


@dataclass(frozen=True)
class Status:
    """The end of a call: a code, a text for the client, and trailing metadata."""

    code: grpc.StatusCode
    text: str = ""
    metadata: Metadata = ()

    @cached_property
    def block(self) -> bytes:
        """Return the header block of an answer that has only this status."""
        return status_block(self.code, self.text, self.metadata)


def _length(value: int) -> bytes:
    """Return the encoded length of a text without Huffman code: a number with a prefix of seven bits (section 5.1)."""
    if value < 127:
        return bytes((value,))
    rest = value - 127
    parts = bytearray((127,))
    while rest > 127:
        parts.append(rest & 127 | 128)
        rest >>= 7
    parts.append(rest)
    return bytes(parts)


#: The headers of an answer: ``:status: 200`` from HPACK's table, and the content type, whose name is from the table.
ANSWER = b"\x88\x0f\x10" + _length(len("application/grpc")) + b"application/grpc"
#: The trailers of a call that ends with OK.
OK = write([("grpc-status", "0")])
