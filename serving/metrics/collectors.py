"""Metrics that are not counted one by one but read off when the page is asked for."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.metrics.quality import ACTIVE, Quality
from serving.metrics.triton_statistics import Statistics

_MODEL = ("model", "version")
Models = Callable[[], Iterable[tuple[str, str, Statistics, Quality, int]]]


class ModelCollector(Collector):
    """Triton's names for what the models did, so that its dashboards and scaling rules work, and the answers' quality.

    models: name, version, statistics, quality, and requests that wait, of each version that is served.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = list(self._models())
        yield from self._triton(models)
        predicted = CounterMetricFamily(
            "capsnet_predicted_images", "Images by the class of the longest capsule.", labels=(*_MODEL, "label")
        )
        lengths = HistogramMetricFamily(
            "capsnet_winner_length", "Length of the longest capsule of an image, from 0 to 1.", labels=_MODEL
        )
        margins = HistogramMetricFamily(
            "capsnet_winner_margin", "How much longer the longest capsule of an image is than the next.", labels=_MODEL
        )
        active = HistogramMetricFamily(
            "capsnet_active_capsules", f"How many capsules of an image are longer than {ACTIVE}.", labels=_MODEL
        )
        for model, version, _, quality, _ in models:
            quality.update()
            for label, count in zip(quality.labels, quality.winners.tolist(), strict=True):
                predicted.add_metric((model, version, label), count)
            for family, values in ((lengths, quality.lengths), (margins, quality.margins), (active, quality.active)):
                family.add_metric((model, version), values.buckets(), values.sum)
        yield from (predicted, lengths, margins, active)

    def _triton(self, models: list[tuple[str, str, Statistics, Quality, int]]) -> Iterator[Metric]:
        def family(name: str, meaning: str, value: Callable[[Statistics], int]) -> Metric:
            # Of no type, since prometheus_client gives a counter's name an ending that Triton's do not have.
            metric = Metric(f"nv_inference_{name}", meaning, "unknown")
            for model, version, statistics, _, _ in models:
                metric.add_sample(metric.name, {"model": model, "version": version}, value(statistics))
            return metric

        yield family("request_success", "Requests answered with a result.", lambda one: one.success.count)
        failure = Metric("nv_inference_request_failure", "Requests answered with an error, by reason.", "unknown")
        pending = Metric("nv_inference_pending_request_count", "Requests that wait for a batch.", "gauge")
        for model, version, statistics, _, waiting in models:
            labels = {"model": model, "version": version}
            for reason, count in statistics.failures.items():
                failure.add_sample(failure.name, {**labels, "reason": reason}, count)
            pending.add_sample(pending.name, labels, waiting)
        yield from (failure, pending)
        yield family("count", "Images computed.", lambda one: one.inference_count)
        yield family("exec_count", "Batches computed.", lambda one: one.execution_count)
        for name, meaning, duration in (
            ("request", "from their arrival to their answer", lambda one: one.success),
            ("queue", "waiting for a batch", lambda one: one.queue),
            ("compute_input", "decoding images and bringing batches together", lambda one: one.compute_input),
            ("compute_infer", "in ONNX Runtime", lambda one: one.compute_infer),
            ("compute_output", "writing answers", lambda one: one.compute_output),
        ):
            yield family(
                f"{name}_duration_us",
                f"Microseconds that requests spent {meaning}, added up.",
                lambda one, duration=duration: duration(one).ns // 1000,  # type: ignore[misc]
            )
