"""The door of a method: it refuses calls from their headers alone, at a fraction of a request's cost."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Protocol

import grpc

from serving.errors import ServingError
from serving.metrics.registry import ModelMetrics
from serving.rpc.recorder import Recorder
from serving.rpc.status import status_of
from serving.transport.headers import Metadata, Status
from serving.transport.methods import Peer

#: A function that decides about a call before its message is read, from its timeout in seconds, the number of calls
#: that will begin before it, and a key of its client. It returns the error and the metrics that count it, or None to
#: accept the call.
Refusal = Callable[[float | None, int, Hashable], tuple[ServingError, ModelMetrics] | None]

_MAX_STATUSES = 1024  # the most remembered refusals


class Notes(Protocol):
    """The count and the log of refused requests; see Edge."""

    def to_status(self, error: Exception, requests: int = 1, /) -> tuple[grpc.StatusCode, str]:
        """Return the code and the text for clients, and count the requests."""

    def note_refusals(
        self, method: str, requests: list[tuple[Metadata, Peer]], seconds: float, code: grpc.StatusCode, text: str, /
    ) -> None:
        """Log requests, given by their metadata and clients, that got the same error."""


class MethodDoor:
    """The door of one method. It must be cheap: under overload it refuses most calls.

    Calls that are refused in one turn of the event loop with the same error are counted together.
    """

    def __init__(self, notes: Notes, record: Recorder, refusal: Refusal) -> None:
        self._notes = notes
        self._record = record
        self._refusal = refusal
        # The refusals of this turn that are not counted yet, by error.
        self._uncounted: dict[ServingError, tuple[ModelMetrics, list[tuple[Metadata, Peer]]]] = {}
        # The status of each error: many calls get the same one.
        self._statuses: dict[ServingError, Status] = {}

    def __call__(self, timeout: float | None, metadata: Metadata, expected: int, peer: Peer) -> Status | None:
        """Return the status of a refusal, or None. expected: how many calls are to be begun before this one."""
        if (refusal := self._refusal(timeout, expected, peer.connection)) is None:
            return None
        if not self._uncounted:
            asyncio.get_running_loop().call_soon(self._count)
        error, metrics = refusal
        _, calls = self._uncounted.setdefault(error, (metrics, []))
        calls.append((metadata, peer))
        return self._status(error)

    def _status(self, error: ServingError) -> Status:
        if (status := self._statuses.get(error)) is None:
            if len(self._statuses) >= _MAX_STATUSES:
                self._statuses.clear()
            status = self._statuses[error] = status_of(error)
        return status

    def _count(self) -> None:
        uncounted, self._uncounted = self._uncounted, {}
        for error, (metrics, calls) in uncounted.items():
            code, text = self._notes.to_status(error, len(calls))
            self._record.refuse(code, len(calls))
            metrics.failed(error, 0.0, len(calls))
            self._notes.note_refusals(self._record.name, calls, 0.0, code, text)
