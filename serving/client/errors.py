"""What can go wrong, as one tree of exceptions below CapsNetError, and how the server's answers become them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"
_FIELD = re.compile(r"[a-z][a-z_0-9]*(\[\d+\])?(\.[a-z][a-z_0-9]*)*(?=: )")
_IMAGE = re.compile(r"images\[(\d+)\]")
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class CapsNetError(Exception):
    """Base of all errors of the client.

    code: the gRPC status that the server answered with; None where the client found the error itself.
    index: the number, from 0, of the image in the call's input; None where the error is not of one image.
    """

    def __init__(self, text: str, *, code: grpc.StatusCode | None = None, index: int | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.index = index


class InvalidRequest(CapsNetError, ValueError):
    """The server cannot answer the request as it is. field: what is wrong in it, such as ``images[3].pixels``."""

    def __init__(
        self, text: str, *, field: str = "", code: grpc.StatusCode | None = None, index: int | None = None
    ) -> None:
        super().__init__(text, code=code, index=index)
        self.field = field

    @property
    def reason(self) -> str:
        """The text without the field."""
        return str(self).removeprefix(f"{self.field}: ")


class InvalidImage(InvalidRequest):
    """One image cannot be classified: its shape, its type, or its file is not what the model takes."""


class Overloaded(CapsNetError):
    """The server has no room for the request now. retry_after: seconds that it asks to wait; None where it does not."""

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
    """The server wants a token, or another one."""


class ServerFault(CapsNetError):
    """The server failed, or answered what the contract does not allow."""


@dataclass(frozen=True)
class Failure:
    """How a call, or one request of a stream, ended without an answer.

    retry_after: seconds that the server asks to wait. may_retry: False where it asks not to try again.
    """

    code: grpc.StatusCode
    text: str
    field: str = ""
    retry_after: float | None = None
    may_retry: bool = True
    cause: BaseException | None = None

    @property
    def passing(self) -> bool:
        """The same request may be answered later, or by another server."""
        return self.may_retry and self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)

    @property
    def may_be_one_image(self) -> bool:
        """One image of several in the request may be the reason."""
        return self.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        )

    def to_error(self, indices: Sequence[int] = ()) -> CapsNetError:
        """The exception to raise. indices: the numbers, in the call's input, of the images of the request."""
        index = indices[0] if len(indices) == 1 else None
        error: CapsNetError
        match self.code:
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
                error = self._invalid(indices)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                error = Overloaded(self.text, retry_after=self.retry_after, code=self.code, index=index)
            case code:
                error = _KINDS.get(code, ServerFault)(self.text, code=code, index=index)
        error.__cause__ = self.cause
        return error

    def _invalid(self, indices: Sequence[int]) -> InvalidRequest:
        text, name = self.text, self.field
        found = _IMAGE.match(name)
        if not found:
            return InvalidRequest(text, field=name, code=self.code)
        position = int(found[1])
        index = indices[position] if position < len(indices) else position
        numbered = f"images[{index}]{name[found.end() :]}"
        # The server numbers the images of its request, which may be some of the caller's only.
        text = numbered + text[len(name) :] if text.startswith(name) else f"{numbered}: {text}"
        return InvalidImage(text, field=numbered, code=self.code, index=index)


#: A stream that the server ended as if all were answered.
STREAM_LOST = Failure(grpc.StatusCode.UNAVAILABLE, "the server ended the stream before its last answer")

_KINDS: dict[grpc.StatusCode, type[CapsNetError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
}


def failure_of_call(error: grpc.RpcError, address: str) -> Failure:
    """How a call to this address failed, with what ``google.rpc`` details and retry hints the server sent along."""
    call: Any = error  # grpc raises calls, which have these methods, and types them without
    code = call.code()
    text = call.details() or "no reason was given"
    name, retry_after, may_retry = "", None, True
    for key, value in call.trailing_metadata() or ():
        if key == _PUSHBACK:
            # By gRPC's rules what is no number from 0 on means: do not retry.
            may_retry = value.isdecimal()
            retry_after = int(value) / 1000 if may_retry else retry_after
        elif key == _DETAILS:
            name, delay = _read_details(value)
            retry_after = delay if retry_after is None else retry_after
    if code is grpc.StatusCode.UNAVAILABLE and text.startswith(("failed to connect", "connections to all")):
        text = f"no server answers there ({text})"
    if not _is_ours(code):
        text = f"{address}: {text}"
    return Failure(code, text, name or _field_of(text), retry_after, may_retry, error)


def failure_of_item(code: int, text: str) -> Failure:
    """How one request of a stream failed."""
    status = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return Failure(status, text, _field_of(text))


def _is_ours(code: grpc.StatusCode) -> bool:
    """The text is about the request, not about the server."""
    return code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.NOT_FOUND)


def _field_of(text: str) -> str:
    found = _FIELD.match(text)
    return found[0] if found else ""


def _read_details(data: bytes) -> tuple[str, float | None]:
    """(field, seconds to wait) of a ``google.rpc.Status``; ("", None) where it does not tell."""
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
        pass  # the status itself tells enough
    return name, seconds
