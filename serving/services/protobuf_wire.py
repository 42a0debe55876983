"""Protobuf's encoding, for messages that this package writes and reads itself (protobuf.dev, "Encoding")."""

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
