"""Self-tuning: how many threads, how many batches at once, and how large a batch, by measurement on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, sleep  # real ones, also where tests give the tuning a clock of their own
from typing import NamedTuple

import numpy as np

from serving.batching.cost import BatchCost
from serving.runtime import Arrays, Run, TensorSpec, example

# What a batch costs beside its computation and beside what each request does: the way to a thread and back, what runs
# between two batches under the lock of Python, caches that others have filled meanwhile. By the difference of what the
# server takes for a request in batches of 4 and of 16.
_OVERHEAD_SECONDS = 0.0005
# A smaller batch is taken where it loses no more than this, since its members wait less for each other.
_NEARLY = 0.95
# Part of the rate of batches without end that a good batch has. With larger ones, slots wait for answers to go out and
# requests to come in.
_GOOD = 0.85
_SAMPLE_SECONDS = 0.025
# A fifth of a core, which the event loop takes while a small network is served at full load.
_BURST_SECONDS = 0.0005
_PAUSE_SECONDS = 0.002


class Plan(NamedTuple):
    """threads: of one call. runtimes: calls at once. max_batch: images in one call."""

    threads: int
    runtimes: int
    max_batch: int


class Timing(NamedTuple):
    """A measurement: seconds that each of ``runtimes`` calls at once took for a batch of ``batch`` images."""

    threads: int
    runtimes: int
    batch: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.runtimes * self.batch / self.seconds

    @property
    def served_per_second(self) -> float:
        """Images a second with the time that the server adds to each batch."""
        return self.runtimes * self.batch / (self.seconds + _OVERHEAD_SECONDS)


@dataclass(frozen=True)
class Tuned:
    """A plan, the timings that it was chosen from, and the time of every batch size that it can meet."""

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
    """Return the images from which on a larger batch takes hardly less time an image, ``max_batch`` at most."""
    if not cost.per_image:
        return max_batch
    of_each_batch = cost.per_batch + _OVERHEAD_SECONDS
    return min(max_batch, math.ceil(_GOOD / (1 - _GOOD) * of_each_batch / cost.per_image))


def tune(
    open_runtime: Callable[[int], Run],
    inputs: Mapping[str, TensorSpec],
    pairs: Sequence[tuple[int, int]],
    max_batch: int,
    most: int,
) -> tuple[Run, Tuned]:
    """Choose a plan, and warm every batch size that it can meet.

    open_runtime: makes a runtime with so many threads a call. inputs: those of its graph. pairs: of threads and
    runtimes, as ``candidates`` gives them. max_batch: 0 to choose one, up to ``most``. Takes about two seconds on a
    small network.
    """
    compared: list[Timing] = []
    opened: dict[int, Run] = {}
    if len(pairs) > 1 or not max_batch:
        for threads in {threads: None for threads, _ in pairs}:
            opened[threads] = open_runtime(threads)
        sizes = _sizes(max_batch or most)
        # Twice over all of them, so that a machine that is slow for a moment misjudges none.
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
        good = [timing for timing in compared if timing.served_per_second >= _NEARLY * best]
        # Of those that are nearly as fast as the fastest, the one whose batch is done first.
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

    warm: all have been computed before. busy: beside a thread that takes what an event loop takes.
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
    """Take a core, and Python's lock, as the event loop of a busy server does while a batch is computed.

    A call on all cores waits for the slowest of its threads, which alone on the machine it does not show.
    """
    while not all(one.done() for one in work):
        end = monotonic() + _BURST_SECONDS
        while monotonic() < end:
            pass
        sleep(_PAUSE_SECONDS)


def _sample(run: Run, arrays: Arrays, sample: Callable[[Run, Arrays], float], warm: bool) -> float:
    """Measure by ``sample`` without the first call, which allocates."""
    if not warm:
        run(arrays)
    return sample(run, arrays)


def _mean_of(run: Run, arrays: Arrays) -> float:
    """Return the mean seconds of a call; each size is measured for about the same time.

    Of the least, small batches would have more to choose from, and look better than they are on a machine that others
    use too.
    """
    calls, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _SAMPLE_SECONDS:
        run(arrays)
        calls += 1
    return seconds / calls


def _least_of(run: Run, arrays: Arrays) -> float:
    """Return the least seconds of two calls: all else that the machine does only adds to them."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        run(arrays)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
