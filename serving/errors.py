"""What a request can be answered with instead of a result, each with its gRPC status code.

The text of these errors is written for the client. Any other exception is a fault of ours: it is logged, and the
client is told no more than INTERNAL.
"""

import grpc


class ServingError(Exception):
    """Base of the errors that a client is told of."""

    code = grpc.StatusCode.INTERNAL


class InvalidRequest(ServingError):
    """The request cannot be answered as it is; the text names the field, what came, and what was expected."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class TooLarge(ServingError):
    """The request is above a limit; the text names the field and the limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class QueueFull(ServingError):
    """The queue has no room for the request now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnknownModel(ServingError):
    """No such model or version is served."""

    code = grpc.StatusCode.NOT_FOUND


class Draining(ServingError):
    """The server is stopping and takes no more requests."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self) -> None:
        super().__init__("the server is stopping; send the request to another one")


class InferenceFailed(ServingError):
    """The model could not compute an answer; the cause is in the server's log."""
