"""Three servers as processes, behind a client that balances and behind HAProxy, while one is killed or stopped."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from tests.conftest import DATA, ROOT
from tests.test_lifecycle import cancelled_by_grpc

REQUEST = pb.ClassifyRequest(images=[pb.Image(encoded=(DATA / "seven.png").read_bytes())])
SERVICE_CONFIG = json.loads((ROOT / "deploy" / "kubernetes" / "client-service-config.json").read_text())
HAPROXY = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
CALLERS = 12
PAUSE_SECONDS = 0.02  # of a caller between two calls: so many calls a second that some are in flight at any moment
FLAGS = [
    "--port=0",
    "--metrics-port=0",
    "--http-port=-1",
    "--model=capsnet-mnist",
    "--threads=1",
    "--runtimes=1",
    "--max-batch=4",
    "--poll-seconds=0",
]

needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")


@dataclass(frozen=True)
class Member:
    """One of the servers."""

    process: subprocess.Popen[str]
    address: str
    metrics_url: str


def _answered(page: str) -> int:
    """Return the number of Classify calls on a metrics page."""
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "grpc_server_handled_total"
        and (sample.labels["grpc_method"], sample.labels["grpc_code"]) == ("Classify", "OK")
    )


def _page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
    return text


@contextmanager
def _members(count: int, transport: str, drain_delay: float = 1.5) -> Iterator[list[Member]]:
    command = [sys.executable, "-m", "serving", *FLAGS, f"--transport={transport}", f"--drain-delay={drain_delay}"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(count)]
    try:
        yield [_member(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _member(process: subprocess.Popen[str]) -> Member:
    assert process.stderr
    for line in process.stderr:
        if match := re.search(r"gRPC on (\S+), metrics on (\S+)", line):
            return Member(process, match[1], match[2])
    raise AssertionError("the server ended")


@pytest.fixture(scope="module")
def three(transport: str) -> Iterator[list[Member]]:
    """Three servers of each transport in turn for all tests that end none of them."""
    with _members(3, transport) as members:
        yield members


@pytest.fixture
def survivors(three: list[Member]) -> list[Member]:
    """Two of the servers, for a test that starts its own third one."""
    return three[:2]


@pytest.fixture
def victim(transport: str) -> Iterator[Member]:
    with _members(1, transport) as (member,):
        yield member


@dataclass
class Outcome:
    """The callers' results. answered_after: the calls answered after the victim had gone."""

    answered: int = 0
    answered_after: int = 0
    failures: list[grpc.aio.AioRpcError] = field(default_factory=list)


async def _call(target: str, options: list[tuple[str, Any]], disturb: Callable[[], object]) -> Outcome:
    """Let callers each send one request after the other, before and after an action that is awaited."""
    outcome = Outcome()
    stopping = asyncio.Event()

    async def caller(stub: CapsNetServiceStub) -> None:
        while not stopping.is_set():
            try:
                response = await stub.Classify(REQUEST, timeout=10)
            except grpc.aio.AioRpcError as error:
                outcome.failures.append(error)
                # gRPC's client notices the end of a connection a moment later, and would send the next call there too.
                await asyncio.sleep(0.02)
            else:
                assert response.results[0].label == "7"
                outcome.answered += 1
                await asyncio.sleep(PAUSE_SECONDS)

    async with grpc.aio.insecure_channel(
        target, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1), *options]
    ) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        callers = [asyncio.create_task(caller(stub)) for _ in range(CALLERS)]
        await asyncio.sleep(0.4)
        await asyncio.to_thread(disturb)
        before = outcome.answered
        await asyncio.sleep(0.4)
        stopping.set()
        await asyncio.gather(*callers)
    outcome.answered_after = outcome.answered - before
    return outcome


def _of_client(members: list[Member], retries: bool) -> tuple[str, list[tuple[str, Any]]]:
    """Return the target and options of a client with the service config, or with the config without retries."""
    target = "ipv4:" + ",".join(member.address for member in members)
    config = {name: value for name, value in SERVICE_CONFIG.items() if retries or name != "methodConfig"}
    return target, [("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", int(retries))]


def _balanced(members: list[Member], disturb: Callable[[], object], retries: bool) -> Outcome:
    return asyncio.run(_call(*_of_client(members, retries), disturb))


def _end(member: Member, number: signal.Signals) -> Callable[[], object]:
    def end() -> None:
        member.process.send_signal(number)
        member.process.wait(20)

    return end


def _counts(members: list[Member]) -> list[int]:
    return [_answered(_page(member.metrics_url)) for member in members]


async def _shares(target: str, options: list[tuple[str, Any]], members: list[Member], calls: int) -> list[int]:
    """Return the number of calls that each server answers, once a client is connected to all of them.

    The calls are counted while none is in flight, so a slow machine does no harm. Raises the error of a call.
    """

    async def send(stub: CapsNetServiceStub, count: int) -> None:
        async def caller() -> None:
            for _ in range(count // CALLERS):
                assert (await stub.Classify(REQUEST, timeout=20)).results[0].label == "7"

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async with grpc.aio.insecure_channel(
        target, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1), *options]
    ) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        unconnected = await asyncio.to_thread(_counts, members)
        deadline = time.monotonic() + 20
        while True:
            await send(stub, CALLERS)
            before = await asyncio.to_thread(_counts, members)
            if all(now > then for now, then in zip(before, unconnected, strict=True)):
                break
            assert time.monotonic() < deadline, "a server gets no calls"
        await send(stub, calls)
        after = await asyncio.to_thread(_counts, members)
    return [now - then for now, then in zip(after, before, strict=True)]


def _assert_even(counts: list[int], tolerance: float) -> None:
    mean = sum(counts) / len(counts)
    assert all(abs(count - mean) <= tolerance * mean for count in counts), counts


def test_a_client_with_the_service_config_sends_each_server_its_share(three: list[Member]) -> None:
    counts = asyncio.run(_shares(*_of_client(three, retries=False), three, calls=300))
    assert sum(counts) == 300
    _assert_even(counts, 0.2)


def test_a_server_killed_under_load_fails_no_call_of_clients_that_retry(
    survivors: list[Member], victim: Member
) -> None:
    outcome = _balanced([*survivors, victim], _end(victim, signal.SIGKILL), retries=True)
    assert not outcome.failures
    assert outcome.answered_after > 0


def test_a_server_killed_under_load_fails_only_its_calls_in_flight_if_clients_do_not_retry(
    survivors: list[Member], victim: Member
) -> None:
    outcome = _balanced([*survivors, victim], _end(victim, signal.SIGKILL), retries=False)
    assert len(outcome.failures) <= CALLERS
    assert {error.code() for error in outcome.failures} <= {grpc.StatusCode.UNAVAILABLE}
    assert outcome.answered_after > 0


def test_a_server_stopped_under_load_fails_no_call_of_clients_that_watch_its_health_and_do_not_retry(
    survivors: list[Member], victim: Member
) -> None:
    outcome = _balanced([*survivors, victim], _end(victim, signal.SIGTERM), retries=False)
    assert victim.process.returncode == 0
    assert not outcome.failures
    assert outcome.answered_after > 0


def test_a_server_stopped_without_delay_fails_no_sent_call_of_clients_that_neither_watch_nor_retry(
    survivors: list[Member], transport: str
) -> None:
    with _members(1, transport, drain_delay=0) as (victim,):
        target = "ipv4:" + ",".join(member.address for member in (*survivors, victim))
        config = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
        options = [("grpc.service_config", config), ("grpc.enable_retries", 0)]
        outcome = asyncio.run(_call(target, options, _end(victim, signal.SIGTERM)))
        assert victim.process.returncode == 0
    # Sometimes grpc's client gives a connection a call just when it learns that this connection takes no new calls. It
    # does not send the call, and without retries the call fails (cancel_unstarted_streams in chttp2_transport.cc).
    others = [error for error in outcome.failures if "GOAWAY received" not in str(error.details())]
    assert [error.details() for error in others if not cancelled_by_grpc(error, transport)] == []
    assert len(outcome.failures) <= CALLERS
    assert outcome.answered_after > 0


@contextmanager
def _haproxy(members: list[Member]) -> Iterator[tuple[str, str]]:
    """Run HAProxy with the repository's configuration. Yield its gRPC address and the address of its metrics."""
    assert HAPROXY
    with socket.create_server(("127.0.0.1", 0)) as grpc_socket, socket.create_server(("127.0.0.1", 0)) as http_socket:
        sockets = {"LISTEN": grpc_socket, "METRICS_LISTEN": http_socket}
        environment = {name: f"fd@{one.fileno()}" for name, one in sockets.items()}
        environment |= {f"SERVER_{number}": member.address for number, member in enumerate(members, 1)}
        process = subprocess.Popen(
            [HAPROXY, "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")],
            env=os.environ | environment,
            pass_fds=[one.fileno() for one in sockets.values()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            port, metrics_port = (one.getsockname()[1] for one in sockets.values())
            yield f"ipv4:127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
            assert process.poll() is None, process.communicate()[0]
        finally:
            process.kill()
            process.communicate()


def _proxied(target: str, disturb: Callable[[], object]) -> Outcome:
    """Return the answers to a client that knows one address and does not retry."""
    return asyncio.run(_call(target, [("grpc.enable_retries", 0)], disturb))


def _servers_up(metrics_url: str) -> list[str]:
    return re.findall(r'haproxy_server_status\{proxy="servers",server="(\w+)",state="UP"\} 1', _page(metrics_url))


@needs_haproxy
def test_haproxy_spreads_the_calls_of_one_connection_over_all_servers(three: list[Member]) -> None:
    with _haproxy(three) as (target, _):
        counts = asyncio.run(_shares(target, [("grpc.enable_retries", 0)], three, calls=600))
    assert sum(counts) == 600
    _assert_even(counts, 0.5)  # a server that is slower for a while gets fewer


@needs_haproxy
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_server_ended_under_load_behind_haproxy_costs_nothing_though_clients_do_not_retry(
    survivors: list[Member], victim: Member, number: signal.Signals
) -> None:
    with _haproxy([*survivors, victim]) as (target, metrics_url):
        outcome = _proxied(target, _end(victim, number))
        deadline = time.monotonic() + 10
        while (up := _servers_up(metrics_url)) != ["one", "two"]:
            assert time.monotonic() < deadline, up
            time.sleep(0.05)
    assert not outcome.failures
    assert outcome.answered_after > 0
