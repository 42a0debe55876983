"""Tests of a server that lets in only clients that may call: every method and page, on both transports."""

import contextlib
import http.client
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.capsnet.v1 import capsnet_pb2
from protos.inference import inference_pb2
from serving.access.tokens import TokenEntry, new_token, write_entries
from serving.client.errors import AccessDenied, Unavailable
from serving.client.sync import CapsNetClient
from serving.logs import FIELDS
from serving.transport import frames
from serving.transport.frames import PREFACE, settings
from serving.transport.headers import Metadata
from serving.transport.methods import UNDECIDED_TEXT
from serving.transport.records import Records
from tests.certificates import make_all, make_certificate
from tests.conftest import ROOT, Digits, Running
from tests.raw_client import wait_for

GET_MODEL = "/capsnet.v1.CapsNetService/GetModel"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
HEALTH_PAGES = ("/livez", "/readyz")
Start = Callable[..., Running]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("access")
    make_all(path)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Return tokens by their role, and the token file as ``file``."""
    made = {role: new_token(role) for role in ("predict", "admin", "metrics")}
    file = tmp_path / "tokens.json"
    write_entries(file, [TokenEntry(role, (role,), hash_) for role, (_, hash_) in made.items()])
    return {"file": str(file), **{role: token for role, (token, _) in made.items()}}


def tls(folder: Path, client_ca: bool = False) -> dict[str, str]:
    chosen = {"tls_cert": str(folder / "server.pem"), "tls_key": str(folder / "server.key")}
    return {**chosen, "tls_client_ca": str(folder / "ca.pem")} if client_ca else chosen


def methods(running: Running, port: str = "_grpc") -> dict[str, bool]:
    """Return the path of every method of the port, and whether it streams."""
    server: Any = getattr(running.server, port)
    table = server._methods if hasattr(server, "_methods") else server._handlers._handlers
    return {path: "Stream" in path or path.endswith(("Watch", "ServerReflectionInfo")) for path in table}


def routes(port: int) -> list[str]:
    """Return the path of every page of the HTTP port, which the answer to another path tells."""
    status, text = ask(port, "/none")
    assert status == 404
    return text.strip().removeprefix("not here; there is: ").split(", ")


def unary(channel: grpc.Channel, path: str, metadata: Metadata = ()) -> bytes:
    """Call a unary method with an empty message."""
    answer: bytes = channel.unary_unary(path, bytes, bytes)(b"", metadata=metadata, timeout=20)
    return answer


def code_of(channel: grpc.Channel, path: str, streams: bool, token: str = "") -> grpc.StatusCode:
    """Call a method with an empty message, and return its status, OK at its first answer."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    try:
        if streams:
            answers: Any = channel.stream_stream(path, bytes, bytes)(iter([b""]), metadata=metadata, timeout=20)
            next(answers, None)
            answers.cancel()
        else:
            unary(channel, path, metadata)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def ask(port: int, path: str, folder: Path | None = None, token: str = "", certificate: str = "") -> tuple[int, str]:
    connection: http.client.HTTPConnection
    if folder:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        if certificate:
            context.load_cert_chain(folder / f"{certificate}.pem", folder / f"{certificate}.key")
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_no_method_answers_without_a_token_or_with_one_of_another_role(
    start: Start, tokens: dict[str, str], transport: str
) -> None:
    running = start(transport=transport, tokens=tokens["file"], admin_port=0)
    denied = grpc.StatusCode.UNAUTHENTICATED
    paths = methods(running)
    assert len(paths) > 12
    for path, streams in paths.items():
        if path.startswith(HEALTH):
            assert code_of(running.channel, path, streams) is grpc.StatusCode.OK
            continue
        for wrong in ("", "predict.x", "mallory.x", tokens["predict"][:-1]):
            assert code_of(running.channel, path, streams, wrong) is denied, path
        for wrong in ("metrics", "admin"):
            assert code_of(running.channel, path, streams, tokens[wrong]) is grpc.StatusCode.PERMISSION_DENIED, path
        assert code_of(running.channel, path, streams, tokens["predict"]) not in (
            denied, grpc.StatusCode.PERMISSION_DENIED,
        ), path  # fmt: skip
    admin = methods(running, "_admin")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    of_admin = {
        "RepositoryIndex": grpc.StatusCode.OK, "RepositoryModelLoad": invalid, "RepositoryModelUnload": invalid,
    }  # fmt: skip
    assert {path.rpartition("/")[2] for path in admin} >= of_admin.keys()
    with grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel:
        for path, streams in admin.items():
            for wrong in ("", "admin.x", "mallory.x"):
                assert code_of(channel, path, streams, wrong) is denied, path
            for wrong in ("predict", "metrics"):
                assert code_of(channel, path, streams, tokens[wrong]) is grpc.StatusCode.PERMISSION_DENIED, path
            expected = of_admin.get(path.rpartition("/")[2], grpc.StatusCode.UNIMPLEMENTED)
            assert code_of(channel, path, streams, tokens["admin"]) is expected, path
    port = running.server.metrics_port
    pages = routes(port)
    assert {"/metrics", "/livez", "/readyz"} <= set(pages)
    for path in pages:
        assert ask(port, path)[0] == (200 if path in HEALTH_PAGES else 401), path
    assert ask(port, "/metrics", token="metrics.x")[0] == 401
    assert ask(port, "/metrics", token=tokens["predict"])[0] == 403
    status, page = ask(port, "/metrics", token=tokens["metrics"])
    assert status == 200
    assert ask(port, "/livez")[0] == ask(port, "/readyz")[0] == 200
    refused, of_pages = (
        {
            sample.labels["reason"]: sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name
        }
        for name in ("capsnet_refused_total", "capsnet_http_denied_total")
    )
    assert of_pages == {"unauthenticated": 2, "forbidden": 1, "client_limit": 0}
    assert refused["unauthenticated"] >= 4 * (len(paths) - 3)
    assert refused["forbidden"] >= 2 * (len(paths) - 3)
    assert running.server._edge.under_way == 0


def test_each_method_of_the_protocols_is_served_and_denied_without_a_certificate(
    start: Start, tmp_path: Path, folder: Path, transport: str
) -> None:
    path = tmp_path / "socket"
    running = start(transport=transport, unix_socket=str(path), admin_port=0, **tls(folder, client_ca=True))
    here = methods(running)
    declared = {
        f"/{service.full_name}/{method.name}"
        for file in (capsnet_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert declared <= here.keys() | methods(running, "_admin").keys()
    with grpc.insecure_channel(f"unix:{path}") as channel:  # the ports end such a client's handshake
        for method, streams in here.items():
            expected = grpc.StatusCode.OK if method.startswith(HEALTH) else grpc.StatusCode.UNAUTHENTICATED
            assert code_of(channel, method, streams) is expected, method


def test_clients_with_a_token_are_served_over_tls_and_streams_too(
    start: Start, tokens: dict[str, str], folder: Path, digits: Digits, transport: str
) -> None:
    running = start(transport=transport, tokens=tokens["file"], **tls(folder))
    with CapsNetClient(running.address, tls=folder / "ca.pem", token=tokens["predict"]) as client:
        assert [one.class_index for one in client.classify(digits.images[:20])] == digits.labels[:20].tolist()
        streamed = list(client.classify_stream(iter(digits.images[:100])))
        assert sum(one.class_index == label for one, label in zip(streamed, digits.labels, strict=False)) >= 99
    status, text = ask(running.server.metrics_port, "/metrics", folder, tokens["metrics"])
    assert status == 200
    if transport == "native":
        assert 'capsnet_tls_handshakes_total{result="ok"} 1.0' in text


def test_mutual_tls_knows_clients_by_their_certificates(start: Start, folder: Path, transport: str) -> None:
    running = start(transport=transport, **tls(folder, client_ca=True))
    pair = (folder / "client.pem", folder / "client.key")
    with CapsNetClient(running.address, tls=folder / "ca.pem", client_certificate=pair) as client:
        assert client.get_model().name == "capsnet-mnist"
    make_certificate(folder, "stranger", authority="other")
    for certificate in (None, (folder / "stranger.pem", folder / "stranger.key")):
        with (
            CapsNetClient(
                running.address, tls=folder / "ca.pem", client_certificate=certificate, retries=0, timeout=5
            ) as client,
            pytest.raises(Unavailable, match="no server answers there"),
        ):
            client.get_model()
    port = running.server.metrics_port
    assert ask(port, "/readyz", folder)[0] == 200
    assert ask(port, "/metrics", folder)[0] == 401
    assert ask(port, "/metrics", folder, certificate="client")[0] == 200


def test_a_renewed_certificate_serves_new_connections_and_drops_no_open_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr("serving.access.files._CHECK_SECONDS", 0)
    make_all(tmp_path)
    running = start(transport=transport, **tls(tmp_path))
    old_root = (tmp_path / "ca.pem").read_bytes()
    with CapsNetClient(running.address, tls=old_root, retries=0) as old:
        old.get_model()
        make_all(tmp_path)
        with CapsNetClient(running.address, tls=tmp_path / "ca.pem") as new:
            new.get_model(refresh=True)
        old.get_model(refresh=True)
        with (
            CapsNetClient(running.address, tls=old_root, retries=0, timeout=5) as late,
            pytest.raises(Unavailable, match="TLS fails there"),
        ):
            late.get_model()


@pytest.mark.parametrize(
    "hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"\x00" * 200, b"x" * 9000]
)
def test_what_is_no_handshake_is_cut_off_and_harms_nobody(
    start: Start, folder: Path, hello: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.transport.handshakes.HANDSHAKE_SECONDS", 2.0)
    running = start(**tls(folder))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", running.server.port))) for _ in range(30)]
        for one in opened:
            one.sendall(hello)
        with CapsNetClient(running.address, tls=folder / "ca.pem") as client:
            assert client.get_model().name == "capsnet-mnist"
        if hello:
            for one in opened:
                one.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    while one.recv(4096):
                        pass


def test_old_versions_of_tls_and_other_protocols_are_refused(start: Start, folder: Path) -> None:
    running = start(**tls(folder))

    def shake(minimum: ssl.TLSVersion, maximum: ssl.TLSVersion, protocols: list[str]) -> str | None:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.minimum_version, context.maximum_version = minimum, maximum
        context.set_alpn_protocols(protocols)
        with (
            socket.create_connection(("127.0.0.1", running.server.port), 20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            secured.sendall(PREFACE + settings({}))
            assert secured.recv(9) if protocols == ["h2"] else not secured.recv(9)
            cipher = secured.cipher()
            return cipher[0] if cipher else None

    new = ssl.TLSVersion.TLSv1_3
    assert shake(new, new, ["h2"])
    assert "GCM" in (shake(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2, ["h2"]) or "")
    with contextlib.suppress(ConnectionResetError):
        shake(new, new, ["http/1.1"])
    with pytest.warns(DeprecationWarning), pytest.raises((ssl.SSLError, OSError)):
        shake(ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ["h2"])


def test_too_many_handshakes_end_the_oldest_and_not_the_newest(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.transport.handshakes._MAX_HANDSHAKES", 4)
    running = start(**tls(folder))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", running.server.port))) for _ in range(12)]
        with CapsNetClient(running.address, tls=folder / "ca.pem") as client:
            assert client.get_model().name == "capsnet-mnist"
        silent[0].settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""
    assert running.server.metrics.handshakes.labels("crowded").value >= 8


def test_a_crowd_of_handshakes_from_one_address_ends_none_of_another(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.transport.handshakes._MAX_HANDSHAKES", 4)
    running = start(**tls(folder))
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.set_alpn_protocols(["h2"])
    with contextlib.ExitStack() as stack:
        honest = stack.enter_context(socket.create_connection(("127.0.0.1", running.server.port), 20))
        address = ("127.0.0.1", running.server.port)
        crowd = [stack.enter_context(socket.create_connection(address, 20, ("127.0.0.2", 0))) for _ in range(12)]
        with contextlib.suppress(ConnectionResetError):
            assert crowd[0].recv(1) == b"", "the oldest of the crowd is ended"
        with context.wrap_socket(honest, server_hostname="127.0.0.1") as secured:
            secured.sendall(PREFACE + settings({}))
            assert secured.recv(9)


def test_each_failed_handshake_has_its_reason_and_a_line_with_the_client(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = start(**tls(folder, client_ca=True))
    results = running.server.metrics.handshakes
    make_certificate(folder, "stranger", authority="other")

    def shake(context: ssl.SSLContext) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", running.server.port), 20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            while secured.recv(4096):
                pass

    def client(certificate: str = "", authority: str = "ca") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=folder / f"{authority}.pem")
        if certificate:
            context.load_cert_chain(folder / f"{certificate}.pem", folder / f"{certificate}.key")
        return context

    old = client("client")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("AES128-SHA:@SECLEVEL=0")
    http = client("client")
    http.set_alpn_protocols(["http/1.1"])
    for context in (client(), client("stranger"), client("client", "other"), old, http):
        shake(context)
    for hello in (b"", PREFACE + settings({})):
        with socket.create_connection(("127.0.0.1", running.server.port), 20) as plain:
            plain.sendall(hello)
    monkeypatch.setattr("serving.transport.handshakes.HANDSHAKE_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", running.server.port), 20) as silent:
        assert silent.recv(1) == b""
    expected = {"certificate": 2, "distrust": 1, "old": 1, "no_h2": 1, "gone": 1, "no_tls": 1, "timeout": 1}
    wait_for(lambda: {result: results.labels(result).value for result in expected} == expected)
    assert results.labels("failed").value == results.labels("ok").value == 0
    lines = Counter(
        record.getMessage() for record in caplog.records if getattr(record, FIELDS, {}) == {"peer": "127.0.0.1"}
    )
    assert lines == {f"a TLS handshake has failed: {name}": count for name, count in expected.items()}


def test_the_log_names_the_client_of_each_refused_call_by_its_token(
    start: Start, tokens: dict[str, str], transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = start(transport=transport, tokens=tokens["file"])
    for method, streams in (("Classify", False), ("GetModel", False), ("ClassifyStream", True), ("Unknown", False)):
        code_of_wrong(running.channel, f"/capsnet.v1.CapsNetService/{method}", streams, tokens["predict"])
    code_of(running.channel, GET_MODEL, False, "predict.guessed")
    found = {
        (fields["method"].partition("/")[2], fields.get("peer"), fields.get("client"))
        for record in caplog.records
        if (fields := getattr(record, FIELDS, None))
    }
    address = "127.0.0.1"
    assert found == {
        ("Classify", address, "predict"),
        ("GetModel", address, "predict"),
        ("ClassifyStream", address, "predict"),
        ("Unknown", address if transport == "native" else None, None),
        ("GetModel", address, None),
    }


def test_the_log_names_the_client_that_loads_or_unloads_a_model(
    start: Start, tokens: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = start(tokens=tokens["file"], admin_port=0)
    [name] = [model.artifact.name for model in running.server.repository.models()]
    with grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel:
        for act in ("Load", "Unload"):
            path = f"/inference.GRPCInferenceService/RepositoryModel{act}"
            request = inference_pb2.RepositoryModelLoadRequest(model_name=name).SerializeToString()
            metadata = (("authorization", f"Bearer {tokens['admin']}"), ("x-request-id", "mine"))
            channel.unary_unary(path, bytes, bytes)(request, metadata=metadata, timeout=60)
    who = {"request_id": "mine", "peer": "127.0.0.1", "client": "admin"}
    assert [(record.getMessage(), getattr(record, FIELDS)) for record in caplog.records if hasattr(record, FIELDS)] == [
        (f"the model '{name}' was {act}ed for a client", {"method": f"inference.GRPCInferenceService/{method}", **who})
        for act, method in (("load", "RepositoryModelLoad"), ("unload", "RepositoryModelUnload"))
    ]


def code_of_wrong(channel: grpc.Channel, path: str, streams: bool, token: str) -> None:
    """Call a method with bytes that are no message of its."""
    metadata = (("authorization", f"Bearer {token}"),)
    with contextlib.suppress(grpc.RpcError):
        if streams:
            list(channel.stream_stream(path, bytes, bytes)(iter([b"\xff"]), metadata=metadata, timeout=20))
        else:
            channel.unary_unary(path, bytes, bytes)(b"\xff", metadata=metadata, timeout=20)


def test_a_connection_that_the_server_closes_has_a_line_with_its_client(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = start(max_connections=2)
    unary(running.channel, GET_MODEL)
    port = running.server.port
    with socket.create_connection(("127.0.0.1", port), 20) as other:
        other.sendall(PREFACE + settings({}) + frames.frame(frames.DATA, 0, 5, b"x"))
        while other.recv(4096):
            pass
    with socket.create_connection(("127.0.0.1", port), 20) as http:
        http.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert http.recv(4096).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", port), 20) as second:
        second.sendall(PREFACE + settings({}))
        assert second.recv(4096)
        with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), 20) as third:
            assert third.recv(1) == b""
    texts = [record.getMessage() for record in caplog.records if getattr(record, FIELDS, {}) == {"peer": "127.0.0.1"}]
    assert texts == [
        "a connection is closed: PROTOCOL_ERROR, a frame for stream 5, which is not open",
        "a connection is closed: it does not speak HTTP/2",
        "a connection is refused: all places are taken (max_connections)",
    ]


def test_a_client_above_its_limit_is_refused_and_another_is_not(
    start: Start, tmp_path: Path, digits: Digits, transport: str
) -> None:
    made = {name: new_token(name) for name in ("slow", "free")}
    entries = [
        TokenEntry("slow", ("predict",), made["slow"][1], calls=2, rate=1000.0),
        TokenEntry("free", ("predict",), made["free"][1]),
    ]
    write_entries(tmp_path / "tokens", entries)
    running = start(transport=transport, tokens=str(tmp_path / "tokens"), client_calls=50)
    slow, free = ((("authorization", f"Bearer {made[name][0]}"),) for name in ("slow", "free"))
    open_stream = running.channel.stream_stream("/capsnet.v1.CapsNetService/ClassifyStream", bytes, bytes)
    stop = threading.Event()

    def endless() -> Iterator[bytes]:
        stop.wait(30)
        yield from ()

    held: list[Any] = [open_stream(endless(), metadata=slow) for _ in range(2)]
    end = time.monotonic() + 20
    code = None
    while code is not grpc.StatusCode.RESOURCE_EXHAUSTED and time.monotonic() < end:
        try:
            unary(running.channel, GET_MODEL, slow)
        except grpc.RpcError as error:
            code = error.code()
            assert "2 calls of this client are in flight; the limit is 2; try again later" in (error.details() or "")
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    unary(running.channel, GET_MODEL, free)
    stop.set()
    for one in held:
        one.cancel()
    end = time.monotonic() + 20
    while True:
        try:
            unary(running.channel, GET_MODEL, slow)
            break
        except grpc.RpcError:
            assert time.monotonic() < end
    classify = running.channel.unary_unary("/capsnet.v1.CapsNetService/Classify", bytes, bytes)
    for _ in range(5):  # each ends its count
        with pytest.raises(grpc.RpcError) as caught:
            classify(b"\xff", metadata=slow, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert all(
        quota.calls == 0 for name, quota in running.server._access.guard._quotas._quotas.items() if name == "slow"
    )


def test_a_token_that_is_not_checked_yet_learns_no_limit_and_no_load(
    start: Start, tokens: dict[str, str], transport: str
) -> None:
    running = start(transport=transport, tokens=tokens["file"], max_bytes_under_way=2**16)
    classify = running.channel.unary_unary("/capsnet.v1.CapsNetService/Classify", bytes, bytes)
    texts = []
    for token in ("predict.guessed", tokens["predict"]):
        if token == tokens["predict"]:  # then it is known
            unary(running.channel, GET_MODEL, (("authorization", f"Bearer {token}"),))
        with pytest.raises(grpc.RpcError) as caught:
            classify(b"x" * 2**18, metadata=(("authorization", f"Bearer {token}"),), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        texts.append(caught.value.details() or "")
    assert texts[0] == UNDECIDED_TEXT
    assert "the limit is 65536 bytes" in texts[1]


def test_addresses_have_limits_over_all_ports_where_there_are_no_tokens(start: Start, transport: str) -> None:
    running = start(transport=transport, client_rate=1.0, http_port=0)
    unary(running.channel, GET_MODEL)
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(20):
            unary(running.channel, GET_MODEL)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    text = "this client has made too many calls; the limit is 1 a second"
    assert text in (caught.value.details() or "")
    answers = [ask(running.server.http_port, "/v1/model") for _ in range(2)]  # in case a second has passed
    assert answers[1][0] == 429 and text in answers[1][1]
    assert code_of(running.channel, HEALTH + "Check", False) is grpc.StatusCode.OK


def test_tokens_are_renewed_under_load_without_a_lost_call(
    start: Start, tmp_path: Path, digits: Digits, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.access.files._CHECK_SECONDS", 0.02)
    made = {name: new_token(name) for name in ("stays", "leaves", "comes")}

    def write(*names: str, calls: int = 50) -> None:
        entries = [TokenEntry(name, ("predict",), made[name][1], calls=calls) for name in names]
        write_entries(tmp_path / "tokens", entries)

    write("stays", "leaves")
    running = start(transport=transport, tokens=str(tmp_path / "tokens"))
    outcomes: dict[str, list[bool]] = {"stays": [], "leaves": []}
    ended = threading.Event()

    def call(name: str) -> None:
        """Note for each call if it was let in. An answer must be right."""
        with CapsNetClient(running.address, token=made[name][0], retries=0) as client:
            while not ended.is_set():
                try:
                    answers = [one.class_index for one in client.classify(digits.images[:3])]
                except AccessDenied:
                    outcomes[name].append(False)
                else:
                    assert answers == digits.labels[:3].tolist()
                    outcomes[name].append(True)

    sent = threading.Semaphore(0)

    def images() -> Iterator[Any]:
        for image in digits.images[:20]:
            sent.acquire()
            yield image

    with (
        CapsNetClient(running.address, token=made["leaves"][0], retries=0) as under_way,
        CapsNetClient(running.address, token=made["comes"][0], retries=0) as new,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(call, name) for name in ("stays", "stays", "leaves")]
        try:
            stream = under_way.classify_stream(images())
            sent.release()
            answers = [next(stream)]
            for limit in range(50, 60):  # the same tokens in changed files
                write("stays", "leaves", calls=limit)
                time.sleep(0.03)
            assert all(outcomes["leaves"]) and len(outcomes["leaves"]) > 0
            with pytest.raises(AccessDenied):
                new.get_model()
            write("stays", "comes")
            wait_for(lambda: not all(outcomes["leaves"]))
            refused = outcomes["leaves"].index(False)
            wait_for(lambda: len(outcomes["leaves"]) > refused + 5)
            assert new.classify(digits.images[:1])[0].class_index == digits.labels[0]
            sent.release(20)
            answers += stream
        finally:
            ended.set()
            sent.release(20)
        for one in calls:
            one.result(20)
    assert [one.class_index for one in answers] == digits.labels[:20].tolist(), "a call that was under way goes on"
    assert len(outcomes["stays"]) > 10 and all(outcomes["stays"]), "no call is lost"
    assert not any(outcomes["leaves"][refused:])


@pytest.mark.parametrize("method", ["/capsnet.v1.CapsNetService/ClassifyStream", REFLECTION])
def test_a_stream_does_not_outlive_its_removed_token_for_long(
    start: Start, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for name in ("guard._LOOK_SECONDS", "guard.REMOVED_SECONDS", "files._CHECK_SECONDS"):
        monkeypatch.setattr(f"serving.access.{name}", 0.05)
    made = {name: new_token(name) for name in ("stays", "leaves")}
    entries = {name: TokenEntry(name, ("predict",), hash_) for name, (_, hash_) in made.items()}
    write_entries(tmp_path / "tokens", entries.values())
    running = start(transport=transport, tokens=str(tmp_path / "tokens"))
    open_stream = running.channel.stream_stream(method, bytes, bytes)
    ended = threading.Event()

    def messages() -> Iterator[bytes]:
        while not ended.wait(0.02):
            yield b""

    streams: dict[str, Any] = {
        name: open_stream(messages(), metadata=(("authorization", f"Bearer {token}"),), timeout=60)
        for name, (token, _) in made.items()
    }
    for stream in streams.values():
        next(stream)
    try:
        write_entries(tmp_path / "tokens", [replace(entries["stays"], calls=50)])
        with pytest.raises(grpc.RpcError) as caught:
            list(streams["leaves"])
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for _ in range(30):
            next(streams["stays"])
    finally:
        ended.set()
        for stream in streams.values():
            stream.cancel()


def test_reflection_can_be_off(start: Start, transport: str) -> None:
    running = start(transport=transport, reflection=False)
    assert code_of(running.channel, REFLECTION, True) is grpc.StatusCode.UNIMPLEMENTED


def test_a_debug_log_holds_no_token(tmp_path: Path, tokens: dict[str, str], digits: Digits) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "serving", "--port", str(port), "--metrics-port", "0", "--http-port", "-1",
        "--log-level", "debug",
        "--tokens", tokens["file"], "--threads", "1", "--runtimes", "1", "--max-batch", "8",
    ]  # fmt: skip
    with log.open("w") as out, subprocess.Popen(command, stderr=out, cwd=ROOT) as process:
        try:
            with CapsNetClient(f"127.0.0.1:{port}", token=tokens["predict"]) as client:
                client.wait_until_ready(60)
                client.classify(digits.images[:2])
            with (
                CapsNetClient(f"127.0.0.1:{port}", token="predict.guessed-secret", retries=0) as client,
                pytest.raises(AccessDenied, match="the token is not valid"),
            ):
                client.get_model()
            os.kill(process.pid, signal.SIGHUP)
        finally:
            process.terminate()
            process.wait(30)
    text = log.read_text()
    assert "the token is not valid" in text
    assert tokens["predict"].partition(".")[2] not in text
    assert "guessed-secret" not in text


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system does not tell the received bytes")
@pytest.mark.parametrize("web", [False, True], ids=["gRPC", "HTTP"])
def test_a_client_with_tls_records_of_a_byte_is_cut_off_and_one_with_small_ones_is_not(
    start: Start, folder: Path, web: bool
) -> None:
    running = start(http_port=0, **tls(folder))
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.set_alpn_protocols(["http/1.1" if web else "h2"])
    preface = frames.PREFACE + frames.settings({})
    start_of_body = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"

    def stays(size: int, seconds: float) -> bool:
        """Send many records of this size. Return False if the server ends the connection within this time."""
        port = running.server.http_port if web else running.server.port
        with (
            socket.create_connection(("127.0.0.1", port), 10) as link,
            context.wrap_socket(link, server_hostname="127.0.0.1") as client,
        ):
            client.sendall(start_of_body if web else preface)
            piece = b"x" if web else frames.frame(frames.PING, 0, 0, bytes(8))
            data = piece * (4000 // len(piece))
            try:
                for begin in range(0, len(data), size):
                    client.sendall(data[begin : begin + size])
                time.sleep(0.2)
                for begin in range(0, len(data), size):
                    client.sendall(data[begin : begin + size])
                client.settimeout(seconds)
                while client.recv(65536):
                    pass
            except TimeoutError:
                return True
            except OSError:
                pass
            return False

    assert stays(16, 0.5)
    assert not stays(1, 30)
    _, text = ask(running.server.metrics_port, "/metrics", folder)
    assert 'capsnet_connections_limited_total{limit="flood"} 1.0' in text


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system does not tell the received bytes")
def test_a_large_upload_over_tls_is_no_flood(start: Start, folder: Path) -> None:
    """It comes faster than the server reads it, so that the system holds most of it."""
    running = start(http_port=0, **tls(folder))
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    body = b'{"images": []}' + b" " * 6_000_000
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        with (
            socket.create_connection(("127.0.0.1", running.server.http_port), 10) as link,
            context.wrap_socket(link, server_hostname="127.0.0.1") as client,
        ):
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert client.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("web", [False, True], ids=["gRPC", "HTTP"])
def test_a_client_whose_tls_records_hold_nothing_is_cut_off(
    start: Start, folder: Path, web: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has no function that asks for new keys, so the records only seem to hold nothing."""
    running = start(http_port=0, **tls(folder))
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.set_alpn_protocols(["http/1.1" if web else "h2"])
    monkeypatch.setattr(Records, "are_empty", lambda records: True)
    with (
        socket.create_connection(("127.0.0.1", running.server.http_port if web else running.server.port), 10) as link,
        context.wrap_socket(link, server_hostname="127.0.0.1") as client,
    ):
        client.sendall(b"GET /" if web else frames.PREFACE + frames.settings({}))
        with suppress(OSError):
            while client.recv(100):
                pass
    _, text = ask(running.server.metrics_port, "/metrics", folder)
    assert 'capsnet_connections_limited_total{limit="flood"} 1.0' in text
