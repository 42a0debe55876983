"""The clock of a connection's turn of the event loop."""

from time import perf_counter, thread_time

from serving.transport.rounds import TURN_SECONDS


class TurnClock:
    """The processor's time that a connection has taken in its turn.

    The time in which other processes have the core does not count, so that a busy machine does not split turns.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a turn."""
        #: The seconds that were taken until the last ``stop``.
        self.taken = 0.0

    def go_on(self) -> None:
        """Let the clock run until ``stop``."""
        self._started = thread_time() - self.taken
        self._next_look = perf_counter() + TURN_SECONDS - self.taken

    def is_over(self) -> bool:
        """Return True if the turn has taken its time. Only for a running clock."""
        if perf_counter() <= self._next_look:  # quick to read, and never behind the processor's
            return False
        self.stop()
        self._next_look = perf_counter() + TURN_SECONDS - self.taken
        return self.taken > TURN_SECONDS

    def stop(self) -> None:
        """Note the time that was taken so far."""
        self.taken = thread_time() - self._started

    @property
    def overdraft(self) -> float:
        """Return the seconds that the turn has taken beyond twice its time, or 0."""
        return max(0.0, self.taken - 2 * TURN_SECONDS)
