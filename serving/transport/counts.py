"""The figures of a transport for the server's metrics: plain numbers that are read when somebody asks for them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from serving.transport.frames import ErrorCode

#: The reasons to end a call before its answer is read: no room in memory, or no progress of its client.
MEMORY, STALLED = EVICTIONS = ("memory", "stalled")


class Counts:
    """The counts of a native server's connections since its start. Only its event loop's thread counts.

    accepted: connections. resets_received, resets_sent: RST_STREAM frames. goaways: the GOAWAY frames that name the
    last call, by their code. evicted: the ended calls by one of EVICTIONS.
    """

    __slots__ = ("accepted", "evicted", "goaways", "resets_received", "resets_sent")

    def __init__(self) -> None:
        self.accepted = 0
        self.resets_received = 0
        self.resets_sent = 0
        self.goaways = dict.fromkeys(ErrorCode, 0)
        self.evicted = dict.fromkeys(EVICTIONS, 0)


@dataclass(frozen=True)
class ConnectionFigures:
    """The figures of connections, which gRPC's own server does not tell.

    open: returns the number of open connections. counts: of their frames.
    """

    open: Callable[[], int]
    counts: Counts


@dataclass(frozen=True)
class Figures:
    """The figures of a transport. Any thread may call the functions.

    calls: returns the number of open calls, handled or not. held_bytes: returns the bytes that all calls hold.
    max_held_bytes: the most of them. evicted: the ended calls by reason. connections: None if nobody tells them.
    """

    calls: Callable[[], int]
    held_bytes: Callable[[], int]
    max_held_bytes: int
    evicted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVICTIONS, 0))
    connections: ConnectionFigures | None = None
