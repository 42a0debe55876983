"""Fixtures: the repository's real digits, and a real server on free ports with the embedded model."""

import asyncio
import gc
import inspect
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, cast

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from opentelemetry.sdk.trace.export import SpanExporter

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.files.idx import read_idx
from serving.repository.served_model import ServedModel
from serving.server import Server
from serving.settings import Settings
from serving.transport.methods import TRANSPORTS
from tests.calibrated import calibrated_models
from tests.raw_client import Raw
from tests.transport_methods import Serving, serve

Ask = Callable[..., Any]
ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
# Files whose tests use PyTorch's exporter, which takes long to load, and share the graphs that they make (graphs.py).
# Each group has a process. A group begins with its longest tests.
EXPORTING = {
    "test_export": "exporter",
    "test_to_fp16": "exporter",
    "test_to_int8": "exporter",
    "test_folding": "exporter",
    "test_triton": "exporter",
    "test_benchmarks_serving": "exporting benchmarks",
    "test_benchmarks_gpu": "exporting benchmarks",
    "test_benchmarks": "exporting benchmarks",
    "test_folder": "exporting benchmarks",
    "test_conversions": "exporting benchmarks",
    "test_tensorrt": "exporting benchmarks",
}
# The markers of tests that run a package as a process, and of tests that run it in their own process.
PROCESSES = {"serving": "server", "training": "training"}
IN_PROCESS = {
    ("serving.server", "Server"): "server",
    ("training.train", "run"): "training",
    ("export.build", "export_checkpoint"): "exporter",
    ("export.to_onnx", "explanation_to_onnx"): "exporter",
    ("export.to_onnx", "to_onnx"): "exporter",
}
# The order of the files that run first. Those that mostly wait for a clock run beside those that compute, one or two at
# a time, so that the cores never wait; and no process still runs a long file when the others are done.
FIRST = (
    *(file for file, group in EXPORTING.items() if group == "exporter"),
    "test_readme",
    "test_transport_calls",
    "test_client_faults",
    "test_connection_limits",
    "test_page",
    "test_transport_stops",
    "test_transport_memory",
    *(file for file, group in EXPORTING.items() if group != "exporter"),
    "test_overload",
    "test_access_served",
    "test_pipeline",
    "test_web_page",
    "test_processes",
    "test_lifecycle",
    "test_monitoring",
    "test_architecture",
    "test_balancing",
    "test_digits",
    "test_repository",
    "test_training",
    "test_site",
    "test_runtime",
    "test_fuzz",
    "test_model",
)


class Digits(NamedTuple):
    """MNIST's 10,000 test images, (10000, 28, 28) uint8, and their labels, (10000,) uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(*(read_idx((DATA / f"t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")))


@dataclass
class Running:
    """A server that runs in a thread, and a client's stub."""

    server: Server
    stub: CapsNetServiceStub
    channel: grpc.Channel
    thread: "InThread"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def model(self) -> ServedModel:
        """The only model that is served."""
        return self.server.repository.get("", "")

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/metrics"

    def stop(self) -> None:
        """Begin to stop the server; it ends with the test."""
        self.thread.stop()

    def classify(self, *images: pb.Image) -> pb.ClassifyResponse:
        response: pb.ClassifyResponse = self.stub.Classify(pb.ClassifyRequest(images=images), timeout=20)
        return response


def settings(**chosen: object) -> Settings:
    """Settings with free ports, without HTTP, and a fixed plan, so that no start measures one."""
    ports = {"port": 0, "metrics_port": 0, "http_port": -1}
    return Settings(**{**ports, "threads": 1, "runtimes": 2, "max_batch": 4, **chosen})  # type: ignore[arg-type]


class InThread:
    """Runs a server's event loop in a thread, from ``start`` to ``stop``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self._server.start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        await self._stopping.wait()
        await self._server.stop()

    def __enter__(self) -> Server:
        """Wait until the server has started. Raises the error of its start."""
        self._thread.start()
        try:
            self._started.result(60)
        except BaseException:
            self._thread.join()
            raise
        return self._server

    def stop(self) -> None:
        """Begin to stop the server."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            with suppress(RuntimeError):  # it has ended meanwhile
                self.stop()
        self._thread.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Return a function that starts servers with given settings. They stop when the test ends."""
    running: list[tuple[InThread, grpc.Channel]] = []

    def begin(
        patch: Callable[[ServedModel], None] = lambda model: None, spans: SpanExporter | None = None, **chosen: object
    ) -> Running:
        server = Server(settings(**chosen), spans)
        thread = InThread(server)
        thread.__enter__()
        for model in server.repository.models():
            patch(model)
        channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
        running.append((thread, channel))
        return Running(server, CapsNetServiceStub(channel), channel, thread)  # type: ignore[no-untyped-call]

    yield begin
    for thread, channel in running:
        channel.close()
        thread.__exit__()


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Running]]:
    """One server of each transport, by its name, for all tests that do not disturb it."""
    with ExitStack() as stack:

        @cache
        def running_on(transport: str) -> Running:
            thread = InThread(Server(settings(transport=transport, http_port=0)))
            server = stack.enter_context(thread)
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
            return Running(server, CapsNetServiceStub(channel), channel, thread)  # type: ignore[no-untyped-call]

        yield running_on


@pytest.fixture(scope="session")
def calibrated_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """One server of each transport, by its name, with the calibrated models of tests/calibrated.py."""
    models = calibrated_models(tmp_path_factory.mktemp("calibrated"))
    with ExitStack() as stack:

        @cache
        def running_on(transport: str) -> Running:
            thread = InThread(Server(settings(transport=transport, models=str(models))))
            server = stack.enter_context(thread)
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
            return Running(server, CapsNetServiceStub(channel), channel, thread)  # type: ignore[no-untyped-call]

        yield running_on


@pytest.fixture(scope="session")
def running(servers: Callable[[str], Running]) -> Running:
    """The server with the default settings."""
    return servers("native")


@pytest.fixture
def running_on_each(servers: Callable[[str], Running], transport: str) -> Running:
    """The server of each transport in turn; a file whose tests run on both has this as its ``running``."""
    return servers(transport)


@pytest.fixture
def start_on_each(start: Callable[..., Running], transport: str) -> Callable[..., Running]:
    """Servers of each transport in turn; a file whose tests run on both has this as its ``start``."""
    return partial(start, transport=transport)


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn: all tests of a file on one, and then on the other."""
    name: str = request.param
    return name


@pytest.fixture
def served(transport: str) -> Iterator[Serving]:
    """The tests' methods on each transport in turn."""
    with serve(transport) as running:
        yield running


@pytest.fixture(scope="session")
def triton() -> Iterator[Ask]:
    """Return a function that calls a function of triton_calls.py in the client's process."""
    command = [sys.executable, "-m", "tests.triton_calls"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def ask(name: str, *arguments: Any, **keywords: Any) -> Any:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps([name, arguments, keywords]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the client's process has ended; it says why"
            return json.loads(line)

        yield ask
        process.stdin.close()


@pytest.fixture
def serving() -> Iterator[Serving]:
    """The tests' methods on the native transport."""
    with serve() as running:
        yield running


@pytest.fixture
def raw(serving: Serving) -> Iterator[Raw]:
    """A client of the native transport whose frames are made by hand."""
    client = Raw(serving.port)
    yield client
    client.socket.close()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of reports undrawn, for tests of their other parts: each takes a tenth of a second or more."""
    from matplotlib.figure import Figure
    from PIL import Image

    monkeypatch.setattr(Figure, "savefig", lambda _, file, **options: Image.new("L", (1, 1)).save(file, "PNG"))


@pytest.fixture(scope="module", autouse=True)
def operators_listed_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let PyTorch's exporter list its operators once, and not for each graph."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem in EXPORTING:
            for name, listing in _listings().items():
                patch.setattr(name, listing)
        yield


@cache
def _listings() -> dict[str, object]:
    """Return the exporter's functions that list operators, by name, each with its results kept: no test adds one."""
    from torch._export.utils import _materialize_cpp_cia_ops
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return {
        "torch._export.utils._materialize_cpp_cia_ops": cache(_materialize_cpp_cia_ops),
        "torch.onnx._internal.exporter._registration.ONNXRegistry.from_torchlib": staticmethod(
            cache(ONNXRegistry.from_torchlib)
        ),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Run the tests of one file in one process, and all files of a group that uses the exporter in the same process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).stem
            return EXPORTING.get(file, file)

    return Scheduling(config, log)


def pytest_configure() -> None:
    """Set what all tests of a process share.

    Garbage is looked for less often, since the exporter makes many objects: it took a tenth of its time. A shell's job
    in the background ignores Ctrl-C, and the processes that tests start and interrupt would inherit that.
    """
    gc.set_threshold(50_000, 20, 100)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attacks", choices=("short", "all"), default="short", help="attacks on the server to test with")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name compressed bytes without their time, since every process must find the same tests."""
    return f"gzip of {len(val)} bytes" if isinstance(val, bytes) and b"\x1f\x8b" in val else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of some files first, and mark those that ``make check`` leaves out: servers, trainings, exports."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = item._fixtureinfo.name2fixturedefs.values()
            functions = (item.function, *(one.func for definitions in fixtures for one in definitions))
            for marker in _whole_parts(functions):
                item.add_marker(marker)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Keep the garbage collector off, for tests of objects that must go without it."""
    gc.disable()
    yield
    gc.enable()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all modules again and again."""
    gc.collect()
    gc.freeze()


@cache
def _whole_parts(functions: tuple[object, ...]) -> set[str]:
    """Return the markers of a test: "server" if it starts one, "training" if it trains, "exporter" if it exports.

    functions: the test's own function, and those of its fixtures. A test also counts if it does so through other
    functions and classes of the tests, in this process or another.
    """
    pending = list(functions)
    seen: set[int] = set()
    parts = set[str]()
    while pending:
        function = inspect.unwrap(cast("Callable[..., object]", pending.pop()))
        names, constants = _names_and_constants(getattr(function, "__code__", None))
        if "-m" in constants:
            parts |= {part for package, part in PROCESSES.items() if package in constants}
        known = getattr(function, "__globals__", {})
        helpers = [vars(known[name]) for name in names if _is_helper(known.get(name))]
        for name, space in itertools.product(names, (known, *helpers)):
            found = space.get(name)
            module = str(getattr(found, "__module__", ""))
            if part := IN_PROCESS.get((module, name)):
                parts.add(part)
            if module.startswith(("tests.", "test_")) and id(found) not in seen:
                seen.add(id(found))
                pending += vars(found).values() if inspect.isclass(found) else [found]
    return parts


def _is_helper(found: object) -> bool:
    """Return True for a module of the tests, whose functions others call as its attributes."""
    return inspect.ismodule(found) and found.__name__.startswith("tests.")


@cache
def _names_and_constants(code: CodeType | None) -> tuple[set[str], set[object]]:
    """Return the names and the texts in a function's code, and in that of the functions inside it."""
    names, constants = set(code.co_names if code else ()), set[object]()
    for constant in code.co_consts if code else ():
        if isinstance(constant, CodeType):
            inner = _names_and_constants(constant)
            names, constants = names | inner[0], constants | inner[1]
        elif isinstance(constant, tuple):
            constants |= set(constant)
        else:
            constants.add(constant)
    return names, constants
