"""Tests of the traces of requests, kept in memory instead of a collector."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos.capsnet.v1 import capsnet_pb2 as pb
from tests.conftest import DATA, Running

DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
STEPS = ["decode", "queue", "infer", "encode"]


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


@pytest.fixture
def traced(start: Callable[..., Running]) -> tuple[Running, Callable[[], list[ReadableSpan]]]:
    """A server with the spans that it has made so far."""
    exporter = InMemorySpanExporter()
    running = start(spans=exporter)

    def spans() -> list[ReadableSpan]:
        assert running.server._tracing
        running.server._tracing._provider.force_flush()
        return list(exporter.get_finished_spans())

    return running, spans


def test_a_request_is_a_span_of_its_clients_trace_with_its_steps_inside(
    traced: tuple[Running, Callable[[], list[ReadableSpan]]],
) -> None:
    running, spans = traced
    running.stub.Classify(pb.ClassifyRequest(images=[DIGIT] * 3), metadata=CONTEXT, timeout=20)
    *steps, request = spans()
    assert request.name == "capsnet.v1.CapsNetService/Classify"
    assert request.context
    assert request.parent
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, SPAN)
    attributes = dict(request.attributes or {})
    assert attributes == {
        "rpc.system": "grpc",
        "rpc.service": "capsnet.v1.CapsNetService",
        "rpc.method": "Classify",
        "rpc.grpc.status_code": 0,
        "model": "capsnet-mnist",
        "version": "1",
        "images": 3,
    }
    assert [step.name for step in steps] == STEPS
    times = [time for step in steps for time in (step.start_time, step.end_time)]
    assert all(step.parent and step.parent.span_id == request.context.span_id for step in steps)
    whole = [request.start_time, *times, request.end_time]
    assert all(time is not None for time in whole)
    assert whole == sorted(whole), "one after the other, inside the request"  # type: ignore[type-var]


def test_a_refused_request_is_a_failed_span(traced: tuple[Running, Callable[[], list[ReadableSpan]]]) -> None:
    running, spans = traced
    with pytest.raises(grpc.RpcError):
        running.classify()
    (request,) = spans()
    assert dict(request.attributes or {})["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert not request.status.is_ok
    assert request.parent is None


def test_each_request_of_a_stream_is_a_span(traced: tuple[Running, Callable[[], list[ReadableSpan]]]) -> None:
    running, spans = traced

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        for images in ([DIGIT], [], [DIGIT]):
            yield pb.ClassifyStreamRequest(request=pb.ClassifyRequest(images=images))

    assert len(list(running.stub.ClassifyStream(requests(), metadata=CONTEXT, timeout=20))) == 3
    found = [span for span in spans() if span.name not in STEPS]
    assert [span.name for span in found if span.status.is_ok] == ["capsnet.v1.CapsNetService/ClassifyStream"] * 2
    assert sorted(str(dict(span.attributes or {})["rpc.grpc.status_code"]) for span in found) == ["0", "0", "3"]
    assert {f"{span.context.trace_id:032x}" for span in found if span.context} == {TRACE}
