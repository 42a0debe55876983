"""Header blocks: of requests to what they ask for, of answers to bytes (HPACK, RFC 7541)."""

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote_from_bytes

import grpc
from hpack import Decoder
from hpack.exceptions import HPACKDecodingError, HPACKError

from serving.transport.frames import ConnectionFault, ErrorCode

Metadata = tuple[tuple[str, str | bytes], ...]

#: Most bytes of a request's headers, counted as in RFC 9113, section 6.5.2. Somewhat more is read, and answered.
MOST_BYTES = 16384
MOST_BYTES_READ = 4 * MOST_BYTES
_FIELD_BYTES = 32
_MOST_RESIZED = 2
IDENTITY = "identity"
_ENCODING = "grpc-encoding"
#: Before an answer's first headers, for a client that wants a smaller table: none at all.
NO_TABLE = b"\x20"
_CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")
_MOST_KNOWN = 64
_MOST_KNOWN_BYTES = 2048  # of headers that are remembered
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# What a call has beside its metadata.
_OF_PROTOCOL = {"te", "content-type", "grpc-timeout", _ENCODING, "grpc-accept-encoding"}
_OF_CONNECTION = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
# In a status message, what stands for itself (PROTOCOL-HTTP2.md: Percent-Byte-Unencoded).
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

Method = TypeVar("Method")


class MalformedRequest(Exception):
    """Headers that no HTTP/2 request may have; the stream is reset (RFC 9113, section 8.1.1)."""


@dataclass(frozen=True, slots=True)
class RequestHead(Generic[Method]):
    """What the headers of a request say.

    http_status: why it is no gRPC request, or 200. method: None for one that is not known. timeout: in seconds.
    timeout_error: what came in place of one. encoding: of messages that are compressed. size: bytes of all headers, as
    MOST_BYTES counts them.
    """

    http_status: int
    path: str
    method: Method | None
    timeout: float | None
    timeout_error: str
    encoding: str
    metadata: Metadata
    size: int


class _Decoder(Decoder):
    """Lets a block change the table's size twice, which is as often as it may need to (RFC 7541, section 4.2)."""

    resized = 0

    def _update_encoding_context(self, data: bytes | memoryview) -> int:
        self.resized += 1
        if self.resized > _MOST_RESIZED:
            raise HPACKDecodingError("the table's size changes again and again")
        consumed: int = super()._update_encoding_context(data)
        return consumed


class HeaderReader(Generic[Method]):
    """Reads a connection's header blocks. find: the method with a path, or None.

    A client's requests mostly have the same headers, and once HPACK's table has them, the same bytes. So what a block
    says is remembered for as long as the table does not change.
    """

    def __init__(self, find: Callable[[str], Method | None]) -> None:
        self._find = find
        self._decoder = _Decoder(MOST_BYTES_READ)
        self._known: dict[bytes, RequestHead[Method]] = {}

    def read(self, block: bytes) -> RequestHead[Method]:
        """Raises ConnectionFault, after which no further block can be read, and MalformedRequest."""
        if head := self._known.get(block):
            return head
        first, count, size = self._table()
        fields = self._decode(block)
        now = self._table()
        changed = now[0] is not first or now[1:] != (count, size)
        if changed or len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        head = _request(fields, self._find)
        if not changed and max(len(block), head.size) <= _MOST_KNOWN_BYTES:
            self._known[block] = head
        return head

    def skip(self, block: bytes) -> None:
        """Read a block that belongs to nothing, for the table that later ones need. Raises ConnectionFault."""
        if block not in self._known:
            self._decode(block)
            self._known.clear()

    def _decode(self, block: bytes) -> Iterable[tuple[bytes, bytes]]:
        """Name and value of each header. Raises ConnectionFault."""
        self._decoder.resized = 0
        try:
            return self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "headers that cannot be read, or too many") from error

    def _table(self) -> tuple[object, int, int]:
        """Tells whether the table has changed: each change puts a new entry first, or leaves fewer."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return entries[0] if entries else None, len(entries), table.maxsize


def _request(fields: Iterable[tuple[bytes, bytes]], find: Callable[[str], Method | None]) -> RequestHead[Method]:
    pseudo: dict[str, str] = {}
    special: dict[str, str] = {}
    metadata: list[tuple[str, str | bytes]] = []
    size = 0
    for raw_name, raw_value in fields:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if not raw_name or _CONTROL.search(raw_name + raw_value):
            raise MalformedRequest
        size += len(raw_name) + len(raw_value) + _FIELD_BYTES
        if name.startswith(":"):
            if name in pseudo or special or metadata:
                raise MalformedRequest
            pseudo[name] = value
        elif name != name.lower() or name in _OF_CONNECTION or (name == "te" and value != "trailers"):
            raise MalformedRequest
        elif name in _OF_PROTOCOL:
            special[name] = value
        elif name.endswith("-bin"):
            metadata += ((name, part) for part in _binary(raw_value))
        else:
            metadata.append((name, value))
    if not {":method", ":path", ":scheme"} <= pseudo.keys() <= {":method", ":path", ":scheme", ":authority"}:
        raise MalformedRequest
    path, content = pseudo[":path"], special.get("content-type", "")
    status = 200
    if pseudo[":method"] != "POST":
        status = 405
    elif content != "application/grpc" and not content.startswith(("application/grpc+", "application/grpc;")):
        status = 415
    timeout, given = None, special.get("grpc-timeout")
    if given and (match := _TIMEOUT.fullmatch(given)):
        timeout, given = int(match[1]) * _SECONDS[match[2]], None
    encoding = special.get(_ENCODING, IDENTITY)
    return RequestHead(status, path, find(path), timeout, given or "", encoding, tuple(metadata), size)


def _binary(value: bytes) -> list[bytes]:
    """Values of a ``-bin`` header, in base64 with or without padding, more than one divided by commas."""
    try:
        return [base64.b64decode(part + b"=" * (-len(part) % 4), validate=True) for part in value.split(b",")]
    except binascii.Error as error:
        raise MalformedRequest from error


def write(fields: Iterable[tuple[str, str | bytes]]) -> bytes:
    """A header block that no earlier one is needed for: names and values as they are.

    Raises ValueError for a name or text that may not stand in a header.
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
    """A status message as it stands in a header."""
    return quote_from_bytes(text.encode(), safe=_PLAIN)


def status_fields(
    code: grpc.StatusCode, text: str, metadata: Iterable[tuple[str, str | bytes]] = ()
) -> list[tuple[str, str | bytes]]:
    """The trailers of a call that did not go well."""
    message = [("grpc-message", _quoted(text))] if text else []
    return [("grpc-status", str(code.value[0])), *message, *metadata]


def status_block(code: grpc.StatusCode, text: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> bytes:
    """The header block of an answer that has nothing but a status."""
    return ANSWER + write(status_fields(code, text, metadata))


def _length(value: int) -> bytes:
    """Of a text that is not Huffman-coded: a number with a prefix of seven bits (RFC 7541, section 5.1)."""
    if value < 127:
        return bytes((value,))
    rest = value - 127
    parts = bytearray((127,))
    while rest > 127:
        parts.append(rest & 127 | 128)
        rest >>= 7
    parts.append(rest)
    return bytes(parts)


#: ``:status: 200`` from HPACK's table, and the content type with its name from there.
ANSWER = b"\x88\x0f\x10" + _length(len("application/grpc")) + b"application/grpc"
#: The trailers of a call that went well.
OK = write([("grpc-status", "0")])
