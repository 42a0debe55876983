"""Images that came in InferTensorContents, as numbers or files: read from the message's bytes, in limited pieces.

Protobuf's classes would take 4 to 13 bytes of memory for each byte of a message, before anything of it is checked.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.errors import InvalidRequest
from serving.services.protobuf_wire import BYTES, FIXED32, FIXED64, TOO_MANY_FIELDS, VARINT, varint_at

#: The most memory for reading the numbers, besides the pixels, in bytes.
READING_BYTES = 2**20
_PIECE_BYTES = 2**14  # read at once; the arrays for it take up to fifty times as much
_MAX_VARINT_BYTES = 10
_USED_VARINT_BYTES = 5  # a number of 32 bits has no bits in later bytes
_NUMBERS_BEFORE_RUN = 16  # numbers with a key each that are read one by one, before many of them at once
_MIN_RUN_BYTES = 256
# By field, the wire type of its values if they are not packed.
_WIRE_TYPES = {
    "bool_contents": VARINT,
    "int_contents": VARINT,
    "int64_contents": VARINT,
    "uint_contents": VARINT,
    "uint64_contents": VARINT,
    "fp32_contents": FIXED32,
    "fp64_contents": FIXED64,
    "bytes_contents": BYTES,
}
_FIELDS = pb.InferTensorContents.DESCRIPTOR.fields_by_name
_KINDS = {_FIELDS[name].number: (name, wire_type) for name, wire_type in _WIRE_TYPES.items()}
_FIELD = "inputs[0].contents.uint_contents"
_UINT, _FLOAT, _ELEMENT = (_FIELDS[name].number for name in ("uint_contents", "fp32_contents", "bytes_contents"))
_FLOAT_BYTES = 4


class _Span(NamedTuple):
    """The bytes ``begin`` to ``end`` of others: numbers. keyed: True if each one follows the key of its field."""

    begin: int
    end: int
    keyed: bool


class Malformed(Exception):
    """The bytes are not an InferTensorContents."""


class TypedContents:
    """The contents of one tensor.

    kinds: the names of the fields that hold something, in the order of their numbers. count, float_count: the number of
    values of uint_contents and of fp32_contents. elements: the values of bytes_contents.
    """

    def __init__(self, data: bytes, places: Sequence[slice], max_fields: int) -> None:
        """Find the values. places: the bytes of ``data`` that are the contents, in their order.

        max_fields: the most fields; whole numbers that follow each other count little. Raises InvalidRequest for more,
        and Malformed.
        """
        self._data = data
        self._left = max_fields
        self._spans: list[_Span] = []
        self._float_spans: list[_Span] = []
        self._elements: list[slice] = []
        found: set[int] = set()
        for place in places:
            try:
                self._scan(place.start, place.stop, found)
            except IndexError as error:
                raise Malformed from error
        self.kinds = tuple(_KINDS[number][0] for number in sorted(found))
        self.count = sum(_count(of, span) for of, span in _joined(data, self._spans))
        self.float_count = sum(span.end - span.begin for span in self._float_spans) // _FLOAT_BYTES

    @property
    def elements(self) -> list[bytes]:
        return [self._data[place] for place in self._elements]

    def floats(self) -> Generator[NDArray[np.float32]]:
        """Yield the values of fp32_contents in pieces."""
        for data, span in _joined(self._data, self._float_spans):
            for at in range(span.begin, span.end, _PIECE_BYTES):
                size = min(_PIECE_BYTES, span.end - at)
                yield np.frombuffer(data, "<f4", size // _FLOAT_BYTES, at)

    def values(self) -> NDArray[np.uint8]:
        """Return the values of uint_contents. Raises InvalidRequest for one above 255."""
        steps = self.steps()
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                values: NDArray[np.uint8] = stop.value
                return values

    def steps(self) -> Generator[None, None, NDArray[np.uint8]]:
        """Yield after each piece, and return the values of uint_contents. Raises InvalidRequest for one above 255."""
        values, filled = np.empty(self.count, np.uint8), 0
        for data, span in _joined(self._data, self._spans):
            at = span.begin
            while at < span.end:
                piece = np.frombuffer(data, np.uint8, min(_PIECE_BYTES, span.end - at), at)
                numbers, size = _numbers(piece, 2 if span.keyed else 1)
                if (wide := numbers > 255).any():
                    index = int(wide.argmax())
                    raise InvalidRequest(f"{_FIELD}[{filled + index}]", f"{numbers[index]}; expected 0 to 255")
                values[filled : filled + len(numbers)] = numbers
                filled, at = filled + len(numbers), at + size
                yield
        return values

    def _scan(self, at: int, end: int, found: set[int]) -> None:
        """Find the values of the fields that are read, and the numbers of the fields that hold something.

        Raises Malformed, IndexError, and InvalidRequest for too many fields.
        """
        data, groups, last, repeated = self._data, 0, -1, 0
        while at < end:
            begin = at
            key, at = varint_at(data, at)
            number, wire_type, content, keyed = key >> 3, key & 7, at, False
            match wire_type:
                case 0:
                    _, at = varint_at(data, at)
                    repeated = repeated + 1 if key == last else 0
                    if repeated == _NUMBERS_BEFORE_RUN:
                        single, repeated = at, 0
                        at = _end_of_run(data, at, end, key)
                        keyed = at > single
                case 1:
                    at += 8
                case 2:
                    size, content = varint_at(data, at)
                    at = content + size
                case 3:
                    groups += 1
                case 4:
                    groups -= 1
                case 5:
                    at += 4
                case _:
                    raise Malformed
            self._left -= 1
            if self._left < 0:
                raise InvalidRequest("request", TOO_MANY_FIELDS)
            if at > end or groups < 0:
                raise Malformed
            last = key
            if groups or number not in _KINDS:
                continue  # unknown, as for protobuf
            packed = wire_type == BYTES and at > content
            if packed or wire_type == _KINDS[number][1]:
                found.add(number)
                if number == _UINT:
                    if data[at - 1] > 0x7F:  # within a number
                        raise Malformed
                    self._spans.append(_Span(begin if keyed else content, at, keyed))
                elif number == _FLOAT:
                    if (at - content) % _FLOAT_BYTES:
                        raise Malformed
                    self._float_spans.append(_Span(content, at, False))
                elif number == _ELEMENT:
                    self._elements.append(slice(content, at))
        if groups:
            raise Malformed


def _joined(data: bytes, spans: Iterable[_Span]) -> Iterator[tuple[bytes, _Span]]:
    """Yield each span with the bytes that it is of. Short ones without keys that follow each other come as one.

    Every field may be a span, and NumPy takes as long for one number as for hundreds.
    """
    short, size = list[bytes](), 0

    def joined() -> tuple[bytes, _Span]:
        return b"".join(short), _Span(0, size, False)

    for span in spans:
        more = span.end - span.begin
        alone = span.keyed or more > _PIECE_BYTES
        if short and (alone or size + more > _PIECE_BYTES):
            yield joined()
            short, size = [], 0
        if alone:
            yield data, span
        else:
            short.append(data[span.begin : span.end])
            size += more
    if short:
        yield joined()


def _count(data: bytes, span: _Span) -> int:
    """Return the number of values in a span."""
    ends = 0
    for at in range(span.begin, span.end, _PIECE_BYTES):
        piece = np.frombuffer(data, np.uint8, min(_PIECE_BYTES, span.end - at), at)
        ends += int(np.count_nonzero(piece < 0x80))
    return ends // 2 if span.keyed else ends


def _numbers(piece: NDArray[np.uint8], each: int) -> tuple[NDArray[np.uint32], int]:
    """Return the last of every ``each`` numbers that are whole, and the bytes of all of them. Raises InvalidRequest."""
    if each == 1 and not (piece > 0x7F).any():
        return piece.astype(np.uint32), len(piece)
    ends = np.flatnonzero(piece < 0x80)
    ends = ends[: len(ends) // each * each]
    begins = np.concatenate(([0], ends + 1))[each - 1 : len(ends) : each]
    lengths = ends[each - 1 :: each] - begins + 1
    if not len(lengths) or lengths.max() > _MAX_VARINT_BYTES:
        raise InvalidRequest(_FIELD, f"a number of more than {_MAX_VARINT_BYTES} bytes; expected 0 to 255")
    numbers = (piece[begins] & 0x7F).astype(np.uint32)
    for place in range(1, min(int(lengths.max()), _USED_VARINT_BYTES)):
        longer = np.flatnonzero(lengths > place)
        numbers[longer] |= (piece[begins[longer] + place] & 0x7F).astype(np.uint32) << np.uint32(7 * place)
    return numbers, int(ends[-1]) + 1


def _end_of_run(data: bytes, at: int, end: int, key: int) -> int:
    """Return the end of the numbers that follow each other from ``at``, each after this key of one byte."""
    size = _MIN_RUN_BYTES
    while at < end:
        piece = np.frombuffer(data, np.uint8, min(size, end - at), at)
        ends = np.flatnonzero(piece < 0x80)
        ends = ends[: len(ends) // 2 * 2]
        begins = np.concatenate(([0], ends + 1))[: len(ends) : 2]
        right = (ends[::2] == begins) & (piece[begins] == key)
        count = len(right) if right.all() else int(right.argmin())
        if not count:
            return at
        at += int(ends[2 * count - 1]) + 1
        if count < len(right):
            return at
        size = min(2 * size, _PIECE_BYTES)
    return at
