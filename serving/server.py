"""The server's life: start, serve, drain, stop."""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2
from prometheus_client import start_http_server

from serving.metrics.collectors import ModelCollector
from serving.metrics.quality import Quality
from serving.metrics.registry import Metrics
from serving.metrics.triton_statistics import Statistics
from serving.repository.repository import Repository
from serving.rpc.edge import Edge
from serving.rpc.servicers import HEALTH, Health, health_methods, reflection_methods
from serving.services.capsnet import SERVICE, CapsNetService
from serving.services.open_inference import SERVICE as INFERENCE_SERVICE
from serving.services.open_inference import AdminService, InferenceService
from serving.services.pipeline import Pipeline
from serving.settings import Settings
from serving.transport.grpcio_server import GrpcioServer
from serving.transport.methods import TransportLimits, TransportServer
from serving.transport.server import GrpcServer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from serving.rpc.tracing import Tracing

# What is read of a message before it is refused, in terms of max_request_bytes: what is only somewhat too large gets
# its answer from a service, in a stream in its turn.
_TRANSPORT_LIMIT = 2
_LONGEST_SOCKET = 107  # bytes of its path; a limit of the system's
_GARBAGE = 20_000  # objects more than there were
_CHECK_SECONDS = 0.1
_LAST_ANSWERS_SECONDS = 0.5

_logger = logging.getLogger(__name__)


class StartError(RuntimeError):
    """The server cannot start; the text says why."""


class Server:
    """The models of a repository behind gRPC, with metrics over HTTP.

    spans: where traces go, in place of the collector that the settings name.
    """

    def __init__(self, settings: Settings, spans: "SpanExporter | None" = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.repository = Repository(settings, self.metrics)
        self.port = self.metrics_port = self.admin_port = 0
        self._tracing = _tracing(settings.trace_endpoint, spans) if settings.trace_endpoint or spans else None
        self._edge = Edge(self.metrics, self._tracing.request if self._tracing else None)
        self._rescans: set[asyncio.Task[None]] = set()
        self._pipeline = Pipeline(self.repository, settings.stream_window)
        self.metrics.in_flight.set_function(lambda: self._edge.under_way)
        self.metrics.registry.register(ModelCollector(self._figures))

    async def start(self) -> None:
        """Load and warm the models, then open the ports and take requests.

        Raises ArtifactError and RuntimeSetupError where no model can be served, StartError where a port cannot be had.
        """
        settings = self.settings
        await self.repository.open()
        self._grpc = self._server()
        service = CapsNetService(self._pipeline, self._edge, self.metrics, settings)
        inference = InferenceService(self._pipeline, self._edge, self.metrics, settings)
        self._health = Health()
        self._grpc.add_methods(service.methods() | inference.methods() | health_methods(self._health))
        self._grpc.add_methods(reflection_methods((SERVICE, INFERENCE_SERVICE, HEALTH)))
        self.port = await self._listen(self._grpc, settings.port, "gRPC", "--port")
        if settings.unix_socket:
            _check_socket(settings.unix_socket)
            try:
                await self._grpc.listen_unix(settings.unix_socket)
            except OSError as error:
                raise StartError(
                    f"unix_socket: {settings.unix_socket!r} cannot be opened: another server has it, or its folder "
                    "is missing or not writable"
                ) from error
        self._admin = None
        if settings.admin_port >= 0:
            self._admin = self._server()
            self._admin.add_methods(AdminService(self.repository, self._edge, settings).methods())
            self.admin_port = await self._listen(self._admin, settings.admin_port, "admin", "--admin-port")
        try:
            self._metrics_server, self._metrics_thread = start_http_server(
                settings.metrics_port, settings.host, self.metrics.registry
            )
        except OSError as error:
            raise StartError(
                f"port {settings.metrics_port} (metrics) cannot be opened on host {settings.host!r}: {error.strerror} "
                "(--metrics-port chooses another)"
            ) from error
        self.metrics_port = self._metrics_server.server_port
        # What is there now stays: collecting garbage need not look through it again and hold up requests.
        gc.collect()
        gc.freeze()
        # Nor, again and again, through requests that wait: they leave no cycles behind, and under overload that took a
        # tenth of the event loop's time.
        gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])
        await self._grpc.start()
        if self._admin:
            await self._admin.start()
        for name in ("", SERVICE, INFERENCE_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._edge.ready = True
        self.metrics.ready.set(1)
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Report NOT_SERVING, let requests under way finish, then stop everything."""
        self._edge.ready = False
        self.metrics.ready.set(0)
        for task in (self._watching, *self._rescans):
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self.settings.drain_delay)
        end = time.monotonic() + self.settings.drain_seconds
        self._pipeline.end_streams()
        await self._grpc.drain(self.settings.drain_seconds)
        self._pipeline.end_streams()  # those that were on their way
        while self._edge.under_way and time.monotonic() < end:
            await asyncio.sleep(_CHECK_SECONDS)
        # Not waiting for the watches of the health service, which would never end by themselves.
        await self._grpc.stop(0)
        if self._admin:
            await self._admin.stop(0)
        # What still computes then hangs; its thread ends with the process.
        with suppress(TimeoutError):
            await asyncio.wait_for(self.repository.close(), max(0.0, end - time.monotonic()) + _LAST_ANSWERS_SECONDS)
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)
        await asyncio.to_thread(self._metrics_server.shutdown)
        self._metrics_server.server_close()
        self._metrics_thread.join()

    def rescan_soon(self) -> None:
        """Bring what is served in line with the repository folder; once the server has started."""
        if self._edge.ready:
            task = asyncio.create_task(self._rescan())
            self._rescans.add(task)
            task.add_done_callback(self._rescans.discard)

    async def _rescan(self) -> None:
        try:
            await self.repository.scan()
        except Exception:
            _logger.exception("the model repository could not be read")

    def _figures(self) -> list[tuple[str, str, Statistics, Quality, int]]:
        """Of each version that is served, for the metrics page, whose thread asks."""
        return [
            (
                model.artifact.name,
                model.artifact.version,
                model.metrics.statistics,
                model.metrics.quality,
                model.batcher.pending,
            )
            for model in self.repository.models()
        ]

    def announce(self) -> None:
        """Log where it serves."""
        host = self._host
        if self.admin_port:
            _logger.info("loading and unloading of models on %s:%d", host, self.admin_port)
        if self.settings.unix_socket:
            _logger.info("gRPC on unix:%s", self.settings.unix_socket)
        _logger.info("gRPC on %s:%d, metrics on http://%s:%d/metrics", host, self.port, host, self.metrics_port)

    def _server(self) -> TransportServer:
        settings = self.settings
        limits = TransportLimits(
            message_bytes=_TRANSPORT_LIMIT * settings.max_request_bytes,
            message_text=f"the limit is {settings.max_request_bytes} bytes (max_request_bytes)",
            bytes_under_way=settings.max_bytes_under_way,
            memory_text=f"the limit is {settings.max_bytes_under_way} bytes (max_bytes_under_way)",
            refused=self._edge.refused_by_transport,
        )
        # What is under way on a connection that is renewed has as long as in a stop.
        kind = GrpcioServer if settings.transport == "grpcio" else GrpcServer
        return kind(limits, settings.connection_seconds, settings.drain_seconds)

    async def _listen(self, server: TransportServer, port: int, purpose: str, flag: str) -> int:
        host = self.settings.host
        try:
            return await server.listen(host.strip("[]"), port)
        except OSError as error:
            raise StartError(
                f"port {port} ({purpose}) cannot be opened on host {host!r}: the port is taken ({flag} "
                "chooses another) or the host is not an address of this machine (--host)"
            ) from error

    async def _watch(self) -> None:
        while self.settings.poll_seconds:
            await asyncio.sleep(self.settings.poll_seconds)
            await self._rescan()

    @property
    def _host(self) -> str:
        """The host as an address has it, an IPv6 one in brackets."""
        host = self.settings.host
        return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _check_socket(path: str) -> None:
    """Raises StartError where a Unix socket cannot lie; gRPC would take it from another server without a word."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise StartError(
            f"unix_socket: {path!r} has {len(os.fsencode(path))} bytes; expected {_LONGEST_SOCKET} at most"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise StartError(f"unix_socket: {path!r} cannot be opened: another server has it")


def _tracing(endpoint: str, spans: "SpanExporter | None") -> "Tracing":
    try:  # an extra: whoever wants no traces need not have it
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        from serving.rpc.tracing import Tracing
    except ImportError as error:
        raise StartError("trace_endpoint: OpenTelemetry is not installed; install the extra tracing") from error
    return Tracing(spans or OTLPSpanExporter(endpoint), metadata.version("capsnet-serving"))


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. A SIGHUP looks for new versions of the models."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_at(number: signal.Signals) -> None:
        stopping.set()
        loop.remove_signal_handler(number)  # a second one ends the process at once

    for number in (signal.SIGTERM, signal.SIGINT):  # first: as process 1 of a container Python would ignore SIGTERM
        loop.add_signal_handler(number, stop_at, number)
    server = Server(settings)
    loop.add_signal_handler(signal.SIGHUP, server.rescan_soon)
    signalled = asyncio.create_task(stopping.wait())
    starting = asyncio.create_task(server.start())
    await asyncio.wait((signalled, starting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        _logger.info("stopped before the models were loaded")
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        return
    await starting
    server.announce()
    await signalled
    _logger.info("stopping: requests under way finish first")
    await server.stop()
    _logger.info("stopped")
