"""Listening sockets that belong to this server alone from the moment they are opened.

To bind does not claim a port: with SO_REUSEADDR two sockets can be bound to one port, and the second one fails only
when it listens. So these sockets listen at once. Connections wait in the system's queue until the server accepts them.
"""

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BACKLOG = 1024  # connections that may wait to be accepted
_MAX_UNIX_PATH_BYTES = 107  # a limit of the system
_LOCK_SECONDS = 1.0
_LOCK_PAUSE_SECONDS = 0.01


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Return one listening socket for each address of a host, all on the same port.

    host: an address or a name; empty for every interface. port: 0 for any free one. Raises OSError.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            if opened:  # all addresses use the free port of the first one
                address = (address[0], opened[0].getsockname()[1], *address[2:])
            listening = socket.socket(family, socket.SOCK_STREAM)
            opened.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # otherwise it would take the port of IPv4 too
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
            listening.setblocking(False)
    except BaseException:
        for listening in opened:
            listening.close()
        raise
    return opened


class UnixSocket:
    """A listening Unix socket, and the file by which clients find it.

    A socket on which no server listens is replaced. Raises OSError: EADDRINUSE if another server has the path or the
    path is no socket, ENAMETOOLONG if the path has more than 107 bytes.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
            raise OSError(
                errno.ENAMETOOLONG, f"{len(os.fsencode(path))} bytes; expected {_MAX_UNIX_PATH_BYTES} at most"
            )
        with _locked(self._path.parent):
            self._remove_left_behind()
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.bind(path)
                self.socket.listen(_BACKLOG)
            except BaseException:
                self.socket.close()
                raise
            self._identity = _identity(self._path)
        self.socket.setblocking(False)

    def unlink(self) -> None:
        """Remove the file, unless another server owns it now."""
        with suppress(OSError), _locked(self._path.parent):
            if _identity(self._path) == self._identity:
                self._path.unlink()

    def _remove_left_behind(self) -> None:
        """Remove a socket file on which no server listens. Raises OSError if a server listens."""
        try:
            is_socket = stat.S_ISSOCK(self._path.stat().st_mode)
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # otherwise this would wait for a server that hangs with a full queue
            if not is_socket or probe.connect_ex(str(self._path)) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, "another server has it, or it is no socket")
        self._path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others of these functions out of a folder, so that two servers cannot both replace the same socket.

    These functions take no time. A lock that is held for longer belongs to another program, and is not waited for.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    end = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(_LOCK_PAUSE_SECONDS)
                    continue
            break
        yield
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int, int]:
    """Return a file's identity, which a later file with the same name and inode number does not have."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns
