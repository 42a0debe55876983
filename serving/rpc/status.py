"""The statuses of failed calls, with details for programs (google.rpc.Status)."""

import math

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from serving.errors import InvalidRequest, QueueFull, ServingError
from serving.transport.headers import Metadata, Status


def status_of(error: ServingError) -> Status:
    """Return the status of an error for the client: code, text and details."""
    return Status(error.code, str(error), _details(error))


def _details(error: ServingError) -> Metadata:
    """Return the invalid field, or the time to retry, as trailing metadata."""
    detail: BadRequest | RetryInfo
    hint: Metadata = ()
    match error:
        case InvalidRequest():
            violation = BadRequest.FieldViolation(field=error.field, description=error.description)
            detail = BadRequest(field_violations=[violation])
        case QueueFull():
            milliseconds = max(1, math.ceil(1000 * error.retry_after))
            detail = RetryInfo()
            detail.retry_delay.FromMilliseconds(milliseconds)
            hint = (("grpc-retry-pushback-ms", str(milliseconds)),)
        case _:
            return ()
    packed = AnyMessage()
    packed.Pack(detail)
    status = status_pb2.Status(code=error.code.value[0], message=str(error), details=[packed])
    return (("grpc-status-details-bin", status.SerializeToString()), *hint)
