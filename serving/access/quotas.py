"""The limits of each client: its calls in flight, and its calls a second."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from serving.transport.patience import Patience

_MAX_IDLE_CLIENTS = 10_000  # that are remembered without a call in flight


class Quota:
    """The calls of one client."""

    __slots__ = ("calls", "patience", "rate")

    def __init__(self) -> None:
        self.calls = 0
        self.patience: Patience | None = None
        #: The rate of that patience.
        self.rate: float | None = None

    def limit(self, rate: float | None, now: float) -> None:
        """Set the most calls a second. None: no limit."""
        if rate != self.rate:
            self.rate = rate
            self.patience = Patience(max(1, round(rate)), rate, now) if rate else None


class Quotas:
    """The calls of all clients by name. now: returns seconds of any clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._quotas: OrderedDict[str, Quota] = OrderedDict()  # the one that called last is last

    def begin(self, client: str, calls: float | None, rate: float | None) -> str:
        """Count a new call, or return the reason why the client must wait.

        calls: the most calls in flight. rate: the most calls a second, and at once. None: no limit.
        """
        now = self._now()
        quota = self._quotas.get(client)
        if quota is None:
            quota = self._quotas[client] = Quota()
        self._quotas.move_to_end(client)
        quota.limit(rate, now)  # it may have changed
        if calls is not None and quota.calls >= calls:
            return f"{quota.calls} calls of this client are in flight; the limit is {calls:g}"
        if quota.patience and not quota.patience.spend(1, now):
            quota.patience.earn(1)  # a refused call costs nothing, so that a client that slows down is served
            return f"this client has made too many calls; the limit is {rate:g} a second"
        quota.calls += 1
        self._forget_idle()
        return ""

    def end(self, client: str) -> None:
        """Note the end of a call."""
        self._quotas[client].calls -= 1

    def _forget_idle(self) -> None:
        """Forget the clients that called longest ago, unless a call is in flight."""
        excess = len(self._quotas) - _MAX_IDLE_CLIENTS
        if excess > 0:
            idle = (client for client, quota in self._quotas.items() if not quota.calls)
            for client in list(islice(idle, excess)):
                del self._quotas[client]
