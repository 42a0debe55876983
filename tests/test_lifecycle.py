"""Tests of the server as a process: its first lines, its end, and its errors when it cannot start."""

import asyncio
import errno
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving import artifact
from serving.runtime import Arrays
from serving.server import Server, StartError
from serving.transport import frames
from tests.conftest import DATA, ROOT, InThread, settings
from tests.raw_client import literal

PIXELS = pb.Image(pixels=bytes(784))
PLAN = ("--threads", "1", "--runtimes", "2", "--max-batch", "4")
MEASURED = ("--threads", "0", "--runtimes", "0", "--max-batch", "0")
DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())


@contextmanager
def server_process(
    *arguments: str, program: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run ``python -m serving`` on free ports. Yield the process, its gRPC address, and its first lines.

    The plan is fixed and not measured, unless the arguments say otherwise. program: Python's arguments in place of
    ``-m serving``.
    """
    module = program or ("-m", "serving")
    command = [sys.executable, *module, "--port", "0", "--metrics-port", "0", "--http-port", "-1", *PLAN, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stderr
        lines: list[str] = []
        while not (lines and "metrics on" in lines[-1]):
            line = process.stderr.readline()
            assert line, f"the server ended: {lines}"
            lines.append(line)
        port = re.search(r"gRPC on 127\.0\.0\.1:(\d+)", lines[-1])
        assert port
        yield process, f"127.0.0.1:{port[1]}", lines
    finally:
        process.kill()
        process.communicate()


def failed_start(*arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "serving", *("--port", "0", "--metrics-port", "0", "--http-port", "-1"), *PLAN]
    result = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stderr


def test_the_first_lines_name_the_model_the_addresses_and_the_device() -> None:
    with server_process(*MEASURED) as (_, _, lines):
        text = "".join(lines)
    assert re.search(r"capsnet-mnist version 1 in fp32: 28 x 28 images .* test error 0\.\d\d %", text)
    assert re.search(r"ONNX Runtime [\d.]+ on CPUExecutionProvider", text)
    assert re.search(r"gRPC on 127\.0\.0\.1:\d+, metrics on http://127\.0\.0\.1:\d+/metrics", text)
    assert re.search(r"capsnet-mnist: 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n", text)
    assert re.search(r"classify: \d+ batch(es)? at a time, of up to \d+ images?, on \d+ threads? each\n", text)
    assert re.search(r"capsnet-serving \S+ on Python 3\.\d+", text)
    assert re.search(r"try this: \S*python\S* -m serving\.client --address 127\.0\.0\.1:[1-9]\d* IMAGE\.png\n", text)
    assert "\x1b" not in text  # no colours without a terminal


def cancelled_by_grpc(error: grpc.RpcError, transport: str) -> bool:
    """Return True for a call that gRPC's own server cancelled at its stop before a handler had it.

    The operations page lists this difference of the transports.
    """
    return transport == "grpcio" and (error.code(), error.details()) == (grpc.StatusCode.CANCELLED, "CANCELLED")


def test_sigterm_under_load_answers_every_accepted_request_and_exits_0(transport: str) -> None:
    with server_process("--drain-delay", "1", "--transport", transport) as (process, address, _):
        failures = asyncio.run(_load_until_stopped(process, address))
        assert process.wait(20) == 0
    # Refused before it was accepted: the port is closed, or the connection has sent GOAWAY.
    others = [error for error in failures if error.code() is not grpc.StatusCode.UNAVAILABLE]
    assert [error for error in others if not cancelled_by_grpc(error, transport)] == []


async def _load_until_stopped(process: subprocess.Popen[str], address: str) -> list[grpc.aio.AioRpcError]:
    """Return the failures; each client ends with its first one."""
    answered = 0
    failures: list[grpc.aio.AioRpcError] = []
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

        async def client() -> None:
            nonlocal answered
            while True:
                try:
                    response = await stub.Classify(pb.ClassifyRequest(images=[DIGIT] * 8), timeout=20)
                except grpc.aio.AioRpcError as error:
                    failures.append(error)
                    return
                assert [result.label for result in response.results] == ["7"] * 8
                answered += 1

        clients = [asyncio.create_task(client()) for _ in range(16)]
        while not answered:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        before = answered
        process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        during = answered
        await asyncio.sleep(0.5)
        assert answered > during >= before > 0, "requests are still served during the drain delay"
        await asyncio.gather(*clients)
    return failures


def test_requests_under_way_at_sigterm_are_answered(transport: str) -> None:
    slow = ("--max-batch", "1", "--runtimes", "1", "--threads", "1", "--max-queue", "8000")
    flags = (*slow, "--drain-seconds", "100", "--transport", transport)
    with server_process(*flags) as (process, address, _), grpc.insecure_channel(address) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        calls = [stub.Classify.future(pb.ClassifyRequest(images=[PIXELS] * 400), timeout=120) for _ in range(12)]
        assert len(calls[0].result().results) == 400
        process.send_signal(signal.SIGTERM)
        assert not calls[-1].done(), "too fast to test: send more images"
        assert [len(call.result().results) for call in calls] == [400] * 12
        assert process.wait(20) == 0


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        for flag in ("--port", "--metrics-port", "--http-port"):
            code, text = failed_start(flag, number)
            assert code == 1
            assert f"cannot start: port {number}" in text
            assert "Traceback" not in text


def test_two_servers_do_not_share_a_port(transport: str) -> None:
    with server_process("--transport", transport) as (_, address, _):
        code, text = failed_start("--transport", transport, "--port", address.split(":")[1])
    assert code == 1
    assert "the port is taken (--port chooses another)" in text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def test_one_port_for_two_purposes_is_refused_by_name() -> None:
    port = str(free_port())
    code, text = failed_start("--port", port, "--metrics-port", port)
    assert code == 2
    assert f"metrics_port: {port}; gRPC has that port (--metrics-port chooses another)" in text


def test_of_servers_started_at_the_same_moment_on_one_port_one_serves_and_the_other_says_why_not() -> None:
    port = free_port()
    flags = ["--port", str(port), "--metrics-port", "0", "--http-port", "-1", *PLAN]
    both = [
        subprocess.Popen([sys.executable, "-m", "serving", *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while not any(ended := [process.poll() is not None for process in both]):
            assert time.monotonic() < deadline, "both serve"
            time.sleep(0.05)
        loser, winner = both if ended[0] else both[::-1]
        assert loser.stderr
        assert f"cannot start: port {port} (gRPC)" in loser.stderr.read()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
            assert stub.GetModel(pb.GetModelRequest(), timeout=60, wait_for_ready=True).model_name == "capsnet-mnist"
        assert winner.poll() is None
    finally:
        for process in both:
            process.kill()
            process.communicate()


def refused_start(server: Server) -> Exception:
    with pytest.raises((StartError, artifact.ArtifactError)) as caught, InThread(server):
        pass
    return caught.value


@pytest.mark.parametrize("purpose", ["gRPC", "HTTP", "admin", "metrics"])
def test_a_taken_port_is_reported_before_a_model_is_loaded_and_leaves_no_port_open(
    monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    monkeypatch.setattr("serving.repository.repository.ServedModel", None)  # a call of it would fail
    ports = {name: free_port() for name in ("port", "http_port", "admin_port", "metrics_port")}
    name = "port" if purpose == "gRPC" else f"{purpose.lower()}_port"
    with socket.create_server(("127.0.0.1", ports[name])):
        error = refused_start(Server(settings(**ports)))
    flag = name.replace("_", "-")
    assert str(error) == (
        f"port {ports[name]} ({purpose}) cannot be opened on host '127.0.0.1': "
        f"the port is taken (--{flag} chooses another)"
    )
    for port in ports.values():
        socket.create_server(("127.0.0.1", port)).close()


def test_a_start_that_fails_once_a_model_is_loaded_leaves_no_port_open_and_no_model_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fail(server: Server, started: object) -> None:
        assert server.repository.models()
        raise StartError("no more to be had")

    monkeypatch.setattr(Server, "_take_requests", fail)
    ports = {"port": free_port(), "metrics_port": free_port(), "http_port": free_port()}
    path = tmp_path / "socket"
    server, threads = Server(settings(unix_socket=str(path), **ports)), set(threading.enumerate())
    assert str(refused_start(server)) == "no more to be had"
    assert server.repository.models() == []
    for thread in set(threading.enumerate()) - threads:  # of the batcher and of the metrics
        thread.join(20)
        assert not thread.is_alive(), thread.name
    assert not path.exists()
    for port in ports.values():
        socket.create_server(("127.0.0.1", port)).close()


def test_a_start_without_a_model_leaves_no_port_open(tmp_path: Path) -> None:
    ports = {"port": free_port(), "metrics_port": free_port()}
    error = refused_start(Server(settings(models=str(tmp_path), **ports)))
    assert "no model there" in str(error)
    for port in ports.values():
        socket.create_server(("127.0.0.1", port)).close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_host_is_served_with_brackets_and_without(host: str) -> None:
    server = Server(settings(host=host))
    with InThread(server), grpc.insecure_channel(f"[::1]:{server.port}") as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        assert stub.GetModel(pb.GetModelRequest(), timeout=20).model_name == "capsnet-mnist"
        with urllib.request.urlopen(f"http://[::1]:{server.metrics_port}/metrics", timeout=10) as response:
            assert "capsnet_ready 1.0" in response.read().decode()


@pytest.mark.parametrize("library", ["uvloop", "numpy", "onnxruntime"])
def test_ctrl_c_while_the_server_starts_prints_one_line(library: str) -> None:
    command = [sys.executable, "-m", "serving", "--port", "0", "--metrics-port", "0", "--http-port", "-1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=_mind_interrupts)
    loaded, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while library not in loaded.read_text():  # a library with a long import
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    assert "Traceback" not in text
    if "gRPC on" not in text:  # otherwise it had already started
        assert [line for line in text.splitlines() if "stopped before" in line] == text.splitlines()


def test_a_look_at_the_models_that_is_asked_for_too_early_does_not_end_the_server() -> None:
    command = [sys.executable, "-m", "serving", "--port", "0", "--metrics-port", "0", "--http-port", "-1", *PLAN]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    loaded, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "uvloop" not in loaded.read_text():  # it is the first to be imported
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGHUP)
    assert process.stderr
    lines = iter(process.stderr.readline, "")
    assert any("gRPC on" in line for line in lines)
    process.terminate()
    assert process.wait(60) == 0
    process.communicate()


def _mind_interrupts() -> None:
    """Restore the default of SIGINT: a process in the background of a shell starts with it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_error_of_a_missing_model_names_the_existing_ones(tmp_path: Path) -> None:
    assert failed_start("--models", str(tmp_path)) == (
        1,
        f"cannot start: {tmp_path}: no model there (expected NAME/VERSION/manifest.json)\n",
    )
    (tmp_path / "capsnet.pt").touch()
    code, text = failed_start("--models", str(tmp_path))
    assert (code, "a run of the training; its export writes the model" in text) == (1, True)
    code, text = failed_start("--model", "capsnet-norb")
    assert code == 1
    assert "no model 'capsnet-norb'; there is: capsnet-mnist" in text
    code, text = failed_start("--model-version", "77")
    assert code == 1
    assert "no version 77; there is: 1" in text


def test_cuda_that_is_not_there_is_an_error_and_no_silent_fallback() -> None:
    code, text = failed_start("--device", "cuda")
    assert code == 1
    assert "device cuda was asked for, but ONNX Runtime here runs on CPUExecutionProvider" in text


def test_a_wrong_setting_in_the_environment_is_named() -> None:
    code, text = failed_start(CAPSNET_MAX_BATCH="many")
    assert code == 2
    assert "CAPSNET_MAX_BATCH: 'many' is not a number" in text


def test_the_log_names_the_kubernetes_variables_that_the_server_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_PORT", "tcp://10.96.12.7:8001")
    with server_process("--threads", "1", "--runtimes", "1", "--max-batch", "1") as (_, _, lines):
        assert "WARNING passed over" in lines[0]
        assert "CAPSNET_PORT" in lines[0]


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [
        ({"threads": 64, "runtimes": 64}, True),
        ({"threads": 0, "runtimes": 3}, True),
        ({"threads": 3, "runtimes": 0}, True),
        ({"threads": 2, "runtimes": 1}, False),
        ({"threads": 0, "runtimes": 0}, False),
        ({"threads": 64, "runtimes": 64, "device": "cuda"}, False),
    ],
)
def test_more_threads_than_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: dict[str, object], warned: bool
) -> None:
    monkeypatch.setattr("serving.server.usable_cores", lambda: 2)
    with caplog.at_level("WARNING"):
        Server(settings(**chosen)).announce()
    assert (len(caplog.messages) == 1) is warned
    if warned:
        assert "threads on 2 core(s): on a CPU they only hinder each other" in caplog.messages[0]


def test_a_changed_model_file_is_refused_with_both_digests(tmp_path: Path) -> None:
    source = artifact.find(ROOT / "models", "capsnet-mnist")
    copy = tmp_path / "capsnet-mnist" / "1"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = bytearray((copy / artifact.MODEL).read_bytes())
    model[1000] ^= 1
    (copy / artifact.MODEL).write_bytes(model)
    code, text = failed_start("--models", str(tmp_path))
    assert code == 1
    assert f"{copy / artifact.MODEL}: SHA-256 is {artifact.digest(copy / artifact.MODEL)}, manifest.json says" in text
    assert artifact.load(source).sha256() in text


def test_idle_streams_and_health_watches_do_not_hold_up_a_stop(transport: str) -> None:
    with server_process("--transport", transport) as (process, address, _), grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        next(watch)
        leave = threading.Event()

        def requests() -> Iterator[pb.ClassifyStreamRequest]:
            yield pb.ClassifyStreamRequest(id="one", request=pb.ClassifyRequest(images=[DIGIT]))
            leave.wait(60)

        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        stream = stub.ClassifyStream(requests(), timeout=60)
        assert next(stream).response.results[0].label == "7"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        leave.set()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the server is stopping" in str(caught.value.details())
        watch.cancel()


def test_a_second_signal_ends_the_server_at_once() -> None:
    with server_process("--drain-delay", "30") as (process, _, _):
        process.send_signal(signal.SIGTERM)
        assert process.stderr
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("host", "reason"),
    [("203.0.113.7", "the host is not an address of this machine"), ("no.such.host.invalid", "name is not known")],
)
def test_a_wrong_host_is_named(host: str, reason: str) -> None:
    code, text = failed_start("--host", host, "--insecure")
    assert code == 1
    assert f"on host {host!r}" in text
    assert reason in text
    assert "--host chooses another" in text


REFUSALS = ("the server is stopping; send the request to another one", "failed to connect to all addresses")


def test_sigterm_under_load_of_every_kind_fails_no_request_that_was_accepted(transport: str) -> None:
    flags = ("--runtimes", "1", "--threads", "1", "--max-batch", "8", "--transport", transport)
    with server_process(*flags) as (process, address, _):
        answered, failures = asyncio.run(_load_of_every_kind_until_stopped(process, address, transport))
        assert process.wait(20) == 0
    assert min(answered.values()) > 0, "load of each kind was under way"
    assert failures == []


async def _load_of_every_kind_until_stopped(
    process: subprocess.Popen[str], address: str, transport: str
) -> tuple[dict[str, int], list[str]]:
    """Return the answers by kind of client, and all failures except refusals before a request was accepted."""
    answered = {"single": 0, "large": 0, "stream": 0}
    failures: list[str] = []

    def check(kind: str, response: pb.ClassifyResponse, images: int) -> None:
        assert [result.label for result in response.results] == ["7"] * images
        answered[kind] += 1

    def note(kind: str, error: grpc.RpcError) -> None:
        refused = error.code() is grpc.StatusCode.UNAVAILABLE and str(error.details()).startswith(REFUSALS)
        if not refused and not cancelled_by_grpc(error, transport):
            failures.append(f"{kind}: {error.code()} {error.details()}")

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]

        async def unary(kind: str, images: int) -> None:
            while True:
                try:
                    check(kind, await stub.Classify(pb.ClassifyRequest(images=[DIGIT] * images), timeout=20), images)
                except grpc.aio.AioRpcError as error:
                    note(kind, error)
                    return

        def stream() -> None:
            # The threaded client: asyncio's client reports an end during a write as an internal error.
            sent = itertools.count()

            def requests() -> Iterator[pb.ClassifyStreamRequest]:
                while process.poll() is None:
                    request = pb.ClassifyRequest(images=[DIGIT] * 2)
                    yield pb.ClassifyStreamRequest(id=str(next(sent)), request=request)

            with grpc.insecure_channel(address) as channel:
                stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
                expected = itertools.count()
                try:
                    for answer in stub.ClassifyStream(requests(), timeout=60):
                        assert answer.id == str(next(expected)), "in order, and none left out"
                        check("stream", answer.response, 2)
                    failures.append("stream: ended as if all were answered")
                except grpc.RpcError as error:
                    note("stream", error)

        clients = [unary("single", 1) for _ in range(12)] + [unary("large", 200) for _ in range(2)]
        tasks = [asyncio.create_task(client) for client in clients]
        tasks += [asyncio.create_task(asyncio.to_thread(stream)) for _ in range(3)]
        while not all(answered.values()):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    return answered, failures


def test_a_stream_whose_client_has_sent_all_ends_well_during_a_stop(transport: str) -> None:
    with server_process("--transport", transport, "--max-batch", "1", "--runtimes", "1") as (process, address, _):
        with grpc.insecure_channel(address) as channel:
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.ClassifyStreamRequest(request=pb.ClassifyRequest(images=[PIXELS] * 120))
            stream = stub.ClassifyStream(iter([request] * 4), timeout=60)
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert len(list(stream)) == 3
            assert stream.code() is grpc.StatusCode.OK
        assert process.wait(20) == 0


def test_the_time_limit_of_a_drain_holds_even_if_the_model_hangs() -> None:
    go = threading.Event()
    server = Server(settings(max_batch=1, runtimes=1, drain_seconds=0.5, batch_timeout=15.0))

    def hang(arrays: Arrays) -> Arrays:
        go.wait(20)
        raise RuntimeError

    running = InThread(server)
    running.__enter__()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        server.repository.get("", "").classify.batcher._run = hang
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Classify.future(pb.ClassifyRequest(images=[DIGIT]), timeout=30)
        time.sleep(0.3)
        began = time.monotonic()
        running.__exit__()
        took = time.monotonic() - began
        go.set()
        assert call.exception(timeout=5).code() is not grpc.StatusCode.OK
    assert took < 5


def test_a_unix_socket_is_served_beside_the_port_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with server_process("--unix-socket", str(path)) as (process, address, lines):
        assert any(f"gRPC on unix:{path}" in line for line in lines)
        for target in (f"unix:{path}", address):
            with grpc.insecure_channel(target) as channel:
                stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
                assert stub.Classify(pb.ClassifyRequest(images=[DIGIT]), timeout=20).results[0].label == "7"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not path.exists()


def test_a_unix_socket_that_a_killed_server_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with server_process("--unix-socket", str(path)), grpc.insecure_channel(f"unix:{path}") as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        assert stub.GetModel(pb.GetModelRequest(), timeout=20).model_name == "capsnet-mnist"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/socket", "its folder is missing"), ("file", "another server has it"), ("x" * 108, "107")],
    ids=["no folder", "a file", "too long"],
)
def test_a_unix_socket_that_cannot_be_had_is_named_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("precious")
    code, text = failed_start("--unix-socket", str(tmp_path / name))
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("cannot start: ")]
    assert f"unix_socket: {str(tmp_path / name)!r}" in line
    assert reason in line
    assert "Traceback" not in text
    assert (tmp_path / "file").read_text() == "precious"


def test_a_second_server_does_not_take_the_unix_socket_of_a_running_one(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with server_process("--unix-socket", str(path)):
        with pytest.raises(AssertionError, match="another server has it"), server_process("--unix-socket", str(path)):
            pass
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
            assert stub.GetModel(pb.GetModelRequest(), timeout=20).model_name == "capsnet-mnist"


def test_a_repository_that_cannot_be_read_now_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_files() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> None:
        server = Server(settings())
        monkeypatch.setattr(server.repository, "scan", no_files)
        await server._rescan()

    asyncio.run(main())
    [record] = caplog.records
    assert (record.getMessage(), record.exc_info) == (
        f"the model repository could not be read: [Errno {errno.EMFILE}] Too many open files",
        None,
    )


def test_what_clients_send_to_grpcs_own_server_is_not_in_the_log() -> None:
    with server_process("--transport", "grpcio") as (process, address, _):
        host, _, port = address.rpartition(":")
        wrong = frames.frame(
            frames.HEADERS, frames.END_HEADERS, 1, literal(":status", "forged") + literal(":path", "x")
        )
        with socket.create_connection((host, int(port)), 10) as client:
            client.sendall(frames.PREFACE + frames.settings({}) + wrong)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
        process.terminate()
        _, rest = process.communicate(timeout=60)
    lines = [line.split(" INFO ")[-1] for line in rest.splitlines()]
    assert (lines[0], lines[-1], len(lines)) == ("stopping: requests under way finish first", "stopped", 3), rest


def test_an_idle_server_takes_no_time_of_a_processor() -> None:
    with server_process() as (_, address, lines), grpc.insecure_channel(address) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(20):
            stub.Classify(pb.ClassifyRequest(images=[DIGIT] * 8), timeout=20)
        url = re.search(r"http://\S+", lines[-1])
        assert url

        def spent() -> float:
            with urllib.request.urlopen(url[0], timeout=10) as response:
                families = text_string_to_metric_families(response.read().decode())
            return next(one.samples[0].value for one in families if one.name == "process_cpu_seconds")

        spent()
        before = spent()
        time.sleep(2)
        assert spent() - before < 0.06, "3 %, the page itself included"
