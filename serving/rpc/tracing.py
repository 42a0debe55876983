"""OpenTelemetry traces: a span for each request, and inside it decode, queue, infer and encode."""

import time
from collections.abc import Iterable

import grpc
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context

from serving.rpc.edge import Steps

_NANO = 1_000_000_000


class Tracing:
    """The conversion of ended requests to spans. The parent comes from the client's W3C trace context."""

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        resource = Resource.create({"service.name": "capsnet-serving", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("serving")

    def request(
        self,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]],
        seconds: float,
        steps: Steps | None,
        code: grpc.StatusCode,
    ) -> None:
        """Trace a request of ``method`` (service/method) that ended now. steps: None if there is no answer."""
        end = time.time_ns()
        start = end - round(seconds * _NANO)
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        service, _, name = method.rpartition("/")
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "rpc.grpc.status_code": code.value[0],
        }
        span = self._tracer.start_span(
            method, extract(carrier), kind=SpanKind.SERVER, attributes=attributes, start_time=start
        )
        if steps:
            span.set_attributes({"model": steps.model, "version": steps.version, "images": steps.images})
            self._add_steps(span, start, end, steps)
        elif code is not grpc.StatusCode.OK:
            span.set_status(Status(StatusCode.ERROR, code.name))
        span.end(end)

    def _add_steps(self, parent: Span, start: int, end: int, steps: Steps) -> None:
        """Add the steps, one after the other. Time in turns of the event loop counts as infer."""
        context = set_span_in_context(parent)
        decoded = start + round(steps.decode * _NANO)
        taken = decoded + round(steps.queue * _NANO)
        computed = max(taken, end - round(steps.encode * _NANO))
        begin = start
        for name, finish in (("decode", decoded), ("queue", taken), ("infer", computed), ("encode", end)):
            self._tracer.start_span(name, context, start_time=begin).end(finish)
            begin = finish

    def close(self) -> None:
        """Send all spans that are not sent yet."""
        self._provider.shutdown()
