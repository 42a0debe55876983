"""Self-tuning: how many threads, how many batches at once, and how large a batch, by measurement on this machine."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serving.batcher import Images, Predict

# What a batch costs beside its computation: the way to a thread and back, and taking its answers apart.
_OVERHEAD_SECONDS = 0.0003
# A smaller batch is taken where it loses no more than this, since its members wait less for each other.
_NEARLY = 0.97
_SAMPLE_SECONDS = 0.03
_CALLS = 2


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
        """As above, with what the server adds to each batch."""
        return self.runtimes * self.batch / (self.seconds + _OVERHEAD_SECONDS)


@dataclass(frozen=True)
class Tuned:
    """The plan, what it was chosen from, and the time of every batch size that it can meet."""

    plan: Plan
    compared: tuple[Timing, ...]
    timings: tuple[Timing, ...]


def candidates(cores: int, threads: int, runtimes: int) -> list[tuple[int, int]]:
    """(threads, runtimes) to compare: one call on all cores, a call a core, and halves; 0 leaves the choice open."""
    if threads and runtimes:
        return [(threads, runtimes)]
    if threads:
        return sorted({(threads, 1), (threads, max(1, cores // threads))})
    if runtimes:
        return [(max(1, cores // runtimes), runtimes)]
    return sorted({(cores, 1), (1, cores), (max(1, cores // 2), min(2, cores))})


def tune(
    open_runtime: Callable[[int], Predict],
    image_shape: tuple[int, int, int],
    pairs: Sequence[tuple[int, int]],
    max_batch: int,
    most: int,
) -> tuple[Predict, Tuned]:
    """Choose a plan, and warm every batch size that it can meet.

    open_runtime: makes a runtime with so many threads a call. pairs: of threads and runtimes, as ``candidates`` gives
    them. max_batch: 0 to choose one, up to ``most``. Takes about two seconds on a small network.
    """
    compared: list[Timing] = []
    opened: dict[int, Predict] = {}
    if len(pairs) > 1 or not max_batch:
        for threads, runtimes in pairs:
            predict = opened.setdefault(threads, open_runtime(threads))
            compared += _compare(predict, image_shape, threads, runtimes, _sizes(max_batch or most))
        best = max(timing.served_per_second for timing in compared)
        good = [timing for timing in compared if timing.served_per_second >= _NEARLY * best]
        # Of those that are nearly as fast as the fastest, the one whose batch is done first.
        chosen = min(good, key=lambda timing: timing.seconds)
        plan = Plan(chosen.threads, chosen.runtimes, max_batch or chosen.batch)
    else:
        plan = Plan(*pairs[0], max_batch)
    predict = opened.get(plan.threads) or open_runtime(plan.threads)
    timings = _compare(predict, image_shape, plan.threads, plan.runtimes, range(1, plan.max_batch + 1), least_seconds=0)
    return predict, Tuned(plan, tuple(compared), tuple(timings))


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ..., and ``most`` itself."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


def _compare(
    predict: Predict,
    image_shape: tuple[int, int, int],
    threads: int,
    runtimes: int,
    sizes: Iterable[int],
    least_seconds: float = _SAMPLE_SECONDS,
) -> list[Timing]:
    generator = np.random.default_rng(0)
    timings = []
    with ThreadPoolExecutor(runtimes) as pool:
        for size in sizes:
            images = generator.integers(0, 256, (size, *image_shape), np.uint8)
            work = [pool.submit(_sample, predict, images, least_seconds) for _ in range(runtimes)]
            timings.append(Timing(threads, runtimes, size, statistics.fmean(one.result() for one in work)))
    return timings


def _sample(predict: Predict, images: Images, least_seconds: float) -> float:
    """Least seconds of a call: what else the machine does only adds to it. The first, which allocates, is left out."""
    predict(images)
    seconds: list[float] = []
    while len(seconds) < _CALLS or sum(seconds) < least_seconds:
        begin = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
