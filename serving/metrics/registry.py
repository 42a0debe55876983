"""All metrics of the server in one table: name, type, labels, buckets and meaning."""
# ruff: noqa: RUF009  # each call in Metrics makes a field, whose factory gives every server series of its own

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from serving.errors import (
    DENIALS,
    REASONS,
    DeadlineUnmeetable,
    DecodingTooSlow,
    Draining,
    InferenceFailed,
    QueueFull,
)
from serving.files.image_headers import IMAGE_CAUSES
from serving.metrics.instruments import Count, Declaration, DistributionReading, Family, Kind, Observations, Reading
from serving.metrics.quality import ACTIVE_LENGTH, LENGTH_BOUNDS, Quality
from serving.metrics.triton_statistics import BACKEND, CANCELED, FAILURES, OTHER, REJECTED, BatchStatistics, Statistics
from serving.transport.connection_limits import CONNECTION_LIMITS
from serving.transport.counts import EVICTIONS, Figures
from serving.transport.frames import ErrorCode
from serving.transport.handshakes import HANDSHAKE_RESULTS

#: The graph that classifies images.
CLASSIFY = "classify"

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_STEP_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1, 1)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PORT = ("port",)  # grpc, http or admin
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_VERSION = ("model", "version")
_GRAPH = (*_VERSION, "graph")


AnyFamily = Family[Count] | Family[Observations] | Family[Reading] | Family[DistributionReading]


def _counter(name: str, labels: tuple[str, ...], meaning: str, unit: str = "") -> Family[Count]:
    declaration = Declaration(name, Kind.COUNTER, labels, meaning, unit)
    return field(default_factory=lambda: Family(declaration, Count))


def _histogram(
    name: str, labels: tuple[str, ...], meaning: str, unit: str, buckets: tuple[float, ...]
) -> Family[Observations]:
    declaration = Declaration(name, Kind.HISTOGRAM, labels, meaning, unit, buckets)
    return field(default_factory=lambda: Family(declaration, lambda: Observations(buckets)))


def _read(name: str, kind: Kind, labels: tuple[str, ...], meaning: str, unit: str = "") -> Family[Reading]:
    declaration = Declaration(name, kind, labels, meaning, unit)
    return field(default_factory=lambda: Family(declaration, Reading))


def _gauge(name: str, labels: tuple[str, ...], meaning: str, unit: str = "") -> Family[Reading]:
    return _read(name, Kind.GAUGE, labels, meaning, unit)


def _triton(name: str, meaning: str, unit: str = "", labels: tuple[str, ...] = _VERSION) -> Family[Reading]:
    return _read(f"nv_inference_{name}", Kind.UNTYPED, labels, meaning, unit)


def _time_of_requests(part: str, spent: str) -> Family[Reading]:
    meaning = f"Microseconds that requests spent {spent}, added up."
    return _triton(f"{part}_duration_us", meaning, "microseconds")


def _read_histogram(
    name: str, labels: tuple[str, ...], meaning: str, buckets: tuple[float, ...] = ()
) -> Family[DistributionReading]:
    declaration = Declaration(name, Kind.HISTOGRAM, labels, meaning, "", buckets)
    return field(default_factory=lambda: Family(declaration, DistributionReading))


@dataclass(eq=False)
class Metrics(Collector):
    """The server's metrics, in their own registry. The page shows them in this order.

    The ``grpc_server_*`` names follow the gRPC convention. The ``nv_inference_*`` names, labels and meanings are
    Triton's, so that its dashboards and scaling rules work; they are summed over a version's graphs.
    """

    started: Family[Count] = _counter("grpc_server_started_total", _METHOD, "RPCs begun.")
    handled: Family[Count] = _counter(
        "grpc_server_handled_total", (*_METHOD, "grpc_code"), "RPCs ended, by status code."
    )
    handling: Family[Observations] = _histogram(
        "grpc_server_handling_seconds", _METHOD,
        "Time from an RPC's last byte read, of a stream its first, to its end.", "seconds", _SECONDS,
    )  # fmt: skip
    stream_errors: Family[Count] = _counter(
        "capsnet_stream_errors_total", (*_METHOD, "grpc_code"),
        "Requests in streams answered with an error, by status code.",
    )  # fmt: skip
    refused: Family[Count] = _counter(
        "capsnet_refused_total", ("reason",),
        "Requests answered with an error, by reason (the names of serving/errors.py).",
    )  # fmt: skip
    http_denied: Family[Reading] = _read(
        "capsnet_http_denied_total", Kind.COUNTER, ("reason",),
        f"Requests for the metrics that were denied, by reason: {', '.join(DENIALS)}.",
    )  # fmt: skip
    http_requests: Family[Count] = _counter(
        "capsnet_http_requests_total", ("route", "code"),
        "Requests of the HTTP port that ended, by route, empty for none, and status; 499: its client had gone.",
    )  # fmt: skip
    handshakes: Family[Count] = _counter(
        "capsnet_tls_handshakes_total", ("result",),
        f"TLS handshakes of gRPC's and HTTP's ports, by result: {', '.join(HANDSHAKE_RESULTS)}. "
        "The transport grpcio counts none.",
    )  # fmt: skip
    connections_limited: Family[Count] = _counter(
        "capsnet_connections_limited_total", ("limit",),
        f"Connections refused or ended by a limit: {', '.join(CONNECTION_LIMITS)}. The transport grpcio counts none.",
    )  # fmt: skip
    connections: Family[Reading] = _gauge(
        "capsnet_connections", _PORT, "Connections that are open. The transport grpcio tells none."
    )
    connections_accepted: Family[Reading] = _read(
        "capsnet_connections_accepted_total", Kind.COUNTER, _PORT,
        "Connections accepted, under TLS after their handshakes. The transport grpcio tells none.",
    )  # fmt: skip
    open_calls: Family[Reading] = _gauge(
        "capsnet_open_calls", _PORT, "Calls whose streams are open, also those that are only partly sent or read."
    )
    resets: Family[Reading] = _read(
        "capsnet_stream_resets_total", Kind.COUNTER, (*_PORT, "direction"),
        "Calls cancelled by RST_STREAM, received from clients or sent. The transport grpcio tells none.",
    )  # fmt: skip
    goaways: Family[Reading] = _read(
        "capsnet_goaways_total", Kind.COUNTER, (*_PORT, "code"),
        "Connections ended by GOAWAY, by its code in RFC 9113. The transport grpcio tells none.",
    )  # fmt: skip
    held_bytes: Family[Reading] = _gauge(
        "capsnet_held_bytes", _PORT, "Bytes that max_bytes_under_way limits: requests, unread answers and calls.",
        "bytes",
    )  # fmt: skip
    max_held_bytes: Family[Reading] = _gauge("capsnet_held_limit_bytes", _PORT, "The limit of these bytes.", "bytes")
    evicted: Family[Reading] = _read(
        "capsnet_evicted_calls_total", Kind.COUNTER, (*_PORT, "reason"),
        f"Calls ended before their answers were read, by reason: {', '.join(EVICTIONS)}.",
    )  # fmt: skip
    images_refused: Family[Count] = _counter(
        "capsnet_images_refused_total", ("cause",),
        f"Requests refused for an encoded image, by cause: {', '.join(IMAGE_CAUSES)}.",
    )  # fmt: skip
    decoding: Family[Reading] = _gauge("capsnet_decoding_requests", (), "Requests whose images are being decoded.")
    decoding_memory: Family[Reading] = _gauge(
        "capsnet_decoding_memory_bytes", (), "Memory reserved for decoding images.", "bytes"
    )
    in_flight: Family[Reading] = _gauge("capsnet_rpcs_in_flight", (), "RPCs that have begun and not ended.")
    ready: Family[Reading] = _gauge("capsnet_ready", (), "1 while the server takes requests.")
    model_loads: Family[Count] = _counter(
        "capsnet_model_loads_total", ("model", "result"),
        "Attempts to load a version of a model, by result: ok, failed.",
    )  # fmt: skip
    decode_time: Family[Observations] = _histogram(
        "capsnet_decode_seconds", _GRAPH, "Time to check a request and decode its images.", "seconds", _STEP_SECONDS
    )
    encode_time: Family[Observations] = _histogram(
        "capsnet_encode_seconds", _GRAPH, "Time to write a request's answer.", "seconds", _STEP_SECONDS
    )
    queue_time: Family[Observations] = _histogram(
        "capsnet_queue_seconds", _GRAPH, "Time that a request's images waited for a batch.", "seconds", _SECONDS
    )
    stack_time: Family[Observations] = _histogram(
        "capsnet_stack_seconds", _GRAPH, "Time to bring a batch's images together.", "seconds", _STEP_SECONDS
    )
    inference_time: Family[Observations] = _histogram(
        "capsnet_inference_seconds", _GRAPH, "Time that ONNX Runtime took for one batch.", "seconds", _SECONDS
    )
    batch_size: Family[Observations] = _histogram(
        "capsnet_batch_size_images", _GRAPH, "Images computed in one batch.", "images", _IMAGES
    )
    queued: Family[Reading] = _gauge("capsnet_queue_images", _GRAPH, "Images waiting for a batch.", "images")
    cancelled: Family[Count] = _counter(
        "capsnet_cancelled_images_total", _GRAPH, "Images never computed, since their client had gone.", "images"
    )
    expired: Family[Count] = _counter(
        "capsnet_expired_images_total", _GRAPH,
        "Images never computed, since their deadline would have passed before their answer.", "images",
    )  # fmt: skip
    failures: Family[Count] = _counter(
        "capsnet_inference_failures_total", _GRAPH, "Batches that ONNX Runtime could not compute."
    )
    retries: Family[Count] = _counter(
        "capsnet_inference_retries_total", _GRAPH,
        "Members of a failed batch that were computed again, each by itself.",
    )  # fmt: skip
    hangs: Family[Count] = _counter(
        "capsnet_inference_hangs_total", _GRAPH,
        "Batches given up after batch_timeout; each leaves a thread behind.",
    )  # fmt: skip
    non_finite: Family[Count] = _counter(
        "capsnet_non_finite_images_total", _GRAPH,
        "Images whose answer held a value that is not finite.", "images",
    )  # fmt: skip
    max_batch: Family[Reading] = _gauge(
        "capsnet_max_batch_images", _GRAPH, "Most images in one batch, as tuned or set.", "images"
    )
    threads: Family[Reading] = _gauge("capsnet_threads", _GRAPH, "Threads of one ONNX Runtime call, as tuned or set.")
    runtimes: Family[Reading] = _gauge("capsnet_runtimes", _GRAPH, "Batches computed in parallel, as tuned or set.")
    cost_of_image: Family[Reading] = _gauge(
        "capsnet_batch_cost_per_image_seconds", _GRAPH,
        "a of the time a batch of n images takes, a * n + b, as last fitted.", "seconds",
    )  # fmt: skip
    cost_of_batch: Family[Reading] = _gauge(
        "capsnet_batch_cost_seconds", _GRAPH,
        "b of the time a batch of n images takes, a * n + b, as last fitted.", "seconds",
    )  # fmt: skip
    model_ready: Family[Reading] = _gauge("capsnet_model_ready", _VERSION, "1 for a version that takes requests.")
    model_info: Family[Reading] = _gauge(
        "capsnet_model_info", (*_VERSION, "dataset", "precision", "sha256"), "1 for each version that is served."
    )
    provider: Family[Reading] = _gauge(
        "capsnet_execution_provider_info", (*_GRAPH, "provider", "runtime"),
        "1 for the ONNX Runtime execution provider really in use.",
    )  # fmt: skip
    fallback: Family[Reading] = _gauge(
        "capsnet_execution_provider_fallback", _GRAPH, "1 if CUDA is installed but the model runs on the CPU."
    )
    triton_success: Family[Reading] = _triton("request_success", "Requests answered with a result.")
    triton_failure: Family[Reading] = _triton(
        "request_failure", "Requests answered with an error, by reason.", labels=(*_VERSION, "reason")
    )
    triton_pending: Family[Reading] = _gauge(
        "nv_inference_pending_request_count", _VERSION, "Requests that wait for a batch."
    )
    triton_images: Family[Reading] = _triton("count", "Images computed.", "images")
    triton_batches: Family[Reading] = _triton("exec_count", "Batches computed.")
    triton_request_time: Family[Reading] = _time_of_requests("request", "from their arrival to their answer")
    triton_queue_time: Family[Reading] = _time_of_requests("queue", "waiting for a batch")
    triton_input_time: Family[Reading] = _time_of_requests(
        "compute_input", "decoding images and bringing batches together"
    )
    triton_infer_time: Family[Reading] = _time_of_requests("compute_infer", "in ONNX Runtime")
    triton_output_time: Family[Reading] = _time_of_requests("compute_output", "writing answers")
    predicted: Family[Reading] = _read(
        "capsnet_predicted_images_total", Kind.COUNTER, (*_GRAPH, "label"),
        "Images by the class of the longest capsule.", "images",
    )  # fmt: skip
    winner_length: Family[DistributionReading] = _read_histogram(
        "capsnet_winner_length", _GRAPH, "Length of the longest capsule of an image, from 0 to 1.", LENGTH_BOUNDS
    )
    winner_margin: Family[DistributionReading] = _read_histogram(
        "capsnet_winner_margin", _GRAPH,
        "Difference of length between an image's longest capsule and its second longest.", LENGTH_BOUNDS,
    )  # fmt: skip
    active_capsules: Family[DistributionReading] = _read_histogram(
        "capsnet_active_capsules", _GRAPH, f"Number of an image's capsules that are longer than {ACTIVE_LENGTH}."
    )

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(self)
        for result in HANDSHAKE_RESULTS:
            self.handshakes.labels(result)
        for cause in IMAGE_CAUSES:
            self.images_refused.labels(cause)
        for limit in CONNECTION_LIMITS:
            self.connections_limited.labels(limit)
        for reason in REASONS:  # start at 0, so that a rate counts the first one too
            self.refused.labels(reason)

    def show_transport(self, figures: Figures, port: str) -> None:
        """Read the figures of a transport from now on. port: the value of the label."""
        self.open_calls.labels(port).read(figures.calls)
        self.held_bytes.labels(port).read(figures.held_bytes)
        self.max_held_bytes.labels(port).read(lambda: figures.max_held_bytes)
        for reason in EVICTIONS:
            self.evicted.labels(port, reason).read(partial(figures.evicted.__getitem__, reason))
        if connections := figures.connections:
            counts = connections.counts
            self.connections.labels(port).read(connections.open)
            self.connections_accepted.labels(port).read(lambda: counts.accepted)
            self.resets.labels(port, "received").read(lambda: counts.resets_received)
            self.resets.labels(port, "sent").read(lambda: counts.resets_sent)
            for code in ErrorCode:
                self.goaways.labels(port, code.name).read(partial(counts.goaways.__getitem__, code))

    @property
    def declarations(self) -> list[Declaration]:
        """Return the declarations of all metrics, in the order of the page."""
        return [family.declaration for family in self._families()]

    def describe(self) -> Iterator[Metric]:
        """Return the metrics' names for the registry, by prometheus_client's protocol of collectors."""
        return (declaration.without_samples() for declaration in self.declarations)

    def collect(self) -> Iterator[Metric]:
        """Yield the present state of every metric. Any thread may call it."""
        return (family.collect() for family in self._families())

    def forget(self, model: str, version: str) -> None:
        """Remove the series of a version that is no longer served."""
        for family in self._families():
            if set(_VERSION) <= set(family.declaration.labels):
                family.remove({"model": model, "version": version})

    def _families(self) -> Iterator[AnyFamily]:
        return (getattr(self, one.name) for one in fields(self))


class ModelMetrics:
    """The metrics of one graph of a version, with labels that are looked up once, and its statistics.

    labels_of_classes: the class names; empty for a graph that does not classify.
    """

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        version: str,
        labels_of_classes: Sequence[str],
        graph: str = CLASSIFY,
    ) -> None:
        self.statistics = Statistics()
        self.quality = Quality(labels_of_classes)
        #: The values of the labels model, version and graph.
        self.labels = labels = (model, version, graph)
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
        self._show_statistics(metrics)
        if labels_of_classes:
            self._show_quality(metrics)

    def batch(self, images: int, input_time: float, infer_time: float) -> None:
        """Count a batch: its images, and the seconds of each step."""
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
        """Count an answered request, with the seconds of each step."""
        self._decode_time.observe(decode)
        self._encode_time.observe(encode)
        self.statistics.answered(queue, decode + compute_input, infer, encode)

    def failed(self, error: BaseException, seconds: float, requests: int = 1) -> None:
        """Count requests that got an error or were given up. seconds: from the arrival to the end of each."""
        match error:
            case QueueFull() | DecodingTooSlow() | DeadlineUnmeetable() | Draining():
                reason = REJECTED
            case asyncio.CancelledError():
                reason = CANCELED
            case InferenceFailed():
                reason = BACKEND
            case _:
                reason = OTHER
        self.statistics.fail.add(seconds, requests)
        self.statistics.failures[reason] += requests

    def _show_statistics(self, metrics: Metrics) -> None:
        statistics = self.statistics
        model, version, graph = self.labels
        for family, function in (
            (metrics.triton_success, lambda: statistics.success.count),
            (metrics.triton_images, lambda: statistics.inference_count),
            (metrics.triton_batches, lambda: statistics.execution_count),
            (metrics.triton_request_time, lambda: statistics.success.us),
            (metrics.triton_queue_time, lambda: statistics.queue.us),
            (metrics.triton_input_time, lambda: statistics.compute_input.us),
            (metrics.triton_infer_time, lambda: statistics.compute_infer.us),
            (metrics.triton_output_time, lambda: statistics.compute_output.us),
        ):
            family.labels(model, version).read(function, graph)
        for reason in FAILURES:
            failure = metrics.triton_failure.labels(model, version, reason)
            failure.read(partial(statistics.failures.__getitem__, reason), graph)

    def _show_quality(self, metrics: Metrics) -> None:
        quality = self.quality
        for index, label in enumerate(quality.labels):
            metrics.predicted.labels(*self.labels, label).read(partial(quality.wins, index))
        metrics.winner_length.labels(*self.labels).read(lambda: quality.up_to_date.lengths)
        metrics.winner_margin.labels(*self.labels).read(lambda: quality.up_to_date.margins)
        metrics.active_capsules.labels(*self.labels).read(lambda: quality.up_to_date.active)
