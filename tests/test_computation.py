"""Tests of calls that need several graphs, with a graph that doubles numbers."""

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from typing import cast

import numpy as np
import pytest

from serving.batching.ticket import Share
from serving.errors import InferenceFailed, InvalidRequest, QueueFull, UnknownModel
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from serving.services.computation import Computation
from serving.services.computed import ComputedQuery, ComputedRequest
from serving.services.decoding import Decoding, in_one_step
from serving.services.places import Places
from tests.test_request import PATIENCE, POISON, FakeGraph, FakeModel, ForgetfulNote, Note


class Model(FakeModel):
    """A model whose only graph also classifies."""

    @property
    def classify(self) -> FakeGraph:
        return self.only


class Twice(ComputedQuery):
    """A query of numbers to double twice. Negative ones are refused after the first time."""

    model_name = model_version = ""

    def __init__(self, *numbers: int) -> None:
        self.size = len(numbers)
        self._numbers = numbers

    async def answer(self, computation: Computation) -> bytes:
        numbers = np.array(self._numbers, np.int64)
        once = np.asarray((await computation.run("double", {"numbers": numbers}))["doubled"], np.float32)
        if (once < 0).any():
            raise InvalidRequest("numbers", "negative")
        twice = await computation.run("double", {"numbers": once.astype(np.int64)})
        return b",".join(b"%d" % number for number in twice["doubled"].tolist())


def computation(model: Model, caller: Note) -> Computation:
    return Computation(cast(ServedModel, model), caller, model.decoder)


def begin(model: Model, query: ComputedQuery, reply: Note) -> ComputedRequest:
    request = ComputedRequest(query, computation(model, reply), reply, Places(1))
    request.begin()
    return request


def run(test: Callable[[Model], Coroutine[None, None, None]]) -> None:
    """Run a test with a model, which nobody may use at the end."""

    async def main() -> None:
        model = Model()
        await test(model)
        model.only.go.set()
        await model.only.batcher.close()
        assert model.in_use == 0

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def numbers(*given: int) -> Arrays:
    return {"numbers": np.array(given, np.int64)}


def test_one_graph_follows_the_other_and_both_count_their_requests() -> None:
    async def test(model: Model) -> None:
        begin(model, Twice(1, 2), note := Note(traced=True))
        assert await note.wait() == b"4,8"
        assert note.steps and (note.steps.images, note.steps.model) == (2, "m")
        assert model.only.metrics.statistics.success.count == 2

    run(test)


def test_an_error_of_a_graph_and_one_between_two_graphs_are_counted_once() -> None:
    async def test(model: Model) -> None:
        begin(model, Twice(POISON), poisoned := Note())
        assert isinstance(await poisoned.wait(), InferenceFailed)
        assert model.only.metrics.statistics.fail.count == 1
        begin(model, Twice(-1), refused := Note())
        assert isinstance(await refused.wait(), InvalidRequest)
        assert model.only.metrics.statistics.fail.count == 2
        with pytest.raises(UnknownModel), computation(model, Note()) as one:
            await one.run("triple", numbers(1))

    run(test)


def test_a_full_queue_refuses_a_call_and_a_patient_one_waits() -> None:
    async def test(model: Model) -> None:
        model.only.go.clear()
        begin(model, Twice(1), first := Note())
        await asyncio.to_thread(model.only.begun.wait, PATIENCE)
        begin(model, Twice(*range(5)), second := Note())
        await asyncio.sleep(0)
        begin(model, Twice(*range(4)), third := Note())
        assert isinstance(await third.wait(), QueueFull)
        patient = Note()
        await ComputedRequest(Twice(6), computation(model, patient), patient, Places(1)).begin_slowly()
        await asyncio.sleep(0.05)
        assert not patient.told
        model.only.go.set()
        assert [await note.wait() for note in (first, second, patient)] == [b"4", b"0,4,8,12,16", b"24"]

    run(test)


def test_patient_calls_begin_once_they_have_places_and_free_them_at_their_end() -> None:
    async def test(model: Model) -> None:
        model.only.go.clear()
        places, notes = Places(1), [Note() for _ in range(3)]
        requests = [ComputedRequest(Twice(6), computation(model, note), note, places) for note in notes]
        begun = [asyncio.create_task(request.begin_slowly()) for request in requests]
        await asyncio.sleep(0.01)
        assert [one.done() for one in begun] == [True, False, False]
        begun[1].cancel()
        assert await notes[1].wait() is None
        model.only.go.set()
        assert [await notes[number].wait() for number in (0, 2)] == [b"24", b"24"]
        assert begun[2].done()

    run(test)


def test_a_call_that_is_given_up_leaves_the_queue_and_its_model() -> None:
    async def test(model: Model) -> None:
        model.only.go.clear()
        begin(model, Twice(1), first := Note())
        await asyncio.to_thread(model.only.begun.wait, PATIENCE)
        begin(model, Twice(2, 3), given_up := Note())
        await asyncio.sleep(0.01)
        assert model.only.batcher.queued == 2 and given_up.given_up
        given_up.given_up()
        assert await given_up.wait() is None
        assert model.only.batcher.queued == 0
        begin(model, Twice(4), at_once := Note())
        assert at_once.given_up
        at_once.given_up()
        assert await at_once.wait() is None, "before its first step"
        model.only.go.set()
        assert await first.wait() == b"4"

    run(test)


@pytest.mark.parametrize("number", [1, -1, POISON], ids=["answer", "refused", "failed"])
def test_an_ended_call_goes_without_the_garbage_collector(no_collection: None, number: int) -> None:
    async def test(model: Model) -> None:
        reply, query = ForgetfulNote(), Twice(number)
        request = begin(model, query, reply)
        ended = weakref.ref(reply), weakref.ref(query), weakref.ref(request)
        await reply.wait()
        del reply, query, request
        begin(model, Twice(1), later := Note())  # a slot keeps its last batch until the next one
        await later.wait()
        assert [reference() for reference in ended] == [None] * 3

    run(test)


def test_work_in_a_thread_is_bounded_as_decoding_is() -> None:
    async def test(model: Model) -> None:
        with computation(model, Note()) as one:
            made = await one.decode(Decoding(in_one_step(lambda: numbers(3)), 8, "numbers"))
            share: Share = await one.run("double", made)
            assert share["doubled"].tolist() == [6]
        with (
            pytest.raises(InvalidRequest, match="numbers: decoding takes 2097152 bytes of memory"),
            computation(model, Note()) as other,
        ):
            await other.decode(Decoding(in_one_step(lambda: numbers(3)), 2**21, "numbers"))

    run(test)
