"""Header blocks without a socket: what is read of them, and what the table holds afterwards."""

import random
import tomllib
import tracemalloc
from importlib.metadata import version
from typing import Any

import pytest
from hpack import Decoder, Encoder
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from packaging.requirements import Requirement

from serving.transport import headers
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.headers import MAX_BLOCK_BYTES, MAX_BYTES_DECODED, HeaderBlock, HeaderReader, MalformedRequest
from serving.transport.memory import Memory
from tests.conftest import ROOT

FIELDS = [(":method", "POST"), (":scheme", "http"), (":path", "/s/m"), ("content-type", "application/grpc")]


class Connected:
    """A connection that holds memory."""

    held = 0
    holders = ()


def reader() -> HeaderReader[str]:
    return HeaderReader({"/s/m": "method"}.get)


def entries(decoder: Any) -> list[tuple[bytes, bytes]]:
    return list(decoder.header_table.dynamic_entries)


def test_hpack_is_one_whose_table_can_be_read() -> None:
    # A later major version may keep its table elsewhere; the project asks for none.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = project["optional-dependencies"]["server"]
    [asked] = [one for one in map(Requirement, dependencies) if one.name == "hpack"]
    assert version("hpack") in asked.specifier and "5.0" not in asked.specifier
    decoder, encoder = Decoder(), Encoder()
    decoder.decode(encoder.encode([("key", "value"), ("other", "one")]), raw=True)
    assert entries(decoder) == [(b"other", b"one"), (b"key", b"value")]
    assert decoder.header_table.maxsize == decoder.header_table_size == 4096
    decoder.header_table_size = 0
    assert entries(decoder) == []


class RepetitiveHuffman(HuffmanEncoder):
    """Huffman's code, quick for a letter many times over: that of eight equal letters has whole bytes."""

    def encode(self, bytes_to_encode: bytes | None) -> bytes:
        value = bytes_to_encode or b""
        count, rest = divmod(len(value), 8)
        if rest or value != value[:1] * len(value):
            return super().encode(value)
        return super().encode(value[:8]) * count


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("size,huffman", [(MAX_BYTES_DECODED + 1, False), (900_000, False), (80_000, True)])
def test_a_block_that_is_too_large_leaves_the_table_as_it_should_be(size: int, sensitive: bool, huffman: bool) -> None:
    encoder, read, full = Encoder(), reader(), Decoder(2**24)
    encoder.huffman_coder = RepetitiveHuffman(REQUEST_CODES, REQUEST_CODES_LENGTH)
    decoded: list[Any]
    generator = random.Random(size)
    for number in range(6):
        more = [(f"key-{generator.randrange(4)}", f"value-{generator.randrange(4)}") for _ in range(8)]
        large = [("large", "v" * size, sensitive)] if number % 2 else []
        fields: list[Any] = [*FIELDS, *more[:4], *large, *more[4:]]
        block = encoder.encode(fields, huffman=huffman)
        decoded = list(full.decode(block))
        if large and len(block) > MAX_BYTES_DECODED:
            head = read.read(block)
            assert (head.path, head.method, head.metadata, head.size) == ("/s/m", None, (), len(block))
        elif not large:
            head = read.read(block)
            assert head.method == "method"
            assert list(head.metadata) == [field for field in decoded if field[0].startswith("key")]
        else:  # by Huffman's code it is small enough to be decoded
            continue
        assert entries(read._decoder) == entries(full)


def test_many_small_fields_that_are_too_much_together_leave_the_table_as_it_should_be() -> None:
    encoder, read, full = Encoder(), reader(), Decoder(2**24)
    many: list[Any] = [(f"key-{number}", f"{number}" * 20) for number in range(1500)]
    for _ in range(3):
        block = encoder.encode([*FIELDS, *many], huffman=False)
        full.decode(block)
        read.read(block) if len(block) > MAX_BYTES_DECODED else read.skip(block)
        assert entries(read._decoder) == entries(full)


def literal(first: int, name: bytes, value: bytes) -> bytes:
    return bytes([first, len(name)]) + name + headers._length(len(value)) + value


LARGE = literal(0, b"large", bytes(MAX_BYTES_DECODED + 1).replace(b"\0", b"v"))

WRONG: dict[str, tuple[bytes, ErrorCode]] = {
    "it ends within a value": (LARGE[:-1], ErrorCode.COMPRESSION_ERROR),
    "it ends within a length": (LARGE + b"\x00\x7f\x80\x80", ErrorCode.COMPRESSION_ERROR),
    "it ends before a name": (LARGE + b"\x00", ErrorCode.COMPRESSION_ERROR),
    "a number has no end": (LARGE + b"\x00\x7f" + b"\xff" * 8, ErrorCode.COMPRESSION_ERROR),
    "an entry that is not there": (LARGE + b"\x7f\x7f\x01a", ErrorCode.COMPRESSION_ERROR),
    "the table is resized within it": (LARGE + b"\x20" + LARGE, ErrorCode.COMPRESSION_ERROR),
    "the table is resized three times": (b"\x20\x20\x20" + LARGE, ErrorCode.COMPRESSION_ERROR),
    "the table is to be larger than allowed": (b"\x3f\xe2\x1f" + LARGE, ErrorCode.COMPRESSION_ERROR),
    "too many fields": (LARGE + b"\x82" * 5000, ErrorCode.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_large_block_that_is_wrong_ends_its_connection(name: str) -> None:
    block, code = WRONG[name]
    with pytest.raises(ConnectionFault) as caught:
        reader().read(block)
    assert caught.value.code == code


@pytest.mark.parametrize("seed", range(30))
def test_garbage_in_a_large_block_is_a_fault_or_passed_over(seed: int) -> None:
    generator = random.Random(seed)
    garbage = generator.randbytes(200)
    try:
        head = reader().read(LARGE + garbage)
    except ConnectionFault as fault:
        assert fault.code in (ErrorCode.COMPRESSION_ERROR, ErrorCode.ENHANCE_YOUR_CALM)
    else:
        assert head.method is None


def test_a_block_may_be_large_but_neither_endless_nor_in_crumbs() -> None:
    memory, owner = Memory(2 * MAX_BLOCK_BYTES), Connected()
    block = HeaderBlock(owner, memory, 1, 0, b"")
    for _ in range(MAX_BLOCK_BYTES // 16384):
        block.add(bytes(16384), 0.0)
    assert len(block.data) == MAX_BLOCK_BYTES == memory.used
    crumbs = HeaderBlock(owner, memory, 1, 0, b"")
    for _ in range(8):
        crumbs.add(b"a", 0.0)
    for one in (block, crumbs):
        with pytest.raises(ConnectionFault) as caught:
            one.add(b"a", 0.0)
        assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM
        one.leave()
    assert memory.used == owner.held == 0


def test_blocks_without_an_end_give_their_memory_to_others() -> None:
    memory = Memory(2**16)
    owners = [Connected() for _ in range(8)]
    blocks = [HeaderBlock(one, memory, 1, 0, b"") for one in owners]
    for number, block in enumerate(blocks):
        block.add(bytes(16384), float(number))
    assert memory.used == 2**16 and [len(block.data) for block in blocks] == [0] * 4 + [16384] * 4
    with pytest.raises(ConnectionFault, match="headers without end"):
        blocks[0].add(b"", 9.0)
    for block in blocks:
        block.leave()
    assert memory.used == 0


NOT_ALLOWED: dict[str, list[tuple[str, str]]] = {
    "an empty path": [(":path", "")],
    "a name with a space": [("a b", "c")],
    "a name with a colon": [("a:b", "c")],
    "a name that is not ASCII": [("\xfc", "c")],
    "an empty name": [("", "c")],
    "a value that begins with a space": [("a", " b")],
    "a value that ends with a tab": [("a", "b\t")],
    "a value with a line's end": [("a", "b\nc")],
    "another host than the authority": [("host", "other")],
    "a length that is not a number": [("content-length", "+5")],
    "a length that is negative": [("content-length", "-5")],
    "two lengths": [("content-length", "5"), ("content-length", "6")],
    "two timeouts": [("grpc-timeout", "1S"), ("grpc-timeout", "2S")],
    "two encodings": [("grpc-encoding", "gzip"), ("grpc-encoding", "identity")],
    "two content types": [("content-type", "application/grpc")],
    "a header of the connection": [("connection", "close")],
}


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_headers_that_http_does_not_allow_are_refused(name: str) -> None:
    wrong = NOT_ALLOWED[name]
    if wrong[0][0] == ":path":
        fields = [field if field[0] != ":path" else wrong[0] for field in FIELDS]
    else:
        fields = [*FIELDS[:3], (":authority", "here"), *FIELDS[3:], *wrong]
    block = Encoder().encode([(key.encode("latin-1"), value.encode("latin-1")) for key, value in fields])
    with pytest.raises(MalformedRequest):
        reader().read(block)


def test_headers_that_http_allows_are_taken() -> None:
    more = [("host", "here"), ("content-length", "5"), ("te", "trailers"), ("te", "trailers"), ("a", "b c"), ("b", "")]
    more += [("x!#$%&'*+-.^_`|~9", "\xfc"), ("grpc-accept-encoding", "gzip"), ("grpc-accept-encoding", "deflate")]
    fields = [*FIELDS[:3], (":authority", "here"), *FIELDS[3:], *more]
    block = Encoder().encode([(key.encode("latin-1"), value.encode("latin-1")) for key, value in fields])
    head = reader().read(block)
    assert (head.acceptable, head.content_length) == (True, 5)
    assert dict(head.metadata)["x!#$%&'*+-.^_`|~9"] == "\xfc"
    assert reader().read(Encoder().encode(FIELDS)).content_length is None


def test_the_values_of_binary_headers_count_as_headers_before_they_are_decoded() -> None:
    encoder, read = Encoder(), reader()
    few = read.read(encoder.encode([*FIELDS, ("x-bin", ",".join(["YQ"] * 400))], huffman=False))
    assert few.acceptable and few.metadata == (("x-bin", b"a"),) * 400
    assert read.fields >= 400
    many = read.read(encoder.encode([*FIELDS, ("x-bin", ",".join(["YQ"] * 600))], huffman=False))
    assert not many.acceptable and many.size > headers.MAX_BYTES and many.metadata == ()


def test_the_bytes_of_large_blocks_and_of_values_in_the_table_are_counted() -> None:
    encoder, read = Encoder(), reader()
    read.read(encoder.encode(FIELDS))
    assert read.bytes == 0
    read.read(encoder.encode([*FIELDS, ("x", "Z" * 15_000, True)], huffman=True))
    assert read.bytes > 30_000, "those of Huffman's code and those of its text"
    read.bytes = 0
    read.read(encoder.encode([*FIELDS, ("y", "Z" * 3000)]))
    read.bytes = 0
    block = encoder.encode([*FIELDS, *[("y", "Z" * 3000)] * 10])
    assert len(block) < 100
    read.read(block)
    assert read.bytes > 30_000


def test_a_large_block_of_which_much_enters_the_table_ends_its_connection() -> None:
    block = Encoder().encode([*FIELDS, *[("x", f"{number}" * 1000) for number in range(80)]], huffman=False)
    with pytest.raises(ConnectionFault) as raised:
        reader().read(block)
    assert raised.value.code is ErrorCode.ENHANCE_YOUR_CALM


def fields_outside_the_table(count: int, value: str) -> bytes:
    """Return a block of a request with further fields, none of which enters the table."""
    fields = [*FIELDS, *((f"key{number}", value) for number in range(count))]
    return b"".join(literal(0, name.encode(), text.encode()) for name, text in fields)


def test_remembered_headers_of_many_fields_take_a_bounded_amount_of_memory() -> None:
    decoder = reader()
    tracemalloc.start()
    try:
        for number in range(64):
            decoder.read(fields_outside_the_table(40, f"{number}"))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2**16


def test_what_a_head_holds_covers_the_objects_of_its_fields() -> None:
    decoder, block = reader(), fields_outside_the_table(100, "value")
    tracemalloc.start()
    try:
        head = decoder.read(block)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.8 * used < head.held_bytes < 2 * used
