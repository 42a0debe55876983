"""The threads that inflate large messages: few, fair to each connection, and never those that decode images."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serving.transport.messages import Inflation

_THREADS = 2  # an inflation takes about 15 ms at most, and each thread's result may take the largest message's bytes
#: A function that is called with the result of ``Inflation.rest``.
Done = Callable[["asyncio.Future[bytes | None]"], object]


class Job:
    """An inflation that waits for a thread, or has one.

    ready: called before it gets its thread; it may give up the job. done: called with the result in the event loop,
    unless the job was given up.
    """

    __slots__ = ("done", "given_up", "inflation", "ready")

    def __init__(self, inflation: Inflation, ready: Callable[[], object], done: Done) -> None:
        self.inflation = inflation
        self.ready = ready
        self.done = done
        #: True if nobody waits for the result.
        self.given_up = False


class Unpacker:
    """A pool of threads for inflations. The connections get threads in turn, each connection's messages in their order.

    Only the event loop's thread may use it.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._executor = ThreadPoolExecutor(threads, "unpack")
        self._free = threads
        self._waiting: dict[object, deque[Job]] = {}  # by connection; the next one first

    def unpack(self, connection: object, job: Job) -> None:
        """Inflate the rest of a message in a thread, as soon as one is free."""
        self._waiting.setdefault(connection, deque()).append(job)
        self._go_on()

    def give_up(self, connection: object, job: Job) -> None:
        """Release a job's message if no thread has it; otherwise the thread stops soon."""
        job.given_up = job.inflation.given_up = True
        if (jobs := self._waiting.get(connection)) and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[connection]

    def close(self) -> None:
        """Give up all jobs, and end the threads."""
        for jobs in self._waiting.values():
            for job in jobs:
                job.given_up = True
        self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        while self._free and self._waiting:
            connection, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            del self._waiting[connection]
            if jobs:
                self._waiting[connection] = jobs  # behind the others
            job.ready()
            if not job.given_up:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        self._free -= 1

        def ended(rest: "asyncio.Future[bytes | None]") -> None:
            self._free += 1
            if not job.given_up:
                job.done(rest)
            self._go_on()

        asyncio.get_running_loop().run_in_executor(self._executor, job.inflation.rest).add_done_callback(ended)
