"""How much a peer may send that brings no call further. Pure: it is told the time."""


class Patience:
    """A bucket that empties with what a peer sends for nothing, and fills with time and with answered calls.

    burst: what it holds when full. per_second: what time alone adds.
    """

    __slots__ = ("_burst", "_left", "_per_second", "_since")

    def __init__(self, burst: int, per_second: float, now: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._since = now

    def spend(self, cost: float, now: float) -> bool:
        """Return whether the peer may go on, so many seconds of any clock being now."""
        self._left = min(self._burst, self._left + (now - self._since) * self._per_second) - cost
        self._since = now
        return self._left >= 0

    def earn(self, gain: float) -> None:
        """Add what the peer has earned."""
        self._left = min(self._burst, self._left + gain)
