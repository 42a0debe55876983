"""The calls of a soak: right ones, wrong ones, and those that their client gives up."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from benchmarks.attacks.link import CLASSIFY, REFLECTION, data, headers, request
from benchmarks.soak import web_calls
from benchmarks.soak.client import MAX_IMAGES, PATIENCE_SECONDS, Client, Metadata, WrongAnswer, bearer, check_text
from benchmarks.soak.served import SWAPPED, UNLOADED
from benchmarks.soak.windows import CANCELLED, HUNG_UP, LATE, REFUSED, RIGHT
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from protos.inference import inference_pb2 as inference
from serving.transport import frames

INFER = "/inference.GRPCInferenceService/ModelInfer"
_MAX_STREAM_REQUESTS = 20
_MAX_PATIENCE_OF_IMPATIENT_SECONDS = 0.02
_Code = grpc.StatusCode
_HTTP_STATUS = {"/metrics": b"200", "/livez": b"200", "/readyz": b"200", "/nothing": b"404"}


@dataclass(frozen=True)
class Kind:
    """A kind of call. weight: its share of the calls. make: makes one, and returns its outcome.

    It raises WrongAnswer, or an error that it does not expect.
    """

    name: str
    weight: int
    make: Callable[[Client], Awaitable[str]]


async def classify_one(client: Client) -> str:
    """Classify one digit; this call's latency is measured."""
    return await _classify(client, client.places(1))


async def classify(client: Client) -> str:
    return await _classify(client, client.places())


async def _classify(client: Client, places: list[int]) -> str:
    answer = await client.capsnet.Classify(
        client.classify_request(places), timeout=PATIENCE_SECONDS, metadata=client.metadata
    )
    client.check_classified(answer, places)
    return RIGHT


async def infer(client: Client) -> str:
    places = client.places()
    answer = await client.inference.ModelInfer(
        client.infer_request(places), timeout=PATIENCE_SECONDS, metadata=client.metadata
    )
    client.check_inferred(answer, places)
    return RIGHT


async def of_the_unloaded_model(client: Client) -> str:
    """Classify with the model that is unloaded now and then."""
    places = client.places()
    before = UNLOADED in client.present
    try:
        answer = await client.capsnet.Classify(
            client.classify_request(places, UNLOADED), timeout=PATIENCE_SECONDS, metadata=client.metadata
        )
    except grpc.aio.AioRpcError as error:
        check_text(error)
        if error.code() is _Code.NOT_FOUND and not (before and UNLOADED in client.present):
            return REFUSED
        raise
    client.check_classified(answer, places)
    return RIGHT


async def classify_stream(client: Client) -> str:
    """Send some requests in a stream, one in ten of them wrong, and compare every answer."""
    sent: dict[str, list[int]] = {}

    async def requests() -> AsyncIterator[pb.ClassifyStreamRequest]:
        for number in range(client.random.randint(1, _MAX_STREAM_REQUESTS)):
            wrong = client.random.random() < 0.1
            sent[str(number)] = places = [] if wrong else client.places(4)
            yield pb.ClassifyStreamRequest(id=str(number), request=client.classify_request(places))

    order = []
    async for answer in client.capsnet.ClassifyStream(requests(), timeout=PATIENCE_SECONDS, metadata=client.metadata):
        order.append(answer.id)
        _check_streamed(client, answer, sent[answer.id])
    if order != list(sent):
        raise WrongAnswer(f"ClassifyStream: {len(order)} answers to {len(sent)} requests, or in another order")
    return RIGHT


def _check_streamed(client: Client, answer: pb.ClassifyStreamResponse, places: list[int]) -> None:
    if places and answer.HasField("error"):
        raise WrongAnswer(f"ClassifyStream: {answer.error.code} for a right request: {answer.error.message}")
    if places:
        client.check_classified(answer.response, places)
    elif answer.error.code != _Code.INVALID_ARGUMENT.value[0]:
        raise WrongAnswer(f"ClassifyStream: {answer.error.code} for a request without images")


async def infer_stream(client: Client) -> str:
    """Send some requests in a stream, and compare every answer."""
    sent = [client.places(4) for _ in range(client.random.randint(1, _MAX_STREAM_REQUESTS))]

    async def requests() -> AsyncIterator[inference.ModelInferRequest]:
        for places in sent:
            yield client.infer_request(places)

    count = 0
    async for answer in client.inference.ModelStreamInfer(
        requests(), timeout=PATIENCE_SECONDS, metadata=client.metadata
    ):
        if answer.error_message:
            raise WrongAnswer(f"ModelStreamInfer: {answer.error_message}")
        client.check_inferred(answer.infer_response, sent[count])
        count += 1
    if count != len(sent):
        raise WrongAnswer(f"ModelStreamInfer: {count} answers to {len(sent)} requests")
    return RIGHT


async def describe(client: Client) -> str:
    """Ask for the descriptions of the swapped model, in both protocols."""
    options = {"timeout": PATIENCE_SECONDS, "metadata": client.metadata}
    model = await client.capsnet.GetModel(pb.GetModelRequest(model_name=SWAPPED), **options)
    metadata = await client.inference.ModelMetadata(inference.ModelMetadataRequest(name=SWAPPED), **options)
    ready = await client.inference.ModelReady(inference.ModelReadyRequest(name=SWAPPED), **options)
    await client.inference.ModelStatistics(inference.ModelStatisticsRequest(name=SWAPPED), **options)
    await client.inference.RepositoryIndex(inference.RepositoryIndexRequest(), **options)
    if model.model_name != SWAPPED or metadata.name != SWAPPED or not ready.ready:
        raise WrongAnswer("GetModel, ModelMetadata or ModelReady")
    return RIGHT


async def over_a_new_connection(client: Client) -> str:
    """Classify over a connection that is closed afterwards, half of them a Unix socket."""
    address = client.server.served.targets["unix"] if client.random.random() < 0.5 else ""
    async with client.connect(address) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        places = client.places()
        answer = await stub.Classify(
            client.classify_request(places), timeout=PATIENCE_SECONDS, metadata=client.metadata
        )
        client.check_classified(answer, places)
    return RIGHT


async def cancel(client: Client) -> str:
    """Give a call up after a moment, unless it has been answered by then."""
    places = client.places()
    call = client.capsnet.Classify(client.classify_request(places), metadata=client.metadata)
    await asyncio.sleep(client.random.uniform(0, _MAX_PATIENCE_OF_IMPATIENT_SECONDS))
    call.cancel()
    try:
        answer = await call
    except asyncio.CancelledError:
        return CANCELLED
    client.check_classified(answer, places)
    return RIGHT


async def cancel_a_stream(client: Client) -> str:
    """Give a stream up after some of its answers."""
    sent = [client.places(4) for _ in range(_MAX_STREAM_REQUESTS)]

    async def requests() -> AsyncIterator[inference.ModelInferRequest]:
        for places in sent:
            yield client.infer_request(places)

    call = client.inference.ModelStreamInfer(requests(), metadata=client.metadata)
    for number in range(client.random.randrange(_MAX_STREAM_REQUESTS)):
        answer = await call.read()
        client.check_inferred(answer.infer_response, sent[number])
    call.cancel()
    return CANCELLED


async def with_a_short_deadline(client: Client) -> str:
    places = client.places()
    seconds = client.random.uniform(0.0001, _MAX_PATIENCE_OF_IMPATIENT_SECONDS)
    try:
        answer = await client.inference.ModelInfer(
            client.infer_request(places), timeout=seconds, metadata=client.metadata
        )
    except grpc.aio.AioRpcError as error:
        check_text(error)
        if error.code() is not _Code.DEADLINE_EXCEEDED:
            raise
        return LATE
    client.check_inferred(answer, places)
    return RIGHT


@dataclass(frozen=True)
class _Wrong:
    """A request that must be refused. metadata: None for that of the client. or_else: another right code."""

    path: str
    message: bytes
    code: grpc.StatusCode
    metadata: Metadata | None = None
    or_else: grpc.StatusCode | None = None


def _wrong_requests(client: Client) -> list[_Wrong]:
    """Return requests that must be refused, one of each kind."""
    right, pixels = client.classify_request([0]), bytes(784)
    tensor = client.infer_request([0])

    def classify_of(*images: pb.Image, name: str = SWAPPED) -> bytes:
        return pb.ClassifyRequest(model_name=name, images=images).SerializeToString()

    def infer_of(name: str = "images", datatype: str = "UINT8", raw: bytes = pixels) -> bytes:
        given = inference.ModelInferRequest()
        given.CopyFrom(tensor)
        given.inputs[0].name, given.inputs[0].datatype, given.raw_input_contents[0] = name, datatype, raw
        return given.SerializeToString()

    invalid, whole = _Code.INVALID_ARGUMENT, right.SerializeToString()
    junk = os.urandom(client.random.randint(1, 200))
    return [
        _Wrong(CLASSIFY, b"\xff" * 8, invalid),
        _Wrong(CLASSIFY, classify_of(), invalid),
        _Wrong(CLASSIFY, classify_of(pb.Image()), invalid),
        _Wrong(CLASSIFY, classify_of(pb.Image(pixels=pixels[1:])), invalid),
        _Wrong(CLASSIFY, classify_of(pb.Image(pixels=pixels), pb.Image(encoded=junk)), invalid),
        _Wrong(CLASSIFY, classify_of(pb.Image(pixels=pixels), name="../none"), _Code.NOT_FOUND),
        _Wrong(INFER, b"\x0a\xff", invalid),
        _Wrong(INFER, infer_of(name="x" * 100), invalid),
        _Wrong(INFER, infer_of(datatype="FP32"), invalid),
        _Wrong(INFER, infer_of(raw=pixels + b"x"), invalid),
        _Wrong("/no.Service/Method", whole, _Code.UNIMPLEMENTED),
        _Wrong(CLASSIFY, whole, _Code.UNAUTHENTICATED, ()),
        _Wrong(CLASSIFY, whole, _Code.UNAUTHENTICATED, bearer(f"predict.{junk.hex()}"), _Code.RESOURCE_EXHAUSTED),
        _Wrong(INFER, infer_of(), _Code.PERMISSION_DENIED, bearer(client.server.token_of["metrics"])),
    ]


async def wrong_request(client: Client) -> str:
    """Send a request that must be refused with one certain code, and no inner text."""
    wrong = client.random.choice(_wrong_requests(client))
    metadata = client.metadata if wrong.metadata is None else wrong.metadata
    try:
        await client.channel.unary_unary(wrong.path, bytes, bytes)(
            wrong.message, timeout=PATIENCE_SECONDS, metadata=metadata
        )
    except grpc.aio.AioRpcError as error:
        check_text(error)
        if error.code() not in (wrong.code, wrong.or_else):
            raise
        return REFUSED
    raise WrongAnswer(f"{wrong.path}: OK for a request that must get {wrong.code.name}")


async def wrong_reflection(client: Client) -> str:
    """Send bytes that are no message of reflection."""

    async def requests() -> AsyncIterator[bytes]:
        yield b"\xff" * 8

    method = client.channel.stream_stream(REFLECTION, bytes, bytes)
    try:
        async for _ in method(requests(), timeout=PATIENCE_SECONDS, metadata=client.metadata):
            pass
    except grpc.aio.AioRpcError as error:
        check_text(error)
        if error.code() is not _Code.INVALID_ARGUMENT:
            raise
        return REFUSED
    raise WrongAnswer("reflection: OK for bytes that are no message")


async def hang_up(client: Client) -> str:
    """Open an encrypted connection, begin something, and hang up in the middle."""
    port, context = client.server.port, client.tls("h2")
    kind = client.random.randrange(4)
    if kind == 0:  # no handshake
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(os.urandom(client.random.randint(1, 500)))
    else:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        message = request(client.random.randint(1, MAX_IMAGES))
        writer.write(frames.PREFACE + frames.settings({}))
        call = headers(1, CLASSIFY, *client.metadata)
        begun = data(1, message[: client.random.randrange(len(message))], end=False)
        writer.write((call + begun, call + data(1, message), os.urandom(100))[kind - 1])
    await client.abort(writer)
    return HUNG_UP


async def read_a_page(client: Client) -> str:
    """Read a page of the HTTP port."""
    path = client.random.choice(list(_HTTP_STATUS))
    port = int(client.server.served.metrics_url.rsplit(":", 1)[1].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client.tls("http/1.1"))
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {client.server.token_of['metrics']}\r\n"
    writer.write(f"{head}\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    writer.close()
    status = answer.split(b" ", 2)[1]
    if status != _HTTP_STATUS[path]:
        raise WrongAnswer(f"{path}: {status.decode()}")
    return RIGHT if status == b"200" else REFUSED


KINDS = (
    Kind("classify one", 25, classify_one),
    Kind("classify", 12, classify),
    Kind("infer", 12, infer),
    Kind("of the unloaded model", 4, of_the_unloaded_model),
    Kind("classify stream", 5, classify_stream),
    Kind("infer stream", 5, infer_stream),
    Kind("describe", 2, describe),
    Kind("over a new connection", 3, over_a_new_connection),
    Kind("cancel", 6, cancel),
    Kind("cancel a stream", 2, cancel_a_stream),
    Kind("short deadline", 6, with_a_short_deadline),
    Kind("wrong request", 14, wrong_request),
    Kind("wrong reflection", 1, wrong_reflection),
    Kind("hang up", 2, hang_up),
    Kind("page", 1, read_a_page),
    Kind("HTTP, classify", 10, web_calls.classify),
    Kind("HTTP, infer", 5, web_calls.infer),
    Kind("HTTP, explain", 2, web_calls.explain),
    Kind("HTTP, reconstruct", 3, web_calls.reconstruct),
    Kind("HTTP, wrong request", 8, web_calls.wrong_request),
    Kind("HTTP, hang up", 3, web_calls.hang_up),
)


async def timed(kind: Kind, client: Client) -> tuple[str, float]:
    """Make a call. Return its outcome and its milliseconds."""
    begin = time.perf_counter()
    return await kind.make(client), 1000 * (time.perf_counter() - begin)
