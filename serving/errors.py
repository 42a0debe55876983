"""What a request can be answered with instead of a result, each with its gRPC status code.

The text of these errors is written for the client. Any other exception is a fault of ours: it is logged, and the
client is told no more than INTERNAL.
"""

import grpc


class ServingError(Exception):
    """Base of the errors that a client is told of."""

    code = grpc.StatusCode.INTERNAL
    #: What the metrics call it.
    reason = "internal"


class InvalidRequest(ServingError):
    """The request cannot be answered as it is: what is wrong with a field of it, or of it as a whole.

    field: its path in the request, such as ``images[3].pixels``. description: what came, and what was expected.
    """

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class UnknownModel(ServingError):
    """No such model or version is served."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "unknown_model"


class QueueFull(ServingError):
    """The queue has no room for the request now. retry_after: seconds until it may have."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "queue_full"

    def __init__(self, description: str, retry_after: float) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class DeadlineUnmeetable(ServingError):
    """The request would be answered only after its deadline, so it is not computed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


class Draining(ServingError):
    """The server is stopping and takes no more requests."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "draining"

    def __init__(self) -> None:
        super().__init__("the server is stopping; send the request to another one")


class InferenceFailed(ServingError):
    """The model could not compute an answer; the cause is in the server's log."""

    reason = "failed"

    def __init__(self) -> None:
        super().__init__("the model could not compute this request")


#: The reason of what is refused before a service sees it: too large, too much at once, or no call of a method.
TRANSPORT = "transport"
#: What the metrics call the reasons of a refusal.
REASONS = (ServingError.reason, *(error.reason for error in ServingError.__subclasses__()), TRANSPORT)
