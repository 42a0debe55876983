"""Tests of the threads that decode images: turns, memory, time and cancellation."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from serving.errors import DecodingTooSlow, InvalidRequest, QueueFull
from serving.files.image_headers import DAMAGED, BadImage
from serving.runtime import Arrays
from serving.services import decoding
from serving.services.decoding import Decoder, Decoding, Measure, Steps, in_one_step, measured
from serving.services.encoded_images import RefusedImage

PATIENCE = 10.0
RESULT: Arrays = {"images": np.zeros(1)}


class Slow:
    """A decoding that waits for ``go`` at each image. It notes its threads, and its images."""

    def __init__(self, images: int = 1) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.threads: list[str] = []
        self.images = 0
        self._count = images

    def steps(self) -> Steps:
        for _ in range(self._count):
            self.threads.append(threading.current_thread().name)
            self.begun.set()
            assert self.go.wait(PATIENCE)
            self.images += 1
            yield
        return RESULT

    def decoding(self, size: int = 1, images: int = 1) -> Decoding:
        return Decoding(self.steps(), size, "images", images)


def run(
    test: Callable[[Decoder], Coroutine[None, None, None]],
    threads: int = 1,
    max_bytes: int = 100,
    timeout: float = PATIENCE,
    max_images: int = 100,
) -> list[str]:
    """Run a test with a decoder, check that it keeps nothing at the end, and return the causes of refusals."""
    refused: list[str] = []

    async def main() -> None:
        decoder = Decoder(threads, max_bytes, timeout, max_images, refused.append)
        await test(decoder)
        await until(lambda: (decoder.reserved, decoder.under_way) == (0, 0))
        assert not decoder._waiting
        assert not decoder._begun
        decoder.close()

    asyncio.run(main())
    return refused


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def test_a_request_of_one_image_overtakes_one_of_many() -> None:
    async def test(decoder: Decoder) -> None:
        many, one = Slow(1000), Slow(1)
        first = asyncio.create_task(decoder.decode(many.decoding()))
        await asyncio.to_thread(many.begun.wait, PATIENCE)
        second = asyncio.create_task(decoder.decode(one.decoding()))
        await asyncio.sleep(0)
        one.go.set()
        time.sleep(0.005)  # longer than a turn
        many.go.set()
        assert await second == RESULT
        assert not first.done()
        assert many.images < 1000
        assert await first == RESULT
        assert many.images == 1000
        assert {name.partition("_")[0] for name in many.threads + one.threads} == {"decode"}

    # Each image of the many takes a turn of its own.
    original = Slow.steps

    def steps(self: Slow) -> Steps:
        inner = original(self)
        while True:
            try:
                next(inner)
            except StopIteration as stop:
                result: Arrays = stop.value
                return result
            time.sleep(0.0001)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slow, "steps", steps)
        run(test)


def test_no_more_requests_are_decoded_at_once_than_there_are_threads() -> None:
    async def test(decoder: Decoder) -> None:
        all_of_them = [Slow() for _ in range(10)]
        tasks = [asyncio.create_task(decoder.decode(one.decoding())) for one in all_of_them]
        await until(lambda: sum(one.begun.is_set() for one in all_of_them) == 2)
        await asyncio.sleep(0.05)
        assert [one.begun.is_set() for one in all_of_them] == [True, True] + [False] * 8
        assert decoder.under_way == 10
        for one in all_of_them:
            one.go.set()
        await asyncio.gather(*tasks)

    run(test, threads=2)


def test_the_memory_of_all_decodings_together_is_bounded_and_the_others_wait_in_order() -> None:
    async def test(decoder: Decoder) -> None:
        sizes = [60, 40, 1, 100]
        all_of_them = [Slow() for _ in sizes]
        tasks = [
            asyncio.create_task(decoder.decode(one.decoding(size)))
            for one, size in zip(all_of_them, sizes, strict=True)
        ]
        await until(lambda: all_of_them[1].begun.is_set())
        await asyncio.sleep(0.02)
        assert [one.begun.is_set() for one in all_of_them] == [True, True, False, False]
        assert decoder.reserved == 100
        all_of_them[1].go.set()
        await until(lambda: all_of_them[2].begun.is_set())
        assert decoder.reserved == 61
        for one in all_of_them:
            one.go.set()
        await asyncio.gather(*tasks)

    run(test, threads=4)


def test_a_request_that_needs_more_memory_than_there_is_is_refused_at_once() -> None:
    async def test(decoder: Decoder) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await decoder.decode(Slow().decoding(101))
        assert str(caught.value) == (
            "images: decoding takes 101 bytes of memory; the limit is 100 bytes (max_image_memory)"
        )

    assert run(test) == ["memory"]


MANY_IMAGES = 17  # too many for the event loop to read their headers


def measuring(found: int, threads: list[str], go: threading.Event | None = None) -> Measure:
    """Yield after each image, and return its memory. Each step notes its thread and waits for ``go``."""
    for _ in range(MANY_IMAGES):
        threads.append(threading.current_thread().name)
        assert go is None or go.wait(PATIENCE)
        yield
    return found


@pytest.mark.parametrize("images", [1, MANY_IMAGES])
def test_the_memory_of_many_images_is_found_in_a_thread_and_that_of_few_at_once(images: int) -> None:
    async def test(decoder: Decoder) -> None:
        one, blocking, threads = Slow(), Slow(), list[str]()
        first = asyncio.create_task(decoder.decode(blocking.decoding(60)))
        await asyncio.to_thread(blocking.begun.wait, PATIENCE)
        given = measured(one.steps(), measuring(41, threads), "images", images)
        assert (given.bytes, len(threads)) == ((41, MANY_IMAGES) if images == 1 else (0, 0))
        second = asyncio.create_task(decoder.decode(given))
        await until(lambda: len(threads) == MANY_IMAGES and decoder._free == 1 and decoder._waiting)
        assert {name.partition("_")[0] for name in threads} == {"MainThread" if images == 1 else "decode"}
        assert (one.begun.is_set(), decoder.reserved) == (False, 60), "it waits for its memory"
        blocking.go.set()
        await asyncio.to_thread(one.begun.wait, PATIENCE)
        assert decoder.reserved == 41
        one.go.set()
        assert (await first, await second) == (RESULT, RESULT)

    assert run(test, threads=2) == []


def test_a_request_that_is_found_to_need_more_memory_than_there_is_is_refused() -> None:
    async def test(decoder: Decoder) -> None:
        one = Slow()
        with pytest.raises(InvalidRequest, match="images: decoding takes 101 bytes of memory"):
            await decoder.decode(measured(one.steps(), measuring(101, []), "images", MANY_IMAGES))
        assert not one.begun.is_set()

    assert run(test) == ["memory"]


@pytest.mark.parametrize("found", [50, 101])
def test_a_decoding_that_is_given_up_while_its_memory_is_found_is_not_begun(found: int) -> None:
    async def test(decoder: Decoder) -> None:
        one, threads, go = Slow(), list[str](), threading.Event()
        given = measured(one.steps(), measuring(found, threads, go), "images", MANY_IMAGES)
        task = asyncio.create_task(decoder.decode(given))
        await until(lambda: threads)
        task.cancel()
        await asyncio.wait([task])
        go.set()
        await until(lambda: decoder._free == 1)
        assert (task.cancelled(), len(threads), one.begun.is_set()) == (True, 1, False)

    assert run(test) == []


def test_a_request_that_does_not_fit_into_the_queue_is_refused_at_once_and_a_stream_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "_TURN_SECONDS", PATIENCE)  # the first decoding ends before the stream's begins

    async def test(decoder: Decoder) -> None:
        blocking, others = Slow(), [Slow() for _ in range(4)]
        first = asyncio.create_task(decoder.decode(blocking.decoding(images=11)))  # alone, so it is not too large
        await asyncio.to_thread(blocking.begun.wait, PATIENCE)
        with pytest.raises(QueueFull) as caught:
            await decoder.decode(others[0].decoding())
        assert str(caught.value) == (
            "11 images wait to be decoded, 1 more would pass the limit of 10 (max_queue); try again later"
        )
        stream = asyncio.create_task(decoder.decode(others[1].decoding(images=10), patient=True))
        blocking.go.set()
        assert await first == RESULT
        await asyncio.to_thread(others[1].begun.wait, PATIENCE)
        last = asyncio.create_task(decoder.decode(others[2].decoding()))  # the stream takes none of its room
        for one in others:
            one.go.set()
        assert (await stream, await last) == (RESULT, RESULT)

    assert run(test, max_images=10) == []


@pytest.mark.parametrize("waits_for", ["memory", "a thread", "its own image"])
def test_a_decoding_that_takes_too_long_is_given_up(waits_for: str) -> None:
    async def test(decoder: Decoder) -> None:
        blocking, late = Slow(), Slow()
        first = asyncio.create_task(decoder.decode(blocking.decoding(100 if waits_for == "memory" else 1)))
        await asyncio.to_thread(blocking.begun.wait, PATIENCE)
        tasks = [first]
        if waits_for != "its own image":
            tasks.append(asyncio.create_task(decoder.decode(late.decoding())))
        for task in tasks:
            with pytest.raises(DecodingTooSlow) as caught:
                await task
            assert str(caught.value) == "images: not decoded within 0.05 seconds (image_timeout)"
        assert decoder.under_way == 0
        assert decoder.reserved > 0  # the thread still works
        blocking.go.set()
        await until(lambda: decoder.reserved == 0)
        assert not late.begun.is_set()

    assert set(run(test, timeout=0.05)) == {"timeout"}


def test_a_cancelled_decoding_that_waits_is_forgotten_at_once() -> None:
    async def test(decoder: Decoder) -> None:
        blocking, waiting = Slow(), Slow()
        first = asyncio.create_task(decoder.decode(blocking.decoding(50)))
        await asyncio.to_thread(blocking.begun.wait, PATIENCE)
        for size in (50, 51):  # for its turn, and for memory
            second = asyncio.create_task(decoder.decode(waiting.decoding(size)))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait([second])
            assert second.cancelled()
            assert decoder.reserved == 50
        forgotten = weakref.ref(waiting)
        del waiting, second
        gc.collect()
        assert forgotten() is None
        blocking.go.set()
        await first

    run(test)


def test_a_cancelled_decoding_that_has_a_thread_stops_after_its_image() -> None:
    async def test(decoder: Decoder) -> None:
        many = Slow(1000)
        task = asyncio.create_task(decoder.decode(many.decoding()))
        await asyncio.to_thread(many.begun.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        many.go.set()
        await until(lambda: decoder.reserved == 0)
        assert many.images == 1

    run(test)


def test_an_error_is_that_of_the_request_and_its_cause_is_counted() -> None:
    def fail() -> Arrays:
        raise RefusedImage("images[1].encoded", BadImage(DAMAGED, "damaged"))

    async def test(decoder: Decoder) -> None:
        with pytest.raises(InvalidRequest, match=r"^images\[1\].encoded: damaged$"):
            await decoder.decode(Decoding(in_one_step(fail), 1, "images"))
        with pytest.raises(ZeroDivisionError):
            await decoder.decode(Decoding(in_one_step(lambda: {"images": np.zeros(1 // 0)}), 1, "images"))

    assert run(test) == ["damaged"]


@pytest.mark.parametrize("end", ["error", "timeout"])
def test_a_failed_decoding_keeps_no_bytes_until_a_garbage_collection(no_collection: None, end: str) -> None:
    class Content:
        """The bytes of a request."""

    def steps(content: Content) -> Steps:
        yield
        if end == "error":
            raise RefusedImage("images", BadImage(DAMAGED, f"{type(content)}"))
        time.sleep(0.1)
        yield
        return RESULT

    async def test(decoder: Decoder) -> None:
        content = Content()
        kept = weakref.ref(content)
        decoding = Decoding(steps(content), 1, "images")
        del content
        task = asyncio.create_task(decoder.decode(decoding))
        del decoding
        await asyncio.wait([task])
        assert task.exception()
        await until(lambda: decoder.reserved == 0)
        del task
        await asyncio.sleep(0)
        await until(lambda: kept() is None)

    run(test, timeout=0.05 if end == "timeout" else PATIENCE)


def test_a_decoder_that_is_closed_ends_its_threads_and_what_waits_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_TURN_SECONDS", PATIENCE)  # what has begun ends before what waits begins

    async def test(decoder: Decoder) -> None:
        blocking, begun = await _held(decoder)
        decoder._timeout = 0.1  # of what waits alone
        waiting = asyncio.create_task(decoder.decode(Slow().decoding()))
        await asyncio.sleep(0)
        decoder.close()
        blocking.go.set()
        assert await begun == RESULT
        with pytest.raises(DecodingTooSlow):
            await waiting

    run(test)


async def _held(decoder: Decoder, client: str = "blocking", size: int = 1) -> tuple[Slow, "asyncio.Task[Arrays]"]:
    """Occupy a thread with a decoding."""
    blocking = Slow()
    task = asyncio.create_task(decoder.decode(blocking.decoding(size), client=client))
    await asyncio.to_thread(blocking.begun.wait, PATIENCE)
    return blocking, task


def test_a_client_that_fills_the_room_gives_places_to_others() -> None:
    async def test(decoder: Decoder) -> None:
        blocking, first = await _held(decoder, "many")

        def ask(client: str, images: int = 3, patient: bool = False) -> "asyncio.Task[Arrays]":
            one = Slow()
            one.go.set()
            return asyncio.create_task(decoder.decode(one.decoding(images=images), patient, client))

        stream = ask("many", patient=True)
        many = [ask("many") for _ in range(3)]
        await asyncio.sleep(0)
        few = ask("few", images=2)
        with pytest.raises(QueueFull) as caught:
            await many[2]
        assert str(caught.value) == (
            "too many images wait to be decoded, and this client has more than its share of them; try again later"
        )
        assert caught.value.retry_after > 0
        with pytest.raises(QueueFull, match=r"^9 images wait to be decoded, 2 more would pass the limit of 10 "):
            await ask("many", images=2)
        few_again = ask("few", images=3)
        with pytest.raises(QueueFull):
            await many[1]
        with pytest.raises(QueueFull, match=r"^9 images wait"):
            await ask("few", images=2)
        blocking.go.set()
        for task in (first, stream, many[0], few, few_again):
            assert await task == RESULT

    assert run(test, max_images=10) == []


def test_clients_take_turns_at_the_threads_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def takes(seconds: float, client: str) -> Decoding:
        def decode() -> Arrays:
            order.append(client)
            clock.now += seconds
            return RESULT

        return Decoding(in_one_step(decode), 1, "images")

    async def test(decoder: Decoder) -> None:
        blocking, first = await _held(decoder)
        tasks = [asyncio.create_task(decoder.decode(takes(2.0, "slow"), client="s")) for _ in range(4)]
        tasks += [asyncio.create_task(decoder.decode(takes(1.0, "fast"), client="f")) for _ in range(6)]
        await asyncio.sleep(0)
        blocking.go.set()
        await asyncio.gather(first, *tasks)

    run(test)
    assert order == ["slow", "fast", "fast", "slow", "fast", "fast", "slow", "fast", "fast", "slow"]


def test_a_client_whose_decodings_hold_much_memory_leaves_room_to_others() -> None:
    async def test(decoder: Decoder) -> None:
        blocking, first = await _held(decoder, "many", size=30)
        many, few = [Slow() for _ in range(4)], Slow()
        tasks = [asyncio.create_task(decoder.decode(one.decoding(20), client="many")) for one in many]
        await asyncio.sleep(0)
        assert decoder.reserved == 50, "half of the memory"
        tasks.append(asyncio.create_task(decoder.decode(few.decoding(50), client="few")))
        await asyncio.sleep(0)
        assert decoder.reserved == 100
        blocking.go.set()
        few.go.set()
        assert await tasks.pop() == RESULT
        for one in many:
            one.go.set()
        await asyncio.gather(first, *tasks)

    run(test)


def test_what_is_reserved_is_told_after_each_change() -> None:
    told: list[int] = []

    async def test() -> None:
        decoder = Decoder(1, 100, PATIENCE, 100, lambda _: None, told.append)
        first, second = Slow(), Slow()
        tasks = [asyncio.create_task(decoder.decode(one.decoding(60))) for one in (first, second)]
        for one in (first, second):
            await until(one.begun.is_set)
            one.go.set()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)
        assert told[0] == 63 and told[-1] == 0
        assert all(one != other for one, other in pairwise(told))
        decoder.close()

    asyncio.run(test())


def test_clients_take_turns_while_they_wait_for_memory() -> None:
    order: list[str] = []

    def large(client: str) -> Decoding:
        def decode() -> Arrays:
            order.append(client)
            return RESULT

        return Decoding(in_one_step(decode), 60, "images")

    async def test(decoder: Decoder) -> None:
        blocking, first = await _held(decoder, size=60)
        tasks = [asyncio.create_task(decoder.decode(large(name), client=name)) for name in "aaabbb"]
        await asyncio.sleep(0)
        blocking.go.set()
        await asyncio.gather(first, *tasks)

    run(test, threads=4)
    assert "".join(order) == "ababab"
