"""The sizes of TLS records.

A record of a byte costs the server as much as one of a thousand. No honest client sends many of them.
"""

import fcntl
import socket
import sys
import termios
from asyncio import BaseTransport

_BYTES_RECEIVED = slice(128, 136)  # of Linux's struct tcp_info
_CHECKED_BYTES = 4096  # of content; the received bytes are looked at once for so many
_FIRST_CHECKED_BYTES = 256
_MAX_RATIO = 4  # of received bytes to content: that of records with seven bytes
_MAX_OTHER_BYTES = 2**15  # of the handshake, which may have a client's certificates, and of a record in part
_MAX_WAITING_BYTES = 2**18  # that uvloop has read and not decrypted yet, since the connection reads nothing now
_ENDED = (OSError, ValueError)  # of a connection that has ended; uvloop's socket then has the number -1


class Records:
    """The TLS records of a connection. link: its socket, or None if there is no TCP."""

    __slots__ = ("_content", "_link", "_next")

    def __init__(self, link: socket.socket | None) -> None:
        self._link = link
        self._content = 0
        self._next = _FIRST_CHECKED_BYTES

    def are_tiny(self, size: int) -> bool:
        """Count received bytes of content. Return True if far more bytes were received for them."""
        self._content += size
        if self._content < self._next or self._link is None:
            return False
        self._next = self._content + _CHECKED_BYTES
        return self._are_more(_MAX_OTHER_BYTES)

    def are_empty(self) -> bool:
        """Return True if far more bytes were received than content, of which nobody is told: such as for new keys."""
        return self._are_more(_MAX_OTHER_BYTES + _MAX_WAITING_BYTES)

    def _are_more(self, other: int) -> bool:
        """Return True if more bytes were read than their content explains, and ``other``."""
        if self._link is None:
            return False
        limit = _MAX_RATIO * self._content + other
        received = _received(self._link)
        # A large upload waits in the system until the server reads on.
        return received > limit and received - _unread(self._link) > limit


def records_of(transport: BaseTransport) -> Records | None:
    """Return the records of a connection, or None if it is not encrypted."""
    return Records(transport.get_extra_info("socket")) if transport.get_extra_info("ssl_object") else None


def _received(link: socket.socket) -> int:
    """Return the bytes that a connection has received, or 0 where the system does not tell."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return 0
    try:
        info = link.getsockopt(socket.IPPROTO_TCP, option, _BYTES_RECEIVED.stop)
    except _ENDED:
        return 0
    return int.from_bytes(info[_BYTES_RECEIVED], sys.byteorder)


def _unread(link: socket.socket) -> int:
    """Return the received bytes that the server has not read yet."""
    try:
        waiting = fcntl.ioctl(link.fileno(), termios.FIONREAD, bytes(4))
    except _ENDED:
        return 0
    return int.from_bytes(waiting, sys.byteorder)
