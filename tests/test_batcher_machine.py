"""The batcher in any order of events: each accepted request gets one answer, its own, and nothing is left behind.

The clock is the test's, and each batch is computed when the test says so. So the same events give the same batches.
"""

import asyncio
import threading
import time
from dataclasses import dataclass, field
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from serving.batching import batch, batcher, slots
from serving.batching.admission import BatchPolicy
from serving.batching.batch import Hooks
from serving.batching.cost import BatchCost
from serving.batching.slots import SlotState
from serving.batching.ticket import State, Ticket
from serving.errors import DeadlineUnmeetable, Draining, InferenceFailed, QueueFull
from serving.metrics.registry import Metrics, ModelMetrics
from serving.runtime import Arrays
from tests.machines import search

MAX_QUEUE, TIMEOUT_SECONDS, MAX_STEADY_SECONDS = 24, 60.0, 20.0
CLIENTS = ("a", "b", "c")
OUTCOMES = ("good", "raises", "not finite", "too few rows")


class Clock:
    """A clock in place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@dataclass
class Computation:
    """A batch in computation: its values, and what will come of it."""

    values: NDArray[np.float32]
    outcome: str = ""
    go: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> int:
        return int(self.values[0, 0])


class Runtime:
    """A runtime whose batches wait for the test."""

    def __init__(self) -> None:
        self.running: dict[int, Computation] = {}
        self.all_good = False

    def __call__(self, arrays: Arrays) -> Arrays:
        one = Computation(arrays["x"].astype(np.float32))
        if not self.all_good:
            self.running[one.key] = one
            assert one.go.wait(60)
        if one.outcome == "raises":
            raise RuntimeError("as the test wants")
        outputs = 3 * one.values + 1
        if one.outcome == "not finite":
            outputs[-1] = np.nan
        return {"y": outputs[:-1] if one.outcome == "too few rows" else outputs}


def finite(outputs: Arrays) -> NDArray[np.bool_]:
    return np.isfinite(outputs["y"][:, 0])


@dataclass
class Asked:
    """A request: its values, and its ends. patient: it waited for room, so it keeps its place."""

    values: NDArray[np.float32]
    client: str
    deadline: float | None = None
    patient: bool = False
    ends: list[Ticket] = field(default_factory=list)
    ticket: Ticket | None = None
    refused: Exception | None = None
    faulty: bool = False  # a part of it was in a batch that did not come out well

    def check(self) -> None:
        """Check the end of a request that was accepted."""
        assert self.ticket and self.ends == [self.ticket], "one end"
        if self.ticket.state is State.ANSWERED:
            assert (self.ticket.result()["y"] == 3 * self.values + 1).all(), "its own answer"
        elif self.ticket.state is State.FAILED:
            error = self.ticket.error
            late = isinstance(error, DeadlineUnmeetable) and self.deadline is not None
            displaced = isinstance(error, QueueFull) and not self.patient
            assert late or displaced or (isinstance(error, InferenceFailed) and self.faulty)


class Requests(RuleBasedStateMachine):
    """Requests, batches and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patches = pytest.MonkeyPatch()
        for module in (batch, batcher, slots):
            self.patches.setattr(module, "time", self.clock)
        for module in (batch, batcher):
            self.patches.setattr(module, "_logger", Mock())
        self.loop = asyncio.new_event_loop()
        self.runtime = Runtime()
        self.asked: list[Asked] = []
        self.streams: list[asyncio.Task[None]] = []
        self.next_value = 0
        self.closing: asyncio.Task[None] | None = None

    @initialize(count=st.integers(1, 3), max_batch=st.integers(1, 6))
    def start(self, count: int, max_batch: int) -> None:
        policy = BatchPolicy(max_batch, max(1, max_batch // 2), MAX_QUEUE, TIMEOUT_SECONDS, ageing=5.0)
        cost = BatchCost([(1, 0.1), (4, 0.4)])
        metrics = ModelMetrics(Metrics(), "m", "1", ["only"])

        async def make() -> batcher.Batcher:
            return batcher.Batcher(self.runtime, Hooks(finite), metrics, policy, cost, count)

        self.batcher = self.loop.run_until_complete(make())

    @rule(
        client=st.sampled_from(CLIENTS),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        urgent=st.booleans(),
        seconds=st.sampled_from((None, None, 0.05, 0.5, 3.0)),
    )
    def enqueue(self, client: str, sizes: list[int], urgent: bool, seconds: float | None) -> None:
        async def push() -> None:
            for size in sizes:
                deadline = None if seconds is None else self.clock.now + seconds
                self.push(self.request(client, size, deadline), urgent)

        self.loop.run_until_complete(push())
        self.settle()

    @rule(client=st.sampled_from(CLIENTS), size=st.integers(1, 9))
    def enqueue_from_a_stream(self, client: str, size: int) -> None:
        asked = self.request(client, size, None)
        asked.patient = True

        async def wait() -> None:
            await self.batcher.room_for({"x": asked.values}, client)
            self.push(asked, False)

        self.streams.append(self.loop.create_task(wait()))
        self.settle()

    @precondition(lambda self: self.open())
    @rule(choice=st.integers(0, 50))
    def cancel(self, choice: int) -> None:
        open_now = self.open()
        ticket = open_now[choice % len(open_now)].ticket
        assert ticket

        async def give_up() -> None:
            self.batcher.give_up(ticket)

        self.loop.run_until_complete(give_up())
        assert ticket.state is State.GIVEN_UP
        self.settle()

    @precondition(lambda self: self.waiting_streams())
    @rule(choice=st.integers(0, 50))
    def give_up_a_stream(self, choice: int) -> None:
        waiting = self.waiting_streams()
        waiting[choice % len(waiting)].cancel()
        self.settle()

    @precondition(lambda self: self.runtime.running)
    @rule(choice=st.integers(0, 50), outcome=st.sampled_from(OUTCOMES), seconds=st.sampled_from((0.0, 0.1, 1.0)))
    def finish(self, choice: int, outcome: str, seconds: float) -> None:
        self.clock.now += seconds
        keys = sorted(self.runtime.running)
        self.release(self.runtime.running.pop(keys[choice % len(keys)]), outcome)
        self.settle()

    @rule(seconds=st.sampled_from((0.02, 0.3, 11.0, TIMEOUT_SECONDS)))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now += seconds

        async def watch() -> None:
            hung = [slot.batch for slot in self.batcher._slots._slots if slot.batch and self.is_late(slot.began)]
            for one in hung:
                for part in one.parts:
                    self.of(part.ticket).faulty = True
            self.batcher._watch()
            for one in hung:  # its thread comes back later
                first = one.parts[0]
                self.release(self.runtime.running.pop(int(first.arrays["x"][first.start, 0])), "good")

        self.loop.run_until_complete(watch())
        self.settle()

    @precondition(lambda self: self.closing is None)
    @rule(really=st.integers(0, 5))
    def drain(self, really: int) -> None:
        if not really:  # not in each order of events: later requests are all refused
            self.closing = self.loop.create_task(self.batcher.close())
            self.settle()

    @invariant()
    def what_waits_is_counted(self) -> None:
        if hasattr(self, "batcher"):
            tickets = [one.ticket for one in self.open() if one.ticket]
            assert self.batcher.queued == sum(ticket.left for ticket in tickets) <= MAX_QUEUE
            assert self.batcher.pending == sum(bool(ticket.left) for ticket in tickets)

    def teardown(self) -> None:
        try:
            if hasattr(self, "batcher"):
                self.end()
        finally:
            self.patches.undo()
            self.loop.close()

    def end(self) -> None:
        """Compute what is left, close the batcher, and check every request."""
        closing = self.closing or self.loop.create_task(self.batcher.close())
        self.runtime.all_good = True
        for one in self.runtime.running.values():
            self.release(one, "good")

        async def wait() -> None:
            streams = [stream for stream in self.streams if not stream.cancelled()]
            await asyncio.wait_for(asyncio.gather(closing, *streams), MAX_STEADY_SECONDS)
            await asyncio.sleep(0)

        self.loop.run_until_complete(wait())
        for asked in self.asked:
            if asked.patient and asked.refused is None and asked.ticket is None:
                continue  # its stream was given up while it waited for room
            assert (asked.refused is None) != (asked.ticket is None)
            if asked.ticket:
                asked.check()
        assert not self.batcher._line
        assert self.batcher.queued == self.batcher.pending == self.batcher._slots._under_way == 0
        assert not self.batcher._slots.busy

    def request(self, client: str, size: int, deadline: float | None) -> Asked:
        values = np.arange(self.next_value, self.next_value + size, dtype=np.float32)[:, None]
        self.next_value += size
        self.asked.append(Asked(values, client, deadline))
        return self.asked[-1]

    def push(self, asked: Asked, urgent: bool) -> None:
        try:
            asked.ticket = self.batcher.enqueue(
                {"x": asked.values},
                then=asked.ends.append,
                deadline=asked.deadline,
                urgent=urgent,
                client=asked.client,
                patient=asked.patient,
            )
        except (QueueFull, DeadlineUnmeetable, Draining) as error:
            asked.refused = error
            assert not isinstance(error, DeadlineUnmeetable) or asked.deadline is not None
            assert isinstance(error, Draining) == self.batcher._closing

    def open(self) -> list[Asked]:
        """Return the requests that were accepted and have not ended."""
        return [one for one in self.asked if one.ticket and not one.ticket.ended]

    def waiting_streams(self) -> list["asyncio.Task[None]"]:
        """Return the streams that wait for room."""
        return [stream for stream in self.streams if not stream.done()]

    def of(self, ticket: Ticket) -> Asked:
        return next(one for one in self.asked if one.ticket is ticket)

    def is_late(self, began: float) -> bool:
        return self.clock.now >= began + TIMEOUT_SECONDS

    def release(self, one: Computation, outcome: str) -> None:
        """Let a batch come out in some way."""
        one.outcome = outcome
        if outcome != "good":
            found = set(one.values[:, 0])
            for asked in self.asked:
                asked.faulty |= not found.isdisjoint(asked.values[:, 0])
        one.go.set()

    def settle(self) -> None:
        """Run the event loop until every slot computes or has nothing to do."""

        async def run() -> None:
            end = time.monotonic() + MAX_STEADY_SECONDS
            steady = 0
            while steady < 2:  # the second time, since callbacks may have waited at the first
                for _ in range(5):
                    await asyncio.sleep(0)
                steady = steady + 1 if self.is_steady() else 0
                assert time.monotonic() < end, "a request makes no progress"
                if not steady:
                    await asyncio.sleep(0.0002)

        self.loop.run_until_complete(run())

    def is_steady(self) -> bool:
        """Return True if no slot is idle while work waits, and all outcomes were passed on."""
        inner = self.batcher._slots
        with inner._lock:
            computing = [slot for slot in inner._slots if slot.state is SlotState.COMPUTING]
            firsts = [slot.batch.parts[0] for slot in computing if slot.batch]
            keys = {int(part.arrays["x"][part.start, 0]) for part in firsts}
            idle = len(inner._slots) - len(computing)
            resting = all(
                slot.state in (SlotState.IDLE, SlotState.COMPUTING, SlotState.CLOSED) for slot in inner._slots
            )
            again = any(not part.ticket.ended for part in inner._again)
            in_batches = {part.ticket for slot in computing if slot.batch for part in slot.batch.parts}
            lost = [one for one in self.open() if one.ticket and not (one.ticket.left or one.ticket in in_batches)]
            return (
                resting
                and not (idle and (inner._queue.rows or again))
                and keys == self.runtime.running.keys()
                and inner._under_way == len(computing)
                and not self.batcher._dispatching
                and (again or not lost)
            )


def test_no_order_of_events_loses_or_mixes_up_a_request() -> None:
    search(Requests, examples=30, steps=30)
