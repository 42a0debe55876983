"""The common terms of a server's connections."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.transport.counts import Counts
from serving.transport.memory import Memory
from serving.transport.methods import Method, TransportLimits
from serving.transport.unpacking import Unpacker

Connection = TypeVar("Connection")


@dataclass(frozen=True, slots=True)
class Terms(Generic[Connection]):
    """The common terms of a server's connections.

    find: returns the method of a path, or None. opened: called with each new connection and its address; returns False
    if it is refused. lost: called with each other connection at its end. age: seconds after which a
    connection is renewed; 0 for never. grace: seconds that its calls then get to finish. counts: of all connections.
    """

    find: Callable[[str], Method | None]
    limits: TransportLimits
    memory: Memory
    unpacker: Unpacker
    opened: Callable[[Connection, str], bool]
    lost: Callable[[Connection], None]
    age: float
    grace: float
    counts: Counts = field(default_factory=Counts)
