"""Protobuf's encoding, for messages that this package writes and reads itself (protobuf.dev, "Encoding")."""

from collections.abc import Mapping
from typing import NamedTuple, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from serving.errors import InvalidRequest

#: Wire types.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
#: The text for a message that is refused before it is parsed.
TOO_MANY_FIELDS = "more fields than any request that could be answered"
#: The most fields of a request besides its images or poses.
MAX_OTHER_FIELDS = 1024
#: The most bytes of a text in a request. A string takes four bytes for each character if one of them is rare.
MAX_TEXT_BYTES = 2**16
_FIELDS_AN_IMAGE = 3
# The wire types with a whole number or a length after the key.
_WITH_NUMBER = (VARINT, BYTES)
# The keys, lengths and whole numbers of a field are read byte by byte. So many bytes of them count as another field.
_MORE_BYTES = 4
# The same for the bytes of a text, which is read character by character.
_MORE_TEXT_BYTES = 64
_MAX_VARINT_SHIFT = 63  # of the bits in the last byte of a number of 64 bits


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

    messages: the fields that hold messages whose fields count too, by number. packed: the fields of whole numbers each
    of which counts, by number. texts: the names of the fields that hold text, by number. apart: the number of a field
    that ``split`` cuts out; 0 for none.
    """

    messages: "Mapping[int, Fields]"
    packed: frozenset[int]
    texts: Mapping[int, str]
    apart: int


def fields_of(kind: type[Message], apart: type[Message] | None = None) -> Fields:
    """Return the fields of a kind of message and of all messages in it, but those of the kind ``apart``.

    No kind may contain itself. Packed floating-point numbers do not count: they become no objects.
    """
    return _fields_of(cast(Descriptor, kind.DESCRIPTOR), apart.DESCRIPTOR.full_name if apart else "")


def _fields_of(kind: Descriptor, apart: str, place: str = "") -> Fields:
    """Return the fields of a kind of message. place: the name of the field that holds it, with a dot, or nothing."""
    messages, packed, texts, number_apart = {}, set(), {}, 0
    for field in kind.fields:
        inner = field.message_type
        if inner and inner.full_name == apart:
            number_apart = field.number
        elif inner:
            messages[field.number] = _fields_of(inner, apart, f"{place}{field.name}.")
        elif field.is_packed and field.cpp_type not in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            packed.add(field.number)
        elif field.type == field.TYPE_STRING:
            texts[field.number] = place + field.name
    return Fields(messages, frozenset(packed), texts, number_apart)


class _Cut(NamedTuple):
    """A field with a content to cut out. The length at ``length_at`` is that of the content, from ``begin`` to ``end``.

    inner: the cuts in the content; none if all of it is cut out.
    """

    length_at: int
    begin: int
    end: int
    inner: "list[_Cut]"


def max_fields(images: int) -> int:
    """Return the most fields of a request for ``images`` images.

    A request for up to twice as many gets the answer that names their limit.
    """
    return 2 * images * _FIELDS_AN_IMAGE + MAX_OTHER_FIELDS


def check_fields(data: bytes, limit: int, fields: Fields) -> None:
    """Raise InvalidRequest for a message of more than ``limit`` fields or with a long text, long before it is parsed.

    A small compressed message can hold millions of fields of two bytes each, and each field becomes an object. Fields
    of a group count as those of its message, and a field with a long key, length, number or text as several. Bytes that
    cannot be read here are left to the parser.
    """
    # A shorter message cannot have so many.
    if len(data) > limit and _count_fields(data, 0, len(data), limit, fields, []) < 0:
        raise InvalidRequest("request", TOO_MANY_FIELDS)


def split(data: bytes, limit: int, fields: Fields) -> tuple[bytes, list[slice]]:
    """Check a message as ``check_fields`` does. Return it with the fields ``apart`` emptied, and their places in it."""
    cuts: list[_Cut] = []
    if _count_fields(data, 0, len(data), limit, fields, cuts) < 0:
        raise InvalidRequest("request", TOO_MANY_FIELDS)
    if not cuts:
        return data, []
    places: list[slice] = []
    return _without(data, 0, len(data), cuts, places), places


def _without(data: bytes, begin: int, end: int, cuts: list[_Cut], places: list[slice]) -> bytes:
    """Return the bytes ``begin`` to ``end`` without the contents that are cut out, and add the places of these."""
    parts: list[bytes] = []
    for cut in cuts:
        content = b""
        if cut.inner:
            content = _without(data, cut.begin, cut.end, cut.inner, places)
        else:
            places.append(slice(cut.begin, cut.end))
        parts += data[begin : cut.length_at], varint(len(content)), content
        begin = cut.end
    parts.append(data[begin:end])
    return b"".join(parts)


def _count_fields(data: bytes, at: int, end: int, left: int, fields: Fields, cuts: list[_Cut]) -> int:
    """Return the number of fields that are still allowed after those of a message, below 0 for too many.

    Add the cuts for the fields ``apart``. Raises InvalidRequest for a long text.
    """
    messages, groups = fields.messages, 0
    while at < end and left >= 0:
        try:
            begin = at
            if (key := data[at]) > 0x7F:
                key, at = varint_at(data, at)
            else:
                at += 1
            kind, length_at, size = key & 7, at, 0
            if kind in _WITH_NUMBER:
                size, at = varint_at(data, at)
            left -= 1 + (at - begin) // _MORE_BYTES
            match kind:
                case 2:
                    number = key >> 3
                    if groups:
                        pass  # the parser skips it
                    elif number in messages:
                        inner: list[_Cut] = []
                        stop = min(end, at + size)
                        left = _count_fields(data, at, stop, left, messages[number], inner)
                        if inner:
                            cuts.append(_Cut(length_at, at, stop, inner))
                    elif number in fields.packed:
                        left -= size  # a number takes a byte or more
                    elif number in fields.texts:
                        _check_text(size, fields.texts[number])
                        left -= size // _MORE_TEXT_BYTES
                    elif number == fields.apart and at + size <= end:
                        cuts.append(_Cut(length_at, at, at + size, []))
                    at += size
                case 0:
                    pass
                case 1:
                    at += 8
                case 3:
                    groups += 1
                case 4:
                    groups -= 1
                case 5:
                    at += 4
                case _:
                    return left
        except IndexError:
            return left
    return left


def _check_text(size: int, field: str) -> None:
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(field, f"{size} bytes; expected at most {MAX_TEXT_BYTES} of a text")


def varint_at(data: bytes, at: int) -> tuple[int, int]:
    """Return a whole number, and the position after it. Raises IndexError if it does not end."""
    value = shift = 0
    while (byte := data[at]) > 0x7F:
        if shift == _MAX_VARINT_SHIFT:
            raise IndexError("a number of more than ten bytes")
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1
