"""Tests of the Python client with a server in trouble: retries, broken streams, deadlines, tokens and TLS."""

import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client import (
    AccessDenied,
    AsyncCapsNetClient,
    CapsNetClient,
    CapsNetError,
    Classification,
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    Item,
    Overloaded,
    ServerFault,
    Unavailable,
    Unsupported,
)
from serving.client.addresses import is_local
from serving.client.inputs import RequestLimits
from serving.client.window import Window
from tests.certificates import make_all
from tests.fake_server import FakeServer, Step, answer, end, numbered

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
AWAY = grpc.StatusCode.UNAVAILABLE
INVALID = grpc.StatusCode.INVALID_ARGUMENT

Requests = Iterator[pb.ClassifyStreamRequest]
Responses = Iterator[pb.ClassifyStreamResponse]
Stream = Callable[..., list[Any]]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as result:
        yield result


@pytest.fixture
def client(server: FakeServer) -> Iterator[CapsNetClient]:
    with CapsNetClient(server.address, timeout=10) as result:
        result.get_model()
        yield result


@pytest.fixture(params=["threads", "asyncio"])
def stream(request: pytest.FixtureRequest, server: FakeServer) -> Stream:
    """Return a function that streams images through one of the two clients and returns the numbers and errors."""

    def number(outcome: Classification | CapsNetError) -> float | CapsNetError:
        return float(outcome.pose[0]) if isinstance(outcome, Classification) else outcome

    def with_threads(images: Any, errors: Any = "raise", **settings: Any) -> list[Any]:
        with CapsNetClient(server.address, **settings) as client:
            return [number(outcome) for outcome in client.classify_stream(images, errors=errors)]

    async def with_asyncio(images: Any, errors: Any = "raise", **settings: Any) -> list[Any]:
        async with AsyncCapsNetClient(server.address, **settings) as client:
            return [number(outcome) async for outcome in client.classify_stream(images, errors=errors)]

    if request.param == "threads":
        return with_threads
    return lambda images, errors="raise", **settings: asyncio.run(with_asyncio(images, errors, **settings))


def _hint(milliseconds: object) -> Step:
    return BUSY, [("grpc-retry-pushback-ms", str(milliseconds))]


def _violation(field: str) -> Step:
    return _details(INVALID, BadRequest(field_violations=[BadRequest.FieldViolation(field=field)]))


def _details(code: grpc.StatusCode, detail: Message) -> Step:
    packed = AnyMessage()
    packed.Pack(detail)
    status = Status(code=code.value[0], details=[packed])
    return code, [("grpc-status-details-bin", status.SerializeToString())]


def _gaps(server: FakeServer) -> list[float]:
    return [later - sooner for sooner, later in itertools.pairwise(server.called_at)]


def test_a_call_is_tried_again_when_the_server_says(server: FakeServer, client: CapsNetClient) -> None:
    server.steps = [_hint(400), _hint(50)]
    [result] = client.classify(numbered(7))
    assert result.pose.tolist() == [7, 0]
    first, second = _gaps(server)
    assert first > 0.39
    assert second > 0.049


def test_a_call_is_tried_again_with_growing_pauses_without_a_hint(server: FakeServer, client: CapsNetClient) -> None:
    server.steps = [(AWAY, ()), (BUSY, ())]
    client.classify(numbered(7))
    first, second = _gaps(server)
    assert first > 0.07
    assert second > 0.14


@pytest.mark.parametrize("hint", ["-1", "never"])
def test_a_call_is_not_retried_if_the_server_asks_not_to(server: FakeServer, client: CapsNetClient, hint: str) -> None:
    server.steps = [_hint(hint)]
    with pytest.raises(Overloaded, match="told to") as raised:
        client.classify(numbered(7))
    assert len(server.called_at) == 1
    assert isinstance(raised.value.__cause__, grpc.RpcError)


def test_a_large_call_is_tried_again_too(server: FakeServer, client: CapsNetClient) -> None:
    server.steps = [_hint(10)]
    client.classify(bytes(3_000_000))
    assert len(server.called_at) == 2


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3), (4, 5)])
def test_retries_come_to_an_end(server: FakeServer, retries: int, calls: int) -> None:
    server.steps = [_hint(10)] * 9
    with CapsNetClient(server.address, retries=retries) as client, pytest.raises(Overloaded) as raised:
        client.classify(numbered(1))
    assert len(server.called_at) == calls
    assert raised.value.retry_after == 0.01


def test_the_deadline_bounds_all_attempts_together(server: FakeServer, client: CapsNetClient) -> None:
    server.steps = [_hint(300)] * 9
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.classify(numbered(1), timeout=0.5)
    assert 0.45 < time.monotonic() - start < 3
    assert len(server.called_at) == 2


def test_asyncio_calls_are_tried_again_and_bounded_too(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncCapsNetClient(server.address) as client:
            server.steps = [_hint(200)]
            assert (await client.classify(numbered(7)))[0].pose[0] == 7
            server.steps = [_hint(300)] * 9
            with pytest.raises(DeadlineExceeded):
                await client.classify(numbered(1), timeout=0.2)

    asyncio.run(main())
    assert _gaps(server)[0] > 0.19


@pytest.mark.parametrize(
    ("step", "kind", "field"),
    [
        (_violation("images[1].pixels"), InvalidImage, "images[1].pixels"),
        (_violation("model_name"), InvalidRequest, "model_name"),
        ((INVALID, [("grpc-status-details-bin", b"\xff\xff")]), InvalidRequest, ""),
        ((grpc.StatusCode.UNAUTHENTICATED, ()), AccessDenied, None),
        ((grpc.StatusCode.PERMISSION_DENIED, ()), AccessDenied, None),
        ((grpc.StatusCode.INTERNAL, ()), ServerFault, None),
        ((grpc.StatusCode.UNIMPLEMENTED, ()), Unsupported, None),
    ],
    ids=["image", "request", "broken details", "no token", "forbidden", "internal", "other service"],
)
def test_each_status_has_its_error(
    server: FakeServer, client: CapsNetClient, step: Step, kind: type[CapsNetError], field: str | None
) -> None:
    assert step
    server.steps = [step]
    with pytest.raises(kind, match="told to") as raised:
        client.classify([numbered(1), numbered(2)])
    error = raised.value
    assert type(error) is kind
    assert error.code is step[0]
    assert getattr(error, "field", None) == field
    assert isinstance(error.__cause__, grpc.RpcError)
    assert error.index == (1 if kind is InvalidImage else None)


def test_the_hint_is_in_the_error(server: FakeServer) -> None:
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(1500)
    server.steps = [_details(BUSY, info)]
    with CapsNetClient(server.address, retries=0) as client, pytest.raises(Overloaded) as raised:
        client.classify(numbered(1))
    assert raised.value.retry_after == 1.5


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(InvalidImage("images[3]: no", field="images[3]", index=3, code=INVALID)))
    assert (str(error), error.field, error.index, error.code, error.reason) == (
        "images[3]: no", "images[3]", 3, INVALID, "no",
    )  # fmt: skip


def test_an_answer_that_does_not_fit_is_a_fault_of_the_server(
    server: FakeServer, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_short(requests: Requests, context: Any) -> Responses:
        for request in requests:
            response = answer(request.request)
            del response.results[-1]
            yield pb.ClassifyStreamResponse(id=request.id, response=response)

    server.stream = one_short
    with pytest.raises(ServerFault, match="results: "):
        stream([numbered(1)])
    server.stream = lambda requests, context: iter([pb.ClassifyStreamResponse(id="mine")])
    with pytest.raises(ServerFault, match="'mine', which no request under way has"):
        stream([numbered(1)])


def test_a_stream_that_breaks_goes_on_without_loss_or_repeat(server: FakeServer, stream: Stream) -> None:
    answered = 0

    def break_often(requests: Requests, context: Any) -> Responses:
        nonlocal answered
        for request in requests:
            answered += 1
            yield pb.ClassifyStreamResponse(id=request.id, response=answer(request.request))
            if answered in (2, 3, 5, 8):
                end(context, AWAY)

    server.stream = break_often
    assert stream(numbered(number) for number in range(2000)) == list(range(2000))
    assert len(server.called_at) == 5


def test_a_stream_waits_as_long_as_the_server_asks_before_it_goes_on(server: FakeServer, stream: Stream) -> None:
    def refuse_once(requests: Requests, context: Any) -> Responses:
        if len(server.called_at) == 1:
            next(requests)
            end(context, BUSY, [("grpc-retry-pushback-ms", "400")])
        for request in requests:
            yield pb.ClassifyStreamResponse(id=request.id, response=answer(request.request))

    server.stream = refuse_once
    assert stream([numbered(3)]) == [3]
    assert _gaps(server)[0] > 0.39


def test_a_stream_gives_up_after_its_retries(server: FakeServer, stream: Stream) -> None:
    code: grpc.StatusCode = AWAY
    hint: list[tuple[str, str | bytes]] = []

    def refuse(requests: Requests, context: Any) -> Responses:
        next(requests)
        end(context, code, hint)
        yield from ()

    server.stream = refuse
    with pytest.raises(Unavailable, match="told to"):
        stream([numbered(1)], retries=2)
    assert len(server.called_at) == 3
    server.called_at.clear()
    code, hint = BUSY, [("grpc-retry-pushback-ms", "-1")]
    with pytest.raises(Overloaded):
        stream([numbered(1)])
    assert len(server.called_at) == 1


def test_a_stream_that_the_server_ends_early_goes_on(server: FakeServer, stream: Stream) -> None:
    def answer_one(requests: Requests, context: Any) -> Responses:
        request = next(requests)
        yield pb.ClassifyStreamResponse(id=request.id, response=answer(request.request))

    server.stream = answer_one
    assert stream([numbered(number) for number in range(130)]) == list(range(130))


def test_a_request_in_a_stream_is_retried_if_that_may_help(server: FakeServer, stream: Stream) -> None:
    refused: set[int] = set()

    def refuse_each_once(requests: Requests, context: Any) -> Responses:
        for request in requests:
            first = int.from_bytes(request.request.images[0].pixels)
            if first in refused:
                yield pb.ClassifyStreamResponse(id=request.id, response=answer(request.request))
            else:
                refused.add(first)
                yield pb.ClassifyStreamResponse(id=request.id, error=pb.Error(code=BUSY.value[0], message="full"))

    server.stream = refuse_each_once
    assert stream([numbered(number) for number in range(50)]) == list(range(50))


def test_only_the_image_that_fails_gets_the_error(server: FakeServer, stream: Stream) -> None:
    def fail_at_five(requests: Requests, context: Any) -> Responses:
        for request in requests:
            if any(image.pixels == numbered(5).tobytes() for image in request.request.images):
                yield pb.ClassifyStreamResponse(id=request.id, error=pb.Error(code=13, message="failed"))
            else:
                yield pb.ClassifyStreamResponse(id=request.id, response=answer(request.request))

    server.stream = fail_at_five
    numbers = stream([np.stack([numbered(number) for number in range(100)])], errors="yield")
    assert numbers[:5] + numbers[6:] == [number for number in range(100) if number != 5]
    assert isinstance(numbers[5], ServerFault)
    assert (str(numbers[5]), numbers[5].index) == ("failed", 5)


def test_a_server_that_falls_silent_is_given_up(server: FakeServer, stream: Stream) -> None:
    def fall_silent(requests: Requests, context: Any) -> Responses:
        next(requests)
        server.stopping.wait()
        yield from ()

    server.stream = fall_silent
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"no answer for 0.3 seconds"):
        stream([numbered(1)], timeout=0.3)
    assert time.monotonic() - start < 5


def test_a_slow_input_is_no_silence_of_the_server(server: FakeServer) -> None:
    def slow() -> Iterator[Item]:
        for number in range(2):
            time.sleep(1.1)
            yield numbered(number)

    async def slow_too() -> AsyncIterator[Item]:
        for number in range(2):
            await asyncio.sleep(1.1)
            yield numbered(number)

    with CapsNetClient(server.address, timeout=1.0) as client:
        assert len(list(client.classify_stream(slow()))) == 2

    async def main() -> int:
        async with AsyncCapsNetClient(server.address, timeout=1.0) as client:
            return len([result async for result in client.classify_stream(slow_too())])

    assert asyncio.run(main()) == 2


def test_a_whole_stream_may_have_a_deadline(server: FakeServer, client: CapsNetClient) -> None:
    def endless() -> Iterator[Item]:
        for number in itertools.count():
            time.sleep(0.02)
            yield numbered(number % 1000)

    results = client.classify_stream(endless(), timeout=0.4)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        for _ in results:
            pass
    assert 0.3 < time.monotonic() - start < 3


def test_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    first = FakeServer(address=address)
    answered = threading.Event()
    results: list[float] = []

    def images() -> Iterator[Item]:
        for number in range(20):
            if number == 10:
                assert answered.wait(5)
            yield numbered(number)

    with CapsNetClient(address) as client:
        for result in client.classify_stream(images()):
            results.append(float(result.pose[0]))
            if len(results) == 10:
                first.__exit__()
                second = FakeServer(address=address)
                answered.set()
    second.__exit__()
    assert results == list(range(20))


def test_a_missing_server_is_reported_after_the_retries() -> None:
    with CapsNetClient("127.0.0.1:1", retries=1) as client:
        with pytest.raises(Unavailable, match=r"127.0.0.1:1: no server answers there \(.*refused"):
            client.classify(numbered(1))
        with pytest.raises(DeadlineExceeded, match=r"not ready after 0.3 seconds \(no server answers\)"):
            client.wait_until_ready(0.3)

    async def main() -> None:
        async with AsyncCapsNetClient("127.0.0.1:1", retries=1) as client:
            with pytest.raises(Unavailable, match=r"127.0.0.1:1: no server answers there"):
                await client.classify(numbered(1))
            with pytest.raises(DeadlineExceeded, match=r"not ready after 0.3 seconds"):
                await client.wait_until_ready(0.3)

    asyncio.run(main())


def test_closing_the_client_ends_its_calls(server: FakeServer) -> None:
    def wait(requests: Requests, context: Any) -> Responses:
        server.stopping.wait(5)
        yield from ()

    server.stream = wait
    client = CapsNetClient(server.address)
    client.get_model()
    threading.Timer(0.2, client.close).start()
    with pytest.raises(Unavailable, match="closed"):
        list(client.classify_stream([numbered(1)]))
    with pytest.raises(CapsNetError, match="the client is closed"):
        client.get_model(refresh=True)

    async def main() -> None:
        client = AsyncCapsNetClient(server.address)
        await client.get_model()
        asyncio.get_running_loop().call_later(0.2, lambda: asyncio.ensure_future(client.close()))
        with pytest.raises(Unavailable, match="closed"):
            async for _ in client.classify_stream([numbered(1)]):
                pass
        with pytest.raises(CapsNetError, match="the client is closed"):
            await client.get_model(refresh=True)

    asyncio.run(main())


def test_the_token_goes_along_on_this_machine_only(server: FakeServer) -> None:
    tokens = iter(["one", "two", "three"])
    with CapsNetClient(server.address, token=lambda: next(tokens)) as client:
        client.get_model()
        client.classify(numbered(1))
        assert server.metadata["authorization"] == "Bearer two"
        list(client.classify_stream([numbered(1)]))
        assert server.metadata["authorization"] == "Bearer three"
    with pytest.raises(ValueError, match=r"would go unencrypted to example.org:8001; use TLS"):
        CapsNetClient("example.org:8001", token="secret")
    CapsNetClient("example.org:8001", token="secret", allow_plaintext_token=True).close()


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:8001", True),
        ("127.3.2.1:8001", True),
        ("localhost:8001", True),
        ("[::1]:8001", True),
        ("dns:///localhost:8001", True),
        ("ipv6:[::1]:8001", True),
        ("unix:/run/capsnet", True),
        ("unix:///run/capsnet", True),
        ("example.org:8001", False),
        ("localhost.example.org:8001", False),
        ("127.0.0.1.example.org:8001", False),
        ("dns://127.0.0.1/example.org:8001", False),
        ("192.168.0.1:8001", False),
        ("[2001:db8::1]:8001", False),
        ("ipv4:127.0.0.1:8001,192.168.0.1:8001", False),
        ("xds:///127.0.0.1:8001", False),
        ("vsock:2:8001", False),
    ],
)
def test_a_local_address_is_recognised(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"retries": 5}, "retries: 5; expected 0 to 4"),
        ({"timeout": 0}, "timeout: 0; expected seconds above 0"),
        ({"address": ""}, "address: empty; expected HOST:PORT or unix:PATH"),
        ({"server_name": "capsnet"}, "need TLS"),
        ({"client_certificate": (b"", b"")}, "need TLS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CapsNetClient(**settings)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ca, server (for capsnet and 127.0.0.1) and client, each .pem and .key, and other.pem."""
    folder = tmp_path_factory.mktemp("certificates")

    make_all(folder)
    return folder


def _server_credentials(folder: Path, require_client: bool) -> grpc.ServerCredentials:
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    root = (folder / "ca.pem").read_bytes() if require_client else None
    return grpc.ssl_server_credentials([pair], root, require_client)


def test_tls_carries_calls_streams_and_the_token(certificates: Path) -> None:
    with FakeServer(credentials=_server_credentials(certificates, False)) as server:
        root = certificates / "ca.pem"
        with CapsNetClient(server.address, tls=root, token=lambda: "secret") as client:
            assert client.classify(numbered(4))[0].pose[0] == 4
            assert server.metadata["authorization"] == "Bearer secret"
            server.metadata = {}
            assert [result.pose[0] for result in client.classify_stream([numbered(5)])] == [5]
            assert server.metadata["authorization"] == "Bearer secret"

        async def main() -> float:
            async with AsyncCapsNetClient(server.address, tls=root.read_bytes(), token="other") as client:
                return float((await client.classify(numbered(6)))[0].pose[0])

        assert asyncio.run(main()) == 6
        assert server.metadata["authorization"] == "Bearer other"
        name = server.address.replace("127.0.0.1", "localhost")
        with CapsNetClient(name, tls=root, server_name="capsnet") as client:
            client.classify(numbered(4))


def test_a_server_that_is_not_trusted_is_refused(certificates: Path) -> None:
    with FakeServer(credentials=_server_credentials(certificates, False)) as server:
        for tls in (certificates / "other.pem", True):
            with (
                CapsNetClient(server.address, tls=tls, retries=0) as client,
                pytest.raises(Unavailable, match="VERIFY_FAILED"),
            ):
                client.classify(numbered(1))


def test_a_server_that_asks_for_a_certificate_gets_it(certificates: Path) -> None:
    with FakeServer(credentials=_server_credentials(certificates, True)) as server:
        root, pair = certificates / "ca.pem", (certificates / "client.pem", certificates / "client.key")
        with CapsNetClient(server.address, tls=root, client_certificate=pair) as client:
            client.classify(numbered(1))
        with CapsNetClient(server.address, tls=root, retries=0) as client, pytest.raises(Unavailable):
            client.classify(numbered(1))


def test_the_model_is_asked_again_once_it_may_have_changed(
    server: FakeServer, client: CapsNetClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.classify(numbered(1))
    assert server.models_asked == 1
    server.version = "2"
    assert client.classify(numbered(1))[0].model_version == "2"
    assert client.get_model().version == "2"
    assert server.models_asked == 2
    server.shape = (1, 3, 3)
    changed = np.zeros((3, 3), np.uint8)
    with pytest.raises(InvalidImage, match=r"shape \(3, 3\); fake takes \(2, 2\)"):
        client.classify(changed)  # the model was fetched a moment ago
    monkeypatch.setattr("serving.client.base._MODEL_FRESH_SECONDS", 0)
    assert len(client.classify([changed, changed])) == 2
    assert server.models_asked == 3

    async def main() -> None:
        async with AsyncCapsNetClient(server.address) as other:
            await other.get_model()
            server.shape = (1, 2, 2)
            assert len(await other.classify([numbered(1)])) == 1

    asyncio.run(main())
    assert server.models_asked == 5


def test_a_picture_that_the_server_prepares_goes_alone() -> None:
    window = Window(pb.ClassifyRequest(), RequestLimits(images=1024, bytes=2**20, overhead=0), 512, 0)
    for preprocess in [pb.PREPROCESS_NONE] * 2 + [pb.PREPROCESS_AUTO] * 2 + [pb.PREPROCESS_NONE] * 3:
        window.add(pb.Image(encoded=b"a file", preprocess=preprocess))
    sizes = []
    while message := window.next_request():
        sizes.append(len(message.request.images))
    assert sizes == [2, 1, 1, 3]
