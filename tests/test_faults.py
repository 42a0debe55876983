"""Tests of the faults of a machine: a killed server, full disks, jumping clocks, and no files or memory left."""

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from benchmarks.soak.inner_text import inner_text
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.transport.frames import PREFACE, settings
from tests.conftest import DATA, ROOT, Running
from tests.test_lifecycle import PLAN, server_process
from tests.test_repository import until

DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())
PIXELS = pb.Image(pixels=bytes(784))


def label(channel: grpc.Channel, timeout: float = 20) -> str:
    stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
    text: str = stub.Classify(pb.ClassifyRequest(images=[DIGIT]), timeout=timeout).results[0].label
    return text


def label_over(web: http.client.HTTPConnection) -> str:
    """Return the label of the digit over an open connection of HTTP."""
    web.request("POST", "/v1/classify", DIGIT.encoded, {"Content-Type": "image/png"})
    text: str = json.loads(web.getresponse().read())["results"][0]["label"]
    return text


@dataclass(frozen=True)
class Process:
    """A server's process, its ports, and a client that was connected before the fault."""

    process: "subprocess.Popen[str]"
    address: str
    metrics_url: str
    channel: grpc.Channel
    web_port: int = 0

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def limited(self, kind: int, most: int) -> Iterator[None]:
        """Give the process a limit until the block ends."""
        before = resource.prlimit(self.process.pid, kind, (most, resource.prlimit(self.process.pid, kind)[1]))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, kind, before)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A server in a process of its own, which outlives every test that it serves."""
    with (
        server_process("--max-queue", "200000", "--http-port", "0") as (process, address, lines),
        grpc.insecure_channel(address) as channel,
    ):
        assert process.stderr
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        assert label(channel) == "7"
        web = re.search(r"HTTP on \S+:(\d+)", "".join(lines))
        assert web
        yield Process(process, address, lines[-1].rsplit(" ", 1)[1].strip(), channel, int(web[1]))
        assert process.poll() is None


def page(server: Process) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=20) as response:
        text: str = response.read().decode()
    return text


def test_without_free_files_the_server_serves_its_clients_and_does_not_spin(server: Process) -> None:
    used = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    with ExitStack() as stack:
        web = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", server.web_port, timeout=20)))
        assert label_over(web) == "7"
        with server.limited(resource.RLIMIT_NOFILE, used + 9):
            for number in range(40):  # more than can be accepted
                port = server.web_port if number % 2 else server.port
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            began, cpu = time.monotonic(), server.cpu_seconds()
            for _ in range(5):
                assert label(server.channel) == label_over(web) == "7"
                assert "capsnet_ready 1.0" in page(server)
                time.sleep(0.2)
            assert server.cpu_seconds() - cpu < 0.7 * (time.monotonic() - began), "it spins"
        stack.close()
        with grpc.insecure_channel(server.address) as fresh:
            assert label(fresh) == "7"


def test_without_memory_the_server_refuses_and_does_not_die(server: Process) -> None:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    codes = set()
    large = pb.ClassifyRequest(images=[PIXELS] * 1000)
    with server.limited(resource.RLIMIT_DATA, used + 2**21), grpc.insecure_channel(server.address) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        for call in [stub.Classify.future(large, timeout=20) for _ in range(60)]:
            error = call.exception()
            codes.add(error.code() if error else grpc.StatusCode.OK)
            assert not error or not inner_text(error.details())
        assert server.process.poll() is None, "it died"
    # Calls of a connection that the server cannot read on end with UNAVAILABLE.
    refused = {grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    assert codes & refused, "the limit was not reached"
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED, *refused}
    until(lambda: _served(server.channel), "answers after the fault")
    until(lambda: "capsnet_rpcs_in_flight 0.0" in page(server), "the end of all calls")


def test_many_idle_connections_cost_others_nothing(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", running.server.port), 10))
            link.sendall(PREFACE + settings({}))
        assert label(running.channel) == "7"
        with grpc.insecure_channel(running.address) as fresh:
            assert label(fresh) == "7"


#: The server, with a clock that jumps by a year, forward or back, at each look.
JUMPING = """
import itertools, runpy, sys, time

now, jumps = time.time, itertools.cycle((0.0, 31_536_000.0, -31_536_000.0))
time.time = lambda: now() + next(jumps)
sys.argv[0] = "serving"
runpy.run_module("serving", run_name="__main__", alter_sys=True)
"""


def test_jumps_of_the_clock_end_no_call_and_prolong_none() -> None:
    with (
        server_process(program=("-c", JUMPING)) as (process, address, lines),
        grpc.insecure_channel(address) as channel,
    ):
        assert [label(channel) for _ in range(5)] == ["7"] * 5
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        silence = threading.Event()
        waiting = stub.ClassifyStream(iter(silence.wait, None), timeout=0.5)
        with pytest.raises(grpc.RpcError) as caught:
            next(waiting)
        silence.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server = Process(process, address, lines[-1].rsplit(" ", 1)[1].strip(), channel)
        until(lambda: "capsnet_rpcs_in_flight 0.0" in page(server), "the end of the call")
        assert label(channel) == "7"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_killed_server_leaves_its_port_and_socket_to_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    flags = ("--unix-socket", str(path))
    with server_process(*flags) as (process, address, _), grpc.insecure_channel(address) as channel:
        assert label(channel) == "7"
        port = address.rpartition(":")[2]
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        assert path.exists()
        with server_process(*flags, "--port", port) as (_, again, _):
            assert again == address
            until(lambda: _served(channel), "the same client")
            with grpc.insecure_channel(f"unix:{path}") as over_unix:
                assert label(over_unix) == "7"


def _served(channel: grpc.Channel) -> bool:
    try:
        return label(channel) == "7"
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        return False


@pytest.mark.parametrize("format_", ["text", "json"])
def test_a_full_disk_under_the_log_does_not_stop_the_server(format_: str) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "serving",
        f"--port={port}",
        "--metrics-port=0",
        "--http-port=-1",
        *PLAN,
        f"--log-format={format_}",
    ]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=full, cwd=ROOT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(60)
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Classify(pb.ClassifyRequest(), timeout=30)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert label(channel) == "7"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 120)  # 120: Python could not write the last lines
    finally:
        process.kill()
        process.wait()
