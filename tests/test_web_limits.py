"""Tests of the HTTP port's limits: size, time, memory and connections; of its drain; and of who may call."""

import asyncio
import base64
import gc
import http.client
import json
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from protos.capsnet.v1 import capsnet_pb2
from serving.access.tokens import TokenEntry, new_token, write_entries
from serving.transport.methods import CallbackMethod, Context, Table, UnaryMethod
from serving.web import body as body_module
from serving.web import connection as connection_module
from serving.web import server as server_module
from serving.web.application import DOCUMENTS
from serving.web.problems import Problem
from serving.web.routes import REFUSED, ROUTES
from tests.certificates import make_all
from tests.conftest import DATA, Running
from tests.raw_client import wait_for
from tests.web_client import PATIENCE, Answer, answer_of, ask, form, sent_over, serving

SEVEN = (DATA / "seven.png").read_bytes()
CLASSIFY = "/capsnet.v1.CapsNetService/Classify"
GET_MODEL = "/capsnet.v1.CapsNetService/GetModel"
Start = Callable[..., Running]


class Waiting:
    """Methods that answer when the test says so: Classify without a task, GetModel with one."""

    def __init__(self) -> None:
        self.asked: list[Context] = []
        self.ended: list[str] = []
        self._proceed = threading.Event()

    @property
    def table(self) -> Table:
        return {CLASSIFY: CallbackMethod(self._begin), GET_MODEL: UnaryMethod(self._answer)}

    def answer(self) -> None:
        self._proceed.set()

    def _begin(self, data: bytes, context: Context) -> None:
        self.asked.append(context)
        context.given_up = lambda: self.ended.append("given up")
        loop = asyncio.get_running_loop()

        def look() -> None:
            if self._proceed.is_set():
                context.answer(b"")
            elif not context.over:
                loop.call_later(0.01, look)

        look()

    async def _answer(self, data: bytes, context: Context) -> bytes:
        self.asked.append(context)
        try:
            while not self._proceed.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        return b""


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


@contextmanager
def sent(port: int, *parts: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


def rest(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join((*lines, *headers, "", "")).encode() + body


def test_a_request_that_is_not_answered_in_time_ends_with_its_handler(waiting: Waiting) -> None:
    with serving(waiting.table) as web:
        for path, data in (("/v1/classify", SEVEN), ("/v1/model", None)):
            answer = ask(web.port, path, data, content_type="image/png", x_request_timeout="0.05")
            assert (answer.status, answer.json["code"]) == (504, "DEADLINE_EXCEEDED")
        wait_for(lambda: len(waiting.ended) == 2)
        assert waiting.ended == ["given up", "cancelled"]
        assert all(one.expired and one.deadline for one in waiting.asked)


def test_a_request_whose_client_goes_ends_with_its_handler(waiting: Waiting) -> None:
    with serving(waiting.table) as web:
        for request in (post("/v1/classify", SEVEN, "Content-Type: image/png"), b"GET /v1/model HTTP/1.0\r\n\r\n"):
            with sent(web.port, request):
                wait_for(lambda: len(waiting.asked) == len(waiting.ended) + 1)
        wait_for(lambda: len(waiting.ended) == 2)
        assert waiting.ended == ["given up", "cancelled"]
        wait_for(lambda: web.requests().get(("/v1/model", "499")) == 1)


def test_a_connection_is_proven_by_an_answered_request(waiting: Waiting) -> None:
    request = post("/v1/classify", SEVEN, "Content-Type: image/png")
    with serving(waiting.table) as web, sent(web.port, request) as client:
        wait_for(lambda: waiting.asked)
        [connection] = web.server._connections
        assert not connection._place.proven
        web.loop.call_soon_threadsafe(waiting.answer)
        assert client.recv(1)
        wait_for(lambda: connection._place.proven)


@pytest.mark.parametrize("with_task", [False, True])
def test_a_request_keeps_no_bytes_while_its_handler_works_with_what_it_has_parsed(with_task: bool) -> None:
    began, proceed = threading.Event(), threading.Event()

    def begin(data: bytes, context: Context) -> None:
        del data
        began.set()
        asyncio.get_running_loop().run_in_executor(None, proceed.wait).add_done_callback(lambda _: context.answer(b""))

    async def answer(data: bytes, context: Context) -> bytes:
        del data
        began.set()
        await asyncio.to_thread(proceed.wait)
        return b""

    method = UnaryMethod(answer) if with_task else CallbackMethod(begin)
    body = SEVEN + bytes(2**20 - len(SEVEN))
    with serving({CLASSIFY: method}) as web, ThreadPoolExecutor(1) as client:
        tracemalloc.start()
        try:
            answered = client.submit(ask, web.port, "/v1/classify", body, content_type="image/png")
            assert began.wait(PATIENCE)
            wait_for(lambda: tracemalloc.get_traced_memory()[0] < len(body) // 2)
        finally:
            tracemalloc.stop()
            proceed.set()
        assert answered.result().status == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(waiting: Waiting) -> None:
    with serving(waiting.table, max_request_bytes=1024) as web:
        with sent(web.port, post("/v1/classify", b"", length=10**9)) as connection:
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
        assert b"max_request_bytes" in answer
        chunked = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with sent(web.port, chunked, b"11000\r\n" + bytes(0x11000) + b"\r\n0\r\n\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert ask(web.port, "/v1/classify", b"1", content_length="x").status == 400
        assert waiting.asked == []
        assert any("max_request_bytes" in one for one in web.refusals)


def test_the_answer_to_a_refused_request_comes_although_its_body_is_not_wanted(waiting: Waiting) -> None:
    with serving(waiting.table) as web:
        connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=PATIENCE)
        with closing(connection):
            for _ in range(2):  # on the same connection
                connection.request("POST", "/nothing", bytes(500_000))
                assert answer_of(connection).status == 404


def test_requests_without_room_for_their_bodies_are_told_to_come_again(waiting: Waiting) -> None:
    body, kind = form(("image", bytes(40_000)))
    with serving(waiting.table, max_bytes_under_way=2**16) as web:
        with sent(web.port, post("/v1/classify", body, f"Content-Type: {kind}")) as connection:
            wait_for(lambda: waiting.asked != [])
            refused: Answer | None = None
            while not refused:
                # A busy machine takes more than a turn to read it. Then there is no room for what waits, either.
                with suppress(http.client.RemoteDisconnected, ConnectionError):
                    refused = ask(web.port, "/v1/classify", body, content_type=kind)
            assert (refused.status, refused.fields["retry-after"]) == (429, "1")
            assert "max_bytes_under_way" in refused.json["detail"]
            waiting.answer()
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert ask(web.port, "/v1/classify", body, content_type=kind).status == 200, "the room is free again"


def test_a_request_under_way_gives_its_room_to_others_that_need_it_more(waiting: Waiting) -> None:
    body, kind = form(("image", bytes(40_000)))
    with serving(waiting.table, max_bytes_under_way=2**16) as web:
        with sent(web.port, post("/v1/classify", body, f"Content-Type: {kind}", "Connection: close")) as connection:
            wait_for(lambda: waiting.asked != [])
            web.loop.call_soon_threadsafe(web.memory.limit, 30_000)  # as while images are decoded
            answer = rest(connection)
            assert answer.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in answer.lower()
            assert b"the limit is 30000 bytes (max_bytes_under_way)" in answer
        assert waiting.ended == ["given up"]
        assert web.memory.used == 0
        web.loop.call_soon_threadsafe(web.memory.limit, 2**16)
        waiting.answer()
        assert ask(web.port, "/v1/classify", body, content_type=kind).status == 200


def test_a_refused_request_goes_without_the_garbage_collector(waiting: Waiting, no_collection: None) -> None:
    """Its error would otherwise keep the frames in which it was raised, and all that the body has become in memory."""
    bodies = [b'{"images": [%b1]}' % (b'"aa",' * count) for count in (10, 10_000)]  # the second one in a thread

    def problems() -> int:
        return sum(issubclass(type(one), Problem) for one in gc.get_objects())  # isinstance would follow weak proxies

    before = problems()  # of other tests
    with serving(waiting.table) as web:
        for body in bodies:
            assert ask(web.port, "/v1/classify", body, content_type="application/json").status == 400
        wait_for(lambda: problems() <= before)


def test_a_body_that_comes_too_slowly_is_given_up(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_SECONDS", 0.1)
    with serving(waiting.table) as web:
        with sent(web.port, post("/v1/classify", b"1", length=100)) as connection:
            assert b"HTTP/1.1 408" in rest(connection)
        with sent(web.port, post("/v1/classify", b"1", "x-request-timeout: 0.01", length=100)) as connection:
            assert b"HTTP/1.1 504" in rest(connection)


def test_headers_that_come_too_slowly_end_their_connection(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(server_module, "_CHECK_SECONDS", 0.02)
    waiting.answer()
    with serving(waiting.table) as web:
        for part in (b"", b"GET /v1/model HT"):
            with sent(web.port, part) as connection, pytest.raises(ConnectionError):
                assert rest(connection) == b""
                raise ConnectionError
        kept = http.client.HTTPConnection("127.0.0.1", web.port, timeout=PATIENCE)
        with closing(kept):
            kept.request("GET", "/v1/model")
            assert answer_of(kept).status == 200
            time.sleep(0.3)
            kept.request("GET", "/v1/model")
            assert answer_of(kept).status == 200, "between requests there is more time"


def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(server_module, "_CHECK_SECONDS", 0.02)
    large: bytes = capsnet_pb2.GetModelResponse(dataset="x" * 30_000_000).SerializeToString()

    async def answer(data: bytes, context: Context) -> bytes:
        return large

    with serving({GET_MODEL: UnaryMethod(answer)}) as web, sent(web.port, b"GET /v1/model HTTP/1.0\r\n\r\n"):
        wait_for(lambda: "unread" in web.refusals)
        wait_for(lambda: web.server.connections == 0)


def test_idle_connections_are_closed(waiting: Waiting) -> None:
    waiting.answer()
    with (
        serving(waiting.table, idle_seconds=1.0) as web,
        sent(web.port, b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\n\r\n") as kept,
    ):
        assert rest(kept).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 20_000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x:\r\n" * 130 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_bytes_that_are_no_request_get_a_problem_and_the_connection_ends(
    waiting: Waiting, request_bytes: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(waiting.table) as web:
        with sent(web.port, request_bytes) as connection:
            head, _, text = rest(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status) and json.loads(text)["status"] == status
        assert web.requests() == {("", str(status)): 1}
    assert caplog.records == []


def test_a_broken_body_ends_its_request_and_leaves_no_traceback(
    waiting: Waiting, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(waiting.table) as web:
        with sent(web.port, head, b"5\r\nabc") as connection:
            time.sleep(0.05)
            connection.sendall(b"de zz\r\nno chunk\r\n")
            assert b"200" not in rest(connection)
        wait_for(lambda: web.server.connections == 0)
    assert caplog.records == []


def test_connections_beyond_the_limit_are_closed(waiting: Waiting) -> None:
    with serving(waiting.table, connections=2) as web, sent(web.port), sent(web.port):
        wait_for(lambda: web.server.connections == 2)
        with sent(web.port) as third, pytest.raises(ConnectionError):
            assert rest(third) == b""
            raise ConnectionError
        assert web.refusals == ["full"]


def test_requests_under_way_finish_in_a_drain_and_later_ones_are_refused(waiting: Waiting) -> None:
    with serving(waiting.table) as web:
        kept = http.client.HTTPConnection("127.0.0.1", web.port, timeout=PATIENCE)
        with (
            closing(kept),
            sent(web.port, post("/v1/classify", SEVEN, "Content-Type: image/png")) as busy,
            sent(web.port, b"GET /v1/mod") as begun,
            sent(web.port) as silent,
        ):
            wait_for(lambda: waiting.asked != [] and web.server.connections == 3)
            web.loop.call_soon_threadsafe(web.server.drain)
            assert rest(silent) == b"", "a connection without a request is closed"
            begun.sendall(b"el HTTP/1.1\r\nHost: localhost\r\n\r\n")
            refused = rest(begun)
            assert refused.startswith(b"HTTP/1.1 503") and b"connection: close" in refused
            with pytest.raises(OSError):
                kept.connect()
            waiting.answer()
            answered = rest(busy)
            assert answered.startswith(b"HTTP/1.1 200") and b"connection: close" in answered


def test_a_stop_of_the_server_answers_what_is_under_way(start: Start) -> None:
    running = start(http_port=0, max_batch=1, runtimes=1)
    body = json.dumps({"images": [{"encoded": base64.b64encode(SEVEN).decode()}] * 300})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, running.server.http_port, "/v1/classify", body, content_type="application/json")
        wait_for(lambda: running.server._edge.under_way == 1)
        running.stop()
        answer = call.result(PATIENCE)
    assert answer.status == 200 and len(answer.json["results"]) == 300
    assert answer.fields["connection"] == "close"


def test_the_server_stops_with_requests_that_never_end(waiting: Waiting, start: Start) -> None:
    running = start(http_port=0, drain_seconds=0.2)
    with sent(running.server.http_port, post("/v1/classify", b"", length=100)) as stuck:
        wait_for(lambda: running.server._web is not None and running.server._web.connections == 1)
        running.stop()
        running.thread.__exit__()
        with pytest.raises(ConnectionError):
            assert rest(stuck) == b""
            raise ConnectionError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return tokens by their role, and the token file as ``file``."""
    made = {role: new_token(role) for role in ("predict", "metrics")}
    file = tmp_path_factory.mktemp("tokens") / "tokens.json"
    write_entries(file, [TokenEntry(role, (role,), hash_) for role, (_, hash_) in made.items()])
    return {"file": str(file), **{role: token for role, (token, _) in made.items()}}


def test_a_caller_without_a_token_gets_nothing_on_any_path_but_health_and_files(
    start: Start, tokens: dict[str, str]
) -> None:
    running = start(http_port=0, tokens=tokens["file"], client_calls=5)
    port = running.server.http_port
    paths = [(one.path.format(name="capsnet-mnist", version="1"), one.verb, one.method) for one in ROUTES]
    paths += [(path, "GET", method) for path, method, _ in DOCUMENTS]
    paths += [(path.format(name="a", region="b"), verb, method) for path, method in REFUSED for verb in ("GET", "POST")]
    assert len(paths) > 50
    for path, verb, method in paths:
        body = SEVEN if verb == "POST" else None
        missing = method not in running.server._methods
        for token in ("", f"Bearer mallory.{path}", f"Basic {tokens['predict']}", f"Bearer {tokens['predict'][:-1]}"):
            answer = ask(port, path, body, **({"authorization": token} if token else {}))
            assert answer.status == (501 if missing else 401), path
            assert missing or answer.fields["www-authenticate"] == "Bearer"
            assert answer.fields["content-type"] == "application/problem+json"
        assert missing or ask(port, path, body, authorization=f"Bearer {tokens['metrics']}").status == 403, path
        allowed = ask(port, path, body, authorization=f"Bearer {tokens['predict']}").status
        assert (allowed == 501) if missing else (allowed not in (401, 403)), path
    for path in ("/v2/health/live", "/v2/health/ready", "/documentation.css"):
        assert ask(port, path).status == 200
    assert ask(port, "/nothing").status == 404
    assert running.server._edge.under_way == 0


def test_the_limits_of_a_client_hold_over_http(start: Start) -> None:
    running = start(http_port=0, client_rate=1.0)
    statuses = [ask(running.server.http_port, "/v1/model").status for _ in range(10)]
    assert 200 in statuses and 429 in statuses


def test_certificates_encrypt_and_name_the_client(start: Start, tmp_path: Path) -> None:
    make_all(tmp_path)
    files = {"tls_cert": str(tmp_path / "server.pem"), "tls_key": str(tmp_path / "server.key")}
    running = start(http_port=0, tls_client_ca=str(tmp_path / "ca.pem"), **files)
    port = running.server.http_port

    def over(tls: ssl.SSLContext, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=tls)
        return sent_over(connection, path, body, **headers)

    plain = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    assert over(plain, "/v2/health/live").status == 200
    refused = over(plain, "/v1/model")
    assert (refused.status, "certificate" in refused.json["detail"]) == (401, True)
    known = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    known.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
    known.set_alpn_protocols(["h2", "http/1.1"])
    answer = over(known, "/v1/classify", SEVEN, content_type="image/png")
    assert answer.json["results"][0]["label"] == "7"
    with pytest.raises(OSError):
        ask(port, "/v2/health/live")
    wait_for(lambda: running.server.metrics.handshakes.labels("no_tls").value == 1)


def test_a_full_queue_tells_when_to_come_again(start: Start) -> None:
    from serving.errors import QueueFull

    def full(model: object) -> None:
        batcher = model.classify.batcher  # type: ignore[attr-defined]

        def refuse(*_: object, **__: object) -> None:
            raise QueueFull("the queue is full", 2.5)

        batcher.enqueue = refuse

    running = start(full, http_port=0)
    answer = ask(running.server.http_port, "/v1/classify", SEVEN, content_type="image/png")
    assert (answer.status, answer.fields["retry-after"], answer.json["code"]) == (429, "3", "RESOURCE_EXHAUSTED")
