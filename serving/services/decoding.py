"""The threads that decode images: few, in turns for each request, within a budget of memory and a limit of time."""

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from traceback import clear_frames
from typing import NamedTuple

from serving.errors import DecodingTooSlow, InvalidRequest, QueueFull
from serving.files.image_headers import MEMORY, TIMEOUT
from serving.runtime import Arrays
from serving.services.encoded_images import RefusedImage

# Time after which a request's next images wait for the turns of the other requests: some twenty small images.
_TURN_SECONDS = 0.004
_RETRY_SECONDS = 0.5  # after which there may be room for a refused request

#: Yields after each image, and returns the arrays.
Steps = Generator[None, None, Arrays]


class Decoding(NamedTuple):
    """The decoding of a request.

    bytes: the most memory that it takes. field: the request's field, for errors. images: their number.
    """

    steps: Steps
    bytes: int
    field: str
    images: int = 1


def in_one_step(decode: Callable[[], Arrays]) -> Steps:
    """Return the steps of a decoding that cannot pause."""
    return decode()
    yield  # makes this function a generator


class _Job:
    """A decoding that waits for memory or for its next turn, or has a thread."""

    __slots__ = ("bytes", "given_up", "outcome", "steps")

    def __init__(self, decoding: Decoding, outcome: "asyncio.Future[Arrays]") -> None:
        self.steps = decoding.steps
        self.bytes = decoding.bytes
        #: None once nobody waits for it: an error in it refers to the job by its traceback.
        self.outcome: asyncio.Future[Arrays] | None = outcome
        #: True if nobody waits for the outcome.
        self.given_up = False


class Decoder:
    """A pool of threads for decodings. Only the event loop's thread may use it.

    A decoding begins when its memory is reserved, in the order of arrival. Then the decodings get the threads in turn,
    so a request of many images does not hold up those of few.

    max_bytes: the most memory of all decodings. timeout: seconds after which a decoding is given up. max_images: the
    most images of all decodings that are not patient, except one that is alone. refused: called with the cause of each
    refusal, one of ``IMAGE_CAUSES``.
    """

    def __init__(
        self, threads: int, max_bytes: int, timeout: float, max_images: int, refused: Callable[[str], object]
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, "decode")
        self._free = threads
        self._closed = False
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_images = max_images
        self._images = 0  # of the decodings that have not ended and are not patient
        self._refused = refused
        # The first one is the next.
        self._waiting: dict[_Job, None] = {}  # for memory
        self._begun: dict[_Job, None] = {}  # for their next turns
        #: The memory that decodings have reserved, in bytes.
        self.reserved = 0
        #: The number of decodings that have not ended.
        self.under_way = 0

    async def decode(self, decoding: Decoding, patient: bool = False) -> Arrays:
        """Return the arrays of a decoding. If the caller is cancelled, a thread stops after its image.

        patient: True for a stream, which decodes one request at a time and waits instead of being refused. Raises
        QueueFull, InvalidRequest if the decoding needs more memory than there is, DecodingTooSlow, and the errors of
        its steps.
        """
        if not patient and self._images and self._images + decoding.images > self._max_images:
            raise QueueFull(
                f"{self._images} images wait to be decoded, {decoding.images} more would pass the limit of "
                f"{self._max_images} (max_queue); try again later",
                _RETRY_SECONDS,
            )
        if decoding.bytes > self._max_bytes:
            self._refused(MEMORY)
            raise InvalidRequest(
                decoding.field,
                f"decoding takes {decoding.bytes} bytes of memory; the limit is {self._max_bytes} bytes "
                "(max_image_memory)",
            )
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Arrays] = loop.create_future()
        job = _Job(decoding, outcome)
        text = f"{decoding.field}: not decoded within {self._timeout:g} seconds (image_timeout)"
        timer = loop.call_later(self._timeout, _expire, job, text)
        self.under_way += 1
        counted = 0 if patient else decoding.images
        self._images += counted
        self._waiting[job] = None
        self._go_on()
        try:
            return await outcome
        except RefusedImage as refusal:
            self._refused(refusal.cause)
            raise
        except DecodingTooSlow:
            self._refused(TIMEOUT)
            raise
        finally:
            timer.cancel()
            job.outcome = None
            self.under_way -= 1
            self._images -= counted
            self._give_up(job)
            # An error knows this frame by its traceback, and these know the error: the cycle would keep the request.
            del outcome, timer, job, decoding
            self._go_on()

    def close(self) -> None:
        """End the threads. A decoding that still waits ends with its timeout or its caller."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        """Reserve memory for the next decodings, and give the free threads to the next turns."""
        while self._waiting and self.reserved + (job := next(iter(self._waiting))).bytes <= self._max_bytes:
            del self._waiting[job]
            self.reserved += job.bytes
            self._begun[job] = None
        while self._free and self._begun and not self._closed:
            job = next(iter(self._begun))
            del self._begun[job]
            self._take_turn(job)

    def _take_turn(self, job: _Job) -> None:
        self._free -= 1

        def ended(turn: "asyncio.Future[Arrays | None]") -> None:
            self._free += 1
            if error := asyncio.CancelledError() if turn.cancelled() else turn.exception():
                self._leave(job)
                clear_frames(error.__traceback__)  # they hold the request, and the job, which will hold the error
                _fail(job, error)
            elif (arrays := turn.result()) is None and not job.given_up:
                self._begun[job] = None
            else:
                self._leave(job)
                if arrays is not None and job.outcome and not job.outcome.done():
                    job.outcome.set_result(arrays)
            self._go_on()

        asyncio.get_running_loop().run_in_executor(self._executor, _turn, job).add_done_callback(ended)

    def _give_up(self, job: _Job) -> None:
        """Forget a decoding that has ended for its caller. If a thread has it, that thread stops after its image."""
        job.given_up = True
        self._waiting.pop(job, None)
        if job in self._begun:
            del self._begun[job]
            self._leave(job)

    def _leave(self, job: _Job) -> None:
        self.reserved -= job.bytes
        job.steps.close()


def _fail(job: _Job, error: BaseException | None) -> None:
    if error and job.outcome and not job.outcome.done():
        job.outcome.set_exception(error)


def _expire(job: _Job, text: str) -> None:
    _fail(job, DecodingTooSlow(text))


def _turn(job: _Job) -> Arrays | None:
    """Decode images for the time of a turn. Return the arrays, or None if images are left."""
    end = time.perf_counter() + _TURN_SECONDS
    try:
        while True:
            next(job.steps)
            if job.given_up or time.perf_counter() >= end:
                return None
    except StopIteration as stop:
        arrays: Arrays = stop.value
        return arrays
