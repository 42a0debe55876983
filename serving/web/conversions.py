"""The conversions of large messages: in one thread, in turns of the clients by the time that theirs take."""

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serving.batching.turns import Turns

Outcome = TypeVar("Outcome")
#: Calls a function if a client goes, from now on; None for no function.
Watch = Callable[[Callable[[], object] | None], None]


class _Job:
    """A conversion that waits for its turn. begun: done when the thread is free for it."""

    __slots__ = ("begun", "seconds", "turn")

    def __init__(self, begun: "asyncio.Future[None]") -> None:
        self.begun = begun
        self.turn = 0.0
        #: Those of a processor that it took.
        self.seconds = 0.0


class Conversions:
    """A thread for conversions: one, since a conversion may take much memory. Only the event loop may use it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "web")
        self._waiting: Turns[_Job] = Turns()
        self._busy = False

    async def run(self, client: Hashable, convert: Callable[[], Outcome], watch: Watch = lambda lost: None) -> Outcome:
        """Return the result of a conversion, in the client's turn.

        watch: see Watch. Raises the conversion's errors, and CancelledError if the client goes before its turn.
        """
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future())
        self._waiting.push(client, job)
        self._go_on()
        watch(job.begun.cancel)
        try:
            await job.begun
        except asyncio.CancelledError:
            if not self._waiting.remove(client, job) and not job.begun.cancelled():
                self._ended()
            raise
        finally:
            watch(None)
        converted = loop.run_in_executor(self._thread, _timed, job, convert)
        converted.add_done_callback(lambda _: self._charge(client, job))  # the thread goes on if this task is cancelled
        try:
            return await converted
        finally:
            # An error knows this frame by its traceback, and the future knows the error: the cycle would keep the body.
            del converted, convert

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        while not self._busy and (job := self._waiting.first()):
            job.turn = self._waiting.give(0, done=True)
            if not job.begun.done():
                self._busy = True
                job.begun.set_result(None)

    def _charge(self, client: Hashable, job: _Job) -> None:
        """Let a client pay for its turn, and go on. The bytes of a message do not tell the time that it takes."""
        self._waiting.charge(client, job.turn, job.seconds)
        self._ended()

    def _ended(self) -> None:
        self._busy = False
        self._go_on()


def _timed(job: _Job, convert: Callable[[], Outcome]) -> Outcome:
    """Return a conversion's result, and note its time."""
    begin = time.thread_time()
    try:
        return convert()
    finally:
        job.seconds = time.thread_time() - begin
