"""The end-to-end test: on real digits, the running server makes exactly the mistakes of the checkpoint."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.server import Server
from tests.conftest import Digits, InThread, Running, settings


@contextmanager
def _serving(model: str) -> Iterator[Running]:
    """Serve a model in larger batches than other tests do, since thousands of images take less time in them."""
    thread = InThread(Server(settings(model=model, max_batch=16)))
    with thread as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Running(server, CapsNetServiceStub(channel), channel, thread)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A server of the default network."""
    with _serving("capsnet-mnist") as server:
        yield server


@pytest.fixture(scope="module")
def accurate() -> Iterator[Running]:
    """A server of the other network for digits, which takes three times as long for an image."""
    with _serving("capsnet-mnist-accurate") as server:
        yield server


def _mistakes(digits: Digits, answers: list[pb.Classification]) -> list[int]:
    assert len(answers) == len(digits.labels)
    return [
        index
        for index, (answer, label) in enumerate(zip(answers, digits.labels, strict=True))
        if answer.class_index != label
    ]


def _image(digits: Digits, index: int) -> pb.Image:
    return pb.Image(pixels=digits.images[index].tobytes())


def _expected(running: Running) -> list[int]:
    expected: list[int] = running.model.artifact.training.figures["test_mistakes"]
    return expected


def test_10000_digits_in_requests_of_64_make_the_checkpoints_mistakes(accurate: Running, digits: Digits) -> None:
    answers: list[pb.Classification] = []
    for start in range(0, len(digits.images), 64):
        indices = range(start, min(start + 64, len(digits.images)))
        answers += accurate.classify(*(_image(digits, index) for index in indices)).results
    assert _mistakes(digits, answers) == _expected(accurate)


def test_10000_streamed_digits_make_the_checkpoints_mistakes(running: Running, digits: Digits) -> None:
    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        for index in range(len(digits.images)):
            request = pb.ClassifyRequest(images=[_image(digits, index)])
            yield pb.ClassifyStreamRequest(id=f"digit {index}", request=request)

    answers = list(running.stub.ClassifyStream(requests(), timeout=120))
    assert [answer.id for answer in answers] == [f"digit {index}" for index in range(len(digits.images))]
    assert _mistakes(digits, [answer.response.results[0] for answer in answers]) == _expected(running)


def test_10000_digits_in_unary_requests_make_the_checkpoints_mistakes(running: Running, digits: Digits) -> None:
    async def classify_all() -> list[pb.Classification]:
        under_way = asyncio.Semaphore(64)
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]

            async def classify(index: int) -> pb.Classification:
                async with under_way:
                    response = await stub.Classify(pb.ClassifyRequest(images=[_image(digits, index)]), timeout=60)
                    result: pb.Classification = response.results[0]
                    return result

            return await asyncio.gather(*(classify(index) for index in range(len(digits.images))))

    assert _mistakes(digits, asyncio.run(classify_all())) == _expected(running)
