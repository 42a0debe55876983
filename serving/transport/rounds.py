"""The order in which the connections of a server are served, so that many busy ones do not hold up the others."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from heapq import heappop, heappush
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
# The weight of the latest step of a handler in the time that the next one is expected to take.
_STEP_WEIGHT = 1 / 16

Result = TypeVar("Result")


class Place:
    """The place of a connection in its server's rounds. read_on: reads what was left for a later round."""

    __slots__ = ("_read_on", "_reads_on", "_rounds", "taken", "waiting")

    def __init__(self, rounds: "Rounds", read_on: Callable[[], object]) -> None:
        self._rounds = rounds
        self._read_on = read_on
        self._reads_on = False
        #: The processor's time that it has taken, in seconds, and that of the others while it needed none.
        self.taken = rounds.now
        #: The number of its entries in the line.
        self.waiting = 0

    @property
    def waits(self) -> bool:
        """Return True until ``read_on`` is called."""
        return self._reads_on

    def may_go_on(self) -> bool:
        """Return True if there is time for the connection at once."""
        return self._rounds.admit(self)

    def charge(self, seconds: float) -> None:
        """Count the processor's time of what was read."""
        self._rounds.charge(self, seconds)

    def wait(self, seconds: float = 0.0) -> None:
        """Wait for some seconds, and then for a round that has time for ``read_on``."""
        if self._reads_on:
            return
        self._reads_on = True
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._rounds.enter, self, self._go_on)
        else:
            self._rounds.enter(self, self._go_on)

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return a coroutine that runs a handler. Each of its steps waits for a round that has time, and counts."""
        return _InTurns(self, self._rounds, work)

    def leave(self) -> None:
        """Forget the connection, which has ended."""
        self._read_on = _do_nothing

    def _go_on(self) -> None:
        self._reads_on = False
        self._read_on()


class Rounds:
    """The rounds of a server: what it does for its connections in a turn of the event loop. Each has a limited time.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): when the time of a round is over, connections wait, and
    those that have taken the least time are the first of the next round. A connection that seldom needs time gets it at
    once, however many others need more than there is.
    """

    def __init__(self) -> None:
        #: The time that the present connection had taken before; none that waits has taken less.
        self.now = 0.0
        self._line: list[tuple[float, int, Place, Callable[[], object]]] = []
        self._number = count()
        self._next: asyncio.Handle | None = None
        self._left = _ROUND_SECONDS
        self._step = 0.0  # the time that a step of a handler is expected to take

    def admit(self, place: Place) -> bool:
        """Return True if there is time for a connection at once."""
        place.taken = max(place.taken, self.now - _CREDIT_SECONDS)
        if place.taken < self.now:
            return self._left + _ROUND_SECONDS > 0
        return self._left > 0 and not self._line

    def charge(self, place: Place, seconds: float) -> None:
        """Count the time that a connection has taken in this round."""
        self._left -= seconds
        if not self._next:
            self._schedule()
        self.now = max(self.now, place.taken)
        place.taken += seconds

    def enter(self, place: Place, go_on: Callable[[], object]) -> None:
        """Let a connection wait. go_on: called in its turn."""
        heappush(self._line, (place.taken + place.waiting * self._step, next(self._number), place, go_on))
        place.waiting += 1
        if not self._next:
            self._schedule()

    def turn(self, place: Place) -> "asyncio.Future[None]":
        """Return what is done when it is the turn of a connection's handler."""
        come = asyncio.get_running_loop().create_future()
        self.enter(place, partial(self._let, come))
        return come

    def stepped(self, place: Place, seconds: float, waited: bool) -> None:
        """Count the time of a handler's step. waited: it had waited for its turn, so its time was expected."""
        self.charge(place, seconds)
        if waited:
            self._left += seconds
        self._step += _STEP_WEIGHT * (seconds - self._step)

    def _let(self, come: "asyncio.Future[None]") -> None:
        """Let a handler go on, at the beginning of the event loop's next turn, unless it was cancelled."""
        if not come.done():
            come.set_result(None)
            self._left -= self._step

    def _schedule(self) -> None:
        """Begin the next round in the next turn of the event loop."""
        self._next = asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a round, and let the first ones that wait go on."""
        self._next, self._left, line = None, _ROUND_SECONDS, self._line
        try:
            for _ in range(len(line)):  # not those that come back
                if self._left <= 0:
                    break
                _, _, place, go_on = heappop(line)
                place.waiting -= 1
                go_on()
        finally:  # a fault in the reading of one connection holds up no other
            if line and not self._next:
                self._schedule()


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
        return self._steps.throw(*error)  # type: ignore[call-overload]

    def close(self) -> None:
        self._steps.close()


def _steps(place: Place, rounds: Rounds, work: Coroutine[object, None, Result]) -> Generator[object, None, Result]:
    awaited: object = None
    while True:
        error: BaseException | None = None
        try:
            yield awaited
            if waits := not rounds.admit(place):
                yield from rounds.turn(place)
        except BaseException as raised:  # such as a cancellation, which does not wait for its turn
            error, waits = raised, False
        begin = thread_time()
        try:
            awaited = work.send(None) if error is None else work.throw(error)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            if not isinstance(error, GeneratorExit):  # which may come after the event loop's end
                rounds.stepped(place, thread_time() - begin, waits)
            del error  # whose traceback knows this function's names: a cycle would live on


def _do_nothing() -> None:
    pass
