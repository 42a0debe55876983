"""Protobuf's encoding, for messages that this package writes and reads itself (protobuf.dev, "Encoding")."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from serving.errors import InvalidRequest

#: Wire types.
VARINT, BYTES, FIXED32 = 0, 2, 5


def varint(value: int) -> bytes:
    """Return a whole number from 0 in protobuf's variable-length encoding."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def tag(number: int, wire_type: int) -> bytes:
    """Return the bytes before the value of a field with this number."""
    return varint(number << 3 | wire_type)


def delimited(number: int, content: bytes) -> bytes:
    """Return a field that holds text, bytes or a message."""
    return tag(number, BYTES) + varint(len(content)) + content


class Fields(NamedTuple):
    """The fields of a kind of message that ``check_fields`` counts.

    messages: the fields that hold messages whose fields count too, by number. packed: the number of a field of numbers,
    each of which counts; 0 for none. numbers: False if fields of one number do not count, which take little memory.
    """

    messages: "Mapping[int, Fields]" = MappingProxyType({})
    packed: int = 0
    numbers: bool = True


#: Counts the fields of the message itself.
FLAT = Fields()


def check_fields(data: bytes, limit: int, fields: Fields = FLAT) -> None:
    """Raise InvalidRequest for a message of more than ``limit`` fields, long before it is parsed.

    A small compressed message can hold millions of fields of two bytes each, and each field becomes an object. Fields
    of a group count as those of its message. Bytes that cannot be read here are left to the parser.
    """
    # A shorter message cannot have so many.
    if len(data) > limit and _count_fields(data, 0, len(data), limit, fields) < 0:
        raise InvalidRequest("request", "more fields than any request that could be answered")


def _count_fields(data: bytes, at: int, end: int, left: int, fields: Fields) -> int:
    """Return the number of fields that are still allowed after those of a message, below 0 for too many."""
    while at < end and left >= 0:
        try:
            key, at = _varint_at(data, at)
            left -= fields.numbers or key & 7 == BYTES
            match key & 7:
                case 0:
                    _, at = _varint_at(data, at)
                case 1:
                    at += 8
                case 2:
                    size, at = _varint_at(data, at)
                    if inner := fields.messages.get(key >> 3):
                        left = _count_fields(data, at, min(end, at + size), left, inner)
                    elif key >> 3 == fields.packed:
                        left -= size  # a number takes a byte or more
                    at += size
                case 3 | 4:
                    pass  # the begin or the end of a group, which the parser skips
                case 5:
                    at += 4
                case _:
                    return left
        except IndexError:
            return left
    return left


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    """Return a whole number, and the position after it. Raises IndexError."""
    value = shift = 0
    while (byte := data[at]) > 0x7F and shift < 63:
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1
