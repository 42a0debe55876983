"""Requests in JSON, by protobuf's mapping: the kinds of their values are checked, and protobuf's reader does the rest.

That reader repeats wrong values in its errors, however large they are, and passes on what Python says about them.
"""

import base64
import binascii
import sys
from contextlib import suppress
from functools import cache
from typing import TypeVar, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from serving.web.json_messages import Json, kind_of, read_object
from serving.web.problems import Problem, invalid

_MAX_DEPTH = 32
# The most lists and objects of a message besides its images: each takes protobuf's reader some microseconds.
_MAX_OTHER_CONTAINERS = 1024
# The most values of a message for each of its lists and objects: each takes protobuf's reader a microsecond or two.
_VALUES_A_CONTAINER = 64
# Protobuf's reader searches names and texts, in which no other thread runs. Bytes in base64 are not searched.
_MAX_CHARACTERS = 65536
_MAX_NUMBER_CHARACTERS = 64  # of a number as a text
_MAX_ERROR_CHARACTERS = 256
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1), FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1), FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}  # fmt: skip
# The largest numbers of a float and a double. As texts, numbers beyond them are infinite, as protobuf has it.
_LARGEST = {
    FieldDescriptor.CPPTYPE_FLOAT: (2 - 2.0**-23) * 2.0**127,
    FieldDescriptor.CPPTYPE_DOUBLE: sys.float_info.max,
}

Request = TypeVar("Request", bound=Message)


def read_message(text: bytes, kind: type[Request], max_images: int) -> Request:
    """Return the message in a text. max_images: the most images in it. Raises Problem."""
    message, descriptor = kind(), cast(Descriptor, kind.DESCRIPTOR)
    containers = 2 * max_images + _MAX_OTHER_CONTAINERS
    content = read_object(text, max_containers=containers, max_values=_VALUES_A_CONTAINER * containers)
    _check_members(content, descriptor, "")
    try:
        json_format.ParseDict(content, message, max_recursion_depth=_MAX_DEPTH)
    except (json_format.ParseError, ValueError, TypeError, RecursionError, OverflowError) as error:
        _check_members(content, descriptor, "", in_full=True)
        raise invalid("body", f"no {descriptor.full_name}: {_short(error)}") from None
    return message


def _check_members(content: dict[str, Json], kind: Descriptor, place: str, in_full: bool = False) -> None:
    """Raise Problem for a value that the field of its name cannot take. Unknown names are left to protobuf's reader.

    place: the fields around these, with a dot at the end, for errors. in_full: decode bytes too.
    """
    fields = _fields(kind)
    for name, value in content.items():
        if len(name) > _MAX_CHARACTERS:
            raise invalid(place[:-1] or "body", f"a name of {len(name)} characters; expected at most {_MAX_CHARACTERS}")
        field = fields.get(name)
        if field is None or value is None:  # null stands for none
            continue
        if not field.is_repeated:
            _check_value(value, field, place + name, in_full)
        elif isinstance(value, list):
            for index, one in enumerate(value):
                _check_value(one, field, f"{place}{name}[{index}]", in_full)
        else:
            raise _wrong(place + name, value, "an array")


@cache
def _fields(kind: Descriptor) -> dict[str, FieldDescriptor]:
    """Return a message's fields by both of their names."""
    return {name: field for field in kind.fields for name in (field.name, field.json_name)}


def _check_value(value: Json, field: FieldDescriptor, place: str, in_full: bool) -> None:
    """Raise Problem for a value that a field, or an item of it, cannot take. place: the field, for errors."""
    if field.message_type is not None:
        if not isinstance(value, dict):
            raise _wrong(place, value, "an object")
        _check_members(value, field.message_type, place + ".", in_full)
    elif field.enum_type is not None:
        names = field.enum_type.values_by_name
        if not isinstance(value, str) or value not in names:
            _check_whole(_number(value, place, f"one of {', '.join(names)}", (int,)), field, place)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        _check_bytes(value, place, in_full)
    elif field.type == FieldDescriptor.TYPE_STRING:
        if not isinstance(value, str):
            raise _wrong(place, value, "a string")
        if len(value) > _MAX_CHARACTERS:
            raise invalid(place, f"a string of {len(value)} characters; expected at most {_MAX_CHARACTERS}")
    elif field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise _wrong(place, value, "true or false")
    elif largest := _LARGEST.get(field.cpp_type):
        number = _number(value, place, "a number", (int, float))
        if not isinstance(value, str) and not -largest <= number <= largest:
            raise invalid(place, f"a number out of range; expected {-largest:g} to {largest:g}")
    else:
        _check_whole(_number(value, place, "a whole number", (int, float)), field, place)


def _check_bytes(value: Json, place: str, in_full: bool) -> None:
    if not isinstance(value, str):
        raise _wrong(place, value, "bytes in base64")
    if in_full:
        try:
            base64.urlsafe_b64decode(value.encode() + b"=" * (4 - len(value) % 4))  # as protobuf's reader does it
        except binascii.Error:
            raise invalid(place, f"{len(value)} characters that are no base64") from None


def _check_whole(number: int | float, field: FieldDescriptor, place: str) -> None:
    low, high = _RANGES[field.cpp_type]
    if isinstance(number, float) and not number.is_integer():
        raise invalid(place, "a number that is not whole; expected a whole number")
    if not low <= number <= high:
        raise invalid(place, f"a number out of range; expected {low} to {high}")


def _number(value: Json, place: str, expected: str, kinds: tuple[type[int] | type[float], ...]) -> int | float:
    """Return the number that a value is, or that a short text stands for. Raises Problem.

    expected: what else may come, for errors. kinds: those of a number as a text.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= _MAX_NUMBER_CHARACTERS:
        for kind in kinds:
            with suppress(ValueError):
                return kind(value)
    raise _wrong(place, value, expected)


def _wrong(place: str, value: Json, expected: str) -> Problem:
    """Return the problem of a value of a wrong kind."""
    return invalid(place, f"a value of the kind {kind_of(value)}; expected {expected}")


def _short(error: Exception) -> str:
    """Return an error's text on one line, of limited length, since it may repeat the client's words."""
    beginning = str(error)[: 4 * _MAX_ERROR_CHARACTERS]  # cut first: the words of a long text take ten times its memory
    return " ".join(beginning.split())[:_MAX_ERROR_CHARACTERS]
