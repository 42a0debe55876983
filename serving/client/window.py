"""The images of one stream, from when they are read until their results are yielded.

This module does no input, output or waiting: the two clients do these, with threads or tasks.
"""

import random
import time
from collections import deque
from dataclasses import dataclass

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.channel import BACKOFF_FACTOR, FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS
from serving.client.errors import CapsNetError, Failure, ItemError, ServerFault, failure_of_item
from serving.client.inputs import RequestLimits, located
from serving.client.results import Classification, decode

#: Most images that are joined to one request: two batches of the server.
MAX_JOINED_IMAGES = 64
# With this many requests in flight the server is busy, so more images may gather before the next request.
_BUSY_REQUESTS = 2
#: Most bytes of images that wait for their answers.
MAX_WAITING_BYTES = 64 * 2**20
#: Longest wait for a call's status after its last answer.
MAX_STATUS_WAIT_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class _Entry:
    """One image in the order of the results, with its result once it has come."""

    index: int
    image: pb.Image | None
    size: int
    alone: bool = False
    attempts: int = 1
    outcome: Classification | CapsNetError | None = None


class Window:
    """Up to ``size`` images that were read and whose results were not yielded yet.

    A request joins the images that wait, up to MAX_JOINED_IMAGES. A picture that the server prepares goes alone: 64 of
    them together may take longer than a server gives to one request. If a request fails and one of its images may be
    the cause, each image goes out again in its own request, so that only that image gets the error.
    """

    def __init__(self, request: pb.ClassifyRequest, limits: RequestLimits, size: int, retries: int) -> None:
        self._request = request
        self._limits = limits
        self._size = size
        # Small enough that the window holds several requests.
        self._joined = max(1, min(MAX_JOINED_IMAGES, size // 4))
        self._retries = retries
        self._entries: deque[_Entry] = deque()
        self._unsent: deque[_Entry] = deque()
        self._in_flight: dict[str, list[_Entry]] = {}
        self._bytes = 0
        self._read = 0
        self._sent = 0
        self._breaks = 0
        #: True once the whole input was read.
        self.all_read = False
        #: The ``time.monotonic`` of the last answer, or of the first request after an idle time.
        self.heard_at = 0.0
        #: The ``time.monotonic`` before which no request goes out.
        self.paused_until = 0.0

    @property
    def has_room(self) -> bool:
        return len(self._entries) < self._size and self._bytes < MAX_WAITING_BYTES

    @property
    def all_answered(self) -> bool:
        """Return True once the input was read and every image has its result."""
        return self.all_read and not self._unsent and not self._in_flight

    @property
    def all_yielded(self) -> bool:
        return self.all_read and not self._entries

    @property
    def asks(self) -> bool:
        """Return True if a request should go out now.

        While the server is busy, images wait until they fill a request.
        """
        if not self._unsent:
            return False
        few = len(self._in_flight) < _BUSY_REQUESTS
        return few or self.all_read or self._unsent[0].alone or len(self._unsent) >= self._joined

    @property
    def waits(self) -> bool:
        """Return True while a request is in flight."""
        return bool(self._in_flight)

    def add(self, image: pb.Image) -> None:
        """Add the next image of the input."""
        try:
            size = self._limits.check(image)
        except ItemError as error:
            self.add_error(error)
            return
        entry = _Entry(self._read, image, size, alone=image.preprocess == pb.PREPROCESS_AUTO)
        self._entries.append(entry)
        self._unsent.append(entry)
        self._bytes += size
        self._read += 1

    def add_error(self, error: ItemError) -> None:
        """Add the error of the next image of the input, which cannot be sent."""
        self._entries.append(_Entry(self._read, None, 0, outcome=located(error, self._read)))
        self._read += 1

    def next_request(self) -> pb.ClassifyStreamRequest | None:
        """Return the request to send now, or None if no image waits."""
        if not self._unsent:
            return None
        entries = [self._unsent.popleft()]
        size = entries[0].size
        while self._unsent and len(entries) < MAX_JOINED_IMAGES and not (entries[0].alone or self._unsent[0].alone):
            size += self._unsent[0].size
            if not self._limits.hold(len(entries) + 1, size):
                break
            entries.append(self._unsent.popleft())
        self._sent += 1
        name = str(self._sent)
        if not self._in_flight:
            self.heard_at = time.monotonic()
        self._in_flight[name] = entries
        message = pb.ClassifyStreamRequest(id=name, request=self._request)
        message.request.images.extend([entry.image for entry in entries if entry.image is not None])
        return message

    def answer(self, message: pb.ClassifyStreamResponse) -> None:
        """Take an answer of the server. Raises ServerFault if its id belongs to no request in flight."""
        entries = self._in_flight.pop(message.id, None)
        if entries is None:
            raise ServerFault(f"id: an answer to {message.id[:64]!r}, which no request under way has")
        self.heard_at = time.monotonic()
        self._breaks = 0
        if message.WhichOneof("result") != "error":
            for entry, result in zip(entries, decode(message.response, len(entries)), strict=True):
                self._resolve(entry, result)
            return
        failure = failure_of_item(message.error.code, message.error.message)
        if len(entries) > 1 and failure.may_be_one_image:
            for entry in entries:
                entry.alone = True
            self._unsent.extendleft(reversed(entries))
        elif failure.passing and entries[0].attempts <= self._retries:
            self._pause(entries[0].attempts, failure)
            self._again(entries)
        else:
            for entry in entries:
                self._resolve(entry, failure.to_error([entry.index]))

    def broke(self, failure: Failure) -> CapsNetError | None:
        """Note that the stream ended: images without an answer go out again on the next stream.

        Return the error to raise if a further attempt is pointless, else None.
        """
        in_flight = [entry for entries in self._in_flight.values() for entry in entries]
        self._in_flight.clear()
        self._breaks += 1
        tried = max([self._breaks, *(entry.attempts for entry in in_flight)])
        if not failure.passing or tried > self._retries:
            return failure.to_error()
        self._pause(self._breaks, failure)
        self._again(in_flight)
        return None

    def pop(self) -> Classification | CapsNetError | None:
        """Remove and return the result of the next image in order, or return None while it has none."""
        if not self._entries or self._entries[0].outcome is None:
            return None
        return self._entries.popleft().outcome

    def _resolve(self, entry: _Entry, outcome: Classification | CapsNetError) -> None:
        entry.outcome = outcome
        entry.image = None
        self._bytes -= entry.size

    def _again(self, entries: list[_Entry]) -> None:
        for entry in entries:
            entry.attempts += 1
        self._unsent = deque(sorted([*entries, *self._unsent], key=lambda entry: entry.index))

    def _pause(self, attempt: int, failure: Failure) -> None:
        seconds = failure.retry_after if failure.retry_after is not None else backoff(attempt)
        self.paused_until = time.monotonic() + seconds


def backoff(attempt: int) -> float:
    """Return the seconds to wait after this attempt failed; the first attempt is 1. The rule and jitter are gRPC's."""
    return min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * BACKOFF_FACTOR ** (attempt - 1)) * random.uniform(0.8, 1.2)
