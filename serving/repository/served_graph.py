"""A graph of a served version: its runtime, tuned and warm, the cost of its batches, its batcher and its metrics."""

import logging
from math import isfinite
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.batching.admission import BatchPolicy
from serving.batching.batch import Hooks
from serving.batching.batcher import Batcher
from serving.batching.cost import BatchCost
from serving.logs import counted
from serving.metrics.registry import Metrics, ModelMetrics
from serving.repository.tuning import Plan, Tuned, candidates, good_batch, tune
from serving.runtime import CPU, Arrays, Run, Runtime, usable_cores
from serving.settings import Settings

# On a GPU, two calls overlap copies with computation. More calls only share it.
_GPU_RUNTIMES = (1, 2)
_MAX_TUNED_IMAGES = 64
# Every size up to the chosen one is computed at the start, and a CPU gains nothing from larger ones.
_MAX_TUNED_IMAGES_ON_CPU = 32

_logger = logging.getLogger(__name__)


class GraphSource(Protocol):
    """The source of a graph, with everything that differs between graphs."""

    #: The name of the graph.
    name: str
    #: The class names of a graph that classifies; empty for other graphs.
    labels: tuple[str, ...]
    #: The most images in a batch; 0 for no limit.
    max_batch: int

    def open(self, threads: int, /) -> Runtime:
        """Open the graph with ``threads`` threads for each call, and test it.

        Raises RuntimeSetupError, ArtifactError.
        """

    def hooks(self, metrics: ModelMetrics, /) -> Hooks:
        """Return the functions that follow the computation of each batch."""


class ServedGraph:
    """A graph that is open, tuned and warm. The constructor blocks. ``start`` starts the batcher and the metrics.

    plan: the plan of an earlier tuning, to use again; None to tune the graph.
    """

    metrics: ModelMetrics
    batcher: Batcher

    def __init__(self, source: GraphSource, settings: Settings, plan: Plan | None = None) -> None:
        """Open, tune and warm the graph. Raises RuntimeSetupError and ArtifactError."""
        self.name = source.name
        self._source = source
        self._settings = settings
        opened: dict[int, Runtime] = {}
        self._run, self.tuned = self._tune(plan, opened)
        self.runtime = opened[self.plan.threads]
        self.cost = BatchCost((timing.batch, timing.seconds) for timing in self.tuned.timings)

    @property
    def plan(self) -> Plan:
        return self.tuned.plan

    def start(self, metrics: Metrics, model: str, version: str) -> None:
        """Start to take requests. Call it on the event loop that serves them."""
        settings, plan, source = self._settings, self.plan, self._source
        self.metrics = ModelMetrics(metrics, model, version, source.labels, self.name)
        policy = BatchPolicy(
            plan.max_batch,
            good_batch(self.cost, plan.max_batch),
            settings.max_queue,
            settings.batch_timeout,
            settings.priority_ageing,
        )
        self.batcher = Batcher(self._run, source.hooks(self.metrics), self.metrics, policy, self.cost, plan.runtimes)
        self._show(metrics)

    async def close(self) -> None:
        """Answer the queued requests, and end the threads."""
        await self.batcher.close()

    def announce(self) -> None:
        """Log the runtime, the plan and the measured time, one line each."""
        plan, cost = self.plan, self.cost
        _logger.info("%s: %s on %s", self.name, self.runtime.description, self.runtime.provider)
        _logger.info(
            "%s: %s at a time, of up to %s, on %s each",
            self.name,
            counted(plan.runtimes, "batch", "batches"),
            counted(plan.max_batch, "image"),
            counted(plan.threads, "thread"),
        )
        constant = f"a batch takes about {1000 * cost.per_batch:.3g} ms, and " if cost.per_batch else ""
        _logger.info("%s: %s%.3g ms for each image", self.name, constant, 1000 * cost.per_image)
        for timing in self.tuned.compared:
            _logger.debug("tuning: %s, %.0f images a second", timing, timing.images_per_second)
        if self.runtime.fell_back:
            _logger.warning("CUDA is installed but did not start: the model runs on the CPU")

    def _tune(self, plan: Plan | None, opened: dict[int, Runtime]) -> tuple[Run, Tuned]:
        """Choose a plan. opened: gets the opened runtimes, by threads."""

        def runtime(threads: int) -> Runtime:
            if threads not in opened:
                opened[threads] = self._source.open(threads)
            return opened[threads]

        settings = self._settings
        most = settings.max_batch or _MAX_TUNED_IMAGES
        if self._source.max_batch:
            most = min(most, self._source.max_batch)
        if plan:
            pairs, max_batch = [(plan.threads, plan.runtimes)], plan.max_batch
        else:
            pairs = candidates(usable_cores(), settings.threads, settings.runtimes)
            if runtime(pairs[0][0]).provider == CPU:
                most = min(most, _MAX_TUNED_IMAGES_ON_CPU)
            else:
                runtimes = (settings.runtimes,) if settings.runtimes else _GPU_RUNTIMES
                pairs = [(pairs[0][0], count) for count in runtimes]
            max_batch = settings.max_batch
        return tune(lambda threads: runtime(threads).run, runtime(pairs[0][0]).inputs, pairs, max_batch, most)

    def _show(self, metrics: Metrics) -> None:
        """Let the metrics page read the graph's state and its waiting requests."""
        labels = model, version, graph = self.metrics.labels
        metrics.provider.labels(*labels, self.runtime.provider, self.runtime.description).read(lambda: 1)
        metrics.fallback.labels(*labels).read(lambda: self.runtime.fell_back)
        metrics.max_batch.labels(*labels).read(lambda: self.plan.max_batch)
        metrics.threads.labels(*labels).read(lambda: self.plan.threads)
        metrics.runtimes.labels(*labels).read(lambda: self.plan.runtimes)
        metrics.cost_of_image.labels(*labels).read(lambda: self.cost.per_image)
        metrics.cost_of_batch.labels(*labels).read(lambda: self.cost.per_batch)
        metrics.queued.labels(*labels).read(lambda: self.batcher.queued)
        metrics.triton_pending.labels(model, version).read(lambda: self.batcher.pending, graph)


def all_finite(outputs: Arrays) -> NDArray[np.bool_] | None:
    """Return True for each row that is finite in every floating-point output, (B,), or None if all rows are."""
    numbers = [array for array in outputs.values() if array.dtype.kind == "f"]
    # The sum is almost always finite, and it takes far less time than a check of each number.
    with np.errstate(all="ignore"):
        if isfinite(sum(float(array.sum()) for array in numbers)):
            return None
    good = [np.isfinite(array).all(tuple(range(1, array.ndim))) for array in numbers]
    return np.asarray(np.logical_and.reduce(good))
