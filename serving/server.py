"""The server's life: start, serve, drain, stop."""

import asyncio
import errno
import gc
import logging
import platform
import signal
import socket
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2

from serving.access.access import Access
from serving.access.files import AccessError
from serving.access.tokens import ADMIN, PREDICT
from serving.errors import DENIALS
from serving.files.program import command_of
from serving.metrics.page import Page
from serving.metrics.registry import Metrics
from serving.repository.repository import Repository
from serving.rpc.edge import Edge
from serving.rpc.servicers import HEALTH, Health, health_methods, reflection_methods
from serving.runtime import return_free_memory, usable_cores
from serving.services.capsnet import METHODS, SERVICE, CapsNetService
from serving.services.decoding import Decoder
from serving.services.open_inference import SERVICE as INFERENCE_SERVICE
from serving.services.open_inference import AdminService, InferenceService
from serving.services.pipeline import Pipeline
from serving.services.unsupported import ELSEWHERE, refusals
from serving.settings import Settings
from serving.transport.grpcio_server import GrpcioServer
from serving.transport.memory import Memory
from serving.transport.methods import Method, TransportLimits, TransportServer, table
from serving.transport.server import GrpcServer
from serving.web.documents import documents

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from serving.rpc.tracing import Tracing
    from serving.web.server import WebServer

# The transport refuses messages above this multiple of max_request_bytes. A service refuses smaller ones, so that the
# error keeps its place in a stream.
_TRANSPORT_LIMIT = 2
# The number of new objects after which garbage is collected: large, since waiting requests leave no cycles behind.
_GARBAGE_THRESHOLD = 20_000
_CHECK_SECONDS = 0.1
# The memory that decoding may take before it leaves less to requests. The decoding of small images takes less.
_DECODING_BYTES_BESIDE = 2**25
_LAST_ANSWERS_SECONDS = 0.5
_PORT_REASONS = {
    errno.EADDRINUSE: "the port is taken ({flag} chooses another)",
    errno.EACCES: "this user may not open it ({flag} chooses another)",
    errno.EADDRNOTAVAIL: "the host is not an address of this machine (--host chooses another)",
}
_SOCKET_REASONS = {
    errno.EADDRINUSE: "another server has it, or it is no socket",
    errno.ENOENT: "its folder is missing",
    errno.EACCES: "its folder is not writable",
}

_logger = logging.getLogger(__name__)


class StartError(RuntimeError):
    """The server cannot start. The text says why."""


class Server:
    """The models of a repository behind gRPC and HTTP, with metrics.

    spans: the exporter of traces, instead of the collector in the settings.

    Raises StartError if a file of certificates or tokens cannot be used.
    """

    def __init__(self, settings: Settings, spans: "SpanExporter | None" = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.repository = Repository(settings, self.metrics, {*CapsNetService.GRAPHS, *InferenceService.GRAPHS})
        self.port = self.metrics_port = self.admin_port = self.http_port = 0
        self._tracing = _tracing(settings.trace_endpoint, spans) if settings.trace_endpoint or spans else None
        self._edge = Edge(self.metrics, self._tracing.request if self._tracing else None)
        try:
            self._access = Access(settings, self._edge.denied)
        except AccessError as error:
            raise StartError(str(error)) from error
        self._scanning: set[asyncio.Task[None]] = set()
        self._memory = Memory(settings.max_bytes_under_way)
        self._decoder = Decoder(
            settings.image_threads,
            settings.max_image_memory,
            settings.image_timeout,
            settings.max_queue,
            lambda cause: self.metrics.images_refused.labels(cause).inc(),
            partial(_leave_memory, self._memory, settings),
        )
        self._pipeline = Pipeline(self.repository, settings.stream_window, self._decoder)
        self._started = AsyncExitStack()  # closes the started parts, the last one first
        self._drain_end = 0.0  # a time of time.monotonic
        self._stopping = False
        self.metrics.in_flight.labels().read(lambda: self._edge.under_way)
        self.metrics.decoding.labels().read(lambda: self._decoder.under_way)
        self.metrics.decoding_memory.labels().read(lambda: self._decoder.reserved)
        self.metrics.ready.labels().read(lambda: self._edge.ready)

    async def start(self) -> None:
        """Open the ports, load and warm the models, then take requests.

        A start that fails or is cancelled leaves no port open and no model loaded. Raises StartError if a port or a
        socket cannot be opened, ArtifactError or RuntimeSetupError if no model can be served.
        """
        async with AsyncExitStack() as started:
            self._start_tracing(started)
            started.callback(self._decoder.close)
            started.push_async_callback(self._close_models)
            await self._open_ports(started)
            await self.repository.open()
            gc.set_threshold(_GARBAGE_THRESHOLD, *gc.get_threshold()[1:])
            await self._take_requests(started)
            self._started = started.pop_all()

    async def stop(self) -> None:
        """Report NOT_SERVING, let requests in flight finish, then stop everything."""
        self._stopping = True
        self._edge.ready = False
        for task in self._scanning:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(self.settings.drain_delay)
        self._drain_end = time.monotonic() + self.settings.drain_seconds
        await self._drain()
        await self._started.aclose()

    def _add_services(self) -> None:
        """Add all methods to the gRPC server, and keep those that HTTP serves too."""
        self._health = Health()
        service = CapsNetService(self._pipeline, self._edge, self.metrics, self.settings)
        inference = InferenceService(self._pipeline, self._edge, self.metrics, self.settings)
        guard = self._access.guard
        self._methods: dict[str, Method] = guard.protect(service.methods() | inference.methods(), PREDICT)
        self._grpc.add_methods(self._methods)
        self._grpc.add_methods(health_methods(self._health))
        if self.settings.reflection:
            self._methods |= guard.protect(documents(metadata.version("capsnet-serving")), PREDICT)
            self._grpc.add_methods(guard.protect(reflection_methods((SERVICE, INFERENCE_SERVICE, HEALTH)), PREDICT))

    def _start_tracing(self, started: AsyncExitStack) -> None:
        if self._tracing:
            started.push_async_callback(asyncio.to_thread, self._tracing.close)

    async def _open_ports(self, started: AsyncExitStack) -> None:
        """Open every port before any model is loaded, so that a taken port is reported at once."""
        settings = self.settings
        self._grpc = self._new_grpc_server("grpc")
        self._add_services()
        started.push_async_callback(self._grpc.stop, 0)
        self.port = await self._listen(self._grpc, settings.port, "gRPC", "--port")
        if settings.unix_socket:
            try:
                await self._grpc.listen_unix(settings.unix_socket)
            except OSError as error:
                reason = _SOCKET_REASONS.get(error.errno or 0) or error.strerror
                raise StartError(f"unix_socket: {settings.unix_socket!r} cannot be opened: {reason}") from error
        self._admin: TransportServer | None = None
        if settings.admin_port >= 0:
            self._admin = self._new_grpc_server("admin")
            methods = AdminService(self.repository, self._edge, settings).methods()
            methods |= table(SERVICE, refusals(self._edge, SERVICE, dict.fromkeys(METHODS, ELSEWHERE)))
            self._admin.add_methods(self._access.guard.protect(methods, ADMIN))
            started.push_async_callback(self._admin.stop, 0)
            self.admin_port = await self._listen(self._admin, settings.admin_port, "admin", "--admin-port")
        self._web: WebServer | None = None
        if settings.http_port >= 0:
            # Imported only now, since a server of gRPC alone does without Uvicorn.
            from serving.web.server import web_server

            access = self._access
            self._web = web_server(
                settings, self.metrics, self._methods, self._limits(), self._unready, access.http_context, access.admit,
                self._memory,
            )  # fmt: skip
            started.push_async_callback(self._web.stop, 0)
            self.http_port = await self._listen(self._web, settings.http_port, "HTTP", "--http-port")
        self._serve_metrics(started)

    def _serve_metrics(self, started: AsyncExitStack) -> None:
        settings, access = self.settings, self._access
        page = Page(self.metrics.registry, self._unready, access.admit_to_metrics, access.http_context)
        for reason in DENIALS:
            self.metrics.http_denied.labels(reason).read(partial(page.denied.__getitem__, reason))
        try:
            self.metrics_port = page.open(self._host, settings.metrics_port)
        except OSError as error:
            raise _port_error(settings.host, error, settings.metrics_port, "metrics", "--metrics-port") from error
        started.push_async_callback(asyncio.to_thread, page.close)

    async def _take_requests(self, started: AsyncExitStack) -> None:
        for name in ("", SERVICE, INFERENCE_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._edge.ready = True
        await self._grpc.start()
        for other in (self._admin, self._web):
            if other:
                await other.start()
        self._scan_beside(self._watch())

    async def _drain(self) -> None:
        """Let calls in flight finish until the end of the drain. Refuse calls that come after the clients know."""
        self._pipeline.end_streams()
        if self._web:
            self._web.drain()
        await self._grpc.drain(self.settings.drain_seconds)
        self._pipeline.end_streams()  # streams that were on their way
        while self._edge.under_way and time.monotonic() < self._drain_end:
            await asyncio.sleep(_CHECK_SECONDS)
        if self._web:
            await self._web.stop(max(0.0, self._drain_end - time.monotonic()))

    async def _close_models(self) -> None:
        """Close the models. A batch that still computes at the drain's end hangs; its thread ends with the process."""
        left = max(0.0, self._drain_end - time.monotonic()) + _LAST_ANSWERS_SECONDS
        with suppress(TimeoutError):
            await asyncio.wait_for(self.repository.close(), left)

    def rescan_soon(self) -> None:
        """Check the repository folder, the certificates and the tokens again, if the server has started."""
        self._access.renew()
        if self._edge.ready:
            self._scan_beside(self._rescan())

    def _scan_beside(self, scan: Coroutine[None, None, None]) -> None:
        """Run a scan beside the requests, until the scan ends or the server stops."""
        task = asyncio.create_task(scan)
        self._scanning.add(task)
        task.add_done_callback(self._scanning.discard)

    async def _rescan(self) -> None:
        try:
            await self.repository.scan()
        except OSError as error:
            _logger.error("the model repository could not be read: %s", error)
        except Exception:
            _logger.exception("the model repository could not be looked at")

    def _unready(self) -> str:
        """Return the reason why no request is taken now, or "". The thread of the health page calls it."""
        if not self._edge.ready:
            return "the server is stopping" if self._stopping else "the server is starting"
        return "" if self.repository.models() else "no model is served"

    def announce(self) -> None:
        """Log the versions and the addresses, and a warning if the settings ask for more threads than cores."""
        _logger.info("capsnet-serving %s on Python %s", metadata.version("capsnet-serving"), platform.python_version())
        asked, cores = max(1, self.settings.threads) * max(1, self.settings.runtimes), usable_cores()
        if asked > cores and self.settings.device in ("auto", "cpu"):
            _logger.warning(
                "threads and runtimes ask for %d threads on %d core(s): on a CPU they only hinder each other",
                asked,
                cores,
            )
        host = f"[{self._host}]" if ":" in self._host else self._host
        if self.admin_port:
            _logger.info("loading and unloading of models on %s:%d", host, self.admin_port)
        if self.settings.unix_socket:
            _logger.info("gRPC on unix:%s", self.settings.unix_socket)
        self._access.warn(self._host)
        web = "https" if self._access.certificates else "http"
        if self.http_port:
            _logger.info("HTTP on %s://%s:%d", web, host, self.http_port)
        _logger.info("try this: %s", _first_request(self._host, self.port, self.http_port, web == "https"))
        _logger.info("gRPC on %s:%d, metrics on %s://%s:%d/metrics", host, self.port, web, host, self.metrics_port)

    def _limits(self) -> TransportLimits:
        """Return the limits of a port, and the functions that count and log them."""
        settings = self.settings
        return TransportLimits(
            message_bytes=_TRANSPORT_LIMIT * settings.max_request_bytes,
            message_text=f"the limit is {settings.max_request_bytes} bytes (max_request_bytes)",
            bytes_under_way=settings.max_bytes_under_way,
            memory_setting="max_bytes_under_way",
            refused=self._edge.refused_by_transport,
            handshake=lambda result: self.metrics.handshakes.labels(result).inc(),
            connections=settings.max_connections,
            connections_per_client=settings.max_connections_per_client,
            calls_per_connection=settings.max_calls_per_connection,
            idle_seconds=settings.idle_seconds,
            limited=lambda limit: self.metrics.connections_limited.labels(limit).inc(),
            dropped=self._edge.dropped,
            unread=self.repository.note_unread,
        )

    def _new_grpc_server(self, port: str) -> TransportServer:
        """Return a new server whose metrics have this value of the label ``port``."""
        settings = self.settings
        # The calls of a renewed connection get the same time as in a stop.
        kind = GrpcioServer if settings.transport == "grpcio" else GrpcServer
        certificates, age, grace = self._access.certificates, settings.connection_seconds, settings.drain_seconds
        server = kind(self._limits(), age, grace, certificates, self._memory)
        self.metrics.show_transport(server.figures, port)
        return server

    async def _listen(self, server: "TransportServer | WebServer", port: int, purpose: str, flag: str) -> int:
        try:
            return await server.listen(self._host, port)
        except OSError as error:
            raise _port_error(self.settings.host, error, port, purpose, flag) from error

    async def _watch(self) -> None:
        while self.settings.poll_seconds:
            await asyncio.sleep(self.settings.poll_seconds)
            await self._rescan()

    @property
    def _host(self) -> str:
        """Return the host without the brackets of an IPv6 address."""
        return self.settings.host.strip("[]")


def _first_request(host: str, port: int, http_port: int, encrypted: bool) -> str:
    """Return a way to ask the server from this machine, for the log. http_port: 0 for none."""
    here = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    here = f"[{here}]" if ":" in here else here
    if http_port:
        return f"open {'https' if encrypted else 'http'}://{here}:{http_port}/ in a browser"
    tls = " --tls" if encrypted else ""
    return f"{command_of('serving.client')} --address {here}:{port}{tls} IMAGE.png"


def _leave_memory(memory: Memory, settings: Settings, decoding_bytes: int) -> None:
    """Leave to requests what decoding does not take, and room for two of them at least."""
    most, used = settings.max_bytes_under_way, memory.used
    left = most - max(0, decoding_bytes - _DECODING_BYTES_BESIDE)
    memory.limit(max(left, min(most, 2 * settings.max_request_bytes)))
    if memory.used < used:  # otherwise the C library would keep it, in blocks that are too small
        return_free_memory()


def _port_error(host: str, error: OSError, port: int, purpose: str, flag: str) -> StartError:
    """Return the error for a port that cannot be opened, with the reason and the flag to change."""
    if isinstance(error, socket.gaierror):
        reason = "the host's name is not known (--host chooses another)"
    else:
        reason = _PORT_REASONS.get(error.errno or 0, f"{error.strerror} ({{flag}} chooses another)")
    return StartError(f"port {port} ({purpose}) cannot be opened on host {host!r}: {reason.replace('{flag}', flag)}")


def _tracing(endpoint: str, spans: "SpanExporter | None") -> "Tracing":
    try:  # an extra, needed only for traces
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        from serving.rpc.tracing import Tracing
    except ImportError as error:
        raise StartError("trace_endpoint: OpenTelemetry is not installed; install the extra tracing") from error
    return Tracing(spans or OTLPSpanExporter(endpoint), metadata.version("capsnet-serving"))


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A SIGHUP looks for new versions of the models.

    If the signal comes while the models are still loading, a thread that cannot be interrupted goes on.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_at(number: signal.Signals) -> None:
        stopping.set()
        loop.remove_signal_handler(number)  # a second signal ends the process at once

    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # set first: as process 1 of a container, Python would ignore SIGTERM
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
