"""Every metric of the server, with its meaning beside it."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from serving.errors import REASONS, DeadlineUnmeetable, Draining, InferenceFailed, QueueFull
from serving.metrics.instruments import Counter as FastCounter
from serving.metrics.instruments import Histogram
from serving.metrics.quality import Quality
from serving.metrics.triton_statistics import BACKEND, CANCELED, OTHER, REJECTED, BatchStatistics, Statistics

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STEP_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1, 1)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_MODEL = ("model", "version")

Metric = TypeVar("Metric", bound=MetricWrapperBase)


class _OfModels(Protocol):
    """A metric with series for each version of each model."""

    def remove_by_labels(self, labels: dict[str, str], /) -> None: ...


class Metrics:
    """The server's metrics in a registry of their own. The ``grpc_server_*`` names follow the gRPC convention."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._of_models: list[_OfModels] = []
        self.started = FastCounter("grpc_server_started_total", "RPCs begun.", _METHOD, self.registry)
        self.handled = FastCounter(
            "grpc_server_handled_total", "RPCs ended, by status code.", (*_METHOD, "grpc_code"), self.registry
        )
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from an RPC's last byte read, of a stream its first, to its end.",
            _METHOD,
            SECONDS,
            self.registry,
        )
        self.stream_errors = self._counter(
            "capsnet_stream_errors_total",
            "Requests in streams answered with an error, by status code.",
            (*_METHOD, "grpc_code"),
        )
        self.refused = FastCounter(
            "capsnet_refused_total",
            "Requests answered with an error, by reason (the names of serving/errors.py).",
            ("reason",),
            self.registry,
        )
        self.in_flight = self._gauge("capsnet_rpcs_in_flight", "RPCs that have begun and not ended.")
        self.ready = self._gauge("capsnet_ready", "1 while the server takes requests.")
        self.model_loads = self._counter(
            "capsnet_model_loads_total",
            "Attempts to load a version of a model, by result: ok, failed.",
            ("model", "result"),
        )
        self.decode_time = self._histogram_of_model(
            "capsnet_decode_seconds", "Time to check a request and decode its images.", STEP_SECONDS
        )
        self.encode_time = self._histogram_of_model(
            "capsnet_encode_seconds", "Time to write a request's answer.", STEP_SECONDS
        )
        self.queue_time = self._histogram_of_model(
            "capsnet_queue_seconds", "Time that a request's images waited for a batch.", SECONDS
        )
        self.stack_time = self._histogram_of_model(
            "capsnet_stack_seconds", "Time to bring a batch's images together.", STEP_SECONDS
        )
        self.inference_time = self._histogram_of_model(
            "capsnet_inference_seconds", "Time that ONNX Runtime took for one batch.", SECONDS
        )
        self.batch_size = self._histogram_of_model("capsnet_batch_size_images", "Images computed in one batch.", IMAGES)
        self.queued = self._of_model(Gauge, "capsnet_queue_images", "Images waiting for a batch.")
        self.cancelled = self._of_model(
            Counter, "capsnet_cancelled_images_total", "Images never computed, since their client had gone."
        )
        self.expired = self._of_model(
            Counter,
            "capsnet_expired_images_total",
            "Images never computed, since their deadline would have passed before their answer.",
        )
        self.failures = self._of_model(
            Counter, "capsnet_inference_failures_total", "Batches that ONNX Runtime could not compute."
        )
        self.retries = self._of_model(
            Counter,
            "capsnet_inference_retries_total",
            "Members of a failed batch that were computed again, each by itself.",
        )
        self.hangs = self._of_model(
            Counter,
            "capsnet_inference_hangs_total",
            "Batches given up after batch_timeout; each leaves a thread behind.",
        )
        self.non_finite = self._of_model(
            Counter, "capsnet_non_finite_images_total", "Images whose answer held a value that is not finite."
        )
        self.max_batch = self._of_model(Gauge, "capsnet_max_batch_images", "Most images in one batch, as tuned or set.")
        self.threads = self._of_model(Gauge, "capsnet_threads", "Threads of one ONNX Runtime call, as tuned or set.")
        self.runtimes = self._of_model(Gauge, "capsnet_runtimes", "Batches computed in parallel, as tuned or set.")
        self.cost_of_image = self._of_model(
            Gauge,
            "capsnet_batch_cost_per_image_seconds",
            "a of the time a batch of n images takes, a * n + b, as last fitted.",
        )
        self.cost_of_batch = self._of_model(
            Gauge, "capsnet_batch_cost_seconds", "b of the time a batch of n images takes, a * n + b, as last fitted."
        )
        self.model_ready = self._of_model(Gauge, "capsnet_model_ready", "1 for a version that takes requests.")
        self.model_info = Gauge(
            "capsnet_model_info",
            "1 for each version that is served.",
            (*_MODEL, "dataset", "precision", "sha256"),
            registry=self.registry,
        )
        self._of_models.append(self.model_info)
        self.provider = Gauge(
            "capsnet_execution_provider_info",
            "1 for the ONNX Runtime execution provider really in use.",
            (*_MODEL, "provider", "runtime"),
            registry=self.registry,
        )
        self._of_models.append(self.provider)
        self.fallback = self._of_model(
            Gauge, "capsnet_execution_provider_fallback", "1 if CUDA is installed but the model runs on the CPU."
        )

        # From 0 on, so that a rate sees the first one too.
        for reason in REASONS:
            self.refused.labels(reason)

    def forget(self, model: str, version: str) -> None:
        """Remove the series of a version that is served no more."""
        for metric in self._of_models:
            metric.remove_by_labels({"model": model, "version": version})

    def _counter(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)

    def _of_model(self, kind: type[Metric], name: str, meaning: str) -> Metric:
        """A metric with a series for each version of each model that is served."""
        metric = kind(name, meaning, _MODEL, registry=self.registry)
        self._of_models.append(metric)
        return metric

    def _histogram_of_model(self, name: str, meaning: str, bounds: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, meaning, _MODEL, bounds, self.registry)
        self._of_models.append(metric)
        return metric


class ModelMetrics:
    """The metrics of one version of one model, their labels looked up once, and its statistics."""

    def __init__(self, metrics: Metrics, model: str, version: str, labels_of_classes: Sequence[str]) -> None:
        self.statistics = Statistics()
        self.quality = Quality(labels_of_classes)
        labels = (model, version)
        self.queue_time = metrics.queue_time.labels(*labels)
        self.cancelled = metrics.cancelled.labels(*labels)
        self.expired = metrics.expired.labels(*labels)
        self.failures = metrics.failures.labels(*labels)
        self.retries = metrics.retries.labels(*labels)
        self.hangs = metrics.hangs.labels(*labels)
        self.non_finite = metrics.non_finite.labels(*labels)
        self._decode_time = metrics.decode_time.labels(*labels)
        self._encode_time = metrics.encode_time.labels(*labels)
        self._batch_size = metrics.batch_size.labels(*labels)
        self._stack_time = metrics.stack_time.labels(*labels)
        self._inference_time = metrics.inference_time.labels(*labels)

    def batch(self, images: int, input_time: float, infer_time: float) -> None:
        """A batch of so many images was computed, in so many seconds."""
        self._batch_size.observe(images)
        self._stack_time.observe(input_time)
        self._inference_time.observe(infer_time)
        statistics = self.statistics
        statistics.last_inference = round(time.time() * 1000)
        statistics.inference_count += images
        statistics.execution_count += 1
        batch = statistics.batches.setdefault(images, BatchStatistics())
        batch.compute_input.add(input_time)
        batch.compute_infer.add(infer_time)

    def answered(self, decode: float, queue: float, compute_input: float, infer: float, encode: float) -> None:
        """A request was answered; seconds of each part of its way."""
        self._decode_time.observe(decode)
        self._encode_time.observe(encode)
        self.statistics.answered(queue, decode + compute_input, infer, encode)

    def failed(self, error: BaseException, seconds: float, requests: int = 1) -> None:
        """Requests were answered with an error, or given up, so many seconds after each came."""
        match error:
            case QueueFull() | DeadlineUnmeetable() | Draining():
                reason = REJECTED
            case asyncio.CancelledError():
                reason = CANCELED
            case InferenceFailed():
                reason = BACKEND
            case _:
                reason = OTHER
        self.statistics.fail.add(seconds, requests)
        self.statistics.failures[reason] += requests
