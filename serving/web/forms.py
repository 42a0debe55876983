"""Requests as pictures and parameters: multipart forms, plain files and queries, converted to messages.

The parameters are the fields of the message, by their descriptors, so each new field is a parameter at once:

- a number, a text, ``true`` or ``false``, or the name of an enum's value with or without its common beginning;
- of a repeated field, several of them, with commas or as several parameters;
- of a message of plain fields, such as ``Change``, their values with colons, in the order of the fields.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.web.incoming import BYTES, JSON, Incoming, check_parameters
from serving.web.json_requests import read_message
from serving.web.problems import Problem, invalid

MULTIPART, FORM = "multipart/form-data", "application/x-www-form-urlencoded"
#: The media types of pictures.
PICTURES = ("image/png", "image/jpeg")
#: The name of the part of a form that is a picture.
PICTURE = "image"
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_MAX_FIELDS = 64  # the most parts of a form besides its pictures
_MAX_FIELD_BYTES = 16384
# The most values of all lists, as many as a message may have fields besides its images. Each takes some microseconds of
# the event loop, which reads short requests itself.
_MAX_VALUES = 1024
_MAX_NAME_CHARACTERS = 64
_IMAGE = pb.Image.DESCRIPTOR
_INTEGERS = {FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1), FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1)}

Request = TypeVar("Request", bound=Message)
Parameters = list[tuple[str, str]]


class _Values(Protocol):
    """A repeated field."""

    def append(self, value: object, /) -> None: ...

    def add(self, **values: object) -> Message: ...


def from_query(incoming: Incoming, kind: type[Request]) -> Request:
    """Return the message that the parameters in path and query describe. Raises Problem."""
    message = kind()
    _set_all(message, [*incoming.place.items(), *incoming.query], None)
    return message


def from_pictures(incoming: Incoming, kind: type[Request]) -> Request:
    """Return the message in JSON, or of one or several pictures with parameters. Raises Problem."""
    media, boundary = incoming.content_type
    if media == JSON:
        message = read_message(incoming.body, kind, incoming.limits.images)
        if incoming.query:
            raise invalid(incoming.query[0][0], "came in the query; with JSON, expected it in the body")
        return message
    if media == MULTIPART:
        pictures, parameters = _parts(incoming, boundary)
    elif media in (*PICTURES, BYTES) or incoming.body.startswith(_SIGNATURES):
        pictures, parameters = [incoming.body], []
    else:
        expected = ", ".join((JSON, MULTIPART, *PICTURES, BYTES))
        raise Problem(415, f"content-type: {media[:_MAX_NAME_CHARACTERS]!r}; expected one of {expected}")
    message = kind()
    images = [_image(picture) for picture in pictures]
    _set_all(message, [*incoming.query, *parameters], images)
    _put_images(message, images)
    return message


def parameters_of(kind: Descriptor) -> Iterator[FieldDescriptor]:
    """Yield the fields of a message that are parameters. Those of its images are among them."""
    for field in kind.fields:
        if field.message_type is _IMAGE:
            yield from (one for one in _IMAGE.fields if one.containing_oneof is None)
        elif _is_plain(field):
            yield field


def enum_names(kind: EnumDescriptor) -> dict[str, int]:
    """Return the numbers of an enum's values, by their names without their common beginning, in lower case."""
    names = [value.name for value in kind.values]
    common = names[0].removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(common).lower(): value.number for value in kind.values}


def _is_plain(field: FieldDescriptor) -> bool:
    """Return True if a field can be written as a parameter: no bytes, and no message with further messages or lists."""
    if field.message_type is None:
        return field.type != FieldDescriptor.TYPE_BYTES
    inner = field.message_type.fields
    return all(one.message_type is None and not one.is_repeated and _is_plain(one) for one in inner)


def _image(picture: bytes) -> pb.Image:
    """Return a file as an image, and other bytes as pixels."""
    return pb.Image(encoded=picture) if picture.startswith(_SIGNATURES) else pb.Image(pixels=picture)


def _put_images(message: Message, images: list[pb.Image]) -> None:
    """Put the images into the field of a message that takes them. Raises Problem."""
    [field] = [one for one in message.DESCRIPTOR.fields if one.message_type is _IMAGE]
    if field.is_repeated:
        getattr(message, field.name).extend(images)
    elif len(images) == 1:
        getattr(message, field.name).CopyFrom(images[0])
    elif images:
        raise invalid(field.name, f"{len(images)} pictures; expected one")


def _set_all(message: Message, parameters: Iterable[tuple[str, str]], images: list[pb.Image] | None) -> None:
    """Set fields of a message, and of its images, from their texts. Raises Problem."""
    fields = {field.name: field for field in parameters_of(cast(Descriptor, message.DESCRIPTOR))}
    seen, values = set[str](), 0
    for name, text in parameters:
        field = fields.get(name)
        if field is None:
            expected = ", ".join(sorted(fields)) or "none"
            raise invalid(name[:_MAX_NAME_CHARACTERS], f"no parameter of this path; expected one of: {expected}")
        if not field.is_repeated and name in seen:
            raise invalid(name, "came more than once; expected it once")
        seen.add(name)
        if field.is_repeated and (values := values + text.count(",") + 1) > _MAX_VALUES:
            raise invalid(name, f"{values} values in all lists so far; expected at most {_MAX_VALUES}")
        for target in images or [] if field.containing_type is _IMAGE else [message]:
            _set(target, field, text)


def _set(message: Message, field: FieldDescriptor, text: str) -> None:
    """Set a field from its text, or add to it. Raises Problem."""
    if field.is_repeated:
        values = cast(_Values, getattr(message, field.name))
        for one in filter(None, text.split(",")):
            if field.message_type:
                _set_message(values.add(), field, one)
            else:
                values.append(_value(field, one, field.name))
    elif field.message_type:
        inner = cast(Message, getattr(message, field.name))
        inner.SetInParent()
        _set_message(inner, field, text)
    else:
        setattr(message, field.name, _value(field, text, field.name))


def _set_message(message: Message, field: FieldDescriptor, text: str) -> None:
    fields, texts = cast(Descriptor, message.DESCRIPTOR).fields, text.split(":")
    if len(texts) != len(fields):
        expected = ":".join(one.name for one in fields)
        raise invalid(field.name, f"{_shown(text)}; expected {expected}")
    for one, value in zip(fields, texts, strict=True):
        setattr(message, one.name, _value(one, value, f"{field.name}.{one.name}"))


def _value(field: FieldDescriptor, text: str, name: str) -> object:
    """Return the value of a plain field. Raises Problem."""
    if field.enum_type is not None:
        names = enum_names(field.enum_type)
        full: Mapping[str, int] = {value.name: value.number for value in field.enum_type.values}
        number = names.get(text.lower(), full.get(text))
        if number is None:
            raise invalid(name, f"{_shown(text)}; expected one of: {', '.join(names)}")
        return number
    if field.type == FieldDescriptor.TYPE_STRING:
        return text
    if field.type == FieldDescriptor.TYPE_BOOL:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise invalid(name, f"{_shown(text)}; expected true or false")
        return values[text.lower()]
    try:
        if field.type in _INTEGERS:
            low, high = _INTEGERS[field.type]
            number = int(text) if len(text) <= len(str(low)) + len(str(high)) else high + 1
            if not low <= number <= high:
                raise ValueError
            return number
        value = float(text)
        if not math.isfinite(value) or abs(value) > 3.4e38:  # of FP32
            raise ValueError
        return value
    except ValueError:
        kind = "a whole number" if field.type in _INTEGERS else "a number"
        raise invalid(name, f"{_shown(text)}; expected {kind}") from None


def _shown(text: str) -> str:
    return repr(text[:_MAX_NAME_CHARACTERS])


def _parts(incoming: Incoming, boundary: str) -> tuple[list[bytes], Parameters]:
    """Return the pictures and the parameters of a form. Raises Problem."""
    form = _Form(incoming.body, incoming.limits.images, incoming.limits.image_bytes)
    try:
        parser = MultipartParser(boundary.encode("latin-1", "replace"), form.callbacks())  # type: ignore[arg-type]
        parser.write(incoming.body)
        parser.finalize()
    except FormParserError:
        raise invalid("body", "cannot be read as a form of parts with this boundary") from None
    if not form.complete:
        raise invalid("body", "a form that does not end")
    return form.pictures, form.parameters


class _Form:
    """The parts of a multipart form (RFC 7578), as its parser reports them. Everything stays in memory.

    The parser itself limits the headers of a part.
    """

    def __init__(self, body: bytes, max_pictures: int, max_picture_bytes: int) -> None:
        self.pictures: list[bytes] = []
        self.parameters: Parameters = []
        self.complete = False
        self._max_pictures = max_pictures
        self._max_picture_bytes = max_picture_bytes
        self._begin()

    def callbacks(self) -> dict[str, object]:
        """Return the functions for the parser, by the names of its events."""
        return {
            "on_part_begin": self._begin, "on_part_data": self._data, "on_part_end": self._end_part,
            "on_header_field": self._header_name, "on_header_value": self._header_value,
            "on_header_end": self._header_end, "on_headers_finished": self._headers_end, "on_end": self._end,
        }  # fmt: skip

    def _begin(self) -> None:
        self._header, self._value = b"", b""
        self._name, self._content = "", bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            check_parameters("content-disposition", self._value.count(b";"))
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._header = self._value = b""

    def _headers_end(self) -> None:
        limit = self._max_pictures if self._name == PICTURE else _MAX_FIELDS
        if len(self.pictures if self._name == PICTURE else self.parameters) >= limit:
            text = f"more than {limit} parts" + (" (max_images_per_request)" if self._name == PICTURE else "")
            raise invalid(self._name[:_MAX_NAME_CHARACTERS] or "body", text)

    def _data(self, data: bytes, start: int, end: int) -> None:
        is_picture = self._name == PICTURE
        limit = self._max_picture_bytes if is_picture else _MAX_FIELD_BYTES
        if len(self._content) + end - start > limit:
            text = f"more than {limit} bytes" + (" (max_image_bytes)" if is_picture else "")
            raise invalid(self._name[:_MAX_NAME_CHARACTERS] or "body", text)
        self._content += data[start:end]

    def _end_part(self) -> None:
        if self._name == PICTURE:
            self.pictures.append(bytes(self._content))
            return
        try:
            self.parameters.append((self._name, self._content.decode()))
        except UnicodeDecodeError:
            raise invalid(self._name[:_MAX_NAME_CHARACTERS] or "body", "a value that is no UTF-8") from None

    def _end(self) -> None:
        self.complete = True
