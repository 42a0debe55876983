"""The shape of a target: a function of bytes, and inputs to begin with."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A reader of bytes.

    run: reads the bytes. It raises AssertionError, or any error that is not documented, for a fault of this project.
    seeds: returns right inputs, from which wrong ones are made.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


class Parts:
    """The bytes of an input, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Return True if bytes are left."""
        return self._at < len(self._data)

    def number(self) -> int:
        """Return the next byte, 0 after the end."""
        return (self.take(1) or b"\0")[0]

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))


def pieces(data: bytes, size: int) -> list[bytes]:
    """Return data in pieces of a size; 0 for all in one."""
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [data]
