"""The limit of what a peer may send without advancing a call. Pure: the caller gives the time."""


class Patience:
    """A token bucket. Useless frames of a peer empty it; time and answered calls fill it.

    burst: the tokens of a full bucket. per_second: the tokens that time alone adds.
    """

    __slots__ = ("_burst", "_left", "_per_second", "_since")

    def __init__(self, burst: int, per_second: float, now: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._since = now

    def spend(self, cost: float, now: float) -> bool:
        """Take tokens, and return True if the peer may go on. now: seconds of any clock, always the same one."""
        self._left = min(self._burst, self._left + (now - self._since) * self._per_second) - cost
        self._since = now
        return self._left >= 0

    def earn(self, gain: float) -> None:
        """Add tokens that the peer has earned."""
        self._left = min(self._burst, self._left + gain)
