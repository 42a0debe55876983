"""The common terms of a server's connections."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serving.transport.methods import Method
from serving.transport.streams import Shared

Connection = TypeVar("Connection")


@dataclass(frozen=True, slots=True)
class Terms(Shared, Generic[Connection]):
    """The common terms of a server's connections.

    find: returns the method of a path, or None. opened: called with each new connection and its address; returns False
    if it is refused. lost: called with each other connection at its end. age: seconds after which a
    connection is renewed; 0 for never. grace: seconds that its calls then get to finish.
    """

    find: Callable[[str], Method | None]
    opened: Callable[[Connection, str], bool]
    lost: Callable[[Connection], None]
    age: float
    grace: float
