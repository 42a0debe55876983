"""Tests of the metrics page, scraped from a running server."""

import shutil
import subprocess
import urllib.request
import weakref
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.metrics.instruments import Kind
from serving.metrics.registry import Metrics, ModelMetrics
from tests.conftest import DATA, Running

DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())


def _scrape(running: Running) -> str:
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def _value(page: str, metric: str, /, **labels: str) -> float:
    """Return a metric's only value with these labels; of the graph that classifies, if none is named."""
    graph = labels.pop("graph", "classify")
    values = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == metric
        and labels.items() <= sample.labels.items()
        and sample.labels.get("graph", graph) == graph
    ]
    assert len(values) == 1, f"{metric} {labels}: {values}"
    return values[0]


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


@pytest.fixture
def used(start: Callable[..., Running]) -> Running:
    """A server that answered three requests of four images and refused one."""
    running = start(max_batch=2, runtimes=1, http_port=0)
    for _ in range(3):
        running.classify(*[DIGIT] * 4)
    urllib.request.urlopen(f"http://127.0.0.1:{running.server.http_port}/v2").close()
    with pytest.raises(grpc.RpcError):
        running.classify()
    return running


def test_the_page_has_every_declared_metric_with_its_type_labels_and_buckets_and_no_other(used: Running) -> None:
    list(used.stub.ClassifyStream(iter([pb.ClassifyStreamRequest()]), timeout=20))  # an error within a stream
    families = [
        family
        for family in text_string_to_metric_families(_scrape(used))
        if not family.name.startswith(("process_", "python_"))
    ]
    declared = Metrics().declarations
    names = [family.name + ("_total" if family.type == "counter" else "") for family in families]
    assert names == [metric.name for metric in declared]
    for family, metric in zip(families, declared, strict=True):
        assert family.documentation == metric.meaning
        assert family.type == ("unknown" if metric.kind is Kind.UNTYPED else metric.kind.value)
        if metric.meaning.endswith("The transport grpcio tells none.") and used.server.settings.transport == "grpcio":
            assert all(sample.labels["port"] == "http" for sample in family.samples)
            continue
        assert {sample.name for sample in family.samples} == set(metric.samples)
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels == {frozenset(metric.labels)}, metric.name
        if metric.buckets:
            bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
            assert bounds == {*metric.buckets, float("inf")}


def test_each_graph_has_series_of_its_own_and_tritons_names_count_all_graphs() -> None:
    metrics = Metrics()
    graphs = {
        "classify": ModelMetrics(metrics, "m", "1", ["a", "b"]),
        "explain": ModelMetrics(metrics, "m", "1", [], graph="explain"),
    }
    ModelMetrics(metrics, "m", "2", ["a", "b"])
    for times, one in enumerate(graphs.values(), 1):
        for _ in range(times):
            one.batch(3, 0.001, 0.01)
            one.answered(0.001, 0.002, 0.003, 0.004, 0.005)
            one.failed(ValueError(), 0.001)
    graphs["classify"].quality.add(np.full((3, 2), 0.25, np.float32))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "m", "version": "1", **labels})

    for times, graph in enumerate(graphs, 1):
        assert value("capsnet_batch_size_images_sum", graph=graph) == 3 * times
        assert value("capsnet_inference_seconds_count", graph=graph) == times
    assert value("nv_inference_count") == 9
    assert value("nv_inference_request_success") == 3
    assert value("nv_inference_request_failure", reason="OTHER") == 3
    assert value("nv_inference_queue_duration_us") == 6000
    assert value("capsnet_winner_length_count", graph="classify") == 3
    assert value("capsnet_winner_length_count", graph="explain") is None, "it classifies nothing"
    metrics.forget("m", "1")
    kept = {
        (sample.labels["model"], sample.labels["version"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if "version" in sample.labels and "model" in sample.labels
    }
    assert kept == {("m", "2")}


def test_the_figures_of_answers_do_not_keep_the_arrays_of_a_session() -> None:
    metrics = ModelMetrics(Metrics(), "digits", "1", ["a", "b"])
    probabilities = np.array([[0.9, 0.1]], np.float32)
    kept = weakref.ref(probabilities)
    metrics.quality.add(probabilities)
    del probabilities
    assert kept() is None
    assert metrics.quality.wins(0) == 1


def test_a_version_that_is_loaded_again_counts_from_zero_in_tritons_names() -> None:
    metrics = Metrics()
    for requests in (5, 2):
        again = ModelMetrics(metrics, "m", "1", ["a"])
        for _ in range(requests):
            again.answered(0.001, 0.001, 0.001, 0.001, 0.001)
    labels = {"model": "m", "version": "1"}
    assert metrics.registry.get_sample_value("nv_inference_request_success", labels) == 2


def test_requests_are_counted_by_method_and_code(used: Running) -> None:
    page = _scrape(used)
    handled = "grpc_server_handled_total"
    assert _value(page, handled, grpc_method="Classify", grpc_code="OK") == 3
    assert _value(page, handled, grpc_method="Classify", grpc_code="INVALID_ARGUMENT") == 1
    assert _value(page, "grpc_server_started_total", grpc_method="Classify") == 4
    assert _value(page, "grpc_server_handling_seconds_count", grpc_method="Classify") == 4


def test_batches_are_measured(used: Running) -> None:
    page = _scrape(used)
    assert _value(page, "capsnet_batch_size_images_sum") == 12
    assert _value(page, "capsnet_batch_size_images_count") == 6
    assert _value(page, "capsnet_inference_seconds_count") == 6
    assert _value(page, "capsnet_inference_seconds_sum") > 0
    assert _value(page, "capsnet_queue_seconds_count") == 3
    assert _value(page, "capsnet_queue_images") == 0


def test_model_and_provider_are_on_the_page(used: Running) -> None:
    page = _scrape(used)
    assert _value(page, "capsnet_model_info", model="capsnet-mnist", version="1", dataset="mnist") == 1
    assert _value(page, "capsnet_execution_provider_info", provider="CPUExecutionProvider") == 1
    assert _value(page, "capsnet_execution_provider_fallback") == 0
    assert _value(page, "capsnet_ready") == 1


def test_the_metrics_with_tritons_names_count_the_work(used: Running) -> None:
    page = _scrape(used)
    assert _value(page, "nv_inference_request_success") == 3
    assert _value(page, "nv_inference_request_failure", reason="OTHER") == 1
    assert _value(page, "nv_inference_count") == 12
    assert _value(page, "nv_inference_exec_count") == 6
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    spent = [_value(page, f"nv_inference_{part}_duration_us") for part in parts]
    assert min(spent) > 0
    assert _value(page, "nv_inference_request_duration_us") == pytest.approx(sum(spent), abs=8)


def test_the_answers_are_counted_by_class_length_margin_and_active_capsules(used: Running) -> None:
    page = _scrape(used)
    assert _value(page, "capsnet_predicted_images_total", label="7") == 12
    assert _value(page, "capsnet_predicted_images_total", label="3") == 0
    assert _value(page, "capsnet_winner_length_count") == 12
    assert 0.8 < _value(page, "capsnet_winner_length_sum") / 12 < 1
    assert _value(page, "capsnet_winner_length_bucket", le="0.8") == 0
    assert _value(page, "capsnet_winner_margin_sum") > 0.5 * 12
    assert _value(page, "capsnet_active_capsules_bucket", le="0.0") == 0
    assert _value(page, "capsnet_active_capsules_bucket", le="1.0") == 12


def test_a_deadline_that_passes_is_counted_as_such(start: Callable[..., Running]) -> None:
    running = start(max_batch=1)
    running.classify(DIGIT)
    passed, attempts = 0.0, 0
    while passed == 0:  # the client may end the call first, and on a busy machine before the server sees it
        attempts += 1
        assert attempts < 50
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Classify(pb.ClassifyRequest(images=[DIGIT] * 1000), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        running.classify(DIGIT)
        page = _scrape(running)
        passed = _value(page, "grpc_server_handled_total", grpc_method="Classify", grpc_code="DEADLINE_EXCEEDED")
    assert passed == 1
    assert _value(page, "grpc_server_handled_total", grpc_method="Classify", grpc_code="OK") == 1 + attempts


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (it comes with Prometheus)")
def test_promtool_complains_of_nothing_but_the_names_that_are_those_of_triton(used: Running) -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=_scrape(used), capture_output=True, text=True, check=False
    )
    complaints = (result.stdout + result.stderr).splitlines()
    assert [line for line in complaints if not line.startswith("nv_inference_")] == []
    assert all("abbreviated units" in line or '"_count" suffix' in line for line in complaints)
