"""The order in which the connections of a server are served, so that many busy ones do not hold up the others."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Generator
from heapq import heappop, heappush, heapreplace
from itertools import count
from time import thread_time
from typing import TypeVar

#: The longest turn of a connection or a handler on the event loop, in seconds.
TURN_SECONDS = 0.002
# The processor's time of a round, after which connections wait for the next one, so that answers, timers and finished
# batches wait no longer. Connections that have taken less than their share get as much in addition.
_ROUND_SECONDS = 2 * TURN_SECONDS
# The time of its share that a connection which needs none keeps for later.
_CREDIT_SECONDS = 2 * TURN_SECONDS
# The time of the round that is taken from it to look at one entry of the line.
_ENTRY_SECONDS = 2e-6
# The time that the first step of a connection's handlers is expected to take, and the least of a later one. So few
# steps begin together that a round stays short if all of them take longer than those before.
_FIRST_STEP_SECONDS, _MIN_STEP_SECONDS = TURN_SECONDS / 4, TURN_SECONDS / 16
# The most by which the mean time of those that wait is taken to be ahead of the present one's.
_MAX_LEAD_SECONDS = 8 * TURN_SECONDS
# The weight of the latest step in the time that is expected of the next one.
_STEP_WEIGHT = 1 / 4

Result = TypeVar("Result")


class Place:
    """The place of a connection in its server's rounds. read_on: reads what was left for a later round."""

    __slots__ = ("_read_on", "_rounds", "group", "in_line", "line", "number", "step", "taken", "waits")

    def __init__(self, rounds: "Rounds", read_on: Callable[[], object]) -> None:
        self._rounds = rounds
        self._read_on = read_on
        #: True until ``read_on`` is called.
        self.waits = False
        #: The connections among which it waits.
        self.group = rounds.unproven
        #: The processor's time that it has taken, in seconds, and that of its group's others while it needed none.
        self.taken = self.group.start
        #: The time that the next step of a handler is expected to take.
        self.step = _FIRST_STEP_SECONDS
        #: What waits for its turn: handlers, and None for ``read_on``.
        self.line: OrderedDict[asyncio.Future[float] | None, None] = OrderedDict()
        #: True while it is in the line of its group.
        self.in_line = False
        #: The number of its last entry there.
        self.number = 0

    @property
    def proven(self) -> bool:
        """Return True once its client has got a whole answer, or many in a stream."""
        return self.group is self._rounds.proven

    def prove(self) -> None:
        """Note that its client has got an answer."""
        if not self.proven:
            self.group = self._rounds.proven
            self.taken = self.group.start
            if self.in_line:
                self._rounds.line_up(self)

    def may_go_on(self) -> bool:
        """Return True if there is time for the connection at once."""
        return self.group.admit(self)

    def charge(self, seconds: float) -> None:
        """Count the processor's time of what was read."""
        if seconds:
            self._rounds.charge(self, seconds)

    def wait(self, seconds: float = 0.0) -> None:
        """Wait for some seconds, and then for a round that has time for ``read_on``."""
        if self.waits:
            return
        self.waits = True
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._rounds.enter, self, None)
        else:
            self._rounds.enter(self, None)

    def go_on(self) -> None:
        """Read on, in its turn."""
        self.waits = False
        self._read_on()

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return a coroutine that runs a handler. Each of its steps waits for a round that has time, and counts."""
        return _InTurns(self, self._rounds, work)

    def leave(self) -> None:
        """Forget the connection, which has ended."""
        self._read_on = _do_nothing


class _Group:
    """Connections that have turns with each other.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): when the time of a round is over, connections wait, and
    those that have taken the least time are the first of the next round. A connection that seldom needs time gets it at
    once, however many others need more than there is.
    """

    __slots__ = ("_mean", "_waiting", "left", "line", "now")

    def __init__(self) -> None:
        #: The time that the present connection had taken before; none that waits has taken less.
        self.now = 0.0
        #: The time that is left in this round.
        self.left = _ROUND_SECONDS
        #: Those that wait: the time that each had taken when it came, a number, and the connection.
        self.line: list[tuple[float, int, Place]] = []
        self._mean = 0.0  # the time that those that wait have taken, in the mean
        self._waiting = 0  # the connections that waited when the round began

    @property
    def start(self) -> float:
        """Return the time that a new connection is taken to have had.

        If it were that of the present one, new connections would come before any other that has had a turn.
        """
        return max(self.now, self._mean - _CREDIT_SECONDS)

    def begin(self, seconds: float) -> None:
        """Begin a round that has so much time for the group."""
        self.left, self._waiting = seconds, len(self.line)

    def admit(self, place: Place) -> bool:
        """Return True if there is time for a connection at once."""
        place.taken = max(place.taken, self.now - _CREDIT_SECONDS)
        if place.taken < self.now:
            return self.left + _ROUND_SECONDS > 0
        return self.left > 0 and not self.line

    def take(self, place: Place, seconds: float) -> None:
        """Count the time that a connection takes in this round."""
        self.left -= seconds
        self.now = max(self.now, place.taken)
        place.taken += seconds
        mean = self._mean + seconds / (self._waiting + 1)
        self._mean = min(max(self.now, mean), self.now + _MAX_LEAD_SECONDS)


class Rounds:
    """The rounds of a server: what it does for its connections in a turn of the event loop. Each has a limited time.

    A client that wants no answers may come on any number of connections. So those with an answer have turns among
    themselves, and at least half of each round.
    """

    def __init__(self) -> None:
        #: The connections whose clients have got answers, and the others.
        self.proven, self.unproven = _Group(), _Group()
        self._number = count(1)
        self._next: asyncio.Handle | None = None

    def charge(self, place: Place, seconds: float) -> None:
        """Count the time that a connection has taken in this round."""
        place.group.take(place, seconds)
        if not self._next:
            self._schedule()

    def enter(self, place: Place, entry: "asyncio.Future[float] | None") -> None:
        """Let a connection wait, for a handler or to be read on."""
        place.line[entry] = None
        if not place.in_line:
            place.in_line = True
            self.line_up(place)
        if not self._next:
            self._schedule()

    def line_up(self, place: Place) -> None:
        """Add a connection to the line of its group. An earlier entry of it does not count."""
        place.number = number = next(self._number)
        heappush(place.group.line, (place.taken, number, place))

    def turn(self, place: Place) -> "asyncio.Future[float]":
        """Return what is done in the turn of a handler, with the time that is expected for its step as the result."""
        come: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.enter(place, come)
        return come

    def give_up(self, place: Place, come: "asyncio.Future[float]") -> float:
        """Let a handler leave the line. Return the time that was expected for its step if its turn has come."""
        place.line.pop(come, None)
        return come.result() if come.done() and not come.cancelled() else 0.0

    def stepped(self, place: Place, seconds: float, expected: float) -> None:
        """Count the time of a handler's step. expected: what was counted before; 0 for a step that did not wait."""
        if expected:
            place.taken += seconds - expected
        else:
            self.charge(place, seconds)
        place.step += _STEP_WEIGHT * (seconds - place.step)

    def _schedule(self) -> None:
        """Begin the next round in the next turn of the event loop."""
        self._next = asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a round, and let the first ones that wait go on."""
        self._next = None
        groups = (self.proven, self.unproven)
        share = 1 / 2 if all(group.line for group in groups) else 1.0
        for group in groups:
            group.begin(share * _ROUND_SECONDS)
        try:
            for group in groups:
                self._serve(group)
        finally:  # a fault in the reading of one connection holds up no other
            if not self._next and any(group.line for group in groups):
                self._schedule()

    def _serve(self, group: _Group) -> None:
        """Let the first ones of a group go on, as long as it has time in this round."""
        line, group.line = group.line, []  # those that come back wait for the next round
        try:
            while line and group.left > 0:
                group.left -= _ENTRY_SECONDS
                self._serve_first(line)
        finally:
            for back in group.line:
                heappush(line, back)
            group.line = line

    def _serve_first(self, line: list[tuple[float, int, Place]]) -> None:
        """Let the first connection go on, unless it has taken more since it came, or has nothing to do."""
        key, number, place = line[0]
        if number != place.number:  # it waits in the other group
            heappop(line)
            return
        if not place.line:  # its handlers have left
            heappop(line)
            place.in_line = False
            return
        if place.taken > key:
            heapreplace(line, (place.taken, number, place))
            return
        entry, _ = place.line.popitem(last=False)
        if not place.line:
            heappop(line)
            place.in_line = False
        if entry is None:
            place.go_on()
        elif not entry.done():
            expected = max(place.step, _MIN_STEP_SECONDS)
            place.group.take(place, expected)
            entry.set_result(expected)  # it goes on at the beginning of the event loop's next turn


class _InTurns(Coroutine[object, None, Result]):
    """A coroutine that passes on what another one waits for, and calls each of its steps in its connection's turn."""

    __slots__ = ("_steps",)

    def __init__(self, place: Place, rounds: Rounds, work: Coroutine[object, None, Result]) -> None:
        self._steps = _steps(place, rounds, work)
        next(self._steps)  # from now on, the end of this coroutine ends the other one

    def __await__(self) -> Generator[object, None, Result]:
        return self._steps

    def send(self, value: None, /) -> object:
        return self._steps.send(value)

    def throw(self, *error: object) -> object:
        try:
            return self._steps.throw(*error)  # type: ignore[call-overload]
        finally:
            del error  # whose traceback knows this function's names: a cycle would live on

    def close(self) -> None:
        self._steps.close()


def _steps(place: Place, rounds: Rounds, work: Coroutine[object, None, Result]) -> Generator[object, None, Result]:
    awaited: object = None
    while True:
        error: BaseException | None = None
        try:
            yield awaited
        except BaseException as raised:
            error = raised
        awaited, expected = None, 0.0  # a future's error would know this function's names: a cycle would live on
        if not isinstance(error, asyncio.CancelledError | GeneratorExit) and not place.may_go_on():
            come = rounds.turn(place)
            try:
                expected = yield from come
            except BaseException as raised:  # a cancellation, which does not wait for its turn
                error, expected = raised, rounds.give_up(place, come)
            del come
        begin = thread_time()
        try:
            awaited = work.send(None) if error is None else work.throw(error)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            if not isinstance(error, GeneratorExit):  # which may come after the event loop's end
                rounds.stepped(place, thread_time() - begin, expected)
            del error  # as above


def _do_nothing() -> None:
    pass
