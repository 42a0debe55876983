"""A version of a model that is served: its artifact, its runtime, its batcher and its metrics."""

import asyncio
import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving import artifact as artifacts
from serving.artifact import Artifact
from serving.batching.admission import BatchPolicy
from serving.batching.batcher import Batcher
from serving.batching.cost import BatchCost
from serving.metrics.registry import Metrics, ModelMetrics
from serving.repository.classifier import PROBABILITIES, finite_rows, open_classifier
from serving.repository.tuning import Plan, Tuned, candidates, good_batch, tune
from serving.runtime import CPU, Arrays, Run, Runtime, RuntimeSetupError
from serving.services.classify_request import PixelReader
from serving.services.classify_response import AnswerWriter
from serving.services.open_inference_codec import TensorMessages
from serving.settings import Settings, usable_cores

# On a GPU two calls overlap copies with computation; more only divide it.
_GPU_RUNTIMES = (1, 2)
_MOST_TUNED = 64
# Each size up to the one that is chosen is computed at the start, and larger ones gain a processor nothing.
_MOST_TUNED_ON_CPU = 32

_logger = logging.getLogger(__name__)


class ServedModel:
    """One version, loaded, verified, tuned and warm. The constructor blocks; the batcher begins with ``start``.

    plan: as another version of this model was tuned, to be taken over; tuning beside a server that works would only
    measure its load. Raises ArtifactError and RuntimeSetupError.
    """

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics, plan: Plan | None = None) -> None:
        self.artifact: Artifact = artifacts.load(folder)
        self.settings = settings
        if settings.device == "tensorrt" and settings.max_batch > self.artifact.batches["max"]:
            most = self.artifact.batches["max"]
            raise RuntimeSetupError(
                f"max_batch: {settings.max_batch}; this model was exported for batches of up to {most} in TensorRT"
            )
        self._opened: dict[int, Runtime] = {}
        self.run, self.tuned = self._tune(plan)
        self.runtime = self._opened[self.tuned.plan.threads]
        self._opened.clear()
        self._all_metrics = metrics
        self.cost = BatchCost((timing.batch, timing.seconds) for timing in self.tuned.timings)
        self._in_use = 0
        self._unused = asyncio.Event()

    @property
    def plan(self) -> Plan:
        return self.tuned.plan

    @cached_property
    def write_answer(self) -> AnswerWriter:
        return AnswerWriter(self.artifact)

    @cached_property
    def pixels(self) -> PixelReader:
        return PixelReader(self.artifact.image_shape, self.settings.max_images_per_request)

    @cached_property
    def tensors(self) -> TensorMessages:
        return TensorMessages(self.artifact, self.settings.max_images_per_request)

    def start(self) -> None:
        """Take requests; on the event loop that is to serve them."""
        name, version, settings = self.artifact.name, self.artifact.version, self.settings
        self.metrics = ModelMetrics(self._all_metrics, name, version, self.artifact.labels)
        policy = BatchPolicy(
            self.plan.max_batch,
            good_batch(self.cost, self.plan.max_batch),
            settings.max_queue,
            settings.batch_timeout,
            settings.priority_ageing,
        )
        self.batcher = Batcher(self.run, self._check, self.metrics, policy, self.cost, self.plan.runtimes)
        self._all_metrics.queued.labels(name, version).set_function(lambda: self.batcher.queued)
        self._tell()

    def acquire(self) -> None:
        """A request is on its way: the model stays until it is answered."""
        self._in_use += 1

    def release(self) -> None:
        self._in_use -= 1
        if not self._in_use:
            self._unused.set()

    async def close(self) -> None:
        """Once no request uses it any more, end its threads."""
        while self._in_use:
            self._unused.clear()
            await self._unused.wait()
        await self.batcher.close()

    def withdraw(self, successor: "ServedModel") -> None:
        """Remove what the metrics say of this one alone, since another of its name and version has taken over."""
        if self._info != successor._info:
            self._all_metrics.model_info.remove(*self._info)

    def announce(self) -> None:
        """Log what it is and how it was tuned."""
        channels, height, width = self.artifact.image_shape
        _logger.info(
            "%s version %s in %s: %d x %d images of %d channel(s), %d classes (%s), poses of %d; test error %s",
            self.artifact.name,
            self.artifact.version,
            self.settings.precision,
            width,
            height,
            channels,
            len(self.artifact.labels),
            ", ".join(self.artifact.labels),
            self.artifact.pose_size,
            self.artifact.test_error(self.settings.precision),
        )
        _logger.info(
            "%s on %s: %d batch(es) in parallel, of up to %d images and on %d thread(s) each; "
            "a batch of n takes about %.3g ms * n + %.3g ms",
            self.runtime.description,
            self.runtime.provider,
            self.plan.runtimes,
            self.plan.max_batch,
            self.plan.threads,
            1000 * self.cost.per_image,
            1000 * self.cost.per_batch,
        )
        for timing in self.tuned.compared:
            _logger.debug("tuning: %s, %.0f images a second", timing, timing.images_per_second)
        if self.runtime.fell_back:
            _logger.warning("CUDA is installed but did not start: the model runs on the CPU")

    def _check(self, outputs: Arrays) -> NDArray[np.bool_] | None:
        """Return which images' answers are finite, None where all are; those of a good batch go into the quality."""
        good = finite_rows(outputs)
        if good is None:
            self.metrics.quality.add(np.asarray(outputs[PROBABILITIES], np.float32))
        return good

    def _tune(self, plan: Plan | None) -> tuple[Run, Tuned]:
        settings = self.settings
        most = settings.max_batch or _MOST_TUNED
        if settings.device == "tensorrt":
            most = min(most, self.artifact.batches["max"])
        if plan:
            pairs, max_batch = [(plan.threads, plan.runtimes)], plan.max_batch
        else:
            pairs = candidates(usable_cores(), settings.threads, settings.runtimes)
            if self._open(pairs[0][0]).provider == CPU:
                most = min(most, _MOST_TUNED_ON_CPU)
            else:
                runtimes = (settings.runtimes,) if settings.runtimes else _GPU_RUNTIMES
                pairs = [(pairs[0][0], count) for count in runtimes]
            max_batch = settings.max_batch
        inputs = self._open(pairs[0][0]).inputs
        return tune(lambda threads: self._open(threads).run, inputs, pairs, max_batch, most)

    def _open(self, threads: int) -> Runtime:
        if threads not in self._opened:
            settings = self.settings
            cache = Path(settings.engine_cache) if settings.engine_cache else None
            self._opened[threads] = open_classifier(self.artifact, settings.device, threads, settings.precision, cache)
        return self._opened[threads]

    @property
    def _info(self) -> tuple[str, ...]:
        artifact, precision = self.artifact, self.settings.precision
        dataset = str(artifact.training["dataset"])
        return artifact.name, artifact.version, dataset, precision, artifact.sha256(precision)

    def _tell(self) -> None:
        """Set what the metrics say of it as it is."""
        metrics, labels = self._all_metrics, (self.artifact.name, self.artifact.version)
        metrics.model_info.labels(*self._info).set(1)
        metrics.provider.labels(*labels, self.runtime.provider, self.runtime.description).set(1)
        metrics.fallback.labels(*labels).set(self.runtime.fell_back)
        metrics.max_batch.labels(*labels).set(self.plan.max_batch)
        metrics.threads.labels(*labels).set(self.plan.threads)
        metrics.runtimes.labels(*labels).set(self.plan.runtimes)
        metrics.cost_of_image.labels(*labels).set_function(lambda: self.cost.per_image)
        metrics.cost_of_batch.labels(*labels).set_function(lambda: self.cost.per_batch)
        metrics.model_ready.labels(*labels).set(1)
