"""Tests of the choice of threads, runtimes and batch size, with runtimes of known cost, and of the warm-up."""

import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.repository.tuning import Plan, Timing, candidates, tune
from serving.runtime import Array, Arrays, Run, Runtime, TensorSpec, rows
from tests.conftest import Digits, Running
from tests.test_lifecycle import server_process

SHAPE = (1, 28, 28)
INPUTS = {"images": TensorSpec(np.dtype(np.uint8), SHAPE)}
MILLISECOND = 0.001


class FakeMachine:
    """Runtimes whose calls take a known time on the clock of their thread, which other load does not slow down."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        """Prepare a machine. seconds: the time of a call, by threads and images."""
        self._seconds = seconds
        self._clock = threading.local()
        self._lock = threading.Lock()
        self.opened: list[int] = []
        self.calls: Counter[tuple[int, int]] = Counter()  # by threads and images

    def perf_counter(self) -> float:
        return getattr(self._clock, "now", 0.0)

    def open(self, threads: int) -> Run:
        self.opened.append(threads)

        def run(arrays: Arrays) -> Arrays:
            images = arrays["images"]
            assert images.shape[1:] == SHAPE
            assert images.dtype == np.uint8
            count = len(images)
            with self._lock:
                self.calls[threads, count] += 1
            self._clock.now = self.perf_counter() + self._seconds(threads, count)
            return {"probabilities": np.zeros((count, 10)), "poses": np.zeros((count, 10, 16))}

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], float]], FakeMachine]:
    """Return a function that makes a machine. The tuning uses the machine's clock."""

    def make(seconds: Callable[[int, int], float]) -> FakeMachine:
        fake = FakeMachine(seconds)
        monkeypatch.setattr("serving.repository.tuning.time", fake)
        return fake

    return make


Make = Callable[[Callable[[int, int], float]], FakeMachine]


@pytest.mark.parametrize(
    ("cores", "threads", "runtimes", "expected"),
    [
        (8, 0, 0, [(1, 8), (4, 2), (8, 1)]),
        (2, 0, 0, [(1, 2), (2, 1)]),
        (1, 0, 0, [(1, 1)]),
        (3, 0, 0, [(1, 2), (1, 3), (3, 1)]),
        (8, 3, 5, [(3, 5)]),
        (8, 4, 0, [(4, 1), (4, 2)]),
        (8, 16, 0, [(16, 1)]),
        (8, 0, 4, [(2, 4)]),
        (2, 0, 16, [(1, 16)]),
    ],
)
def test_the_compared_pairs_use_the_cores_and_keep_fixed_settings(
    cores: int, threads: int, runtimes: int, expected: list[tuple[int, int]]
) -> None:
    assert candidates(cores, threads, runtimes) == expected


def test_a_batch_that_costs_much_by_itself_makes_batches_large(machine: Make) -> None:
    fake = machine(lambda threads, images: MILLISECOND * (1 + 0.1 * images))
    _, tuned = tune(fake.open, INPUTS, [(1, 1)], max_batch=0, most=64)
    assert tuned.plan == Plan(threads=1, runtimes=1, max_batch=64)


def test_the_smallest_batch_that_is_nearly_as_fast_is_chosen(machine: Make) -> None:
    fake = machine(lambda threads, images: MILLISECOND * (0.01 + images))
    _, tuned = tune(fake.open, INPUTS, [(1, 1)], max_batch=0, most=64)
    # The server adds 0.5 ms. So batches of 8 lose 5.2 % of the rate of batches of 64, and batches of 16 lose 2.3 %.
    assert tuned.plan.max_batch == 16


def test_a_runtime_that_slows_with_size_is_given_small_batches(machine: Make) -> None:
    fake = machine(lambda threads, images: MILLISECOND * images * (1 if images <= 4 else 3))
    _, tuned = tune(fake.open, INPUTS, [(1, 1)], max_batch=0, most=64)
    assert tuned.plan.max_batch == 4


@pytest.mark.parametrize(
    ("gains", "expected"),
    [({1: 1, 2: 1.2, 4: 1.3}, (1, 4)), ({1: 1, 2: 1.97, 4: 2.5}, (2, 2)), ({1: 1, 2: 1.9, 4: 3.97}, (4, 1))],
    ids=["one thread", "two", "four"],
)
def test_the_fastest_single_batch_decides_between_nearly_equal_ways_to_use_the_cores(
    machine: Make, gains: dict[int, float], expected: tuple[int, int]
) -> None:
    fake = machine(lambda threads, images: 10 * MILLISECOND * (4 + images) / gains[threads])
    _, tuned = tune(fake.open, INPUTS, candidates(4, 0, 0), max_batch=8, most=64)
    assert tuned.plan == Plan(*expected, max_batch=8)


def test_the_comparison_is_reported_with_the_right_times(machine: Make) -> None:
    fake = machine(lambda threads, images: MILLISECOND * images)
    _, tuned = tune(fake.open, INPUTS, [(1, 2), (2, 1)], max_batch=0, most=5)
    assert [(timing.threads, timing.runtimes, timing.batch) for timing in tuned.compared] == [
        (threads, runtimes, batch) for threads, runtimes in ((1, 2), (2, 1)) for batch in (1, 2, 4, 5)
    ]
    for timing in (*tuned.compared, *tuned.timings):
        assert timing.seconds == pytest.approx(MILLISECOND * timing.batch)
    assert Timing(1, 2, 5, 0.005).images_per_second == pytest.approx(2000)


@pytest.mark.parametrize(("max_batch", "most"), [(0, 24), (7, 64), (1, 64)])
def test_every_batch_size_of_the_plan_is_warm_in_every_runtime(machine: Make, max_batch: int, most: int) -> None:
    fake = machine(lambda threads, images: MILLISECOND * (1 + 0.1 * images))
    run, tuned = tune(fake.open, INPUTS, [(1, 3), (3, 1)], max_batch, most)
    plan = tuned.plan
    assert [timing.batch for timing in tuned.timings] == [*range(1, plan.max_batch + 1)]
    for size in range(1, plan.max_batch + 1):
        assert fake.calls[plan.threads, size] >= plan.runtimes
    assert max(size for _, size in fake.calls) <= (max_batch or most)
    assert sorted(fake.opened) == [1, 3], "each runtime is opened once"
    before = fake.calls[plan.threads, 1]
    run({"images": np.zeros((1, *SHAPE), np.uint8)})
    assert fake.calls[plan.threads, 1] == before + 1, "the runtime that is warm is the one that serves"


def test_a_plan_that_is_set_in_full_is_warmed_without_a_comparison(machine: Make) -> None:
    fake = machine(lambda threads, images: MILLISECOND)
    _, tuned = tune(fake.open, INPUTS, [(2, 2)], max_batch=6, most=64)
    assert tuned.compared == ()
    assert tuned.plan == Plan(2, 2, 6)
    assert {size for _, size in fake.calls} == set(range(1, 7))
    assert fake.opened == [2]


def test_a_measurement_that_other_load_disturbed_does_not_count(machine: Make) -> None:
    calls = Counter[int]()

    def seconds(threads: int, images: int) -> float:
        calls[images] += 1
        return MILLISECOND * images * (50 if calls[images] <= 2 else 1)

    _, tuned = tune(machine(seconds).open, INPUTS, [(1, 1)], max_batch=4, most=64)
    assert [timing.seconds for timing in tuned.timings] == pytest.approx([MILLISECOND * size for size in (1, 2, 3, 4)])


def test_a_server_is_ready_only_after_all_its_batch_sizes_were_computed(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Counter[int]()
    run = Runtime.run

    def count(runtime: Runtime, arrays: Arrays) -> dict[str, Array]:
        sizes[rows(arrays)] += 1
        return run(runtime, arrays)

    monkeypatch.setattr(Runtime, "run", count)
    running = start(threads=1, runtimes=2, max_batch=5)
    assert set(sizes) == {1, 2, 3, 4, 5}
    assert min(sizes.values()) >= 2
    tuning = running.stub.GetModel(pb.GetModelRequest(), timeout=20).tuning
    assert (tuning.threads, tuning.runtimes, tuning.max_batch, len(tuning.compared)) == (1, 2, 5, 0)
    assert 0 < tuning.image_seconds + tuning.batch_seconds < 1


def test_settings_without_a_value_are_measured_and_reported(start: Callable[..., Running]) -> None:
    running = start(threads=1, runtimes=1, max_batch=0)
    tuning = running.stub.GetModel(pb.GetModelRequest(), timeout=20).tuning
    assert [timing.batch for timing in tuning.compared] == [1, 2, 4, 8, 16, 32]
    assert tuning.max_batch in [timing.batch for timing in tuning.compared]
    assert all(timing.seconds > 0 for timing in tuning.compared)


def test_the_first_requests_of_every_size_are_not_slower_than_later_ones(digits: Digits) -> None:
    tries = (_slow_sizes(digits) for _ in range(4))  # the machine may hold up some requests of a try
    assert any(len(slow) <= 2 for slow in tries)


def _slow_sizes(digits: Digits) -> list[int]:
    """Start a server, and return the sizes of requests, 1 to 16, whose first one is slow."""
    sizes = range(1, 17)
    requests = {
        size: pb.ClassifyRequest(images=[pb.Image(pixels=image.tobytes()) for image in digits.images[:size]])
        for size in sizes
    }
    with (
        server_process("--threads", "1", "--runtimes", "1", "--max-batch", "16") as (_, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.GetModel(
            pb.GetModelRequest(), timeout=20
        )  # connect first: the warm-up does not include the client's connection

        def seconds(size: int) -> float:
            begin = time.perf_counter()
            assert len(stub.Classify(requests[size], timeout=20).results) == size
            return time.perf_counter() - begin

        first = {size: seconds(size) for size in sizes}
        later = {size: [seconds(size) for _ in range(40)] for size in sizes}
    return [size for size in sizes if first[size] > 3 * np.percentile(later[size], 99)]
