"""Tests of a request's path without a transport: its end, its releases, and no leaks."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import cast

import numpy as np
import pytest

from serving.batching.admission import BatchPolicy
from serving.batching.batch import Hooks
from serving.batching.batcher import Batcher
from serving.batching.cost import BatchCost
from serving.batching.ticket import Share
from serving.errors import InferenceFailed, InvalidRequest, QueueFull, UnknownModel
from serving.metrics.registry import Metrics, ModelMetrics
from serving.repository.served_graph import ServedGraph, all_finite
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Steps
from serving.runtime import Arrays
from serving.services.decoding import Decoder, Decoding, in_one_step
from serving.services.request import Request
from serving.transport.rounds import Result

PATIENCE = 10.0
POISON = 255


class FakeGraph:
    """A graph that doubles its input once ``go`` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.metrics = ModelMetrics(Metrics(), "m", "1", [])
        policy = BatchPolicy(max_batch=4, good_batch=4, max_queue=8, timeout=PATIENCE, ageing=1)
        self.batcher = Batcher(self.run, Hooks(all_finite), self.metrics, policy, BatchCost([(1, 1e-3)]), slots=1)

    def run(self, arrays: Arrays) -> Arrays:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        if (arrays["numbers"] == POISON).any():
            raise RuntimeError
        return {"doubled": np.asarray(arrays["numbers"], np.float32) * 2}


class FakeModel:
    """A model of one graph that counts who uses it."""

    class artifact:
        name, version = "m", "1"

    def __init__(self) -> None:
        self.only = FakeGraph()
        self.decoder = Decoder(2, 2**20, PATIENCE, 64, refused=print)
        self.in_use = 0

    def graph(self, name: str) -> ServedGraph:
        if name != "double":
            raise UnknownModel("no such graph")
        return cast(ServedGraph, self.only)

    def acquire(self) -> None:
        self.in_use += 1

    def release(self) -> None:
        self.in_use -= 1


class NumberQuery:
    """A query of numbers to double. Negative ones are refused. Slow decoding waits for ``decoding``."""

    model_name = model_version = ""
    timeout: float | None = None
    urgent = False

    def __init__(self, *numbers: int, graph: str = "double", slow: bool = False) -> None:
        self.graph = graph
        self.size = len(numbers)
        self.slow = slow
        self.decoding = threading.Event()
        self._numbers = numbers

    def decode(self, model: ServedModel) -> Arrays:
        if self.slow:
            assert self.decoding.wait(PATIENCE)
        if min(self._numbers) < 0:
            raise InvalidRequest("numbers", "negative")
        return {"numbers": np.array(self._numbers, np.int64)}

    def decode_slowly(self, model: ServedModel) -> Decoding:
        return Decoding(in_one_step(lambda: self.decode(model)), 0, "numbers")

    def encode(self, model: ServedModel, share: Share) -> bytes:
        if share["doubled"][0] == 14:
            raise ValueError("cannot be written")
        return b",".join(b"%d" % number for number in share["doubled"].tolist())


class Note:
    """A reply that keeps its result or error."""

    deadline: float | None = None
    client = "anyone"

    def __init__(self, traced: bool = False) -> None:
        self.traced = traced
        self.told: list[bytes | Exception | None] = []
        self.steps: Steps | None = None
        self.given_up: Callable[[], object] | None = None

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        return work

    def when_given_up(self, then: Callable[[], object]) -> None:
        self.given_up = then

    def succeed(self, data: bytes, steps: Steps | None = None) -> None:
        self.steps = steps
        self._tell(data)

    def fail(self, error: Exception) -> None:
        self._tell(error)

    def end(self) -> None:
        self._tell(None)

    async def wait(self) -> bytes | Exception | None:
        """Return the result or error at the end, and check that it comes once."""
        end = time.monotonic() + PATIENCE
        while not self.told:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        (told,) = self.told
        return told

    def _tell(self, what: bytes | Exception | None) -> None:
        self.given_up = None
        self.told.append(what)


def run(test: Callable[[FakeModel], Coroutine[None, None, None]]) -> FakeModel:
    """Run a test with a model, and check that nothing uses the model at the end."""

    async def main() -> FakeModel:
        model = FakeModel()
        await test(model)
        model.only.go.set()
        await model.only.batcher.close()
        model.decoder.close()
        return model

    model = asyncio.run(main())
    assert model.in_use == 0
    return model


def request(model: FakeModel, query: NumberQuery, reply: Note) -> Request:
    return Request(query, cast(ServedModel, model), reply, model.decoder)


async def begin(request: Request, way: str) -> None:
    """Begin a request in the way of unary calls, or in the way of streams."""
    if way == "unary":
        request.begin()
    else:
        await request.begin_slowly()


@pytest.mark.parametrize("way", ["unary", "stream"])
@pytest.mark.parametrize("slow", [False, True])
def test_a_request_is_answered_once_and_counted(way: str, slow: bool) -> None:
    async def test(model: FakeModel) -> None:
        query, reply = NumberQuery(1, 2, slow=slow), Note(traced=True)
        query.decoding.set()
        await begin(request(model, query, reply), way)
        assert model.in_use == 1
        assert await reply.wait() == b"2,4"
        assert reply.steps and (reply.steps.model, reply.steps.images) == ("m", 2)

    statistics = run(test).only.metrics.statistics
    assert (statistics.success.count, statistics.fail.count) == (1, 0)


@pytest.mark.parametrize("way", ["unary", "stream"])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [(-1, InvalidRequest, "OTHER"), (POISON, InferenceFailed, "BACKEND"), (7, ValueError, "OTHER")],
    ids=["decoding", "computing", "encoding"],
)
def test_an_error_of_any_step_is_its_answer_and_counted(
    way: str, slow: bool, number: int, kind: type[Exception], reason: str
) -> None:
    async def test(model: FakeModel) -> None:
        query, reply = NumberQuery(number, slow=slow), Note()
        query.decoding.set()
        await begin(request(model, query, reply), way)
        assert isinstance(await reply.wait(), kind)

    statistics = run(test).only.metrics.statistics
    assert (statistics.success.count, statistics.fail.count, statistics.failures[reason]) == (0, 1, 1)


def test_slow_requests_of_a_client_give_places_to_those_of_another() -> None:
    async def test(model: FakeModel) -> None:
        queries = [NumberQuery(1, slow=True) for _ in range(65)]
        replies = [Note() for _ in queries]
        replies[-1].client = "somebody else"
        for query, reply in zip(queries, replies, strict=True):
            request(model, query, reply).begin()
            await asyncio.sleep(0)
        displaced = await replies[-2].wait()
        assert isinstance(displaced, QueueFull) and "this client has more than its share" in str(displaced)
        assert [bool(reply.told) for reply in replies] == [False] * 63 + [True, False]
        for query in queries:
            query.decoding.set()
        assert await replies[-1].wait() == b"2"
        await asyncio.gather(*(reply.wait() for reply in replies))

    run(test)


def test_what_there_is_no_room_to_decode_is_refused_before_anything_else_is_read() -> None:
    async def test(model: FakeModel) -> None:
        queries = [NumberQuery(1, slow=True) for _ in range(65)]
        replies = [Note() for _ in queries]
        for query, reply in zip(queries, replies, strict=True):
            request(model, query, reply).begin()
        assert [bool(reply.told) for reply in replies] == [False] * 64 + [True]
        assert isinstance(await replies[-1].wait(), QueueFull)
        for query in queries:
            query.decoding.set()
        await asyncio.gather(*(reply.wait() for reply in replies))

    run(test)


def test_a_graph_that_is_not_there_is_no_use_of_the_model() -> None:
    async def test(model: FakeModel) -> None:
        with pytest.raises(UnknownModel):
            request(model, NumberQuery(1, graph="none"), Note())
        assert model.in_use == 0

    run(test)


def test_a_full_queue_refuses_a_unary_call_and_lets_a_stream_wait() -> None:
    async def test(model: FakeModel) -> None:
        model.only.go.clear()
        replies = [Note() for _ in range(4)]
        request(model, NumberQuery(1), replies[0]).begin()
        await asyncio.to_thread(model.only.begun.wait, PATIENCE)
        request(model, NumberQuery(*range(1, 4)), replies[1]).begin()
        request(model, NumberQuery(*range(1, 9)), replies[2]).begin()
        assert isinstance(await replies[2].wait(), QueueFull)
        patient = asyncio.create_task(request(model, NumberQuery(*range(1, 7)), replies[3]).begin_slowly())
        await asyncio.sleep(0.05)
        assert not patient.done() and not replies[3].told
        model.only.go.set()
        assert await replies[3].wait() == b"2,4,6,8,10,12"
        assert [await reply.wait() for reply in replies[:2]] == [b"2", b"2,4,6"]

    run(test)


@pytest.mark.parametrize("way", ["unary", "stream"])
def test_a_request_that_is_given_up_while_it_waits_is_never_computed(way: str) -> None:
    async def test(model: FakeModel) -> None:
        model.only.go.clear()
        first, reply = Note(), Note()
        request(model, NumberQuery(1), first).begin()
        await asyncio.to_thread(model.only.begun.wait, PATIENCE)
        await begin(request(model, NumberQuery(2), reply), way)
        assert reply.given_up
        reply.given_up()
        assert await reply.wait() is None
        assert (model.in_use, model.only.batcher.queued) == (1, 0)
        model.only.go.set()
        assert await first.wait() == b"2"

    statistics = run(test).only.metrics.statistics
    assert (statistics.inference_count, statistics.failures["CANCELED"]) == (1, 1)


def test_a_unary_request_that_is_given_up_while_it_is_decoded_never_gets_into_the_queue() -> None:
    async def test(model: FakeModel) -> None:
        query, reply = NumberQuery(1, slow=True), Note()
        request(model, query, reply).begin()
        await asyncio.sleep(0.02)
        assert reply.given_up
        reply.given_up()
        assert await reply.wait() is None
        query.decoding.set()

    assert run(test).only.metrics.statistics.inference_count == 0


def test_a_request_that_is_given_up_in_the_turn_in_which_it_came_ends_and_releases_the_model() -> None:
    async def test(model: FakeModel) -> None:
        reply = Note()
        request(model, NumberQuery(1, slow=True), reply).begin()
        assert reply.given_up
        reply.given_up()
        assert await reply.wait() is None
        assert model.in_use == 0

    assert run(test).only.metrics.statistics.failures["CANCELED"] == 1


def test_a_stream_that_ends_while_it_waits_for_room_releases_the_model() -> None:
    async def test(model: FakeModel) -> None:
        model.only.go.clear()
        first, second, reply = Note(), Note(), Note()
        request(model, NumberQuery(1), first).begin()
        await asyncio.to_thread(model.only.begun.wait, PATIENCE)
        request(model, NumberQuery(*range(1, 4)), second).begin()
        patient = asyncio.create_task(request(model, NumberQuery(*range(1, 7)), reply).begin_slowly())
        await asyncio.sleep(0.05)
        patient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await patient
        assert await reply.wait() is None
        assert model.in_use == 2
        model.only.go.set()
        await asyncio.gather(first.wait(), second.wait())

    run(test)


class ForgetfulNote(Note):
    """A reply that keeps no error, since an error refers to the request by its traceback."""

    def fail(self, error: Exception) -> None:
        self._tell(type(error).__name__.encode())


@pytest.mark.parametrize("end", ["answer", "give up", "failed batch", "late", "refused in a thread"])
def test_an_ended_request_goes_without_the_garbage_collector(no_collection: None, end: str) -> None:
    async def test(model: FakeModel) -> None:
        reply = ForgetfulNote()
        numbers = {"failed batch": POISON, "refused in a thread": -1}.get(end, 1)
        query = NumberQuery(numbers, slow=end == "refused in a thread")
        query.decoding.set()
        one = request(model, query, reply)
        if end == "late":
            model.only.go.clear()
            request(model, NumberQuery(1), before := Note()).begin()
            await asyncio.to_thread(model.only.begun.wait, PATIENCE)
            reply.deadline = time.monotonic() + 0.2
        one.begin()
        if end == "late":
            await asyncio.sleep(0.25)
            model.only.go.set()
            await before.wait()
        ended = weakref.ref(reply), weakref.ref(query)
        if end == "give up":
            assert reply.given_up
            reply.given_up()
        told = await reply.wait()
        assert told == {
            "answer": b"2", "give up": None, "failed batch": b"InferenceFailed", "late": b"DeadlineUnmeetable",
            "refused in a thread": b"InvalidRequest",
        }[end]  # fmt: skip
        del reply, one, query
        later = Note()
        request(model, NumberQuery(1), later).begin()  # a slot keeps its last batch until the next one
        await later.wait()
        assert [reference() for reference in ended] == [None, None]

    run(test)
