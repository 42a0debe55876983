"""Tests of the Python client with a real server, without and with asyncio."""

import asyncio
import gc
import itertools
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client import (
    AsyncCapsNetClient,
    CapsNetClient,
    CapsNetError,
    Classification,
    InvalidImage,
    Item,
    UnknownModel,
)
from tests.conftest import DATA, ROOT, Digits, Running

SEVEN = DATA / "seven.png"
FIRST = "72104149590690159734"  # the labels of MNIST's first test digits
RIGHT = slice(1400, 1700)  # 300 test digits in whose labels the network makes no mistake

Outcome = Classification | CapsNetError
# A function that streams images through one of the two clients and returns all results.
Stream = Callable[..., list[Outcome]]


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[CapsNetClient]:
    with CapsNetClient(running.address) as result:
        yield result


@pytest.fixture(params=["threads", "asyncio"])
def stream(request: pytest.FixtureRequest, running: Running, client: CapsNetClient) -> Stream:
    async def with_asyncio(images: Any, **options: Any) -> list[Outcome]:
        async with AsyncCapsNetClient(running.address) as other:
            return [outcome async for outcome in other.classify_stream(images, **options)]

    if request.param == "threads":
        return lambda images, **options: list(client.classify_stream(images, **options))
    return lambda images, **options: asyncio.run(with_asyncio(images, **options))


def _labels(outcomes: Iterable[Outcome]) -> str:
    return "".join(outcome.label if isinstance(outcome, Classification) else "-" for outcome in outcomes)


def test_each_name_of_the_package_is_imported_at_its_first_use() -> None:
    code = (
        "import sys, serving.client as client\n"
        "assert 'numpy' not in sys.modules and 'grpc' not in sys.modules\n"
        "from serving.client import *\n"
        "assert CapsNetClient.__module__ == 'serving.client.sync'\n"
        "assert all(getattr(client, name) is not None for name in client.__all__)\n"
        "try:\n    client.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("module 'serving.client' has no attribute 'nothing'\n", "")


def test_a_result_has_the_numbers_that_the_server_sent(running: Running, client: CapsNetClient, digits: Digits) -> None:
    [result] = client.classify(digits.images[0])
    sent = running.classify(pb.Image(pixels=digits.images[0].tobytes()))
    capsules = sent.results[0].capsules
    assert (result.label, result.class_index) == ("7", 7)
    assert (result.model_name, result.model_version) == (sent.model_name, sent.model_version)
    assert result.probability == capsules[7].probability
    assert result.probabilities.tolist() == [capsule.probability for capsule in capsules]
    assert result.poses.tolist() == [list(capsule.pose) for capsule in capsules]
    assert result.pose.tolist() == list(capsules[7].pose)
    assert result.poses.dtype == result.probabilities.dtype == np.float32
    assert not (result.poses.flags.writeable or result.probabilities.flags.writeable or result.pose.flags.writeable)
    assert result.labels == client.get_model().labels == tuple("0123456789")


def test_the_model_is_described_and_fetched_once(running: Running, client: CapsNetClient) -> None:
    model = client.get_model()
    assert model is client.get_model()
    assert model is not client.get_model(refresh=True)
    assert (model.name, model.image_shape, model.pose_size) == ("capsnet-mnist", (1, 28, 28), 16)
    assert model.sha256 == running.model.artifact.sha256("fp32")
    assert (model.test_errors, model.test_images) == (26, 10_000)


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        (lambda images: images[0], "7"),
        (lambda images: images[:1], "7"),
        (lambda images: images[:5], "72104"),
        (lambda images: images[:5, np.newaxis], "72104"),
        (lambda images: images[:10:2].transpose(0, 2, 1).copy().transpose(0, 2, 1), "71445"),
        (lambda images: images[:0], ""),
        (lambda images: [images[0], SEVEN, str(SEVEN), SEVEN.read_bytes(), images[1:3]], "777721"),
        (lambda images: iter(images[:3]), "721"),
        (lambda images: SEVEN, "7"),
        (lambda images: [], ""),
    ],
    ids=["H,W", "1,H,W", "n,H,W", "n,1,H,W", "strides", "none", "mixed", "generator", "path", "nothing"],
)
def test_arrays_and_files_are_taken_in_all_their_shapes(
    client: CapsNetClient, digits: Digits, take: Callable[[Any], Any], expected: str
) -> None:
    assert _labels(client.classify(take(digits.images))) == expected


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            np.full((28, 28), -0.5, np.float32),
            r"images\[1\]: an array of float32 from -0.5 to -0.5; expected uint8 from",
        ),
        (np.full((28, 28), 256), r"images\[1\]: an array of int64 from 256 to 256; expected uint8 from 0 to 255, or"),
        (np.zeros((28, 27), np.uint8), r"images\[1\]: .*\(28, 27\); capsnet-mnist takes \(28, 28\) or \(1, 28, 28\)"),
        (np.zeros((28, 28, 1), np.uint8), r"images\[1\]: .*channels come last"),
        (np.zeros((3, 28, 28, 1), np.uint8), r"images\[1\]: .*channels come last"),
        (b"junk", r"images\[1\].encoded: 4 bytes that are neither a PNG nor a JPEG file"),
        ("missing.png", r"images\[1\]: missing.png: No such file or directory"),
        (DATA, r"images\[1\]: .*data: Is a directory"),
        (DATA / "t10k-labels-idx1-ubyte.gz", r"images\[1\]: .*gz: an IDX file of labels"),
        (b"\x1f\x8bjunk", r"images\[1\]: corrupt gzip stream"),
        ({}, r"images\[1\]: dict; expected an array"),
        (bytes(9_500_000), r"images\[1\]: 9500010 bytes; the server takes requests of up to 9437184 bytes"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_an_input_that_no_model_takes_is_refused_by_name(
    running: Running, client: CapsNetClient, stream: Stream, digits: Digits, item: Any, text: str
) -> None:
    with pytest.raises(InvalidImage, match=text) as raised:
        client.classify([digits.images[0], item, digits.images[1]])
    assert raised.value.index == 1
    assert raised.value.field.startswith("images[1]")
    first, error, third = stream([digits.images[0], item, digits.images[1]], errors="yield")
    assert isinstance(error, InvalidImage)
    assert str(error) == str(raised.value)
    assert _labels([first, third]) == "72"


def test_an_input_that_is_none_is_refused(client: CapsNetClient) -> None:
    with pytest.raises(InvalidImage, match="images: int; expected an array"):
        client.classify(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="errors: 'ignore'; expected 'raise' or 'yield'"):
        client.classify_stream([], errors="ignore")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="window: 0; expected 1 or more"):
        client.classify_stream([], window=0)


def test_images_beyond_the_limit_of_a_request_go_in_several(start: Callable[..., Running], digits: Digits) -> None:
    address = start(max_images_per_request=7, max_request_bytes=10_000).address
    file = SEVEN.read_bytes() + bytes(3000)  # PNG allows further bytes after the end of an image
    with CapsNetClient(address) as client:
        assert _labels(client.classify(digits.images[:20])) == FIRST
        assert _labels(client.classify([file] * 6)) == "777777"

    async def main() -> str:
        async with AsyncCapsNetClient(address) as client:
            return _labels(await client.classify([file, digits.images[:20], file]))

    assert asyncio.run(main()) == f"7{FIRST}7"


def test_a_file_is_scaled_on_request(client: CapsNetClient, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with Image.open(SEVEN) as image:
        image.resize((280, 280)).save(large)
    with pytest.raises(InvalidImage, match="280 x 280 pixels; expected 28 x 28"):
        client.classify(large)
    assert _labels(client.classify(large, resize=True)) == "7"
    assert _labels(client.classify_stream([large.read_bytes()], resize=True)) == "7"


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "1", "I;16"])
def test_an_image_that_pillow_has_opened_is_read_as_its_file(
    client: CapsNetClient, stream: Stream, mode: str, tmp_path: Path
) -> None:
    with Image.open(SEVEN) as image:
        grey = image.convert("L")
    converted = grey.convert("RGB").quantize(16) if mode == "P" else grey.convert(mode)
    converted.save(tmp_path / "same.png")
    with Image.open(tmp_path / "same.png") as opened:
        outcomes = [client.classify(tmp_path / "same.png")[0], client.classify(opened)[0], *stream([opened])]
        larger = opened.resize((56, 56))
    results = [outcome for outcome in outcomes if isinstance(outcome, Classification)]
    assert [result.label for result in results] == [results[0].label] * 3
    assert np.allclose([result.probabilities for result in results], results[0].probabilities, atol=1e-5)
    assert client.classify(larger, resize=True)[0].label == results[0].label
    with pytest.raises(InvalidImage, match="an image of 56 x 56 pixels; capsnet-mnist takes 28 x 28"):
        client.classify(larger)


@pytest.mark.parametrize("seconds", [1e9, 1e10, 1e300, float("inf")])
def test_a_timeout_of_ages_is_none(running: Running, seconds: float) -> None:
    with CapsNetClient(running.address, timeout=seconds) as client:
        assert client.classify(SEVEN)[0].label == "7"


def test_a_path_that_no_file_can_have_is_an_image_that_is_wrong(client: CapsNetClient, stream: Stream) -> None:
    with pytest.raises(InvalidImage, match=r"images\[0\]: 'a\\x00.png': embedded null"):
        client.classify("a\0.png")
    assert _labels(stream([SEVEN, "a\0.png", SEVEN], errors="yield")) == "7-7"


def test_a_stream_keeps_the_order_and_gives_errors_in_place(stream: Stream, digits: Digits) -> None:
    items = [image if number % 9 else b"junk" for number, image in enumerate(digits.images[RIGHT])]
    outcomes = stream(iter(items), errors="yield", window=100)
    expected = "".join("-" if number % 9 == 0 else str(label) for number, label in enumerate(digits.labels[RIGHT]))
    assert _labels(outcomes) == expected
    assert [outcome.index for outcome in outcomes if isinstance(outcome, CapsNetError)] == list(range(0, 300, 9))


def test_a_stream_takes_the_same_inputs_as_classify(stream: Stream, digits: Digits) -> None:
    assert _labels(stream(digits.images[:20])) == FIRST
    assert _labels(stream(SEVEN)) == "7"
    assert _labels(stream([])) == ""
    idx = b"\0\0\x08\x03" + struct.pack(">3I", 300, 28, 28) + digits.images[RIGHT].tobytes()
    assert _labels(stream(iter([SEVEN, idx]), window=100)) == "7" + "".join(map(str, digits.labels[RIGHT]))


def test_a_stream_raises_the_first_error_after_the_results_before_it(client: CapsNetClient, digits: Digits) -> None:
    results = client.classify_stream([*digits.images[:5], b"junk", digits.images[6]])
    assert _labels(itertools.islice(results, 5)) == "72104"
    with pytest.raises(InvalidImage, match=r"images\[5\]"):
        next(results)
    assert list(results) == []


def test_an_error_of_the_input_is_raised_after_its_results(stream: Stream, digits: Digits) -> None:
    class Broken(Exception):
        pass

    came: list[int] = []

    def images() -> Iterator[Item]:
        for number in range(3):
            came.append(number)
            yield digits.images[number]
        raise Broken

    with pytest.raises(Broken):
        stream(images())
    assert came == [0, 1, 2]


def test_results_come_while_the_input_waits_for_them(running: Running, client: CapsNetClient, digits: Digits) -> None:
    answered = threading.Semaphore(0)

    def images() -> Iterator[Item]:
        for image in digits.images[:4]:
            yield image
            assert answered.acquire(timeout=5)

    labels = ""
    for result in client.classify_stream(images()):
        labels += result.label
        answered.release()
    assert labels == "7210"

    async def main() -> str:
        answered = asyncio.Semaphore(0)

        async def images() -> AsyncIterator[Item]:
            for image in digits.images[:4]:
                yield image
                await asyncio.wait_for(answered.acquire(), 5)

        labels = ""
        async with AsyncCapsNetClient(running.address) as client:
            async for result in client.classify_stream(images()):
                labels += result.label
                answered.release()
        return labels

    assert asyncio.run(main()) == "7210"


def test_the_input_is_read_no_further_than_a_window_ahead(client: CapsNetClient, digits: Digits) -> None:
    threads = threading.active_count()
    read = 0

    def images() -> Iterator[Item]:
        nonlocal read
        for image in itertools.cycle(digits.images):
            read += 1
            yield image

    results = client.classify_stream(images(), window=50)
    for number in range(1, 200):
        next(results)
        assert read <= number + 51
    time.sleep(0.1)
    assert read == 199 + 51
    del results
    gc.collect()
    _wait_for(lambda: threading.active_count() <= threads)


def test_a_stream_that_is_read_to_its_end_is_none_that_was_cancelled(
    running: Running, stream: Stream, digits: Digits
) -> None:
    def ended(code: str) -> float:
        labels = {"grpc_type": "bidi_stream", "grpc_service": "capsnet.v1.CapsNetService"}
        labels |= {"grpc_method": "ClassifyStream", "grpc_code": code}
        return running.server.metrics.registry.get_sample_value("grpc_server_handled_total", labels) or 0.0

    ok, cancelled = ended("OK"), ended("CANCELLED")
    for _ in range(10):
        assert _labels(stream(digits.images[:1])) == "7"
    assert (ended("OK") - ok, ended("CANCELLED") - cancelled) == (10, 0)


def test_stopping_early_leaves_no_task(running: Running, digits: Digits) -> None:
    async def main() -> int:
        async with AsyncCapsNetClient(running.address) as client:
            async for result in client.classify_stream(itertools.cycle(digits.images), window=50):
                assert result.label == "7"
                break
            await asyncio.sleep(0.1)
            return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1


def test_cancelling_the_consumer_leaves_no_task(running: Running, digits: Digits) -> None:
    async def main() -> int:
        async def images() -> AsyncIterator[Item]:
            yield digits.images[0]
            await asyncio.Event().wait()

        async with AsyncCapsNetClient(running.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    async for _ in client.classify_stream(images()):
                        pass
            await asyncio.sleep(0.1)
            return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1


def test_several_threads_use_one_client(client: CapsNetClient, digits: Digits) -> None:
    labels: list[str] = []

    def work() -> None:
        labels.append(_labels(client.classify_stream(digits.images[:20])))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert labels == [FIRST] * 4


def test_several_calls_run_at_once_with_asyncio(running: Running, digits: Digits) -> None:
    async def main() -> list[str]:
        async with AsyncCapsNetClient(running.address) as client:
            await client.wait_until_ready(10)
            answers = await asyncio.gather(*(client.classify(image) for image in digits.images[:20]))
            assert (await client.get_model()).name == "capsnet-mnist"
            return [_labels(answer) for answer in answers]

    assert "".join(asyncio.run(main())) == FIRST


def test_an_unknown_model_is_reported(running: Running) -> None:
    with (
        CapsNetClient(running.address, model="capsnet-mnist", version="99") as client,
        pytest.raises(UnknownModel, match="99"),
    ):
        client.classify(SEVEN)


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
