"""The terms of every connection of a server."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.transport.memory import Memory
from serving.transport.methods import Method, TransportLimits

Connection = TypeVar("Connection")


@dataclass(frozen=True, slots=True)
class Terms(Generic[Connection]):
    """The terms of every connection of a server.

    find: the method with a path. opened and lost: told of each connection. age: seconds after which a connection is
    renewed, 0 for never. grace: seconds that calls then get to finish.
    """

    find: Callable[[str], Method | None]
    limits: TransportLimits
    memory: Memory
    opened: Callable[[Connection], None]
    lost: Callable[[Connection], None]
    age: float
    grace: float
