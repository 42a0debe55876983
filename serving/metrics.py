"""Every metric of the server, with its meaning beside it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The server's metrics in a registry of their own. The ``grpc_server_*`` names follow the gRPC convention."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.started = Counter("grpc_server_started_total", "RPCs begun.", method, registry=self.registry)
        self.handled = Counter(
            "grpc_server_handled_total", "RPCs ended, by status code.", (*method, "grpc_code"), registry=self.registry
        )
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from an RPC's first byte read to its end.",
            method,
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_time = Histogram(
            "capsnet_queue_seconds",
            "Time that a request's images waited for a batch.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "capsnet_batch_size_images", "Images computed in one batch.", buckets=IMAGES, registry=self.registry
        )
        self.inference_time = Histogram(
            "capsnet_inference_seconds",
            "Time that ONNX Runtime took for one batch.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queued = Gauge("capsnet_queue_images", "Images waiting for a batch.", registry=self.registry)
        self.failures = Counter(
            "capsnet_inference_failures_total", "Batches that ONNX Runtime could not compute.", registry=self.registry
        )
        self.stream_errors = Counter(
            "capsnet_stream_errors_total",
            "Requests in streams answered with an error, by status code.",
            ("grpc_code",),
            registry=self.registry,
        )
        self.model = Gauge(
            "capsnet_model_info",
            "1 for the model that is served.",
            ("name", "version", "dataset", "precision", "sha256"),
            registry=self.registry,
        )
        self.provider = Gauge(
            "capsnet_execution_provider_info",
            "1 for the ONNX Runtime execution provider really in use.",
            ("provider", "runtime"),
            registry=self.registry,
        )
        self.fallback = Gauge(
            "capsnet_execution_provider_fallback",
            "1 if CUDA is installed but the model runs on the CPU.",
            registry=self.registry,
        )
        self.ready = Gauge("capsnet_ready", "1 while the server takes requests.", registry=self.registry)
