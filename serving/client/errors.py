"""The client's exceptions, one tree below CapsNetError, and their construction from the server's answers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_FIELD_PATTERN = re.compile(r"[a-z][a-z_0-9]*(\[\d+\])?(\.[a-z][a-z_0-9]*)*(?=: )")
_IMAGE_PATTERN = re.compile(r"images\[(\d+)\]")
_ONLY_IMAGE_PATTERN = re.compile(r"image(\.|$)")
#: The end of an error of an image that has another size than the model's.
SIZE_HINT = "(resize=True scales it, preprocess='auto' finds the object in it)"
# The server's words on such an image.
_SIZE_PATTERN = re.compile(
    r"( image of \d+ x \d+ pixels; expected \d+ x \d+)(, or a preparation of it \(preprocess\))?$"
)
# The words of gRPC's servers in several languages for a method that they do not have.
_UNKNOWN_METHOD_PATTERN = re.compile(r"method not (found|impl)|unknown (service|method)|no reason", re.IGNORECASE)
_MAX_BRIEF_CHARACTERS = 100
_STATUS_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class CapsNetError(Exception):
    """Base of all errors of the client.

    code: the gRPC status of the server's answer; None if the client found the error itself.
    index: the number, from 0, of the image in the call's input; None if the error concerns more than one image.
    """

    def __init__(self, text: str, *, code: grpc.StatusCode | None = None, index: int | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.index = index


class InvalidRequest(CapsNetError, ValueError):
    """The request is invalid. field: the invalid field, such as ``images[3].pixels``."""

    def __init__(
        self, text: str, *, field: str = "", code: grpc.StatusCode | None = None, index: int | None = None
    ) -> None:
        super().__init__(text, code=code, index=index)
        self.field = field

    @property
    def reason(self) -> str:
        """Return the text without the field."""
        return str(self).removeprefix(f"{self.field}: ")


class InvalidImage(InvalidRequest):
    """One image cannot be classified: the model does not take its shape, its type or its file."""


class Overloaded(CapsNetError):
    """The server has no room for the request now.

    retry_after: the seconds that the server asks to wait; None if it does not ask.
    """

    def __init__(
        self,
        text: str,
        *,
        retry_after: float | None = None,
        code: grpc.StatusCode | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(text, code=code, index=index)
        self.retry_after = retry_after


class DeadlineExceeded(CapsNetError, TimeoutError):
    """There was no answer in time."""


class Unavailable(CapsNetError):
    """No server answers at the address, or the one there is stopping."""


class UnknownModel(CapsNetError):
    """The server does not serve the model or version that the client asks for."""


class AccessDenied(CapsNetError):
    """The server requires a token, or refuses the one that came."""


class ServerFault(CapsNetError):
    """The server failed, or its answer breaks the contract."""


class Unsupported(ServerFault):
    """The model has no graph for the method, or the server does not have the method."""


class ItemError(ValueError):
    """An item holds no image. The text says what came and what was expected, but not which item it was."""


class ShapeError(ItemError):
    """An array does not have the shape that the model takes."""


def brief(text: str) -> str:
    """Return the first line of a text, and its beginning alone if it is long."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= _MAX_BRIEF_CHARACTERS else f"{line[:_MAX_BRIEF_CHARACTERS]}..."


@dataclass(frozen=True)
class Failure:
    """The end without an answer of a call, or of one request of a stream.

    retry_after: the seconds that the server asks to wait. may_retry: False if the server asks not to retry.
    """

    code: grpc.StatusCode
    text: str
    field: str = ""
    retry_after: float | None = None
    may_retry: bool = True
    cause: BaseException | None = None

    @property
    def passing(self) -> bool:
        """Return True if the same request may succeed later, or at another server."""
        return self.may_retry and self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)

    @property
    def may_be_one_image(self) -> bool:
        """Return True if a single image of the request may be the cause."""
        return self.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        )

    def to_error(self, indices: Sequence[int] = ()) -> CapsNetError:
        """Return the exception to raise. indices: the number, in the call's input, of each image of the request."""
        index = indices[0] if len(indices) == 1 else None
        error: CapsNetError
        match self.code:
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
                error = self._invalid(indices)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                error = Overloaded(self.text, retry_after=self.retry_after, code=self.code, index=index)
            case code:
                error = _ERROR_BY_STATUS.get(code, ServerFault)(self.text, code=code, index=index)
        error.__cause__ = self.cause
        return error

    def _invalid(self, indices: Sequence[int]) -> InvalidRequest:
        text, name = self.text, self.field
        text = _SIZE_PATTERN.sub(rf"\1 {SIZE_HINT}", text)
        found = _IMAGE_PATTERN.match(name)
        if not found:
            kind = InvalidImage if _ONLY_IMAGE_PATTERN.match(name) else InvalidRequest
            return kind(text, field=name, code=self.code)
        position = int(found[1])
        index = indices[position] if position < len(indices) else position
        numbered = f"images[{index}]{name[found.end() :]}"
        # The server counts the images of this request, which may hold only a part of the caller's images.
        text = numbered + text[len(name) :] if text.startswith(name) else f"{numbered}: {text}"
        return InvalidImage(text, field=numbered, code=self.code, index=index)


#: The server ended the stream with OK although answers were missing.
STREAM_LOST = Failure(grpc.StatusCode.UNAVAILABLE, "the server ended the stream before its last answer")

_ERROR_BY_STATUS: dict[grpc.StatusCode, type[CapsNetError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
}


def failure_of_call(error: grpc.RpcError, address: str) -> Failure:
    """Return the failure of a call to this address, with the ``google.rpc`` details and retry hints of the server."""
    call: Any = error  # grpc raises objects that have these methods, but their declared type lacks them
    code = call.code()
    text = call.details() or "no reason was given"
    name, retry_after, may_retry = "", None, True
    for key, value in call.trailing_metadata() or ():
        if key == _PUSHBACK_KEY:
            # By gRPC's rules any value but a whole number from 0 means: do not retry.
            may_retry = value.isdecimal()
            retry_after = int(value) / 1000 if may_retry else retry_after
        elif key == _DETAILS_KEY:
            name, delay = _read_details(value)
            retry_after = delay if retry_after is None else retry_after
    if code is grpc.StatusCode.UNAVAILABLE and text.startswith(("failed to connect", "connections to all")):
        text = _explained(text)
    elif code is grpc.StatusCode.UNAVAILABLE and text.startswith("errors resolving"):
        text = f"no host of this name is found ({_last_words(text)})"
    elif code is grpc.StatusCode.CANCELLED and "Channel closed" in text:
        text = "the client was closed"
    elif code is grpc.StatusCode.UNIMPLEMENTED and _UNKNOWN_METHOD_PATTERN.match(text):
        text = f"the server there lacks this method: it is of another kind, or older than this client ({text})"
    if not _is_about_the_request(code):
        text = f"{address}: {text}"
    return Failure(code, text, name or _field_of(text), retry_after, may_retry, error)


def _explained(text: str) -> str:
    """Return what keeps a connection from being made. text: gRPC's words."""
    if "http1" in text:
        return "an HTTP server answers there, perhaps with the metrics; expected the port of gRPC, by default 8001"
    if "andshake" in text:
        return f"TLS fails there: perhaps the server does not encrypt, or is not trusted ({text})"
    return f"no server answers there ({_last_words(text)})"


def _last_words(text: str) -> str:
    """Return the cause at the end of gRPC's words, such as ``Connection refused``."""
    return text.rpartition(": ")[2].rstrip("])") or text


def failure_of_item(code: int, text: str) -> Failure:
    """Return the failure of one request of a stream. code: a gRPC status as a number."""
    status = _STATUS_BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN)
    return Failure(status, text, _field_of(text))


def _is_about_the_request(code: grpc.StatusCode) -> bool:
    """Return True if the text of such a status speaks of the request and not of the server."""
    return code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.NOT_FOUND)


def _field_of(text: str) -> str:
    found = _FIELD_PATTERN.match(text)
    return found[0] if found else ""


def _read_details(data: bytes) -> tuple[str, float | None]:
    """Return the field and the seconds to wait that a ``google.rpc.Status`` names; "" and None if it names none."""
    name, seconds = "", None
    try:
        details: Iterable[Any] = status_pb2.Status.FromString(data).details
        for detail in details:
            bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad) and bad.field_violations:
                name = bad.field_violations[0].field
            elif detail.Unpack(retry):
                seconds = retry.retry_delay.ToNanoseconds() / 1e9
    except DecodeError:
        pass  # the call's own status says enough
    return name, seconds
