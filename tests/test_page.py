"""Tests of the HTTP port of metrics and health: its answers, and its behaviour with slow, silent and many clients."""

import asyncio
import gzip
import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Gauge

from serving.metrics import page as page_module
from serving.metrics.page import Page
from tests.conftest import ROOT, Running
from tests.test_lifecycle import server_process
from tests.test_repository import admin_of, load, unload

PATIENCE = 20.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: status, fields by name in lower case, and body."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())
    finally:
        connection.close()


def raw(port: int, *parts: bytes) -> bytes:
    """Send bytes unchanged, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@dataclass
class Opened:
    """A page with one gauge, ``ours`` 7, and an event loop in the role of the server's."""

    port: int
    loop: asyncio.AbstractEventLoop


@contextmanager
def opened(unready: Callable[[], str] = lambda: "", host: str = "127.0.0.1") -> Iterator[Opened]:
    registry = CollectorRegistry()
    Gauge("ours", "A gauge.", registry=registry).set(7)
    Gauge("other", "Another.", registry=registry).set(8)
    page = Page(registry, unready)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> int:
        return page.open(host, 0)

    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE)
        try:
            yield Opened(port, loop)
        finally:
            page.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with opened() as found:
        yield found.port


def test_metrics_are_on_their_path_alone(running: Running) -> None:
    port = running.server.metrics_port
    assert "\ncapsnet_ready 1.0\n" in ask(port, "/metrics").text
    for path in ("/", "/metric", "/metrics/", "/metrics/x", "/healthz", "/favicon.ico", "//metrics", "/%6detrics"):
        answer = ask(port, path)
        assert answer.status == 404, path
        assert answer.text == "not here; there is: /metrics, /livez, /readyz\n"


def test_a_server_that_takes_requests_is_alive_and_ready(running: Running) -> None:
    port = running.server.metrics_port
    assert [(answer.status, answer.text) for answer in (ask(port, "/livez"), ask(port, "/readyz"))] == [
        (200, "alive\n"),
        (200, "ready\n"),
    ]


def test_a_server_that_drains_is_alive_and_not_ready() -> None:
    with server_process("--drain-delay", "60") as (process, _, lines):
        port = int(lines[-1].rsplit(":", 1)[1].removesuffix("/metrics\n"))
        assert ask(port, "/readyz").status == 200
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        while (answer := ask(port, "/readyz")).status == 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert (answer.status, answer.text) == (503, "not ready: the server is stopping\n")
        assert ask(port, "/livez").status == 200
        assert "\ncapsnet_ready 0.0\n" in ask(port, "/metrics").text


def test_a_server_without_a_model_is_not_ready_until_it_has_one_again(start: Callable[..., Running]) -> None:
    running = start(admin_port=0)
    port = running.server.metrics_port
    with admin_of(running) as admin:
        unload(admin, "capsnet-mnist")
        answer = ask(port, "/readyz")
        assert (answer.status, answer.text) == (503, "not ready: no model is served\n")
        load(admin, "capsnet-mnist")
        assert ask(port, "/readyz").status == 200


def test_why_a_server_is_not_ready_is_said() -> None:
    reasons = ["the server is starting"]
    with opened(lambda: reasons[0]) as found:
        answer = ask(found.port, "/readyz")
        assert (answer.status, answer.text) == (503, "not ready: the server is starting\n")
        assert (ask(found.port, "/livez").status, ask(found.port, "/metrics").status) == (200, 200)
        reasons[0] = ""
        assert ask(found.port, "/readyz").status == 200


def test_a_server_whose_event_loop_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_ALIVE_SECONDS", 0.2)
    go = threading.Event()
    with opened() as found:
        found.loop.call_soon_threadsafe(go.wait, PATIENCE)
        answer = ask(found.port, "/livez")
        assert (answer.status, answer.text) == (503, "not alive: the server has done nothing for 0.2 seconds\n")
        assert ask(found.port, "/metrics").status == 200, "what it shows may say why"
        go.set()
        end = time.monotonic() + PATIENCE
        while ask(found.port, "/livez").status != 200:
            assert time.monotonic() < end


def test_a_head_is_answered_as_a_get_without_the_body(port: int) -> None:
    for path in ("/metrics", "/livez", "/readyz", "/nowhere"):
        get, head = ask(port, path), ask(port, path, "HEAD")
        assert (head.status, head.fields, head.body) == (get.status, get.fields, b"")
        assert int(head.fields["content-length"]) == len(get.body) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get"])
def test_no_other_method_is_taken(port: int, method: str) -> None:
    for path in ("/metrics", "/livez", "/readyz"):
        answer = ask(port, path, method)
        assert (answer.status, answer.fields["allow"]) == (405, "GET, HEAD")
        assert b"ours" not in answer.body


def test_the_answer_to_a_request_with_a_body_arrives(port: int) -> None:
    head = b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n"
    assert raw(port, head, bytes(1_000_000)).startswith(b"HTTP/1.1 405 ")


def test_each_connection_is_closed_after_its_answer(port: int) -> None:
    answer = raw(port, b"GET /livez HTTP/1.1\r\n\r\nGET /livez HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /metrics HTTP/1.0", 200),
        (b"GET http://localhost:8002/metrics HTTP/1.1", 200),
        (b"GET /metrics?x=y HTTP/1.1\r\nHost: x", 200),
        (b"PRI * HTTP/2.0", 505),
        (b"GET /metrics HTTP/3.0", 505),
        (b"GET /metrics", 400),
        (b"GET  /metrics HTTP/1.1", 400),
        (b"GET http://[/metrics HTTP/1.1", 400),
        (b"GET /met\trics HTTP/1.1", 400),
        (b"GET \x01/metrics HTTP/1.1", 400),
        (b"GET /metrics\0 HTTP/1.1", 400),
        (b"GET /\xe4 HTTP/1.1", 400),
        (b"GET x:/metrics HTTP/1.1", 400),
        (b"GET http:/metrics HTTP/1.1", 400),
        (b"GET metrics HTTP/1.1", 400),
        (b"\x16\x03\x01\xff\xff", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: text/plain\rX: y", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: text/plain\r\r\nX: y", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: a\0b", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept : text/plain", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: text/plain\r\n more", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept", 400),
        (b"GET /metrics HTTP/1.1\r\n: x", 400),
        (b"GET /metrics HTTP/1.1\r\nX:\r\nY: \xe4\t", 200),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000, 431),
    ],
)
def test_bytes_that_are_no_request_get_an_error(port: int, head: bytes, status: int) -> None:
    assert raw(port, head, b"\r\n\r\n").startswith(b"HTTP/1.1 %d " % status)


def test_a_grpc_call_on_the_metrics_port_gets_a_helpful_error(port: int) -> None:
    answer = raw(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    assert answer.endswith(b"\r\n\r\nthis port speaks HTTP/1.1, for metrics and health; gRPC has a port of its own\n")


def test_a_head_may_come_in_pieces(port: int) -> None:
    assert raw(port, b"GET /li", b"vez HTTP/1.1\r", b"\n\r", b"\n").endswith(b"\r\n\r\nalive\n")


def test_prometheus_gets_its_format_compressed(port: int) -> None:
    plain = ask(port, "/metrics")
    assert plain.fields["content-type"].startswith("text/plain; version=0.0.4")
    assert b"\nours 7.0\n" in plain.body
    answer = ask(
        port, "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.2", Accept_Encoding="gzip"
    )
    assert answer.fields["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.fields["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body).endswith(b"# EOF\n")


@pytest.mark.parametrize("version", ["abc", "1.x", "-", "1.0.0.0.0"])
def test_a_version_of_a_format_that_is_no_number_is_no_fault_of_the_servers(
    port: int, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(port, "/metrics", accept=f"application/openmetrics-text; version={version}")
    assert (answer.status, "ours 7.0" in answer.text) == (200, True)
    assert not caplog.records


def test_every_interface_is_the_empty_host() -> None:
    with opened(host="") as page:
        assert ask(page.port, "/metrics").status == 200


def test_single_metrics_can_be_asked_for(port: int) -> None:
    answer = ask(port, "/metrics?name[]=ours")
    assert b"ours 7.0" in answer.body
    assert b"other" not in answer.body


def test_a_metric_that_cannot_be_read_is_an_error_that_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    def unready() -> str:
        raise ValueError("a secret")

    with opened(unready) as found:
        answer = ask(found.port, "/readyz")
        assert (answer.status, answer.text) == (500, "internal error; see the server's log\n")
        assert ask(found.port, "/livez").status == 200
    assert "a secret" in caplog.text


def test_ipv6_is_served_with_and_without_brackets() -> None:
    for host in ("::1", "[::1]"):
        with opened(host=host) as found:
            assert ask(found.port, "/livez", host="::1").status == 200


def test_a_port_that_is_taken_cannot_be_opened(port: int) -> None:
    async def open_again() -> None:
        with pytest.raises(OSError, match="in use"):
            Page(CollectorRegistry(), lambda: "").open("127.0.0.1", port)

    asyncio.run(open_again())


def test_silent_clients_hold_up_nobody_and_are_turned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_CONNECTION_SECONDS", 2.0)
    with opened() as found, ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", found.port), timeout=PATIENCE))
            for _ in range(200)
        ]
        for one in silent[::2]:
            one.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        assert b"ours" in ask(found.port, "/metrics").body
        assert [_rest(one) for one in silent] == [b""] * 200


def test_a_crowd_from_one_address_ends_no_connection_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_MAX_CONNECTIONS", 4)
    with opened() as page, ExitStack() as stack:
        probe = stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=PATIENCE))
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", page.port), PATIENCE, ("127.0.0.2", 0)))
            for _ in range(12)
        ]
        assert crowd[0].recv(1) == b"", "the oldest of the crowd is closed"
        probe.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert probe.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_sends_or_reads_slowly_is_turned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_CONNECTION_SECONDS", 0.5)
    with opened() as found, socket.create_connection(("127.0.0.1", found.port), timeout=PATIENCE) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        end = time.monotonic() + PATIENCE
        with pytest.raises(OSError):
            while time.monotonic() < end:
                slow.sendall(b"x")
                time.sleep(0.05)


def test_no_client_keeps_the_port_from_closing() -> None:
    with ExitStack() as stack:
        with opened() as found:
            silent = [socket.create_connection(("127.0.0.1", found.port), timeout=PATIENCE) for _ in range(8)]
            for one in silent:
                stack.enter_context(one)
            assert ask(found.port, "/livez").status == 200
        assert [_rest(one) for one in silent] == [b""] * 8


def _rest(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes the connection."""
    try:
        return b"".join(iter(lambda: connection.recv(4096), b""))
    except ConnectionResetError:
        return b""


#: A page in a process that has opened all files that it may. It prints its port, and its CPU time for each line that it
#: reads.
EXHAUSTED = """
import asyncio, os, resource, sys, time
from serving.metrics.page import Page
from serving.metrics.registry import Metrics

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

async def main():
    page = Page(Metrics().registry, lambda: "")
    print(page.open("127.0.0.1", 0), flush=True)
    await asyncio.to_thread(time.sleep, 0.2)
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        pass
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)

asyncio.run(main())
"""


def test_metrics_can_be_seen_while_no_file_can_be_opened_and_the_port_does_not_spin() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", EXHAUSTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin and process.stdout

    def tell() -> str:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline()

    with process, ExitStack() as stack:
        stack.callback(process.kill)
        port = int(process.stdout.readline())
        before = float(tell())
        for _ in range(3):
            assert "process_open_fds 1" in ask(port, "/metrics").text
        # More connections than it can take. All of them are silent.
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        began = time.monotonic()
        assert ask(port, "/livez").status == 200
        time.sleep(max(0.0, began + 2 - time.monotonic()))
        used, wall = float(tell()) - before, time.monotonic() - began
        assert used < 0.5 * wall, "it spins"
