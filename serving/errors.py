"""Errors that answer a request, each with its gRPC status code.

Their texts are written for the client. Any other exception is a fault of the server: it is logged, and the client gets
INTERNAL without its text.
"""

from typing import Self

import grpc


class Keepable(Exception):
    """An error that may outlive its request."""

    def alone(self) -> Self:
        """Return this error without its frames and cause, to be kept: they hold what the client has sent."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self


class ServingError(Keepable):
    """Base of the errors that reach a client."""

    code = grpc.StatusCode.INTERNAL
    #: The value of the label ``reason`` in the metrics.
    reason = "internal"


class InvalidRequest(ServingError):
    """A field of the request, or the request as a whole, is wrong.

    field: path of the field in the request, such as ``images[3].pixels``. description: the value that came and the
    expected values.
    """

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class UnknownModel(ServingError):
    """The model or the version is not served."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "unknown_model"


class QueueFull(ServingError):
    """The queue has no room for the request. retry_after: seconds after which it may have room."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "queue_full"

    def __init__(self, description: str, retry_after: float) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class DeadlineUnmeetable(ServingError):
    """The request would be answered only after its deadline, so it is not computed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


class DecodingTooSlow(ServingError):
    """The images were not decoded in time, mostly because other requests' images came before."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "image_timeout"


class Draining(ServingError):
    """The server is stopping and refuses new requests."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "draining"

    def __init__(self) -> None:
        super().__init__("the server is stopping; send the request to another one")


class InferenceFailed(ServingError):
    """The model could not compute an answer; the cause is in the server's log."""

    reason = "failed"

    def __init__(self) -> None:
        super().__init__("the model could not compute this request")


class Unsupported(ServingError):
    """The model lacks a part that the method needs."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "unsupported"


class Unauthenticated(ServingError):
    """The client has shown no valid token or certificate."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "unauthenticated"


class Forbidden(ServingError):
    """The client lacks the role for this method."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "forbidden"


class ClientLimit(ServingError):
    """The client has too many calls in flight, or makes too many a second."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "client_limit"


#: The reasons to deny what a client may not do, or not so often.
DENIALS = (Unauthenticated.reason, Forbidden.reason, ClientLimit.reason)
#: The reason of a refusal before any service sees the call: too large, too many at once, or an unknown method.
TRANSPORT = "transport"
#: All values of the label ``reason``.
REASONS = (ServingError.reason, *(error.reason for error in ServingError.__subclasses__()), TRANSPORT)
