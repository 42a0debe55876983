"""Tuning: the choice of threads, parallel batches and batch size, by measurement on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, sleep  # the real functions, even if tests give the tuning another clock
from typing import NamedTuple

import numpy as np

from serving.batching.cost import BatchCost
from serving.runtime import Arrays, Run, TensorSpec, example

# The cost of a batch besides its computation and its requests: the way to a thread and back, code between two batches
# that holds Python's lock, and caches that other code has filled. Measured as the difference between the server's times
# for a request in batches of 4 and of 16.
_OVERHEAD_SECONDS = 0.0005
# A smaller batch with at least this part of the best rate is chosen, since its requests wait less for each other.
_NEARLY_BEST_SHARE = 0.95
# A good batch reaches this part of the rate of endless batches. With larger ones, slots wait for answers to go out and
# for requests to come in.
_GOOD_SHARE = 0.85
_SAMPLE_SECONDS = 0.025
# A fifth of a core: the load of the event loop while a small network is served at full load.
_BURST_SECONDS = 0.0005
_PAUSE_SECONDS = 0.002


class Plan(NamedTuple):
    """The plan of a graph.

    threads: the threads of one call. runtimes: the number of parallel calls. max_batch: the most images in one call.
    """

    threads: int
    runtimes: int
    max_batch: int


class Timing(NamedTuple):
    """A measurement: the seconds of each of ``runtimes`` parallel calls with a batch of ``batch`` images."""

    threads: int
    runtimes: int
    batch: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.runtimes * self.batch / self.seconds

    @property
    def served_per_second(self) -> float:
        """Return the images a second, with the time that the server adds to each batch."""
        return self.runtimes * self.batch / (self.seconds + _OVERHEAD_SECONDS)


@dataclass(frozen=True)
class Tuned:
    """A plan, the timings from which it was chosen, and the time of every possible batch size."""

    plan: Plan
    compared: tuple[Timing, ...]
    timings: tuple[Timing, ...]


def candidates(cores: int, threads: int, runtimes: int) -> list[tuple[int, int]]:
    """Return pairs of threads and runtimes to compare: one call on all cores, one a core, and halves.

    threads, runtimes: 0 leaves the choice open.
    """
    if threads and runtimes:
        return [(threads, runtimes)]
    if threads:
        return sorted({(threads, 1), (threads, max(1, cores // threads))})
    if runtimes:
        return [(max(1, cores // runtimes), runtimes)]
    return sorted({(cores, 1), (1, cores), (max(1, cores // 2), min(2, cores))})


def good_batch(cost: BatchCost, max_batch: int) -> int:
    """Return the batch size above which an image hardly takes less time, at most ``max_batch``."""
    if not cost.per_image:
        return max_batch
    of_each_batch = cost.per_batch + _OVERHEAD_SECONDS
    return min(max_batch, math.ceil(_GOOD_SHARE / (1 - _GOOD_SHARE) * of_each_batch / cost.per_image))


def tune(
    open_runtime: Callable[[int], Run],
    inputs: Mapping[str, TensorSpec],
    pairs: Sequence[tuple[int, int]],
    max_batch: int,
    most: int,
) -> tuple[Run, Tuned]:
    """Choose a plan, and warm every possible batch size.

    open_runtime: makes a runtime with this number of threads for each call. inputs: those of its graph. pairs: threads
    and runtimes, from ``candidates``. max_batch: 0 to choose one, up to ``most``. Takes about two seconds for a small
    network.
    """
    compared: list[Timing] = []
    opened: dict[int, Run] = {}
    if len(pairs) > 1 or not max_batch:
        for threads in {threads: None for threads, _ in pairs}:
            opened[threads] = open_runtime(threads)
        sizes = _sizes(max_batch or most)
        # Two passes over all of them, so that a short slowdown of the machine misjudges none.
        first, second = (
            [
                timing
                for threads, runtimes in pairs
                for timing in _time(opened[threads], inputs, threads, runtimes, sizes, _mean_of, warm, busy=True)
            ]
            for warm in (False, True)
        )
        compared = [min(both, key=lambda timing: timing.seconds) for both in zip(first, second, strict=True)]
        best = max(timing.served_per_second for timing in compared)
        good = [timing for timing in compared if timing.served_per_second >= _NEARLY_BEST_SHARE * best]
        # Among those nearly as fast as the fastest, the one with the shortest batch.
        chosen = min(good, key=lambda timing: timing.seconds)
        plan = Plan(chosen.threads, chosen.runtimes, max_batch or chosen.batch)
    else:
        plan = Plan(*pairs[0], max_batch)
    run = opened[plan.threads] if opened else open_runtime(plan.threads)
    timings = _time(run, inputs, plan.threads, plan.runtimes, range(1, plan.max_batch + 1), _least_of)
    return run, Tuned(plan, tuple(compared), tuple(timings))


def _sizes(most: int) -> list[int]:
    """Return 1, 2, 4, ..., and ``most`` itself."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


def _time(
    run: Run,
    inputs: Mapping[str, TensorSpec],
    threads: int,
    runtimes: int,
    sizes: Iterable[int],
    sample: Callable[[Run, Arrays], float],
    warm: bool = False,
    busy: bool = False,
) -> list[Timing]:
    """Measure a call of each size in turn, by ``sample``.

    warm: True if all sizes were computed before. busy: measure beside a thread with the load of an event loop.
    """
    generator = np.random.default_rng(0)
    timings = []
    with ThreadPoolExecutor(runtimes) as pool:
        for size in sizes:
            arrays = example(inputs, size, generator)
            work = [pool.submit(_sample, run, arrays, sample, warm) for _ in range(runtimes)]
            if busy:
                _be_busy_until(work)
            timings.append(Timing(threads, runtimes, size, statistics.fmean(one.result() for one in work)))
    return timings


def _be_busy_until(work: "Sequence[Future[float]]") -> None:
    """Use a core and Python's lock like the event loop of a busy server during a batch.

    A call on all cores waits for its slowest thread. On an idle machine this would not show.
    """
    while not all(one.done() for one in work):
        end = monotonic() + _BURST_SECONDS
        while monotonic() < end:
            pass
        sleep(_PAUSE_SECONDS)


def _sample(run: Run, arrays: Arrays, sample: Callable[[Run, Arrays], float], warm: bool) -> float:
    """Measure with ``sample``, without the first call, which allocates."""
    if not warm:
        run(arrays)
    return sample(run, arrays)


def _mean_of(run: Run, arrays: Arrays) -> float:
    """Return the mean seconds of a call. Each size is measured for about the same time.

    The least would favour small batches on a shared machine, since they have more samples.
    """
    calls, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _SAMPLE_SECONDS:
        run(arrays)
        calls += 1
    return seconds / calls


def _least_of(run: Run, arrays: Arrays) -> float:
    """Return the least seconds of two calls: other work of the machine only adds to them."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        run(arrays)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
