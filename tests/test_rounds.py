"""Tests of the rounds in which connections are served, with times that the tests choose."""

import asyncio
import gc
import gzip
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count

import pytest

from serving.transport import frames, receiving
from serving.transport import rounds as module
from serving.transport.rounds import Place, Rounds
from tests.raw_client import Raw, framed, headers
from tests.transport_methods import serve

MANY = 50
#: The time of a round, and of a step that takes it all.
ROUND = module._ROUND_SECONDS


class Processor:
    """The processor's time, which passes as the tests say."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    clock = Processor()
    monkeypatch.setattr(module, "thread_time", clock)
    yield clock


def do_nothing() -> None:
    pass


def test_a_connection_waits_when_the_time_of_a_round_is_over() -> None:
    async def main() -> None:
        rounds = Rounds()
        first, second = Place(rounds, do_nothing), Place(rounds, do_nothing)
        assert first.may_go_on()
        first.charge(ROUND)
        assert not second.may_go_on()
        await asyncio.sleep(0)
        assert second.may_go_on(), "the next turn of the event loop has its own time"

    asyncio.run(main())


def test_a_connection_that_has_taken_less_than_the_others_does_not_wait() -> None:
    async def main() -> None:
        rounds = Rounds()
        light, heavy = Place(rounds, do_nothing), [Place(rounds, do_nothing) for _ in range(MANY)]
        for _ in range(5):
            for one in heavy:
                one.charge(ROUND)
                await asyncio.sleep(0)
        heavy[0].charge(ROUND)
        assert not heavy[1].may_go_on()
        assert light.may_go_on()
        light.charge(ROUND)
        assert not light.may_go_on(), "it gets a second share, and no third one"

    asyncio.run(main())


def test_a_connection_cannot_save_its_share_for_long() -> None:
    async def main() -> None:
        rounds = Rounds()
        light, heavy = Place(rounds, do_nothing), Place(rounds, do_nothing)
        for _ in range(100):
            heavy.charge(ROUND)
        await asyncio.sleep(0)
        taken = 0
        while light.may_go_on() and light.taken < rounds.unproven.now:
            light.charge(ROUND / 4)
            taken += 1
            await asyncio.sleep(0)
        assert 0 < taken <= 4

    asyncio.run(main())


def test_those_that_have_taken_the_least_go_on_first() -> None:
    order = list[int]()

    async def main() -> None:
        rounds = Rounds()
        places = [Place(rounds, partial(order.append, number)) for number in range(3)]
        for place, seconds in zip(places, (3.0, 1.0, 2.0), strict=True):
            place.charge(seconds)
        for place in places:
            place.wait()
            place.wait()  # which changes nothing
            assert place.waits
        while any(place.waits for place in places):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert order == [1, 2, 0]


@pytest.mark.parametrize("proven", [1, MANY])
def test_connections_with_answers_and_those_without_get_half_of_the_time_each(proven: int) -> None:
    async def main() -> None:
        rounds, taken, places = Rounds(), [0.0, 0.0], list[Place]()

        def read_on(number: int) -> None:
            taken[number < proven] += ROUND / 2
            places[number].charge(ROUND / 2)
            places[number].wait()

        places.extend(Place(rounds, partial(read_on, number)) for number in range(MANY + 1))
        for place in places[:proven]:
            place.prove()
        for place in places:
            place.wait()
        while sum(taken) < 1000 * ROUND:
            await asyncio.sleep(0)
        assert taken[0] / sum(taken) == pytest.approx(0.5, rel=0.1)

    asyncio.run(main())


def test_new_connections_that_come_together_do_not_hold_up_one_that_has_an_answer() -> None:
    read = list[int]()

    async def main() -> None:
        rounds, places = Rounds(), list[Place]()

        def read_on(number: int) -> None:
            read.append(number)
            places[number].charge(ROUND)

        places.extend(Place(rounds, partial(read_on, number)) for number in range(MANY))
        places[-1].prove()
        places[-1].charge(ROUND)
        for place in places[:-1]:
            assert not place.may_go_on() or place is places[0]
            place.charge(ROUND)
            place.wait()
        places[-1].wait()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert read[0] == MANY - 1


@pytest.mark.parametrize("in_line", [False, True])
def test_a_connection_that_gets_an_answer_waits_among_those_that_have_one(in_line: bool) -> None:
    read = list[str]()

    async def main() -> None:
        rounds = Rounds()
        others = [Place(rounds, partial(read.append, "other")) for _ in range(MANY)]
        place = Place(rounds, partial(read.append, "proven"))
        place.charge(100 * ROUND)
        for one in others:
            one.wait()
        if in_line:
            place.wait()
        assert not place.proven
        place.prove()
        place.prove()  # which changes nothing
        assert place.proven
        place.wait()
        while place.waits or any(one.waits for one in others):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not rounds.proven.line
        assert not rounds.unproven.line

    asyncio.run(main())
    assert read == ["proven", *["other"] * MANY], "each has one turn"


@pytest.mark.parametrize("ends", [True, False])
def test_new_connections_that_have_one_turn_each_do_not_hold_up_one_that_stays(ends: bool) -> None:
    async def main() -> None:
        rounds, turns = Rounds(), [0, 0]

        def come() -> None:
            def read_on() -> None:
                turns[0] += 1
                place.charge(ROUND / 2)
                if ends:
                    place.leave()
                come()

            place = Place(rounds, read_on)
            place.wait()

        def go_on() -> None:
            turns[1] += 1
            stays.charge(ROUND / 20)
            stays.wait()

        stays = Place(rounds, go_on)
        stays.wait()
        for _ in range(MANY):
            come()
        while turns[0] < 20 * MANY:
            await asyncio.sleep(0)
        assert turns[1] > MANY

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "messages", "proven"),
    [
        ("Echo", [b"1"], True),
        ("AnswerAtOnce", [b"1"], True),
        ("Refuse", [b"1"], False),
        ("EchoAll", [b"1"] * 15, False),
        ("EchoAll", [b"1"] * 16, True),
        ("EchoAll", [bytes(10_000)] * 16, False),  # for which the client's window has no room
    ],
)
def test_a_connection_is_proven_by_an_answer_or_many_in_a_stream(
    path: str, messages: list[bytes], proven: bool
) -> None:
    with serve() as serving:
        client = Raw(serving.port)
        client.send(headers(1, client.block(f"/test.Test/{path}")))
        client.send_data(1, b"".join(map(framed, messages)), last=path != "EchoAll")
        if path == "EchoAll":
            size = min(sum(len(framed(message)) for message in messages), frames.DEFAULT_WINDOW)
            client.read_until(lambda: len(client.answers[1].data) == size)
        else:
            client.read(1)
        [connection] = serving.server._connections
        assert connection._streams.place.proven == proven
        client.socket.close()


def test_what_follows_an_inflation_counts_for_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "thread_time", partial(next, count()))
    with serve() as serving:
        client = Raw(serving.port)
        client.send(headers(1, client.block("/test.Test/RefuseAtOnce", ("grpc-encoding", "gzip"))))
        client.send_data(1, framed(gzip.compress(bytes(2**17)), True))
        client.read(1)
        [connection] = serving.server._connections
        assert connection._streams.place.taken >= 1.0
        client.socket.close()


def test_a_round_has_time_for_some_of_those_that_wait_and_each_has_its_turn_once() -> None:
    read = list[int]()

    async def main() -> None:
        rounds, places = Rounds(), list[Place]()

        def read_on(number: int) -> None:
            read.append(number)
            places[number].charge(ROUND / 2)

        places.extend(Place(rounds, partial(read_on, number)) for number in range(4))
        for place in places:
            place.wait()
        while len(read) < 4:
            before = len(read)
            await asyncio.sleep(0)
            assert len(read) - before <= 2

    asyncio.run(main())
    assert read == [0, 1, 2, 3]


def test_a_fault_in_the_reading_of_one_connection_holds_up_no_other() -> None:
    read = list[str]()

    def fail() -> None:
        raise MemoryError

    async def main() -> None:
        told = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context.get("exception")))
        rounds = Rounds()
        for place in (Place(rounds, fail), Place(rounds, lambda: read.append("read"))):
            place.wait()
        for _ in range(3):
            await asyncio.sleep(0)
        assert [type(one) for one in told] == [MemoryError]

    asyncio.run(main())
    assert read == ["read"]


def test_a_pause_is_kept_before_the_turn() -> None:
    async def main() -> None:
        came = asyncio.Event()
        place = Place(Rounds(), came.set)
        place.wait(0.01)
        await asyncio.sleep(0)
        assert place.waits
        assert not came.is_set()
        await asyncio.wait_for(came.wait(), 10)

    asyncio.run(main())


def test_a_connection_that_has_ended_is_not_read() -> None:
    read = list[int]()

    async def main() -> None:
        place = Place(Rounds(), lambda: read.append(1))
        place.wait()
        place.leave()
        while place.waits:
            await asyncio.sleep(0)

    asyncio.run(main())
    assert read == []


def test_the_steps_of_many_handlers_do_not_hold_up_one_that_seldom_works(processor: Processor) -> None:
    """Each step takes a quarter of a round, so a few may come before the one of the light connection."""
    steps = list[str]()

    async def work(name: str, times: int) -> None:
        for _ in range(times):
            steps.append(name)
            processor.seconds += ROUND / 4
            await asyncio.sleep(0)

    async def main() -> None:
        rounds = Rounds()
        light, heavy = Place(rounds, do_nothing), [Place(rounds, do_nothing) for _ in range(MANY)]
        tasks = [asyncio.create_task(one.in_turns(work("heavy", 10))) for one in heavy for _ in range(4)]
        while len(steps) < 3 * MANY:
            await asyncio.sleep(0)
        before = len(steps)
        await asyncio.create_task(light.in_turns(work("light", 1)))
        assert steps.index("light") - before <= 12
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert steps.count("heavy") == MANY * 4 * 10


@pytest.mark.parametrize("step", [ROUND / 20, ROUND / 2])
def test_a_connection_with_many_handlers_gets_no_more_than_its_share(processor: Processor, step: float) -> None:
    """The handlers of the others have ten to one steps of the length of its own."""
    taken, turns = {"few": 0.0, "many": 0.0}, list[float]()

    async def work(name: str, seconds: float) -> None:
        while True:
            taken[name] += seconds
            processor.seconds += seconds
            await asyncio.sleep(0)

    async def main() -> None:
        rounds = Rounds()
        few, many = [Place(rounds, do_nothing) for _ in range(4)], Place(rounds, do_nothing)
        tasks = [asyncio.create_task(one.in_turns(work("few", ROUND / 20))) for one in few for _ in range(10)]
        tasks += [asyncio.create_task(many.in_turns(work("many", step))) for _ in range(300)]
        while processor.seconds < 500 * ROUND:
            before = processor.seconds
            await asyncio.sleep(0)
            turns.append(processor.seconds - before)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert 0.1 <= taken["many"] / (taken["many"] + taken["few"]) <= 0.3
    assert max(turns) <= 4 * ROUND


def test_a_handler_in_turns_ends_as_it_would_alone() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 7

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("wrong")

    async def main() -> None:
        place = Place(Rounds(), do_nothing)
        assert await place.in_turns(answer()) == 7
        assert await asyncio.create_task(place.in_turns(answer())) == 7
        with pytest.raises(ValueError, match="wrong"):
            await place.in_turns(fail())

    asyncio.run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_a_handler_that_is_cancelled_while_it_waits_for_its_turn_ends_at_once(begun: bool) -> None:
    seen = list[str]()

    async def work() -> None:
        try:
            seen.append("begun")
            await asyncio.sleep(0)
            seen.append("gone on")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main() -> None:
        rounds = Rounds()
        place = Place(rounds, do_nothing)

        def read_on() -> None:
            busy.charge(ROUND)
            busy.wait()

        busy = Place(rounds, read_on)
        if not begun:
            place.charge(1000 * ROUND)
            busy.wait()
        task = asyncio.create_task(place.in_turns(work()))
        if begun:
            await asyncio.sleep(0)
            place.charge(1000 * ROUND)
            busy.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == (["begun", "cancelled"] if begun else [])


def test_a_handler_that_never_begins_leaves_nothing_behind() -> None:
    async def work() -> None: ...

    async def main() -> None:
        place = Place(Rounds(), do_nothing)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            task = asyncio.create_task(place.in_turns(work()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            place.in_turns(work()).close()
            never_run = place.in_turns(work())
            del never_run
            gc.collect()

    asyncio.run(main())


def test_data_of_a_connection_that_must_wait_pays_no_debt() -> None:
    async def main() -> None:
        rounds = Rounds()
        heavy, other = Place(rounds, do_nothing), Place(rounds, do_nothing)
        heavy.charge(100 * ROUND)
        other.charge(ROUND)
        before = rounds.unproven.now
        heavy.charge(0.0)
        assert rounds.unproven.now == before

    asyncio.run(main())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_handler_that_ends_with_an_error_leaves_no_cycle_behind(cancelled: bool) -> None:
    class Mark:
        pass

    async def work(futures: list["asyncio.Future[None]"], mark: Mark) -> None:
        try:
            await futures.pop()  # without a name, which would make a cycle of its own
        finally:
            assert mark

    async def main() -> None:
        place, mark = Place(Rounds(), do_nothing), Mark()
        seen = weakref.ref(mark)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        task = asyncio.create_task(place.in_turns(work([future], mark)))
        await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        else:
            loop.call_soon(future.set_exception, ValueError("wrong"))
        del future, mark
        gc.disable()
        try:
            await asyncio.wait((task,))
            assert cancelled or str(task.exception()) == "wrong"
            del task
            assert seen() is None
        finally:
            gc.enable()

    asyncio.run(main())


def test_a_handler_whose_future_fails_waits_for_its_turn() -> None:
    seen = list[str]()

    async def work(name: str, future: "asyncio.Future[None]") -> None:
        with suppress(ValueError):
            await future
        seen.append(name)

    async def main() -> None:
        rounds, loop = Rounds(), asyncio.get_running_loop()
        indebted, other = Place(rounds, do_nothing), Place(rounds, do_nothing)

        def read_on() -> None:
            busy.charge(ROUND)
            if len(seen) < 2:
                busy.wait()

        busy = Place(rounds, read_on)
        futures = [loop.create_future() for _ in range(2)]
        tasks = [
            asyncio.create_task(place.in_turns(work(name, future)))
            for place, name, future in zip((indebted, other), ("indebted", "other"), futures, strict=True)
        ]
        await asyncio.sleep(0)
        indebted.charge(20 * ROUND)
        busy.charge(ROUND)
        busy.wait()
        for future in futures:
            loop.call_soon(future.set_exception, ValueError("wrong"))
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert seen == ["other", "indebted"]


def test_handlers_that_are_cancelled_in_the_line_leave_it(processor: Processor) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        rounds = Rounds()
        place = Place(rounds, do_nothing)
        place.charge(100 * ROUND)
        tasks = [asyncio.create_task(place.in_turns(work())) for _ in range(100)]
        place.charge(100 * ROUND)
        rounds.unproven.left = -1.0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not place.line
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not place.in_line

    asyncio.run(main())
