"""The threads that decode images: few, in turns for each client, within a budget of memory and a limit of time."""

import asyncio
import time
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from traceback import clear_frames
from typing import NamedTuple, TypeVar

from serving.batching.turns import Shares, Turns
from serving.errors import DecodingTooSlow, InvalidRequest, QueueFull
from serving.files.image_headers import MEMORY, TIMEOUT
from serving.runtime import Arrays
from serving.services.encoded_images import RefusedImage

# Time after which a request's next images wait for the turns of the other requests: some twenty small images.
_TURN_SECONDS = 0.004
_RETRY_SECONDS = 0.5  # after which there may be room for a refused request
_DISPLACED = "too many images wait to be decoded, and this client has more than its share of them; try again later"

# The most images whose headers are read at once, by the event loop. A header of small parts takes up to 0.1
# milliseconds, and one of large parts up to two for each megabyte.
_FEW_IMAGES = 16

Found = TypeVar("Found")
#: Yields after each image, and returns the arrays.
Steps = Generator[None, None, Arrays]
#: The same for the most memory of a decoding, in bytes.
Measure = Generator[None, None, int]


class Decoding(NamedTuple):
    """The decoding of a request.

    bytes: the most memory that it takes. field: the request's field, for errors. images: their number. measure: the
    steps to ``bytes`` for a thread, which come first, or None.
    """

    steps: Steps
    bytes: int
    field: str
    images: int = 1
    measure: Measure | None = None


def measured(steps: Steps, measure: Measure, field: str, images: int) -> Decoding:
    """Return a decoding whose memory takes time to find. That of few images is found at once."""
    if images <= _FEW_IMAGES:
        return Decoding(steps, in_one_go(measure), field, images)
    return Decoding(steps, 0, field, images, measure)


def in_one_step(decode: Callable[[], Arrays]) -> Steps:
    """Return the steps of a decoding that cannot pause."""
    return decode()
    yield  # makes this function a generator


def in_one_go(steps: Generator[None, None, Found]) -> Found:
    """Return what steps return, without a pause. Raises the errors of the steps."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        found: Found = stop.value
        return found


#: The end of a decoding: its arrays, or its error.
Outcome = Arrays | Exception


class Job:
    """A decoding that waits for memory or for its next turn, or has a thread.

    then: called once with the outcome, unless the job is given up. counted: its images while they count towards the
    limit of all that wait.
    """

    __slots__ = (
        "bytes",
        "client",
        "counted",
        "field",
        "given_up",
        "later",
        "seconds",
        "started",
        "steps",
        "then",
        "timer",
    )

    def __init__(self, decoding: Decoding, then: Callable[[Outcome], object], client: Hashable, counted: int) -> None:
        #: The steps of its decoding, or before these the steps to its memory.
        self.steps: Steps | Measure = decoding.measure or decoding.steps
        self.later = decoding.steps
        self.bytes = decoding.bytes
        self.field = decoding.field
        #: None once nobody waits for the outcome.
        self.then: Callable[[Outcome], object] | None = then
        self.client = client
        self.counted = counted
        self.timer: asyncio.TimerHandle | None = None
        #: True from its first turn on. Steps to the memory do not count.
        self.started = False
        #: The seconds of its last turn.
        self.seconds = 0.0
        #: True if a thread that has it must stop after its image.
        self.given_up = False


class Decoder:
    """A pool of threads for decodings. Only the event loop's thread may use it.

    A decoding begins when its memory is reserved. Clients take turns by bytes. Then they take turns by the time that
    they have threads, and so do the decodings of one client, so a request of many images does not hold up those of few.

    max_bytes: the most memory of all decodings. A client with half of it begins another decoding only if a thread would
    be idle otherwise. timeout: seconds after which a decoding is given up. max_images: the most images of all decodings
    that are not patient, except one that is alone. refused: called with the cause of each refusal, one of
    ``IMAGE_CAUSES``. reserves: called with the reserved memory in sixteenths of ``max_bytes``, rounded up, before it is
    used, if it has changed.
    """

    def __init__(
        self,
        threads: int,
        max_bytes: int,
        timeout: float,
        max_images: int,
        refused: Callable[[str], object],
        reserves: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, "decode")
        self._threads = self._free = threads
        self._closed = False
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_images = max_images
        self._images = Shares()  # of the decodings that have not ended and are not patient
        self._refused = refused
        self._reserves = reserves
        self._step = -(-max_bytes // 16)
        self._told = 0  # the reserved memory that it was called with last
        self._telling = False  # True until it has been called
        self._waiting: Turns[Job] = Turns()  # for memory
        self._begun: Turns[Job] = Turns()  # for threads
        self._reserved = Shares()
        self._holders = 0  # decodings that have reserved their memory
        #: The number of decodings that have not ended.
        self.under_way = 0

    @property
    def reserved(self) -> int:
        """Return the memory that decodings have reserved, in bytes."""
        return self._reserved.total

    def begin(
        self, decoding: Decoding, then: Callable[[Outcome], object], patient: bool = False, client: Hashable = ""
    ) -> Job:
        """Begin a decoding, now or when there is room. Return it for ``give_up``.

        then: called once with the arrays, a DecodingTooSlow, a QueueFull if the decoding has lost its place, or an
            error of its steps. It must not raise anything.
        patient: True for a stream, which decodes one request at a time and waits instead of being refused.
        client: if too many images wait, a client that has less than its share takes the places of the newest decodings
            of the client that has most, unless a thread has begun with them.

        Raises QueueFull, and InvalidRequest if the decoding needs more memory than there is. That is an outcome too if
        the memory is found later.
        """
        if error := self._too_large(decoding.bytes, decoding.field):
            raise error
        if not patient:
            self._make_room(client, decoding.images)
        job = Job(decoding, then, client, 0 if patient else decoding.images)
        text = f"{decoding.field}: not decoded within {self._timeout:g} seconds (image_timeout)"
        job.timer = asyncio.get_running_loop().call_later(self._timeout, self._expire, job, text)
        self.under_way += 1
        self._images.add(client, job.counted)
        self._waiting.push(client, job)
        self._go_on()
        return job

    def give_up(self, job: Job) -> None:
        """Forget a decoding. If a thread has it, that thread stops after its image."""
        if job.then:
            self._forget(job)
            self._stop(job)

    async def decode(self, decoding: Decoding, patient: bool = False, client: Hashable = "") -> Arrays:
        """Return the arrays of a decoding. If the caller is cancelled, it is given up.

        As ``begin`` otherwise. Raises the errors of ``begin`` and those that it reports.
        """
        outcome: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()
        job = self.begin(decoding, partial(_settle, outcome), patient, client)
        try:
            return await outcome
        finally:
            self.give_up(job)
            # An error knows this frame by its traceback, and the future knows the error: the cycle would keep the
            # request.
            del outcome, job, decoding

    def close(self) -> None:
        """End the threads. A decoding that still waits ends with its timeout or its caller."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _too_large(self, size: int, field: str) -> InvalidRequest | None:
        """Return the error of a decoding that takes more memory than there is, or None."""
        if size <= self._max_bytes:
            return None
        self._refused(MEMORY)
        text = f"decoding takes {size} bytes of memory; the limit is {self._max_bytes} bytes (max_image_memory)"
        return InvalidRequest(field, text)

    def _make_room(self, client: Hashable, images: int) -> None:
        """Make room for a client's images, or raise QueueFull."""
        waiting = self._images.total
        if not waiting or waiting + images <= self._max_images:
            return
        displaced: list[Job] = []
        if self._images.allow(client, images, self._max_images):
            queues = (self._waiting, self._begun)
            excess = waiting + images - self._max_images
            displaced = self._images.displaced(excess, queues, lambda job: 0 if job.started else job.counted)
        if not displaced:
            raise QueueFull(
                f"{waiting} images wait to be decoded, {images} more would pass the limit of {self._max_images} "
                "(max_queue); try again later",
                _RETRY_SECONDS,
            )
        for job in displaced:
            self._end_early(job, QueueFull(_DISPLACED, _RETRY_SECONDS))

    def _go_on(self) -> None:
        """Reserve memory for the next decodings, and give the free threads to the next turns."""
        while (job := self._waiting.first()) and self._has_memory(job):
            self._waiting.give(job.bytes, done=True)
            self._reserved.add(job.client, job.bytes)
            self._holders += 1
            self._begun.push(job.client, job)
        if self._told == self._to_tell():
            self._give_threads()
        elif not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        """Tell the reserved memory, and then let it be used. Decodings may be given up meanwhile."""
        self._told = self._to_tell()
        self._reserves(self._told)
        self._telling = False
        self._go_on()

    def _to_tell(self) -> int:
        """Return the reserved memory in whole steps, so that small images are not told one by one."""
        return -(-self.reserved // self._step) * self._step

    def _give_threads(self) -> None:
        while self._free and not self._closed and (job := self._begun.first()):
            self._take_turn(job, self._begun.give(0, done=True))

    def _has_memory(self, job: Job) -> bool:
        if self._reserved.total + job.bytes > self._max_bytes:
            return False
        return self._holders < self._threads or self._reserved[job.client] + job.bytes <= self._max_bytes // 2

    def _take_turn(self, job: Job, turn: float) -> None:
        self._free -= 1
        job.started = True

        def ended(result: "asyncio.Future[Arrays | int | None]") -> None:
            self._free += 1
            self._begun.charge(job.client, turn, job.seconds)
            if error := asyncio.CancelledError() if result.cancelled() else result.exception():
                self._leave(job)
                clear_frames(error.__traceback__)  # they hold the request, and the job, which will hold the error
                self._end(job, error if isinstance(error, Exception) else RuntimeError(repr(error)))
            elif (found := result.result()) is None and not job.given_up:
                self._begun.push(job.client, job)
            else:
                self._leave(job)
                if isinstance(found, int):
                    self._wait_for_memory(job, found)
                elif found is not None:
                    self._end(job, found)
            self._go_on()

        asyncio.get_running_loop().run_in_executor(self._executor, _run_turn, job).add_done_callback(ended)

    def _wait_for_memory(self, job: Job, size: int) -> None:
        """Let a decoding wait for its memory, which is known now, or end it if that is too much."""
        if job.given_up:
            return
        job.steps, job.bytes, job.started = job.later, size, False
        if error := self._too_large(size, job.field):
            self._end(job, error)
        else:
            self._waiting.push(job.client, job)

    def _expire(self, job: Job, text: str) -> None:
        self._end_early(job, DecodingTooSlow(text))

    def _end_early(self, job: Job, error: Exception) -> None:
        """End a decoding that has not been done."""
        self._stop(job)
        self._end(job, error)

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Tell the outcome of a decoding, unless nobody waits for it."""
        if isinstance(outcome, RefusedImage | DecodingTooSlow) and job.then:
            self._refused(outcome.cause if isinstance(outcome, RefusedImage) else TIMEOUT)
        if then := job.then:
            self._forget(job)
            then(outcome)

    def _forget(self, job: Job) -> None:
        """Note that nobody waits for the outcome of a decoding."""
        job.then = None
        assert job.timer
        job.timer.cancel()
        self.under_way -= 1
        self._images.add(job.client, -job.counted)
        job.counted = 0

    def _stop(self, job: Job) -> None:
        """Take a decoding from the queues. If a thread has it, that thread stops after its image."""
        job.given_up = True
        self._waiting.remove(job.client, job)
        if self._begun.remove(job.client, job):
            self._leave(job)
        self._go_on()

    def _leave(self, job: Job) -> None:
        self._reserved.add(job.client, -job.bytes)
        self._holders -= 1
        job.steps.close()


def _settle(future: "asyncio.Future[Arrays]", outcome: Outcome) -> None:
    """Set the outcome of a decoding, unless its waiter is gone."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _run_turn(job: Job) -> Arrays | int | None:
    """Run the steps of a job for the time of a turn. Return what they return, or None if images are left."""
    begin = time.perf_counter()
    try:
        while True:
            next(job.steps)
            if job.given_up or time.perf_counter() >= begin + _TURN_SECONDS:
                return None
    except StopIteration as stop:
        found: Arrays | int = stop.value
        return found
    finally:
        job.seconds = time.perf_counter() - begin
