"""The server's life: start, serve, drain, stop."""

import asyncio
import logging
import signal
import time
from pathlib import Path

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from serving import artifact as artifacts
from serving.batcher import Batcher
from serving.metrics import Metrics
from serving.rpc import Edge
from serving.runtime import Runtime, RuntimeSetupError
from serving.service import SERVICE, CapsNetService
from serving.settings import Settings, usable_cores

# What gRPC itself reads before it refuses. It lies above max_request_bytes so that a request above that limit gets an
# answer that names it.
_TRANSPORT_LIMIT = 2
_REFUSAL_SECONDS = 0.2
_CHECK_SECONDS = 0.1
_LAST_ANSWERS_SECONDS = 0.5

_logger = logging.getLogger(__name__)


class StartError(RuntimeError):
    """The server cannot start; the text says why."""


class Server:
    """One model behind gRPC, with metrics over HTTP.

    The constructor loads and warms the model (raises ArtifactError, RuntimeSetupError); ``start`` opens the ports.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        folder = artifacts.find(settings.repository, settings.model, settings.model_version)
        self.artifact = artifacts.load(folder)
        self.threads = settings.threads or usable_cores()
        if settings.device == "tensorrt" and settings.max_batch > self.artifact.batches["max"]:
            most = self.artifact.batches["max"]
            raise RuntimeSetupError(
                f"max_batch: {settings.max_batch}; this model was exported for batches of up to {most} in TensorRT"
            )
        engine_cache = Path(settings.engine_cache) if settings.engine_cache else None
        self.runtime = Runtime(self.artifact, settings.device, self.threads, settings.precision, engine_cache)
        self.port = self.metrics_port = 0
        self.metrics.model.labels(
            self.artifact.name,
            self.artifact.version,
            self.artifact.training["dataset"],
            settings.precision,
            self.artifact.sha256(settings.precision),
        ).set(1)
        self.metrics.provider.labels(self.runtime.provider, self.runtime.description).set(1)
        self.metrics.fallback.set(self.runtime.fell_back)

    async def start(self) -> None:
        """Open the ports and take requests. Raises StartError where a port cannot be had."""
        settings = self.settings
        self._batcher = Batcher(self.runtime.predict, self.metrics, settings.max_batch, settings.max_queue)
        self._service = CapsNetService(self.artifact, self.runtime.provider, self._batcher, self.metrics, settings)
        limit = _TRANSPORT_LIMIT * settings.max_request_bytes
        self._grpc = aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # else a second server would share the port unseen
            ]
        )
        self._edge = Edge(SERVICE, self.metrics, settings.max_request_bytes)
        self._grpc.add_generic_rpc_handlers((self._service.handler(self._edge),))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs lack it
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        try:
            self.port = self._grpc.add_insecure_port(f"{self._host}:{settings.port}")
        except RuntimeError as error:
            raise StartError(
                f"port {settings.port} (gRPC) cannot be opened on host {settings.host!r}: the port is taken (--port "
                "chooses another) or the host is not an address of this machine (--host)"
            ) from error
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
        #: Ends when the server has stopped; should it end before, something in it is broken.
        self.computing = asyncio.create_task(self._batcher.run())
        await self._grpc.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.metrics.ready.set(1)

    async def stop(self) -> None:
        """Report NOT_SERVING, let requests under way finish, then stop everything."""
        self.metrics.ready.set(0)
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self.settings.drain_delay)
        # gRPC cancels what has arrived but not reached a handler when it stops. Refused in good order for a moment
        # first, clients learn that they may retry elsewhere.
        self._edge.refuse_new()
        await asyncio.sleep(_REFUSAL_SECONDS)
        end = time.monotonic() + self.settings.drain_seconds
        while self._edge.under_way and time.monotonic() < end:
            self._service.end_idle_streams()
            await asyncio.sleep(_CHECK_SECONDS)
        # Not waiting for the watches of the health service, which would never end by themselves.
        await self._grpc.stop(_LAST_ANSWERS_SECONDS if time.monotonic() < end else 0)
        self._batcher.close()
        await self.computing
        await asyncio.to_thread(self._metrics_server.shutdown)
        self._metrics_server.server_close()
        self._metrics_thread.join()

    @property
    def _host(self) -> str:
        """The host as an address has it, an IPv6 one in brackets."""
        host = self.settings.host
        return f"[{host}]" if ":" in host and not host.startswith("[") else host

    def announce(self) -> None:
        """Log what is served, where, and on what."""
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
            "%s on %s, %d thread(s), batches of up to %d images",
            self.runtime.description,
            self.runtime.provider,
            self.threads,
            self.settings.max_batch,
        )
        if self.runtime.fell_back:
            _logger.warning("CUDA is installed but did not start: the model runs on the CPU")
        host = self._host
        _logger.info("gRPC on %s:%d, metrics on http://%s:%d/metrics", host, self.port, host, self.metrics_port)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_at(number: signal.Signals) -> None:
        stopping.set()
        loop.remove_signal_handler(number)  # a second one ends the process at once

    for number in (signal.SIGTERM, signal.SIGINT):  # first: as process 1 of a container Python would ignore SIGTERM
        loop.add_signal_handler(number, stop_at, number)
    server = Server(settings)
    await server.start()
    server.announce()
    signalled = asyncio.create_task(stopping.wait())
    await asyncio.wait((signalled, server.computing), return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    _logger.info("stopping: requests under way finish first")
    await server.stop()
    _logger.info("stopped")
