"""Huffman's code of headers (RFC 7541, section 5.2), a byte at a time.

hpack's own reader takes half a byte at a time. A header of 16 KB would hold up all other connections for three times as
long.
"""

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE

_ROOT = 0
# By state and byte, 256 of each: the next state, in the bits above those of a byte; the characters; and True if the
# code may end here. Each is found when it is first needed: usual headers need some hundreds.
_steps: dict[int, tuple[int, bytes, bool]] = {}


def decode(data: bytes) -> bytes:
    """Return the text of a string in Huffman's code. Raises HPACKDecodingError."""
    state, complete = _ROOT, True
    parts: list[bytes] = []
    for byte in data:
        step = _steps.get(state | byte) or _find(state | byte)
        state, characters, complete = step
        parts.append(characters)
    if not complete:
        raise HPACKDecodingError("a text in Huffman's code that does not end")
    return b"".join(parts)


def _find(place: int) -> tuple[int, bytes, bool]:
    """Return a new step from hpack's table of half bytes. Raises HPACKDecodingError."""
    state, characters, flags = place >> 8, bytearray(), 0
    for half in (place >> 4 & 15, place & 15):
        state, flags, character = HUFFMAN_TABLE[16 * state + half]
        if flags & HUFFMAN_FAIL:
            raise HPACKDecodingError("a text that is not in Huffman's code")
        if flags & HUFFMAN_EMIT_SYMBOL:
            characters.append(character)
    step = _steps[place] = (state << 8, bytes(characters), bool(flags & HUFFMAN_COMPLETE))
    return step
