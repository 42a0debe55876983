"""The RPC metrics of one method."""

import time

import grpc

from serving.metrics.registry import Metrics


class Recorder:
    """The counters of one method's RPCs, with labels that are looked up once. name: service/method."""

    def __init__(self, metrics: Metrics, kind: str, service: str, method: str) -> None:
        self.name = f"{service}/{method}"
        labels = (kind, service, method)
        self._started = metrics.started.labels(*labels)
        self._handling = metrics.handling.labels(*labels)
        self._handled = {code: metrics.handled.labels(*labels, code.name) for code in grpc.StatusCode}

    def start(self) -> float:
        """Count a new RPC, and return the time of its start."""
        self._started.inc()
        return time.perf_counter()

    def refuse(self, code: grpc.StatusCode, calls: int) -> None:
        """Count RPCs that ended at once."""
        self._started.inc(calls)
        self._handling.observe(0.0, calls)
        self._handled[code].inc(calls)

    def end(self, start: float, code: grpc.StatusCode) -> None:
        """Count an RPC that has ended."""
        self._handling.observe(time.perf_counter() - start)
        self._handled[code].inc()
