"""Errors of HTTP as problem details (RFC 9457), made of gRPC's statuses."""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from serving.errors import Keepable
from serving.transport.headers import Metadata, Status

#: The media type of an error.
PROBLEM = "application/problem+json"
#: The status of a request whose client has gone, in nginx's numbering. Nobody reads it; the metrics count it.
CLIENT_GONE = 499
_DETAILS = "grpc-status-details-bin"
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400, grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.ALREADY_EXISTS: 409, grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429, grpc.StatusCode.CANCELLED: CLIENT_GONE,
    grpc.StatusCode.UNIMPLEMENTED: 501, grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}  # fmt: skip


class Violation(NamedTuple):
    """A wrong field of a request, as in google.rpc.BadRequest."""

    field: str
    description: str


class Problem(Keepable):
    """A request is answered with an error.

    status: of HTTP. code: of gRPC. noted: True if the method has counted and logged it.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        violations: tuple[Violation, ...] = (),
        headers: Mapping[str, str] | None = None,
        noted: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code
        self.headers = dict(headers or {})
        self.noted = noted
        self._violations = violations

    def body(self, with_error: bool = False) -> bytes:
        """Return the problem in JSON. with_error: with the member ``error`` of the Open Inference Protocol."""
        members: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase if self.status != CLIENT_GONE else "Client Closed Request",
            "status": self.status,
            "detail": self.detail,
            "code": self.code.name,
        }
        if self._violations:
            members["field_violations"] = [violation._asdict() for violation in self._violations]
        if with_error:
            members["error"] = self.detail
        return json.dumps(members).encode()


def invalid(field: str, description: str) -> Problem:
    """Return the problem of a wrong field, with the text that gRPC gives to such an error."""
    violation = Violation(field, description)
    return Problem(400, f"{field}: {description}", violations=(violation,))


def problem_of(status: Status) -> Problem:
    """Return the problem that stands for a status of gRPC."""
    code = _CODES.get(status.code, 500)
    headers: dict[str, str] = {}
    violations: tuple[Violation, ...] = ()
    for detail in _details(status.metadata):
        if isinstance(detail, RetryInfo):
            delay = detail.retry_delay
            headers["Retry-After"] = str(max(1, delay.seconds + math.ceil(delay.nanos / 1e9)))
        else:
            violations = tuple(Violation(one.field, one.description) for one in detail.field_violations)
    if code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Problem(code, status.text, status.code, violations, headers, noted=True)


def _details(metadata: Metadata) -> list[BadRequest | RetryInfo]:
    """Return the details in a status's metadata that HTTP can tell."""
    found: list[BadRequest | RetryInfo] = []
    for key, value in metadata:
        if key != _DETAILS or not isinstance(value, bytes):
            continue
        try:
            details = status_pb2.Status.FromString(value).details
        except DecodeError:
            continue
        for packed in details:
            for kind in (BadRequest, RetryInfo):
                detail = kind()
                if packed.Unpack(detail):
                    found.append(detail)
    return found
