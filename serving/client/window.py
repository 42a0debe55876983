"""The images of one stream between being read and being yielded, whatever carries the messages.

No input, output or waiting happens here: the two clients do these, with threads or tasks.
"""

import random
import time
from collections import deque
from dataclasses import dataclass

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.channel import BACKOFF_FACTOR, FIRST_BACKOFF, MAX_BACKOFF
from serving.client.errors import CapsNetError, Failure, ServerFault, failure_of_item
from serving.client.inputs import ItemError, Limits, located
from serving.client.results import Classification, decode

#: Images joined to one request, at most: two batches of the server.
JOINED = 64
# Requests under way that leave a server no time to wait.
_BUSY = 2
#: Bytes of images that wait for their answers, at most.
MAX_BYTES = 64 * 2**20
#: After the last answer, at most, until a call's status is given up.
LAST_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class _Slot:
    """The place of one image in the order of the results."""

    index: int
    image: pb.Image | None
    size: int
    alone: bool = False
    attempts: int = 1
    outcome: Classification | CapsNetError | None = None


class Window:
    """Up to ``size`` images that were read and not yielded yet.

    Images go out in requests of as many as wait, up to JOINED. A request that fails for what may be one of its images
    goes out again as one request for each image, so that only that one gets the error.
    """

    def __init__(self, request: pb.ClassifyRequest, limits: Limits, size: int, retries: int) -> None:
        self._request = request
        self._limits = limits
        self._size = size
        # Small enough that the window holds several requests.
        self._joined = max(1, min(JOINED, size // 4))
        self._retries = retries
        self._slots: deque[_Slot] = deque()
        self._unsent: deque[_Slot] = deque()
        self._in_flight: dict[str, list[_Slot]] = {}
        self._bytes = 0
        self._read = 0
        self._sent = 0
        self._breaks = 0
        #: The input has come to its end.
        self.all_read = False
        #: When the server last gave a sign, or was first asked, on ``time.monotonic``.
        self.heard_at = 0.0
        #: No request goes out before this time, on ``time.monotonic``.
        self.paused_until = 0.0

    @property
    def has_room(self) -> bool:
        return len(self._slots) < self._size and self._bytes < MAX_BYTES

    @property
    def all_answered(self) -> bool:
        """Nothing more will go out."""
        return self.all_read and not self._unsent and not self._in_flight

    @property
    def all_yielded(self) -> bool:
        return self.all_read and not self._slots

    @property
    def asks(self) -> bool:
        """A request is to go out: an image waits, and not for others to go with it while the server is busy anyway."""
        if not self._unsent:
            return False
        few = len(self._in_flight) < _BUSY
        return few or self.all_read or self._unsent[0].alone or len(self._unsent) >= self._joined

    @property
    def waits(self) -> bool:
        """Something was sent and is not answered yet."""
        return bool(self._in_flight)

    def add(self, image: pb.Image) -> None:
        """The next image of the input."""
        try:
            size = self._limits.check(image)
        except ItemError as error:
            self.add_error(error)
            return
        slot = _Slot(self._read, image, size)
        self._slots.append(slot)
        self._unsent.append(slot)
        self._bytes += size
        self._read += 1

    def add_error(self, error: ItemError) -> None:
        """The next image of the input cannot be sent."""
        self._slots.append(_Slot(self._read, None, 0, outcome=located(error, self._read)))
        self._read += 1

    def next_request(self) -> pb.ClassifyStreamRequest | None:
        """What to send now, or None while nothing waits."""
        if not self._unsent:
            return None
        slots = [self._unsent.popleft()]
        size = slots[0].size
        while self._unsent and len(slots) < JOINED and not (slots[0].alone or self._unsent[0].alone):
            size += self._unsent[0].size
            if not self._limits.hold(len(slots) + 1, size):
                break
            slots.append(self._unsent.popleft())
        self._sent += 1
        name = str(self._sent)
        if not self._in_flight:
            self.heard_at = time.monotonic()
        self._in_flight[name] = slots
        message = pb.ClassifyStreamRequest(id=name, request=self._request)
        message.request.images.extend([slot.image for slot in slots if slot.image is not None])
        return message

    def answer(self, message: pb.ClassifyStreamResponse) -> None:
        """Take an answer of the server. Raises ServerFault where it answers nothing that was asked."""
        slots = self._in_flight.pop(message.id, None)
        if slots is None:
            raise ServerFault(f"id: an answer to {message.id[:64]!r}, which no request under way has")
        self.heard_at = time.monotonic()
        self._breaks = 0
        if message.WhichOneof("result") != "error":
            for slot, result in zip(slots, decode(message.response, len(slots)), strict=True):
                self._resolve(slot, result)
            return
        failure = failure_of_item(message.error.code, message.error.message)
        if len(slots) > 1 and failure.may_be_one_image:
            for slot in slots:
                slot.alone = True
            self._unsent.extendleft(reversed(slots))
        elif failure.passing and slots[0].attempts <= self._retries:
            self._pause(slots[0].attempts, failure)
            self._again(slots)
        else:
            for slot in slots:
                self._resolve(slot, failure.to_error([slot.index]))

    def broke(self, failure: Failure) -> CapsNetError | None:
        """The stream ended: what was not answered goes out again on the next one. The error once that is in vain."""
        under_way = [slot for slots in self._in_flight.values() for slot in slots]
        self._in_flight.clear()
        self._breaks += 1
        tried = max([self._breaks, *(slot.attempts for slot in under_way)])
        if not failure.passing or tried > self._retries:
            return failure.to_error()
        self._pause(self._breaks, failure)
        self._again(under_way)
        return None

    def pop(self) -> Classification | CapsNetError | None:
        """The result of the next image in order, or None while it has none."""
        if not self._slots or self._slots[0].outcome is None:
            return None
        return self._slots.popleft().outcome

    def _resolve(self, slot: _Slot, outcome: Classification | CapsNetError) -> None:
        slot.outcome = outcome
        slot.image = None
        self._bytes -= slot.size

    def _again(self, slots: list[_Slot]) -> None:
        for slot in slots:
            slot.attempts += 1
        self._unsent = deque(sorted([*slots, *self._unsent], key=lambda slot: slot.index))

    def _pause(self, attempt: int, failure: Failure) -> None:
        seconds = failure.retry_after if failure.retry_after is not None else backoff(attempt)
        self.paused_until = time.monotonic() + seconds


def backoff(attempt: int) -> float:
    """Seconds to wait after the failure of this attempt, the first being 1: gRPC's own rule, with its jitter."""
    return min(MAX_BACKOFF, FIRST_BACKOFF * BACKOFF_FACTOR ** (attempt - 1)) * random.uniform(0.8, 1.2)
