"""Protobuf messages in JSON, by protobuf's mapping with the fields' own names. Integers of 64 bits are numbers.

Clients may send anything, so the number of values of a text is limited before it is read, and its depth meanwhile.
Long lists are read and written in blocks: Python's reader and writer let no other thread run until they have ended.
"""

import base64
import json
import json.scanner
import re
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar, cast

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray

from serving.web.problems import invalid

#: A value of JSON.
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

# Lists and objects take twenty times their text in memory, so these are limited, and not the text alone.
MAX_CONTAINERS = 2**17
# The most lists and objects inside each other. Those of a tensor of the most dimensions have 35 levels.
_MAX_DEPTH = 64
# A name takes up to 200 bytes in memory, and four in its text. The most images have 8,192 quotes.
_MAX_QUOTES = 2**17
# Each takes the reader some 30 nanoseconds, in which no other thread runs. A sixty-fourth of base64 may be such.
_MAX_ESCAPES = 2**18
# A number takes up to 36 bytes in memory, and four in its text. A list or an object takes as much as eight numbers.
MAX_VALUES = 1_600_000
_VALUES_A_CONTAINER = 8
# A single character outside of ASCII makes Python keep all of a text with up to four bytes a character.
_MAX_UNICODE_BYTES = 6 * 2**20
# The characters, or the values, of a block: about a millisecond.
_BLOCK_CHARACTERS, _BLOCK_VALUES = 2**15, 4096
_FLAT = re.compile(rf'[^\[\]{{}}"]{{0,{_BLOCK_CHARACTERS}}}')  # numbers, and names such as null
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # which JSON may have alone, and UTF-8 may not
# An escaped character: a pair of surrogates, one that is alone, which is the group, or any other.
_ESCAPED = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|(u[dD][89a-fA-F])|.)")

_Given = ParamSpec("_Given")
Outcome = TypeVar("Outcome")


def read_json(
    text: bytes, field: str = "body", max_containers: int = MAX_CONTAINERS, max_values: int = MAX_VALUES
) -> Json:
    """Return the value of a text in JSON (RFC 8259). Raises Problem."""
    containers = text.count(b"[") + text.count(b"{")
    if containers > max_containers:
        raise invalid(field, f"expected at most {max_containers} lists and objects")
    if text.count(b'"') > _MAX_QUOTES:
        raise invalid(field, f"expected at most {_MAX_QUOTES // 2} names and texts")
    if text.count(b"\\") > _MAX_ESCAPES:
        raise invalid(field, f"expected at most {_MAX_ESCAPES} characters after a backslash")
    if text.count(b",") + _VALUES_A_CONTAINER * containers > max_values:
        each = f"each list or object counts as {_VALUES_A_CONTAINER}"
        raise invalid(field, f"expected at most {max_values} values, of which {each}")
    if len(text) > _MAX_UNICODE_BYTES and not text.isascii():
        raise invalid(field, f"{len(text)} bytes of JSON; above {_MAX_UNICODE_BYTES} bytes, expected ASCII alone")
    try:
        value: Json = _Decoder().decode(text.decode())
    except _TooDeep:
        raise invalid(field, f"lists or objects inside each other; expected at most {_MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise invalid(field, f"{len(text)} bytes that are no JSON: expected UTF-8") from None
    except ValueError as error:
        # Python's text about thousands of digits names its own settings.
        reason = str(error) if isinstance(error, json.JSONDecodeError | _NoNumber) else "a number of too many digits"
        raise invalid(field, f"{len(text)} bytes that are no JSON: {reason}") from None
    if _SURROGATE.search(text) and any(match[1] for match in _ESCAPED.finditer(text)):
        raise invalid(field, "half of a character; expected Unicode text")
    return value


def read_object(
    text: bytes, field: str = "body", max_containers: int = MAX_CONTAINERS, max_values: int = MAX_VALUES
) -> dict[str, Json]:
    """Return the object of a text in JSON. Raises Problem."""
    value = read_json(text, field, max_containers, max_values)
    if not isinstance(value, dict):
        raise invalid(field, f"a value of the kind {kind_of(value)}; expected an object")
    return value


def to_json(message: Message) -> dict[str, Json]:
    """Return a message as an object. Fields without presence are always there, others where they are set."""
    found: dict[str, Json] = {}
    for field in cast(Descriptor, message.DESCRIPTOR).fields:
        if field.is_repeated or not field.has_presence or message.HasField(field.name):
            found[field.name] = _field(field, getattr(message, field.name))
    return found


def shortest(numbers: Iterable[float] | NDArray[np.float32]) -> list[float]:
    """Return the shortest decimal numbers that stand for these numbers of 32 bits."""
    values = np.asarray(numbers, np.float32)
    blocks = (values[begin : begin + _BLOCK_VALUES] for begin in range(0, len(values), _BLOCK_VALUES))
    return [float(text) for block in blocks for text in block.astype("U")]


def write_json(value: Json) -> bytes:
    """Return the text of a value."""
    return "".join(_pieces(value)).encode()


def kind_of(value: Json) -> str:
    """Return the name of a value's kind in JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"


def _field(field: FieldDescriptor, value: object) -> Json:
    if not field.is_repeated:
        return _one(field, value)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        return {str(key): _one(entry, one) for key, one in cast("dict[str, object]", value).items()}
    values = cast("list[object]", value)
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return cast("list[Json]", shortest(cast("list[float]", values)))
    return [_one(field, one) for one in values]


def _one(field: FieldDescriptor, value: object) -> Json:
    match field.type:
        case FieldDescriptor.TYPE_MESSAGE:
            return to_json(cast(Message, value))
        case FieldDescriptor.TYPE_ENUM:
            number = cast(int, value)
            name = field.enum_type.values_by_number.get(number) if field.enum_type else None
            return name.name if name else number
        case FieldDescriptor.TYPE_BYTES:
            return base64.b64encode(cast(bytes, value)).decode()
        case FieldDescriptor.TYPE_FLOAT:
            return shortest([cast(float, value)])[0]
    return cast("str | int | float | bool", value)


def _pieces(value: Json) -> Iterator[str]:
    """Yield the pieces of a value's text."""
    if isinstance(value, dict):
        before = "{"
        for name, one in value.items():
            yield f"{before}{_text(name)}:"
            yield from _pieces(one)
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        before = "["
        for one in value:
            yield before
            yield from _pieces(one)
            before = ","
        yield "]"
    elif isinstance(value, list):
        for begin in range(0, len(value), _BLOCK_VALUES):
            yield ("," if begin else "[") + _text(value[begin : begin + _BLOCK_VALUES])[1:-1]
        yield "]" if value else "[]"
    else:
        yield _text(value)


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _NoNumber(ValueError):
    """A name that other readers take for a number."""


class _TooDeep(ValueError):
    """Lists or objects have too many levels."""


class _Levels:
    """The lists and objects that are being read, each inside the one before."""

    def __init__(self) -> None:
        self._count = 0

    def limited(self, read: Callable[_Given, Outcome]) -> Callable[_Given, Outcome]:
        """Return a reader of lists or objects that raises _TooDeep if it is called by itself too many times."""

        def read_inside(*given: _Given.args, **named: _Given.kwargs) -> Outcome:
            self._count += 1
            if self._count > _MAX_DEPTH:
                raise _TooDeep
            outcome = read(*given, **named)
            self._count -= 1
            return outcome

        return read_inside


class _Decoder(json.JSONDecoder):
    """A reader of JSON that limits the depth, and reads lists of numbers in blocks."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant)
        levels = _Levels()
        self.parse_object = levels.limited(json.decoder.JSONObject)  # type: ignore[attr-defined]
        self.parse_array = levels.limited(_read_list)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _read_list(place: tuple[str, int], scan_once: Callable[[str, int], tuple[Json, int]]) -> tuple[list[Json], int]:
    """Return the list that begins at a place in a text, after its bracket, and the place after it. Raises ValueError.

    Its signature is that of json.decoder.JSONArray.
    """
    text, begin = place
    values: list[Json] = []
    while match := _FLAT.match(text, begin):
        end = match.end()
        last = text[end : end + 1] == "]"
        if not last and (end - begin < _BLOCK_CHARACTERS or (end := text.rfind(",", begin, end)) < 0):
            break
        block: list[Json] = json.loads(f"[{text[begin:end]}]", parse_constant=_refuse_constant)
        if not block and (values or not last):
            raise json.JSONDecodeError("Expecting value", text, begin)
        values += block
        if last:
            return values, end + 1
        begin = end + 1
    rest, end = json.decoder.JSONArray((text, begin), scan_once)  # type: ignore[attr-defined]
    if values and not rest:
        raise json.JSONDecodeError("Expecting value", text, begin)
    return values + rest, end


def _refuse_constant(name: str) -> float:
    raise _NoNumber(f"{name} is no number of JSON")
